"""Tensors in PyTorch's format, written without PyTorch: what reads them finds what was written."""

import functools
import os
import subprocess
import sys
import tracemalloc
import zipfile
from collections.abc import Mapping
from pathlib import Path

import hypothesis.extra.numpy as hnp
import ml_dtypes
import numpy as np
import pytest
import torch_writer
from hypothesis import given, settings
from hypothesis import strategies as st

from deqa_jax.convert.tensors import Tensor
from deqa_jax.convert.torch_file import open_torch_file
from deqa_jax.convert.torch_save import save_tensors

DTYPES = [np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)]
SHAPES = [(), (1,), (5,), (0,), (2, 3), (3, 0, 2), (1, 1, 1), (2, 3, 4, 5), (0, 0)]


def wrap(arrays: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    return {
        name: Tensor(array.shape, array.dtype, functools.partial(np.asarray, array)) for name, array in arrays.items()
    }


def values(shape: tuple[int, ...], dtype: np.dtype, seed: int = 0) -> np.ndarray:
    return np.asarray(np.random.default_rng(seed).standard_normal(shape)).astype(dtype)


def check(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    found = open_torch_file(path)
    assert list(found) == list(arrays)
    for name, array in arrays.items():
        assert (found[name].shape, found[name].dtype) == (array.shape, array.dtype)
        # Bits, since comparing numbers takes a NaN for different and −0 for 0.
        assert np.ascontiguousarray(found[name].read()).tobytes() == array.tobytes()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_is_written_is_read_back(tmp_path: Path, shape: tuple[int, ...], dtype: np.dtype) -> None:
    arrays = {"before": values((2,), dtype, 1), "model.weight": values(shape, dtype), "after": values((3,), dtype, 2)}
    save_tensors(tmp_path / "tensors.bin", wrap(arrays))
    check(tmp_path / "tensors.bin", arrays)


@settings(deadline=None, max_examples=50)
@given(
    st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
        st.sampled_from(DTYPES[:2]).flatmap(lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, min_side=0))),
        max_size=5,
    )
)
def test_any_names_and_values_are_read_back(tmp_path_factory: pytest.TempPathFactory, arrays: dict) -> None:
    path = tmp_path_factory.mktemp("tensors") / "tensors.bin"
    save_tensors(path, wrap(arrays))
    check(path, arrays)


def test_many_tensors_of_several_dtypes(tmp_path: Path) -> None:
    """More than the numbers and the memo of small pickles hold."""
    arrays = {f"layers.{i}.weight": values((i % 7, i % 3 + 1), DTYPES[i % 3], i) for i in range(1500)}
    save_tensors(tmp_path / "many.bin", wrap(arrays))
    check(tmp_path / "many.bin", arrays)


def test_no_tensors_make_a_file_without_any(tmp_path: Path) -> None:
    save_tensors(tmp_path / "none.bin", {})
    assert open_torch_file(tmp_path / "none.bin") == {}


def test_values_in_another_order_in_memory_are_written_by_rows(tmp_path: Path) -> None:
    array = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    for name, view in {"t": array.T, "s": array[:, ::-1, 1:3], "b": np.broadcast_to(np.float32(3), (2, 2))}.items():
        save_tensors(tmp_path / f"{name}.bin", wrap({name: view}))
        np.testing.assert_array_equal(open_torch_file(tmp_path / f"{name}.bin")[name].read(), view)


def test_the_file_is_like_one_of_torch_save(tmp_path: Path) -> None:
    """The same entries, uncompressed, under the file's name, and the same storages."""
    arrays = {"a": values((2, 3), DTYPES[0]), "b": values((4,), DTYPES[1])}
    (tmp_path / "theirs").mkdir()
    save_tensors(tmp_path / "model.bin", wrap(arrays))
    torch_writer.save_tensors(tmp_path / "theirs" / "model.bin", arrays)
    with zipfile.ZipFile(tmp_path / "model.bin") as ours, zipfile.ZipFile(tmp_path / "theirs" / "model.bin") as theirs:
        assert sorted(ours.namelist()) == sorted(theirs.namelist())
        for name in ours.namelist():
            assert ours.getinfo(name).compress_type == zipfile.ZIP_STORED
            if not name.endswith("data.pkl"):
                assert ours.read(name) == theirs.read(name)


def test_one_tensor_at_a_time_is_in_memory(tmp_path: Path) -> None:
    size = 1 << 20
    tensors = {
        str(i): Tensor((size,), np.dtype(np.float32), lambda i=i: np.full(size, i, np.float32)) for i in range(12)
    }
    tracemalloc.start()
    save_tensors(tmp_path / "large.bin", tensors)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12 * 4 * size / 3
    assert open_torch_file(tmp_path / "large.bin")["7"].read()[0] == 7


CHECK_IN_TORCH = """
import sys
import numpy as np
import torch

for weights_only in (True, False):
    state = torch.load(sys.argv[1], map_location="cpu", weights_only=weights_only)
    expected = np.load(sys.argv[2])
    assert list(state) == list(expected), list(state)
    for name, tensor in state.items():
        kind, bits = name.split("|")[0], expected[name]
        assert tensor.dtype == getattr(torch, kind), (name, tensor.dtype)
        assert tuple(tensor.shape) == bits.shape, (name, tensor.shape)
        assert tensor.is_contiguous() and not tensor.requires_grad
        whole = torch.int32 if kind == "float32" else torch.int16
        assert (tensor.reshape(-1).view(whole).numpy() == bits.reshape(-1)).all(), name
        tensor.add_(1)  # its memory is its own
print("equal")
"""


def test_torch_itself_reads_it(tmp_path: Path) -> None:
    """In a process of its own: of this Python, or of the one that `DEQA_TORCH` names."""
    python = os.environ.get("DEQA_TORCH", sys.executable)
    if subprocess.run([python, "-c", "import torch"], capture_output=True, check=False).returncode:
        pytest.skip("needs PyTorch, which the project does without")
    arrays = {
        f"{dtype}|{shape}": values(shape, dtype, i) for i, dtype in enumerate(DTYPES) for shape in [*SHAPES, (70, 300)]
    }
    save_tensors(tmp_path / "tensors.bin", wrap(arrays))
    bits = {name: array.view(np.int32 if array.itemsize == 4 else np.int16) for name, array in arrays.items()}
    np.savez(tmp_path / "expected.npz", **bits)
    code = [python, "-c", CHECK_IN_TORCH, str(tmp_path / "tensors.bin"), str(tmp_path / "expected.npz")]
    done = subprocess.run(code, capture_output=True, text=True, check=False)
    assert done.stdout == "equal\n", done.stderr
