import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from recipe import published_shapes, recipe_tensors

from deqa_jax.checkpoint import CheckpointError
from deqa_jax.cli import main
from deqa_jax.config import PRESETS
from deqa_jax.convert.describe import describe
from deqa_jax.convert.tensors import ConversionError

CONFIG = PRESETS["test"]
SIZES = {key: int(np.prod(shape)) for key, shape in published_shapes(CONFIG).items()}


def _millions(*words: str) -> str:
    return f"{sum(size for key, size in SIZES.items() if any(word in key for word in words)) / 1e6:.1f} M"


def _info(model: object) -> int:
    with pytest.raises(SystemExit) as caught:
        main(["info", str(model)])
    return caught.value.code


@pytest.mark.parametrize("kind", ["published", "converted"])
def test_parts_of_the_model_are_counted(request: pytest.FixtureRequest, kind: str) -> None:
    text = describe(str(request.getfixturevalue(kind)))
    assert f"parameters  {_millions('')}" in text
    assert f"vision      {_millions('vision_model')}: 2 layers of 48, 448 pixels in patches of 14" in text
    assert f"abstractor  {_millions('visual_abstractor')}: 2 layers of 48, 64 queries" in text
    language = _millions("model.layers", "embed_tokens", "lm_head", "model.norm")
    assert f"language    {language}: 3 layers of 64, vocabulary of 32000" in text


def test_converted_checkpoint_tells_where_it_comes_from(published: Path, converted: Path) -> None:
    lines = describe(str(converted)).splitlines()
    assert lines[0] == f"{converted}: a converted checkpoint"
    assert f"stored      {_millions('')} in float32" in lines
    assert f"source      {published}" in lines
    digest = hashlib.sha256((published / "model.safetensors").read_bytes()).hexdigest()
    assert f"sha256      {digest}  model.safetensors" in lines
    assert not any(line.startswith("base") for line in lines)


def test_published_checkpoint_tells_its_files_and_dtypes(published: Path) -> None:
    lines = describe(str(published)).splitlines()
    assert lines[0].startswith(f"{published}: a published checkpoint")
    assert "file        model.safetensors" in lines
    (stored,) = [line for line in lines if line.startswith("stored")]
    assert f"{2 * sum(SIZES.values()) / 1e6:.1f} MB in float16" in stored
    assert "0.4 MB in float32" in stored


def test_golden_checkpoint_lists_both_shards(shared: Path) -> None:
    lines = describe(str(shared / "tiny" / "checkpoint")).splitlines()
    assert [line.split()[1] for line in lines if line.startswith("file")] == [
        "pytorch_model-00001-of-00002.bin",
        "pytorch_model-00002-of-00002.bin",
    ]


def test_adapter_is_called_one(shared: Path) -> None:
    text = describe(str(shared / "tiny" / "checkpoint-lora"))
    assert "a LoRA adapter" in text
    assert "--base" in text


def test_bad_published_checkpoint_is_an_error_with_all_problems(
    tmp_path: Path, write_published: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = recipe_tensors(CONFIG)
    del tensors["lm_head.weight"]
    tensors["model.extra"] = np.ones(1, np.float16)
    folder = write_published(tmp_path / "P", CONFIG, tensors=tensors)
    with pytest.raises(ConversionError) as caught:
        describe(str(folder))
    assert [problem.partition(":")[0] for problem in caught.value.problems] == ["lm_head.weight", "model.extra"]
    assert _info(folder) == 1
    output = capsys.readouterr()
    assert output.out == ""
    assert all(problem in output.err for problem in caught.value.problems)


def test_incomplete_converted_checkpoint_is_an_error(tmp_path: Path, converted: Path) -> None:
    (tmp_path / "config.json").write_bytes((converted / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match="provenance"):
        describe(str(tmp_path))
    (tmp_path / "provenance.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"params, tokenizer\.model, preprocessor_config\.json missing"):
        describe(str(tmp_path))


def test_folder_of_something_else_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert _info(tmp_path) == 1
    message = capsys.readouterr().err
    assert "model_type" in message
    assert "no weights" in message


@pytest.mark.parametrize("name", ["absent", "somebody/some-model"])
def test_only_local_folders_are_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert _info(name) == 1
    assert capsys.readouterr().err == f"deqa: {name}: no such folder (deqa info looks at local folders only)\n"


def test_command_writes_to_stdout(converted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _info(converted) == 0
    output = capsys.readouterr()
    assert output.out == describe(str(converted)) + "\n"
    assert output.err == ""
