import collections
import contextlib
import functools
import io
import os
import pickle
import struct
import subprocess
import sys
import tempfile
import tracemalloc
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recipe import assert_same_as_golden, recipe_tensors
from torch_writer import FakeTensor, save, save_tensors

from deqa_jax.config import PRESETS
from deqa_jax.convert import torch_file
from deqa_jax.convert.tensors import ConversionError
from deqa_jax.convert.torch_file import open_torch_file

_FLOATS = np.arange(6, dtype=np.float32)


# ---- pickles by hand --------------------------------------------------------------------------------------


def _text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def _number(value: int) -> bytes:
    encoded = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(encoded)]) + encoded


def _tuple(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def _numbers(*values: int) -> bytes:
    return _tuple(*map(_number, values))


def _name(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def _storage(kind: str = "FloatStorage", key: str = "0", numel: int = 6) -> bytes:
    return _tuple(_text("storage"), _name("torch", kind), _text(key), _text("cpu"), _number(numel)) + b"Q"


def _tensor(
    storage: bytes | None = None,
    offset: bytes = _number(0),
    shape: bytes = _numbers(2, 3),
    strides: bytes = _numbers(3, 1),
) -> bytes:
    """A call of `_rebuild_tensor_v2`, by default of the whole of `_FLOATS`."""
    hooks = _name("collections", "OrderedDict") + b")R"
    arguments = _tuple(_storage() if storage is None else storage, offset, shape, strides, b"\x89", hooks)
    return _name("torch._utils", "_rebuild_tensor_v2") + arguments + b"R"


def _dict(**values: bytes) -> bytes:
    return b"}" + b"".join(_text(key) + value + b"s" for key, value in values.items())


def _pickle(value: bytes) -> bytes:
    return b"\x80\x02" + value + b"."


def _write(path: Path, pickled: bytes, storages: Mapping[str, bytes] | None = None, **more: bytes) -> Path:
    storages = {"0": _FLOATS.tobytes()} if storages is None else storages
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        for name, content in ({f"data/{key}": content for key, content in storages.items()} | more).items():
            archive.writestr(f"archive/{name}", content)
    return path


def _problems(path: Path) -> tuple[str, ...]:
    with pytest.raises(ConversionError) as caught:
        open_torch_file(path)
    assert all(problem.startswith(f"{path.name}: ") for problem in caught.value.problems)
    return caught.value.problems


# ---- what is read -----------------------------------------------------------------------------------------

_DTYPES = [np.dtype(kind) for kind in (np.float16, ml_dtypes.bfloat16, np.float32, np.int64)]


@st.composite
def _contents(draw: st.DrawFn) -> dict[str, FakeTensor]:
    """A few storages of random bytes, and windows on them that may overlap, repeat and leave gaps."""
    tensors: dict[str, FakeTensor] = {}
    for number in range(draw(st.integers(0, 3))):
        dtype = draw(st.sampled_from(_DTYPES))
        windows = []
        for _ in range(draw(st.integers(1, 3))):
            shape = draw(st.lists(st.integers(0, 4), max_size=4).map(tuple))
            strides = tuple(draw(st.integers(0, 9)) for _ in shape)
            windows.append((draw(st.integers(0, 7)), shape, strides))
        ends = [
            1 + offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
            for offset, shape, strides in windows
            if 0 not in shape
        ]
        size = max(ends, default=0) + draw(st.integers(0, 2))
        bits = np.random.default_rng(draw(st.integers(0, 99))).bytes(size * dtype.itemsize)
        storage = np.frombuffer(bits, dtype)
        for offset, shape, strides in windows:
            tensors[f"{number}.{len(tensors)}"] = FakeTensor(storage, shape, strides, offset)
    return tensors


def _window(tensor: FakeTensor) -> np.ndarray:
    offset, shape, strides = tensor.view
    array = np.empty(shape, tensor.storage.dtype)
    for index in np.ndindex(shape):
        array[index] = tensor.storage[offset + sum(i * s for i, s in zip(index, strides, strict=True))]
    return array


@given(_contents())
@settings(deadline=None)
def test_every_window_on_a_storage_is_read_exactly(tmp_path_factory: pytest.TempPathFactory, content: Any) -> None:
    path = tmp_path_factory.mktemp("windows") / "pytorch_model.bin"
    save(path, content)
    opened = open_torch_file(path)
    assert opened.keys() == content.keys()
    for name, tensor in opened.items():
        expected, read = _window(content[name]), tensor.read()
        assert (tensor.shape, tensor.dtype) == (read.shape, read.dtype) == (expected.shape, expected.dtype)
        assert read.tobytes() == expected.tobytes()
        assert tensor.num_bytes == expected.nbytes


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("HalfStorage", np.float16),
        ("BFloat16Storage", ml_dtypes.bfloat16),
        ("FloatStorage", np.float32),
        ("DoubleStorage", np.float64),
        ("LongStorage", np.int64),
        ("IntStorage", np.int32),
        ("ShortStorage", np.int16),
        ("CharStorage", np.int8),
        ("ByteStorage", np.uint8),
        ("BoolStorage", np.bool_),
    ],
)
def test_every_storage_has_its_dtype(tmp_path: Path, kind: str, dtype: Any) -> None:
    values = np.array([[0, 1, 1], [1, 0, 1]]).astype(dtype)
    pickled = _pickle(_dict(w=_tensor(_storage(kind))))
    tensor = open_torch_file(_write(tmp_path / "a.bin", pickled, {"0": values.tobytes()}))["w"]
    assert tensor.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(tensor.read(), values)


