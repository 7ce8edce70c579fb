"""`deqa infer`: the published lines, and files that any interruption leaves fit to go on with."""

import contextlib
import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deqa_jax.checkpoint import Checkpoint
from deqa_jax.config import MeshConfig
from deqa_jax.data.datasets import DATASETS, named
from deqa_jax.data.metas import MetaError
from deqa_jax.infer import ImageSet, InferenceError, infer, metas_of, sets_of_files, sets_of_records
from deqa_jax.prompt import LEVELS
from deqa_jax.scorer import Result, Scorer

FIELDS = ["id", "image", "gt_score", "logits", "probs", "score", "std"]
NAMES = ("a.png", "b.jpg", "deep/c.bmp", "naïve, 图像.png", "e f.jpg", "g.png")


@pytest.fixture(scope="module")
def scorer(converted):
    """As `deqa infer` opens it."""
    return Scorer.from_pretrained(converted, prompt="eval")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A few small images; read only."""
    folder = tmp_path_factory.mktemp("pictures")
    for seed, name in enumerate(NAMES):
        draw(folder / name, seed)
    return folder


@pytest.fixture
def unused_model(monkeypatch):
    """No usage error may wait for a model to load."""
    monkeypatch.setattr(Scorer, "from_pretrained", lambda *_, **__: pytest.fail("loaded a model"))
    return "M"


class Pretended:
    """Stands for a scorer where only files matter: its numbers are made of an image's bytes, and it counts."""

    identity, prompt, dtype, batch_size, int8_activations = "cafe", "eval", "float32", 1, False

    def __init__(self, **changed):
        self.__dict__.update(changed)
        self.asked = []

    def stream(self, images, *, open_set):
        assert open_set
        for image in images:
            self.asked.append(Path(image).name)
            if Path(image).is_file():
                numbers = np.random.default_rng(zlib.crc32(Path(image).read_bytes())).random(17, np.float32).tolist()
                yield Result(image, *numbers[:2], *map(tuple, (numbers[2:7], numbers[7:12], numbers[12:])))
            else:
                yield Result(image, error=f"{image}: no such file")


def draw(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    size = (20 + seed % 7, 30 - seed % 5)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)).save(path)


def metas(path, names=NAMES, **fields):
    """Writes metas as they are published: MOS in the id, a JSON list."""
    entries = [{"id": f"{n}->{i / 3}", "image": n, "gt_score": i / 3, **fields} for i, n in enumerate(names)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(entries))
    return path


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def ids(path):
    return [row["id"] for row in rows(path)]


