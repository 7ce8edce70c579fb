"""`deqa bench`: what is measured hangs together and comes out whole. How fast anything is, no test asks."""

import contextlib
import io
import json
import types

import jax
import numpy as np
import pytest
from PIL import Image
from small_runs import TINY

from deqa_jax import bench, bench_table
from deqa_jax.bench import STAGES, BenchSettings
from deqa_jax.bench_table import as_table
from deqa_jax.cli import main
from deqa_jax.config import PRESETS, ConfigError
from deqa_jax.flops import flops
from deqa_jax.random_model import RandomCheckpoint
from deqa_jax.scoring_program import scoring_mesh

SINGLE = (
    "images_per_second",
    "flop_per_second",
    "fraction_of_matmul_rate",
    "matmul_flop_per_second",
    "compile_seconds",
)
# What a row is of.
OF = {"model", "batch_size", "dtype", "quantization", "int8_activations", "mesh", "error"}
FULL = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 99 bytes.\nand a trace")


@pytest.fixture(scope="module", autouse=True)
def cheap():
    """A model, a matrix product and photographs that cost next to nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "tiny", TINY)
        patch.setattr(bench, "_MATMUL", {"cpu": (8, 16, 8, 2)})
        for module in (bench, bench_table):
            patch.setattr(module, "PHOTOGRAPH", (64, 48))
        yield


@pytest.fixture(scope="module")
def printed():
    """Status, standard output and standard error of a command that measures for real."""
    out, err = io.StringIO(), io.StringIO()
    arguments = ["bench", "--size", "tiny", "--batch-size", "3", "--repeats", "2", "--images", "4", "--json"]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as exit:
        main(arguments)
    return exit.value.code, out.getvalue(), err.getvalue()


@pytest.fixture
def row(printed):
    return json.loads(printed[1])["rows"][0]


# ---- measured ---------------------------------------------------------------------------------------------


def test_the_json_says_where_and_how(printed):
    status, out, err = printed
    written = json.loads(out)
    assert status == 0
    assert out.count("\n") == 1
    assert written.keys() == {"machine", "repeats", "rows"}
    assert written["repeats"] == 2
    about = written["machine"]
    assert about.keys() == {"platform", "device", "devices", "cores", "processor", "python", "jax", "jaxlib"}
    assert (about["platform"], about["devices"], about["jax"]) == ("cpu", 1, jax.__version__)
    assert "random weights" in err
    assert "tiny, batch 3, float32: " in err


def test_a_row_says_what_it_is_of(row):
    assert {name: row[name] for name in OF} == {
        **{"model": "tiny", "batch_size": 3, "mesh": {"data": 1, "fsdp": 1, "tensor": 1}, "error": None},
        **{"dtype": "float32", "quantization": None, "int8_activations": False},
    }


def test_figures_of_a_row_hang_together(row):
    assert row["seconds"].keys() == {*STAGES, "prefix", "whole"}
    for seconds in row["seconds"].values():
        assert 0 < seconds["least"] <= seconds["median"] <= seconds["most"]
    assert all(row[name] > 0 for name in SINGLE)
    assert row["images_per_second"] == pytest.approx(3 / row["seconds"]["whole"]["median"])
    flop = sum(row["flop_per_image"][stage] for stage in STAGES)
    assert row["flop_per_second"] == pytest.approx(flop * row["images_per_second"])
    assert row["fraction_of_matmul_rate"] == pytest.approx(row["flop_per_second"] / row["matmul_flop_per_second"])
    assert row["end_to_end"].keys() == {"images", "images_per_second"}
    assert row["end_to_end"]["images"] == 4
    assert all(value > 0 for value in (*row["end_to_end"].values(), *row["decoding"].values()))
    assert row["transfer_bytes_per_second"] is None
    assert row["peak_memory"]["of"] == "process"
    assert row["peak_memory"]["bytes"] > 1 << 20


def test_operations_are_those_of_the_tokens(row):
    tokens = row["tokens"]
    assert tokens["visual"] == 5
    assert row["flop_per_image"] == flops(TINY, tokens["before"], tokens["after"])
    whole = flops(TINY, tokens["before"], tokens["after"], cached=False)
    assert row["flop_per_image_uncached"] == sum(whole.values())


def test_quantised_kernels_are_measured_as_such(deqa, row):
    options = ("--quantize", "int8", "--int8-activations", "--batch-size", 1, "--repeats", 1, "--images", 2)
    status, out, err = deqa("bench", "--size", "tiny", *options, "--json")
    assert status == 0
    assert "\ntiny, batch 1, float32, int8 kernels and activations: " in err
    (found,) = json.loads(out)["rows"]
    assert found.keys() == row.keys()
    assert (found["quantization"], found["int8_activations"], found["error"]) == ("int8", True, None)
    assert found["flop_per_image"] == row["flop_per_image"]
    assert all(found[name] > 0 for name in SINGLE)


@pytest.mark.parametrize("scheme", [None, "int8"])
def test_the_stages_of_a_model_make_the_scores_of_the_whole(scheme, printed, tmp_path, monkeypatch):
    """In five programs, what one computes, with the preprocessing and the parameters of the checkpoint."""
    checkpoint, paths = RandomCheckpoint.make(TINY, tmp_path, scheme), bench.write_photographs(tmp_path)[:3]
    results = {}

    def timed(function, *arguments, repeats):
        results[getattr(function, "__name__", "")] = result = function(*arguments)
        return {"median": 1.0, "least": 1.0, "most": 1.0}, result

    monkeypatch.setattr(bench, "timed", timed)
    subject = bench.Subject(checkpoint, BenchSettings(), 1.0, paths)
    kernel = subject.scorer.model.language.head.kernel[...]
    np.testing.assert_array_equal(kernel, checkpoint.restore()["language", "head", "kernel"])
    subject.scorer.batch_size = 3
    expected = subject.scorer.predict(paths)
    subject._stages(subject._squares)
    np.testing.assert_allclose(results["read"].score, expected.score, atol=1e-5)
    assert np.ptp(expected.score) > 1e-3


def test_photographs_are_of_their_size_and_different(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "PHOTOGRAPH", (40, 24))
    pixels = []
    for path in bench.write_photographs(tmp_path):
        with Image.open(path) as opened:
            assert (opened.format, opened.size) == ("JPEG", (40, 24))
            pixels.append(np.asarray(opened).tobytes())
    assert len(set(pixels)) == len(pixels) > 1


def test_peak_memory_is_that_of_the_devices_where_they_say_it():
    devices = [types.SimpleNamespace(memory_stats=lambda peak=peak: {"peak_bytes_in_use": peak}) for peak in (7, 9)]
    assert bench.peak_memory(devices) == {"bytes": 9, "of": "device"}


def test_a_first_call_is_not_counted():
    calls = []
    seconds, result = bench.timed(lambda x: calls.append(x) or len(calls), "x", repeats=3)
    assert (len(calls), result) == (4, 1)
    assert seconds.keys() == {"median", "least", "most"}


def test_a_matrix_product_is_measured_on_all_devices(monkeypatch):
    shapes = []

    def timed(function, left, right, *, repeats):
        shapes.extend((left.sharding.shard_shape(left.shape), right.sharding.shard_shape(right.shape)))
        return {"median": 0.5}, None

    monkeypatch.setattr(bench, "timed", timed)
    mesh = scoring_mesh(bench.MeshConfig(data=2, fsdp=1, tensor=4))
    assert bench.matmul_rate("bfloat16", mesh, 1) == 2 * 8 * 2 * 8 * 16 * 8 / 0.5
    assert shapes == [(8, 16), (16, 8)]


def test_a_matrix_product_in_int8_is_one_of_whole_numbers(monkeypatch):
    products = []

    def timed(function, left, right, *, repeats):
        products.extend((left, right, product) for product in function(left, right))
        return {"median": 0.5}, None

    monkeypatch.setattr(bench, "timed", timed)
    assert bench.matmul_rate("int8", scoring_mesh(None), 1) == 2 * 2 * 8 * 16 * 8 / 0.5
    (left, right, product), _ = products
    assert (left.dtype, right.dtype, product.dtype) == (np.int8, np.int8, np.int32)
    assert np.ptp(np.asarray(left, int)) > 200
    np.testing.assert_array_equal(product, np.asarray(left, int) @ np.asarray(right, int))


# ---- as a table -------------------------------------------------------------------------------------------


def cells(table, name):
    """What is in a line of a table besides its name; what is empty is not there."""
    (line,) = [line for line in table.splitlines() if line.startswith(f"{name}  ")]
    return [cell.strip() for cell in line.removeprefix(name).split("  ") if cell.strip()]


def test_a_table_has_every_stage_and_every_figure(row):
    medians = {"vision": 2.0, "abstractor": 0.5, "language": 0.0123, "readout": 0.0001, "whole": 2.4, "prefix": 0.25}
    seconds = {stage: {"median": x, "least": x / 2, "most": 2 * x} for stage, x in medians.items()}
    table = as_table(row | {"seconds": seconds, "images_per_second": 1.25})
    assert table.startswith("tiny, batch 3, float32: 1.25 images/s\n")
    found = {name: cells(table, name)[:2] for name in (*STAGES, "sum of these", "the whole program", "prefix, once")}
    assert found == {
        "vision": ["2000", "1000 to 4000"],
        "abstractor": ["500", "250 to 1000"],
        "language": ["12.3", "6.15 to 24.6"],
        "readout": ["0.1", "0.05 to 0.2"],
        "sum of these": ["2512", f"{sum(row['flop_per_image'][stage] for stage in STAGES) / 1e9:.3g}"],
        "the whole program": ["2400", "1200 to 4800"],
        "prefix, once": ["250", "125 to 500"],
    }
    assert cells(table, "to the devices") == ["-"]
    for name in ("end to end from 4 JPEGs of 64x48", "reading and decoding", "tokens", "FLOP an image", "compiling"):
        assert len(cells(table, name)) == 1
    assert cells(as_table(row | {"transfer_bytes_per_second": 2.5e9}), "to the devices") == ["2.5 GB/s"]


def test_a_share_is_of_the_matrix_product(row):
    seconds = row["seconds"] | {"whole": {"median": 2.0, "least": 1.0, "most": 3.0}}
    flop = 3 * sum(row["flop_per_image"][stage] for stage in STAGES)
    table = as_table(row | {"seconds": seconds, "matmul_flop_per_second": flop})
    assert cells(table, "the whole program")[-1] == "50 %"


def test_tables_come_one_after_the_other(deqa, row, monkeypatch):
    monkeypatch.setattr(bench, "measure", lambda *_: iter([row, row | {"batch_size": 4}]))
    status, out, err = deqa("bench", "--size", "tiny")
    assert status == 0
    assert out.startswith("platform cpu, device cpu, devices 1, ")
    assert out.index("tiny, batch 3, float32: ") < out.index("tiny, batch 4, float32: ")
    assert err == "random weights: they change no timing, and scores mean nothing\n"


# ---- what goes wrong --------------------------------------------------------------------------------------


@pytest.fixture
def subjects(row, monkeypatch):
    """In place of what is measured, of each model: figures by batch size, or what is raised instead."""

    def set_up(**results):
        class Subject:
            def __init__(self, checkpoint, settings, rate, photographs):
                self.found = results[checkpoint.folder.name]
                if isinstance(self.found, Exception):
                    raise self.found
                self.scorer = types.SimpleNamespace(batch_size=32)

            def row(self, batch_size):
                if isinstance(result := self.found.get(batch_size, {}), Exception):
                    raise result
                return {name: row[name] for name in row.keys() - OF}

        monkeypatch.setattr(bench, "Subject", Subject)

    return set_up


def test_a_batch_too_large_loses_no_other(deqa, subjects):
    subjects(tiny={2: FULL})
    status, out, err = deqa("bench", "--size", "tiny", "--batch-size", "1,2,4", "--json")
    rows = json.loads(out)["rows"]
    assert status == 1
    assert [row["batch_size"] for row in rows] == [1, 2, 4]
    assert [row["error"] is None for row in rows] == [True, False, True]
    assert rows[1]["error"].startswith("not enough memory; take smaller batches")
    assert rows[1].keys() == OF
    assert "deqa: tiny: not enough memory" in err

    status, out, _ = deqa("bench", "--size", "tiny", "--batch-size", "1,2,4")
    assert status == 1
    assert out.count(" images/s\n") == 2
    assert "\ntiny, batch 2, float32: not enough memory" in out


def test_a_model_too_large_loses_no_other(deqa, subjects):
    subjects(tiny=ConfigError("the model takes 99.0 GiB a device"), test={})
    status, out, err = deqa("bench", "--size", "tiny,test", "--batch-size", 1, "--batch-size", "2", "--json")
    found = [(row["model"], row["batch_size"], row["error"]) for row in json.loads(out)["rows"]]
    assert status == 1
    assert found == [
        *(("tiny", n, "the model takes 99.0 GiB a device") for n in (1, 2)),
        *(("test", n, None) for n in (1, 2)),
    ]
    assert "deqa: tiny: the model takes 99.0 GiB a device\n" in err


def test_without_a_batch_size_it_is_the_scorers(deqa, subjects):
    subjects(tiny={}, test=FULL)
    _, out, _ = deqa("bench", "--size", "tiny,test", "--json")
    assert [row["batch_size"] for row in json.loads(out)["rows"]] == [32, None]
    assert "test, batch -, float32: not enough memory" in deqa("bench", "--size", "test")[1]


@pytest.mark.parametrize(("raised", "status"), [(ValueError("a defect"), None), (KeyboardInterrupt(), 130)])
def test_however_it_ends_what_was_measured_is_printed(raised, status, row, monkeypatch, capsys):
    def measure(*_):
        yield row
        raise raised

    monkeypatch.setattr(bench, "measure", measure)
    with pytest.raises(ValueError if status is None else SystemExit):
        main(["bench", "--size", "tiny", "--json"])
    assert json.loads(capsys.readouterr().out)["rows"] == [row]


def test_a_defect_is_no_row():
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        bench._reason(jax.errors.JaxRuntimeError("INTERNAL: a defect"))


@pytest.mark.parametrize("model", ["/no/such/model", "nobody/no-such-model"])
def test_an_unknown_model_is_a_sentence(model, deqa):
    status, out, err = deqa("bench", "--model", model)
    assert (status, out) == (1, "")
    assert err.startswith("deqa: ")
    assert model in err


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--quantize", "int8", "--model", "M"], "--quantize is for random weights"),
        (["--int8-activations"], "--int8-activations needs int8 kernels"),
        (["--int8-activations", "--quantize", "int4"], "--int8-activations needs int8 kernels"),
    ],
    ids=" ".join,
)
def test_kernels_that_cannot_be_are_bad_usage(options, complaint, deqa):
    status, out, err = deqa("bench", *options)
    assert (status, out) == (2, "")
    assert complaint in err


def test_int8_activations_of_a_whole_model_are_bad_usage(deqa, converted):
    status, out, err = deqa("bench", "--model", converted, "--int8-activations", "--json")
    assert (status, out) == (2, "")
    assert err.startswith("deqa: --int8-activations needs int8 kernels")


def test_random_weights_are_quantised_as_asked(deqa, monkeypatch):
    calls = []
    monkeypatch.setattr(bench, "measure", lambda models, settings, _: calls.append((models, settings)) or iter(()))
    assert deqa("bench", "--size", "tiny,test", "--quantize", "int8", "--int8-activations")[0] == 0
    assert deqa("bench", "--size", "tiny", "--quantize", "int4")[0] == 0
    found = [{name: model.quantization for name, model in models.items()} for models, _ in calls]
    assert found == [{"tiny": "int8", "test": "int8"}, {"tiny": "int4"}]
    assert [settings.int8_activations for _, settings in calls] == [True, False]


def test_options_reach_the_measurement(deqa, converted, monkeypatch):
    calls = []
    monkeypatch.setattr(bench, "measure", lambda models, settings, _: calls.append((models, settings)) or iter(()))
    options = ("--dtype", "bfloat16", "--batch-size", "2,4,2", "--repeats", "3", "--images", "9", "--mesh", "data=2")
    assert deqa("bench", "--model", converted, *options, "--mesh", "data=2,tensor=4")[0] == 0
    ((models, settings),) = calls
    assert {name: checkpoint.folder for name, checkpoint in models.items()} == {str(converted): converted}
    mesh = bench.MeshConfig(data=2, fsdp=1, tensor=4)
    assert settings == BenchSettings(dtype="bfloat16", mesh=mesh, batch_sizes=(2, 4), repeats=3, images=9)
