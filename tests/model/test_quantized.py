"""Quantised models say what the model of the same weights in float32 says, wherever and however they run."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from recipe import recipe_tensors, to_ours
from test_sharding import SIZES, mesh_of, one_device
from training import SMALL, jit

from deqa_jax.config import PRESETS, DeqaConfig, Execution
from deqa_jax.model.deqa import Deqa
from deqa_jax.model.quantized import QuantizedLinear, wrap
from deqa_jax.parameters import Leaves, abstract_model, flatten, parameter_shapes, unflatten
from deqa_jax.quantize import KERNEL_SCALE, SCHEMES, dequantize, is_quantized, parameter_dtype, quantize
from deqa_jax.scoring_program import scoring_model, scoring_parameters
from deqa_jax.sharding import parameter_shardings, partition_specs

WIDE = SIZES["wide"]


@functools.cache
def leaves_of(config: DeqaConfig, scheme: str) -> Leaves:
    """The recipe's weights, quantised."""
    leaves: Leaves = {}
    for path, leaf in to_ours(config, recipe_tensors(config)).items():
        if is_quantized(path):
            kernels, scales = zip(*(quantize(layer, scheme) for layer in leaf), strict=True)
            leaves[path], leaves[*path[:-1], KERNEL_SCALE] = np.stack(kernels), np.stack(scales)
        else:
            leaves[path] = leaf
    return leaves


@functools.cache
def whole_leaves_of(config: DeqaConfig, scheme: str) -> Leaves:
    """What those stand for."""
    quantized, shapes = leaves_of(config, scheme), parameter_shapes(config)
    whole = {path: leaf for path, leaf in quantized.items() if path in shapes}
    for path in filter(is_quantized, shapes):
        kernel, scale = (jnp.asarray(quantized[*path[:-1], name]) for name in ("kernel", KERNEL_SCALE))
        whole[path] = dequantize(kernel, scale, scheme, shapes[path][-2])
    return whole


def program(model: Deqa) -> Callable[[Leaves], np.ndarray]:
    """The last hidden state of eight images; the first one is zero."""
    graphdef = nnx.graphdef(model)

    @jit
    def run(leaves: Any, images: jax.Array) -> jax.Array:
        model = nnx.merge(graphdef, leaves)
        return model.last_hidden(images, model.prefill(jnp.asarray([1, 9, 7])), jnp.asarray([5, 8]))

    images = np.random.default_rng(0).standard_normal((8, 28, 28, 3)).astype(np.float32)
    images[0] = 0
    return lambda leaves: np.asarray(run(unflatten(leaves), images))


@functools.cache
def whole_program() -> Callable[[Leaves], np.ndarray]:
    return program(scoring_model(WIDE, "float32", one_device()))


@functools.cache
def on_one_device(scheme: str, int8_activations: bool = False) -> np.ndarray:
    model = scoring_model(WIDE, "float32", one_device(), scheme, int8_activations=int8_activations)
    return program(model)(leaves_of(WIDE, scheme))


# ---- one layer --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("inputs", [7, 64, 130])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_layer_is_that_of_the_kernel_it_stands_for(scheme: str, inputs: int, dtype: str) -> None:
    random = np.random.default_rng(inputs)
    base = nnx.eval_shape(lambda: nnx.Linear(inputs, 5, dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(0)))
    kernel, scale = map(jnp.asarray, quantize(random.standard_normal((inputs, 5)).astype(np.float32), scheme))
    bias = jnp.asarray(random.standard_normal(5), dtype)
    layer = nnx.merge(
        nnx.graphdef(QuantizedLinear(base, scheme, int8_activations=False)),
        {"kernel": kernel, KERNEL_SCALE: scale, "bias": bias},
    )
    x = jnp.asarray(random.standard_normal((2, 3, inputs)), dtype)
    whole = np.asarray(dequantize(kernel, scale, scheme, inputs), np.float64)
    expected = np.asarray(x, np.float64) @ whole + np.asarray(bias, np.float64)
    found = layer(x)
    assert found.dtype == dtype
    # In bfloat16 the kernel of int4 and the sum are rounded; of int8 the sum alone.
    error = 1e-6 if dtype == "float32" else 2**-8
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=error, atol=error * np.abs(expected).max())


