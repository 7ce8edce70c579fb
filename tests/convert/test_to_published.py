import contextlib
import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from opening import merge_adapter, open_published
from recipe import assert_same_as_golden, recipe_tensors

from deqa_jax.checkpoint import Checkpoint
from deqa_jax.cli import main
from deqa_jax.config import PRESETS, from_published
from deqa_jax.convert import to_published
from deqa_jax.convert.hf import open_weights
from deqa_jax.convert.names import ROTARY_FREQUENCIES, positions
from deqa_jax.convert.tensors import ConversionError
from deqa_jax.convert.to_jax import convert
from deqa_jax.convert.to_published import export

CONFIG = dataclasses.replace(PRESETS["test"], language=dataclasses.replace(PRESETS["test"].language, vocab_size=96))
TENSORS = recipe_tensors(CONFIG)
QUERY_WEIGHT = "model.layers.{}.self_attn.q_proj.weight"
BUFFERS = sorted(key for key in TENSORS if "pos_embed" in key)

WritePublished = Callable[..., Path]


def _mixed() -> dict[str, np.ndarray]:
    """Three dtypes, two of them in one stacked parameter; buffers in half precision and partly absent."""
    tensors = TENSORS | {
        QUERY_WEIGHT.format(1): TENSORS[QUERY_WEIGHT.format(1)].astype(np.float32) * np.float32(1.1),
        "model.norm.weight": TENSORS["model.norm.weight"].astype(ml_dtypes.bfloat16),
        BUFFERS[0]: TENSORS[BUFFERS[0]].astype(np.float16),
        BUFFERS[1]: TENSORS[BUFFERS[1]].astype(ml_dtypes.bfloat16),
    }
    del tensors[BUFFERS[2]]
    return tensors


SOURCES: dict[str, dict[str, np.ndarray]] = {
    "bfloat16": {key: array.astype(ml_dtypes.bfloat16) for key, array in TENSORS.items()},
    "float32": {
        key: array if key in BUFFERS else array.astype(np.float32) * np.float32(1.1) for key, array in TENSORS.items()
    },
    "mixed": _mixed(),
}


def _read(folder: Path) -> dict[str, np.ndarray]:
    return {key: np.array(tensor.read()) for key, tensor in open_weights(folder)[0].items()}


def _assert_same(left: Mapping[Any, np.ndarray], right: Mapping[Any, np.ndarray]) -> None:
    """Keys, shapes, dtypes and every bit."""
    assert left.keys() == right.keys()
    for key, array in left.items():
        assert (array.shape, array.dtype) == (right[key].shape, right[key].dtype), key
        assert array.tobytes() == right[key].tobytes(), key


def _deqa(*arguments: object) -> int:
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    return caught.value.code


# ---- there and back ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtypes", SOURCES)
def test_export_is_the_source_to_the_last_bit(tmp_path: Path, write_published: WritePublished, dtypes: str) -> None:
    source = write_published(tmp_path / "P", CONFIG, tensors=SOURCES[dtypes])
    convert(str(source), tmp_path / "M")
    export(tmp_path / "M", tmp_path / "H")
    _assert_same(_read(tmp_path / "H"), SOURCES[dtypes])


def test_export_of_wider_parameters_is_the_source_too(tmp_path: Path, published: Path, converted: Path) -> None:
    """The source is float16, what is exported float32."""
    export(converted, tmp_path / "H")
    _assert_same(_read(tmp_path / "H"), _read(published))


def test_golden_shards_return_with_their_buffers(tmp_path: Path, shared: Path) -> None:
    """Rotary frequencies among them, which are computed anew."""
    source = shared / "tiny" / "checkpoint"
    convert(str(source), tmp_path / "M")
    export(tmp_path / "M", tmp_path / "H")
    tensors = _read(source)
    assert ROTARY_FREQUENCIES.format(2) in tensors
    assert_same_as_golden(_read(tmp_path / "H"), tensors)
    assert json.loads((tmp_path / "H" / "config.json").read_text()) == json.loads((source / "config.json").read_text())
    for name in ("tokenizer.model", "preprocessor_config.json", "tokenizer_config.json", "special_tokens_map.json"):
        assert (tmp_path / "H" / name).read_bytes() == (source / name).read_bytes()

    convert(str(tmp_path / "H"), tmp_path / "M2")
    _assert_same(Checkpoint.open(tmp_path / "M2").restore(), Checkpoint.open(tmp_path / "M").restore())