def test_parameters_and_metadata_of_a_state_dict_are_understood(tmp_path: Path) -> None:
    hooks = _name("collections", "OrderedDict") + b")R"
    parameter = _name("torch._utils", "_rebuild_parameter") + _tuple(_tensor(), b"\x88", hooks) + b"R"
    metadata = _dict(_metadata=_name("collections", "OrderedDict") + b")R") + b"b"
    state = _name("collections", "OrderedDict") + b")R" + _text("w") + parameter + b"s" + metadata
    tensors = open_torch_file(_write(tmp_path / "a.bin", _pickle(state)))
    np.testing.assert_array_equal(tensors["w"].read(), _FLOATS.reshape(2, 3))


def test_shards_that_torch_wrote_hold_the_recipe(shared: Path) -> None:
    shards = sorted((shared / "tiny" / "checkpoint").glob("*.bin"))
    tensors = {key: tensor.read() for path in shards for key, tensor in open_torch_file(path).items()}
    written = {key: array for key, array in tensors.items() if not key.endswith("inv_freq")}
    assert_same_as_golden(recipe_tensors(PRESETS["test"]), written)


def test_opening_reads_no_storage(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    save_tensors(path, {"w": np.zeros((1 << 22,), np.float32)})
    tracemalloc.start()
    try:
        open_torch_file(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_values_cannot_be_written_to(tmp_path: Path) -> None:
    tensor = open_torch_file(_write(tmp_path / "a.bin", _pickle(_dict(w=_tensor()))))["w"]
    with pytest.raises(ValueError, match="read-only"):
        tensor.read()[0] = 1


# ---- damage -----------------------------------------------------------------------------------------------


@functools.cache
def _valid() -> bytes:
    """A small file as torch.save writes it: a matrix, a number, an empty tensor."""
    tensors = {
        "w": FakeTensor.of(_FLOATS.reshape(2, 3)),
        "n": FakeTensor(np.array([3], np.float16), (), ()),
        "e": FakeTensor.of(np.zeros((0, 3), np.float32)),
    }
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder) / "a.bin", tensors)
        return (Path(folder) / "a.bin").read_bytes()


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file to write over and over."""
    return tmp_path_factory.mktemp("scratch") / "a.bin"


@contextlib.contextmanager
def _bounded_memory() -> Iterator[None]:
    """Turns what would exhaust the machine's memory into a MemoryError, where the system can."""
    size = Path("/proc/self/statm")
    if not size.exists():
        yield
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(size.read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 28), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _tensors_or_error(path: Path) -> None:
    with contextlib.suppress(ConversionError), _bounded_memory():
        modules = set(sys.modules)
        try:
            for name, tensor in open_torch_file(path).items():
                assert isinstance(name, str)
                assert tensor.read().shape == tensor.shape
        finally:
            assert not [name for name in set(sys.modules) - modules if not name.startswith("encodings.")]


def test_file_cut_at_any_byte_is_called_damaged(scratch: Path) -> None:
    for length in range(len(_valid())):
        scratch.write_bytes(_valid()[:length])
        assert _problems(scratch)