def snapshot(folder):
    """All that could change in a folder."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {path: (path.read_bytes(), path.stat().st_mtime_ns, path.stat().st_ino) for path in files}


def is_sentence(text):
    return text.startswith("deqa: ") and text.endswith("\n") and "Traceback" not in text and len(text) > 20


# ---- lines ------------------------------------------------------------------------------------------------


def test_a_line_has_the_published_fields_and_what_predict_says(scorer, pictures, tmp_path):
    sets = sets_of_files([metas(tmp_path / "test.json")], pictures)
    assert infer(scorer, sets, tmp_path / "out") == 0
    said = scorer.predict([pictures / name for name in NAMES], open_set=True)
    found = rows(tmp_path / "out" / "test.json")
    assert [list(row) for row in found] == [FIELDS] * len(NAMES)
    assert [list(row[field]) for row in found for field in ("logits", "probs")] == [list(LEVELS)] * 2 * len(NAMES)
    for i, row in enumerate(found):
        assert row == {
            "id": f"{NAMES[i]}->{i / 3}",
            "image": NAMES[i],
            "gt_score": i / 3,
            "logits": dict(zip(LEVELS, said.logits[i].tolist(), strict=True)),
            "probs": dict(zip(LEVELS, said.open_probs[i].tolist(), strict=True)),
            "score": said.score[i].item(),
            "std": said.std[i].item(),
        }
    assert {row["score"] for row in found} == set(said.score.tolist())
    assert len({row["score"] for row in found}) == len(NAMES)


def test_what_the_metas_do_not_say_is_left_out_or_taken_from_the_image(pictures, tmp_path):
    entries = [
        {"image": "a.png"},
        {"id": "x", "img_path": "b.jpg", "gt_score": None},
        {"id": 7, "image": "e f.jpg", "gt_score": 3, "std": 0.5, "level_probs": [0, 0, 1, 0, 0]},
    ]
    (tmp_path / "test.json").write_text(json.dumps(entries))
    assert infer(Pretended(), sets_of_files([tmp_path / "test.json"], pictures), tmp_path / "out") == 0
    first, second, third = rows(tmp_path / "out" / "test.json")
    assert (first["id"], first["image"], "gt_score" in first) == ("a.png", "a.png", False)
    assert (second["id"], second["image"], "gt_score" in second) == ("x", "b.jpg", False)
    assert (third["id"], third["gt_score"], list(third)) == ("7", 3, FIELDS)


def test_lines_are_in_the_order_of_the_metas(pictures, tmp_path):
    names = list(NAMES)
    for seed in range(5):
        random.Random(seed).shuffle(names)
        path = metas(tmp_path / f"{seed}.json", names)
        infer(Pretended(), sets_of_files([path], pictures), tmp_path / "out")
        assert [row["image"] for row in rows(tmp_path / "out" / path.name)] == names


def test_two_sets_of_one_run_may_share_images(pictures, tmp_path):
    sets = sets_of_files([metas(tmp_path / "one.json"), metas(tmp_path / "deep" / "two.json", NAMES[::-2])], pictures)
    assert infer(Pretended(), sets, tmp_path / "new" / "out") == 0
    assert [row["image"] for row in rows(tmp_path / "new" / "out" / "one.json")] == list(NAMES)
    assert [row["image"] for row in rows(tmp_path / "new" / "out" / "two.json")] == list(NAMES[::-2])
    assert sorted(path.name for path in (tmp_path / "new" / "out").iterdir()) == ["one.json", "run.json", "two.json"]


def test_ids_that_break_lines_break_no_lines(pictures, tmp_path):
    strange = ["a\nb", "c\rd", "e\u2028f", "g\x85h", '"quoted"\\', "\U0001f600"]
    entries = [{"id": id, "image": name} for id, name in zip(strange, NAMES, strict=True)]
    (tmp_path / "test.json").write_text(json.dumps(entries))
    sets = sets_of_files([tmp_path / "test.json"], pictures)
    infer(Pretended(), sets, tmp_path / "out")
    path = tmp_path / "out" / "test.json"
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    assert [json.loads(line)["id"] for line in lines] == strange
    path.write_bytes(b"".join(lines[::-1][:4]))
    again = Pretended()
    infer(again, sets, tmp_path / "out")
    assert again.asked == ["a.png", "b.jpg"]
    assert path.read_bytes() == whole


def test_a_name_that_is_not_unicode_is_predicted(scorer, pictures, tmp_path):
    """Python reads it from metas with an escape, as it would have written it there."""
    shutil.copy(os.fsencode(pictures / "a.png"), os.fsencode(tmp_path) + b"/caf\xe9.png")
    sets = sets_of_files([metas(tmp_path / "test.json", ["caf\udce9.png"])], tmp_path)
    for _ in range(2):
        assert infer(scorer, sets, tmp_path / "out") == 0
        (row,) = rows(tmp_path / "out" / "test.json")
        assert row["image"] == "caf\udce9.png"
        assert row["score"] == scorer.predict([pictures / "a.png"], open_set=True).score[0]


def test_what_made_the_predictions_is_noted(scorer, converted, pictures, tmp_path):
    infer(scorer, sets_of_files([metas(tmp_path / "test.json")], pictures), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "run.json").read_text()) == {
        "model": Checkpoint.open(converted).identity,
        "prompt": "eval",
        "dtype": "float32",
        "batch_size": 1,
    }


# ---- the command line -------------------------------------------------------------------------------------


def test_the_command_follows_the_eval_prompt(deqa, scorer, converted, pictures, tmp_path):
    arguments = ("infer", "--model", converted, "--root", pictures, "--out", tmp_path / "command", "--meta")
    one, two = metas(tmp_path / "one.json"), metas(tmp_path / "two.json", NAMES[:2])
    status, out, err = deqa(*arguments, one, two)
    assert (status, out, err) == (0, "", "")
    infer(scorer, sets_of_files([one, two], pictures), tmp_path / "library")
    written = {path.name: path.read_bytes() for path in (tmp_path / "library").iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "command").iterdir()} == written
    before = snapshot(tmp_path / "command")
    status, out, err = deqa(*arguments, one, "--prompt", "scorer")
    assert (status, out) == (1, "")
    assert is_sentence(err)
    assert "prompt eval (now scorer)" in err
    assert snapshot(tmp_path / "command") == before


@pytest.mark.parametrize(
    ("options", "passed"),
    [
        (
            [],
            {
                "dtype": "auto",
                "batch_size": None,
                "prompt": "eval",
                "mesh": None,
                "int8_activations": False,
                "input_size_limit": None,
            },
        ),
        (
            [
                *("--dtype", "bfloat16", "--batch-size", "4", "--prompt", "scorer", "--mesh", "data=2,tensor=4"),
                *("--int8-activations", "--input-size-limit", "12.5"),
            ],
            {
                "dtype": "bfloat16",
                "batch_size": 4,
                "prompt": "scorer",
                "mesh": MeshConfig(data=2, fsdp=1, tensor=4),
                "int8_activations": True,
                "input_size_limit": 12.5,
            },
        ),
    ],
    ids=["defaults", "all"],
)
def test_options_reach_the_scorer(options, passed, deqa, pictures, tmp_path, monkeypatch):
    calls = []

    def from_pretrained(model, **given):
        calls.append((model, given))
        return Pretended()

    monkeypatch.setattr(Scorer, "from_pretrained", from_pretrained)
    path = metas(tmp_path / "test.json")
    arguments = ("infer", "--model", "M", "--meta", path, "--root", pictures, "--out", tmp_path / "out")
    assert deqa(*arguments, *options) == (0, "", "")
    assert calls == [("M", passed)]
    assert len(rows(tmp_path / "out" / "test.json")) == len(NAMES)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ([], "--meta --dataset"),
        (["--meta", "x.json", "--dataset", "koniq", "--root", "."], "--dataset"),
        (["--meta", "x.json"], "--root DIR"),
        (["--dataset", "koniq"], "--root DIR, or --records DIR"),
        (["--dataset", "koniq", "--root", ".", "--records", "."], "--root DIR, or --records DIR"),
        (["--meta", "x.json", "--records", "."], "--records goes with --dataset"),
        (["--dataset", "KONIQ", "--root", "."], "'KONIQ'; there are koniq, spaq, kadid"),
        (["--dataset", "koniq, spaq", "--root", "."], "' spaq'"),
        (["--dataset", "", "--records", "."], "''"),
        (["--dataset", "koniq,live,,x", "--records", "."], "'live', '', 'x'"),
    ],
    ids=" ".join,
)
def test_bad_usage_exits_with_2_before_a_model_is_loaded(options, complaint, deqa, unused_model, tmp_path):
    status, out, err = deqa("infer", "--model", unused_model, "--out", tmp_path / "out", *options)
    assert (status, out) == (2, "")
    assert complaint in err
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_an_output_folder_must_be_named(deqa):
    status, _, err = deqa("infer", "--model", "M", "--meta", "x.json", "--root", ".")
    assert status == 2
    assert "--out" in err


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "no such file"),
        ("{}", "not a JSON list"),
        ("[", "not JSON"),
        ("[]", "lists no images"),
        ('[{"id": "x"}]', "entry 0: no 'image'"),
        ('[{"image": "x"}, {"image": "x"}]', "'x' is there twice"),
    ],
)
def test_metas_that_cannot_be_used_are_named(content, complaint, deqa, unused_model, tmp_path):
    good, bad = metas(tmp_path / "good.json"), tmp_path / "bad.json"
    if content is not None:
        bad.write_text(content)
    status, out, err = deqa(
        "infer", "--model", unused_model, "--meta", good, bad, "--root", tmp_path, "--out", tmp_path / "out"
    )
    assert (status, out) == (1, "")
    assert is_sentence(err)
    assert f"{bad}: " in err
    assert complaint in err
    assert not (tmp_path / "out").exists()


def test_two_metas_of_one_name_are_refused(deqa, unused_model, tmp_path):
    one, two = metas(tmp_path / "one" / "test.json"), metas(tmp_path / "two" / "test.json")
    for pair in ((one, two), (one, one)):
        status, _, err = deqa(
            "infer", "--model", unused_model, "--meta", *pair, "--root", tmp_path, "--out", tmp_path / "out"
        )
        assert status == 1
        assert is_sentence(err)
        assert "two metas are called test.json" in err
        assert "different folders" in err


@pytest.mark.parametrize("name", ["run.json", "errors.jsonl"])
def test_metas_with_the_name_of_another_file_of_the_folder_are_refused(name, tmp_path):
    with pytest.raises(InferenceError, match=f"{name} .*rename the metas"):
        sets_of_files([metas(tmp_path / name)], tmp_path)


def test_a_missing_model_is_a_sentence(deqa, pictures, tmp_path):
    path = metas(tmp_path / "test.json")
    status, out, err = deqa(
        "infer", "--model", tmp_path / "absent", "--meta", path, "--root", pictures, "--out", tmp_path / "out"
    )
    assert (status, out) == (1, "")
    assert is_sentence(err)
    assert f"{tmp_path / 'absent'}: no such folder" in err
    assert not (tmp_path / "out").exists()


def test_an_output_that_is_a_file_is_left_alone(deqa, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(Scorer, "from_pretrained", lambda *_, **__: Pretended())
    (tmp_path / "out").write_text("mine")
    arguments = ("infer", "--model", "M", "--meta", metas(tmp_path / "test.json"), "--root", pictures, "--out")
    for out in (tmp_path / "out", tmp_path / "out" / "deeper"):
        status, _, err = deqa(*arguments, out)
        assert status == 2
        assert is_sentence(err)
        assert str(tmp_path / "out") in err
    assert (tmp_path / "out").read_text() == "mine"


# ---- published datasets and records -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A tiny Data-DeQA-Score: two of the eight, one image that is none; read only."""
    root = tmp_path_factory.mktemp("Data-DeQA-Score")
    koniq = [f"KONIQ/images/{i}.jpg" for i in range(5)]
    kadid = [f"KADID10K/images/I0{i}_01_0{i}.png" for i in range(12)]
    for seed, name in enumerate((*koniq, *kadid)):
        draw(root / name, seed)
    (root / kadid[3]).write_bytes(b"no image")
    metas(root / "KONIQ" / "metas" / "test_koniq_2k.json", koniq, std=0.1)
    metas(root / "KADID10K" / "metas" / "test_kadid_2k.json", kadid, std=1 / 7, level_probs=[0, 0, 0.1, 0.2, 0.7])
    return root