def test_golden_adapter_is_exported_merged(tmp_path: Path, shared: Path) -> None:
    folder, base = shared / "tiny" / "checkpoint-lora", shared / "tiny" / "checkpoint"
    convert(str(folder), tmp_path / "M", base=str(base))
    export(tmp_path / "M", tmp_path / "H")
    merged = merge_adapter(folder, open_published(base)).tensors
    assert merged[QUERY_WEIGHT.format(0)].dtype == np.float32
    assert_same_as_golden(_read(tmp_path / "H"), {key: tensor.read() for key, tensor in merged.items()})


def test_narrower_parameters_survive_the_trip(tmp_path: Path, write_published: WritePublished) -> None:
    """Stored as bfloat16, though some came as float16 and some as float32."""
    tensors = {key: array.astype(np.float32) if "vision_model" in key else array for key, array in TENSORS.items()}
    convert(str(write_published(tmp_path / "P", CONFIG, tensors=tensors)), tmp_path / "M", dtype="bfloat16")
    export(tmp_path / "M", tmp_path / "H")
    exported = _read(tmp_path / "H")
    assert {key: array.shape for key, array in exported.items()} == {key: x.shape for key, x in tensors.items()}
    convert(str(tmp_path / "H"), tmp_path / "M2", dtype="bfloat16")
    _assert_same(Checkpoint.open(tmp_path / "M2").restore(), Checkpoint.open(tmp_path / "M").restore())


# ---- from one model ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(write_published: WritePublished, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small converted model; read only."""
    folder = tmp_path_factory.mktemp("small")
    convert(str(write_published(folder / "P", CONFIG)), folder / "M")
    return folder / "M"


@pytest.fixture
def changeable(model: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(model, tmp_path / "M"))


