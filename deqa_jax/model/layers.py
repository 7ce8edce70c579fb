"""What the three towers share: norms, attention, and stacks of identical blocks.

The residual stream is float32 in every tower, whatever the matrix products run in: at the published depth and in
bfloat16 this takes a sixth off the error of the scores, most of which comes from rounding the weights.

Axis letters, here and in the rest of the model:
  B batch   T query tokens   S key tokens   D width   H heads   K key/value heads   E head_dim   L layers
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from deqa_jax.config import Execution
from deqa_jax.model.cuda_attention import cuda_attention, suits_cuda
from deqa_jax.model.tpu_attention import suits_tpu, tpu_attention

# Embeddings of a random model are drawn with this deviation (LLaMA's and CLIP's own).
EMBEDDING_STD = 0.02


def linear(inputs: int, outputs: int, *, bias: bool, execution: Execution, rngs: nnx.Rngs) -> nnx.Linear:
    """A dense layer whose kernel `[inputs, outputs]` is stored in `param_dtype` and used in `dtype`."""
    return nnx.Linear(
        inputs,
        outputs,
        use_bias=bias,
        dtype=execution.dtype,
        param_dtype=execution.param_dtype,
        rngs=rngs,
    )


def _last_axis(vector: Float[Array, "D"], like: Float[Array, "*N D"]) -> Float[Array, "*N D"]:
    """The vector in float32 with leading axes of size one, since implicit rank promotion is off."""
    return vector.astype(jnp.float32).reshape((1,) * (like.ndim - 1) + (-1,))


class LayerNorm(nnx.Module):
    """Layer norm, computed in float32 whatever comes in, returned in `dtype` (by default that of execution).

    (nnx.LayerNorm takes the variance as E[x²] − E[x]² or promotes dtypes implicitly; both cost digits here.)
    """

    def __init__(self, width: int, *, epsilon: float, execution: Execution, dtype: str | None = None):
        self.scale = nnx.Param(jnp.ones((width,), execution.param_dtype))
        self.bias = nnx.Param(jnp.zeros((width,), execution.param_dtype))
        self.epsilon = epsilon
        self.dtype = dtype or execution.dtype

    def __call__(self, x: Float[Array, "*N D"]) -> Float[Array, "*N D"]:
        x = x.astype(jnp.float32)
        x = x - jnp.mean(x, axis=-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.epsilon)
        return (x * _last_axis(self.scale[...], x) + _last_axis(self.bias[...], x)).astype(self.dtype)


class RMSNorm(nnx.Module):
    """Root-mean-square norm, computed in float32 whatever comes in, returned in `dtype`."""

    def __init__(self, width: int, *, epsilon: float, execution: Execution):
        self.scale = nnx.Param(jnp.ones((width,), execution.param_dtype))
        self.epsilon = epsilon
        self.dtype = execution.dtype

    def __call__(self, x: Float[Array, "*N D"]) -> Float[Array, "*N D"]:
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.epsilon)
        return (x * _last_axis(self.scale[...], x)).astype(self.dtype)


# ---- attention --------------------------------------------------------------------------------------------


def attention(
    query: Float[Array, "B T H E"],
    key: Float[Array, "B S K E"],
    value: Float[Array, "B S K E"],
    mask: Bool[Array, "T S"] | None = None,
    *,
    chunks: int = 1,
    placed: jax.sharding.NamedSharding | None = None,
) -> Float[Array, "B T H E"]:
    """Softmax attention scaled by 1/√head_dim, logits and softmax in float32; `mask` is True where a query may look.

    Without a mask (the vision tower's 1025 tokens), heads are taken one after the other on CPU: a head's logits
    then stay in the cache, which is five times as fast as all heads at once. On TPU and on NVIDIA GPUs, a kernel keeps
    them on the chip (`placed` is how `[B, T, D]` is split). Queries in `chunks` parts, whose logits are computed again
    in the backward pass so that only one part's are ever there, are for gradients: those of the TPU's kernel take three
    times the memory.
    """
    if mask is not None:
        return _attention_at_once(query, key, value, mask)
    elsewhere = functools.partial(_attention_in_chunks, chunks=chunks) if chunks > 1 else _attention_at_once
    platforms = {"cpu": _attention_by_head}
    if chunks == 1 and suits_tpu(query, key):
        platforms["tpu"] = functools.partial(tpu_attention, placed=placed)
    if suits_cuda(query, key):
        platforms["cuda"] = cuda_attention
    return jax.lax.platform_dependent(query, key, value, **platforms, default=elsewhere)


def _attention_at_once(
    query: Float[Array, "B T H E"],
    key: Float[Array, "B S K E"],
    value: Float[Array, "B S K E"],
    mask: Bool[Array, "T S"] | None = None,
) -> Float[Array, "B T H E"]:
    # Inside, it promotes bfloat16 to float32 implicitly.
    with jax.numpy_dtype_promotion("standard"):
        return jax.nn.dot_product_attention(query, key, value, mask=None if mask is None else mask[None, None])


def _attention_in_chunks(
    query: Float[Array, "B T H E"], key: Float[Array, "B S H E"], value: Float[Array, "B S H E"], *, chunks: int
) -> Float[Array, "B T H E"]:
    batch, length, heads, head_dim = query.shape
    size = -(-length // chunks)
    # What is added to fill the last part is cut off again.
    query = jnp.pad(query, ((0, 0), (0, chunks * size - length), (0, 0), (0, 0)))
    parts = jnp.moveaxis(query.reshape(batch, chunks, size, heads, head_dim), 1, 0)
    one_part = jax.checkpoint(lambda part: _attention_at_once(part, key, value), prevent_cse=False)
    out = jnp.moveaxis(jax.lax.map(one_part, parts), 0, 1)
    return out.reshape(batch, -1, heads, head_dim)[:, :length]


def _attention_by_head(
    query: Float[Array, "B T H E"], key: Float[Array, "B S H E"], value: Float[Array, "B S H E"]
) -> Float[Array, "B T H E"]:
    batch, length, heads, head_dim = query.shape

    def one_head(operands: tuple[Array, Array, Array]) -> Float[Array, "T E"]:
        q, k, v = operands
        logits = jnp.matmul(q * head_dim**-0.5, k.T, preferred_element_type=jnp.float32)
        weights = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
        total = jnp.sum(weights, axis=-1, keepdims=True)
        out = jnp.matmul(weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
        return (out / total).astype(v.dtype)

    def heads_first(x: Float[Array, "B N H E"]) -> Float[Array, "BH N E"]:
        return jnp.swapaxes(x, 1, 2).reshape(batch * heads, -1, head_dim)

    # Where gradients are taken, computing a head's weights again is faster than reading those of all heads back.
    one_head = jax.checkpoint(one_head, prevent_cse=False)
    out = jax.lax.map(one_head, (heads_first(query), heads_first(key), heads_first(value)))
    return jnp.swapaxes(out.reshape(batch, heads, length, head_dim), 1, 2)


# ---- stacks of blocks -------------------------------------------------------------------------------------


def stack(make_block: Callable[[nnx.Rngs], nnx.Module], num_layers: int, rngs: nnx.Rngs) -> nnx.Module:
    """One module that stands for `num_layers` blocks: every parameter has a leading layer axis."""

    @nnx.split_rngs(splits=num_layers)
    @nnx.vmap(transform_metadata={nnx.PARTITION_NAME: "layers"})
    def create(rngs: nnx.Rngs) -> nnx.Module:
        return make_block(rngs)

    return create(rngs)


def unstack(blocks: nnx.Module, num_layers: int) -> nnx.List:
    """The blocks of an abstract stack (`nnx.eval_shape`) side by side, for `fold` to unroll.

    On CPU and GPUs a scan copies each layer's weights out of the stack at every step, which costs a language tower of
    a few hundred tokens a fifth of its speed; blocks of their own are used where they lie.
    """
    graphdef, state = nnx.split(blocks)

    def layer() -> Any:  # a new state each time: blocks made from one state would share their parameters
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), state)

    return nnx.List([nnx.merge(graphdef, layer()) for _ in range(num_layers)])


def fold(
    blocks: nnx.Module | nnx.List,
    step: Callable[[Any, Any, Any], tuple[Any, Any]],
    carry: Any,
    per_layer: Any = None,
    *,
    num_layers: int | None = None,
    execution: Execution = Execution(),
) -> tuple[Any, Any]:
    """Runs `carry, out = step(block, carry, per_layer[i])` over the layers, first to last.

    Args:
      blocks: a stack (scanned) or a list of blocks (unrolled).
      step: one layer.
      carry: what goes from layer to layer.
      per_layer: a pytree whose leaves have a leading layer axis, or None.
      num_layers: only so many of the first layers; all without it.
      execution: what of a scanned layer is computed again in the backward pass, and how the carry is placed.

    Returns:
      The last carry, and the `out`s stacked on a leading layer axis (None where there are no layers to run).
    """
    if num_layers == 0:
        return carry, None

    def placed(carry: Any) -> Any:
        return (
            carry if execution.activations is None else jax.lax.with_sharding_constraint(carry, execution.activations)
        )

    carry = placed(carry)
    if isinstance(blocks, nnx.List):
        outs = []
        for i, block in enumerate(list(blocks)[:num_layers]):
            carry, out = step(block, carry, _at(per_layer, i))
            carry = placed(carry)
            outs.append(out)
        return carry, jax.tree.map(lambda *leaves: jnp.stack(leaves), *outs)

    graphdef, state = nnx.split(blocks)

    def run(carry: Any, inputs: tuple[Any, Any]) -> tuple[Any, Any]:
        layer, extra = inputs
        carry, out = step(nnx.merge(graphdef, layer), placed(carry), extra)
        return placed(carry), out

    if execution.remat != "none":
        policy = None if execution.remat == "full" else jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        run = jax.checkpoint(run, policy=policy, prevent_cse=False)
    if num_layers is None:
        return jax.lax.scan(run, carry, (state, per_layer))
    # Slicing the stack in front of the scan would copy most of the model; indexing inside it copies nothing more
    # than the scan itself does.
    return jax.lax.scan(lambda carry, i: run(carry, (_at(state, i), _at(per_layer, i))), carry, jnp.arange(num_layers))


def last_block(blocks: nnx.Module | nnx.List) -> Any:
    """The last block of a stack or list."""
    if isinstance(blocks, nnx.List):
        return blocks[-1]
    graphdef, state = nnx.split(blocks)
    return nnx.merge(graphdef, _at(state, -1))


def _at(tree: Any, index: Any) -> Any:
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), tree)
