"""Reads PyTorch's `.bin` files without torch, and without running anything that is in them.

Such a file is a zip: `NAME/data.pkl` describes a dict of tensors by a pickle whose persistent ids name storages,
and `NAME/data/KEY` holds each storage, uncompressed. The pickle goes through an unpickler that knows the few
names tensors need; the storages are memory-mapped, one tensor at a time.
"""

import collections
import io
import math
import pickle
import pickletools
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .tensors import BFLOAT16, ConversionError, Tensor

_STORAGE_DTYPES = {
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": BFLOAT16,
    "FloatStorage": np.dtype(np.float32),
    "DoubleStorage": np.dtype(np.float64),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}
_LOCAL_HEADER = struct.Struct("<4s22xHH")
_MAX_AXES = 32
# Of what describes tensors; the storages are not read but mapped.
_MAX_ENTRY_BYTES = 64 << 20
_MAX_NUMBER = 1 << 40


# What the pickle builds is of types without attributes: it could change those of a common class after the check.
class _Storage(NamedTuple):
    kind: str
    key: str
    numel: int

    @property
    def dtype(self) -> np.dtype:
        return _STORAGE_DTYPES[self.kind]


class _View(NamedTuple):
    """What `_rebuild_tensor_v2` is called with: a strided window on a storage."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Refused:
    """Stands for a name that is not allowed; takes whatever the pickle does to it and does nothing."""

    def __init__(self, *args: object, **kwargs: object):
        pass

    def __setstate__(self, state: object) -> None:
        pass

    def __call__(self, *args: object, **kwargs: object) -> "_Refused":
        return self


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> _View:
    numbers = (offset, *shape, *strides)
    if not isinstance(storage, _Storage) or not all(type(n) is int and 0 <= n < _MAX_NUMBER for n in numbers):
        raise pickle.UnpicklingError("a tensor that is not made of a storage and sizes")
    return _View(storage, offset, tuple(shape), tuple(strides))


def _rebuild_parameter(data: Any, *_: Any) -> Any:
    return data


class _TensorUnpickler(pickle.Unpickler):
    """Knows tensors, parameters, storages and OrderedDict; notes every other name and replaces it by `_Refused`."""

    def __init__(self, file: Any):
        super().__init__(file)
        self.refused: list[str] = []

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _STORAGE_DTYPES:
            return name
        allowed = {
            ("collections", "OrderedDict"): collections.OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
            ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
        }
        if (module, name) in allowed:
            return allowed[module, name]
        self.refused.append(f"{module}.{name}")
        return _Refused

    def persistent_load(self, pid: Any) -> _Storage:
        match pid:
            case ("storage", str(kind), str(key), _, int(numel)) if kind in _STORAGE_DTYPES and numel >= 0:
                return _Storage(kind, key, numel)
        raise pickle.UnpicklingError("a persistent id that is not a storage")


def open_torch_file(path: Path) -> dict[str, Tensor]:
    """Lists the tensors of a `.bin` file; nothing but the description is read.

    Raises:
      ConversionError: the file is truncated, damaged, of the old format, or holds anything but named tensors.
    """
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile:
        raise ConversionError([f"{path.name}: {_why_not_a_zip(path)}"]) from None
    # Where the bytes of the zip's own tables are damaged, its reader raises nearly anything.
    except Exception as error:
        raise ConversionError([f"{path.name}: damaged zip ({error})"]) from error
    with archive:
        entries = {info.filename.split("/", 1)[-1]: info for info in archive.infolist()}
        if "data.pkl" not in entries:
            raise ConversionError([f"{path.name}: a zip, but not of tensors (no data.pkl)"])
        try:
            byteorder = _content(archive, entries["byteorder"]) if "byteorder" in entries else b"little"
            pickled = _content(archive, entries["data.pkl"])
        except Exception as error:
            raise ConversionError([f"{path.name}: damaged zip entry ({error})"]) from error
    if byteorder != b"little":
        raise ConversionError([f"{path.name}: its tensors are not in little-endian byte order"])
    views, problems = _unpickle(pickled, path.name)
    starts = _data_starts(path, {view.storage.key: entries.get(f"data/{view.storage.key}") for view in views.values()})
    tensors = {}
    for name, view in views.items():
        problem = _check_view(view, entries.get(f"data/{view.storage.key}"), starts.get(view.storage.key))
        if problem:
            problems.append(f"{path.name}: {name}: {problem}")
        else:
            tensors[name] = _tensor(path, starts[view.storage.key], view)
    if problems:
        raise ConversionError(problems)
    return tensors


def _content(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bytes:
    # PyTorch compresses nothing; a few compressed bytes could stand for more than the memory holds.
    if entry.compress_type != zipfile.ZIP_STORED:
        raise zipfile.BadZipFile(f"{entry.filename} is compressed")
    if entry.file_size > _MAX_ENTRY_BYTES:
        raise zipfile.BadZipFile(f"{entry.filename} is larger than any description of tensors")
    return archive.read(entry)


def _why_not_a_zip(path: Path) -> str:
    with path.open("rb") as file:
        start = file.read(4)
    if not start:
        return "empty file"
    if start[:2] == b"PK":
        return "truncated (the zip's directory at the end is missing)"
    if start[:1] == b"\x80":
        return "written in PyTorch's old format (before 1.6); load it and torch.save it again with a newer PyTorch"
    return "not a PyTorch file"


def _unpickle(pickled: bytes, file: str) -> tuple[dict[str, _View], list[str]]:
    unpickler = _TensorUnpickler(io.BytesIO(pickled))
    failure: Exception | None = None
    loaded: Any = {}
    # Damaged or hostile bytes make an unpickler raise anything; all of it means the same here.
    try:
        _check_memo(pickled)
        loaded = unpickler.load()
    except Exception as error:
        failure = error
    if unpickler.refused:
        return {}, [f"{file}: its pickle names {name}, which is no tensor; refused" for name in unpickler.refused]
    if failure is not None:
        return {}, [f"{file}: its pickle is damaged ({failure})"]
    if not isinstance(loaded, dict):
        return {}, [f"{file}: holds a {type(loaded).__name__}, not a dict of tensors"]
    # Through `dict` itself: a pickle may put attributes of its own on an OrderedDict.
    views = {name: value for name, value in dict.items(loaded) if isinstance(name, str) and isinstance(value, _View)}
    return views, [f"{file}: {_shown(name)} is no tensor" for name in dict.keys(loaded) if name not in views]


def _shown(name: Any) -> str:
    return repr(name) if isinstance(name, str) else f"an entry under a {type(name).__name__}"


def _check_memo(pickled: bytes) -> None:
    """The unpickler makes an array as long as the largest number that the pickle remembers something under."""
    for opcode, argument, _ in pickletools.genops(pickled):
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and int(argument or 0) > len(pickled):
            raise pickle.UnpicklingError("it remembers more than it says")


def _data_starts(path: Path, entries: Mapping[str, zipfile.ZipInfo | None]) -> dict[str, int]:
    """Where in the file each storage's bytes begin, if they all lie in it."""
    starts = {}
    size = path.stat().st_size
    with path.open("rb") as file:
        for key, entry in entries.items():
            if entry is None:
                continue
            file.seek(entry.header_offset)
            header = file.read(_LOCAL_HEADER.size)
            if len(header) < _LOCAL_HEADER.size or header[:4] != b"PK\x03\x04":
                continue
            _, name_length, extra_length = _LOCAL_HEADER.unpack(header)
            start = entry.header_offset + _LOCAL_HEADER.size + name_length + extra_length
            if start + entry.file_size <= size:
                starts[key] = start
    return starts


