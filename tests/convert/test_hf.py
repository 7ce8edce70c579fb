import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from opening import open_published
from torch_writer import save_tensors

from deqa_jax.config import PRESETS, to_published
from deqa_jax.convert.hf import open_file, open_weights, side_files, write_published
from deqa_jax.convert.tensors import ConversionError, Tensor

ARRAYS = {
    "a": np.arange(6, dtype=np.float16).reshape(2, 3),
    "b": np.array([1, -2], ml_dtypes.bfloat16),
    "c": np.array([3], np.float32),
    "d": np.zeros((0, 2), np.float32),
}


def _save(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    if path.suffix == ".bin":
        save_tensors(path, arrays)
    else:
        safetensors.numpy.save_file(dict(arrays), path)


def _index(folder: Path, weight_map: Any, kind: str = "safetensors") -> None:
    name = {"safetensors": "model", "bin": "pytorch_model"}[kind]
    (folder / f"{name}.{kind}.index.json").write_text(json.dumps({"weight_map": weight_map}))


def _shards(folder: Path, kind: str, shards: Iterable[Iterable[str]] = ("ab", "cd")) -> dict[str, str]:
    """Writes two shards of `ARRAYS` without an index, which it returns."""
    name = {"safetensors": "model", "bin": "pytorch_model"}[kind]
    weight_map: dict[str, str] = {}
    for number, keys in enumerate(shards, start=1):
        file = f"{name}-{number:05}-of-00002.{kind}"
        _save(folder / file, {key: ARRAYS[key] for key in keys})
        weight_map |= dict.fromkeys(keys, file)
    return weight_map


def _problems(folder: Path) -> tuple[str, ...]:
    with pytest.raises(ConversionError) as caught:
        open_weights(folder)
    return caught.value.problems


def _assert_same(tensors: Mapping[str, Tensor], arrays: Mapping[str, np.ndarray]) -> None:
    assert tensors.keys() == arrays.keys()
    for key, array in arrays.items():
        read = tensors[key].read()
        assert (tensors[key].shape, tensors[key].dtype) == (read.shape, read.dtype) == (array.shape, array.dtype)
        assert tensors[key].num_bytes == array.nbytes
        assert read.tobytes() == array.tobytes()


# ---- weights, as they come --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("form", ["single", "indexed", "unindexed"])
def test_every_published_form_gives_the_same_tensors(tmp_path: Path, kind: str, form: str) -> None:
    if form == "single":
        _save(tmp_path / {"safetensors": "model.safetensors", "bin": "pytorch_model.bin"}[kind], ARRAYS)
    else:
        weight_map = _shards(tmp_path, kind)
        if form == "indexed":
            _index(tmp_path, weight_map, kind)
    tensors, files = open_weights(tmp_path)
    _assert_same(tensors, ARRAYS)
    assert set(files) == {path for path in tmp_path.iterdir() if path.suffix != ".json"}


def test_shards_of_an_index_may_have_any_name(tmp_path: Path) -> None:
    _save(tmp_path / "first.safetensors", {"a": ARRAYS["a"]})
    _save(tmp_path / "second.safetensors", {"b": ARRAYS["b"]})
    _index(tmp_path, {"a": "first.safetensors", "b": "second.safetensors"})
    _assert_same(open_weights(tmp_path)[0], {key: ARRAYS[key] for key in "ab"})


def test_index_wins_over_a_single_file_and_safetensors_over_bin(tmp_path: Path) -> None:
    _save(tmp_path / "pytorch_model.bin", {"bin": ARRAYS["a"]})
    assert open_weights(tmp_path)[0].keys() == {"bin"}
    _save(tmp_path / "model.safetensors", {"single": ARRAYS["a"]})
    assert open_weights(tmp_path)[0].keys() == {"single"}
    _index(tmp_path, _shards(tmp_path, "safetensors"))
    assert open_weights(tmp_path)[0].keys() == ARRAYS.keys()


@pytest.mark.parametrize(
    "dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64, np.int64, np.uint8, np.bool_]
)
def test_safetensors_dtypes_are_read_as_they_are(tmp_path: Path, dtype: Any) -> None:
    array = np.array([[0, 1, 1]]).astype(dtype)
    _save(tmp_path / "model.safetensors", {"w": array})
    _assert_same(open_weights(tmp_path)[0], {"w": array})


# ---- weights that are wrong -------------------------------------------------------------------------------


def test_folder_without_weights_is_named(tmp_path: Path) -> None:
    (problem,) = _problems(tmp_path)
    assert str(tmp_path) in problem
    assert "no weights" in problem


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_every_absent_shard_of_an_index_is_named(tmp_path: Path, kind: str) -> None:
    weight_map = _shards(tmp_path, kind)
    absent = [f"absent-{i}.{kind}" for i in range(2)]
    _index(tmp_path, weight_map | dict(zip(("x", "y"), absent, strict=True)), kind)
    problems = _problems(tmp_path)
    assert len(problems) == 2
    assert all(f"names {name}, which is not there" in problem for name, problem in zip(absent, problems, strict=True))


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_index_and_shards_that_disagree_are_named_key_by_key(tmp_path: Path, kind: str) -> None:
    weight_map = _shards(tmp_path, kind)
    first, second = weight_map["a"], weight_map["c"]
    promised = weight_map | {"x": first, "y": second}
    del promised["b"]
    _index(tmp_path, promised, kind)
    assert set(_problems(tmp_path)) == {
        f"{first}: x is missing, though the index promises it",
        f"{second}: y is missing, though the index promises it",
        f"{first}: b is not in the index",
    }


def test_key_in_another_shard_than_the_index_says_is_named(tmp_path: Path) -> None:
    weight_map = _shards(tmp_path, "bin")
    _index(tmp_path, weight_map | {"a": weight_map["c"]}, "bin")
    assert {problem.partition(",")[0] for problem in _problems(tmp_path)} == {
        f"{weight_map['a']}: a is not in the index",
        f"{weight_map['c']}: a is missing",
    }


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_duplicate_keys_of_shards_without_index_are_named(tmp_path: Path, kind: str) -> None:
    _shards(tmp_path, kind, ["abc", "bcd"])
    problems = _problems(tmp_path)
    assert {re.sub(r"^.*: (\w) is in another file too$", r"\1", problem) for problem in problems} == {"b", "c"}
    assert all(f"-00002-of-00002.{kind}" in problem for problem in problems)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("indexed", [True, False])
def test_every_truncated_shard_is_named(tmp_path: Path, kind: str, indexed: bool) -> None:
    weight_map = _shards(tmp_path, kind)
    if indexed:
        _index(tmp_path, weight_map, kind)
    files = sorted(set(weight_map.values()))
    for name in files:
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-1])
    problems = _problems(tmp_path)
    assert len(problems) == 2
    assert all(problem.startswith(f"{name}: truncated") for name, problem in zip(files, problems, strict=True))


