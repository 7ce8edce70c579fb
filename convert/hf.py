"""Published checkpoint folders: their files, tensors and configuration, read and written (SPEC 8)."""

import dataclasses
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from deqa_jax.checkpoint import PREPROCESSOR_FILE, SIDE_FILES, TOKENIZER_FILE
from deqa_jax.config import ConfigError, DeqaConfig, from_published
from deqa_jax.files import read_json
from deqa_jax.preprocess import PreprocessConfig

from .tensors import BFLOAT16, ConversionError, Tensor
from .torch_file import open_torch_file

_SAFETENSORS_DTYPES = {
    "F16": np.dtype(np.float16),
    "BF16": BFLOAT16,
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_DTYPE_CODES = {dtype: code for code, dtype in _SAFETENSORS_DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class Published:
    """A published full checkpoint, opened but not read."""

    folder: Path
    config: DeqaConfig
    published_config: dict[str, Any]
    tensors: dict[str, Tensor]
    weight_files: tuple[Path, ...]


def open_published(folder: Path, problems: list[str]) -> Published | None:
    """Opens a checkpoint folder.

    Args:
      folder: `config.json`, weights in any published form, tokenizer and preprocessor files.
      problems: gets a sentence for everything that is missing, damaged or not of this model.

    Returns:
      The checkpoint, or None where its configuration or weights cannot be read at all.
    """

    def attempt(read: Callable[[], Any]) -> Any:
        try:
            return read()
        except ConversionError as error:
            problems.extend(error.problems)
        except ConfigError as error:
            problems.append(str(error))
        except OSError as error:
            problems.append(f"{error.filename or folder}: {error.strerror}")
        return None

    published_config = attempt(lambda: read_json(folder / "config.json"))
    config = attempt(lambda: from_published(published_config)) if published_config is not None else None
    attempt(lambda: PreprocessConfig.from_published(read_json(folder / PREPROCESSOR_FILE)))
    if not (folder / TOKENIZER_FILE).is_file():
        problems.append(f"{folder / TOKENIZER_FILE}: no such file")
    weights = attempt(lambda: open_weights(folder))
    if config is None or weights is None:
        return None
    return Published(folder, config, published_config, *weights)


def open_weights(folder: Path) -> tuple[dict[str, Tensor], tuple[Path, ...]]:
    """The tensors of a folder, and the files that hold them: safetensors before `.bin`, index before single file.

    Raises:
      ConversionError: there are none, an index and its files disagree, or a file is damaged.
    """
    for single, kind in (("model", "safetensors"), ("pytorch_model", "bin")):
        index, whole = folder / f"{single}.{kind}.index.json", folder / f"{single}.{kind}"
        if index.is_file():
            return _open_indexed(index)
        if whole.is_file():
            return open_file(whole), (whole,)
        shards = sorted(folder.glob(f"{single}-*-of-*.{kind}"))
        if shards:
            return _open_all(shards), tuple(shards)
    raise ConversionError([f"{folder}: no weights (model*.safetensors or pytorch_model*.bin)"])


def open_file(path: Path) -> dict[str, Tensor]:
    """The tensors of one file, which its ending tells to be safetensors or PyTorch's."""
    if path.suffix != ".safetensors":
        return open_torch_file(path)
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            slices = {key: file.get_slice(key) for key in sorted(file.keys())}
            headers = {key: (tuple(part.get_shape()), part.get_dtype()) for key, part in slices.items()}
    except safetensors.SafetensorError as error:
        raise ConversionError([f"{path.name}: truncated or not safetensors ({error})"]) from error
    unknown = [
        f"{path.name}: {key}: dtype {code}" for key, (_, code) in headers.items() if code not in _SAFETENSORS_DTYPES
    ]
    if unknown:
        raise ConversionError(unknown)

    def reader(key: str) -> Callable[[], np.ndarray]:
        def read() -> np.ndarray:
            with safetensors.safe_open(path, framework="numpy") as file:
                return file.get_tensor(key)

        return read

    return {key: Tensor(shape, _SAFETENSORS_DTYPES[code], reader(key)) for key, (shape, code) in headers.items()}


def _open_all(files: Iterable[Path]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    problems: list[str] = []
    for path in files:
        try:
            found = open_file(path)
        except ConversionError as error:
            problems += error.problems
            continue
        problems += [f"{path.name}: {key} is in another file too" for key in found.keys() & tensors.keys()]
        tensors |= found
    if problems:
        raise ConversionError(problems)
    return tensors


def _open_indexed(index: Path) -> tuple[dict[str, Tensor], tuple[Path, ...]]:
    try:
        weight_map = read_json(index).get("weight_map")
    except (ConfigError, OSError) as error:
        raise ConversionError([str(error)]) from error
    if not isinstance(weight_map, dict) or not all(
        isinstance(name, str) and name == Path(name).name for name in weight_map.values()
    ):
        raise ConversionError([f"{index.name}: no weight_map from tensors to files of this folder"])
    names = sorted(set(weight_map.values()))
    files = [index.parent / name for name in names]
    problems = [f"{index.name}: names {path.name}, which is not there" for path in files if not os.path.isfile(path)]
    tensors: dict[str, Tensor] = {}
    for path in files:
        if not os.path.isfile(path):  # unlike Path's, this one takes names that no file can have
            continue
        try:
            found = open_file(path)
        except ConversionError as error:
            problems += error.problems
            continue
        promised = {key for key, name in weight_map.items() if name == path.name}
        problems += [f"{path.name}: {key} is missing, though the index promises it" for key in promised - found.keys()]
        problems += [f"{path.name}: {key} is not in the index" for key in found.keys() - promised]
        tensors |= found
    if problems:
        raise ConversionError(sorted(problems))
    return tensors, tuple(files)


def write_published(
    folder: Path,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    config: Mapping[str, Any],
    shard_bytes: int,
    progress: Callable[[int], object] = lambda done: None,
) -> None:
    """Writes safetensors shards with an index, and `config.json`, into an existing folder.

    One tensor at a time: memory does not grow with the checkpoint.
    """
    shards: list[list[tuple[str, Tensor]]] = [[]]
    room = shard_bytes
    total = 0
    for name, tensor in tensors:
        size = tensor.num_bytes
        if size > room and shards[-1]:
            shards.append([])
            room = shard_bytes
        shards[-1].append((name, tensor))
        room -= size
        total += size
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        _write_shard(folder / file, shard, progress)
        weight_map |= {name: file for name, _ in shard}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _write_shard(path: Path, shard: list[tuple[str, Tensor]], progress: Callable[[int], object]) -> None:
    """The safetensors format: the header's length, a JSON header, then every tensor's bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, tensor in shard:
        end = position + tensor.num_bytes
        code = _DTYPE_CODES[tensor.dtype]
        header[name] = {"dtype": code, "shape": list(tensor.shape), "data_offsets": [position, end]}
        position = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        for _, tensor in shard:
            array = np.ascontiguousarray(tensor.read())
            file.write(array.view(np.uint8).reshape(-1).data if array.size else b"")
            progress(array.nbytes)


def side_files(folder: Path) -> Iterator[Path]:
    """The tokenizer and preprocessor files that a folder has."""
    return (folder / name for name in SIDE_FILES if (folder / name).is_file())
