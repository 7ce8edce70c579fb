"""Writes PyTorch's `.bin` format without torch, the way torch.save does."""

import collections
import io
import pickle
import sys
import types
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

_STORAGES = {
    np.dtype(np.float16): "HalfStorage",
    np.dtype(ml_dtypes.bfloat16): "BFloat16Storage",
    np.dtype(np.float32): "FloatStorage",
    np.dtype(np.int64): "LongStorage",
}


class FakeTensor:
    """Pickles as a torch tensor does: a window (shape, strides in elements, offset) on a flat storage."""

    def __init__(self, storage: np.ndarray, shape: tuple[int, ...], strides: tuple[int, ...], offset: int = 0):
        self.storage = storage
        self.view = (offset, shape, strides)

    @classmethod
    def of(cls, array: np.ndarray) -> "FakeTensor":
        """A contiguous tensor."""
        array = np.ascontiguousarray(array)
        strides = tuple(stride // array.itemsize for stride in array.strides)
        return cls(array.reshape(-1), array.shape, strides)

    def __reduce__(self) -> tuple[Any, ...]:
        offset, shape, strides = self.view
        rebuild = sys.modules["torch._utils"]._rebuild_tensor_v2
        return rebuild, (_StorageReference(self.storage), offset, shape, strides, False, collections.OrderedDict())


class _StorageReference:
    def __init__(self, storage: np.ndarray):
        self.storage = storage


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO):
        super().__init__(file, protocol=2)
        self.storages: list[np.ndarray] = []

    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, _StorageReference):
            return None
        known = [i for i, storage in enumerate(self.storages) if storage is obj.storage]
        if not known:
            self.storages.append(obj.storage)
            known = [len(self.storages) - 1]
        kind = getattr(sys.modules["torch"], _STORAGES[obj.storage.dtype])
        return ("storage", kind, str(known[0]), "cpu", obj.storage.size)


def save(path: Path, content: Any) -> None:
    """Writes `content`, in which `FakeTensor`s stand for tensors, as `torch.save` would."""
    torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")

    def _rebuild_tensor_v2(*_: Any) -> None: ...

    _rebuild_tensor_v2.__module__, _rebuild_tensor_v2.__qualname__ = "torch._utils", "_rebuild_tensor_v2"
    utils._rebuild_tensor_v2 = _rebuild_tensor_v2
    for name in _STORAGES.values():
        setattr(torch, name, type(name, (), {"__module__": "torch"}))
    stream = io.BytesIO()
    pickler = _Pickler(stream)
    before = {name: sys.modules.get(name) for name in ("torch", "torch._utils")}
    sys.modules |= {"torch": torch, "torch._utils": utils}
    try:
        pickler.dump(content)
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{path.stem}/data.pkl", stream.getvalue())
        archive.writestr(f"{path.stem}/byteorder", b"little")
        for key, storage in enumerate(pickler.storages):
            archive.writestr(f"{path.stem}/data/{key}", storage.tobytes())
        archive.writestr(f"{path.stem}/version", b"3\n")


def save_tensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes a state dict of contiguous tensors."""
    save(path, collections.OrderedDict((name, FakeTensor.of(array)) for name, array in tensors.items()))
