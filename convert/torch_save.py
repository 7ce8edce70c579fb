"""Writes PyTorch's `.bin` format without PyTorch: its own code insists on it for what is trained beside an adapter."""

import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from .tensors import BFLOAT16, Tensor

_STORAGES = {
    np.dtype(np.float32): "FloatStorage",
    np.dtype(np.float16): "HalfStorage",
    BFLOAT16: "BFloat16Storage",
}
# Opcodes of pickle's protocol 2 (pickletools describes them).
_PROTOCOL, _STOP = b"\x80\x02", b"."
_MARK, _TUPLE, _EMPTY_TUPLE, _FALSE = b"(", b"t", b")", b"\x89"
_REDUCE, _PERSISTENT_ID, _SET_ITEMS = b"R", b"Q", b"u"


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes a state dict, one tensor in memory at a time.

    The file is a zip with a pickle, which rebuilds each tensor from a storage, and an entry for every storage. The same
    tensors make the same bytes.
    """

    def entry(name: str) -> zipfile.ZipInfo:
        return zipfile.ZipInfo(f"{path.stem}/{name}")  # dated 1980, where a name alone would be dated now

    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(entry("data.pkl"), _pickle(tensors))
        archive.writestr(entry("byteorder"), b"little")
        for number, tensor in enumerate(tensors.values()):
            with archive.open(entry(f"data/{number}"), "w", force_zip64=True) as storage:
                storage.write(np.ascontiguousarray(tensor.read()).tobytes())
        archive.writestr(entry("version"), b"3\n")


def _pickle(tensors: Mapping[str, Tensor]) -> bytes:
    empty = _global("collections", "OrderedDict") + _EMPTY_TUPLE + _REDUCE
    items = b"".join(
        _text(name) + _tensor(number, tensor, empty) for number, (name, tensor) in enumerate(tensors.items())
    )
    return _PROTOCOL + empty + _MARK + items + _SET_ITEMS + _STOP


def _tensor(number: int, tensor: Tensor, empty: bytes) -> bytes:
    """`_rebuild_tensor_v2(storage, offset, shape, strides, requires_grad, hooks)`."""
    size = int(np.prod(tensor.shape))
    kind = _global("torch", _STORAGES[np.dtype(tensor.dtype)])
    storage = _tuple(_text("storage"), kind, _text(str(number)), _text("cpu"), _whole(size)) + _PERSISTENT_ID
    shape, strides = (_tuple(*map(_whole, numbers)) for numbers in (tensor.shape, _strides(tensor.shape)))
    arguments = _tuple(storage, _whole(0), shape, strides, _FALSE, empty)
    return _global("torch._utils", "_rebuild_tensor_v2") + arguments + _REDUCE


def _strides(shape: tuple[int, ...]) -> Iterator[int]:
    return (int(np.prod(shape[axis + 1 :])) for axis in range(len(shape)))


def _global(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def _text(text: str) -> bytes:
    encoded = text.encode()
    return b"X" + len(encoded).to_bytes(4, "little") + encoded


def _whole(number: int) -> bytes:
    return b"\x8a\x08" + number.to_bytes(8, "little", signed=True)


def _tuple(*items: bytes) -> bytes:
    return _MARK + b"".join(items) + _TUPLE
