"""The kernel for NVIDIA GPUs: when it is taken, and what is put around it; its arithmetic needs such a GPU."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deqa_jax.model import cuda_attention as module
from deqa_jax.model.cuda_attention import cuda_attention, suits_cuda

PLAIN = jax.nn.dot_product_attention


def operands(length, keys, seed=0):
    random = np.random.default_rng(seed)
    return [jnp.asarray(random.normal(size=(2, n, 3, 8)), jnp.float32) for n in (length, keys, keys)]


@pytest.fixture
def kernel(monkeypatch):
    """JAX's own attention in the kernel's place, with what JAX refuses of the kernel's gradients."""
    calls = []

    def attention(query, key, value, *, implementation, query_seq_lengths=None, key_value_seq_lengths=None):
        assert implementation == "cudnn"
        calls.append((query.shape[1], key.shape[1]))
        return PLAIN(
            query, key, value, query_seq_lengths=query_seq_lengths, key_value_seq_lengths=key_value_seq_lengths
        )

    monkeypatch.setattr(module.jax.nn, "dot_product_attention", attention)
    return calls


@pytest.mark.parametrize(("length", "keys"), [(4, 9), (9, 4)])
def test_odd_lengths_are_filled_up_for_gradients_alone(kernel, length, keys):
    given, wanted = operands(length, keys), operands(length, keys, seed=1)[0]
    np.testing.assert_array_equal(cuda_attention(*given), PLAIN(*given))
    assert kernel == [(length, keys)]

    def loss(attention):
        return lambda *given: jnp.sum(attention(*given) * wanted)

    found = jax.value_and_grad(loss(cuda_attention), argnums=(0, 1, 2))(*given)
    expected = jax.value_and_grad(loss(PLAIN), argnums=(0, 1, 2))(*given)
    assert kernel[1:] == [(length + length % 2, keys + keys % 2)]
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5), found, expected)


@pytest.mark.parametrize(
    ("device", "taken"),
    [
        ({"platform": "gpu", "compute_capability": "9.0"}, True),
        ({"platform": "gpu", "compute_capability": "8.0"}, True),
        ({"platform": "gpu", "compute_capability": "7.5"}, False),
        ({"platform": "gpu", "compute_capability": "gfx942"}, False),
        ({"platform": "tpu"}, False),
        ({"platform": "cpu"}, False),
    ],
)
def test_it_is_for_gpus_that_have_it(monkeypatch, device, taken):
    monkeypatch.setattr(module.jax, "local_devices", lambda: [SimpleNamespace(**device)])
    tokens = jnp.zeros((1, 5, 2, 64), jnp.bfloat16)
    assert suits_cuda(tokens, tokens) == taken


def test_it_takes_what_the_kernel_takes(monkeypatch):
    device = SimpleNamespace(platform="gpu", compute_capability="9.0")
    monkeypatch.setattr(module.jax, "local_devices", lambda: [device])
    tokens = jnp.zeros((1, 5, 4, 136), jnp.bfloat16)
    assert suits_cuda(tokens[..., :128], tokens[:, :2, :, :128])
    assert not suits_cuda(tokens, tokens)
    assert not suits_cuda(tokens[..., :12], tokens[..., :12])
    assert not suits_cuda(tokens[..., :64], tokens[:, :, :2, :64])
    assert not suits_cuda(tokens[..., :64].astype(jnp.float32), tokens[..., :64].astype(jnp.float32))
