"""Kernels of few bits: what they stand for is near, wherever it can be, and what cannot be is refused."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deqa_jax.config import PRESETS, ConfigError
from deqa_jax.parameters import parameter_shapes
from deqa_jax.quantize import (
    GROUP,
    KERNEL_SCALE,
    SCHEMES,
    dequantize,
    integer_product,
    is_quantized,
    packed_shapes,
    parameter_dtype,
    quantize,
    quantize_tokens,
    quantized_shapes,
    read_scheme,
    write_scheme,
)

LARGEST = {"int8": 127, "int4": 7}
FULL = PRESETS["full"]


def restored(kernel, scale, scheme, inputs):
    return np.asarray(dequantize(jnp.asarray(kernel), jnp.asarray(scale), scheme, inputs))


def by_input(scale, scheme, inputs):
    """The scale of every weight."""
    return np.repeat(scale, inputs if scheme == "int8" else GROUP, axis=0)[:inputs]


# ---- kernels ----------------------------------------------------------------------------------------------


@given(
    inputs=st.sampled_from([1, 2, 63, 64, 65, 200]),
    # One number: every shape is compiled.
    outputs=st.just(5),
    exponent=st.integers(-30, 37),
    spread=st.floats(0, 3),
    empty=st.integers(0, 5),
    scheme=st.sampled_from(SCHEMES),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_every_weight_is_within_half_a_scale(inputs, outputs, exponent, spread, empty, scheme, seed):
    random = np.random.default_rng(seed)
    weights = random.standard_normal((inputs, outputs)) * np.exp(spread * random.standard_normal((inputs, outputs)))
    weights = (weights / np.abs(weights).max() * 10.0**exponent).astype(np.float32)
    weights[:, empty:] = 0
    kernel, scale = quantize(weights, scheme)
    assert (kernel.dtype, scale.dtype) == (np.int8, np.float32)
    assert (kernel.shape, scale.shape) == packed_shapes(weights.shape, scheme)
    each = by_input(scale, scheme, inputs)
    found = restored(kernel, scale, scheme, inputs)
    assert (np.abs(found - weights) <= 0.5001 * each).all()
    # The largest weight of a scale is met exactly, but for rounding.
    assert (np.abs(found) <= LARGEST[scheme] * each * 1.0001).all()
    largest = np.maximum.reduceat(np.abs(weights), range(0, inputs, inputs if scheme == "int8" else GROUP), axis=0)
    np.testing.assert_allclose(scale * LARGEST[scheme], np.where(scale > 0, largest, 0), rtol=1e-6)
    assert not found[:, empty:].any()


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16, np.float64])
def test_weights_of_any_float_dtype_are_taken(dtype):
    weights = np.random.default_rng(0).standard_normal((70, 3)).astype(dtype)
    for scheme in SCHEMES:
        for one, other in zip(quantize(weights, scheme), quantize(weights.astype(np.float32), scheme), strict=True):
            np.testing.assert_array_equal(one, other)


def test_weights_below_what_a_scale_can_say_are_zero():
    weights = np.array([[1e-44, 1e-37, 1.0], [-1e-44, 0.0, 0.5]], np.float32)
    kernel, scale = quantize(weights, "int8")
    assert kernel.tolist() == [[0, 0, 127], [0, 0, 64]]
    assert scale[0, :2].tolist() == [0, 0]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e39])
def test_weights_that_are_not_finite_are_refused(value, scheme):
    weights = np.ones((130, 2))
    weights[129, 1] = value
    with pytest.raises(FloatingPointError):
        quantize(weights, scheme)


def test_two_inputs_share_a_byte():
    weights = np.array([[7, -7], [-1, 3], [2, -2]], np.float32)
    kernel, scale = quantize(weights, "int4")
    assert scale.tolist() == [[1, 1]]
    # Low half first, in two's complement; what fills the last byte is zero.
    assert kernel.astype(np.uint8).tolist() == [[0xF7, 0x39], [0x02, 0x0E]]
    np.testing.assert_array_equal(restored(kernel, scale, "int4", 3), weights)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_stack_stands_for_its_layers(scheme):
    weights = np.random.default_rng(0).standard_normal((3, 130, 4)).astype(np.float32)
    kernels, scales = (np.stack(parts) for parts in zip(*(quantize(layer, scheme) for layer in weights), strict=True))
    found = restored(kernels, scales, scheme, 130)
    for i in range(3):
        np.testing.assert_array_equal(found[i], restored(kernels[i], scales[i], scheme, 130))


def test_errors_are_those_of_the_bits():
    """Of normally distributed weights, as a share of them."""
    weights = np.random.default_rng(0).standard_normal((1024, 64)).astype(np.float32)
    for scheme, most in (("int8", 0.01), ("int4", 0.11)):
        error = restored(*quantize(weights, scheme), scheme, 1024) - weights
        assert most / 2 < np.sqrt((error**2).mean() / (weights**2).mean()) < most


# ---- activations ------------------------------------------------------------------------------------------


@given(width=st.sampled_from([1, 7, 40]), exponent=st.integers(-30, 36), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_every_token_is_within_half_its_scale(width, exponent, seed):
    x = np.random.default_rng(seed).standard_normal((2, 3, width)).astype(np.float32) * np.float32(10.0**exponent)
    x[0, 1] = 0
    whole, scale = quantize_tokens(jnp.asarray(x))
    assert (whole.dtype, scale.dtype, scale.shape) == (jnp.int8, jnp.float32, (2, 3, 1))
    assert (np.abs(np.asarray(whole, np.float32) * scale - x) <= 0.5001 * np.asarray(scale)).all()
    assert not np.asarray(whole[0, 1]).any()


def test_an_integer_product_is_that_of_whole_numbers():
    random = np.random.default_rng(0)
    x = random.standard_normal((2, 5, 300)).astype(np.float32)
    kernel, scale = quantize(random.standard_normal((300, 7)).astype(np.float32), "int8")
    whole, token_scale = (np.asarray(part) for part in quantize_tokens(jnp.asarray(x)))
    expected = (whole.astype(np.int64) @ kernel.astype(np.int64)) * token_scale.astype(np.float64) * scale
    found = integer_product(jnp.asarray(x), jnp.asarray(kernel), jnp.asarray(scale))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert np.abs(found - x @ restored(kernel, scale, "int8", 300)).max() < 0.5


def test_an_integer_product_of_the_largest_sums_does_not_overflow():
    width = FULL.language.mlp_dim
    x, kernel = jnp.ones((1, width)), jnp.full((width, 1), -127, jnp.int8)
    found = integer_product(x, kernel, jnp.full((1, 1), 1 / 127, jnp.float32))
    np.testing.assert_allclose(found, [[-width]], rtol=1e-6)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_stays_so_in_its_own_token(value):
    x = np.ones((2, 4), np.float32)
    x[0, 2] = value
    found = np.asarray(integer_product(jnp.asarray(x), jnp.ones((4, 3), jnp.int8), jnp.ones((1, 3))))
    assert not np.isfinite(found[0]).any()
    np.testing.assert_allclose(found[1], 4, rtol=1e-6)


# ---- which, and how it is written -------------------------------------------------------------------------


@pytest.mark.parametrize(("scheme", "bits"), [("int8", 8), ("int4", 4.5)])
def test_the_published_size_takes_little_more_than_half_of_bfloat16_or_less(scheme, bits):
    plain, shapes = parameter_shapes(FULL), parameter_shapes(FULL, scheme)
    size = sum(np.prod(shape) * parameter_dtype(path, scheme, "bfloat16").itemsize for path, shape in shapes.items())
    kernels = sum(int(np.prod(shape)) for path, shape in plain.items() if is_quantized(path))
    total = sum(map(np.prod, plain.values()))
    assert 0.91 < kernels / total < 0.93
    assert size == pytest.approx(kernels * bits / 8 + 2 * (total - kernels), rel=2e-3)
    assert size < 0.541 * 2 * total


def test_parameters_keep_what_they_are_stored_in():
    path = ("language", "layers", "out", "kernel")
    for scheme in SCHEMES:
        assert parameter_dtype(path, scheme, "bfloat16") == np.int8
        assert parameter_dtype((*path[:-1], KERNEL_SCALE), scheme, "bfloat16") == np.float32
        assert parameter_dtype(("language", "head", "kernel"), scheme, "float32") == np.float32
    assert parameter_dtype(path, None, "bfloat16") == jnp.bfloat16


def test_a_model_that_is_not_quantised_has_no_other_shapes():
    shapes = parameter_shapes(dataclasses.replace(FULL))
    assert not any(path[-1] == KERNEL_SCALE for path in shapes)
    others = {path: shape for path, shape in shapes.items() if not is_quantized(path)}
    assert quantized_shapes(others, "int4") == others


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_scheme_is_read_as_it_is_written(scheme):
    assert read_scheme(write_scheme(scheme)) == scheme
    assert read_scheme(None) is None


@pytest.mark.parametrize("written", [{"scheme": "int3", "version": 1}, {"scheme": "int8", "version": 2}, "int8", {}, 8])
def test_a_scheme_of_another_time_is_refused(written):
    with pytest.raises(ConfigError, match="not known to this program"):
        read_scheme(written)
