"""Attention without a mask on TPU: JAX's Pallas kernel, which keeps logits on the chip."""

import math

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float

# Lengths that the kernel takes are multiples of a vector register's lanes; 1025 tokens become 1152.
_LANES = 128
# More queries at once do not fit the chip's own memory together with their logits, or with those and their gradients.
_MOST_QUERIES, _MOST_QUERIES_BACKWARD = 1152, 512


def suits_tpu(query: Float[Array, "B T H E"], key: Float[Array, "B S H E"]) -> bool:
    """Whether the kernel is the right one: of many tokens at each other, in bfloat16, with heads half a register wide.

    Products of float32 would be rounded more than XLA is asked to.

    >>> tokens = jnp.zeros((1, 1025, 16, 64), jnp.bfloat16)
    >>> suits_tpu(tokens, tokens), suits_tpu(tokens[:, :64], tokens)
    (True, False)
    """
    return query.dtype == jnp.bfloat16 and query.shape == key.shape and query.shape[-1] % 64 == 0


def tpu_attention(
    query: Float[Array, "B T H E"],
    key: Float[Array, "B T H E"],
    value: Float[Array, "B T H E"],
    *,
    placed: NamedSharding | None = None,
) -> Float[Array, "B T H E"]:
    """Softmax attention scaled by 1/√head_dim, logits and softmax in float32 (https://arxiv.org/abs/2205.14135).

    Args:
      query: any length, filled up with tokens that nobody looks at.
      key: as many.
      value: as many.
      placed: how `[B, T, D]` is split over a mesh, as the compiler does not split a kernel. Axes of the mesh that do
        not split the batch split the heads if they can.
    """
    if placed is None:
        return _on_one_device(query, key, value)
    mesh, batch = placed.mesh, placed.spec[0]
    others = tuple(name for name in mesh.axis_names if name not in batch)
    parts = math.prod(mesh.shape[name] for name in others)
    split = PartitionSpec(batch, None, others if query.shape[2] % parts == 0 else None)
    return jax.shard_map(_on_one_device, mesh=mesh, in_specs=(split, split, split), out_specs=split, check_vma=False)(
        query, key, value
    )


def _on_one_device(
    query: Float[Array, "B T H E"], key: Float[Array, "B T H E"], value: Float[Array, "B T H E"]
) -> Float[Array, "B T H E"]:
    # Imported where it is used: it takes half a second, which all that run on other platforms would wait for.
    from jax.experimental.pallas.ops.tpu.flash_attention import BlockSizes, SegmentIds, flash_attention

    batch, length, _, head_dim = query.shape
    padded = -(-length // _LANES) * _LANES

    def queries(most: int) -> int:
        return max(size for size in range(_LANES, min(padded, most) + 1, _LANES) if padded % size == 0)

    def heads_first(x: Float[Array, "B T H E"]) -> Float[Array, "B H P E"]:
        return jnp.pad(jnp.swapaxes(x, 1, 2), ((0, 0), (0, 0), (0, padded - length), (0, 0)))

    # Tokens look at those of the same segment.
    segments = jnp.broadcast_to((jnp.arange(padded) < length).astype(jnp.int32), (batch, padded))
    block, back = queries(_MOST_QUERIES), queries(_MOST_QUERIES_BACKWARD)
    blocks = BlockSizes(
        block_q=block, block_k_major=padded, block_k=padded, block_b=1,
        block_q_major_dkv=back, block_k_major_dkv=padded, block_k_dkv=padded, block_q_dkv=back,
        block_k_major_dq=padded, block_k_dq=padded, block_q_dq=back,
    )  # fmt: skip
    out = flash_attention(
        heads_first(query), heads_first(key), heads_first(value), segment_ids=SegmentIds(segments, segments),
        sm_scale=head_dim**-0.5, block_sizes=blocks,
    )  # fmt: skip
    return jnp.swapaxes(out, 1, 2)[:, :length]