def test_cut_file_is_called_truncated(scratch: Path) -> None:
    scratch.write_bytes(_valid()[: len(_valid()) // 2])
    assert "truncated" in _problems(scratch)[0]


@given(st.data())
@settings(deadline=None, max_examples=400)
def test_any_changed_byte_of_the_pickle_gives_tensors_or_an_error(scratch: Path, data: Any) -> None:
    """The zip's checksums are made right again, so the unpickler sees the change."""
    with zipfile.ZipFile(io.BytesIO(_valid())) as archive:
        parts = {info.filename: bytearray(archive.read(info)) for info in archive.infolist()}
    pickled = parts["a/data.pkl"]
    pickled[data.draw(st.integers(0, len(pickled) - 1), "position")] ^= data.draw(st.integers(1, 255), "change")
    with zipfile.ZipFile(scratch, "w") as archive:
        for name, content in parts.items():
            archive.writestr(name, bytes(content))
    _tensors_or_error(scratch)


@given(st.data())
@settings(deadline=None, max_examples=400)
def test_any_changed_byte_of_the_file_gives_tensors_or_an_error(scratch: Path, data: Any) -> None:
    changed = bytearray(_valid())
    changed[data.draw(st.integers(0, len(_valid()) - 1), "position")] ^= data.draw(st.integers(1, 255), "change")
    scratch.write_bytes(changed)
    _tensors_or_error(scratch)


def test_small_pickle_cannot_ask_for_much_memory(tmp_path: Path) -> None:
    """The unpickler's memo is an array: a number far beyond the pickle's length would make gigabytes of it."""
    path = _write(tmp_path / "a.bin", b"\x80\x02}r" + struct.pack("<I", 1 << 21) + b".")
    tracemalloc.start()
    try:
        with contextlib.suppress(ConversionError):
            open_torch_file(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ["byteorder", "data.pkl"])
@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2])
def test_small_entry_cannot_ask_for_much_memory(tmp_path: Path, name: str, method: int) -> None:
    path = tmp_path / "a.bin"
    with zipfile.ZipFile(path, "w") as archive:
        for entry, content in (("data.pkl", _pickle(_dict())), ("byteorder", b"little")):
            if entry == name:
                archive.writestr(f"archive/{entry}", bytes(16 << 20), method)
            else:
                archive.writestr(f"archive/{entry}", content)
    tracemalloc.start()
    try:
        assert _problems(path) == (f"a.bin: damaged zip entry (archive/{name} is compressed)",)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ["byteorder", "data.pkl"])
def test_large_entry_is_not_read(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_file, "_MAX_ENTRY_BYTES", 99)
    path = _write(tmp_path / "a.bin", bytes(100) if name == "data.pkl" else _pickle(_dict()), byteorder=bytes(100))
    assert _problems(path)[0].endswith("is larger than any description of tensors)")


def test_empty_file_is_called_empty(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"")
    assert _problems(tmp_path / "a.bin") == ("a.bin: empty file",)


def test_old_format_is_named_with_the_way_out(tmp_path: Path) -> None:
    magic = 0x1950A86A20F9469CFC6C
    parts = (magic, 1001, {"little_endian": True}, collections.OrderedDict())
    (tmp_path / "a.bin").write_bytes(b"".join(pickle.dumps(part, protocol=2) for part in parts))
    (problem,) = _problems(tmp_path / "a.bin")
    assert "old format" in problem
    assert "torch.save" in problem


def test_other_files_are_not_called_pytorch(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"<html>404</html>")
    assert _problems(tmp_path / "a.bin") == ("a.bin: not a PyTorch file",)
    with zipfile.ZipFile(tmp_path / "b.bin", "w") as archive:
        archive.writestr("notes.txt", b"hello")
    assert "no data.pkl" in _problems(tmp_path / "b.bin")[0]