def test_safetensors_cut_at_any_byte_is_called_damaged(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    _save(path, ARRAYS)
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(ConversionError, match=r"^model\.safetensors: "):
            open_file(path)


@given(st.data())
@settings(deadline=None, max_examples=300)
def test_any_changed_byte_of_safetensors_gives_tensors_or_an_error(
    tmp_path_factory: pytest.TempPathFactory, data: Any
) -> None:
    path = tmp_path_factory.mktemp("changed") / "model.safetensors"
    _save(path, {"w": ARRAYS["a"]})
    content = bytearray(path.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1), "position")] ^= data.draw(st.integers(1, 255), "change")
    path.write_bytes(content)
    try:
        tensors = open_file(path)
    except ConversionError:
        return
    for tensor in tensors.values():
        assert tensor.read().shape == tensor.shape


def test_dtypes_that_are_not_known_are_named(tmp_path: Path) -> None:
    header = {key: {"dtype": "F8_E4M3", "shape": [1], "data_offsets": [i, i + 1]} for i, key in enumerate("vw")}
    encoded = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(len(encoded).to_bytes(8, "little") + encoded + b"\0\0")
    assert _problems(tmp_path) == ("model.safetensors: v: dtype F8_E4M3", "model.safetensors: w: dtype F8_E4M3")


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"weight_map": []}',
        '{"weight_map": {"w": 1}}',
        '{"weight_map": {"w": "../model.safetensors"}}',
        '{"weight_map": {"w": "/etc/passwd"}}',
    ],
)
def test_index_that_is_none_is_named(tmp_path: Path, content: str) -> None:
    """Above all one that leads out of the folder."""
    (tmp_path / "model.safetensors.index.json").write_text(content)
    (problem,) = _problems(tmp_path)
    assert "model.safetensors.index.json" in problem


@pytest.mark.parametrize("name", ["", "..", "x" * 300, "a\0b"], ids=["empty", "parent", "too-long", "zero-byte"])
def test_index_of_names_that_no_file_can_have_is_refused(tmp_path: Path, name: str) -> None:
    _index(tmp_path, {"w": name})
    (problem,) = _problems(tmp_path)
    assert problem.startswith("model.safetensors.index.json: ")


# ---- the whole folder -------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, side_files: dict[str, bytes]) -> Path:
    """A published folder, whose weights nobody counts here."""
    (tmp_path / "config.json").write_text(json.dumps(to_published(PRESETS["test"])))
    for name, content in side_files.items():
        (tmp_path / name).write_bytes(content)
    _save(tmp_path / "model.safetensors", ARRAYS)
    return tmp_path


def _folder_problems(folder: Path) -> str:
    with pytest.raises(ConversionError) as caught:
        open_published(folder)
    return "\n".join(caught.value.problems)


