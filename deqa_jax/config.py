"""Everything that can be set, as frozen dataclasses, and the published `config.json` they come from.

No field of the model has a default: an epsilon, a theta or a size that nobody wrote down is an error, not a guess.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import jax


class ConfigError(ValueError):
    """A configuration that this model cannot take; the message names every offending entry."""


class QuantizedError(ValueError):
    """A checkpoint of quantised weights where exact ones are needed; the message says what to take instead."""


def _is_whole(name: str) -> bool:
    return not name.endswith(("eps", "theta"))


def _is_number(value: Any, *, whole: bool) -> bool:
    is_kind = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    return is_kind and math.isfinite(value)


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """The ViT: `image_size` and `patch_size` in pixels, widths in channels."""

    image_size: int
    patch_size: int
    hidden_size: int
    mlp_dim: int
    num_layers: int
    num_heads: int
    layer_norm_eps: float

    @property
    def grid_size(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size

    @property
    def num_tokens(self) -> int:
        """Patches and the class token."""
        return self.grid_size**2 + 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class AbstractorConfig:
    """The visual abstractor: `num_queries` learned queries that read the vision tower.

    `norm_eps` is that of `norm1`, `normk` and `norm2`; the published code leaves it at PyTorch's 1e-5 and
    writes only `ffn_norm_eps` to its `config.json`.
    """

    num_queries: int
    hidden_size: int
    mlp_dim: int
    num_layers: int
    num_heads: int
    norm_eps: float
    ffn_norm_eps: float

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.hidden_size // self.num_heads


@dataclasses.dataclass(frozen=True, kw_only=True)
class LanguageConfig:
    """The modality-adaptive LLaMA-2."""

    vocab_size: int
    hidden_size: int
    mlp_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    rope_theta: float
    rms_norm_eps: float

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.hidden_size // self.num_heads


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeqaConfig:
    """The whole model.

    >>> PRESETS["full"].num_visual_tokens
    65
    """

    vision: VisionConfig
    abstractor: AbstractorConfig
    language: LanguageConfig

    def __post_init__(self) -> None:
        problems = [
            f"{part}.{name} must be {'a positive whole number' if _is_whole(name) else 'positive'}, not {value!r}"
            for part, values in dataclasses.asdict(self).items()
            for name, value in values.items()
            if not _is_number(value, whole=_is_whole(name)) or not value > 0
        ]
        if problems:
            raise ConfigError("; ".join(problems))
        vision, abstractor, language = self.vision, self.abstractor, self.language
        for part, width, heads in (
            ("vision", vision.hidden_size, vision.num_heads),
            ("abstractor", abstractor.hidden_size, abstractor.num_heads),
            ("language", language.hidden_size, language.num_heads),
        ):
            if width % heads:
                problems.append(f"{part}.hidden_size {width} is not a multiple of its {heads} heads")
        if vision.image_size % vision.patch_size:
            problems.append(f"image_size {vision.image_size} is not a multiple of patch_size {vision.patch_size}")
        if abstractor.hidden_size != vision.hidden_size:
            problems.append(
                f"abstractor.hidden_size {abstractor.hidden_size} must equal vision.hidden_size "
                f"{vision.hidden_size}: its keys are queries and vision tokens side by side"
            )
        if abstractor.hidden_size % 4:
            problems.append(f"abstractor.hidden_size {abstractor.hidden_size} is not a multiple of 4 (2-d positions)")
        if language.num_heads % language.num_kv_heads:
            problems.append(f"{language.num_heads} heads do not share {language.num_kv_heads} key/value heads evenly")
        if language.head_dim % 2:
            problems.append(f"language head_dim {language.head_dim} is odd; rotary positions need pairs")
        if problems:
            raise ConfigError("; ".join(problems))

    @property
    def num_visual_tokens(self) -> int:
        """Tokens that replace one image placeholder: the queries and `vit_eos`."""
        return self.abstractor.num_queries + 1

    @classmethod
    def from_dict(cls, values: Any) -> "DeqaConfig":
        """Reads what `dataclasses.asdict` wrote. Raises `ConfigError` for anything else, naming every fault."""
        parts = {"vision": VisionConfig, "abstractor": AbstractorConfig, "language": LanguageConfig}
        if not isinstance(values, Mapping):
            raise ConfigError("model configuration: not an object")
        problems = [f"{key}: missing" for key in parts.keys() - values.keys()]
        problems += [f"{key}: unknown" for key in values.keys() - parts.keys()]
        for part in parts.keys() & values.keys():
            if not isinstance(values[part], Mapping):
                problems.append(f"{part}: not an object")
                continue
            names = {field.name for field in dataclasses.fields(parts[part])}
            problems += [f"{part}.{key}: missing" for key in names - values[part].keys()]
            problems += [f"{part}.{key}: unknown" for key in values[part].keys() - names]
        if problems:
            raise ConfigError("model configuration: " + "; ".join(sorted(problems)))
        return cls(**{part: kind(**values[part]) for part, kind in parts.items()})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Execution:
    """How a model is stored and run; none of it changes what is computed.

    Attributes:
      dtype: of matrix products and activations. Norms, softmax, rotary angles and the readout are float32 always.
      param_dtype: of stored parameters.
      remat: what of a block is computed again in the backward pass: `none`, `full`, or `dots`, which keeps the products
        with weights and computes the rest again.
      activations: how `[B, T, D]` is placed between blocks; left to the compiler without it.
    """

    dtype: str = "float32"
    param_dtype: str = "float32"
    remat: str = "none"
    activations: "jax.sharding.NamedSharding | None" = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How devices share the work. One axis may be -1: all devices that the others leave.

    Attributes:
      data: groups of devices that each hold all parameters and split the batch.
      fsdp: devices that split the batch and the parameters, which are gathered a layer at a time.
      tensor: devices that split each matrix product, and the parameters with it.
    """

    data: int = 1
    fsdp: int = -1
    tensor: int = 1

    def __post_init__(self) -> None:
        sizes = dataclasses.astuple(self)
        if any(size < 1 and size != -1 for size in sizes) or sizes.count(-1) > 1:
            raise ConfigError(
                f"mesh {self}: each of data, fsdp and tensor is at least 1, or one of them -1 for what is left"
            )

    def __str__(self) -> str:
        return ", ".join(f"{name} {size}" for name, size in dataclasses.asdict(self).items())


