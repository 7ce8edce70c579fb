"""What a run leaves on disk: the last checkpoints, whole ones only, and the best model alone."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from small_runs import TINY, write_tiny

from deqa_jax import lora
from deqa_jax.checkpoint import Checkpoint
from deqa_jax.lora import LoraConfig
from deqa_jax.parameters import parameter_shapes
from deqa_jax.train.optimizer import OptimizerConfig, make_optimizer
from deqa_jax.train.saving import Best, Progress, Saver
from deqa_jax.train.step import TrainState

SOME = [("vision", "class_token"), ("language", "layers", "query", "kernel"), ("language", "final_norm", "scale")]
ADAPTERS = LoraConfig(rank=2, alpha=4.0)
DATA = {"next_index": 7, "nested": {"a": [1, 2]}}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return Checkpoint.open(write_tiny(tmp_path_factory.mktemp("base") / "M"))


def make_state(step, *, accumulate=2):
    """A state that no other step has, with all kinds of optimiser state."""
    shapes = parameter_shapes(TINY)
    random = np.random.default_rng(step)
    params = {path: jnp.asarray(random.standard_normal(shapes[path]), jnp.float32) for path in SOME}
    optimizer = make_optimizer(OptimizerConfig(accumulate=accumulate, weight_decay=0.1), 10, dict.fromkeys(SOME, 1.0))
    state = jax.tree.map(lambda x: x + jnp.asarray(step, x.dtype), optimizer.init(params))
    return TrainState(jnp.int32(step), params, state)


def assert_same(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


def steps(folder):
    return sorted(int(path.name) for path in (folder / "checkpoints").iterdir() if path.name.isdigit())


# ---- checkpoints to go on from ----------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("best", [None, Best(3, -0.125), Best(5, -np.inf)])
def test_what_is_saved_is_restored(best, accumulate, base, tmp_path):
    state = make_state(6, accumulate=accumulate)
    with Saver(tmp_path, base, None, keep=2, batch_size=8, data="d") as saver:
        saver.save(state, Progress(6, best), DATA)
    with Saver(tmp_path, base, None, keep=2, batch_size=8, data="d") as saver:
        found, progress, data = saver.restore(make_state(0, accumulate=accumulate))
    assert_same(found, state)
    assert isinstance(found, TrainState)
    assert found.params.keys() == state.params.keys()
    assert (progress, data) == (Progress(6, best), DATA)
    assert best is None or isinstance(progress.best, Best)


def test_a_new_run_has_nothing_to_restore(base, tmp_path):
    with Saver(tmp_path / "run", base, None, keep=1, batch_size=8, data="d") as saver:
        assert saver.restore(make_state(0)) is None


def test_only_the_last_ones_are_kept(base, tmp_path):
    with Saver(tmp_path, base, None, keep=2, batch_size=8, data="d") as saver:
        for step in (2, 4, 6, 8):
            saver.save(make_state(step), Progress(step), DATA)
        saver.wait()
        assert steps(tmp_path) == [6, 8]
        assert saver.restore(make_state(0))[1].step == 8


def test_saving_a_step_again_changes_nothing(base, tmp_path):
    with Saver(tmp_path, base, None, keep=2, batch_size=8, data="d") as saver:
        saver.save(make_state(2), Progress(2), DATA)
        saver.wait()
        saver.save(make_state(3), Progress(2), {})
        saver.wait()
        found, _, data = saver.restore(make_state(0))
    assert_same(found, make_state(2))
    assert data == DATA


def test_it_is_saved_before_training_changes_it(base, tmp_path):
    """Writing goes on while the next step takes the state's memory for its own result."""
    state = make_state(2)
    expected = jax.tree.map(np.asarray, state)
    with Saver(tmp_path, base, None, keep=2, batch_size=8, data="d") as saver:
        saver.save(state, Progress(2), DATA)
        step = jax.jit(lambda state: jax.tree.map(lambda x: x * jnp.asarray(0, x.dtype), state), donate_argnums=0)
        jax.block_until_ready(step(state))
        saver.wait()
        found, *_ = saver.restore(make_state(0))
    assert_same(found, expected)


def test_leftovers_of_a_killed_run_are_no_checkpoints(base, tmp_path):
    with Saver(tmp_path, base, None, keep=2, batch_size=8, data="d") as saver:
        saver.save(make_state(2), Progress(2), DATA)
        saver.wait()
    checkpoints = tmp_path / "checkpoints"
    # Half a checkpoint under the name that it has while it is written.
    torn = checkpoints / "4.orbax-checkpoint-tmp"
    shutil.copytree(checkpoints / "2", torn)
    shutil.rmtree(torn / "state")
    with Saver(tmp_path, base, None, keep=2, batch_size=8, data="d") as saver:
        assert saver.restore(make_state(0))[1].step == 2
        saver.save(make_state(4), Progress(4), DATA)
        saver.wait()
    with Saver(tmp_path, base, None, keep=2, batch_size=8, data="d") as saver:
        found, *_ = saver.restore(make_state(0))
    assert_same(found, make_state(4))


def test_it_is_restored_to_where_the_run_has_it(base, tmp_path):
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    everywhere = NamedSharding(mesh, PartitionSpec())
    with Saver(tmp_path, base, None, keep=2, batch_size=8, data="d") as saver:
        saver.save(make_state(2), Progress(2), DATA)
        saver.wait()
        found, *_ = saver.restore(jax.device_put(make_state(0), everywhere))
    assert jax.device_count() == 8
    assert all(leaf.sharding == everywhere for leaf in jax.tree.leaves(found))
    assert_same(found, make_state(2))


