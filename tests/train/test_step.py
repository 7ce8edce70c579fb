"""One step: gradients and trajectories of the PyTorch implementation, and what a step must keep to itself."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from training import (
    LEVEL_IDS,
    TRAIN,
    batch_name,
    golden_batches,
    golden_leaves,
    golden_objective,
    golden_runs,
    golden_task,
    norm,
    to_published,
)

from deqa_jax.parameters import parameter_shapes, unflatten
from deqa_jax.train.objective import Batch, Objective, batch_loss
from deqa_jax.train.optimizer import OptimizerConfig, make_optimizer, schedule
from deqa_jax.train.step import TrainState, answer_logits, make_step

# ---- against PyTorch --------------------------------------------------------------------------------------

GRADIENT_SETTINGS = [name for name, run in golden_runs().items() if "grad_norms" in run]
# Their norms were summed in float32.
LARGEST = {"model.embed_tokens.weight", "lm_head.weight"}


def is_key_bias(name: str) -> bool:
    """A bias that all keys share changes no attention weight: in theory its gradient is zero."""
    return name.startswith("model.visual_abstractor") and name.endswith("attention.key.bias")


@pytest.fixture(scope="module")
def golden_gradient() -> Callable[[str], dict[str, np.ndarray]]:
    """Gradients of a setting's loss under published names.

    The network's part is compiled once for all: six images, of which those of a smaller batch are the first.
    """
    task = golden_task()

    def logits_of(leaves: Any, batch: Batch) -> jax.Array:
        model = nnx.merge(task.graph(training=True), unflatten(leaves))
        with jax.default_matmul_precision("highest"):
            return answer_logits(model, task, batch)

    @jax.jit
    def run(leaves: Any, batch: Batch, cotangent: jax.Array) -> tuple[jax.Array, Any]:
        logits, pull_back = jax.vjp(lambda leaves: logits_of(leaves, batch), leaves)
        return logits, pull_back(cotangent)[0]

    def six(x: jax.Array) -> jax.Array:
        rows = x.reshape(-1, 1, *x.shape[2:]) if x.ndim > 1 else x
        return jnp.concatenate([rows, jnp.zeros((6 - len(rows), *rows.shape[1:]), rows.dtype)])

    @functools.cache
    def logits(name: str) -> jax.Array:
        batch = golden_batches().batches[name]
        shape = (*batch.after.shape, task.config.language.vocab_size)
        found, _ = run(golden_leaves(), jax.tree.map(six, batch), jnp.zeros((6, 1, *shape[2:])))
        return found[: shape[0] * shape[1]].reshape(shape)

    def gradient(setting: str) -> dict[str, np.ndarray]:
        name, objective = batch_name(setting), golden_objective(setting)
        batch = golden_batches().batches[name]
        cotangent = jax.grad(lambda logits: batch_loss(logits, batch, jnp.asarray(LEVEL_IDS), objective)[0])
        rows = six(cotangent(logits(name)))
        return to_published(run(golden_leaves(), jax.tree.map(six, batch), rows)[1])

    return gradient


@pytest.mark.parametrize("setting", GRADIENT_SETTINGS)
def test_gradients_equal_pytorch(golden_gradient: Callable[[str], dict[str, np.ndarray]], setting: str) -> None:
    ours, expected = golden_gradient(setting), golden_runs()[setting]
    assert ours.keys() == expected["grad_norms"].keys()
    for name, wanted in expected["grad_norms"].items():
        if is_key_bias(name):
            assert np.abs(ours[name]).max() < 1e-6
        else:
            assert norm(ours[name]) == pytest.approx(wanted, rel=1e-4 if name in LARGEST else 5e-5), name
    stored = np.load(TRAIN / f"grads_{setting}.npz")
    assert len(stored.files) == 20
    for name in stored.files:
        assert norm(ours[name] - stored[name]) <= 5e-5 * norm(stored[name]), name
    total = np.sqrt(sum(norm(array) ** 2 for array in ours.values()))
    assert total == pytest.approx(expected["global_grad_norm"], rel=5e-5)


@pytest.fixture(scope="module")
def full_trajectory() -> tuple[list[dict[str, float]], TrainState]:
    """Metrics of each step, and the last state, of the golden run with everything trained."""
    run = golden_runs()["trajectory_full"]
    config = OptimizerConfig(learning_rate=run["peak_lr"], warmup_ratio=run["warmup_ratio"], clip_norm=run["clip"])
    shapes = parameter_shapes(golden_task().config)
    optimizer = make_optimizer(config, run["steps"], dict.fromkeys(shapes, 1.0))
    step = jax.jit(make_step(golden_task(), optimizer, shapes), donate_argnums=0)
    params = {path: jnp.array(leaf) for path, leaf in golden_leaves().items()}
    state, rows = TrainState(jnp.int32(0), params, optimizer.init(params)), []
    for row in run["rows"]:
        rate = float(schedule(config, run["steps"])(state.step))
        state, metrics = step(state, {}, golden_batches().batches[row["batch"]])
        rows.append({"loss": float(metrics["loss"]), "grad_norm": float(metrics["grad_norm"]), "lr": rate})
    return rows, state


def test_full_trajectory_equals_pytorch(full_trajectory: tuple[list[dict[str, float]], TrainState]) -> None:
    rows, state = full_trajectory
    run = golden_runs()["trajectory_full"]
    assert len(rows) == run["steps"] == int(state.step)
    for ours, theirs in zip(rows, run["rows"], strict=True):
        for name, value in ours.items():
            assert value == pytest.approx(theirs[name], rel=1e-4, abs=1e-12), (theirs["step"], name)
    params = to_published(state.params)
    assert params.keys() == run["final_param_norms"].keys()
    for name, wanted in run["final_param_norms"].items():
        assert norm(params[name]) == pytest.approx(wanted, rel=1e-4), name


def test_training_went_somewhere(full_trajectory: tuple[list[dict[str, float]], TrainState]) -> None:
    """Norms hardly tell a model that did not move from one that did."""
    rows, state = full_trajectory
    assert rows[-1]["loss"] < 0.9 * rows[0]["loss"]
    moved = {path: np.abs(np.asarray(leaf) - golden_leaves()[path]).max() for path, leaf in state.params.items()}
    # Its gradient is zero but for rounding.
    del moved["abstractor", "layers", "key", "bias"]
    assert min(moved.values()) > 1e-4