def test_metas_of_datasets_have_the_published_places():
    places = [str(path) for path in metas_of(list(DATASETS.values()), Path("D"))]
    assert places == [
        "D/KONIQ/metas/test_koniq_2k.json",
        "D/SPAQ/metas/test_spaq_2k.json",
        "D/KADID10K/metas/test_kadid_2k.json",
        "D/PIPAL/metas/test_pipal_5k.json",
        "D/LIVE-WILD/metas/test_livew_1k.json",
        "D/AGIQA3K/metas/test_agiqa_3k.json",
        "D/TID2013/metas/test_tid2013_3k.json",
        "D/CSIQ/metas/test_csiq_866.json",
    ]


def test_records_give_the_lines_of_the_folders(deqa, converted, data, tmp_path):
    status, out, _ = deqa("prepare", "--dataset", "kadid,koniq", "--root", data, "--out", tmp_path / "records")
    assert status == 0
    assert out.splitlines() == [f"{tmp_path}/records/deqa/{name}/1.0.0" for name in ("kadid", "koniq")]
    arguments = ("infer", "--model", converted, "--dataset", "kadid,koniq")
    for out, source in (("files", ("--root", data)), ("taken", ("--records", tmp_path / "records"))):
        status, stdout, err = deqa(*arguments, *source, "--out", tmp_path / out)
        assert (status, stdout) == (1, "")
        assert err == f"deqa: images that could not be read: 1, listed in {tmp_path / out / 'errors.jsonl'}\n"
    for name, count in (("run.json", 6), ("test_kadid_2k.json", 11), ("test_koniq_2k.json", 5)):
        lines = (tmp_path / "files" / name).read_bytes().splitlines()
        assert len(lines) == count
        assert (tmp_path / "taken" / name).read_bytes().splitlines() == lines
    (error,), (taken) = rows(tmp_path / "files" / "errors.jsonl"), rows(tmp_path / "taken" / "errors.jsonl")
    assert error.pop("error").startswith(str(data / "KADID10K/images/I03_01_03.png"))
    assert [{key: row[key] for key in error} for row in taken] == [error]
    assert "not an image" in taken[0]["error"]


