"""LoRA adapters in PEFT's format, merged into their base checkpoint (SPEC 8)."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from deqa_jax.config import ConfigError, from_published
from deqa_jax.files import read_json

from .hf import Published, open_file
from .tensors import FLOAT_DTYPES, ConversionError, Tensor

ADAPTER_CONFIG = "adapter_config.json"
_TRAINED_FILES = ("non_lora_trainables.safetensors", "non_lora_trainables.bin")
_ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
PREFIX = "base_model.model."
"""In front of every name in an adapter's files."""
# Settings that would change the mathematics: absent, empty, or exactly this.
_FIXED: dict[str, Any] = {
    "peft_type": "LORA",
    "bias": "none",
    "fan_in_fan_out": False,
    "modules_to_save": None,
    "use_dora": False,
    "rank_pattern": {},
    "alpha_pattern": {},
}


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds a LoRA adapter."""
    return (folder / ADAPTER_CONFIG).is_file()


def merge_adapter(folder: Path, base: Published | None, problems: list[str]) -> Published | None:
    """The base checkpoint with an adapter merged, and with the tensors that were trained whole.

    A merged weight is W + (α / r) · B A, in float32, and stays float32: no half precision holds it exactly.

    Args:
      folder: the adapter's.
      base: the full checkpoint, or None if it could not be opened: the adapter is checked as far as possible.
      problems: gets a sentence for everything in the adapter that is wrong or does not fit the base.
    """
    settings = _settings(folder, base, problems)
    adapter, adapter_file = _open_first(folder, _ADAPTER_FILES, problems)
    trained, trained_file = _open_first(folder, _TRAINED_FILES, problems)
    pairs = _pairs(adapter, adapter_file.name, problems)
    problems += _check_targets(settings, pairs)
    if base is None:
        return None
    tensors = dict(base.tensors)
    for key, tensor in trained.items():
        name = key.removeprefix(PREFIX)
        if name not in base.tensors:
            problems.append(f"{trained_file.name}: {key} is not a tensor of the base checkpoint")
        tensors[name] = tensor
    for module, pair in pairs.items():
        weight = tensors.get(f"{module}.weight")
        problem = _check_pair(pair, weight, settings.get("r"))
        if problem:
            problems.append(f"{adapter_file.name}: {module}: {problem}")
        elif weight is not None:
            scale = _scale(settings, pair["A"].shape[0])
            tensors[f"{module}.weight"] = _merged(weight, pair["A"], pair["B"], scale)
    files = (*base.weight_files, adapter_file, trained_file)
    return Published(base.folder, base.config, base.published_config, tensors, files)


def _settings(folder: Path, base: Published | None, problems: list[str]) -> dict[str, Any]:
    """The adapter's settings; its own config.json, where there is one, must describe the base's model."""
    try:
        own = from_published(read_json(folder / "config.json")) if (folder / "config.json").is_file() else None
        if base and own and own != base.config:
            problems.append(f"{folder / 'config.json'}: describes another model than the base's config.json")
    except (ConfigError, OSError) as error:
        problems.append(f"{folder / 'config.json'}: {error}")
    try:
        settings = read_json(folder / ADAPTER_CONFIG)
    except (ConfigError, OSError) as error:
        problems.append(str(error))
        return {}
    for key, wanted in _FIXED.items():
        value = settings.get(key, wanted)
        if value != wanted and (value or wanted):
            problems.append(
                f"{ADAPTER_CONFIG}: {key}: {json.dumps(value)} is not supported (only {json.dumps(wanted)})"
            )
    for key in ("lora_alpha", "r"):
        value = settings.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            problems.append(f"{ADAPTER_CONFIG}: {key}: {value!r} is not a positive number")
            return {**settings, "lora_alpha": 1.0, "r": None}
    return settings


def _scale(settings: Mapping[str, Any], rank: int) -> float:
    return settings.get("lora_alpha", 1.0) / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _pairs(adapter: Mapping[str, Tensor], file: str, problems: list[str]) -> dict[str, dict[str, Tensor]]:
    """The matrices A and B of every adapted layer, by its name in the base checkpoint."""
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, tensor in adapter.items():
        module, found, rest = key.removeprefix(PREFIX).partition(".lora_")
        side = rest.removesuffix(".weight").removesuffix(".default")
        if not found or side not in ("A", "B"):
            problems.append(f"{file}: {key} is no LoRA matrix of a dense layer")
        elif side in pairs.setdefault(module, {}):
            problems.append(f"{file}: {key} is there twice under two names")
        else:
            pairs[module][side] = tensor
    return pairs


def _open_first(folder: Path, names: tuple[str, ...], problems: list[str]) -> tuple[dict[str, Tensor], Path]:
    for name in names:
        if (folder / name).is_file():
            try:
                return open_file(folder / name), folder / name
            except ConversionError as error:
                problems += error.problems
                return {}, folder / name
    problems.append(f"{folder}: {names[-1]} is missing")
    return {}, folder / names[-1]


def _check_targets(settings: Mapping[str, Any], pairs: Mapping[str, Any]) -> list[str]:
    targets = settings.get("target_modules")
    if not isinstance(targets, list):  # a pattern: nothing to count
        return []
    return [
        f"{ADAPTER_CONFIG}: target {target} has no matrices in the adapter"
        for target in targets
        if not any(module == target or module.endswith(f".{target}") for module in pairs)
    ]


def _check_pair(pair: Mapping[str, Tensor], weight: Tensor | None, rank: int | None) -> str | None:
    if weight is None:
        return "the base checkpoint has no such layer"
    if pair.keys() != {"A", "B"}:
        return f"lora_{'B' if 'A' in pair else 'A'} is missing"
    a, b = pair["A"], pair["B"]
    if not {a.dtype, b.dtype} <= set(FLOAT_DTYPES.values()):
        return f"matrices of {a.dtype} and {b.dtype}, which no weight is"
    two_axes = all(len(shape) == 2 for shape in (weight.shape, a.shape, b.shape))
    if not two_axes or b.shape[1] != a.shape[0] or weight.shape != (b.shape[0], a.shape[1]) or not a.shape[0]:
        return f"lora_A {list(a.shape)} and lora_B {list(b.shape)} do not fit a weight {list(weight.shape)}"
    if rank is not None and a.shape[0] != rank:
        return f"rank {a.shape[0]}, but {ADAPTER_CONFIG} says r = {rank}"
    return None


def _merged(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    def read() -> np.ndarray:
        update = np.matmul(b.read().astype(np.float32), a.read().astype(np.float32))
        return weight.read().astype(np.float32) + np.float32(scale) * update

    return Tensor(weight.shape, np.dtype(np.float32), read)