def _edit_json(path: Path, **entries: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_dtype_that_is_asked_for_is_written(tmp_path: Path, model: Path, dtype: str) -> None:
    assert _deqa("export", model, tmp_path / "H", "--dtype", dtype) == 0
    expected = {key: array.astype(np.dtype(dtype)) for key, array in TENSORS.items()}
    _assert_same(_read(tmp_path / "H"), expected)
    assert json.loads((tmp_path / "H" / "config.json").read_text())["torch_dtype"] == dtype


def test_large_model_is_cut_into_shards(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(to_published, "_SHARD_BYTES", 1 << 18)
    export(model, tmp_path / "H")
    shards = sorted(path.name for path in (tmp_path / "H").glob("*.safetensors"))
    assert len(shards) > 2
    assert shards[0] == f"model-00001-of-{len(shards):05}.safetensors"
    _assert_same(_read(tmp_path / "H"), TENSORS)


def test_model_that_was_never_published_is_exported_with_its_buffers(tmp_path: Path, changeable: Path) -> None:
    """As `deqa init` makes them: no configuration of PyTorch's, no dtypes of a source."""
    _edit_json(changeable / "config.json", published=None)
    (changeable / "provenance.json").write_text('{"source": "random"}')
    export(changeable, tmp_path / "H")
    tensors = _read(tmp_path / "H")
    assert tensors.keys() == TENSORS.keys()
    for template, values in positions(CONFIG).items():
        np.testing.assert_array_equal(tensors[template.format(1)], values)
    written = json.loads((tmp_path / "H" / "config.json").read_text())
    assert from_published(written) == CONFIG
    assert written["torch_dtype"] == "float16"


def test_side_files_travel_along(tmp_path: Path, model: Path, side_files: dict[str, bytes]) -> None:
    assert _deqa("export", model, tmp_path / "new" / "H") == 0
    for name, content in side_files.items():
        assert (tmp_path / "new" / "H" / name).read_bytes() == content
    assert not (tmp_path / "new" / "H" / "provenance.json").exists()


# ---- what cannot be exported ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_destination_that_exists_is_left_alone(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    out = tmp_path / "H"
    kept = out / "kept" if kind == "folder" else out
    kept.parent.mkdir(exist_ok=True)
    kept.write_text("kept")
    assert _deqa("export", model, out) == 2
    assert f"{out} exists already" in capsys.readouterr().err
    assert kept.read_text() == "kept"


def test_folder_that_is_no_converted_checkpoint_is_named(
    tmp_path: Path, published: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _deqa("export", published, tmp_path / "H") == 1
    assert "not a converted checkpoint" in capsys.readouterr().err
    assert _deqa("export", tmp_path / "absent", tmp_path / "H") == 1
    assert f"{tmp_path / 'absent'}: no such folder" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_setting_without_a_place_in_the_published_format_is_named(
    tmp_path: Path, changeable: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written = json.loads((changeable / "config.json").read_text())
    written["model"]["abstractor"]["norm_eps"] = 1e-6
    written["published"] = None
    (changeable / "config.json").write_text(json.dumps(written))
    assert _deqa("export", changeable, tmp_path / "H") == 1
    assert "norm_eps" in capsys.readouterr().err
    assert not (tmp_path / "H").exists()


def test_parameters_that_do_not_fit_are_named(
    tmp_path: Path, changeable: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written = json.loads((changeable / "config.json").read_text())
    written["model"]["language"]["vocab_size"] = 97
    (changeable / "config.json").write_text(json.dumps(written))
    assert _deqa("export", changeable, tmp_path / "H") == 1
    message = capsys.readouterr().err
    assert "language/embedding" in message
    assert "language/head/kernel" in message
    assert list(tmp_path.iterdir()) == [changeable]


def test_values_that_a_dtype_cannot_hold_are_named(
    tmp_path: Path, write_published: WritePublished, capsys: pytest.CaptureFixture[str]
) -> None:
    norm = TENSORS["model.norm.weight"].astype(np.float32)
    norm[3] = 1e5
    convert(str(write_published(tmp_path / "P", CONFIG, tensors=TENSORS | {"model.norm.weight": norm})), tmp_path / "M")
    with pytest.raises(ConversionError, match=r"^model\.norm\.weight: has values that float16 cannot hold$"):
        export(tmp_path / "M", tmp_path / "out" / "H", dtype="float16")
    assert _deqa("export", tmp_path / "M", tmp_path / "out" / "H", "--dtype", "float16") == 1
    message = capsys.readouterr().err
    assert f"{tmp_path / 'M'} cannot be exported:\n  model.norm.weight: has values that float16 cannot" in message
    assert list((tmp_path / "out").iterdir()) == []


def test_damaged_parameters_leave_nothing(tmp_path: Path, changeable: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (changeable / "params").rglob("*"):
        if path.is_file() and "d" in path.parent.name:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert _deqa("export", changeable, tmp_path / "H") == 1
    assert "damaged" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [changeable]


def _fail_after(parameters: int, error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the writing fail after so many tensors."""
    left = [parameters]

    def progress(_: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise error

    @contextlib.contextmanager
    def bar(*_: object) -> Iterator[Callable[[int], object]]:
        yield progress

    monkeypatch.setattr(to_published, "progress_bar", bar)


@pytest.mark.parametrize("parameters", [0, 50])
def test_failed_write_leaves_nothing(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, parameters: int
) -> None:
    _fail_after(parameters, MemoryError(), monkeypatch)
    with pytest.raises(MemoryError):
        export(model, tmp_path / "out" / "H")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [(KeyboardInterrupt(), 130, "interrupted"), (OSError(28, "No space left on device"), 1, "No space left on device")],
)
def test_command_that_fails_while_writing_leaves_nothing_and_says_so(
    tmp_path: Path,
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    status: int,
    words: str,
) -> None:
    _fail_after(20, error, monkeypatch)
    assert _deqa("export", model, tmp_path / "out" / "H") == status
    assert words in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []
