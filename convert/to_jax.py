"""`deqa convert`: a published checkpoint to a folder of ours, and the cache that `--model` uses."""

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import logging
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deqa_jax import builtin_model
from deqa_jax.checkpoint import TOKENIZER_FILE, Checkpoint, is_checkpoint, write_checkpoint
from deqa_jax.config import DeqaConfig
from deqa_jax.files import new_folder, refuse_existing, sha256
from deqa_jax.parameters import ParamPath, parameter_shapes
from deqa_jax.quantize import is_quantized

from .average import averaged
from .hf import Published, open_published, side_files
from .names import Rule, account, rules_for
from .peft import is_adapter, merge_adapter
from .progress import progress_bar
from .quantized import quantized
from .tensors import FLOAT_DTYPES, ConversionError, Tensor, cast, common_dtype, dtype_name

_LOG = logging.getLogger(__name__)
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_FILES = ("*.json", "*.bin", "*.safetensors", "tokenizer.model")


def locate(source: str) -> Path:
    """The folder of a published checkpoint: a local path as it is, a hub id downloaded (the only use of network).

    Raises:
      ConversionError: there is no such folder, or the hub cannot be reached or has no such repository.
    """
    folder = Path(source)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ConversionError([f"{source}: a file; name the folder that holds config.json and the weights"])
    if not _HUB_ID.fullmatch(source):
        raise ConversionError([f"{source}: no such folder"])
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(huggingface_hub.snapshot_download(source, allow_patterns=list(_HUB_FILES)))
    # Whatever the network layer raises when there is no network; its types are not this library's to know.
    except Exception as error:
        if isinstance(error, HfHubHTTPError) and not isinstance(error, LocalEntryNotFoundError):
            raise ConversionError([f"{source}: no such folder, and the hub refused it as an id: {error}"]) from error
        raise ConversionError(
            [
                f"{source}: no such folder, and as a hub id it could not be downloaded: there is no network, or the "
                f"hub is out of reach ({type(error).__name__}). Download it elsewhere and name the folder."
            ]
        ) from error


def convert(
    source: str,
    out: Path,
    *,
    base: str | None = None,
    average: Sequence[str] = (),
    dtype: str | None = None,
    quantization: str | None = None,
) -> None:
    """Converts a published checkpoint, full or LoRA, into a folder that `Checkpoint.open` reads.

    Streamed: memory grows with the largest stacked parameter, not with the checkpoint. Atomic: `out` appears
    when it is complete. Of several processes each converts for itself.

    Args:
      source: a folder or a hub id; a converted folder too, to store it otherwise.
      out: the folder to make.
      base: for a LoRA adapter, the full checkpoint that it was trained on.
      average: other models of the same sizes and vocabulary, as `source` is named, whose mean with it is taken.
      dtype: what to store; by default what the source stores, and float32 for weights merged with an adapter and means.
      quantization: a scheme of `quantize.SCHEMES` for the kernels of blocks; `dtype` is then of the rest.

    Raises:
      CheckpointError: the source is a converted folder, and damaged.
      ConversionError: the checkpoint is not exactly one of this model; every violation is listed.
      FileExistsError: `out` is there already.
      QuantizedError: the source is quantised itself.
    """
    refuse_existing(out)

    def stored(path: ParamPath) -> np.dtype | None:
        # What is quantised is not rounded to another dtype first.
        return FLOAT_DTYPES[dtype] if dtype and not (quantization and is_quantized(path)) else None

    whole = _averaged(source, base, average, stored) if average else _whole(source, base, stored)
    leaves = quantized(whole.leaves, quantization) if quantization else whole.leaves
    total = sum(leaf.num_bytes for leaf in leaves.values())
    with new_folder(out) as temporary, progress_bar("convert", total) as progress:
        write_checkpoint(
            temporary,
            config=whole.config,
            leaves=leaves,
            side_files={path.name: path.read_bytes() for path in whole.side_files},
            published_config=whole.published_config,
            provenance=whole.provenance,
            quantization=quantization,
            progress=progress,
            alone=True,
        )


@dataclasses.dataclass(frozen=True)
class _Source:
    """What a converted checkpoint is made of."""

    config: DeqaConfig
    published_config: dict[str, Any] | None
    leaves: dict[ParamPath, Tensor]
    side_files: list[Path]
    """Of two with one name the last."""
    provenance: dict[str, Any]


_Stored = Callable[[ParamPath], np.dtype | None]


def _whole(source: str, base: str | None, stored: _Stored) -> _Source:
    return (_from_converted if is_checkpoint(Path(source)) else _from_published)(source, base, stored)


def _averaged(source: str, base: str | None, others: Sequence[str], stored: _Stored) -> _Source:
    def as_it_is(path: ParamPath) -> np.dtype | None:
        return None

    def tokenizer(found: _Source) -> bytes:
        return {path.name: path for path in found.side_files}[TOKENIZER_FILE].read_bytes()

    whole = _whole(source, base, as_it_is)
    models = [whole]
    for name in others:
        if not is_checkpoint(Path(name)):
            _refuse_adapter(name, locate(name))
        other = _whole(name, None, as_it_is)
        if other.config != whole.config:
            raise ConversionError([f"{name}: is not of the same sizes as {source}, so there is no mean of them"])
        if tokenizer(other) != tokenizer(whole):
            raise ConversionError([f"{name}: has another vocabulary than {source}, so there is no mean of them"])
        models.append(other)
    # A mean has more digits than the tensors that the source came with, whose dtypes an export would go back to.
    provenance = {key: value for key, value in whole.provenance.items() if key != "tensors"}
    with_these = [{"model": name, **other.provenance} for name, other in zip(others, models[1:], strict=True)]
    return dataclasses.replace(
        whole,
        leaves=averaged([model.leaves for model in models], stored),
        provenance={**provenance, "averaged_with": with_these},
    )


