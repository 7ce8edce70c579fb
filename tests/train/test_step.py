"""One step: gradients and trajectories of the PyTorch implementation, and what a step must keep to itself."""

import dataclasses
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
    SMALL,
    SMALL_LORA,
    TRAIN,
    batch_name,
    golden_batches,
    golden_leaves,
    golden_objective,
    golden_runs,
    golden_task,
    jit,
    norm,
    small_adapters,
    small_batch,
    small_leaves,
    small_task,
    to_published,
)

from deqa_jax import lora
from deqa_jax.config import Execution
from deqa_jax.parameters import parameter_shapes, unflatten
from deqa_jax.train.objective import Batch, batch_loss
from deqa_jax.train.optimizer import OptimizerConfig, make_optimizer, schedule
from deqa_jax.train.step import Task, TrainState, answer_logits, make_step

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

    @jit
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


# ---- what is trained, and what is not ---------------------------------------------------------------------


def start(task: Task, config: OptimizerConfig, trained: Any) -> tuple[Any, TrainState, Any]:
    """The step not compiled yet, its first state, and what is frozen; `trained` says of a path whether it is."""
    shapes = parameter_shapes(SMALL)
    leaves = small_leaves()
    if task.lora is not None:
        adapters = lora.adapter_shapes(shapes, task.lora)
        shapes, leaves = {**shapes, **adapters}, {**leaves, **small_adapters(task.lora)}
    params = {path: leaf for path, leaf in leaves.items() if trained(path)}
    frozen = {path: leaf for path, leaf in leaves.items() if path not in params}
    optimizer = make_optimizer(config, 10, dict.fromkeys(params, 1.0))
    return make_step(task, optimizer, shapes), TrainState(jnp.int32(0), params, optimizer.init(params)), frozen


STEEP = OptimizerConfig(learning_rate=1e-2, warmup_ratio=0.0)


def is_lora(path: tuple[str, ...]) -> bool:
    return path[-1] in (lora.A, lora.B)


@pytest.fixture(scope="module")
def lora_step() -> tuple[Any, Callable[[], TrainState], Any]:
    """A compiled step of adapters with dropout, what makes its first state, and what is frozen."""
    task = small_task(lora=dataclasses.replace(SMALL_LORA, dropout=0.3))
    step, state, frozen = start(task, STEEP, is_lora)
    return jit(step), lambda: jax.tree.map(jnp.copy, state), frozen


def test_only_what_is_trained_changes_and_has_state(lora_step: tuple[Any, Callable[[], TrainState], Any]) -> None:
    step, first, frozen = lora_step
    state, metrics = step(first(), frozen, small_batch())
    assert int(state.step) == 1
    assert state.params.keys() == first().params.keys() == {path for path in state.params if is_lora(path)}
    sizes = sorted(leaf.shape for leaf in state.params.values())
    assert sorted(leaf.shape for leaf in jax.tree.leaves(state.optimizer) if leaf.shape) == sorted([*sizes, *sizes])
    for path, leaf in state.params.items():
        assert leaf.dtype == jnp.float32
        assert np.abs(leaf - first().params[path]).max() > 1e-3, path
    assert {"loss", "grad_norm", "rank", "score_A", "next_token_B"} <= metrics.keys()


def test_dropout_follows_the_step_and_the_seed_and_nothing_else(
    lora_step: tuple[Any, Callable[[], TrainState], Any],
) -> None:
    step, first, frozen = lora_step
    one, again = (step(first(), frozen, small_batch()) for _ in range(2))
    assert jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), one, again))
    later = step(first()._replace(step=jnp.int32(7)), frozen, small_batch())
    assert abs(float(later[1]["loss"]) - float(one[1]["loss"])) > 1e-4


def test_another_seed_drops_other_inputs() -> None:
    keys = []
    config = dataclasses.replace(SMALL_LORA, dropout=0.3)
    shapes = lora.adapter_shapes(parameter_shapes(SMALL), config)
    for seed in (0, 1):
        for step in (0, 1, 2):
            found = lora.dropout_keys(shapes, config, jax.random.fold_in(jax.random.key(seed), step))
            keys += [tuple(row) for leaf in found.values() for row in np.asarray(leaf).tolist()]
    assert len(keys) == len(set(keys)) == 2 * 3 * 2 * SMALL.language.num_layers


# ---- how it is computed -----------------------------------------------------------------------------------


def gradients(execution: Execution, batch: Batch, leaves: Any) -> tuple[jax.Array, Any]:
    task = small_task(execution=execution)
    graphdef = task.graph(training=True)

    @jit
    @jax.value_and_grad
    def run(leaves: Any) -> jax.Array:
        logits = answer_logits(nnx.merge(graphdef, unflatten(leaves)), task, batch)
        return batch_loss(logits, batch, jnp.asarray(task.level_ids), task.objective)[0]

    return run(leaves)


@pytest.fixture(scope="module")
def plain_gradients() -> tuple[jax.Array, Any]:
    return gradients(Execution(), small_batch(descriptions=[1]), small_leaves())


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_remat_changes_no_gradient(plain_gradients: tuple[jax.Array, Any], remat: str) -> None:
    value, found = gradients(Execution(remat=remat), small_batch(descriptions=[1]), small_leaves())
    np.testing.assert_allclose(value, plain_gradients[0], rtol=1e-6)
    for path, leaf in plain_gradients[1].items():
        # The gradient of the keys' shared bias is nothing but rounding.
        assert norm(found[path] - leaf) <= 1e-6 * norm(leaf) + 2e-7, path


def test_longer_padding_changes_no_logits() -> None:
    """Whatever it is made of; what the loss makes of them is `test_objective`'s."""
    task, batch = small_task(), small_batch()
    longer = batch._replace(after=jnp.pad(batch.after, ((0, 0), (0, 0), (0, 5)), constant_values=3))
    model = nnx.merge(task.graph(training=True), unflatten(small_leaves()))
    run = jit(lambda model, batch: answer_logits(model, task, batch))
    short, long = run(model, batch), run(model, longer)
    np.testing.assert_allclose(long[:, :, : short.shape[2]], short, atol=1e-5)
    assert long.shape[2] == short.shape[2] + 5


def test_bfloat16_computes_with_float32_parameters_and_finite_gradients() -> None:
    """The published run: remat too, everything trained."""
    task = small_task(execution=Execution(dtype="bfloat16", remat="full"))
    step, state, frozen = start(task, OptimizerConfig(learning_rate=1e-5, warmup_ratio=0.0), lambda path: True)
    # Rounded to bfloat16, steps this small would be lost.
    before = jax.tree.map(np.asarray, state.params)
    # The gradient of JAX's own attention promotes bfloat16 implicitly.
    with jax.numpy_dtype_promotion("standard"):
        lowered = jit(step).lower(state, frozen, small_batch())
        assert "bf16" in lowered.as_text()
        state, metrics = lowered.compile()(state, frozen, small_batch())
    assert all(np.isfinite(value).all() for value in metrics.values())
    assert float(metrics["grad_norm"]) > 0
    for path, leaf in state.params.items():
        assert leaf.dtype == jnp.float32
        assert np.isfinite(leaf).all()
        # An embedding that was not looked up does not move, nor does the keys' shared bias.
        if path != ("abstractor", "layers", "key", "bias"):
            moved = np.abs(np.asarray(leaf) - before[path])
            assert 0 < moved.max() < 1.1e-5, path
    moments = [leaf for leaf in jax.tree.leaves(state.optimizer) if leaf.ndim]
    assert {leaf.dtype for leaf in moments} == {jnp.dtype("float32")}