def test_a_dataset_without_its_folder_is_named(deqa, unused_model, data, tmp_path):
    arguments = ("infer", "--model", unused_model, "--dataset", "koniq,spaq", "--out", tmp_path / "out")
    status, _, err = deqa(*arguments, "--root", data)
    assert status == 1
    assert err == f"deqa: {data}/SPAQ/metas/test_spaq_2k.json: no such file\n"
    status, _, err = deqa(*arguments, "--records", tmp_path)
    assert status == 1
    assert err == f"deqa: {tmp_path}: has no records of koniq; `deqa prepare` makes them\n"
    assert not (tmp_path / "out").exists()


def test_a_record_of_another_image_stops_the_run_and_keeps_what_is_written(deqa, data, tmp_path, monkeypatch):
    monkeypatch.setattr(Scorer, "from_pretrained", lambda *_, **__: Pretended())
    assert deqa("prepare", "--dataset", "koniq", "--root", data, "--out", tmp_path / "records")[0] == 0
    (image_set,) = sets_of_records(named("koniq"), tmp_path / "records")

    def failing(index):
        if index == 3:
            raise MetaError("record 3 is another")
        return data / image_set.items[index].image

    torn = ImageSet(image_set.name, image_set.items, failing)
    monkeypatch.setattr("deqa_jax.infer.sets_of_records", lambda *_: [torn])
    arguments = ("infer", "--model", "M", "--dataset", "koniq", "--records", tmp_path, "--out", tmp_path / "out")
    assert deqa(*arguments) == (1, "", "deqa: record 3 is another\n")
    assert ids(tmp_path / "out" / image_set.name) == [item.id for item in image_set.items[:3]]
    scorer = Pretended()
    repaired = ImageSet(image_set.name, image_set.items, lambda index: data / image_set.items[index].image)
    assert infer(scorer, [repaired], tmp_path / "out") == 0
    assert scorer.asked == ["3.jpg", "4.jpg"]
    assert ids(tmp_path / "out" / image_set.name) == [item.id for item in image_set.items]


@pytest.mark.parametrize("absent", ["tensorflow_datasets", "array_record"])
def test_without_the_extra_there_is_a_sentence_that_names_it(absent, deqa, unused_model, tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "deqa_jax.data.tfds_builders", raising=False)
    monkeypatch.setitem(sys.modules, absent, None)
    commands = (
        ("infer", "--model", unused_model, "--records", tmp_path),
        ("prepare", "--root", tmp_path),
    )
    for command in commands:
        status, out, err = deqa(*command, "--dataset", "koniq", "--out", tmp_path / "out")
        assert (status, out) == (1, "")
        assert is_sentence(err)
        assert absent in err
        assert "pip install 'deqa-jax[tfds]'" in err
        assert not (tmp_path / "out").exists()


