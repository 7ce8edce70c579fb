import contextlib
import dataclasses
import hashlib
import json
import logging
import shutil
import threading
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from opening import merge_adapter, open_published
from orbax.checkpoint._src.futures.synchronization import OperationIdGenerator
from recipe import recipe_tensors, to_ours
from torch_writer import save_tensors

from deqa_jax.checkpoint import Checkpoint
from deqa_jax.cli import main
from deqa_jax.config import PRESETS, DeqaConfig, to_published
from deqa_jax.convert import to_jax
from deqa_jax.convert.names import ROTARY_FREQUENCIES
from deqa_jax.convert.tensors import ConversionError
from deqa_jax.convert.to_jax import convert, locate, resolve
from deqa_jax.parameters import parameter_shapes

CONFIG = dataclasses.replace(PRESETS["test"], language=dataclasses.replace(PRESETS["test"].language, vocab_size=96))
TENSORS = recipe_tensors(CONFIG)
OURS = to_ours(CONFIG, TENSORS)
NORM = "model.norm.weight"
QUERY = "model.layers.0.self_attn.q_proj"
KEY_POSITIONS = "model.visual_abstractor.encoder.layers.1.crossattention.attention.k_pos_embed"
SHARDS = tuple(f"pytorch_model-0000{number}-of-00002.bin" for number in (1, 2))

WriteFolder = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path, side_files: dict[str, bytes]) -> WriteFolder:
    """Writes a published folder in any form: `(tensors, form)`."""

    def write_folder(
        tensors: Mapping[str, np.ndarray] = TENSORS, form: str = "bin-indexed", config: DeqaConfig = CONFIG
    ) -> Path:
        folder = tmp_path / f"{form}-{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(to_published(config)))
        for name, content in side_files.items():
            (folder / name).write_bytes(content)
        kind, _, layout = form.partition("-")
        single = {"bin": "pytorch_model", "safetensors": "model"}[kind]
        save = save_tensors if kind == "bin" else lambda path, part: safetensors.numpy.save_file(part, path)
        if layout == "single":
            save(folder / f"{single}.{kind}", dict(tensors))
            return folder
        weight_map = {}
        for number in (1, 2):
            part = {key: array for i, (key, array) in enumerate(tensors.items()) if i % 2 == number - 1}
            name = f"{single}-0000{number}-of-00002.{kind}"
            save(folder / name, part)
            weight_map |= dict.fromkeys(part, name)
        if layout == "indexed":
            (folder / f"{single}.{kind}.index.json").write_text(json.dumps({"weight_map": weight_map}))
        return folder

    return write_folder


def _assert_leaves(folder: Path, expected: Mapping[tuple[str, ...], np.ndarray]) -> None:
    leaves = Checkpoint.open(folder).restore()
    assert leaves.keys() == expected.keys()
    for path, array in expected.items():
        assert leaves[path].dtype == array.dtype, path
        np.testing.assert_array_equal(leaves[path], array, err_msg="/".join(path))


def _deqa(*arguments: object) -> int:
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    return caught.value.code


def _assert_nothing_at(out: Path) -> None:
    """Neither the folder nor a temporary one beside it."""
    assert not out.parent.exists() or list(out.parent.iterdir()) == []


# ---- what comes out ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "form",
    [
        "bin-indexed",
        "bin-single",
        "bin-unindexed",
        "safetensors-indexed",
        "safetensors-single",
        "safetensors-unindexed",
    ],
)
def test_every_published_form_gives_the_same_parameters(tmp_path: Path, write: WriteFolder, form: str) -> None:
    convert(str(write(form=form)), tmp_path / "M")
    _assert_leaves(tmp_path / "M", {path: array.astype(np.float16) for path, array in OURS.items()})


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float64])
def test_parameters_are_stored_as_the_source_stores_them(tmp_path: Path, write: WriteFolder, dtype: Any) -> None:
    convert(
        str(write({key: array.astype(dtype) for key, array in TENSORS.items()}, "safetensors-single")), tmp_path / "M"
    )
    _assert_leaves(tmp_path / "M", {path: array.astype(dtype) for path, array in OURS.items()})


