"""A run from its configuration to its best checkpoint, and what is left of it when it is interrupted anywhere."""

import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import yaml
from small_runs import QUICK_FLAGS, description, rating, write_metas, write_tiny

from deqa_jax import metrics
from deqa_jax.checkpoint import Checkpoint
from deqa_jax.config import ConfigError
from deqa_jax.data.pipeline import TrainingData
from deqa_jax.preprocess import ImageError
from deqa_jax.scorer import Scorer
from deqa_jax.sharding import make_mesh
from deqa_jax.train import loop
from deqa_jax.train.evaluation import Evaluator
from deqa_jax.train.loop import TrainingError, needed_fields, train
from deqa_jax.train.objective import Objective
from deqa_jax.train.settings import read_config, write_config

CHECKPOINT_EVERY, EVALUATION_EVERY = 4, 7
LORA = {
    "lora": {"rank": 4, "alpha": 8, "dropout": 0.3},
    "parameters": [{"pattern": "lora_|^vision/|^abstractor/", "multiplier": 1}, {"pattern": "", "multiplier": 0}],
}
FULL = {"optimizer": {"learning_rate": 1e-3, "weight_decay": 0.1, "accumulate": 2}}
# Kind of training -> its settings, its steps, and how often it is killed.
KINDS = {"lora": (LORA, 60, 5), "full": (FULL, 20, 1)}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model, pictures and metas; runs are written beside them."""
    root = tmp_path_factory.mktemp("training")
    write_tiny(root / "M")
    write_metas(root, "train.json", [rating(index) for index in range(7)])
    write_metas(root, "test.json", [rating(index) for index in range(20, 25)])
    return root


def settings(place, output, **changes):
    """A configuration as YAML has it: one pair a device, and everything often."""
    return {
        "model": str(place / "M"),
        "output": str(output),
        "data": {"metas": [str(place / "train.json")], "root": str(place)},
        "evaluation": {"metas": [str(place / "test.json")], "every": EVALUATION_EVERY, "batch_size": 2},
        "optimizer": {"learning_rate": 1e-3},
        "checkpoint": {"every": CHECKPOINT_EVERY},
        "steps": 6,
        "batch_size_per_device": 1,
        "dtype": "float32",
        "remat": "none",
        "seed": 3,
        **changes,
    }


def write_settings(path, tree):
    path.write_text(yaml.safe_dump(tree))
    return path


def start(*arguments, program="from deqa_jax.cli import main; main()", **environment):
    """`deqa` in a process of its own, on one device."""
    return subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "XLA_FLAGS": QUICK_FLAGS, **environment},
    )


def steps_done(folder):
    """The last step that the log says; evaluations come under the number of the next one."""
    path = folder / "log.jsonl"
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return max(
        [json.loads(line)["step"] for line in lines if b"loss" in line and b"evaluation" not in line], default=-1
    )


def wait_for(process, folder, step):
    """Until the log has a step, or the process has ended."""
    deadline = time.monotonic() + 300
    while process.poll() is None and steps_done(folder) < step:
        assert time.monotonic() < deadline
        time.sleep(0.002)


def last_checkpoint(folder):
    """Step and arrays of the last complete training checkpoint."""
    with ocp.CheckpointManager(folder / "checkpoints") as manager:
        step = manager.latest_step()
        return step, restored(manager, step)


def restored(manager, step):
    state = manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore()))["state"]
    return [np.asarray(leaf) for leaf in _leaves(state)]


def _leaves(tree):
    if isinstance(tree, dict):
        return [leaf for name in sorted(tree) for leaf in _leaves(tree[name])]
    if isinstance(tree, list | tuple):
        return [leaf for branch in tree for leaf in _leaves(branch)]
    return [] if tree is None else [tree]


def best_parameters(folder):
    """Everything in a checkpoint that `deqa score` takes, by path."""
    checkpoint = Checkpoint.open(folder)
    return {path: checkpoint.read_own(path) for path in checkpoint.own}


def assert_same_bits(ours, theirs):
    assert len(ours) == len(theirs) > 0
    for one, other in zip(ours, theirs, strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        np.testing.assert_array_equal(one.reshape(-1).view(np.uint8), other.reshape(-1).view(np.uint8))


def assert_same_run(one, other):
    """The same log, the same best checkpoint, the same state to go on from."""
    assert (one / "log.jsonl").read_text() == (other / "log.jsonl").read_text()
    (ours,), (theirs,) = one.glob("best-*"), other.glob("best-*")
    assert ours.name == theirs.name
    ours, theirs = best_parameters(ours), best_parameters(theirs)
    assert ours.keys() == theirs.keys()
    assert_same_bits(list(ours.values()), list(theirs.values()))
    (our_step, ours), (their_step, theirs) = last_checkpoint(one), last_checkpoint(other)
    assert our_step == their_step
    assert_same_bits(ours, theirs)


# ---- interruptions ----------------------------------------------------------------------------------------


def unbroken(place, kind):
    """A run in a process of its own that nothing interrupts: its folder, and what it printed."""
    changes, steps, _ = KINDS[kind]
    folder = place / f"unbroken-{kind}"
    tree = settings(place, folder, steps=steps, **changes)
    process = start("train", "--config_path", write_settings(place / f"{kind}.yaml", tree))
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return folder, out, err


@pytest.fixture(scope="module")
def unbroken_lora(place):
    return unbroken(place, "lora")


@pytest.fixture(scope="module")
def unbroken_full(place):
    return unbroken(place, "full")


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_is_killed_is_the_same_run_bit_for_bit(kind, place, request):
    whole, out, _ = request.getfixturevalue(f"unbroken_{kind}")
    _, steps, times = KINDS[kind]
    # The same command each time; what it is called is no part of the run.
    command = ("train", "--config_path", place / f"{kind}.yaml", "--output", place / f"killed-{kind}")
    folder = command[-1]
    moments = random.Random(0)
    for step in sorted(moments.sample(range(2, steps - 6), times)):
        process = start(*command)
        wait_for(process, folder, step)
        # Anywhere in a step, in an evaluation or while a checkpoint is written.
        time.sleep(moments.uniform(0, 0.05))
        process.kill()
        _, err = process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL, err
        assert step <= steps_done(folder) < steps
    process = start(*command)
    last, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert f"of {steps}" in err
    assert "going on after step" in err
    assert last == out.replace(whole.name, folder.name)
    assert_same_run(folder, whole)
    assert not [path.name for path in folder.iterdir() if "tmp" in path.name]


def test_standard_output_is_the_folder_alone(unbroken_lora):
    folder, out, err = unbroken_lora
    (best,) = folder.glob("best-*")
    assert out == f"{best}\n"
    assert f"best checkpoint: {best}" in err
    assert "Traceback" not in err


def test_a_run_leaves_what_it_says_it_does(unbroken_lora):
    folder, _, _ = unbroken_lora
    found = {path.name for path in folder.iterdir()} - {"tensorboard"}
    (best,) = folder.glob("best-*")
    assert found == {"config.yaml", "log.jsonl", "checkpoints", best.name}
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"56", "60"}
    assert read_config(folder / "config.yaml") == read_config(folder.parent / "lora.yaml")
    entries = log_of(folder)
    assert [entry["step"] for entry in entries if "loss" in entry] == list(range(60))
    assert [entry["step"] for entry in entries if "evaluation" in entry] == [*range(7, 60, 7), 60]
    for entry in entries:
        assert entry.keys() >= (
            {"evaluation"} if "evaluation" in entry else {"loss", "grad_norm", "learning_rate", "rank"}
        )
    losses = [entry["loss"] for entry in entries if "loss" in entry]
    assert len(set(losses)) == 60
    # Each image is seen eight times; what is learnt by heart costs less.
    assert np.mean(losses[-14:]) < np.mean(losses[:14])


def test_the_rate_warms_up_and_falls(unbroken_lora):
    entries = [entry for entry in log_of(unbroken_lora[0]) if "loss" in entry]
    rates = [entry["learning_rate"] for entry in entries]
    # ⌈0.03 · 60⌉ = 2 steps up.
    assert rates[:3] == pytest.approx([0, 5e-4, 1e-3], rel=1e-6)
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert rates[31] == pytest.approx(5e-4, rel=1e-5)


def test_sigterm_saves_and_the_same_command_goes_on(unbroken_lora, place):
    whole, _, _ = unbroken_lora
    folder = place / "terminated"
    command = ("train", "--config_path", place / "lora.yaml", "--output", folder)
    process = start(*command)
    wait_for(process, folder, 21)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (1, "")
    done = steps_done(folder) + 1
    assert 22 <= done < 60
    last = err.splitlines()[-1]
    assert last == f"deqa: asked to stop after step {done} of 60; saved. The same command goes on"
    assert "Traceback" not in err
    # It need not be a step that is due.
    assert last_checkpoint(folder)[0] == done
    process = start(*command)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert f"going on after step {done} of 60" in err
    assert_same_run(folder, whole)


def test_ctrl_c_stops_after_a_step_and_the_second_one_at_once():
    before = signal.getsignal(signal.SIGINT)
    with loop._until_told_to_stop() as told:
        assert not told(0)
        signal.raise_signal(signal.SIGINT)
        assert told(1)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == before


# ---- in this process, on eight devices --------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(place):
    """A short full run on all devices: its configuration and its best checkpoint."""
    config = read_config(write_settings(place / "f.yaml", settings(place, place / "finished", **SHORT)))
    return config, train(config)


SHORT = {"evaluation": {"metas": [], "every": 1}, "checkpoint": {"every": 2, "keep": 2}, "steps": 6}


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def losses_of(folder):
    return [entry["loss"] for entry in log_of(folder) if "loss" in entry]


def copy_of(config, folder):
    """A run's folder under another name, as if it had always had it."""
    shutil.copytree(config.output, folder)
    copied = dataclasses.replace(config, output=str(folder))
    (folder / "config.yaml").write_text(write_config(copied))
    return copied


