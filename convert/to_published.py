"""`deqa export`: a converted checkpoint back to the published PyTorch format."""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from deqa_jax.checkpoint import Checkpoint
from deqa_jax.config import to_published
from deqa_jax.files import new_folder, refuse_existing
from deqa_jax.model.llama import rotary_frequencies
from deqa_jax.parameters import ParamPath

from .hf import side_files, write_published
from .names import ROTARY_FREQUENCIES, Rule, rules_for
from .names import positions as computed_positions
from .progress import progress_bar
from .tensors import FLOAT_DTYPES, Tensor, cast, common_dtype, dtype_name

_SHARD_BYTES = 5 << 30


def export(model: Path, out: Path, *, dtype: str | None = None) -> None:
    """Writes a converted checkpoint as safetensors shards with an index, one parameter in memory at a time.

    Args:
      model: a converted folder.
      out: the folder to make.
      dtype: what to store; by default each tensor gets the dtype that it came with, unless that would lose digits
        of what is stored now.

    Raises:
      CheckpointError: `model` is no converted checkpoint.
      ConfigError: the model has what the published format cannot say.
      ConversionError: a tensor has values that its dtype cannot hold.
      FileExistsError: `out` is there already.
      QuantizedError: its weights are quantised.
    """
    refuse_existing(out)
    checkpoint = Checkpoint.open(model)
    checkpoint.require_exact("exporting")
    tensors = dict(_tensors(checkpoint, FLOAT_DTYPES[dtype] if dtype else None))
    config = dict(checkpoint.published_config or to_published(checkpoint.config))
    config["torch_dtype"] = dtype_name(tensors["lm_head.weight"].dtype)
    total = sum(tensor.num_bytes for tensor in tensors.values())
    with new_folder(out) as temporary, progress_bar("export", total) as progress:
        write_published(temporary, tensors.items(), config=config, shard_bytes=_SHARD_BYTES, progress=progress)
        for path in side_files(checkpoint.folder):
            (temporary / path.name).write_bytes(path.read_bytes())


def _tensors(checkpoint: Checkpoint, dtype: np.dtype | None) -> Iterator[tuple[str, Tensor]]:
    came_with: dict[str, str] = checkpoint.provenance.get("tensors", {})

    def choose(key: str, stored: np.dtype) -> np.dtype:
        source = FLOAT_DTYPES[came_with[key]] if key in came_with else stored
        return dtype or (source if common_dtype(stored, source) == stored else stored)

    # The tensors of one parameter follow each other, so it is enough to keep the last one read.
    read_leaf = functools.lru_cache(maxsize=1)(checkpoint.read_leaf)
    shapes = {path: leaf.shape for path, leaf in checkpoint.stored.items()}
    for path, rule in rules_for(shapes).items():
        for i, key in enumerate(rule.keys(shapes[path])):
            target = choose(key, np.dtype(checkpoint.stored[path].dtype))
            read = functools.partial(_read, read_leaf, rule, i, key, target)
            yield key, Tensor(rule.published_shape(shapes[path]), target, read)
    for key, values in _buffers(checkpoint):
        if not came_with or key in came_with:
            values = values.astype(choose(key, values.dtype))
            yield key, Tensor(values.shape, values.dtype, functools.partial(np.asarray, values))


def _read(
    read_leaf: Callable[[ParamPath], np.ndarray], rule: Rule, layer: int, key: str, dtype: np.dtype
) -> np.ndarray:
    leaf = read_leaf(rule.path)
    return cast(key, rule.form.to_published(leaf[layer] if rule.stacked else leaf), dtype)


def _buffers(checkpoint: Checkpoint) -> Iterator[tuple[str, np.ndarray]]:
    """What the PyTorch model computes itself but stores all the same."""
    config = checkpoint.config
    for template, values in computed_positions(config).items():
        for i in range(config.abstractor.num_layers):
            yield template.format(i), values
    # Only older checkpoints have them.
    for i in range(config.language.num_layers):
        key = ROTARY_FREQUENCIES.format(i)
        if key in checkpoint.provenance.get("tensors", {}):
            yield key, rotary_frequencies(config.language.head_dim, config.language.rope_theta)