# ---- images that cannot be read ---------------------------------------------------------------------------


def test_bad_images_are_listed_and_tried_again_until_they_are_repaired(scorer, images, tmp_path):
    root, out = tmp_path / "root", tmp_path / "out"
    names = ["truncated.jpg", "1.png", "missing.png", "2.png", "not_an_image.jpg", "folder.png", "3.png", "empty.png"]
    for name in ("truncated.jpg", "not_an_image.jpg", "empty.png"):
        (root / name).parent.mkdir(exist_ok=True)
        shutil.copy(images / name, root / name)
    (root / "folder.png").mkdir()
    for seed, name in enumerate(("1.png", "2.png", "3.png")):
        draw(root / name, seed)
    sets = sets_of_files([metas(tmp_path / "test.json", names)], root)

    assert infer(scorer, sets, out) == 5
    assert [row["image"] for row in rows(out / "test.json")] == ["1.png", "2.png", "3.png"]
    reasons = {
        "truncated.jpg": "truncated",
        "missing.png": "no such file",
        "not_an_image.jpg": "not an image",
        "folder.png": "is a folder",
        "empty.png": "empty file",
    }
    errors = rows(out / "errors.jsonl")
    assert [row["image"] for row in errors] == list(reasons)
    for row, (name, reason) in zip(errors, reasons.items(), strict=True):
        assert (list(row), row["metas"], row["id"]) == (
            ["metas", "id", "image", "error"],
            "test.json",
            f"{name}->{names.index(name) / 3}",
        )
        assert row["error"].startswith(f"{root / name}: ")
        assert reason in row["error"]

    (root / "folder.png").rmdir()
    left = list(reasons)
    for seed, name in enumerate(["folder.png", "truncated.jpg", "empty.png", "missing.png", "not_an_image.jpg"], 10):
        draw(root / name, seed)
        left.remove(name)
        assert infer(scorer, sets, out) == len(left)
        if left:
            assert [row["image"] for row in rows(out / "errors.jsonl")] == left
            there = [row["image"] for row in rows(out / "test.json")]
            assert name in there
            assert there == [known for known in names if known in there]
    assert not (out / "errors.jsonl").exists()

    infer(scorer, sets, tmp_path / "unbroken")
    assert (out / "test.json").read_bytes() == (tmp_path / "unbroken" / "test.json").read_bytes()
    assert [row["image"] for row in rows(out / "test.json")] == names


def test_bad_images_exit_with_1_and_repaired_ones_with_0(deqa, converted, pictures, tmp_path):
    root = Path(shutil.copytree(pictures, tmp_path / "root"))
    (root / "b.jpg").unlink()
    arguments = ("infer", "--model", converted, "--root", root, "--out", tmp_path / "out", "--meta")
    path = metas(tmp_path / "test.json", NAMES[:3])
    status, out, err = deqa(*arguments, path)
    assert (status, out) == (1, "")
    assert err == f"deqa: images that could not be read: 1, listed in {tmp_path / 'out' / 'errors.jsonl'}\n"
    draw(root / "b.jpg", 1)
    assert deqa(*arguments, path) == (0, "", "")
    assert [row["image"] for row in rows(tmp_path / "out" / "test.json")] == list(NAMES[:3])


def test_a_set_of_bad_images_alone_leaves_an_empty_file(tmp_path):
    sets = sets_of_files([metas(tmp_path / "test.json")], tmp_path / "nowhere")
    for _ in range(2):
        assert infer(Pretended(), sets, tmp_path / "out") == len(NAMES)
        assert (tmp_path / "out" / "test.json").read_bytes() == b""
        assert len(rows(tmp_path / "out" / "errors.jsonl")) == len(NAMES)


def test_errors_of_other_sets_are_kept(pictures, tmp_path):
    root, out = Path(shutil.copytree(pictures, tmp_path / "root")), tmp_path / "out"
    (root / "a.png").unlink()
    one, two = metas(tmp_path / "one.json"), metas(tmp_path / "two.json", NAMES[:2])

    def listed():
        return [(row["metas"], row["image"]) for row in rows(out / "errors.jsonl")]

    assert infer(Pretended(), sets_of_files([one, two], root), out) == 2
    assert listed() == [("one.json", "a.png"), ("two.json", "a.png")]
    assert infer(Pretended(), sets_of_files([one], root), out) == 1
    assert listed() == [("two.json", "a.png"), ("one.json", "a.png")]
    draw(root / "a.png", 0)
    assert infer(Pretended(), sets_of_files([one], root), out) == 0
    assert listed() == [("two.json", "a.png")]
    assert infer(Pretended(), sets_of_files([two], root), out) == 0
    assert not (out / "errors.jsonl").exists()