def test_eight_devices_have_the_losses_of_one(finished, place, monkeypatch):
    config, _ = finished
    assert jax.device_count() == 8
    monkeypatch.setattr(loop, "make_mesh", lambda config: make_mesh(config, jax.devices()[:1]))
    alone = dataclasses.replace(config, output=str(place / "alone"), batch_size_per_device=8)
    train(alone)
    ours, theirs = losses_of(place / "finished"), losses_of(place / "alone")
    assert len(ours) == 6
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    for one, other in zip(log_of(place / "finished"), log_of(place / "alone"), strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-6)


def test_only_the_last_checkpoints_are_kept(finished, place):
    assert {path.name for path in (place / "finished" / "checkpoints").iterdir()} == {"4", "6"}


def test_without_evaluation_the_last_is_the_best(finished, place):
    config, best = finished
    assert best == place / "finished" / "best-6"
    model = Checkpoint.open(best)
    before = Checkpoint.open(config.model)
    assert model.own.keys() == before.own.keys()
    assert not np.array_equal(model.read_leaf(PATH), before.read_leaf(PATH))
    # Everything was trained, and everything in it is what the last checkpoint has.
    step, state = last_checkpoint(place / "finished")
    assert step == 6
    saved = {leaf.tobytes() for leaf in state}
    assert all(leaf.tobytes() in saved for leaf in best_parameters(best).values())