# ---- the published config.json ----------------------------------------------------------------------------

_VISION = ("visual_config", "visual_model")
_ABSTRACTOR = ("visual_config", "visual_abstractor")

# Published entry -> ours, both ways.
_FIELDS: dict[tuple[str, ...], tuple[str, str]] = {
    (*_VISION, "image_size"): ("vision", "image_size"),
    (*_VISION, "patch_size"): ("vision", "patch_size"),
    (*_VISION, "hidden_size"): ("vision", "hidden_size"),
    (*_VISION, "intermediate_size"): ("vision", "mlp_dim"),
    (*_VISION, "num_hidden_layers"): ("vision", "num_layers"),
    (*_VISION, "num_attention_heads"): ("vision", "num_heads"),
    (*_VISION, "layer_norm_eps"): ("vision", "layer_norm_eps"),
    (*_ABSTRACTOR, "num_learnable_queries"): ("abstractor", "num_queries"),
    (*_ABSTRACTOR, "hidden_size"): ("abstractor", "hidden_size"),
    (*_ABSTRACTOR, "intermediate_size"): ("abstractor", "mlp_dim"),
    (*_ABSTRACTOR, "num_hidden_layers"): ("abstractor", "num_layers"),
    (*_ABSTRACTOR, "num_attention_heads"): ("abstractor", "num_heads"),
    (*_ABSTRACTOR, "layer_norm_eps"): ("abstractor", "ffn_norm_eps"),
    ("vocab_size",): ("language", "vocab_size"),
    ("hidden_size",): ("language", "hidden_size"),
    ("intermediate_size",): ("language", "mlp_dim"),
    ("num_hidden_layers",): ("language", "num_layers"),
    ("num_attention_heads",): ("language", "num_heads"),
    ("num_key_value_heads",): ("language", "num_kv_heads"),
    ("rope_theta",): ("language", "rope_theta"),
    ("rms_norm_eps",): ("language", "rms_norm_eps"),
}
# Entries that would change the mathematics: absent, or exactly this.
_FIXED: dict[tuple[str, ...], Any] = {
    ("model_type",): "mplug_owl2",
    ("hidden_act",): "silu",
    ("attention_bias",): False,
    ("rope_scaling",): None,
    ("tie_word_embeddings",): False,
    (*_VISION, "hidden_act"): "quick_gelu",
    (*_VISION, "num_channels"): 3,
}
_ABSTRACTOR_NORM_EPS = 1e-5


