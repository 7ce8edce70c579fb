"""The modality-adaptive LLaMA-2: norms, keys and values have a branch of their own for visual tokens (SPEC 2).

Which tokens are visual is known when the program is compiled (a `Layout`), so each branch reads the slice it
owns and neither runs on the other's tokens.

Axis letters as in layers.py, and: V vocabulary   P tokens already cached
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from deqa_jax.config import Execution, LanguageConfig
from deqa_jax.model.layers import EMBEDDING_STD, RMSNorm, attention, fold, last_block, linear, stack


class Layout(NamedTuple):
    """A sequence as text, then one image's visual tokens, then text; each a number of tokens, possibly zero."""

    before: int
    visual: int
    after: int


class KeyValue(NamedTuple):
    """Keys (rotated) and values of tokens that later tokens look back at."""

    key: Float[Array, "*N P K E"]
    value: Float[Array, "*N P K E"]


class Branched(nnx.Module):
    """Two modules of one kind: `text` for text tokens, `visual` for visual ones (published: `multiway.0`, `.1`)."""

    def __init__(self, text: nnx.Module, visual: nnx.Module):
        self.text = text
        self.visual = visual

    def __call__(self, x: Float[Array, "B T D"], layout: Layout) -> Float[Array, "B T O"]:
        start, stop = layout.before, layout.before + layout.visual
        if not layout.visual:
            return self.text(x)
        visual = self.visual(x[:, start:stop])
        if not layout.before + layout.after:
            return visual
        # Text on both sides goes through its branch in one piece: small products waste the weights they read.
        text = self.text(jnp.concatenate([x[:, :start], x[:, stop:]], axis=1))
        return jnp.concatenate([text[:, :start], visual, text[:, start:]], axis=1)


def rotary_frequencies(head_dim: int, theta: float) -> np.ndarray:
    """θ^(−2i / head_dim), float32 `[head_dim / 2]`; the buffer `inv_freq` of older checkpoints.

    >>> rotary_frequencies(4, 10000.0)
    array([1.  , 0.01], dtype=float32)
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    return np.float32(1.0) / np.float32(theta) ** exponents


class Rotation(NamedTuple):
    """Cosines and sines of the rotary position embedding, float32 `[1, T, 1, E/2]`."""

    cos: Float[Array, "1 T 1 E2"]
    sin: Float[Array, "1 T 1 E2"]

    @classmethod
    def at(cls, start: int, length: int, head_dim: int, theta: float) -> "Rotation":
        """Angles of the positions `start`, …, `start + length − 1`, computed in float32 as published."""
        positions = np.arange(start, start + length, dtype=np.float32)
        angles = positions[:, None] * rotary_frequencies(head_dim, theta)[None]
        return cls(jnp.asarray(np.cos(angles)[None, :, None]), jnp.asarray(np.sin(angles)[None, :, None]))

    def __call__(self, x: Float[Array, "B T H E"]) -> Float[Array, "B T H E"]:
        """Rotates channel i with channel i + E/2 ("rotate half")."""
        left, right = jnp.split(x.astype(jnp.float32), 2, axis=-1)
        rotated = (left * self.cos - right * self.sin, right * self.cos + left * self.sin)
        return jnp.concatenate(rotated, axis=-1).astype(x.dtype)

    def last(self) -> "Rotation":
        """Of the last position alone."""
        return Rotation(self.cos[:, -1:], self.sin[:, -1:])


class LanguageBlock(nnx.Module):
    """One decoder block."""

    def __init__(self, config: LanguageConfig, *, execution: Execution, rngs: nnx.Rngs):
        width = config.hidden_size
        query_width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim

        def norm() -> RMSNorm:
            return RMSNorm(width, epsilon=config.rms_norm_eps, execution=execution)

        def dense(inputs: int, outputs: int) -> nnx.Linear:
            return linear(inputs, outputs, bias=False, execution=execution, rngs=rngs)

        self.head_dim = config.head_dim
        self.input_norm = Branched(norm(), norm())
        self.query = dense(width, query_width)
        self.key = Branched(dense(width, kv_width), dense(width, kv_width))
        self.value = Branched(dense(width, kv_width), dense(width, kv_width))
        self.out = dense(query_width, width)
        self.post_attention_norm = Branched(norm(), norm())
        self.gate = dense(width, config.mlp_dim)
        self.up = dense(width, config.mlp_dim)
        self.down = dense(config.mlp_dim, width)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        layout: Layout,
        rotation: Rotation,
        cached: KeyValue | None = None,
        *,
        last_only: bool = False,
    ) -> tuple[Float[Array, "B T D"], KeyValue]:
        """Returns the block's output and the keys and values of its tokens.

        With `cached` (`[1, P, K, E]`, the same for every sample) the tokens look back at it as well. With
        `last_only` only the last token, which must be text, goes through: the output is `[B, 1, D]`.
        """
        h = self.input_norm(x, layout)
        key, value = rotation(self._heads(self.key(h, layout))), self._heads(self.value(h, layout))
        new = KeyValue(key, value)
        if cached is not None:
            key, value = (
                jnp.concatenate([jnp.broadcast_to(old, (x.shape[0], *old.shape[1:])), now], axis=1)
                for old, now in zip(cached, new, strict=True)
            )
        if last_only:
            x, h, layout, rotation = x[:, -1:], h[:, -1:], Layout(1, 0, 0), rotation.last()
        query = rotation(self._heads(self.query(h)))
        mask = np.tri(query.shape[1], key.shape[1], key.shape[1] - query.shape[1], dtype=bool)
        context = attention(query, key, value, jnp.asarray(mask))
        x = x + self.out(context.reshape(*x.shape[:2], -1)).astype(jnp.float32)
        h = self.post_attention_norm(x, layout)
        return x + self.down(jax.nn.silu(self.gate(h)) * self.up(h)).astype(jnp.float32), new

    def _heads(self, x: Float[Array, "B T O"]) -> Float[Array, "B T H E"]:
        return x.reshape(*x.shape[:2], -1, self.head_dim)


class LanguageModel(nnx.Module):
    """Embeddings, blocks, final norm and output head."""

    def __init__(self, config: LanguageConfig, *, execution: Execution, rngs: nnx.Rngs):
        self.config = config
        self.dtype = execution.dtype
        self.execution = execution
        self.embedding = nnx.Param(
            nnx.initializers.normal(EMBEDDING_STD)(
                rngs.params(), (config.vocab_size, config.hidden_size), execution.param_dtype
            )
        )
        self.layers = stack(lambda rngs: LanguageBlock(config, execution=execution, rngs=rngs), config.num_layers, rngs)
        self.final_norm = RMSNorm(config.hidden_size, epsilon=config.rms_norm_eps, execution=execution)
        self.head = linear(config.hidden_size, config.vocab_size, bias=False, execution=execution, rngs=rngs)

    def embed(self, ids: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Token ids to float32 vectors."""
        return jnp.take(self.embedding[...], ids, axis=0).astype(jnp.float32)

    def __call__(
        self, x: Float[Array, "B T D"], layout: Layout
    ) -> tuple[Float[Array, "B T D"], Float[Array, "L B T D"]]:
        """The final norm's output at every position, and what came out of each block before it."""
        rotation = self._rotation(0, x.shape[1])

        def step(block: LanguageBlock, x: Array, nothing: None) -> tuple[Array, Array]:
            x, _ = block(x, layout, rotation)
            return x, x

        x, hidden_states = fold(self.layers, step, x, execution=self.execution)
        return self.final_norm(x), hidden_states

    def prefill(self, x: Float[Array, "1 P D"]) -> KeyValue:
        """Keys and values `[L, 1, P, K, E]` of a text that comes before every image."""
        layout, rotation = Layout(x.shape[1], 0, 0), self._rotation(0, x.shape[1])
        _, cache = fold(self.layers, lambda block, x, _: block(x, layout, rotation), x)
        return cache

    def last_token(self, x: Float[Array, "B T D"], layout: Layout, cache: KeyValue) -> Float[Array, "B D"]:
        """The final norm's output at the last position alone, for tokens that follow a cached prefix.

        The last block needs the keys and values of all tokens but only one query, so it computes just that.
        """
        rotation = self._rotation(cache.key.shape[2], x.shape[1])
        num_layers = self.config.num_layers

        def step(block: LanguageBlock, x: Array, cached: KeyValue) -> tuple[Array, None]:
            x, _ = block(x, layout, rotation, cached)
            return x, None

        x, _ = fold(self.layers, step, x, cache, num_layers=num_layers - 1, execution=self.execution)
        last = KeyValue(cache.key[-1], cache.value[-1])
        x, _ = last_block(self.layers)(x, layout, rotation, last, last_only=True)
        return self.final_norm(x)[:, 0]

    def logits(self, x: Float[Array, "*N D"], ids: tuple[int, ...] | None = None) -> Float[Array, "*N V"]:
        """Float32 logits of the whole vocabulary, or of the tokens `ids` alone."""
        kernel = self.head.kernel[...]
        if ids is not None:
            kernel = kernel[:, jnp.asarray(ids)]
        return jnp.matmul(x, kernel.astype(self.dtype), preferred_element_type=jnp.float32)

    def _rotation(self, start: int, length: int) -> Rotation:
        return Rotation.at(start, length, self.config.head_dim, self.config.rope_theta)