@pytest.mark.parametrize("rest", [b"", b"\n", b'\n{"metas": "two.json", "id', b"\n\xff\xfe\n[]\n3\n{}\n"])
def test_a_damaged_list_of_errors_keeps_what_can_be_read(rest, pictures, tmp_path):
    """Its last line may be whole but for its end."""
    kept = {"metas": "two.json", "id": "x", "image": "x.png", "error": "é"}
    sets = sets_of_files([metas(tmp_path / "one.json", ["absent.png", "a.png"])], pictures)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "errors.jsonl").write_bytes(json.dumps(kept).encode() + rest)
    assert infer(Pretended(), sets, tmp_path / "out") == 1
    first, second = rows(tmp_path / "out" / "errors.jsonl")
    assert first == kept
    assert second["image"] == "absent.png"


# ---- going on ---------------------------------------------------------------------------------------------


@pytest.fixture
def finished(pictures, tmp_path):
    """A folder with the predictions of two sets, and the sets."""
    sets = sets_of_files([metas(tmp_path / "one.json"), metas(tmp_path / "two.json", NAMES[::-1])], pictures)
    assert infer(Pretended(), sets, tmp_path / "out") == 0
    return tmp_path / "out", sets


def test_a_finished_run_has_nothing_to_do(finished):
    out, sets = finished
    before = {path: (content, inode) for path, (content, _, inode) in snapshot(out).items()}
    again = Pretended()
    assert infer(again, sets, out) == 0
    assert again.asked == []
    assert {path: (content, inode) for path, (content, _, inode) in snapshot(out).items()} == before


def test_a_file_cut_anywhere_is_completed_to_the_same_bytes(finished):
    out, sets = finished
    whole, other = (out / "one.json").read_bytes(), (out / "two.json").read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for length in range(ends[-3], len(whole) + 1):
        (out / "one.json").write_bytes(whole[:length])
        again = Pretended()
        assert infer(again, sets, out) == 0
        assert (out / "one.json").read_bytes() == whole, length
        assert again.asked == [Path(name).name for name in NAMES[sum(end <= length for end in ends) :]]
    assert (out / "two.json").read_bytes() == other


@pytest.mark.parametrize("seed", range(3))
def test_the_model_completes_a_torn_file_to_the_same_bytes(seed, scorer, pictures, tmp_path):
    sets = sets_of_files([metas(tmp_path / "test.json")], pictures)
    infer(scorer, sets, tmp_path / "out")
    path = tmp_path / "out" / "test.json"
    whole = path.read_bytes()
    path.write_bytes(whole[: random.Random(seed).randrange(len(whole))])
    infer(scorer, sets, tmp_path / "out")
    assert path.read_bytes() == whole


def test_any_lines_in_any_order_are_completed_to_the_same_bytes(finished):
    out, sets = finished
    whole = (out / "one.json").read_bytes()
    for seed in range(20):
        lines = whole.splitlines(keepends=True)
        draw = random.Random(seed)
        draw.shuffle(lines)
        (out / "one.json").write_bytes(b"".join(lines[: draw.randrange(len(lines) + 1)]))
        infer(Pretended(), sets, out)
        assert (out / "one.json").read_bytes() == whole


def test_a_run_that_ended_before_it_sorted_its_file_is_sorted_by_the_next(finished):
    """All is predicted then, and nothing left to do but this."""
    out, sets = finished
    whole = (out / "one.json").read_bytes()
    (out / "one.json").write_bytes(b"".join(whole.splitlines(keepends=True)[::-1]))
    again = Pretended()
    infer(again, sets, out)
    assert again.asked == []
    assert (out / "one.json").read_bytes() == whole


def test_more_sets_may_be_added_to_a_folder(finished, pictures, tmp_path):
    out, sets = finished
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    again = Pretended()
    three = sets_of_files([metas(tmp_path / "three.json", NAMES[:2])], pictures)
    assert infer(again, [*sets, *three], out) == 0
    assert again.asked == ["a.png", "b.jpg"]
    assert len(rows(out / "three.json")) == 2
    assert {name: (out / name).read_bytes() for name in before} == before


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, MetaError])
def test_lines_are_written_as_soon_as_they_are_known(error, pictures, tmp_path):
    sets = sets_of_files([metas(tmp_path / "test.json")], pictures)
    seen = []

    class Watching(Pretended):
        def stream(self, images, *, open_set):
            for result in super().stream(images, open_set=open_set):
                seen.append(len(rows(tmp_path / "out" / "test.json")))
                if len(seen) == 5:
                    raise error
                yield result

    with pytest.raises(error):
        infer(Watching(), sets, tmp_path / "out")
    assert seen == [0, 1, 2, 3, 4]
    assert [row["image"] for row in rows(tmp_path / "out" / "test.json")] == list(NAMES[:4])
    again = Pretended()
    assert infer(again, sets, tmp_path / "out") == 0
    assert again.asked == [Path(name).name for name in NAMES[4:]]


# ---- what is refused --------------------------------------------------------------------------------------


