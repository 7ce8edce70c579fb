"""`benchmarks/plot.py`: a picture of what `deqa bench` measured, or a reason why there is none."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from PIL import Image

from deqa_jax.bench import STAGES

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "plot.py"


@pytest.fixture(scope="module")
def plot():
    spec = importlib.util.spec_from_file_location("benchmarks_plot", SCRIPT)
    module = sys.modules["benchmarks_plot"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["benchmarks_plot"]


def row(batch_size, **changes):
    seconds = {stage: {"median": batch_size * 0.1 * (i + 1)} for i, stage in enumerate(STAGES)}
    figures = {"images_per_second": 2.5 * batch_size, "seconds": seconds}
    return {**OF, "batch_size": batch_size, "error": None, **figures, **changes}


OF = {"model": "small", "dtype": "float32", "quantization": None, "int8_activations": False}
FAILED = {**OF, "batch_size": 99, "error": "not enough memory"}


def write(path, *rows):
    path.write_text(json.dumps({"machine": {"device": "cpu"}, "rows": rows}))
    return path


def test_rows_with_figures_are_drawn(plot, tmp_path, monkeypatch):
    drawn = []
    savefig = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *given, **named: drawn.append(self) or savefig(self, *given, **named)
    )
    first, second = write(tmp_path / "a.json", row(4), FAILED, row(1)), tmp_path / "b.json"
    write(second, row(1, quantization="int4"))
    plot.main([str(first), str(second), "--output", str(tmp_path / "out.png")])
    with Image.open(tmp_path / "out.png") as picture:
        assert picture.format == "PNG"
    rates, stages = drawn[0].axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in rates.lines}
    expected = {"a: cpu, small, float32": [[1, 2.5], [4, 10]], "b: cpu, small, float32, int4 kernels": [[1, 2.5]]}
    assert lines == expected
    bars = [(bar.get_y(), bar.get_height()) for bar in stages.patches]
    assert len(bars) == 3 * len(STAGES)
    # Milliseconds an image, whatever the batch, one stage on the other.
    assert bars[0] == (0, pytest.approx(100))
    assert bars[3] == (pytest.approx(100), pytest.approx(200))


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "no such file"),
        ("]", "not JSON"),
        ("[]", "not a JSON object"),
        ("{}", "not the output of `deqa bench --json`"),
        (json.dumps({"machine": {"device": "cpu"}, "rows": [FAILED]}), "no row has figures"),
        (json.dumps({"machine": {"device": "cpu"}, "rows": [{"error": None}]}), "not the output"),
        (json.dumps({"machine": {"device": "cpu"}, "rows": [row(1, images_per_second=0)]}), "not the output"),
        (json.dumps({"machine": {"device": "cpu"}, "rows": [row(1, images_per_second="fast")]}), "not the output"),
        (json.dumps({"machine": {"device": "cpu"}, "rows": [row(0)]}), "not the output"),
        (json.dumps({"machine": {"device": "cpu"}, "rows": {"a": 1}}), "not the output"),
    ],
)
def test_anything_else_is_refused(content, complaint, plot, tmp_path, capsys):
    path = tmp_path / "measured.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SystemExit) as exit:
        plot.main([str(path), "--output", str(tmp_path / "out.png")])
    err = capsys.readouterr().err
    assert exit.value.code == 2
    assert complaint in err
    assert "measured.json" in err
    assert not (tmp_path / "out.png").exists()


def test_a_picture_that_is_there_is_left_alone(plot, tmp_path, capsys):
    (tmp_path / "out.png").write_text("mine")
    with pytest.raises(SystemExit) as exit:
        plot.main([str(write(tmp_path / "a.json", row(1))), "--output", str(tmp_path / "out.png")])
    assert exit.value.code == 2
    assert "exists already" in capsys.readouterr().err
    assert (tmp_path / "out.png").read_text() == "mine"