def _lookup(tree: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    for name in path:
        if not isinstance(tree, Mapping) or name not in tree:
            raise KeyError(path)
        tree = tree[name]
    return tree


def from_published(published: Mapping[str, Any]) -> DeqaConfig:
    """Reads the `config.json` of a published (PyTorch) checkpoint.

    Raises:
      ConfigError: entries are missing, of the wrong type, or ask for what the model does not have (all named).
    """
    parts: dict[str, dict[str, Any]] = {
        "vision": {},
        "abstractor": {"norm_eps": _ABSTRACTOR_NORM_EPS},
        "language": {},
    }
    problems = []
    for path, (part, name) in _FIELDS.items():
        try:
            value = _lookup(published, path)
        except KeyError:
            problems.append(f"{'.'.join(path)}: missing")
            continue
        whole = _is_whole(name)
        if not _is_number(value, whole=whole):
            problems.append(f"{'.'.join(path)}: {value!r} is not a{' whole' if whole else ''} number")
            continue
        parts[part][name] = value if whole else float(value)
    wanted = dict(_FIXED)
    vision = parts["vision"]
    if {"image_size", "patch_size", "hidden_size"} <= vision.keys() and vision["patch_size"] > 0:
        wanted[*_ABSTRACTOR, "grid_size"] = vision["image_size"] // vision["patch_size"]
        wanted[*_ABSTRACTOR, "encoder_hidden_size"] = vision["hidden_size"]
    for path, only in wanted.items():
        try:
            value = _lookup(published, path)
        except KeyError:
            continue
        if value != only:
            problems.append(f"{'.'.join(path)}: {value!r} is not supported (only {only!r})")
    if problems:
        raise ConfigError("config.json: " + "; ".join(problems))
    try:
        return DeqaConfig.from_dict(parts)
    except ConfigError as error:
        raise ConfigError(f"config.json: {error}") from error


def to_published(config: DeqaConfig) -> dict[str, Any]:
    """The entries of a published `config.json` that describe this model; `from_published` reads them back.

    Raises:
      ConfigError: `abstractor.norm_eps` is not the 1e-5 that the published code has built in.
    """
    if config.abstractor.norm_eps != _ABSTRACTOR_NORM_EPS:
        raise ConfigError(
            f"abstractor.norm_eps {config.abstractor.norm_eps} has no place in the published format, "
            f"whose code has {_ABSTRACTOR_NORM_EPS} built in"
        )
    published: dict[str, Any] = {"architectures": ["MPLUGOwl2LlamaForCausalLM"]}
    values: dict[tuple[str, ...], Any] = dict(_FIXED)
    ours = dataclasses.asdict(config)
    values |= {path: ours[part][name] for path, (part, name) in _FIELDS.items()}
    values[*_ABSTRACTOR, "grid_size"] = config.vision.grid_size
    values[*_ABSTRACTOR, "encoder_hidden_size"] = config.vision.hidden_size
    for path, value in values.items():
        node = published
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = value
    return published


# ---- presets ----------------------------------------------------------------------------------------------


def _preset(
    vision: tuple[int, int, int, int],
    abstractor: tuple[int, int, int, int],
    language: tuple[int, int, int, int],
    *,
    patch_size: int = 14,
    num_queries: int = 64,
    vocab_size: int = 32000,
) -> DeqaConfig:
    """Each part as (hidden_size, mlp_dim, num_layers, num_heads); the rest as published, if nothing else is said."""
    keys = ("hidden_size", "mlp_dim", "num_layers", "num_heads")
    return DeqaConfig(
        vision=VisionConfig(
            image_size=448, patch_size=patch_size, layer_norm_eps=1e-6, **dict(zip(keys, vision, strict=True))
        ),
        abstractor=AbstractorConfig(
            num_queries=num_queries,
            norm_eps=_ABSTRACTOR_NORM_EPS,
            ffn_norm_eps=1e-6,
            **dict(zip(keys, abstractor, strict=True)),
        ),
        language=LanguageConfig(
            vocab_size=vocab_size,
            num_kv_heads=language[3],
            rope_theta=10000.0,
            rms_norm_eps=1e-5,
            **dict(zip(keys, language, strict=True)),
        ),
    )


PRESETS: dict[str, DeqaConfig] = {
    # The published model.
    "full": _preset((1024, 4096, 24, 16), (1024, 2816, 6, 16), (4096, 11008, 32, 32)),
    # Benchmark sizes: the published widths with few layers, and a small model.
    "mid": _preset((1024, 4096, 3, 16), (1024, 2816, 1, 16), (4096, 11008, 4, 32)),
    "small": _preset((512, 2048, 6, 8), (512, 1408, 2, 8), (1024, 2816, 8, 16)),
    # Small enough to come with the package, trained: `deqa_jax/assets/`.
    "tiny": _preset(
        (192, 768, 1, 1), (192, 384, 1, 8), (128, 352, 2, 8), patch_size=16, num_queries=16, vocab_size=512
    ),
    # The size of the golden test model.
    "test": _preset((48, 96, 2, 4), (48, 80, 2, 4), (64, 160, 3, 4)),
}
