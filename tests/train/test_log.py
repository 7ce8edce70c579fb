"""The log of a run: a line for each step and evaluation, and none for what is done again."""

import json
import sys

import pytest

from deqa_jax.train.log import Log


def entries(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def fill(log, steps, every=2):
    """What a run says: an evaluation follows each second step."""
    for step in steps:
        log.step(step, {"loss": step / 7})
        if (step + 1) % every == 0:
            log.evaluation(step + 1, {"srcc": 0.5})


def test_a_line_is_a_step_or_an_evaluation(tmp_path):
    with Log(tmp_path / "new" / "run", "log.jsonl") as log:
        log.step(0, {"loss": 0.1, "learning_rate": 1e-300})
        log.evaluation(1, {"srcc": -1 / 3})
    assert entries(tmp_path / "new" / "run" / "log.jsonl") == [
        {"step": 0, "loss": 0.1, "learning_rate": 1e-300},
        {"step": 1, "evaluation": {"srcc": -1 / 3}},
    ]


def test_a_line_is_there_as_soon_as_it_is_said(tmp_path):
    """A killed run has said everything it did."""
    with Log(tmp_path, "log.jsonl") as log:
        log.step(0, {"loss": 1.0})
        assert entries(tmp_path / "log.jsonl") == [{"step": 0, "loss": 1.0}]


@pytest.mark.parametrize("done", range(8))
def test_a_run_that_goes_on_says_nothing_twice(done, tmp_path):
    with Log(tmp_path, "whole.jsonl") as log:
        fill(log, range(8))
    with Log(tmp_path, "log.jsonl") as log:
        fill(log, range(7))
    with Log(tmp_path, "log.jsonl") as log:
        log.cut(done)
        fill(log, range(done, 8))
    # The evaluation after `done` steps came before the checkpoint that the run goes on from.
    assert (tmp_path / "log.jsonl").read_text() == (tmp_path / "whole.jsonl").read_text()


def test_an_evaluation_of_a_step_that_is_done_again_goes(tmp_path):
    with Log(tmp_path, "log.jsonl") as log:
        fill(log, range(4))
        log.cut(3)
        kept = entries(tmp_path / "log.jsonl")
    assert [(x["step"], "evaluation" in x) for x in kept] == [(0, False), (1, False), (2, True), (2, False)]


@pytest.mark.parametrize("torn", ['{"step": 3, "lo', '{"step": 3', "\0\0\0\0\n", '{"step": 3, "loss": 1.0}', "\n"])
def test_a_torn_last_line_is_forgotten(torn, tmp_path):
    """The last of them only lacks its end, but what else it lacks nobody knows."""
    with Log(tmp_path, "log.jsonl") as log:
        fill(log, range(3))
        whole = (tmp_path / "log.jsonl").read_text()
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write(torn)
    with Log(tmp_path, "log.jsonl") as log:
        log.cut(5)
        assert (tmp_path / "log.jsonl").read_text() == whole
        log.step(3, {"loss": 2.0})
    assert entries(tmp_path / "log.jsonl")[-1] == {"step": 3, "loss": 2.0}


def test_a_new_run_has_nothing_to_cut(tmp_path):
    with Log(tmp_path, "log.jsonl") as log:
        log.cut(0)
        log.step(0, {"loss": 1.0})
    assert len(entries(tmp_path / "log.jsonl")) == 1


def test_a_number_that_is_none_is_still_a_line(tmp_path):
    """A correlation of constant scores."""
    with Log(tmp_path, "log.jsonl") as log:
        log.evaluation(1, {"srcc": None})
        log.cut(1)
    assert len(entries(tmp_path / "log.jsonl")) == 1


def test_tensorboard_gets_the_same_numbers(tmp_path, monkeypatch):
    said = []

    class Writer:
        def __init__(self, folder):
            said.append(folder)

        def add_scalar(self, name, value, step):
            said.append((name, value, step))

        def close(self):
            said.append("closed")

    module = type(sys)("tensorboardX")
    module.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "tensorboardX", module)
    with Log(tmp_path, "log.jsonl") as log:
        log.step(3, {"loss": 1.5, "rank": 0.5})
        log.evaluation(4, {"srcc": 0.25})
    assert said == [
        str(tmp_path / "tensorboard"),
        ("train/loss", 1.5, 3),
        ("train/rank", 0.5, 3),
        ("evaluation/srcc", 0.25, 4),
        "closed",
    ]


def test_without_tensorboard_there_is_the_file(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with Log(tmp_path, "log.jsonl") as log:
        log.step(0, {"loss": 1.0})
    assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]
