"""The command line: what each command writes where, and the status it exits with."""

import csv
import io
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deqa_jax import builtin_model, random_model
from deqa_jax.checkpoint import Checkpoint, CheckpointError
from deqa_jax.config import MeshConfig
from deqa_jax.data import synthetic
from deqa_jax.data.metas import read_metas
from deqa_jax.data.synthetic import SyntheticSettings
from deqa_jax.prompt import LEVELS
from deqa_jax.scorer import Scorer

COMMANDS = (
    *("score", "infer", "evaluate", "labels", "synth", "train"),
    *("plan", "bench", "prepare", "convert", "export", "info", "init"),
)
UNREADABLE = {"empty.png", "not_an_image.jpg", "truncated.jpg"}


def start(*arguments, **options):
    """The same in a process of its own."""
    command = [sys.executable, "-c", "from deqa_jax.cli import main; main()", *map(str, arguments)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, **options)


def is_sentence(text):
    return text.startswith("deqa: ") and text.endswith("\n") and "Traceback" not in text and len(text) > 20


# ---- help and usage ---------------------------------------------------------------------------------------


def test_every_command_has_help_with_an_example(deqa):
    status, out, err = deqa("--help")
    assert (status, err) == (0, "")
    for command in COMMANDS:
        assert f"\n    {command} " in out
        status, help, err = deqa(command, "--help")
        assert (status, err) == (0, "")
        assert f"example:\n  deqa {command} " in help


def test_help_lists_no_other_command(deqa):
    _, out, _ = deqa("--help")
    listed = [line.split()[0] for line in out.splitlines() if line.startswith("    ") and not line.startswith("     ")]
    assert listed == list(COMMANDS)


def test_help_imports_nothing_heavy():
    program = (
        "import sys\n"
        "from deqa_jax.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "print(*(m for m in ('jax', 'flax', 'numpy', 'PIL', 'orbax', 'sentencepiece') if m in sys.modules))"
    )
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert "COMMAND" in out
    assert out.splitlines()[-1] == ""