def test_parameters_are_stored_as_the_command_asks_for(tmp_path: Path, write: WriteFolder) -> None:
    assert _deqa("convert", write(), tmp_path / "new" / "M", "--dtype", "bfloat16") == 0
    _assert_leaves(tmp_path / "new" / "M", {path: array.astype(ml_dtypes.bfloat16) for path, array in OURS.items()})


def test_wider_parameters_have_the_same_values(converted: Path) -> None:
    _assert_leaves(converted, to_ours(PRESETS["test"], recipe_tensors(PRESETS["test"])))


@pytest.mark.parametrize(("first", "second"), [(np.float16, np.float32), (np.float16, ml_dtypes.bfloat16)])
def test_layers_of_mixed_dtypes_lose_nothing(tmp_path: Path, write: WriteFolder, first: Any, second: Any) -> None:
    name = "model.layers.{}.self_attn.q_proj.weight"
    tensors = TENSORS | {name.format(i): TENSORS[name.format(i)].astype(first if i else second) for i in range(3)}
    convert(str(write(tensors)), tmp_path / "M")
    leaf = Checkpoint.open(tmp_path / "M").read_leaf(("language", "layers", "query", "kernel"))
    expected = np.stack([tensors[name.format(i)].T.astype(np.float32) for i in range(3)])
    np.testing.assert_array_equal(leaf.astype(np.float32), expected)


def test_golden_adapter_gives_the_merged_parameters(tmp_path: Path, shared: Path) -> None:
    """Which stay float32 where an adapter was merged, and as trained elsewhere."""
    folder, base = shared / "tiny" / "checkpoint-lora", shared / "tiny" / "checkpoint"
    convert(str(folder), tmp_path / "M", base=str(base))
    merged = merge_adapter(folder, open_published(base))
    ours = to_ours(PRESETS["test"], {key: tensor.read() for key, tensor in merged.tensors.items()})
    touched = {("language", "layers", "query", "kernel"), ("language", "layers", "value", "visual", "kernel")}
    expected = {path: array if path in touched else array.astype(np.float16) for path, array in ours.items()}
    _assert_leaves(tmp_path / "M", expected)
    provenance = Checkpoint.open(tmp_path / "M").provenance
    assert (provenance["source"], provenance["base"]) == (str(folder), str(base))
    assert {"adapter_model.bin", "non_lora_trainables.bin", *SHARDS} == provenance["files"].keys()
    assert provenance["tensors"][f"{QUERY}.weight"] == "float32"
    for name in ("tokenizer.model", "preprocessor_config.json"):
        assert (tmp_path / "M" / name).read_bytes() == (base / name).read_bytes()


def test_side_files_configuration_and_provenance_are_written(tmp_path: Path, write: WriteFolder) -> None:
    """The provenance has the digest of every weight file and the dtype of every tensor, as they came."""
    tensors = TENSORS | {NORM: TENSORS[NORM].astype(ml_dtypes.bfloat16)}
    source = write(tensors)
    (source / "special_tokens_map.json").write_text('{"pad_token": "<unk>"}')
    (source / "README.md").write_text("not of the model")
    convert(str(source), tmp_path / "M", dtype="float32")

    for name in ("tokenizer.model", "preprocessor_config.json", "special_tokens_map.json"):
        assert (tmp_path / "M" / name).read_bytes() == (source / name).read_bytes()
    assert not (tmp_path / "M" / "README.md").exists()
    checkpoint = Checkpoint.open(tmp_path / "M")
    assert checkpoint.config == CONFIG
    assert checkpoint.published_config == json.loads((source / "config.json").read_text())
    provenance = json.loads((tmp_path / "M" / "provenance.json").read_text())
    assert provenance["files"] == {name: hashlib.sha256((source / name).read_bytes()).hexdigest() for name in SHARDS}
    assert provenance["tensors"] == {key: array.dtype.name for key, array in tensors.items()}
    assert (provenance["source"], provenance["base"]) == (str(source), None)
    assert provenance["versions"].keys() == {"deqa-jax", "jax", "orbax-checkpoint"}


