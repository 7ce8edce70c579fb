import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from deqa_jax.config import Execution
from deqa_jax.model import layers
from deqa_jax.model.layers import LayerNorm, RMSNorm, attention, fold, last_block, linear, stack, unstack

HALF = Execution(dtype="bfloat16", param_dtype="bfloat16")


def random(shape: tuple[int, ...], seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


@pytest.mark.parametrize("epsilon", [1e-5, 1e-6])
def test_norms_keep_their_epsilon_where_the_variance_is_small(epsilon: float) -> None:
    x = random((3, 16)) * 1e-3
    exact = np.asarray(x, np.float64)
    centred = exact - exact.mean(-1, keepdims=True)
    by_layer = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + epsilon)
    by_root_mean_square = exact / np.sqrt((exact**2).mean(-1, keepdims=True) + epsilon)
    np.testing.assert_allclose(LayerNorm(16, epsilon=epsilon, execution=Execution())(x), by_layer, rtol=1e-5)
    np.testing.assert_allclose(RMSNorm(16, epsilon=epsilon, execution=Execution())(x), by_root_mean_square, rtol=1e-5)


def test_layer_norm_of_values_far_from_zero_keeps_its_digits() -> None:
    x = random((2, 64)) + 1000.0
    exact = np.asarray(x, np.float64)
    expected = (exact - exact.mean(-1, keepdims=True)) / exact.std(-1, keepdims=True)
    np.testing.assert_allclose(LayerNorm(64, epsilon=1e-12, execution=Execution())(x), expected, atol=1e-3)


@pytest.mark.parametrize("norm", [LayerNorm, RMSNorm])
def test_norms_compute_in_float32_and_return_the_compute_dtype(norm: type[LayerNorm] | type[RMSNorm]) -> None:
    x = random((4, 32)) * 100
    half = norm(32, epsilon=1e-6, execution=HALF)(x)
    assert half.dtype == jnp.bfloat16
    exact = norm(32, epsilon=1e-6, execution=Execution())(x)
    np.testing.assert_array_equal(half, exact.astype(jnp.bfloat16))


@given(
    batch=st.integers(1, 3),
    queries=st.integers(1, 7),
    keys=st.integers(1, 9),
    heads=st.integers(1, 4),
    masked=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=10, deadline=None)
def test_attention_is_softmax_attention(
    batch: int, queries: int, keys: int, heads: int, masked: bool, seed: int
) -> None:
    q, k, v = (
        random((batch, queries, heads, 4), seed),
        random((batch, keys, heads, 4), seed + 1),
        random((batch, keys, heads, 4), seed + 2),
    )
    mask = np.random.default_rng(seed).random((queries, keys)) < 0.5
    mask[:, 0] = True
    logits = np.einsum("bthe,bshe->bhts", q, k) / 2.0
    if masked:
        logits = np.where(mask, logits, -np.inf)
    weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    out = attention(q, k, v, jnp.asarray(mask) if masked else None)
    np.testing.assert_allclose(out, np.einsum("bhts,bshe->bthe", weights, v), atol=1e-5)


def test_attention_survives_logits_of_any_size() -> None:
    q = random((1, 5, 2, 8)) * 1e4
    assert np.isfinite(attention(q, q, q)).all()


def test_attention_on_other_platforms_is_the_same_function() -> None:
    """What CPUs do head by head is what accelerators do at once."""
    q, k, v = (random((2, 6, 3, 8), seed) for seed in range(3))
    np.testing.assert_allclose(attention(q, k, v), attention(q, k, v, jnp.ones((6, 6), bool)), atol=1e-6)


@pytest.mark.parametrize("chunks", [2, 4, 6, 7])
def test_attention_in_chunks_is_the_same_function_with_the_same_gradient(chunks: int) -> None:
    q, k, v, out = (random((2, 6, 3, 8), seed) for seed in range(4))

    def value_and_gradient(attention: Any) -> Any:
        return jax.value_and_grad(lambda *x: jnp.sum(attention(*x) * out), argnums=(0, 1, 2))(q, k, v)

    ours = value_and_gradient(functools.partial(layers._attention_in_chunks, chunks=chunks))
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), ours, value_and_gradient(attention))


def test_attention_in_chunks_keeps_the_logits_of_one() -> None:
    shape = jax.ShapeDtypeStruct((1, 4096, 1, 8), jnp.float32)

    def memory(chunks: int) -> int:
        def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            return jnp.sum(layers._attention_in_chunks(q, k, v, chunks=chunks))

        compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(shape, shape, shape).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert memory(8) < memory(1) / 4


class Doubler(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.dense = linear(3, 3, bias=True, execution=Execution(), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.dense(x)


def blocks_apart(blocks: nnx.Module, count: int) -> nnx.List:
    graphdef, state = nnx.split(blocks)
    return nnx.List([nnx.merge(graphdef, jax.tree.map(lambda x, i=i: x[i], state)) for i in range(count)])


@pytest.mark.parametrize("num_layers", [None, 0, 1, 3])
def test_fold_runs_the_first_layers_in_order(num_layers: int | None) -> None:
    blocks = stack(Doubler, 4, nnx.Rngs(0))
    apart = blocks_apart(blocks, 4)
    x, extra = random((2, 3)), jnp.arange(4.0)
    expected = x
    for i in range(4 if num_layers is None else num_layers):
        expected = apart[i](expected) + extra[i]
    for some in (blocks, apart):
        carry, outs = fold(some, lambda block, x, extra: (block(x) + extra, x), x, extra, num_layers=num_layers)
        np.testing.assert_allclose(carry, expected, atol=1e-5)
        if num_layers == 0:
            assert outs is None
        else:
            np.testing.assert_array_equal(outs[0], x)


def test_layers_of_a_stack_are_drawn_differently() -> None:
    kernel = stack(Doubler, 3, nnx.Rngs(0)).dense.kernel[...]
    assert kernel.shape == (3, 3, 3)
    assert not np.array_equal(kernel[0], kernel[1])


def test_last_block_is_the_last() -> None:
    blocks = stack(Doubler, 3, nnx.Rngs(0))
    apart = blocks_apart(blocks, 3)
    for some in (blocks, apart):
        np.testing.assert_array_equal(last_block(some).dense.kernel[...], apart[2].dense.kernel[...])


def test_unstacked_blocks_share_nothing() -> None:
    apart = unstack(nnx.eval_shape(lambda: stack(Doubler, 3, nnx.Rngs(0))), 3)
    assert len(jax.tree.leaves(nnx.state(apart))) == 6