# ---- the whole model --------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("config", [SMALL, WIDE], ids=["small", "wide"])
def test_shapes_are_those_of_the_wrapped_model(config: DeqaConfig, scheme: str) -> None:
    model = wrap(abstract_model(config, Execution(dtype="bfloat16", param_dtype="bfloat16")), scheme)
    state = flatten(nnx.to_pure_dict(nnx.state(model)))
    assert {path: leaf.shape for path, leaf in state.items()} == parameter_shapes(config, scheme)
    assert {path: leaf.dtype for path, leaf in state.items()} == {
        path: parameter_dtype(path, scheme, "bfloat16") for path in state
    }
    assert {path: leaf.shape for path, leaf in leaves_of(config, scheme).items()} == parameter_shapes(config, scheme)


def test_the_dense_layers_of_the_language_models_blocks_are_quantised_and_no_others() -> None:
    model = wrap(abstract_model(SMALL), "int8")
    left = {path for path, module in nnx.iter_modules(model) if isinstance(module, nnx.Linear)}
    assert [path for path in left if path[0] == "language"] == [("language", "head")]
    made = {path for path, module in nnx.iter_modules(model) if isinstance(module, QuantizedLinear)}
    assert len(made) == 9
    assert all(path[:2] == ("language", "layers") for path in made)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_quantised_model_says_what_its_weights_in_float32_say(scheme: str) -> None:
    np.testing.assert_allclose(on_one_device(scheme), whole_program()(whole_leaves_of(WIDE, scheme)), atol=5e-5)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_unrolled_blocks_give_what_stacked_ones_do(scheme: str) -> None:
    apart: dict[tuple[Any, ...], Any] = {}
    for path, leaf in leaves_of(WIDE, scheme).items():
        if path[1] == "layers":
            apart |= {(path[0], "layers", i, *path[2:]): layer for i, layer in enumerate(leaf)}
        else:
            apart[path] = leaf
    unrolled = scoring_model(WIDE, "float32", one_device(), scheme).unrolled()
    np.testing.assert_allclose(program(unrolled)(apart), on_one_device(scheme), atol=2e-5)


def test_activations_are_in_int8_where_that_costs_little() -> None:
    model = wrap(abstract_model(SMALL), "int8", int8_activations=True)
    made = {path: module for path, module in nnx.iter_modules(model) if isinstance(module, QuantizedLinear)}
    integer = {path for path, module in made.items() if module.int8_activations}
    assert integer == {("language", "layers", name) for name in ("query", "gate", "up")}


def test_int8_activations_are_near_and_not_the_same() -> None:
    exact, rounded = on_one_device("int8"), on_one_device("int8", True)
    difference = np.abs(rounded - exact)
    assert 1e-3 < difference.mean() < 0.1 * np.abs(exact).mean()


# ---- on a mesh --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheme", "int8_activations", "axes"),
    [("int8", True, (2, 2, 2)), ("int4", False, (1, 1, 8))],
)
def test_a_mesh_gives_what_one_device_gives(scheme: str, int8_activations: bool, axes: tuple[int, int, int]) -> None:
    mesh = mesh_of(axes)
    places = scoring_parameters(WIDE, "float32", mesh, scheme)
    leaves = {path: jax.device_put(leaf, places[path].sharding) for path, leaf in leaves_of(WIDE, scheme).items()}
    assert {path: (leaf.shape, leaf.dtype) for path, leaf in leaves.items()} == {
        path: (place.shape, place.dtype) for path, place in places.items()
    }
    model = scoring_model(WIDE, "float32", mesh, scheme, int8_activations=int8_activations)
    expected = on_one_device(scheme, int8_activations)
    # An activation on the edge between two steps may fall to either side.
    tolerance = 0.05 if int8_activations else 5e-5
    np.testing.assert_allclose(program(model)(leaves), expected, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("axes", [(1, 8, 1), (1, 1, 8), (2, 2, 2)])
def test_the_published_size_is_split_evenly(scheme: str, axes: tuple[int, int, int]) -> None:
    shapes = parameter_shapes(PRESETS["full"], scheme)
    specs, shardings = partition_specs(shapes), parameter_shardings(shapes, mesh_of(axes))
    for path in filter(is_quantized, shapes):
        part = shardings[path].shard_shape(shapes[path])
        assert np.prod(part) * axes[1] * axes[2] == np.prod(shapes[path]), path
        scale = (*path[:-1], KERNEL_SCALE)
        # Outputs are split with their scales.
        assert specs[scale][-1] == specs[path][-1]