def test_big_endian_file_is_refused(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.bin", _pickle(_dict(w=_tensor())), byteorder=b"big")
    assert "little-endian" in _problems(path)[0]


def test_compressed_storage_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", _pickle(_dict(w=_tensor())))
        archive.writestr("archive/data/0", _FLOATS.tobytes(), zipfile.ZIP_DEFLATED)
    assert _problems(path) == ("a.bin: w: its storage is compressed",)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (_tensor(_storage(key="7")), "storage 7 is missing"),
        (_tensor(_storage(key="../data.pkl")), "is missing"),
        (_tensor(_storage(numel=7)), "its storage has 24 bytes, not 7 x float32"),
        (_tensor(_storage("DoubleStorage")), "its storage has 24 bytes, not 6 x float64"),
        (_tensor(shape=_numbers(2, 4)), "shape [2, 4] does not fit its storage of 6"),
        (_tensor(offset=_number(1)), "shape [2, 3] does not fit its storage of 6"),
        (_tensor(strides=_numbers(4, 1)), "shape [2, 3] does not fit its storage of 6"),
        (_tensor(strides=_numbers(1)), "shape [2, 3] does not fit its storage of 6"),
        (_number(3), "is no tensor"),
        (_dict(inner=_tensor()), "is no tensor"),
    ],
    ids=[
        "no-storage",
        "storage-elsewhere",
        "storage-too-short",
        "storage-of-another-dtype",
        "shape",
        "offset",
        "strides",
        "too-few-strides",
        "number",
        "dict",
    ],
)
def test_tensor_that_does_not_fit_is_named(tmp_path: Path, value: bytes, words: str) -> None:
    """The tensor beside it is whole, and not complained of."""
    (problem,) = _problems(_write(tmp_path / "a.bin", _pickle(_dict(good=_tensor(), bad=value))))
    assert "bad" in problem
    assert words in problem


def test_all_bad_tensors_are_listed(tmp_path: Path) -> None:
    pickled = _pickle(_dict(a=_tensor(_storage(key="7")), b=_number(3), c=_tensor(), d=_tensor(offset=_number(9))))
    problems = _problems(_write(tmp_path / "a.bin", pickled))
    assert {problem.split(": ")[1].split()[0].strip("'") for problem in problems} == {"a", "b", "d"}


@pytest.mark.parametrize(
    "value",
    [
        _tensor(offset=_number(-1)),
        _tensor(strides=_numbers(-3, 1)),
        _tensor(shape=_numbers(-2, 3)),
        _tensor(shape=_number(6)),
        _tensor(shape=_tuple(_text("6"))),
        _tensor(storage=_text("storage")),
        _tensor(storage=_tuple(_text("module"), b"N", _text("0"), _text("cpu"), _number(6)) + b"Q"),
        _tensor(storage=_storage(numel=-6)),
    ],
    ids=[
        "negative-offset",
        "negative-stride",
        "negative-shape",
        "shape-of-number",
        "shape-of-text",
        "storage-of-text",
        "storage-of-none",
        "negative-storage",
    ],
)
def test_tensor_of_nonsense_is_called_damage(tmp_path: Path, value: bytes) -> None:
    assert "its pickle is damaged" in _problems(_write(tmp_path / "a.bin", _pickle(_dict(w=value))))[0]


@pytest.mark.parametrize(
    "value",
    [
        _tensor(shape=_numbers(0, 1 << 64)),
        _tensor(shape=_numbers(1), strides=_numbers(1 << 64)),
        _tensor(shape=_numbers(*[1] * 65), strides=_numbers(*[1] * 65)),
    ],
    ids=["empty-but-wide", "wide-step", "65-axes"],
)
def test_sizes_that_no_array_can_have_are_refused(tmp_path: Path, value: bytes) -> None:
    _problems(_write(tmp_path / "a.bin", _pickle(_dict(w=value))))


@pytest.mark.parametrize("content", [b"]", b"N", _tensor(), _number(1)], ids=["list", "none", "tensor", "number"])
def test_pickle_of_anything_but_a_dict_is_refused(tmp_path: Path, content: bytes) -> None:
    assert "not a dict of tensors" in _problems(_write(tmp_path / "a.bin", _pickle(content)))[0]


# ---- hostility --------------------------------------------------------------------------------------------


class _Call:
    """Pickles as a call, so that a careless reader makes it."""

    def __init__(self, function: Any, argument: Any):
        self.call = function, (argument,)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(("function", "name"), [(os.system, f"{os.name}.system"), (eval, "builtins.eval")])
def test_call_of_anything_but_tensors_is_refused(tmp_path: Path, function: Any, name: str, protocol: int) -> None:
    """Protocols up to 3 name functions by GLOBAL, later ones by STACK_GLOBAL."""
    marker = tmp_path / "marker"
    argument = f"touch '{marker}'" if function is os.system else f"open({str(marker)!r}, 'w')"
    pickled = pickle.dumps({"w": _Call(function, argument)}, protocol=protocol, fix_imports=False)
    assert _problems(_write(tmp_path / "a.bin", pickled)) == (
        f"a.bin: its pickle names {name}, which is no tensor; refused",
    )
    assert not marker.exists()


