"""The kernel for TPUs, interpreted here, against attention written out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import NamedSharding

from deqa_jax.config import MeshConfig
from deqa_jax.model.tpu_attention import suits_tpu, tpu_attention
from deqa_jax.sharding import BATCH, make_mesh


def written_out(query, key, value):
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    logits = np.einsum("bthe,bshe->bhts", query, key) / np.sqrt(query.shape[-1])
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.einsum("bhts,bshe->bthe", weights / weights.sum(axis=-1, keepdims=True), value)


def operands(shape, seed=0, dtype=jnp.float32):
    return [jnp.asarray(x, dtype) for x in np.random.default_rng(seed).normal(size=(3, *shape))]


@pytest.mark.parametrize(
    ("length", "heads", "head_dim"), [(1, 2, 64), (127, 1, 64), (128, 3, 64), (300, 2, 128), (1025, 1, 64)]
)
def test_any_length_gives_what_attention_is(length, heads, head_dim):
    query, key, value = operands((2, length, heads, head_dim), seed=length)
    with pltpu.force_tpu_interpret_mode():
        found = tpu_attention(query, key, value)
    np.testing.assert_allclose(found, written_out(query, key, value), atol=2e-6)


def test_bfloat16_is_as_near_as_its_rounding_allows():
    query, key, value = operands((1, 200, 2, 64), dtype=jnp.bfloat16)
    with pltpu.force_tpu_interpret_mode():
        found = tpu_attention(query, key, value)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float64(found), written_out(query, key, value), atol=4e-3)


def test_the_gradient_is_that_of_attention():
    given, wanted = operands((1, 150, 2, 64)), operands((1, 150, 2, 64), seed=1)[0]

    def plain(query, key, value):
        return jnp.sum(jax.nn.dot_product_attention(query, key, value) * wanted)

    with pltpu.force_tpu_interpret_mode():
        found = jax.grad(lambda *given: jnp.sum(tpu_attention(*given) * wanted), argnums=(0, 1, 2))(*given)
    for one, other in zip(found, jax.grad(plain, argnums=(0, 1, 2))(*given), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)


# Two devices: eight interpreted kernels wait for each other for ever where there are fewer threads.
@pytest.mark.parametrize(("heads", "shape"), [(4, (1, 1, 2)), (4, (1, 2, 1)), (3, (1, 1, 2))])
def test_a_mesh_splits_batch_and_heads(heads, shape):
    """Three heads cannot be split in two: each device has all of them."""
    mesh = make_mesh(MeshConfig(data=shape[0], fsdp=shape[1], tensor=shape[2]), jax.devices()[:2])
    query, key, value = operands((2, 130, heads, 64))
    placed = NamedSharding(mesh, BATCH)
    with pltpu.force_tpu_interpret_mode():
        found = jax.jit(lambda *given: tpu_attention(*given, placed=placed))(query, key, value)
    assert found.sharding.shard_shape(found.shape)[0] == 2 // shape[1]
    np.testing.assert_allclose(found, written_out(query, key, value), atol=2e-6)


def test_it_suits_bfloat16_tokens_that_look_at_each_other():
    tokens = jnp.zeros((2, 1025, 16, 64), jnp.bfloat16)
    assert suits_tpu(tokens, tokens)
    assert not suits_tpu(tokens.astype(jnp.float32), tokens.astype(jnp.float32))
    assert not suits_tpu(tokens[:, :64], tokens)
    assert not suits_tpu(tokens[..., :12], tokens[..., :12])