def _refuse_adapter(name: str, folder: Path) -> None:
    if is_adapter(folder):
        raise ConversionError([f"{name}: a LoRA adapter; merge it first: deqa convert {name} OUT --base BASE"])


def _from_published(source: str, base: str | None, stored: _Stored) -> _Source:
    problems: list[str] = []
    published, folders = _open(source, base, problems)
    shapes = parameter_shapes(published.config) if published else {}
    if published:
        problems += account(published.config, shapes, published.tensors)
    if problems or not published:
        raise ConversionError(problems)
    return _Source(
        published.config,
        published.published_config,
        {path: _stacked(rule, shapes[path], published, stored(path)) for path, rule in rules_for(shapes).items()},
        [path for folder in folders for path in side_files(folder)],
        _provenance(source, base, published),
    )


def _from_converted(source: str, base: str | None, stored: _Stored) -> _Source:
    if base is not None:
        raise ConversionError([f"{source}: a full checkpoint; --base is for LoRA adapters"])
    checkpoint = Checkpoint.open(source)
    checkpoint.require_exact("converting")

    def read(path: ParamPath, dtype: np.dtype) -> np.ndarray:
        return cast("/".join(path), checkpoint.read_leaf(path), dtype)

    leaves = {}
    for path, leaf in checkpoint.stored.items():
        dtype = stored(path) or np.dtype(leaf.dtype)
        leaves[path] = Tensor(leaf.shape, dtype, functools.partial(read, path, dtype))
    provenance = {**checkpoint.provenance, "converted_again": checkpoint.identity, "versions": _versions()}
    return _Source(
        checkpoint.config, checkpoint.published_config, leaves, list(side_files(checkpoint.folder)), provenance
    )


def _open(source: str, base: str | None, problems: list[str]) -> tuple[Published | None, list[Path]]:
    """The checkpoint, and the folders to take tokenizer and preprocessor files from, the last one winning."""
    folder = locate(source)
    if not is_adapter(folder):
        if base is not None:
            raise ConversionError([f"{source}: a full checkpoint; --base is for LoRA adapters"])
        return open_published(folder, problems), [folder]
    if base is None:
        raise ConversionError([f"{source}: a LoRA adapter; name the checkpoint it was trained on with --base"])
    base_folder = locate(base)
    if is_adapter(base_folder):
        raise ConversionError([f"{base}: a LoRA adapter too; --base is the full checkpoint"])
    published = open_published(base_folder, problems)
    return merge_adapter(folder, published, problems), [folder, base_folder]


def _stacked(rule: Rule, shape: tuple[int, ...], published: Published, dtype: np.dtype | None) -> Tensor:
    """One of our parameters, assembled from its published tensors when it is read."""
    parts = [published.tensors[key] for key in rule.keys(shape)]
    target = dtype or common_dtype(*(part.dtype for part in parts))

    def read() -> np.ndarray:
        array = np.empty(shape, target)
        for i, part in enumerate(parts):
            try:
                with np.errstate(over="raise"):
                    array[i if rule.stacked else ...] = rule.form.to_ours(part.read())
            except FloatingPointError as error:
                key = rule.keys(shape)[i]
                raise ConversionError([f"{key}: has values that {dtype_name(target)} cannot hold"]) from error
        return array

    return Tensor(shape, target, read)


def _provenance(source: str, base: str | None, published: Published) -> dict[str, Any]:
    return {
        "source": source,
        "base": base,
        "files": {path.name: sha256(path) for path in published.weight_files},
        "tensors": {key: dtype_name(tensor.dtype) for key, tensor in published.tensors.items()},
        "versions": _versions(),
    }


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("deqa-jax", "jax", "orbax-checkpoint")}


def resolve(model: str) -> Path:
    """The converted folder behind what `--model` names, converted once into a cache if it is not converted yet.

    Of several processes, which may share a cache or not, each converts for itself: see `first_goes_first`.

    Args:
      model: a converted folder, a published one, a hub id, or `deqa-tiny`, which comes with the package.

    Raises:
      ConversionError: it is none of these, or cannot be converted.
      CheckpointError: `deqa-tiny` is damaged.
    """
    model = str(builtin_model.folder_of(model))
    if is_checkpoint(Path(model)):
        return Path(model)
    folder = locate(model)
    _refuse_adapter(model, folder)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "deqa-jax" / "models"
    cached = cache / f"{folder.resolve().name}-{_fingerprint(folder)}"
    if not cached.exists():
        _LOG.info("converting %s once into %s", model, cached)
        # Where two programs convert the same model at once, the first one's result serves both.
        with contextlib.suppress(FileExistsError):
            convert(model, cached)
    return cached


def _fingerprint(folder: Path) -> str:
    """Changes when a file of the folder does."""
    state = [
        (str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns)
        for path in sorted(folder.iterdir())
        if path.is_file()
    ]
    return hashlib.sha256(repr(state).encode()).hexdigest()[:16]
