"""How much arithmetic scoring is: matrix products, two operations for a multiplication and its addition."""

from deqa_jax.config import AbstractorConfig, DeqaConfig, LanguageConfig, VisionConfig

_COLOURS = 3
_LEVELS = 5


def flops(config: DeqaConfig, before: int, after: int, *, cached: bool = True) -> dict[str, int]:
    """Operations by stage: products with weights and those of attention, a masked pair of tokens like any other.

    Args:
      config: the model's.
      before: tokens of text in front of the image.
      after: tokens of text behind it.
      cached: count what the scorer does, for which the text in front is a stage of its own (`prefix`) and the last
        block has one token to answer. Without it every token goes through every block, as in the whole network
        (`Deqa.__call__`) and in the PyTorch implementation.

    Returns:
      `vision`, `abstractor`, `language` and `readout` for each image; with `cached` also `prefix`, which runs once for
      all images and does not count for any.

    >>> from deqa_jax.config import PRESETS
    >>> counted = flops(PRESETS["full"], 15, 12, cached=False)
    >>> {stage: f"{count / 1e12:.2f}" for stage, count in counted.items()}
    {'vision': '0.72', 'abstractor': '0.04', 'language': '1.20', 'readout': '0.00'}
    """
    language, tokens = config.language, config.num_visual_tokens + after
    images = {
        "vision": _vision(config.vision),
        "abstractor": _abstractor(config.abstractor, config.vision.num_tokens, language.hidden_size),
    }
    read = 2 * language.hidden_size * _LEVELS
    if not cached:
        everything = _language(language, before + tokens, earlier=0, last=before + tokens)
        return images | {"language": everything, "readout": read}
    following = _language(language, tokens, earlier=before, last=1)
    # Of the last block, only keys and values are looked back at.
    return images | {"language": following, "readout": read, "prefix": _language(language, before, earlier=0, last=0)}


def _vision(config: VisionConfig) -> int:
    tokens, width = config.num_tokens, config.hidden_size
    patches = 2 * config.grid_size**2 * _COLOURS * config.patch_size**2 * width
    weights = 2 * tokens * width * (4 * width + 2 * config.mlp_dim)
    return patches + config.num_layers * (weights + _attention(tokens, tokens, width))


def _abstractor(config: AbstractorConfig, vision_tokens: int, language_width: int) -> int:
    queries, width = config.num_queries, config.hidden_size
    keys = queries + vision_tokens
    weights = 2 * width * (2 * queries * width + 2 * keys * width + 3 * queries * config.mlp_dim)
    projection = 2 * queries * width * language_width
    return config.num_layers * (weights + _attention(queries, keys, width)) + projection


def _language(config: LanguageConfig, tokens: int, *, earlier: int, last: int) -> int:
    """All blocks: `tokens` look back at `earlier` ones too, and only `last` of them go through the last block."""
    width, kv_width = config.hidden_size, config.num_kv_heads * config.head_dim

    def block(queries: int) -> int:
        keys_and_values = 2 * tokens * width * 2 * kv_width
        others = 2 * queries * width * (2 * width + 3 * config.mlp_dim)
        return keys_and_values + others + _attention(queries, earlier + tokens, width)

    return (config.num_layers - 1) * block(tokens) + block(last)


def _attention(queries: int, keys: int, width: int) -> int:
    """Logits, and weighted values."""
    return 2 * 2 * queries * keys * width
