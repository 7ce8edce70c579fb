"""LoRA adapters in PEFT's format, merged into their base checkpoint (SPEC 8)."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from deqa_jax.checkpoint import read_json
from deqa_jax.config import ConfigError, from_published

from .hf import Published, open_file
from .tensors import FLOAT_DTYPES, ConversionError, Tensor

ADAPTER_CONFIG = "adapter_config.json"
_TRAINED_FILES = ("non_lora_trainables.safetensors", "non_lora_trainables.bin")
_ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_PREFIX = "base_model.model."
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


def merge_adapter(folder: Path, base: Published) -> Published:
    """The base checkpoint with an adapter merged, and with the tensors that were trained whole.

    A merged weight is W + (α / r) · B A, in float32, and stays float32: no half precision holds it exactly.

    Raises:
      ConversionError: the adapter does not fit the base (everything that does not is named).
    """
    problems: list[str] = []
    scale_of_rank = None
    try:
        settings = read_json(folder / ADAPTER_CONFIG)
        scale_of_rank = _scaling(settings, problems)
        problems += _check_config(folder, base)
    except (ConfigError, OSError) as error:
        raise ConversionError([str(error)]) from error
    adapter, adapter_file = _open_first(folder, _ADAPTER_FILES, problems)
    trained, trained_file = _open_first(folder, _TRAINED_FILES, problems)

    tensors = dict(base.tensors)
    for key, tensor in trained.items():
        name = key.removeprefix(_PREFIX)
        if name not in base.tensors:
            problems.append(f"{trained_file.name}: {key} is not a tensor of the base checkpoint")
        tensors[name] = tensor
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, tensor in adapter.items():
        module, found, rest = key.removeprefix(_PREFIX).partition(".lora_")
        side = rest.removesuffix(".weight").removesuffix(".default")
        if not found or side not in ("A", "B"):
            problems.append(f"{adapter_file.name}: {key} is no LoRA matrix of a dense layer")
            continue
        pairs.setdefault(module, {})[side] = tensor
    problems += _check_targets(settings, pairs)
    for module, pair in pairs.items():
        weight = tensors.get(f"{module}.weight")
        problem = _check_pair(pair, weight)
        if problem:
            problems.append(f"{adapter_file.name}: {module}: {problem}")
        elif scale_of_rank is not None and weight is not None:
            tensors[f"{module}.weight"] = _merged(weight, pair["A"], pair["B"], scale_of_rank(pair["A"].shape[0]))
    if problems:
        raise ConversionError(problems)
    files = (*base.weight_files, adapter_file, trained_file)
    return Published(base.folder, base.config, base.published_config, tensors, files)


def _scaling(settings: Mapping[str, Any], problems: list[str]) -> Any:
    for key, wanted in _FIXED.items():
        value = settings.get(key, wanted)
        if value != wanted and (value or wanted):
            problems.append(
                f"{ADAPTER_CONFIG}: {key}: {json.dumps(value)} is not supported (only {json.dumps(wanted)})"
            )
    alpha = settings.get("lora_alpha")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float):
        problems.append(f"{ADAPTER_CONFIG}: lora_alpha: {alpha!r} is not a number")
        return None
    if settings.get("use_rslora"):
        return lambda rank: alpha / math.sqrt(rank)
    return lambda rank: alpha / rank


def _check_config(folder: Path, base: Published) -> list[str]:
    """An adapter's own config.json must describe the same model as the base's."""
    path = folder / "config.json"
    if path.is_file() and from_published(read_json(path)) != base.config:
        return [f"{path}: describes another model than the base checkpoint's config.json"]
    return []


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


def _check_pair(pair: Mapping[str, Tensor], weight: Tensor | None) -> str | None:
    if weight is None:
        return "the base checkpoint has no such layer"
    if pair.keys() != {"A", "B"}:
        return f"lora_{'B' if 'A' in pair else 'A'} is missing"
    a, b = pair["A"], pair["B"]
    if not {a.dtype, b.dtype} <= set(FLOAT_DTYPES.values()):
        return f"matrices of {a.dtype} and {b.dtype}, which no weight is"
    shapes = (weight.shape, a.shape, b.shape)
    if any(len(shape) != 2 for shape in shapes) or b.shape[1] != a.shape[0] or weight.shape != (b.shape[0], a.shape[1]):
        return f"lora_A {list(a.shape)} and lora_B {list(b.shape)} do not fit a weight {list(weight.shape)}"
    return None


def _merged(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    def read() -> np.ndarray:
        update = np.matmul(b.read().astype(np.float32), a.read().astype(np.float32))
        return weight.read().astype(np.float32) + np.float32(scale) * update

    return Tensor(weight.shape, np.dtype(np.float32), read)
