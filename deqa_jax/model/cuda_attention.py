"""Attention without a mask on NVIDIA GPUs: cuDNN's kernel, which keeps logits on the chip."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# The first generation of GPUs that the kernel is for, and the widest heads that it takes there.
_COMPUTE_CAPABILITY = 8.0
_WIDEST_HEAD = 128


def suits_cuda(query: Float[Array, "B T H E"], key: Float[Array, "B S H E"]) -> bool:
    """Whether this process has GPUs for the kernel, which has no float32, and it takes these heads."""
    head_dim = query.shape[-1]
    if query.dtype != jnp.bfloat16 or query.shape[2] != key.shape[2] or head_dim % 8 or head_dim > _WIDEST_HEAD:
        return False
    device = jax.local_devices()[0]
    # AMD's have a name there.
    capability = str(getattr(device, "compute_capability", ""))
    return device.platform == "gpu" and capability[:1].isdigit() and float(capability) >= _COMPUTE_CAPABILITY


@jax.custom_vjp
def cuda_attention(
    query: Float[Array, "B T H E"], key: Float[Array, "B S H E"], value: Float[Array, "B S H E"]
) -> Float[Array, "B T H E"]:
    """Softmax attention scaled by 1/√head_dim, logits and softmax in float32 (https://arxiv.org/abs/2307.08691)."""
    return jax.nn.dot_product_attention(query, key, value, implementation="cudnn")


def _even(
    query: Float[Array, "B T H E"], key: Float[Array, "B S H E"], value: Float[Array, "B S H E"]
) -> Float[Array, "B T H E"]:
    """The same with odd lengths, of which JAX takes no gradient, filled up with a token that nobody looks at."""

    def filled(x: Float[Array, "B N H E"]) -> Float[Array, "B N2 H E"]:
        return jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0)))

    def lengths(x: Float[Array, "B N H E"]) -> Array:
        return jnp.full(x.shape[:1], x.shape[1], jnp.int32)

    out = jax.nn.dot_product_attention(
        filled(query), filled(key), filled(value), implementation="cudnn",
        query_seq_lengths=lengths(query), key_value_seq_lengths=lengths(key),
    )  # fmt: skip
    return out[:, : query.shape[1]]


def _forward(*operands: Array) -> tuple[Array, Any]:
    return jax.vjp(_even, *operands)


def _backward(gradient: Any, wanted: Array) -> tuple[Array, ...]:
    return gradient(wanted)


cuda_attention.defvjp(_forward, _backward)
