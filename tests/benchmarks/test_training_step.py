"""`benchmarks/training_step.py`: a step of a configuration, timed, and its operations."""

import importlib.util
import json
import sys
from pathlib import Path

import jax
import pytest
from small_runs import TINY
from test_sharding import quick_compilation  # noqa: F401  # a fixture of every test here too

from deqa_jax.flops import flops
from deqa_jax.launch.aot import TRAINING_TEXT

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "training_step.py"
LORA = """
model: there is none
output: nowhere
data: {root: ., metas: [none.json], pairs: true}
lora: {rank: 4, alpha: 8, dropout: 0.0, targets: [language/layers/query]}
parameters:
  - {pattern: lora_, multiplier: 1}
  - {pattern: "", multiplier: 0}
batch_size_per_device: 8
dtype: float32
remat: full
"""


@pytest.fixture
def script(monkeypatch):
    spec = importlib.util.spec_from_file_location("benchmarks_training_step", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "use_compilation_cache", lambda: None)
    monkeypatch.setattr(module, "PRESETS", {"test": TINY})
    monkeypatch.setattr(module, "matmul_rate", lambda dtype, mesh, repeats: 1e9)
    return module


def test_a_step_is_timed_and_its_operations_are_counted_once(script, tmp_path, monkeypatch, capsys):
    (tmp_path / "lora.yaml").write_text(LORA)
    arguments = [str(tmp_path / "lora.yaml"), "--size", "test", "--repeats", "2", "--batch_size_per_device", "1"]
    monkeypatch.setattr(sys, "argv", ["training_step.py", *arguments])
    script.main()
    row = json.loads(capsys.readouterr().out)
    devices = jax.device_count()
    assert (row["size"], row["dtype"], row["remat"], row["images"]) == ("test", "float32", "full", 2 * devices)
    assert 0 < row["seconds"]["least"] <= row["seconds"]["median"] <= row["seconds"]["most"]
    assert row["images_per_second"] == pytest.approx(2 * devices / row["seconds"]["median"])
    assert row["flop_per_second"] == pytest.approx(row["flop"] / row["seconds"]["median"])
    assert row["fraction_of_matmul_rate"] == pytest.approx(row["flop_per_second"] / 1e9)
    # Forward once; backward the language model alone, of which only adapters have gradients of their own. In training
    # there are logits of the whole vocabulary, for every token behind the image.
    forward = flops(TINY, *TRAINING_TEXT, cached=False)
    head = 2 * TRAINING_TEXT[1] * TINY.language.hidden_size * TINY.language.vocab_size
    expected = row["images"] * (sum(forward.values()) + forward["language"] + 2 * head)
    assert 0.9 * expected < row["flop"] < 1.1 * expected


def test_a_configuration_that_is_none_is_named(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["training_step.py", str(tmp_path / "absent.yaml")])
    with pytest.raises(SystemExit) as exit:
        script.main()
    assert exit.value.code == 2
    assert f"{tmp_path / 'absent.yaml'}: no such file" in capsys.readouterr().err