def test_folder_is_opened(folder: Path) -> None:
    published = open_published(folder)
    assert published.config == PRESETS["test"]
    assert published.published_config == json.loads((folder / "config.json").read_text())
    assert published.weight_files == (folder / "model.safetensors",)
    _assert_same(published.tensors, ARRAYS)


_REQUIRED = {
    "config.json": "config.json",
    "tokenizer.model": "tokenizer.model",
    "preprocessor_config.json": "preprocessor_config.json",
    "model.safetensors": "no weights",
}


@pytest.mark.parametrize("name", _REQUIRED)
def test_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    assert _REQUIRED[name] in _folder_problems(folder)


def test_all_missing_files_are_named(folder: Path) -> None:
    for name in _REQUIRED:
        (folder / name).unlink()
    problems = _folder_problems(folder)
    assert [name for name, words in _REQUIRED.items() if words not in problems] == []


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"null"])
def test_file_that_is_no_json_object_is_named(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    assert name in _folder_problems(folder)


def test_configuration_of_another_model_is_named_entry_by_entry(folder: Path) -> None:
    config = to_published(PRESETS["test"]) | {"model_type": "llava", "rope_scaling": {"type": "linear", "factor": 2}}
    del config["rms_norm_eps"]
    (folder / "config.json").write_text(json.dumps(config))
    problems = _folder_problems(folder)
    assert all(entry in problems for entry in ("model_type", "rope_scaling", "rms_norm_eps"))


def test_configuration_that_contradicts_itself_is_named(folder: Path) -> None:
    config = to_published(PRESETS["test"])
    config["visual_config"]["visual_abstractor"]["grid_size"] = 16
    (folder / "config.json").write_text(json.dumps(config))
    assert "grid_size" in _folder_problems(folder)


def test_preprocessing_of_another_model_is_named(folder: Path) -> None:
    preprocessor = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor | {"do_normalize": False}))
    assert "do_normalize" in _folder_problems(folder)


def test_only_side_files_that_are_there_are_listed(folder: Path) -> None:
    (folder / "special_tokens_map.json").write_text("{}")
    (folder / "notes.txt").write_text("")
    assert {path.name for path in side_files(folder)} == {
        "tokenizer.model",
        "preprocessor_config.json",
        "special_tokens_map.json",
    }


# ---- writing ----------------------------------------------------------------------------------------------

_ARRAYS = st.dictionaries(
    st.text("abc.", min_size=1, max_size=6),
    st.sampled_from([np.float16, np.float32, np.int64, ml_dtypes.bfloat16]).flatmap(
        lambda dtype: hnp.arrays(
            np.float32, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4), elements=st.integers(-9, 9)
        ).map(lambda array: array.astype(dtype))
    ),
    min_size=1,
    max_size=6,
)


@given(arrays=_ARRAYS, transposed=st.booleans(), shard_bytes=st.integers(1, 400))
@settings(deadline=None)
def test_what_is_written_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, arrays: dict[str, np.ndarray], transposed: bool, shard_bytes: int
) -> None:
    """By our reader and by the safetensors library."""
    folder = tmp_path_factory.mktemp("written")
    arrays = {key: array.T if transposed else array for key, array in arrays.items()}
    tensors = {key: Tensor(array.shape, array.dtype, lambda array=array: array) for key, array in arrays.items()}
    done: list[int] = []
    write_published(folder, tensors.items(), config={"x": 1}, shard_bytes=shard_bytes, progress=done.append)

    opened, files = open_weights(folder)
    _assert_same(opened, arrays)
    assert sum(done) == sum(array.nbytes for array in arrays.values())
    assert json.loads((folder / "config.json").read_text()) == {"x": 1}
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(done)
    assert list(index["weight_map"]) == list(arrays)
    for number, path in enumerate(files, start=1):
        assert path.name == f"model-{number:05}-of-{len(files):05}.safetensors"
        content = safetensors.numpy.load_file(path)
        assert content.keys() == {key for key, file in index["weight_map"].items() if file == path.name}
        for key, array in content.items():
            np.testing.assert_array_equal(array, arrays[key])
        assert len(content) == 1 or sum(array.nbytes for array in content.values()) <= shard_bytes
        header_length = int.from_bytes(path.read_bytes()[:8], "little")
        assert header_length % 8 == 0


def test_shards_are_filled_before_another_is_begun(tmp_path: Path) -> None:
    arrays = {str(i): np.full(10, i, np.float32) for i in range(5)}
    tensors = {key: Tensor(array.shape, array.dtype, lambda array=array: array) for key, array in arrays.items()}
    write_published(tmp_path, tensors.items(), config={}, shard_bytes=80)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert [file[6:11] for file in index.values()] == ["00001", "00001", "00002", "00002", "00003"]