def refused(scorer, sets, out, match):
    """A run that must say why not, and change nothing."""
    before = snapshot(out)
    with pytest.raises(InferenceError, match=match) as caught:
        infer(scorer, sets, out)
    assert snapshot(out) == before
    return str(caught.value)


def another(**changed):
    return Pretended(**changed, stream=lambda *_, **__: pytest.fail("asked the model"))


@pytest.mark.parametrize(
    ("field", "value", "match"),
    [
        ("identity", "beef", r"model cafe \(now beef\)"),
        ("prompt", "scorer", r"prompt eval \(now scorer\)"),
        ("dtype", "bfloat16", r"dtype float32 \(now bfloat16\)"),
        ("batch_size", 32, r"batch_size 1 \(now 32\)"),
        ("int8_activations", True, r"int8_activations None \(now True\)"),
    ],
)
def test_another_model_or_other_options_are_refused(field, value, match, finished):
    out, sets = finished
    (out / "one.json").write_bytes((out / "one.json").read_bytes()[:-100])
    message = refused(another(**{field: value}), sets, out, match)
    assert message.startswith(f"{out}: ")
    assert "give the same options, or choose another folder with --out" in message
    assert message.count("(now") == 1


def test_another_model_is_refused_for_sets_that_are_not_there_yet(finished, pictures, tmp_path):
    out, _ = finished
    three = sets_of_files([metas(tmp_path / "three.json")], pictures)
    refused(another(identity="beef"), three, out, "--out")


def test_all_differences_are_named_at_once(finished):
    out, sets = finished
    message = refused(another(identity="beef", dtype="bfloat16"), sets, out, "beef")
    assert "dtype float32 (now bfloat16)" in message


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"{}", b'{"model": "cafe"}'])
def test_a_damaged_note_of_what_made_the_predictions_is_refused(content, finished):
    out, sets = finished
    (out / "run.json").write_bytes(content)
    refused(another(), sets, out, r"choose another folder with --out")


def test_predictions_that_nothing_says_the_maker_of_are_refused(finished):
    out, sets = finished
    (out / "run.json").unlink()
    refused(another(), sets, out, r"one\.json: no run\.json says what made it; choose another folder with --out")


NO_PREDICTIONS = [
    b"",
    b"{",
    b'{"id": "a.png->0.0", "image": "a',
    b'"id"',
    b"null",
    b"[1]",
    b'{"image": "x"}',
    b'{"id": ["x"]}',
    b'{"id": {}}',
    b"[" * 100_000,
    b"\xff\xfe",
    b"\0\0\0",
]


@pytest.mark.parametrize("line", NO_PREDICTIONS, ids=lambda line: repr(line[:20]))
def test_a_damaged_line_is_refused_until_it_is_removed_as_told(line, finished):
    out, sets = finished
    whole = (out / "two.json").read_bytes()
    lines = whole.splitlines(keepends=True)
    (out / "two.json").write_bytes(lines[0] + line + b"\n" + b"".join(lines[2:]))
    message = refused(another(), sets, out, "not a prediction; remove the line, or the file")
    assert message.startswith(f"{out / 'two.json'}:2: ")
    (out / "two.json").write_bytes(lines[0] + b"".join(lines[2:]))
    assert infer(Pretended(), sets, out) == 0
    assert (out / "two.json").read_bytes() == whole


def test_predictions_of_another_image_of_the_same_name_are_refused(finished):
    out, sets = finished
    item = sets[0].items[0]
    moved = dataclasses.replace(item, image="elsewhere/" + item.image)
    changed = [dataclasses.replace(sets[0], items=[moved, *sets[0].items[1:]]), *sets[1:]]
    message = refused(another(), changed, out, "choose another folder with --out")
    assert f"{item.id!r} was predicted of {item.image!r}, but is {moved.image!r} in these metas" in message


@pytest.mark.parametrize("id", ["x.png->1.0", 5, None])
def test_predictions_of_other_metas_are_refused(id, finished):
    out, sets = finished
    with (out / "two.json").open("a") as file:
        file.write(json.dumps({"id": id}) + "\n")
    message = refused(another(), sets, out, "choose another folder with --out")
    assert message.startswith(f"{out / 'two.json'}:{len(NAMES) + 1}: {id!r} is not in these metas")


def test_an_image_predicted_twice_is_refused(finished):
    """Two files put together by hand; `deqa evaluate` would refuse the result."""
    out, sets = finished
    lines = (out / "one.json").read_bytes().splitlines(keepends=True)
    (out / "one.json").write_bytes(b"".join([*lines, lines[0]]))
    message = refused(another(), sets, out, "is there twice; remove the line")
    assert message.startswith(f"{out / 'one.json'}:{len(NAMES) + 1}: ")


def test_a_torn_line_stays_while_another_file_is_refused(finished):
    """Which the message promises by asking for another folder."""
    out, sets = finished
    (out / "one.json").write_bytes((out / "one.json").read_bytes()[:-5])
    (out / "two.json").write_bytes(b'{"id": "of another set"}\n{"id": "a')
    refused(another(), sets, out, "'of another set' is not in these metas")