@pytest.mark.parametrize(
    "call",
    [
        b"(" + _text("touch marker") + b"ios\nsystem\n",
        b"(" + _name("os", "system") + _text("touch marker") + b"o",
        _name("os", "system") + _tuple(_text("touch marker")) + b"\x81",
        _name("os", "system") + _tuple(_text("touch marker")) + b"}\x92",
        _name("os", "system") + b")R" + _dict(marker=_text("touch marker")) + b"b",
        _text("os") + _text("system") + b"\x93" + _text("touch marker") + b"\x85R",
    ],
    ids=["INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "BUILD", "STACK_GLOBAL"],
)
def test_every_way_to_call_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: bytes) -> None:
    monkeypatch.chdir(tmp_path)
    path = _write(tmp_path / "a.bin", b"\x80\x04" + _dict(w=call, good=_tensor()) + b".")
    assert _problems(path) == ("a.bin: its pickle names os.system, which is no tensor; refused",)
    assert sorted(tmp_path.iterdir()) == [path]


def test_refused_names_are_neither_imported_nor_looked_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "harmful.py").write_text(f"open({str(tmp_path / 'marker')!r}, 'w')")
    path = _write(tmp_path / "a.bin", _pickle(_dict(w=_name("harmful", "Class"))))
    assert "harmful.Class" in _problems(path)[0]
    assert not (tmp_path / "marker").exists()
    assert "harmful" not in sys.modules


def test_all_refused_names_are_listed(tmp_path: Path) -> None:
    names = [("os", "system"), ("builtins", "getattr"), ("torch.nn", "Linear"), ("torch", "load"), ("numpy", "dtype")]
    values = {f"w{i}": _name(*name) + b")R" for i, name in enumerate(names)}
    problems = _problems(_write(tmp_path / "a.bin", _pickle(_dict(**values))))
    assert [problem.split("names ")[1].split(",")[0] for problem in problems] == [".".join(name) for name in names]


@pytest.mark.parametrize(
    "state",
    [
        _dict(offset=_number(-2)),
        _dict(offset=_number(1 << 40)),
        _dict(strides=_numbers(-1000, -1)),
        _dict(shape=_tuple(_text("a"), _text("b"))),
        _dict(storage=_text("0")),
        _tuple(b"N", _dict(offset=_number(-2))),
        _tuple(_storage(), _number(-2), _numbers(2, 3), _numbers(3, 1)),
    ],
    ids=[
        "negative-offset",
        "large-offset",
        "negative-strides",
        "shape-of-text",
        "storage-of-text",
        "state-of-slots",
        "state-of-a-slotted-dataclass",
    ],
)
def test_tensor_cannot_be_changed_after_it_was_checked(tmp_path: Path, state: bytes) -> None:
    """BUILD writes to an object's attributes; strides below zero would read memory in front of the file's."""
    _problems(_write(tmp_path / "a.bin", _pickle(_dict(w=_tensor() + state + b"b"))))


def test_storage_cannot_be_changed_after_it_was_checked(tmp_path: Path) -> None:
    storage = _storage() + _dict(numel=_number(-6)) + b"b"
    _problems(_write(tmp_path / "a.bin", _pickle(_dict(w=_tensor(storage, shape=_numbers(0), strides=_numbers(1))))))


_CHANGE_DTYPES = """
import sys, pathlib, ml_dtypes, numpy
from deqa_jax.convert.tensors import ConversionError
from deqa_jax.convert.torch_file import open_torch_file
try:
    open_torch_file(pathlib.Path(sys.argv[1]))
except ConversionError:
    pass
for kind in (numpy.float16, ml_dtypes.bfloat16, numpy.float32):
    print(numpy.array([1], kind).tobytes().hex(), numpy.dtype(kind).itemsize)
"""


def test_dtypes_cannot_be_changed(tmp_path: Path) -> None:
    """Names of storages become NumPy's own dtype objects, which the whole program shares: hence another one here."""
    state = _tuple(_number(3), _text(">"), b"N", b"N", b"N", _number(-1), _number(-1), _number(0))
    values = {kind: _name("torch", kind) + state + b"b" for kind in ("FloatStorage", "HalfStorage", "BFloat16Storage")}
    path = _write(tmp_path / "a.bin", _pickle(_dict(**values)))
    reader = subprocess.run([sys.executable, "-c", _CHANGE_DTYPES, path], capture_output=True, text=True)
    assert reader.stdout.splitlines() == ["003c 2", "803f 2", "0000803f 4"], reader.stderr
