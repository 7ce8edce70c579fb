"""A run from its configuration to its best checkpoint, and what is left of it when it is interrupted anywhere."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import orbax.checkpoint as ocp
import pytest
import yaml
from small_runs import rating, write_metas, write_tiny

from deqa_jax.checkpoint import Checkpoint
from deqa_jax.parameters import flatten

STEPS, CHECKPOINT_EVERY, EVALUATION_EVERY = 60, 3, 7
LORA = {
    "lora": {"rank": 4, "alpha": 8, "dropout": 0.3},
    "parameters": [{"pattern": "lora_|^vision/|^abstractor/", "multiplier": 1}, {"pattern": "", "multiplier": 0}],
}
FULL = {"optimizer": {"learning_rate": 1e-3, "weight_decay": 0.1, "accumulate": 2}}


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
        "steps": STEPS,
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
        env={**os.environ, "XLA_FLAGS": "", **environment},
    )


def steps_done(folder):
    """The last step that the log says."""
    path = folder / "log.jsonl"
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return max([json.loads(line)["step"] for line in lines], default=-1)


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


@pytest.fixture(scope="module", params=["lora", "full"])
def unbroken(request, place):
    """A run that nothing interrupted: its kind of training, its output and what it printed."""
    folder = place / f"unbroken-{request.param}"
    changes = LORA if request.param == "lora" else FULL
    process = start("train", "--config_path", write_settings(place / "c.yaml", settings(place, folder, **changes)))
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return changes, folder, out, err


def test_a_run_killed_five_times_is_the_same_run_bit_for_bit(unbroken, place):
    changes, whole, out, _ = unbroken
    folder = place / f"killed-{whole.name}"
    config = write_settings(place / "k.yaml", settings(place, folder, **changes))
    moments = random.Random(0)
    for step in sorted(moments.sample(range(2, STEPS - 6), 5)):
        process = start("train", "--config_path", config)
        wait_for(process, folder, step)
        # Anywhere in a step, in an evaluation or while a checkpoint is written.
        time.sleep(moments.uniform(0, 0.05))
        process.kill()
        _, err = process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL, err
        assert steps_done(folder) >= step
    process = start("train", "--config_path", config)
    last, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert "going on after step" in err
    assert last == out.replace(whole.name, folder.name)
    assert_same_run(folder, whole)
    assert not [path.name for path in folder.iterdir() if "tmp" in path.name]
