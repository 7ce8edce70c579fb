"""`deqa export --adapter`: trained adapters in PEFT's format, with what was trained beside them."""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from deqa_jax import lora
from deqa_jax.checkpoint import Checkpoint, CheckpointError
from deqa_jax.config import to_published
from deqa_jax.files import new_folder, refuse_existing
from deqa_jax.lora import LoraConfig
from deqa_jax.parameters import ParamPath, parameter_shapes

from .hf import side_files
from .names import Rule, rules_for
from .peft import ADAPTER_CONFIG, PREFIX
from .tensors import FLOAT_DTYPES, Tensor, cast
from .torch_save import save_tensors

ADAPTER_FILE, TRAINED_FILE = "adapter_model.bin", "non_lora_trainables.bin"


def export_adapter(model: Path, out: Path, *, dtype: str | None = None) -> None:
    """Writes the adapters of a LoRA run for the PyTorch code, which puts them on the published base.

    Args:
      model: a checkpoint of the run.
      out: the folder to make.
      dtype: what to store; float32, as trained, without it.

    Raises:
      CheckpointError: `model` has no adapters.
      ConfigError: the model has what the published format cannot say.
      ConversionError: a tensor has values that `dtype` cannot hold.
      FileExistsError: `out` is there already.
      QuantizedError: its weights are quantised.
    """
    refuse_existing(out)
    checkpoint = Checkpoint.open(model)
    checkpoint.require_exact("exporting")
    if checkpoint.adapter is None or checkpoint.adapter.lora is None:
        raise CheckpointError(f"{model}: has no adapters of its own; export it without --adapter")
    if checkpoint.adapter.base.adapter is not None:
        raise CheckpointError(
            f"{model}: was trained on adapters itself, on which PEFT cannot put others; export it without --adapter"
        )
    target = FLOAT_DTYPES[dtype or "float32"]
    rules = rules_for(parameter_shapes(checkpoint.config))
    # The tensors of one parameter follow each other, so it is enough to keep the last one read.
    read_own = functools.lru_cache(maxsize=1)(checkpoint.read_own)
    adapters: dict[str, Tensor] = {}
    trained: dict[str, Tensor] = {}
    for path in sorted(checkpoint.own):
        shape = checkpoint.own[path].shape
        if path[-1] in (lora.A, lora.B):
            adapters |= _adapter(read_own, path, shape, rules[(*path[:-1], "kernel")], target)
        else:
            trained |= _trained(read_own, path, shape, rules[path], target)
    with new_folder(out) as temporary:
        settings = _settings(checkpoint.adapter.lora, adapters, checkpoint.adapter.base)
        (temporary / ADAPTER_CONFIG).write_text(json.dumps(settings, indent=2) + "\n")
        save_tensors(temporary / ADAPTER_FILE, adapters)
        save_tensors(temporary / TRAINED_FILE, trained)
        config = checkpoint.published_config or to_published(checkpoint.config)
        (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        for file in side_files(checkpoint.folder):
            (temporary / file.name).write_bytes(file.read_bytes())


_Read = Callable[[ParamPath], np.ndarray]


def _adapter(
    read_own: _Read, path: ParamPath, shape: tuple[int, ...], rule: Rule, dtype: np.dtype
) -> dict[str, Tensor]:
    """One matrix, a tensor a layer; PyTorch's dense layers are [outputs, inputs]."""
    side = "A" if path[-1] == lora.A else "B"
    names = [f"{PREFIX}{key.removesuffix('.weight')}.lora_{side}.weight" for key in rule.keys(shape)]
    return {
        name: Tensor(shape[-1:-3:-1], dtype, functools.partial(_read, read_own, path, layer, rule, name, dtype))
        for layer, name in enumerate(names)
    }


def _trained(
    read_own: _Read, path: ParamPath, shape: tuple[int, ...], rule: Rule, dtype: np.dtype
) -> dict[str, Tensor]:
    published = rule.published_shape(shape)
    names = [f"{PREFIX}{key}" for key in rule.keys(shape)]
    return {
        name: Tensor(published, dtype, functools.partial(_read, read_own, path, layer, rule, name, dtype))
        for layer, name in enumerate(names)
    }


def _read(read_own: _Read, path: ParamPath, layer: int, rule: Rule, name: str, dtype: np.dtype) -> np.ndarray:
    leaf = read_own(path)
    leaf = leaf[layer] if rule.stacked else leaf
    return cast(name, rule.form.to_published(leaf), dtype)


def _settings(config: LoraConfig, adapters: dict[str, Tensor], base: Checkpoint) -> dict[str, Any]:
    targets = sorted({name.removeprefix(PREFIX).partition(".lora_")[0] for name in adapters})
    return {
        "base_model_name_or_path": base.provenance.get("source"),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": config.rank,
        "target_modules": targets,
        "task_type": "CAUSAL_LM",
    }