@pytest.mark.parametrize("indent", [None, 4])
def test_metas_are_never_taken_for_a_torn_prediction(indent, pictures, tmp_path):
    """The folder of results may be the folder of the metas, and they have one name."""
    infer(Pretended(), sets_of_files([metas(tmp_path / "other" / "one.json")], pictures), tmp_path)
    path = tmp_path / "two.json"
    path.write_text(json.dumps([{"image": "a.png"}], indent=indent))
    message = refused(another(), sets_of_files([path], pictures), tmp_path, "not a prediction")
    assert message.startswith(f"{path}:1: ")


# ---- two processes ----------------------------------------------------------------------------------------


def test_a_folder_that_is_written_to_is_refused(finished):
    out, sets = finished
    (out / "one.json").write_bytes((out / "one.json").read_bytes()[:-100])

    class Meeting(Pretended):
        def stream(self, images, *, open_set):
            for result in super().stream(images, open_set=open_set):
                refused(another(), sets, out, "another process is writing predictions there; wait for it, or .*--out")
                yield result

    assert infer(Meeting(), sets, out) == 0
    assert infer(Pretended(), sets, out) == 0


def test_a_failed_run_lets_go_of_its_folder(finished):
    out, sets = finished
    run = (out / "run.json").read_bytes()
    (out / "run.json").write_bytes(b"{}")
    for _ in range(2):
        refused(another(), sets, out, "would not compare")
    (out / "run.json").write_bytes(run)
    assert infer(Pretended(), sets, out) == 0


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Two hundred small images in two sets; read only."""
    folder = tmp_path_factory.mktemp("many")
    for seed in range(200):
        draw(folder / "images" / f"{seed}.png", seed)
    names = [f"images/{seed}.png" for seed in range(200)]
    random.Random(0).shuffle(names)
    metas(folder / "first.json", names[:120])
    metas(folder / "second.json", names[120:])
    return folder


@contextlib.contextmanager
def started(converted, many, out, names=("first.json", "second.json")):
    """`deqa infer` in a process group of its own, which does not outlive the block."""
    command = [sys.executable, "-c", "from deqa_jax.cli import main; main()", "infer", "--model", converted]
    command += ["--meta", *(many / name for name in names), "--root", many, "--out", out]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def lines_of(out):
    files = [out / name for name in ("first.json", "second.json")]
    return sum(path.read_bytes().count(b"\n") for path in files if path.exists())


def wait_for(process, condition):
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.fixture(scope="module")
def unbroken(scorer, many, tmp_path_factory):
    """What a run over all of them writes that nothing stops."""
    out = tmp_path_factory.mktemp("unbroken")
    assert infer(scorer, sets_of_files([many / "first.json", many / "second.json"], many), out) == 0
    assert lines_of(out) == 200
    return {path.name: path.read_bytes() for path in out.iterdir()}


def test_a_second_process_is_refused_while_the_first_runs(deqa, scorer, converted, many, unbroken, tmp_path):
    out, path = tmp_path / "out", many / "second.json"
    with started(converted, many, out, ["second.json"]) as process:
        wait_for(process, lambda: lines_of(out) > 3)
        os.killpg(process.pid, signal.SIGSTOP)
        refused(scorer, sets_of_files([path], many), out, f"{out}: another process is writing predictions there")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Scorer, "from_pretrained", lambda *_, **__: scorer)
            status, _, err = deqa("infer", "--model", "M", "--meta", path, "--root", many, "--out", out)
        assert status == 1
        assert is_sentence(err)
        os.killpg(process.pid, signal.SIGCONT)
        process.communicate(timeout=120)
        assert process.returncode == 0
    assert (out / "second.json").read_bytes() == unbroken["second.json"]


def test_a_run_killed_ten_times_writes_what_an_unbroken_one_does(converted, many, unbroken, tmp_path):
    out, draw = tmp_path / "out", random.Random(0)
    # One as soon as it is noted what makes the predictions, three while the program starts, six after some more lines.
    moments = ["starting"] * 3 + ["writing"] * 6
    draw.shuffle(moments)
    counts = []
    for moment in ("noted", *moments):
        with started(converted, many, out) as process:
            if moment == "noted":
                wait_for(process, (out / "run.json").exists)
            elif moment == "starting":
                time.sleep(draw.random())
            else:
                target = lines_of(out) + draw.randint(1, 20)
                wait_for(process, lambda target=target: lines_of(out) >= target)
            os.killpg(process.pid, signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
        counts.append(lines_of(out))
    assert len(counts) == 10
    assert counts == sorted(counts)
    assert 6 <= counts[-1] < 200  # or the last of them met no run at work
    with started(converted, many, out) as process:
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0
    assert f"first.json: 120 of 120 images predicted, {max(0, 120 - counts[-1])} of them now" in err
    for name in ("first.json", "second.json"):
        assert ids(out / name) == [entry["id"] for entry in json.loads((many / name).read_text())]
    assert {path.name: path.read_bytes() for path in out.iterdir()} == unbroken
