"""Every command and example that the documentation shows is run."""

import doctest
import importlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import safetensors.numpy
from conftest import WritePublished
from small_runs import QUICK_FLAGS, TINY
from test_imports import RANK

from deqa_jax.checkpoint import PREPROCESSOR_FILE
from deqa_jax.random_model import random_side_files

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


TUTORIAL = (ROOT / "docs" / "tutorial.md").read_text()


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def workplace(write_published: WritePublished, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the README's commands speak of."""
    folder = tmp_path_factory.mktemp("readme")
    # Pictures of four patches: each command compiles programs of its own, `deqa plan` with the compiler for TPUs.
    published = write_published(folder / "DeQA-Score-Mix3", TINY)
    (published / PREPROCESSOR_FILE).write_bytes(random_side_files(TINY.vision.image_size)[PREPROCESSOR_FILE])
    # A third of them: every command that scores them does so with a model of its own.
    shutil.copytree(ROOT / "examples", folder / "examples", ignore=shutil.ignore_patterns("jpeg_*", "noise_*"))
    shutil.copytree(ROOT / "configs", folder / "configs")
    (folder / "mplug-owl2-llama2-7b").symlink_to(published)
    adapter = folder / "DeQA-Score-LoRA-Mix3"
    adapter.mkdir()
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    prefix = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    matrices = {f"{prefix}A.weight": np.ones((2, 64), np.float16), f"{prefix}B.weight": np.ones((64, 2), np.float16)}
    safetensors.numpy.save_file(matrices, adapter / "adapter_model.safetensors")
    trained = {"base_model.model.model.visual_abstractor.vit_eos": np.ones((1, 1, 64), np.float16)}
    safetensors.numpy.save_file(trained, adapter / "non_lora_trainables.safetensors")
    _write_datasets(folder)
    return folder


def _write_datasets(folder: Path) -> None:
    """Two published datasets in miniature, and opinion scores as one's own and as published ones."""
    pictures = sorted((ROOT / "examples").glob("*.jpg"))[::3] * 2
    for name, metas in (("KONIQ", "test_koniq_2k.json"), ("SPAQ", "test_spaq_2k.json")):
        images = folder / "Data-DeQA-Score" / name / "images"
        images.mkdir(parents=True)
        items = []
        for i, picture in enumerate(pictures):
            shutil.copy(picture, images / f"{i}.jpg")
            scores = {"gt_score": 4 - i / 3, "gt_score_norm": 4 - i / 3, "std": 0.5, "std_norm": 0.5}
            items.append({"id": f"{i}.jpg->{i}", "image": f"{name}/images/{i}.jpg", **scores})
        (images.parent / "metas").mkdir()
        (images.parent / "metas" / metas).write_text(json.dumps(items))
    shutil.copytree(folder / "Data-DeQA-Score" / "KONIQ" / "images", folder / "OWN" / "images")
    rows = [f"{i}.jpg,{10 * i},12.5" for i in range(len(pictures))]
    (folder / "scores.csv").write_text("\n".join(["image,mos,std", *rows]))
    (folder / "mos.json").write_text(json.dumps({f"{i}.jpg": {"mos": i, "std": 1} for i in range(10)}))
    (folder / "split.json").write_text(json.dumps({"train": ["1.jpg", "2.jpg", "3.jpg"], "test": ["4.jpg"]}))
    koniq = {"split_json": "split.json", "mos_json": "mos.json", "save_train": "train.json", "save_test": "test.json"}
    koniq |= {"img_dir": "KONIQ/images", "density_type": "pdf", "thre_std": 0.2, "thre_diff": 0.1}
    config = {"answer": "The quality of the image is {}.", "dataset_params": {"koniq": koniq}}
    (folder / "config.json").write_text(json.dumps(config))


def run_command(command: str, folder: Path) -> None:
    # The command that belongs to the interpreter of this test run.
    # Like a reader's machine, this one has its own number of devices.
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "XLA_FLAGS": QUICK_FLAGS,
    }
    done = subprocess.run(command, shell=True, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stderr}"


def test_readme_commands_run(workplace: Path) -> None:
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    commands = [line for line in lines if line.startswith(("deqa ", "python -m deqa_jax."))]
    assert len(commands) >= 6
    for command in commands:
        if command.startswith("deqa plan") and importlib.util.find_spec("libtpu") is None:
            continue  # the compiler for TPUs is for Linux on x86-64 only
        run_command(command, workplace)


def test_the_tutorial_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    steps = re.findall(r"^```(bash|python)\n(.*?)^```", TUTORIAL, re.MULTILINE | re.DOTALL)
    assert [language for language, _ in steps].count("python") == 1
    for language, text in steps:
        if language == "python":
            exec(text, {})
            continue
        for command in text.splitlines():
            run_command(command, tmp_path)
    assert (tmp_path / "gallery.html").is_file()


def test_readme_python_runs(workplace: Path, converted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    if not (workplace / "mix3").exists():
        (workplace / "mix3").symlink_to(converted)
    names: dict[str, Any] = {}
    for block in blocks("python"):
        exec(block, names)
    assert names["scores"].shape == (2,)
    assert names["prediction"].hidden.shape == (1, 64)


def test_readme_opens_with_two_commands_that_do_everything() -> None:
    first, second, *_ = blocks("bash")
    assert "deqa score examples/" in first
    assert "pytest" in second
    assert first.count("\n") == second.count("\n") == 1


@pytest.mark.parametrize("module", RANK)
def test_docstring_examples_run(module: str) -> None:
    loaded = importlib.import_module(module)
    with jax.numpy_rank_promotion("raise"):
        assert doctest.testmod(loaded).failed == 0


def test_contributing_names_every_file() -> None:
    tree = (ROOT / "CONTRIBUTING.md").read_text()
    files = [*(ROOT / "deqa_jax").rglob("*.py"), *(ROOT / "convert").glob("*.py"), *(ROOT / "launch").iterdir()]
    assert not [path.name for path in files if path.is_file() and path.name != "__init__.py" and path.name not in tree]