PATH = ("language", "layers", "query", "kernel")


def test_a_finished_run_does_nothing_more(finished, place, monkeypatch):
    config, best = finished
    folder = place / "finished"
    before = {path: path.stat().st_mtime_ns for path in best.rglob("*")}
    log = (folder / "log.jsonl").read_bytes()
    monkeypatch.setattr(loop._Run, "_steps", lambda *_: pytest.fail("another step"))
    assert train(config) == best
    assert {path: path.stat().st_mtime_ns for path in best.rglob("*")} == before
    assert (folder / "log.jsonl").read_bytes() == log


def test_a_torn_last_line_is_written_again(finished, tmp_path):
    """As after a kill in the middle of a write: here step 5, to be done again from the checkpoint after step 4."""
    config, _ = finished
    copied = copy_of(config, tmp_path / "torn")
    whole = (tmp_path / "torn" / "log.jsonl").read_text()
    shutil.rmtree(tmp_path / "torn" / "checkpoints" / "6")
    shutil.rmtree(tmp_path / "torn" / "best-6")
    (tmp_path / "torn" / "log.jsonl").write_text(whole[:-30])
    assert train(copied) == tmp_path / "torn" / "best-6"
    assert (tmp_path / "torn" / "log.jsonl").read_text() == whole
    assert_same_run(tmp_path / "torn", Path(config.output))