def test_memory_does_not_grow_with_the_checkpoint(tmp_path: Path, write: WriteFolder) -> None:
    """Many layers, none of whose stacked parameters is much of the whole."""
    language = dataclasses.replace(CONFIG.language, hidden_size=256, mlp_dim=256, num_layers=8)
    config = dataclasses.replace(CONFIG, language=language)
    source = write(recipe_tensors(config), "safetensors-indexed", config)
    sizes = [4 * int(np.prod(shape)) for shape in parameter_shapes(config).values()]
    assert max(sizes) < sum(sizes) / 6
    tracemalloc.start()
    try:
        convert(str(source), tmp_path / "M", dtype="float32")
        assert tracemalloc.get_traced_memory()[1] < 2 * max(sizes) + (2 << 20) < sum(sizes) / 2
    finally:
        tracemalloc.stop()


# ---- what cannot be converted -----------------------------------------------------------------------------


def _edit_json(path: Path, **entries: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def _index(folder: Path) -> dict[str, str]:
    return json.loads((folder / "pytorch_model.bin.index.json").read_text())["weight_map"]


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _pickle_of_a_call(folder: Path) -> None:
    with zipfile.ZipFile(folder / SHARDS[0], "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02cos\nsystem\nX\x08\0\0\0touch xy\x85R.")


def _dtype_of(key: str, dtype: Any) -> dict[str, np.ndarray]:
    return TENSORS | {key: TENSORS[key].astype(dtype)}


_WRONG_TENSORS: dict[str, tuple[dict[str, np.ndarray], list[str]]] = {
    "missing-key": ({key: array for key, array in TENSORS.items() if key != NORM}, [f"{NORM}: missing"]),
    "extra-key": (TENSORS | {"model.extra": np.ones(3, np.float16)}, ["model.extra: not a tensor of this model"]),
    "wrong-shape": (TENSORS | {NORM: np.ones(63, np.float16)}, [f"{NORM}: shape [63]", "[64]"]),
    "integers": (_dtype_of(NORM, np.int64), [f"{NORM}: stored as int64"]),
    "moved-positions": (TENSORS | {KEY_POSITIONS: TENSORS[KEY_POSITIONS] + np.float32(0.01)}, [f"{KEY_POSITIONS}: "]),
    "integer-frequencies": (
        TENSORS | {ROTARY_FREQUENCIES.format(0): np.arange(8)},
        [ROTARY_FREQUENCIES.format(0)],
    ),
    "all-at-once": (
        {key: array for key, array in TENSORS.items() if key not in (NORM, "lm_head.weight")}
        | {
            "model.extra": np.ones(3, np.float16),
            "model.more": np.ones(3, np.float16),
            f"{QUERY}.weight": np.ones((64, 65), np.float16),
            "model.embed_tokens.weight": TENSORS["model.embed_tokens.weight"].astype(np.int64),
            KEY_POSITIONS: TENSORS[KEY_POSITIONS] + np.float32(0.01),
        },
        [
            f"{NORM}: missing",
            "lm_head.weight: missing",
            "model.extra: ",
            "model.more: ",
            f"{QUERY}.weight: shape",
            "model.embed_tokens.weight: stored as int64",
            f"{KEY_POSITIONS}: ",
        ],
    ),
}

_WRONG_FOLDERS: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "truncated-shard": (lambda folder: _cut(folder / SHARDS[1]), [f"{SHARDS[1]}: truncated"]),
    "both-shards-truncated": (
        lambda folder: [_cut(folder / name) for name in SHARDS],
        [f"{name}: truncated" for name in SHARDS],
    ),
    "absent-shard": (lambda folder: (folder / SHARDS[1]).unlink(), [f"names {SHARDS[1]}, which is not there"]),
    "broken-promise": (
        lambda folder: _edit_json(
            folder / "pytorch_model.bin.index.json", weight_map=_index(folder) | {"model.promised": SHARDS[0]}
        ),
        [f"{SHARDS[0]}: model.promised is missing"],
    ),
    "duplicate-keys": (
        lambda folder: [
            (folder / "pytorch_model.bin.index.json").unlink(),
            shutil.copy(folder / SHARDS[0], folder / SHARDS[1]),
        ],
        [f"{SHARDS[1]}: {next(iter(TENSORS))} is in another file too"],
    ),
    "harmful-pickle": (_pickle_of_a_call, [f"{SHARDS[0]}: its pickle names os.system"]),
    "old-format": (
        lambda folder: (folder / SHARDS[0]).write_bytes(b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."),
        [f"{SHARDS[0]}: written in PyTorch's old format"],
    ),
    "empty-file": (lambda folder: (folder / SHARDS[0]).write_bytes(b""), [f"{SHARDS[0]}: empty file"]),
    "no-config": (lambda folder: (folder / "config.json").unlink(), ["config.json: no such file"]),
    "no-tokenizer": (lambda folder: (folder / "tokenizer.model").unlink(), ["tokenizer.model: no such file"]),
    "no-preprocessor": (
        lambda folder: (folder / "preprocessor_config.json").unlink(),
        ["preprocessor_config.json: no such file"],
    ),
    "another-model": (lambda folder: _edit_json(folder / "config.json", model_type="llama"), ["model_type: 'llama'"]),
    "another-size": (
        lambda folder: _edit_json(folder / "config.json", vocab_size=97),
        ["model.embed_tokens.weight: shape [96, 64]", "lm_head.weight: shape [96, 64]"],
    ),
    "files-and-shards": (
        lambda folder: [
            _edit_json(folder / "config.json", model_type="llama"),
            (folder / "tokenizer.model").unlink(),
            _cut(folder / SHARDS[0]),
            (folder / SHARDS[1]).unlink(),
        ],
        ["model_type", "tokenizer.model", f"{SHARDS[0]}: truncated", f"names {SHARDS[1]}"],
    ),
    "files-and-tensors": (
        lambda folder: [
            (folder / "tokenizer.model").unlink(),
            (folder / "preprocessor_config.json").unlink(),
            _edit_json(folder / "config.json", vocab_size=97),
        ],
        ["tokenizer.model", "preprocessor_config.json", "model.embed_tokens.weight: ", "lm_head.weight: "],
    ),
}


def _assert_refused(source: Path, words: list[str], capsys: pytest.CaptureFixture[str], **options: object) -> list[str]:
    """By the command, which writes every problem to a line of stderr and leaves nothing behind; returns them."""
    out = source.parent / "out" / "M"
    arguments = [part for key, value in options.items() for part in (f"--{key}", value)]
    capsys.readouterr()
    assert _deqa("convert", source, out, *arguments) == 1
    output = capsys.readouterr()
    _assert_nothing_at(out)
    headline, *problems = output.err.splitlines()
    assert (output.out, headline) == ("", f"deqa: {source} cannot be converted:")
    for word in words:
        assert any(word in problem for problem in problems), (word, problems)
    assert len(problems) == len(set(problems))
    return problems


def test_one_error_has_all_problems(write: WriteFolder, capsys: pytest.CaptureFixture[str]) -> None:
    """The same that the command writes, one line each."""
    tensors, words = _WRONG_TENSORS["all-at-once"]
    source = write(tensors)
    with pytest.raises(ConversionError) as caught:
        convert(str(source), source.parent / "M")
    problems = _assert_refused(source, words, capsys)
    assert problems == [f"  {problem}" for problem in caught.value.problems]
    assert len(problems) == len(words)


@pytest.mark.parametrize("case", _WRONG_TENSORS)
def test_wrong_tensors_are_all_named(write: WriteFolder, capsys: pytest.CaptureFixture[str], case: str) -> None:
    tensors, words = _WRONG_TENSORS[case]
    _assert_refused(write(tensors), words, capsys)


@pytest.mark.parametrize("case", _WRONG_FOLDERS)
def test_wrong_files_are_all_named(
    write: WriteFolder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, case: str
) -> None:
    monkeypatch.chdir(tmp_path)
    source = write()
    damage, words = _WRONG_FOLDERS[case]
    damage(source)
    _assert_refused(source, words, capsys)
    assert not Path("xy").exists()


@pytest.mark.parametrize("form", ["bin-single", "safetensors-single", "safetensors-indexed"])
def test_missing_tensor_is_named_in_every_form(write: WriteFolder, form: str) -> None:
    source = write({key: array for key, array in TENSORS.items() if key != NORM}, form)
    with pytest.raises(ConversionError, match=rf"^{NORM}: missing$"):
        convert(str(source), source.parent / "M")


# ---- adapters and their bases -----------------------------------------------------------------------------


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """An adapter of one matrix."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
    shapes = {"A": (2, 64), "B": (64, 2)}
    matrices = {f"base_model.model.{QUERY}.lora_{side}.weight": np.ones(shape) for side, shape in shapes.items()}
    save_tensors(folder / "adapter_model.bin", {key: array.astype(np.float16) for key, array in matrices.items()})
    save_tensors(folder / "non_lora_trainables.bin", {})
    return folder


def test_adapter_is_merged_into_its_base(tmp_path: Path, write: WriteFolder, adapter: Path) -> None:
    assert _deqa("convert", adapter, tmp_path / "M", "--base", write()) == 0
    leaf = Checkpoint.open(tmp_path / "M").read_leaf(("language", "layers", "query", "kernel"))
    assert leaf.dtype == np.float32
    np.testing.assert_array_equal(leaf[0], TENSORS[f"{QUERY}.weight"].T.astype(np.float32) + 4)


def test_adapter_without_base_is_refused(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _assert_refused(adapter, ["--base"], capsys)


def test_base_for_a_full_checkpoint_is_refused(write: WriteFolder, capsys: pytest.CaptureFixture[str]) -> None:
    _assert_refused(write(), ["a full checkpoint; --base is for LoRA adapters"], capsys, base=str(write()))


def test_adapter_on_an_adapter_is_refused(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _assert_refused(adapter, ["a LoRA adapter too"], capsys, base=str(adapter))


def test_absent_base_is_refused(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _assert_refused(adapter, ["no such folder"], capsys, base=str(adapter.parent / "absent"))


def test_problems_of_an_adapter_are_all_named(
    write: WriteFolder, adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _edit_json(adapter / "adapter_config.json", use_dora=True, bias="all", modules_to_save=["lm_head"])
    save_tensors(
        adapter / "adapter_model.bin",
        {
            f"base_model.model.{QUERY}.lora_A.weight": np.ones((2, 64), np.float16),
            "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight": np.ones((2, 63), np.float16),
            "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight": np.ones((64, 2), np.float16),
            "base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight": np.ones((2, 64), np.float16),
        },
    )
    words = ["use_dora", "bias", "modules_to_save", f"{QUERY}: lora_B is missing", "layers.1.", "layers.7."]
    _assert_refused(adapter, words, capsys, base=str(write()))


def test_problems_of_base_and_adapter_are_named_together(
    write: WriteFolder, adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = write({key: array for key, array in TENSORS.items() if key != NORM})
    (base / "tokenizer.model").unlink()
    _edit_json(adapter / "adapter_config.json", use_dora=True)
    _assert_refused(adapter, ["use_dora", "tokenizer.model", f"{NORM}: missing"], capsys, base=str(base))


# ---- sources and destinations -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_destination_that_exists_is_left_alone(
    tmp_path: Path, write: WriteFolder, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    out = tmp_path / "M"
    kept = out / "kept" if kind == "folder" else out
    kept.parent.mkdir(exist_ok=True)
    kept.write_text("kept")
    assert _deqa("convert", write(), out) == 2
    assert f"{out} exists already" in capsys.readouterr().err
    assert kept.read_text() == "kept"
    with pytest.raises(FileExistsError):
        convert("nowhere", out)


@pytest.mark.parametrize("source", ["absent", "./absent", "a/b/c", "two words/x"])
def test_source_that_is_no_folder_and_no_hub_id_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], source: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert _deqa("convert", source, "M") == 1
    assert f"  {source}: no such folder" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_file_as_source_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert _deqa("convert", tmp_path / "config.json", tmp_path / "M") == 1
    assert "name the folder" in capsys.readouterr().err


def test_hub_id_without_network_is_one_clear_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert _deqa("convert", "somebody/some-model", "M") == 1
    (headline, sentence) = capsys.readouterr().err.splitlines()
    assert headline == "deqa: somebody/some-model cannot be converted:"
    assert sentence.startswith("  somebody/some-model: no such folder, and as a hub id it could not be downloaded")
    assert "no network" in sentence
    assert "Traceback" not in sentence
    assert list(tmp_path.iterdir()) == []


def test_hub_id_is_downloaded_without_what_is_not_needed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: dict[str, Any] = {}

    def download(source: str, **options: Any) -> str:
        asked.update(options, source=source)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert locate("somebody/some-model") == tmp_path
    assert asked["source"] == "somebody/some-model"
    assert set(asked["allow_patterns"]) == {"*.json", "*.bin", "*.safetensors", "tokenizer.model"}


def test_folder_wins_over_a_hub_id_of_the_same_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("somebody/some-model").mkdir(parents=True)
    assert locate("somebody/some-model") == Path("somebody/some-model")


# ---- interruption -----------------------------------------------------------------------------------------


def _fail_after(parameters: int, error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the writing fail after so many parameters."""
    left = [parameters]

    def progress(_: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise error

    @contextlib.contextmanager
    def bar(*_: object) -> Iterator[Callable[[int], object]]:
        yield progress

    monkeypatch.setattr(to_jax, "progress_bar", bar)


@pytest.mark.parametrize("parameters", [0, 20])
def test_failed_write_leaves_nothing(
    tmp_path: Path, write: WriteFolder, monkeypatch: pytest.MonkeyPatch, parameters: int
) -> None:
    source, out = write(), tmp_path / "out" / "M"
    _fail_after(parameters, MemoryError(), monkeypatch)
    with pytest.raises(MemoryError):
        convert(str(source), out)
    _assert_nothing_at(out)


def test_interrupted_command_leaves_nothing_and_says_so(
    tmp_path: Path, write: WriteFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = write(), tmp_path / "out" / "M"
    _fail_after(5, KeyboardInterrupt(), monkeypatch)
    assert _deqa("convert", source, out) == 130
    assert "interrupted" in capsys.readouterr().err
    _assert_nothing_at(out)


def test_full_disk_is_one_message(
    tmp_path: Path, write: WriteFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = write(), tmp_path / "out" / "M"
    _fail_after(5, OSError(28, "No space left on device"), monkeypatch)
    assert _deqa("convert", source, out) == 1
    assert "No space left on device" in capsys.readouterr().err
    _assert_nothing_at(out)


def test_failure_after_the_parameters_leaves_nothing(
    tmp_path: Path, write: WriteFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = write(), tmp_path / "out" / "M"
    monkeypatch.setattr(to_jax, "_provenance", lambda *_: {"not": {"for": object()}})
    with pytest.raises(TypeError):
        convert(str(source), out)
    _assert_nothing_at(out)


# ---- the cache behind --model -----------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the cache lies."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "deqa-jax" / "models"


def test_converted_folder_is_taken_as_it_is(converted: Path, cache: Path) -> None:
    assert resolve(str(converted)) == converted
    assert not cache.exists()


def test_published_folder_is_converted_once(
    write: WriteFolder, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    source = write()
    with caplog.at_level(logging.INFO, "deqa_jax"):
        first = resolve(str(source))
    assert f"converting {source} once into {first}" in caplog.text
    assert first.parent == cache
    assert Checkpoint.open(first).config == CONFIG
    monkeypatch.setattr(to_jax, "convert", lambda *_, **__: pytest.fail("converted again"))
    assert resolve(str(source)) == first


@pytest.mark.parametrize("process", [0, 1])
def test_each_of_several_processes_converts_for_itself(
    write: WriteFolder, cache: Path, monkeypatch: pytest.MonkeyPatch, process: int
) -> None:
    """There is no other here, so waiting for one would fail; nor may those count who convert, where others do not."""
    source, counted = write(), OperationIdGenerator.get_current_operation_id()
    with monkeypatch.context() as several:
        several.setattr(jax, "process_index", lambda: process)
        several.setattr(jax, "process_count", lambda: 2)
        folder = resolve(str(source))
    assert list(cache.iterdir()) == [folder]
    _assert_leaves(folder, {path: array.astype(np.float16) for path, array in OURS.items()})
    assert OperationIdGenerator.get_current_operation_id() == counted


def test_threads_that_ask_for_the_same_model_all_get_it(
    write: WriteFolder, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All begin before one is done, each in a folder of its own."""
    source, together, original = write(), threading.Barrier(2), to_jax.write_checkpoint
    made = set()

    def write_together(folder: Path, **named: Any) -> None:
        made.add(folder)
        together.wait(60)
        original(folder, **named)

    monkeypatch.setattr(to_jax, "write_checkpoint", write_together)
    with ThreadPoolExecutor(2) as pool:
        folders = set(pool.map(resolve, [str(source)] * 2))
    assert len(made) == 2
    assert list(cache.iterdir()) == [*folders]
    _assert_leaves(*folders, {path: array.astype(np.float16) for path, array in OURS.items()})


@pytest.mark.parametrize("changed", ["config.json", "preprocessor_config.json", SHARDS[1], "new.json"])
def test_changed_folder_is_converted_again(
    write: WriteFolder, cache: Path, monkeypatch: pytest.MonkeyPatch, changed: str
) -> None:
    monkeypatch.setattr(to_jax, "convert", lambda _, out: out.mkdir(parents=True))
    source = write()
    first = resolve(str(source))
    assert resolve(str(source)) == first
    with (source / changed).open("ab") as file:
        file.write(b" ")
    second = resolve(str(source))
    assert sorted(cache.iterdir()) == sorted({first, second})
    assert second != first


def test_damaged_folder_leaves_nothing_in_the_cache(write: WriteFolder, cache: Path) -> None:
    source = write()
    _cut(source / SHARDS[0])
    with pytest.raises(ConversionError, match="truncated"):
        resolve(str(source))
    assert not cache.exists() or list(cache.iterdir()) == []


def test_adapter_is_not_converted_without_asking(adapter: Path, cache: Path) -> None:
    with pytest.raises(ConversionError, match="merge it first: deqa convert"):
        resolve(str(adapter))
    assert not cache.exists()


def test_model_that_is_nowhere_is_named(tmp_path: Path, cache: Path) -> None:
    with pytest.raises(ConversionError, match=r"absent: no such folder$"):
        resolve(str(tmp_path / "absent"))