def test_the_version_is_that_of_the_distribution(deqa):
    from importlib.metadata import version

    assert deqa("--version") == (0, version("deqa-jax") + "\n", "")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "name a command"),
        (["frobnicate"], "frobnicate"),
        (["score"], "PATH"),
        (["infer", "--meta", "x.json", "--root", ".", "--out", "o"], "--model"),
        (["score", "--model", "M"], "PATH"),
        (["score", "x.png", "--model", "M", "--prompt", "chat"], "'chat'"),
        (["score", "x.png", "--model", "M", "--format", "xml"], "'xml'"),
        (["score", "x.png", "--model", "M", "--dtype", "float16"], "'float16'"),
        (["score", "x.png", "--model", "M", "--batch-size", "0"], "'0' is not a whole number from 1"),
        (["score", "x.png", "--model", "M", "--batch-size", "-3"], "'-3' is not a whole number from 1"),
        (["score", "x.png", "--model", "M", "--batch-size", "many"], "'many'"),
        (["score", "x.png", "--model", "M", "--batch-size", "2.5"], "'2.5'"),
        (["score", "x.png", "--model", "M", "--frobnicate"], "--frobnicate"),
        (["convert", "P", "M", "--quantize", "int2"], "'int2'"),
        (["init", "M", "--size", "huge"], "'huge'"),
        (["init", "M", "--seed", "x"], "'x'"),
        (["info"], "MODEL"),
        (["infer", "--model", "M", "--out", "R", "--root", "D"], "--meta --dataset"),
        (["infer", "--model", "M", "--out", "R", "--meta", "F", "--dataset", "koniq"], "not allowed with"),
        (["evaluate", "--pred", "P"], "--gt"),
        (["evaluate", "--pred", "P", "--gt", "G", "--json", "--latex"], "not allowed with"),
        (["evaluate", "--pred", "P", "--gt", "G", "--fit", "6"], "'6'"),
        (["evaluate", "--pred", "P", "--gt", "G", "--bootstrap", "-1"], "'-1' is not a whole number from 0"),
        (["labels"], "--config --csv"),
        (["labels", "--csv", "F", "--out", "D", "--scale", "1"], "--scale"),
        (["labels", "--csv", "F", "--out", "D", "--scale", "0", "nan"], "'nan' is not a number"),
        (["labels", "--csv", "F", "--out", "D", "--column", "score=MOS"], "'score=MOS' is not image, mos"),
        (["labels", "--csv", "F", "--out", "D", "--column", "mos="], "'mos=' is not image, mos"),
        (["labels", "--csv", "F", "--out", "D", "--test-ratio", "20"], "'20' is not a number from 0 to 1"),
        (["synth"], "OUT"),
        (["synth", "D", "--scenes", "0"], "'0' is not a whole number from 1"),
        (["synth", "D", "--versions", "0"], "'0' is not a whole number from 1"),
        (["synth", "D", "--versions", "few"], "'few' is not a whole number from 1"),
        (["score", "F", "--input-size-limit", "0"], "'0' is not a number of megapixels above 0"),
        (["synth", "D", "--test-ratio", "20"], "'20' is not a number from 0 to 1"),
        (["synth", "D", "--seed", "-1"], "'-1' is not a whole number from 0"),
        (["bench", "--size", "small,huge"], "'huge' is not one of test, tiny, small, mid, full"),
        (["bench", "--size", "small", "--model", "M"], "not allowed with"),
        (["bench", "--batch-size", "1,0"], "'0' is not a whole number from 1"),
        (["bench", "--batch-size", "4,"], "'' is not a whole number from 1"),
        (["bench", "--dtype", "float16"], "'float16'"),
        (["bench", "--repeats", "0"], "'0' is not a whole number from 1"),
        (["bench", "--images", "none"], "'none' is not a whole number from 1"),
        (["bench", "--mesh", "tensor=0"], "'tensor=0' does not give"),
        (["prepare", "--dataset", "koniq", "--root", "D"], "--out"),
    ],
    ids=" ".join,
)
def test_bad_usage_exits_with_2_and_says_where_help_is(arguments, complaint, deqa):
    status, out, err = deqa(*arguments)
    assert (status, out) == (2, "")
    assert complaint in err
    assert "Try `deqa" in err
    assert "--help`" in err


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["infer", "--model", "M", "--out", "R", "--meta", "F"], "say where the images are"),
        (["infer", "--model", "M", "--out", "R", "--dataset", "koniq", "--root", "D", "--records", "E"], "say where"),
        (["infer", "--model", "M", "--out", "R", "--meta", "F", "--records", "E"], "--records goes with --dataset"),
        (["infer", "--model", "M", "--out", "R", "--root", "D", "--dataset", "koniq,kony"], "no dataset 'kony'"),
        (["evaluate", "--pred", "P", "Q", "--gt", "G"], "2 prediction files and 1 metas"),
        (["evaluate", "--pred", "P", "--gt", "G", "--root", "D"], "give --report DIR too"),
        (["labels", "--csv", "F"], "say with --out where"),
        (["labels", "--csv", "F", "--out", "D", "--scale", "5", "1"], "the lowest possible score first"),
        (["labels", "--config", "F", "--seed", "0"], "--seed goes with --csv"),
        (["labels", "--config", "F", "--invert"], "--invert goes with --csv"),
        (["plan", "--topology", "v5e:1x1", "--config_path", "F", "--quantize", "int8"], "--quantize is for scoring"),
        (["synth", "D", "--families", "jpeg,jpg"], "no family 'jpg'; there are haze, vignetting"),
        (["synth", "D", "--families", ""], "no family named; there are haze, vignetting"),
        (["synth", "D", "--from", "absent"], "absent: no such folder"),
        (["synth", "D", "--from", "."], ".: no images in this folder"),
        (["synth", "."], "give it a name"),
        (["bench", "--mesh", "data=3"], "mesh data 3, fsdp 1, tensor 1 does not fit 8 devices"),
        (["bench", "--mesh", "data=2,tensor=4", "--batch-size", "4,3"], "batch size 3 does not divide"),
        (["prepare", "--dataset", "ava", "--root", "D", "--out", "R"], "no dataset 'ava'; there are koniq, spaq"),
    ],
    ids=" ".join,
)
def test_options_that_do_not_go_together_exit_with_2(arguments, complaint, deqa, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, err = deqa(*arguments)
    assert (status, out) == (2, "")
    assert is_sentence(err)
    assert complaint in err
    assert list(tmp_path.iterdir()) == []


def test_messages_name_no_internals(deqa):
    _, _, err = deqa("score", "x.png", "--model", "M", "--batch-size", "many")
    assert "_positive" not in err


# ---- score ------------------------------------------------------------------------------------------------


def test_without_a_model_score_uses_the_one_of_the_package_and_says_so_once(deqa, images, caplog):
    builtin_model.announce.cache_clear()
    for _ in range(2):
        status, out, _ = deqa("score", str(images / "square.png"), "--format", "jsonl")
        assert status == 0
        assert 1 < json.loads(out)["score"] < 5
    assert caplog.text.count("no model named: using deqa-tiny") == 1


def test_a_damaged_model_of_the_package_asks_for_a_new_installation(deqa, images, tmp_path, monkeypatch):
    monkeypatch.setattr(builtin_model, "FOLDER", tmp_path)
    status, out, err = deqa("score", str(images / "square.png"))
    assert (status, out) == (1, "")
    assert "install the package again" in err


@pytest.fixture(scope="module")
def expected(converted, images):
    """What the library says of the same folder, by path."""
    paths = [str(path) for path in sorted(images.iterdir())]
    return {str(result.image): result for result in Scorer.from_pretrained(converted).stream(paths)}


def assert_rows(rows, expected, images):
    """Rows of (path, score, std, probabilities) are those of the golden folder, in order."""
    assert [path for path, *_ in rows] == sorted(str(path) for path in images.iterdir())
    assert {path for path, score, *_ in rows if score is None} == {str(images / name) for name in UNREADABLE}
    for path, score, std, probs in rows:
        if score is not None:
            want = expected[path]
            assert np.float32([score, std, *probs]).tolist() == np.float32([want.score, want.std, *want.probs]).tolist()


def test_a_folder_is_scored_as_json_lines(deqa, converted, images, expected):
    status, out, err = deqa("score", images, "--model", converted, "--format", "jsonl")
    rows = [json.loads(line) for line in out.splitlines()]
    assert status == 1
    assert err == "deqa: 3 of 16 images could not be scored\n"
    assert_rows([(row["path"], row["score"], row["std"], row["probs"]) for row in rows], expected, images)
    assert {row["path"]: row["error"] for row in rows if row["error"]} == {
        path: result.error for path, result in expected.items() if result.error
    }


def test_a_folder_is_scored_as_comma_separated_values(deqa, converted, images, expected):
    status, out, err = deqa("score", images, "--model", converted, "--format", "csv")
    assert status == 1
    assert "3 of 16" in err
    header, *records = csv.reader(io.StringIO(out, newline=""))
    assert header == ["path", "score", "std", *LEVELS, "error"]
    numbers = [[float(x) if x else None for x in record[1:-1]] for record in records]
    rows = [(record[0], *row[:2], row[2:]) for record, row in zip(records, numbers, strict=True)]
    assert_rows(rows, expected, images)
    assert all(bool(record[-1]) == (record[1] == "") for record in records)


def test_a_folder_is_scored_as_a_table(deqa, converted, images, expected):
    status, out, err = deqa("score", images, "--model", converted)
    assert status == 1
    assert "3 of 16" in err
    header, *lines = out.splitlines()
    assert header.split() == ["score", "std", *LEVELS, "path"]
    assert len(lines) == 16
    for line, (path, result) in zip(lines, expected.items(), strict=True):
        assert path in line
        assert line.split()[0] == ("-" if result.error else f"{result.score:.3f}")


def test_an_image_above_the_limit_is_a_row_with_an_error(deqa, converted, tmp_path):
    for side in (40, 50):
        Image.new("RGB", (side, side)).save(tmp_path / f"{side}.png")
    options = ("--model", converted, "--format", "jsonl", "--input-size-limit", "0.002")
    status, out, err = deqa("score", tmp_path, *options)
    small, large = (json.loads(line) for line in out.splitlines())
    assert status == 1
    assert err == "deqa: 1 of 2 images could not be scored\n"
    assert small["error"] is None
    assert large["error"] == f"{tmp_path / '50.png'}: 50x50 pixels; the limit is 0.002 megapixels"


@pytest.mark.parametrize(
    ("options", "passed"),
    [
        (
            [],
            {
                "dtype": "auto",
                "batch_size": None,
                "prompt": "scorer",
                "mesh": None,
                "int8_activations": False,
                "input_size_limit": None,
            },
        ),
        (
            [
                *("--dtype", "bfloat16", "--batch-size", "4", "--prompt", "eval", "--mesh", "data=2,tensor=4"),
                *("--int8-activations", "--input-size-limit", "12.5"),
            ],
            {
                "dtype": "bfloat16",
                "batch_size": 4,
                "prompt": "eval",
                "mesh": MeshConfig(data=2, fsdp=1, tensor=4),
                "int8_activations": True,
                "input_size_limit": 12.5,
            },
        ),
    ],
    ids=["defaults", "all"],
)
def test_options_of_score_reach_the_scorer(options, passed, deqa, images, monkeypatch):
    calls = []

    def from_pretrained(model, **given):
        calls.append((model, given))
        raise CheckpointError("far enough")

    monkeypatch.setattr(Scorer, "from_pretrained", from_pretrained)
    assert deqa("score", images, "--model", "M", *options) == (1, "", "deqa: far enough\n")
    assert calls == [("M", passed)]


def test_rows_go_to_the_output_file(deqa, converted, images, tmp_path):
    output = tmp_path / "scores.csv"
    status, out, err = deqa("score", images / "tall.jpg", "--model", converted, "--format", "csv", "--output", output)
    assert (status, out, err) == (0, "", "")
    assert [line.split(",")[0] for line in output.read_text().splitlines()] == ["path", str(images / "tall.jpg")]


def test_a_list_on_standard_input_is_scored(deqa, converted, images, tmp_path, monkeypatch):
    strange = tmp_path / 'naïve, "图像".png'
    shutil.copy(images / "gray.png", strange)
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{strange}\nabsent.png\n"))
    status, out, err = deqa("score", "-", images / "gr*.png", "--model", converted, "--format", "jsonl")
    first, absent, second = [json.loads(line) for line in out.splitlines()]
    assert first["path"] == str(strange)
    assert first["score"] == second["score"]
    assert absent["error"] == "absent.png: no such file"
    assert (status, err) == (1, "deqa: 1 of 3 images could not be scored\n")


def test_a_list_separated_by_nul_is_an_error_of_its_row(deqa, converted, monkeypatch):
    """As `find -print0` writes it."""
    monkeypatch.setattr("sys.stdin", io.StringIO("a.png\0b.png\0"))
    status, out, _ = deqa("score", "-", "--model", converted, "--format", "jsonl")
    assert status == 1
    assert json.loads(out)["error"]


@pytest.mark.parametrize("to", ["file", "stdout"])
def test_a_name_that_is_not_unicode_is_scored(to, deqa, converted, images, tmp_path):
    """Linux file names are bytes; old archives are full of Latin-1."""
    shutil.copy(os.fsencode(images / "gray.png"), os.fsencode(tmp_path) + b"/caf\xe9.png")
    output = ("--output", tmp_path / "rows") if to == "file" else ()
    status, out, err = deqa("score", tmp_path, "--model", converted, "--format", "jsonl", *output)
    assert (status, err) == (0, "")
    row = json.loads((tmp_path / "rows").read_text() if to == "file" else out)
    assert "caf" in row["path"]
    assert row["score"] > 1


@pytest.fixture
def unused_model(monkeypatch):
    """No usage error may wait for a model to load."""
    monkeypatch.setattr(Scorer, "from_pretrained", lambda *_, **__: pytest.fail("loaded a model"))
    return "M"


def test_an_existing_output_is_left_alone(deqa, unused_model, images, tmp_path):
    output = tmp_path / "scores.csv"
    output.write_text("mine")
    status, out, err = deqa("score", images, "--model", unused_model, "--output", output)
    assert (status, out) == (2, "")
    assert err == f"deqa: {output} exists already; remove it or choose another name\n"
    assert output.read_text() == "mine"


def test_an_output_in_a_missing_folder_is_refused(deqa, unused_model, images, tmp_path):
    status, out, err = deqa("score", images, "--model", unused_model, "--output", tmp_path / "absent" / "scores.csv")
    assert (status, out) == (2, "")
    assert is_sentence(err)
    assert "no such folder" in err


def test_an_output_that_is_a_dangling_link_is_refused(deqa, unused_model, images, tmp_path):
    (tmp_path / "link").symlink_to("nowhere")
    status, _, err = deqa("score", images, "--model", unused_model, "--output", tmp_path / "link")
    assert status == 2
    assert is_sentence(err)


@pytest.mark.parametrize(
    ("path", "complaint"),
    [("-", "no images named"), ("folder", "no images in this folder"), ("*.bmp", "matches no file")],
)
def test_nothing_to_score_is_bad_usage(path, complaint, deqa, unused_model, tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    status, out, err = deqa("score", path, "--model", unused_model)
    assert (status, out) == (2, "")
    assert is_sentence(err)
    assert complaint in err


@pytest.mark.parametrize("model", ["/no/such/model", "no-such-model", "nobody/no-such-model"])
def test_an_unknown_model_is_a_sentence(model, deqa, images):
    """The last one is a hub id, and these tests are off line."""
    status, out, err = deqa("score", images, "--model", model)
    assert (status, out) == (1, "")
    assert is_sentence(err)
    assert model in err
    assert "no such folder" in err


def test_a_model_that_is_a_file_is_a_sentence(deqa, images):
    status, out, err = deqa("score", images, "--model", images / "gray.png")
    assert (status, out) == (1, "")
    assert is_sentence(err)
    assert "gray.png: a file" in err


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("params/_METADATA", b""),
        ("tokenizer.model", b"garbage"),
        ("tokenizer.model", None),
        ("preprocessor_config.json", b"{}"),
        ("provenance.json", b"["),
        ("config.json", b'{"format": "deqa-jax", "version": 1}'),
        ("config.json", b"{}"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_damaged_model_is_a_sentence(name, content, deqa, converted, images, tmp_path):
    damaged = shutil.copytree(converted, tmp_path / "M", ignore=lambda folder, _: ["d"])
    if content is None:
        (damaged / name).unlink()
    else:
        (damaged / name).write_bytes(content)
    status, out, err = deqa("score", images, "--model", damaged)
    assert (status, out) == (1, "")
    assert is_sentence(err)
    assert str(damaged) in err


def test_a_published_model_is_converted_once(deqa, published, images, caplog, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    models = tmp_path / "deqa-jax" / "models"
    arguments = ("score", images / "gray.png", "--model", published, "--format", "jsonl")
    first = deqa(*arguments)
    (made,) = models.iterdir()
    assert Checkpoint.open(made).published_config is not None
    written = (made / "config.json").stat().st_mtime_ns, made.stat().st_ino
    second = deqa(*arguments)
    assert first == second
    assert first[0] == 0
    assert list(models.iterdir()) == [made]
    assert ((made / "config.json").stat().st_mtime_ns, made.stat().st_ino) == written
    told = [record.getMessage() for record in caplog.records if record.levelno == logging.INFO]
    assert told == [f"converting {published} once into {made}"]


def test_an_unusable_cache_is_a_sentence(deqa, published, images, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file" / "cache"))
    status, _, err = deqa("score", images, "--model", published)
    assert status == 2
    assert is_sentence(err)


# ---- interruptions ----------------------------------------------------------------------------------------


def test_control_c_keeps_the_finished_rows(converted, images, tmp_path):
    output = tmp_path / "scores.jsonl"
    paths = tmp_path / "paths"
    paths.write_text(f"{images / 'gray.png'}\n" * 3000)
    with paths.open() as stdin:
        process = start("score", "-", "--model", converted, "--format", "jsonl", "--output", output, stdin=stdin)
    deadline = time.monotonic() + 120
    while process.poll() is None and not (output.exists() and output.read_bytes().count(b"\n") > 3):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == "deqa: interrupted; what was finished is written\n"
    rows = output.read_text()
    assert rows.endswith("\n")
    assert 3 < len([json.loads(row) for row in rows.splitlines()]) < 3000


def test_a_reader_that_goes_away_is_no_traceback(converted, images, tmp_path):
    paths = tmp_path / "paths"
    paths.write_text(f"{images / 'gray.png'}\n" * 3000)
    with paths.open() as stdin:
        process = start("score", "-", "--model", converted, "--format", "jsonl", stdin=stdin, stdout=subprocess.PIPE)
    assert json.loads(process.stdout.readline())["score"] > 1
    process.stdout.close()
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (1, "")


# ---- synth ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "passed", "source"),
    [
        ([], SyntheticSettings(), None),
        (
            ["--scenes", "7", "--versions", "3", "--families", "haze,jpeg", "--test-ratio", "0.5", "--seed", "9"],
            SyntheticSettings(scenes=7, versions=3, families=("haze", "jpeg"), test_ratio=0.5, seed=9),
            None,
        ),
        (["--from", "photos"], SyntheticSettings(), Path("photos")),
    ],
    ids=["defaults", "all", "from"],
)
def test_options_of_synth_reach_it_and_the_next_step_is_named(options, passed, source, deqa, monkeypatch):
    calls = []
    monkeypatch.setattr(synthetic, "synthesize", lambda *given, **named: calls.append((given, named)))
    assert deqa("synth", "my D", *options) == (0, "", "next: deqa labels --config 'my D/labels.json'\n")
    assert calls == [((Path("my D"), passed), {"source": source})]


def test_help_of_synth_names_the_defaults(deqa):
    _, help, _ = deqa("synth", "--help")
    defaults = SyntheticSettings()
    found = re.findall(r"\(default: (\S+)\)", " ".join(help.split()))
    assert found == [str(x) for x in (defaults.scenes, defaults.versions, "all", defaults.test_ratio, defaults.seed)]


def test_labels_go_on_with_what_synth_makes(deqa, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(synthetic, "_SIDES", (24, 40))
    monkeypatch.setattr(synthetic, "_in_processes", lambda jobs: (synthetic._write_scene(job) for job in jobs))
    status, out, err = deqa("synth", "D", "--scenes", 2, "--versions", 3, "--test-ratio", 0.5)
    assert (status, out) == (0, "")
    assert caplog.messages == ["D: 6 images of 2 scenes"]
    command = err.removeprefix("next: deqa ").split()
    status, out, _ = deqa(*command)
    assert status == 0
    assert "of 6" in out
    metas = read_metas(tmp_path / "D" / "metas" / "test.json")
    assert [(tmp_path / item.image).is_file() for item in metas] == [True] * 3


@pytest.mark.parametrize("out", ["full", "file", "file/D"])
def test_synth_refuses_a_place_it_cannot_have(out, deqa, tmp_path, monkeypatch):
    monkeypatch.setattr(synthetic, "_in_processes", lambda jobs: pytest.fail("made for nothing"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    (tmp_path / "file").write_text("mine")
    status, out, err = deqa("synth", tmp_path / out)
    assert (status, out) == (2, "")
    assert is_sentence(err)
    assert len(list(tmp_path.rglob("*"))) == 3


@pytest.mark.parametrize(("awaited", "seconds"), [(".D*", 0.5), (".D*/images/*", 0)], ids=["starting", "drawing"])
def test_control_c_leaves_nothing_of_a_dataset(awaited, seconds, tmp_path):
    """A terminal sends it to all processes; one of them speaks, whatever the others were at."""
    process = start("synth", tmp_path / "D", "--scenes", 1000, start_new_session=True)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob(awaited)):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    time.sleep(seconds)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == "deqa: interrupted; what was finished is written\n"
    assert list(tmp_path.iterdir()) == []


# ---- info -------------------------------------------------------------------------------------------------


def test_info_describes_a_converted_folder(deqa, converted, published):
    status, out, err = deqa("info", converted)
    assert (status, err) == (0, "")
    assert out.startswith(f"{converted}: a converted checkpoint\n")
    for part in ("parameters  4.4 M", "4.4 M in float32", f"source      {published}", "model.safetensors"):
        assert part in out
    for part in ("2 layers of 48, 448 pixels in patches of 14", "64 queries", "3 layers of 64, vocabulary of 32000"):
        assert part in out


def test_info_describes_a_published_folder(deqa, published):
    status, out, err = deqa("info", published)
    assert (status, err) == (0, "")
    assert out.startswith(f"{published}: a published checkpoint")
    for part in ("parameters  4.4 M", "in float16", "file        model.safetensors"):
        assert part in out


def test_info_of_anything_else_is_a_sentence(deqa, images, converted, tmp_path):
    damaged = shutil.copytree(converted, tmp_path / "M", ignore=lambda folder, _: ["d"])
    (damaged / "params" / "_METADATA").unlink()
    for model in (tmp_path / "absent", images, images / "gray.png", damaged):
        status, out, err = deqa("info", model)
        assert (status, out) == (1, "")
        assert is_sentence(err)
        assert str(model) in err


# ---- init -------------------------------------------------------------------------------------------------


def test_init_makes_a_model_that_scores(deqa, images, tmp_path):
    status, out, err = deqa("init", tmp_path / "M", "--dtype", "bfloat16")
    assert (status, out) == (0, "")
    status, out, err = deqa("score", images / "gray.png", "--model", tmp_path / "M", "--format", "jsonl")
    assert (status, err) == (0, "")
    assert 1 <= json.loads(out)["score"] <= 5
    status, out, _ = deqa("info", tmp_path / "M")
    assert status == 0
    assert "4.4 M in bfloat16" in out
    assert "scores mean nothing" in out


@pytest.mark.parametrize(
    ("options", "passed"),
    [
        ([], {"size": "test", "seed": 0, "dtype": "float32", "pictures": None}),
        (
            ["--size", "mid", "--seed", "5", "--dtype", "float16", "--pictures", "P"],
            {"size": "mid", "seed": 5, "dtype": "float16", "pictures": Path("P")},
        ),
    ],
    ids=["defaults", "all"],
)
def test_options_of_init_reach_it(options, passed, deqa, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(random_model, "init", lambda out, **given: calls.append((out, given)))
    assert deqa("init", tmp_path / "M", *options) == (0, "", "")
    assert calls == [(tmp_path / "M", passed)]


@pytest.mark.parametrize("out", ["folder", "file", "file/M", "file/deeper/M"])
def test_init_refuses_a_place_it_cannot_have(out, deqa, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine")
    status, _, err = deqa("init", tmp_path / out)
    assert status == 2
    assert is_sentence(err)
    assert (tmp_path / "file").read_text() == "mine"
    assert len(list(tmp_path.rglob("*"))) == 2


def test_a_seed_too_large_is_bad_usage(deqa, tmp_path):
    status, _, err = deqa("init", tmp_path / "M", "--seed", 2**70)
    assert status == 2
    assert str(2**70) in err