def test_steps_before_a_batch_that_cannot_be_read_are_kept(finished, place, monkeypatch):
    config, _ = finished
    rare = dataclasses.replace(config.checkpoint, every=100)
    config = dataclasses.replace(config, output=str(place / "unreadable"), checkpoint=rare)
    batch, seen = loop._Run.batch, []

    def fourth_fails(run, rows):
        seen.append(rows)
        if len(seen) == 4:
            raise ImageError("a.png: truncated")
        return batch(run, rows)

    with monkeypatch.context() as broken:
        broken.setattr(loop._Run, "batch", fourth_fails)
        with pytest.raises(ImageError, match="truncated"):
            train(config)
    assert last_checkpoint(place / "unreadable")[0] == 3
    assert train(config) == place / "unreadable" / "best-6"
    assert_same_run(place / "unreadable", place / "finished")


@pytest.mark.parametrize(("name", "kind"), [("model", Checkpoint), ("data", TrainingData)])
def test_a_run_does_not_go_on_with_another(name, kind, finished, monkeypatch):
    monkeypatch.setattr(kind, "identity", "another")
    with pytest.raises(ConfigError, match=f"finished: {name} changed .* another output"):
        train(finished[0])


def test_another_configuration_is_refused_and_leaves_the_run_alone(finished, place):
    config, _ = finished
    other = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, learning_rate=0.5))
    log = (place / "finished" / "log.jsonl").read_bytes()
    with pytest.raises(ConfigError) as error:
        train(other)
    message = str(error.value)
    assert str(place / "finished") in message
    assert "learning_rate: 0.5" in message
    assert "another output" in message
    assert read_config(place / "finished" / "config.yaml") == config
    assert (place / "finished" / "log.jsonl").read_bytes() == log


NAN = float("nan")


@pytest.mark.parametrize(("srccs", "step"), [([NAN, -0.5, 0.5, 0.25, NAN, 0.5], 3), ([NAN] * 6, 6)])
def test_the_best_evaluation_is_kept_whatever_comes_after(srccs, step, place, monkeypatch):
    """Also where a correlation does not exist, which is worse than any; where none does, it is the last."""
    found, folder = iter(srccs), place / f"best-of-{step}"
    seen = []

    def evaluate(self, params):
        seen.append({path: np.asarray(leaf) for path, leaf in params.items()})
        return {"loss": 1.0, "srcc": next(found), "plcc": 0.0, "js": 0.0}

    monkeypatch.setattr(Evaluator, "__call__", evaluate)
    tree = settings(place, folder, **SHORT)
    tree["evaluation"] = {"metas": [str(place / "test.json")], "every": 1, "batch_size": 3}
    config = read_config(write_settings(place / "b.yaml", tree))
    best = train(config)
    assert best == folder / f"best-{step}"
    assert [path.name for path in folder.glob("*best*")] == [best.name]
    said = {entry["step"]: entry["evaluation"]["srcc"] for entry in log_of(folder) if "evaluation" in entry}
    assert said == {number: None if np.isnan(srcc) else srcc for number, srcc in enumerate(srccs, 1)}
    kept = best_parameters(best)
    assert_same_bits([kept[path] for path in sorted(kept)], [seen[step - 1][path] for path in sorted(kept)])
    assert kept[PATH].tobytes() != seen[0][PATH].tobytes()
    assert Checkpoint.open(best).provenance["evaluation"]["srcc"] == said[step]
    shutil.rmtree(best)
    with pytest.raises(TrainingError, match=f"best-{step}.* is gone"):
        train(config)


