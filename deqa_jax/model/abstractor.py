"""The visual abstractor: learned queries that read the vision tower and speak to the language model (SPEC 2)."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from deqa_jax.config import AbstractorConfig, DeqaConfig, Execution
from deqa_jax.model.layers import EMBEDDING_STD, LayerNorm, attention, fold, linear, stack


def sincos_positions(positions: np.ndarray, width: int) -> np.ndarray:
    """Sine-cosine embeddings `[N, width]` in float32: `[sin | cos]` with ω_i = 10000^(−i / (width / 2)).

    >>> sincos_positions(np.arange(3), 4).shape
    (3, 4)
    """
    half = width // 2
    omega = 1.0 / 10000.0 ** (np.arange(half, dtype=np.float32) / np.float32(half))
    angles = positions.astype(np.float32)[:, None] * omega.astype(np.float32)[None]
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


def query_positions(config: AbstractorConfig) -> np.ndarray:
    """Positions `[Q, D]` of the queries, float32; the published buffer `q_pos_embed`."""
    return sincos_positions(np.arange(config.num_queries), config.hidden_size)


def key_positions(config: AbstractorConfig, grid_size: int) -> np.ndarray:
    """Positions `[1 + grid_size², D]` of the vision tokens, float32; the published buffer `k_pos_embed`.

    The class token in front has zeros. Of a patch's channels the first half encodes the column, the second
    the row (quirk: the other way round than the usual 2-d embedding).
    """
    rows, columns = np.divmod(np.arange(grid_size**2), grid_size)
    half = config.hidden_size // 2
    grid = np.concatenate([sincos_positions(columns, half), sincos_positions(rows, half)], axis=1)
    return np.concatenate([np.zeros((1, config.hidden_size), np.float32), grid])


class AbstractorBlock(nnx.Module):
    """Cross-attention of the queries over queries and vision tokens, then a gated MLP with a norm inside."""

    def __init__(self, config: AbstractorConfig, *, execution: Execution, rngs: nnx.Rngs):
        width = config.hidden_size
        self.num_heads = config.num_heads
        self.dtype = execution.dtype
        self.query_norm = LayerNorm(width, epsilon=config.norm_eps, execution=execution, dtype="float32")
        self.key_norm = LayerNorm(width, epsilon=config.norm_eps, execution=execution)
        self.query = linear(width, width, bias=True, execution=execution, rngs=rngs)
        self.key = linear(width, width, bias=True, execution=execution, rngs=rngs)
        self.value = linear(width, width, bias=True, execution=execution, rngs=rngs)
        self.out = linear(width, width, bias=True, execution=execution, rngs=rngs)
        self.mlp_norm = LayerNorm(width, epsilon=config.norm_eps, execution=execution)
        self.gate = linear(width, config.mlp_dim, bias=True, execution=execution, rngs=rngs)
        self.up = linear(width, config.mlp_dim, bias=True, execution=execution, rngs=rngs)
        self.ffn_norm = LayerNorm(config.mlp_dim, epsilon=config.ffn_norm_eps, execution=execution)
        self.down = linear(config.mlp_dim, width, bias=True, execution=execution, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B Q D"],
        vision: Float[Array, "B S D"],
        query_position: Float[Array, "1 Q D"],
        key_position: Float[Array, "1 S D"],
    ) -> Float[Array, "B Q D"]:
        # Quirk: the residual starts from the normed queries, not from what came in.
        x = self.query_norm(x)
        x = x + self.out(self.context(x, vision, query_position, key_position)).astype(jnp.float32)
        h = self.mlp_norm(x)
        h = self.ffn_norm(jax.nn.silu(self.gate(h)) * self.up(h))
        return x + self.down(h).astype(jnp.float32)

    def context(
        self,
        x: Float[Array, "B Q D"],
        vision: Float[Array, "B S D"],
        query_position: Float[Array, "1 Q D"],
        key_position: Float[Array, "1 S D"],
    ) -> Float[Array, "B Q D"]:
        """What normed queries read of each other and the vision tokens, all heads' side by side."""
        values = jnp.concatenate([x.astype(self.dtype), self.key_norm(vision)], axis=1)
        # Quirk: keys carry positions, values do not.
        keys = values + jnp.concatenate([query_position, key_position], axis=1)
        context = attention(
            self._heads(self.query(x.astype(self.dtype) + query_position)),
            self._heads(self.key(keys)),
            self._heads(self.value(values)),
        )
        return context.reshape(x.shape)

    def _heads(self, x: Float[Array, "B T D"]) -> Float[Array, "B T H E"]:
        return x.reshape(*x.shape[:2], self.num_heads, -1)


class Abstractor(nnx.Module):
    """Vision tokens to Q + 1 tokens of the language model's width."""

    def __init__(self, config: DeqaConfig, *, execution: Execution, rngs: nnx.Rngs):
        abstractor, width = config.abstractor, config.language.hidden_size
        normal = nnx.initializers.normal(EMBEDDING_STD)
        self.config = abstractor
        self.grid_size = config.vision.grid_size
        self.dtype = execution.dtype
        self.execution = execution
        self.queries = nnx.Param(
            normal(rngs.params(), (abstractor.num_queries, abstractor.hidden_size), execution.param_dtype)
        )
        self.layers = stack(
            lambda rngs: AbstractorBlock(abstractor, execution=execution, rngs=rngs), abstractor.num_layers, rngs
        )
        self.projection = linear(abstractor.hidden_size, width, bias=True, execution=execution, rngs=rngs)
        self.end_token = nnx.Param(normal(rngs.params(), (width,), execution.param_dtype))

    def __call__(self, vision: Float[Array, "B S D"]) -> Float[Array, "B V D"]:
        """Takes the vision tower's output, class token included; returns `[B, Q + 1, language width]`."""
        batch = vision.shape[0]
        query_position = jnp.asarray(query_positions(self.config), self.dtype)[None]
        key_position = jnp.asarray(key_positions(self.config, self.grid_size), self.dtype)[None]
        x = jnp.broadcast_to(self.queries[...].astype(jnp.float32), (batch, *self.queries.shape))

        def step(block: AbstractorBlock, x: Array, nothing: None) -> tuple[Array, None]:
            return block(x, vision, query_position, key_position), None

        x, _ = fold(self.layers, step, x, execution=self.execution)
        x = self.projection(x.astype(self.dtype)).astype(jnp.float32)
        end = jnp.broadcast_to(self.end_token[...].astype(jnp.float32), (batch, 1, x.shape[-1]))
        return jnp.concatenate([x, end], axis=1)