def test_the_counts_of_the_optimizer_come_back_as_they_are(base, tmp_path):
    with Saver(tmp_path, base, None, keep=2, batch_size=8, data="d") as saver:
        saver.save(make_state(6), Progress(6), DATA)
        saver.wait()
        found, *_ = saver.restore(make_state(0))
    assert isinstance(found.optimizer, optax.MultiStepsState)
    assert found.optimizer.mini_step.dtype == jnp.int32
    assert int(found.optimizer.mini_step) == 6


# ---- the best model ---------------------------------------------------------------------------------------


def whole_model(seed):
    random = np.random.default_rng(seed)
    return {
        path: jnp.asarray(random.standard_normal(shape), jnp.float32) for path, shape in parameter_shapes(TINY).items()
    }


def test_the_best_model_is_a_checkpoint(base, tmp_path):
    params = whole_model(0)
    with Saver(tmp_path / "run", base, None, keep=1, batch_size=8, data="d") as saver:
        saver.save_best(params, {"srcc": 0.5, "loss": 1.25}, 7)
        assert saver.best_folder(Progress(9, Best(7, 0.5))) == tmp_path / "run" / "best-7"
    found = Checkpoint.open(tmp_path / "run" / "best-7")
    assert found.config == base.config
    assert found.provenance["evaluation"] == {"srcc": 0.5, "loss": 1.25}
    assert found.provenance["trained_from"] == base.identity
    assert found.provenance["source"] == "deqa train: run after 7 steps"
    assert found.identity != base.identity
    assert found.tokenizer().level_ids() == base.tokenizer().level_ids()
    assert found.preprocess() == base.preprocess()
    restored = found.restore()
    assert restored.keys() == params.keys()
    for path, leaf in restored.items():
        np.testing.assert_array_equal(leaf, params[path])


def test_the_best_model_so_far_takes_the_place_of_the_one_before(base, tmp_path):
    with Saver(tmp_path, base, None, keep=1, batch_size=8, data="d") as saver:
        saver.save_best(whole_model(0), {"srcc": 0.1}, 2)
        saver.save_best(whole_model(1), {"srcc": 0.2}, 14)
    assert [path.name for path in tmp_path.glob("*best*")] == ["best-14"]
    np.testing.assert_array_equal(Checkpoint.open(tmp_path / "best-14").read_leaf(SOME[0]), whole_model(1)[SOME[0]])


def test_one_that_is_there_already_is_kept_and_others_go(base, tmp_path):
    """As when a run was killed between writing the new one and removing the old one."""
    with Saver(tmp_path, base, None, keep=1, batch_size=8, data="d") as saver:
        saver.save_best(whole_model(0), {}, 2)
        shutil.copytree(tmp_path / "best-2", tmp_path / "best-1")
        written = (tmp_path / "best-2" / "config.json").stat().st_mtime_ns
        saver.save_best(whole_model(0), {}, 2)
    assert [path.name for path in tmp_path.glob("*best*")] == ["best-2"]
    assert (tmp_path / "best-2" / "config.json").stat().st_mtime_ns == written


def test_half_of_one_is_removed_by_the_next_run(base, tmp_path):
    """They are as large as the model, and have the dead process's number in their name."""
    torn = tmp_path / ".best-5.4711.tmp"
    (torn / "params").mkdir(parents=True)
    (tmp_path / "config.yaml").write_text("mine")
    with Saver(tmp_path, base, None, keep=1, batch_size=8, data="d"):
        pass
    assert not torn.exists()
    assert (tmp_path / "config.yaml").read_text() == "mine"


def test_the_last_one_is_the_best_where_nothing_is_evaluated(base, tmp_path):
    with Saver(tmp_path, base, None, keep=1, batch_size=8, data="d") as saver:
        assert saver.best_folder(Progress(12)) == tmp_path / "best-12"


def test_with_adapters_only_what_was_trained_is_kept(base, tmp_path):
    shapes = lora.adapter_shapes(parameter_shapes(TINY), ADAPTERS)
    random = np.random.default_rng(0)
    params = {path: jnp.asarray(random.standard_normal(shape), jnp.float32) for path, shape in shapes.items()}
    params[SOME[0]] = jnp.ones(parameter_shapes(TINY)[SOME[0]], jnp.float32)
    with Saver(tmp_path, base, ADAPTERS, keep=1, batch_size=8, data="d") as saver:
        saver.save_best(params, {}, 3)
    found = Checkpoint.open(tmp_path / "best-3")
    assert found.own.keys() == params.keys()
    assert found.adapter.lora == ADAPTERS
    assert json.loads((tmp_path / "best-3" / "config.json").read_text())["adapter"]["base"]["identity"] == base.identity
    path = ("language", "layers", "query", "kernel")
    a, b = (np.asarray(params[(*path[:-1], name)]) for name in ("lora_a", "lora_b"))
    np.testing.assert_allclose(found.read_leaf(path), base.read_leaf(path) + 2.0 * (a @ b), rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(found.read_leaf(SOME[0]), params[SOME[0]])
    np.testing.assert_array_equal(found.read_leaf(SOME[2]), base.read_leaf(SOME[2]))