def test_the_best_checkpoint_scores_as_it_was_evaluated(unbroken_lora, place):
    """Adapters are merged when it is opened; in training they were beside their kernels."""
    folder, out, _ = unbroken_lora
    best = Path(out.strip())
    evaluations = {entry["step"]: entry["evaluation"] for entry in log_of(folder) if "evaluation" in entry}
    step = int(best.name.removeprefix("best-"))
    assert evaluations[step]["srcc"] == max(found["srcc"] for found in evaluations.values())
    assert min(s for s, found in evaluations.items() if found["srcc"] == evaluations[step]["srcc"]) == step
    entries = json.loads((place / "test.json").read_text())
    prediction = Scorer.from_pretrained(best, dtype="float32", prompt="eval").predict(
        [place / entry["image"] for entry in entries]
    )
    truth = np.array([entry["gt_score"] for entry in entries])
    scores = prediction.score.astype(np.float64)
    assert metrics.srcc(scores, truth) == pytest.approx(evaluations[step]["srcc"], abs=1e-12)
    assert metrics.plcc(scores, truth) == pytest.approx(evaluations[step]["plcc"], abs=1e-4)
    before = Scorer.from_pretrained(place / "M", dtype="float32", prompt="eval").predict(
        [place / entry["image"] for entry in entries]
    )
    assert np.abs(before.score - prediction.score).max() > 1e-3


def test_epochs_are_steps_over_all_sets_and_devices(place):
    """Both tasks, in single images, one set twice; nothing is compiled for this."""
    write_metas(place, "mixed.json", [rating(0), description(1), rating(2)])
    tree = settings(place, place / "mixed", steps=0, epochs=1.5)
    tree["data"] |= {"metas": [str(place / "mixed.json"), str(place / "train.json")], "weights": [2, 1], "pairs": False}
    run = loop._Run(read_config(write_settings(place / "m.yaml", tree)))
    # 13 images in an epoch: one and a half are 19.5, three batches of eight.
    assert (run.data.epoch, run.program.batch_size, run.steps) == (13, 8, 3)
    assert loop._Run(dataclasses.replace(run.config, steps=5)).steps == 5


@pytest.mark.parametrize(
    ("steps", "accumulate", "expected", "warns"), [(5, 4, 8, False), (3, 4, 4, True), (2, 1, 2, False)]
)
def test_the_last_group_of_accumulated_batches_is_whole(steps, accumulate, expected, warns, place, caplog):
    changes = {"steps": steps, "optimizer": {"accumulate": accumulate}}
    tree = settings(place, place / "groups", **changes)
    assert loop._Run(read_config(write_settings(place / "g.yaml", tree))).steps == expected
    assert ("nothing is learnt" in caplog.text) == warns


# ---- the command line -------------------------------------------------------------------------------------


def is_sentence(text):
    return text.startswith("deqa: ") and text.endswith("\n") and "Traceback" not in text and len(text) > 20


def test_a_loss_that_is_no_number_stops_the_run(deqa, place):
    write_tiny(place / "poisoned", poison=True)
    tree = settings(place, place / "nan", **SHORT) | {"model": str(place / "poisoned")}
    status, out, err = deqa("train", "--config_path", write_settings(place / "n.yaml", tree))
    assert (status, out) == (1, "")
    message = err[err.index("deqa: ") :]
    assert is_sentence(message)
    assert message.startswith("deqa: step 0: ")
    assert "loss nan" in message
    assert "learning_rate" in message
    assert str(place / "nan") in message
    assert not list((place / "nan").glob("best-*"))
    assert (place / "nan" / "log.jsonl").read_text() == ""
    assert list((place / "nan" / "checkpoints").iterdir()) == []


def change(tree, name, value):
    """Settings with an entry put in."""
    *sections, last = name.split(".")
    node = tree
    for section in sections:
        node = node.setdefault(section, {})
    node[last] = value
    return tree


@pytest.mark.parametrize(
    ("name", "value", "complaint"),
    [
        ("model", "/no/such/model", "/no/such/model"),
        ("frobnicate", 1, "frobnicate"),
        ("data.metas", ["absent.json"], "absent.json: no such file"),
        ("data.metas", [], "data.metas names nothing"),
        ("data.root", "elsewhere", "there is no image"),
        ("data.weights", [1, 2], "1 sets need as many weights"),
        ("data.system", "chat", "'chat'"),
        ("evaluation.metas", ["absent.json"], "absent.json: no such file"),
        ("parameters", [{"pattern": "vision", "multiplier": 1}], "no rule covers"),
        ("parameters", [{"pattern": "", "multiplier": 0}], "everything is frozen"),
        ("lora", {"targets": ["nothing"]}, "nothing"),
        ("objective.binary_rating_loss", "x", "binary_rating_loss is fidelity or bce"),
    ],
    ids=str,
)
def test_what_cannot_be_trained_is_a_sentence_and_leaves_nothing(name, value, complaint, deqa, place, tmp_path):
    tree = change(settings(place, tmp_path / "run"), name, value)
    status, out, err = deqa("train", "--config_path", write_settings(tmp_path / "c.yaml", tree))
    assert (status, out) == (1, "")
    assert is_sentence(err)
    assert complaint in err
    assert not (tmp_path / "run").exists()


