"""The whole model again, written from the specification in float64 NumPy over published tensor names.

Slow and plain on purpose: one image, every token through a loop over layers, masks where the library slices. It
lets any size and seed be compared, not only the ones the golden numbers have.
"""

from collections.abc import Mapping

import numpy as np

from deqa_jax.config import DeqaConfig

Weights = Mapping[str, np.ndarray]


def layer_norm(x: np.ndarray, weights: Weights, name: str, eps: float) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    return (
        centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps) * weights[f"{name}.weight"]
        + weights[f"{name}.bias"]
    )


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


def dense(x: np.ndarray, weights: Weights, name: str) -> np.ndarray:
    return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0.0)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1.0 / (1.0 + np.exp(-x))


def attend(q: np.ndarray, k: np.ndarray, v: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    """Heads first: q [H, T, E], k and v [H, S, E] -> [T, H E]."""
    logits = q @ k.swapaxes(1, 2) / np.sqrt(q.shape[-1])
    if mask is not None:
        logits = np.where(mask, logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    out = weights / weights.sum(-1, keepdims=True) @ v
    return out.swapaxes(0, 1).reshape(q.shape[1], -1)


def heads(x: np.ndarray, count: int) -> np.ndarray:
    return x.reshape(x.shape[0], count, -1).swapaxes(0, 1)


def vision_tower(config: DeqaConfig, weights: Weights, image: np.ndarray) -> np.ndarray:
    """image [size, size, 3], normalised -> [1 + patches, D]."""
    vision, prefix = config.vision, "model.vision_model."
    kernel = weights[f"{prefix}embeddings.patch_embed.weight"]
    patch, tokens = vision.patch_size, [weights[f"{prefix}embeddings.cls_token"].reshape(-1)]
    for row in range(0, vision.image_size, patch):
        for column in range(0, vision.image_size, patch):
            window = image[row : row + patch, column : column + patch].transpose(2, 0, 1)
            tokens.append(np.tensordot(kernel, window, 3))
    x = np.stack(tokens) + weights[f"{prefix}embeddings.position_embedding"][0]
    eps = vision.layer_norm_eps
    x = layer_norm(x, weights, f"{prefix}embeddings.pre_layernorm", eps)
    for i in range(vision.num_layers):
        layer = f"{prefix}encoder.layers.{i}."
        fused = dense(
            layer_norm(x, weights, f"{layer}input_layernorm", eps), weights, f"{layer}self_attn.query_key_value"
        )
        q, k, v = fused.reshape(len(x), vision.num_heads, 3, -1).transpose(2, 1, 0, 3)
        x = x + dense(attend(q, k, v), weights, f"{layer}self_attn.dense")
        h = dense(layer_norm(x, weights, f"{layer}post_attention_layernorm", eps), weights, f"{layer}mlp.fc1")
        x = x + dense(h * sigmoid(1.702 * h), weights, f"{layer}mlp.fc2")
    return layer_norm(x, weights, f"{prefix}post_layernorm", eps)


def sincos(positions: np.ndarray, width: int) -> np.ndarray:
    angles = positions[:, None] / 10000.0 ** (np.arange(width // 2) / (width // 2))
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


def abstractor(config: DeqaConfig, weights: Weights, vision: np.ndarray) -> np.ndarray:
    """[1 + patches, D] -> [Q + 1, language width]."""
    settings, grid = config.abstractor, config.vision.grid_size
    width, prefix = settings.hidden_size, "model.visual_abstractor."
    q_pos = sincos(np.arange(settings.num_queries), width)
    k_pos = np.zeros((grid * grid + 1, width))
    for row in range(grid):
        for column in range(grid):
            both = np.array([column]), np.array([row])
            k_pos[1 + row * grid + column] = np.concatenate([sincos(x, width // 2)[0] for x in both])
    x = weights[f"{prefix}query_embeds"][0]
    for i in range(settings.num_layers):
        layer = f"{prefix}encoder.layers.{i}.crossattention."
        x = layer_norm(x, weights, f"{layer}norm1", settings.norm_eps)
        values = np.concatenate([x, layer_norm(vision, weights, f"{layer}normk", settings.norm_eps)])
        keys = values + np.concatenate([q_pos, k_pos])
        context = attend(
            heads(dense(x + q_pos, weights, f"{layer}attention.query"), settings.num_heads),
            heads(dense(keys, weights, f"{layer}attention.key"), settings.num_heads),
            heads(dense(values, weights, f"{layer}attention.value"), settings.num_heads),
        )
        x = x + dense(context, weights, f"{layer}output.out_proj")
        h = layer_norm(x, weights, f"{layer}output.norm2", settings.norm_eps)
        gate = dense(h, weights, f"{layer}output.mlp.w1")
        h = gate * sigmoid(gate) * dense(h, weights, f"{layer}output.mlp.w3")
        h = layer_norm(h, weights, f"{layer}output.mlp.ffn_ln", settings.ffn_norm_eps)
        x = x + dense(h, weights, f"{layer}output.mlp.w2")
    return np.concatenate([dense(x, weights, f"{prefix}visual_fc"), weights[f"{prefix}vit_eos"].reshape(1, -1)])


def language_model(config: DeqaConfig, weights: Weights, x: np.ndarray, visual: np.ndarray) -> list[np.ndarray]:
    """Hidden states of [T, D] tokens, of which `visual` [T] says which are visual: embeddings, then every layer's."""
    settings = config.language
    length, head_dim, eps = len(x), settings.head_dim, settings.rms_norm_eps
    angles = np.arange(length)[:, None] / settings.rope_theta ** (np.arange(0, head_dim, 2) / head_dim)
    cos, sin = np.cos(angles), np.sin(angles)

    def rotate(a: np.ndarray) -> np.ndarray:
        left, right = a[..., : head_dim // 2], a[..., head_dim // 2 :]
        return np.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)

    def branched(h: np.ndarray, name: str) -> np.ndarray:
        text, image = (h @ weights[f"{name}.multiway.{i}.weight"].T for i in range(2))
        return np.where(visual[:, None], image, text)

    def branched_norm(h: np.ndarray, name: str) -> np.ndarray:
        text, image = (rms_norm(h, weights[f"{name}.multiway.{i}.weight"], eps) for i in range(2))
        return np.where(visual[:, None], image, text)

    causal = np.tri(length, dtype=bool)
    states = [x]
    for i in range(settings.num_layers):
        layer = f"model.layers.{i}."
        h = branched_norm(x, f"{layer}input_layernorm")
        q = rotate(heads(dense(h, weights, f"{layer}self_attn.q_proj"), settings.num_heads))
        k = rotate(heads(branched(h, f"{layer}self_attn.k_proj"), settings.num_kv_heads))
        v = heads(branched(h, f"{layer}self_attn.v_proj"), settings.num_kv_heads)
        k, v = (np.repeat(a, settings.num_heads // settings.num_kv_heads, axis=0) for a in (k, v))
        x = x + dense(attend(q, k, v, causal), weights, f"{layer}self_attn.o_proj")
        h = branched_norm(x, f"{layer}post_attention_layernorm")
        gate = dense(h, weights, f"{layer}mlp.gate_proj")
        h = gate * sigmoid(gate) * dense(h, weights, f"{layer}mlp.up_proj")
        x = x + dense(h, weights, f"{layer}mlp.down_proj")
        states.append(x)
    states[-1] = rms_norm(x, weights["model.norm.weight"], eps)
    return states


def forward(
    config: DeqaConfig, weights: Weights, image: np.ndarray, before: list[int], after: list[int]
) -> dict[str, np.ndarray]:
    """Every stage for one normalised image [size, size, 3], in float64."""
    weights = {name: array.astype(np.float64) for name, array in weights.items()}
    vision = vision_tower(config, weights, image.astype(np.float64))
    tokens = abstractor(config, weights, vision)
    embedding = weights["model.embed_tokens.weight"]
    x = np.concatenate([embedding[before], tokens, embedding[after]])
    visual = np.zeros(len(x), bool)
    visual[len(before) : len(before) + len(tokens)] = True
    states = language_model(config, weights, x, visual)
    return {
        "vision": vision,
        "visual_tokens": tokens,
        "hidden_states": np.stack(states),
        "logits": states[-1] @ weights["lm_head.weight"].T,
    }
