"""The vision tower: a pre-norm ViT with a class token, CLIP's by descent (SPEC 2).

Axis letters as in layers.py, and: P patch side   G patches along one side   C colour channels
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from deqa_jax.config import Execution, VisionConfig
from deqa_jax.model.layers import EMBEDDING_STD, LayerNorm, attention, fold, linear, stack

_COLOURS = 3
# Parts of the queries, in training with little memory.
_ATTENTION_CHUNKS = 4


class VisionBlock(nnx.Module):
    """One pre-norm transformer block."""

    def __init__(self, config: VisionConfig, *, execution: Execution, rngs: nnx.Rngs):
        width = config.hidden_size
        self.num_heads = config.num_heads
        self.placed = execution.activations
        # At the published size and batch, logits of all queries at once would take 2 GiB, several times over.
        self.attention_chunks = 1 if execution.remat == "none" else _ATTENTION_CHUNKS
        self.input_norm = LayerNorm(width, epsilon=config.layer_norm_eps, execution=execution)
        # Outputs lie [head][q|k|v][head_dim], as published: the heads are the outer axis, so they shard as one.
        self.query_key_value = linear(width, 3 * width, bias=True, execution=execution, rngs=rngs)
        self.out = linear(width, width, bias=True, execution=execution, rngs=rngs)
        self.post_attention_norm = LayerNorm(width, epsilon=config.layer_norm_eps, execution=execution)
        self.up = linear(width, config.mlp_dim, bias=True, execution=execution, rngs=rngs)
        self.down = linear(config.mlp_dim, width, bias=True, execution=execution, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        batch, length, width = x.shape
        fused = self.query_key_value(self.input_norm(x)).reshape(batch, length, self.num_heads, 3, -1)
        context = attention(
            fused[..., 0, :], fused[..., 1, :], fused[..., 2, :], chunks=self.attention_chunks, placed=self.placed
        )
        x = x + self.out(context.reshape(batch, length, width)).astype(jnp.float32)
        return x + self.down(quick_gelu(self.up(self.post_attention_norm(x)))).astype(jnp.float32)


def quick_gelu(x: Float[Array, "*N"]) -> Float[Array, "*N"]:
    """x · σ(1.702x), the activation of OpenAI's CLIP."""
    return x * jax.nn.sigmoid(1.702 * x)


def patches(images: Float[Array, "B H W C"], patch_size: int) -> Float[Array, "B GG PPC"]:
    """Non-overlapping patches in row-major order, each flattened rows first and channels last.

    >>> patches(jnp.zeros((2, 28, 28, 3)), 14).shape
    (2, 4, 588)
    """
    batch, height, width, channels = images.shape
    rows, columns = height // patch_size, width // patch_size
    grid = images.reshape(batch, rows, patch_size, columns, patch_size, channels)
    return jnp.swapaxes(grid, 2, 3).reshape(batch, rows * columns, -1)


class VisionTower(nnx.Module):
    """Normalised pixels to one feature vector per patch, the class token first."""

    def __init__(self, config: VisionConfig, *, execution: Execution, rngs: nnx.Rngs):
        width = config.hidden_size
        normal = nnx.initializers.normal(EMBEDDING_STD)
        self.patch_size = config.patch_size
        self.execution = execution
        self.patch_embedding = linear(
            _COLOURS * config.patch_size**2, width, bias=False, execution=execution, rngs=rngs
        )
        self.class_token = nnx.Param(normal(rngs.params(), (width,), execution.param_dtype))
        self.position_embedding = nnx.Param(normal(rngs.params(), (config.num_tokens, width), execution.param_dtype))
        self.pre_norm = LayerNorm(width, epsilon=config.layer_norm_eps, execution=execution, dtype="float32")
        self.layers = stack(lambda rngs: VisionBlock(config, execution=execution, rngs=rngs), config.num_layers, rngs)
        self.post_norm = LayerNorm(width, epsilon=config.layer_norm_eps, execution=execution)

    def __call__(self, images: Float[Array, "B H W C"]) -> Float[Array, "B T D"]:
        """Takes `[B, image_size, image_size, 3]`; returns `[B, 1 + patches, width]`, class token included."""
        x = self.patch_embedding(patches(images, self.patch_size)).astype(jnp.float32)
        class_token = jnp.broadcast_to(self.class_token[...].astype(jnp.float32), (x.shape[0], 1, x.shape[-1]))
        x = jnp.concatenate([class_token, x], axis=1)
        x = x + self.position_embedding[...].astype(jnp.float32)[None]
        x, _ = fold(self.layers, lambda block, x, _: (block(x), None), self.pre_norm(x), execution=self.execution)
        return self.post_norm(x)