def _check_view(view: _View, entry: zipfile.ZipInfo | None, start: int | None) -> str | None:
    storage = view.storage
    if entry is None:
        return f"its storage {storage.key} is missing"
    if entry.compress_type != zipfile.ZIP_STORED:
        return "its storage is compressed"
    if start is None:
        return f"its storage {storage.key} does not lie in the file"
    if entry.file_size != storage.numel * storage.dtype.itemsize:
        return f"its storage has {entry.file_size} bytes, not {storage.numel} x {storage.dtype}"
    fits = len(view.shape) == len(view.strides) <= _MAX_AXES
    if fits and 0 not in view.shape:
        last = view.offset + sum((n - 1) * step for n, step in zip(view.shape, view.strides, strict=True))
        fits = last < storage.numel and math.prod(view.shape) < _MAX_NUMBER
    return None if fits else f"its shape {list(view.shape)} does not fit its storage of {storage.numel}"


def _tensor(path: Path, start: int, view: _View) -> Tensor:
    def read() -> np.ndarray:
        if 0 in view.shape:
            return np.zeros(view.shape, view.storage.dtype)
        storage = np.memmap(path, view.storage.dtype, "r", start, (view.storage.numel,))
        strides = tuple(stride * storage.itemsize for stride in view.strides)
        return np.lib.stride_tricks.as_strided(storage[view.offset :], view.shape, strides, writeable=False)

    return Tensor(view.shape, view.storage.dtype, read)