def test_adapters_that_are_not_trained_are_refused(deqa, place, tmp_path):
    """A rule for their matrices was forgotten, or freezes one of the two."""
    tree = settings(place, tmp_path / "run", lora={"rank": 2})
    tree["parameters"] = [{"pattern": "lora_a", "multiplier": 0}, {"pattern": "", "multiplier": 1}]
    status, out, err = deqa("train", "--config_path", write_settings(tmp_path / "c.yaml", tree))
    assert (status, out) == (1, "")
    assert is_sentence(err)
    assert "language/layers/query/lora_a" in err


def test_a_picture_that_cannot_be_read_is_named(deqa, place, tmp_path):
    (tmp_path / "pictures").mkdir()
    for index in (0, 1):
        (tmp_path / "pictures" / f"{index}.png").write_bytes(b"no picture")
    write_metas(tmp_path, "bad.json", [rating(0), rating(1)])
    tree = settings(place, tmp_path / "run", **SHORT)
    tree["data"] = {"metas": [str(tmp_path / "bad.json")], "root": str(tmp_path)}
    status, out, err = deqa("train", "--config_path", write_settings(tmp_path / "c.yaml", tree))
    assert (status, out) == (1, "")
    assert is_sentence(err)
    assert ".png" in err


def test_a_missing_configuration_is_a_sentence(deqa, tmp_path):
    status, out, err = deqa("train", "--config_path", tmp_path / "absent.yaml")
    assert (status, out, err) == (1, "", f"deqa: {tmp_path / 'absent.yaml'}: no such file\n")


def test_a_configuration_must_be_named(deqa):
    status, out, err = deqa("train")
    assert (status, out) == (2, "")
    assert "--config_path" in err


def test_an_unknown_option_is_a_sentence(deqa, place, tmp_path):
    config = write_settings(tmp_path / "c.yaml", settings(place, tmp_path / "run"))
    status, out, err = deqa("train", "--config_path", config, "--optimizer.frobnicate", "1")
    assert status in (1, 2)
    assert out == ""
    assert is_sentence(err)
    assert "--optimizer.frobnicate" in err
    assert not (tmp_path / "run").exists()


def test_a_run_in_a_place_that_cannot_be_is_a_sentence(deqa, place, tmp_path):
    (tmp_path / "file").write_text("mine")
    config = write_settings(tmp_path / "c.yaml", settings(place, tmp_path / "file" / "run"))
    status, out, err = deqa("train", "--config_path", config)
    assert status in (1, 2)
    assert out == ""
    assert is_sentence(err)
    assert (tmp_path / "file").read_text() == "mine"


# Flax brings optax, PyYAML comes with draccus.
@pytest.mark.parametrize("extra", ["draccus", "grain"])
def test_a_missing_extra_is_named(extra):
    program = f"import sys; sys.modules[{extra!r}] = None\nfrom deqa_jax.cli import main; main()"
    process = start("train", "--config_path", "c.yaml", program=program)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (1, "")
    assert is_sentence(err)
    assert "deqa-jax[train]" in err
    assert extra in err


# ---- what metas must have ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("objective", "pairs", "needed"),
    [
        (Objective(), True, ["level_probs", "gt_score", "std"]),
        (Objective(), False, ["level_probs"]),
        (Objective(softkl_loss=False), True, ["gt_score", "std"]),
        (Objective(continuous_rating_loss=False), True, ["level_probs", "gt_score"]),
        (Objective(softkl_loss=False, continuous_rating_loss=False), False, []),
    ],
)
def test_metas_need_what_the_objective_uses(objective, pairs, needed):
    assert needed_fields(objective, pairs=pairs) == needed
