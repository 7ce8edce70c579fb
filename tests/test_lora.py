"""Low-rank adapters: PEFT's mathematics and numbers, dropout, and checkpoints that hold adapters alone."""

import dataclasses
import functools
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from training import (
    QUERY,
    SMALL,
    SMALL_LORA,
    VALUE,
    golden_batches,
    golden_leaves,
    golden_runs,
    golden_task,
    jit,
    merged_leaves,
    small_adapters,
    small_batch,
    small_leaves,
    small_task,
    trained_leaves,
    write_adapter,
)

from deqa_jax import lora
from deqa_jax.checkpoint import Checkpoint, CheckpointError
from deqa_jax.config import PRESETS, ConfigError, MeshConfig
from deqa_jax.lora import LoraConfig, LoraLinear
from deqa_jax.parameters import Leaves, abstract_model, flatten, parameter_shapes, unflatten
from deqa_jax.scorer import Scorer
from deqa_jax.sharding import make_mesh, parameter_shardings
from deqa_jax.train.optimizer import OptimizerConfig, make_optimizer
from deqa_jax.train.step import Task, TrainState, answer_logits, make_step

TEST = PRESETS["test"]
EVERY_DENSE_LAYER = LoraConfig(rank=2, alpha=4.0, dropout=0.0, targets=(".*",))


def forward(task: Task, leaves: Mapping[Any, Any], *, training: bool = False) -> np.ndarray:
    graphdef = task.graph(training=training)

    @jit
    def run(leaves: Any) -> jax.Array:
        with jax.default_matmul_precision("highest"):
            return answer_logits(nnx.merge(graphdef, unflatten(leaves)), task, small_batch(2))

    return np.asarray(run(dict(leaves)))


@functools.cache
def base_forward() -> np.ndarray:
    return forward(small_task(), small_leaves())


# ---- which layers -----------------------------------------------------------------------------------------


def adapted(config: LoraConfig, *, training: bool = True) -> set[tuple[Any, ...]]:
    model = lora.wrap(abstract_model(SMALL), config, training=training)
    return {path for path, module in nnx.iter_modules(model) if isinstance(module, LoraLinear)}


def test_only_targets_are_wrapped() -> None:
    assert adapted(LoraConfig()) == {QUERY, VALUE}
    assert adapted(LoraConfig(targets=(".*/value/.*", "abstractor/projection"))) == {
        VALUE,
        ("language", "layers", "value", "text"),
        ("abstractor", "projection"),
    }
    # A target is a whole path, not a part of one.
    with pytest.raises(ConfigError, match="no dense layer is called query"):
        adapted(LoraConfig(targets=("query",)))


@pytest.mark.parametrize("targets", [("language/layers/query", "language/layers/quarry"), ("language/layers/query/",)])
def test_a_target_that_is_no_dense_layer_is_an_error(targets: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as caught:
        adapted(LoraConfig(targets=targets))
    assert targets[-1] in str(caught.value)
    assert "language/layers/value/visual" in str(caught.value)  # what there is


def test_norms_and_embeddings_cannot_be_adapted() -> None:
    for target in ("language/layers/input_norm/text", "language/final_norm", "language/embedding", "language/layers"):
        with pytest.raises(ConfigError, match="no dense layer is called"):
            adapted(LoraConfig(targets=(target,)))


@pytest.mark.parametrize(
    "values",
    [{"rank": 0}, {"alpha": 0.0}, {"alpha": -1.0}, {"dropout": 1.0}, {"dropout": -0.1}],
)
def test_settings_out_of_range_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="lora: "):
        LoraConfig(**values)


def test_shapes_are_those_of_the_wrapped_model() -> None:
    for config in (LoraConfig(), EVERY_DENSE_LAYER):
        for training in (True, False):
            model = lora.wrap(abstract_model(SMALL), dataclasses.replace(config, dropout=0.0), training=training)
            state = flatten(nnx.to_pure_dict(nnx.state(model)))
            expected = {**parameter_shapes(SMALL), **lora.adapter_shapes(parameter_shapes(SMALL), config)}
            assert {path: leaf.shape for path, leaf in state.items()} == expected


def test_every_layer_that_can_be_wrapped_is_truly_adapted() -> None:
    """A wrapped layer whose kernel alone is used would be trained in vain."""
    dense = {path for path, module in nnx.iter_modules(abstract_model(SMALL)) if isinstance(module, nnx.Linear)}
    # The head's kernel is used without its layer, here and where a score is read out.
    assert adapted(EVERY_DENSE_LAYER) == dense - {("language", "head")}
    with pytest.raises(ConfigError, match="no dense layer is called language/head; there are abstractor"):
        adapted(LoraConfig(targets=("language/head",)))
    task = small_task(lora=EVERY_DENSE_LAYER)
    graphdef = task.graph(training=True)
    start = lora.init(lora.adapter_shapes(parameter_shapes(SMALL), EVERY_DENSE_LAYER), jax.random.key(0))
    assert {path[:-1] for path in start} == adapted(EVERY_DENSE_LAYER)
    weights = jnp.asarray(np.random.default_rng(0).normal(0, 1, (2, 2, 11, SMALL.language.vocab_size)), jnp.float32)

    @jit
    @jax.grad
    def gradient(adapters: Any, leaves: Any) -> jax.Array:
        model = nnx.merge(graphdef, unflatten({**leaves, **adapters}))
        return jnp.sum(weights * answer_logits(model, task, small_batch(2)))

    found = gradient(start, small_leaves())
    for path, leaf in found.items():
        # A is pulled only where B is something, and a shift of all keys hardly moves anything.
        assert (np.abs(leaf).max() > 1e-9) == (path[-1] == lora.B), path


# ---- what an adapter computes -----------------------------------------------------------------------------


def test_first_values_are_those_of_peft() -> None:
    shapes = lora.adapter_shapes(parameter_shapes(PRESETS["small"]), LoraConfig(rank=16))
    leaves = lora.init(shapes, jax.random.key(0))
    assert {path: leaf.shape for path, leaf in leaves.items()} == shapes
    for path, leaf in leaves.items():
        assert leaf.dtype == jnp.float32
        if path[-1] == lora.B:
            assert not np.asarray(leaf).any()
        else:
            # kaiming_uniform_(a=√5) of [r, in]: uniform within ±√(6 / (6 · in)).
            bound = shapes[path][-2] ** -0.5
            assert 0.99 * bound < np.abs(leaf).max() <= bound
            assert abs(np.std(leaf) / (bound / np.sqrt(3)) - 1) < 0.02
            assert abs(np.mean(leaf)) < 0.02 * bound
    a = [np.asarray(leaf) for path, leaf in leaves.items() if path[-1] == lora.A]
    assert not np.array_equal(a[0][0], a[0][1])  # layers
    assert not np.array_equal(a[0][0], a[1][0])  # targets
    again, other = (lora.init(shapes, jax.random.key(seed)) for seed in (0, 1))
    for path in shapes:
        np.testing.assert_array_equal(leaves[path], again[path])
        assert path[-1] == lora.B or not np.array_equal(leaves[path], other[path])


@pytest.mark.parametrize("training", [True, False])
def test_a_new_adapter_changes_nothing_at_all(training: bool) -> None:
    config = dataclasses.replace(SMALL_LORA, dropout=0.5)
    shapes = lora.adapter_shapes(parameter_shapes(SMALL), config)
    leaves = {**small_leaves(), **lora.init(shapes, jax.random.key(1))}
    if training:
        leaves |= lora.dropout_keys(shapes, config, jax.random.key(2))
    np.testing.assert_array_equal(forward(small_task(lora=config), leaves, training=training), base_forward())


def test_an_adapter_equals_its_merged_kernel() -> None:
    config = LoraConfig(rank=5, alpha=4.0, dropout=0.05)
    base, adapters = small_leaves(), small_adapters(config)
    merged = dict(base)
    for path in (QUERY, VALUE):
        kernel = np.asarray(base[*path, "kernel"], np.float64)
        update = np.asarray(adapters[*path, lora.A], np.float64) @ np.asarray(adapters[*path, lora.B], np.float64)
        expected = kernel + 0.8 * update
        merged[*path, "kernel"] = lora.merge(
            base[*path, "kernel"], adapters[*path, lora.A], adapters[*path, lora.B], config.scale
        )
        assert merged[*path, "kernel"].dtype == np.float32
        np.testing.assert_allclose(merged[*path, "kernel"], expected, rtol=1e-5, atol=1e-6)
    unmerged, whole = forward(small_task(lora=config), {**base, **adapters}), forward(small_task(), merged)
    np.testing.assert_allclose(unmerged, whole, atol=1e-5 * np.abs(whole).max())
    assert np.abs(whole - base_forward()).max() > 0.01


def layer(dropout: float, *, training: bool, seed: int = 0, bias: bool = False) -> LoraLinear:
    """One adapted layer of its own, 64 to 6, whose kernel is 0, so that the adapter is all that is seen."""
    base = nnx.eval_shape(lambda: nnx.Linear(64, 6, use_bias=bias, rngs=nnx.Rngs(0)))
    config = LoraConfig(rank=4, alpha=8.0, dropout=dropout)
    wrapped = LoraLinear(base, config, dropout if training else 0.0)
    random = np.random.default_rng(seed)
    leaves = {
        ("kernel",): jnp.zeros((64, 6)),
        ("lora_a",): jnp.asarray(random.normal(0, 1, (64, 4)), jnp.float32),
        ("lora_b",): jnp.asarray(random.normal(0, 1, (4, 6)), jnp.float32),
    }
    if bias:
        leaves["bias",] = jnp.arange(6.0)
    if dropout and training:
        leaves["dropout_key",] = jax.random.key_data(jax.random.key(seed))
    return nnx.merge(nnx.graphdef(wrapped), unflatten(leaves))


def test_the_scale_is_alpha_over_rank_and_a_bias_stays() -> None:
    x = jnp.asarray(np.random.default_rng(1).normal(0, 1, (3, 2, 64)), jnp.float32)
    one = layer(0.0, training=True, bias=True)
    expected = 2.0 * np.asarray(x, np.float64) @ np.asarray(one.lora_a[...]) @ np.asarray(one.lora_b[...])
    np.testing.assert_allclose(one(x), expected + np.arange(6.0), rtol=1e-4, atol=1e-4)


def test_dropout_hides_a_share_of_the_inputs_and_makes_up_for_it() -> None:
    x = jnp.ones((500, 64))
    dropped, plain = layer(0.25, training=True), layer(0.25, training=False)
    one = np.asarray(dropped(x))
    # Every row has a mask of its own; none of them is what it would be without.
    assert len(np.unique(one.round(4), axis=0)) > 490
    np.testing.assert_array_equal(one, dropped(x))
    # Each output is Σ kept · xᵢ · (A B)ᵢ · 2 / 0.75, of which the mean is that without dropout.
    weights = 2.0 * np.asarray(plain.lora_a[...]) @ np.asarray(plain.lora_b[...])
    np.testing.assert_allclose(plain(x)[0], weights.sum(axis=0), rtol=1e-4, atol=1e-4)
    deviation = np.sqrt((weights**2).sum(axis=0) * 0.25 / 0.75)
    np.testing.assert_allclose(one.std(axis=0), deviation, rtol=0.15)
    assert (np.abs(one.mean(axis=0) - weights.sum(axis=0)) < 5 * deviation / np.sqrt(500)).all()


def test_dropout_keys_differ_by_layer_target_and_step() -> None:
    config = LoraConfig(dropout=0.1)
    shapes = lora.adapter_shapes(parameter_shapes(SMALL), config)
    keys = [lora.dropout_keys(shapes, config, jax.random.key(seed)) for seed in (0, 1, 0)]
    assert keys[0].keys() == {(*QUERY, "dropout_key"), (*VALUE, "dropout_key")}
    rows = [tuple(row) for found in keys[:2] for leaf in found.values() for row in np.asarray(leaf).tolist()]
    assert len(rows) == len(set(rows)) == 2 * 2 * SMALL.language.num_layers
    for path in keys[0]:
        np.testing.assert_array_equal(keys[0][path], keys[2][path])
    assert lora.dropout_keys(shapes, dataclasses.replace(config, dropout=0.0), jax.random.key(0)) == {}


# ---- against PyTorch --------------------------------------------------------------------------------------


def golden_adapters(shared: Path) -> tuple[LoraConfig, Leaves]:
    """The golden adapter, which is no function of names as the other weights are."""
    from deqa_jax.convert.torch_file import open_torch_file

    tensors = open_torch_file(shared / "tiny" / "checkpoint-lora" / "adapter_model.bin")
    run = golden_runs()["lora_default"]
    config = LoraConfig(rank=run["r"], alpha=run["alpha"], dropout=0.0)
    modules = {QUERY: "self_attn.q_proj", VALUE: "self_attn.v_proj.multiway.1"}
    leaves = {}
    for path in lora.adapter_shapes(parameter_shapes(TEST), config):
        side = "A" if path[-1] == lora.A else "B"
        name = f"base_model.model.model.layers.{{}}.{modules[path[:-1]]}.lora_{side}.weight"
        layers = [tensors[name.format(i)].read().T.astype(np.float32) for i in range(TEST.language.num_layers)]
        leaves[path] = jnp.asarray(np.stack(layers))
    assert len(tensors) == 2 * 2 * TEST.language.num_layers
    return config, leaves


def test_lora_trajectory_equals_pytorch(shared: Path) -> None:
    config, adapters = golden_adapters(shared)
    run = golden_runs()["lora_trajectory"]
    optimizer_config = OptimizerConfig(
        learning_rate=run["peak_lr"], warmup_ratio=run["warmup_ratio"], clip_norm=run["clip"]
    )
    base = {path: jnp.array(leaf) for path, leaf in golden_leaves().items()}
    frozen = {path: leaf for path, leaf in base.items() if path[0] == "language"}
    trained = {**{path: leaf for path, leaf in base.items() if path not in frozen}, **adapters}
    shapes = {path: leaf.shape for path, leaf in {**base, **adapters}.items()}
    optimizer = make_optimizer(optimizer_config, run["steps"], dict.fromkeys(trained, 1.0))
    step = jax.jit(make_step(golden_task(lora=config), optimizer, shapes), donate_argnums=0)
    state = TrainState(jnp.int32(0), jax.tree.map(jnp.copy, trained), optimizer.init(trained))
    for row in run["rows"]:
        state, metrics = step(state, frozen, golden_batches().batches[row["batch"]])
        assert float(metrics["loss"]) == pytest.approx(row["loss"], rel=1e-4), row["step"]
        assert float(metrics["grad_norm"]) == pytest.approx(row["grad_norm"], rel=1e-4), row["step"]
        if row["step"] == 0:
            assert float(metrics["loss"]) == pytest.approx(golden_runs()["lora_default"]["loss"], rel=1e-5)
    for path, leaf in adapters.items():
        assert np.abs(state.params[path] - leaf).max() > 1e-4


# ---- checkpoints of adapters ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapter_checkpoint(converted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read only."""
    folder = tmp_path_factory.mktemp("adapter") / "A"
    return write_adapter(folder, trained_leaves(), Checkpoint.open(converted), SMALL_LORA)


def test_an_adapter_checkpoint_reads_like_a_whole_one(adapter_checkpoint: Path) -> None:
    checkpoint = Checkpoint.open(adapter_checkpoint)
    assert checkpoint.adapter is not None
    assert checkpoint.adapter.lora == SMALL_LORA
    assert {path: leaf.shape for path, leaf in checkpoint.stored.items()} == parameter_shapes(TEST)
    expected = merged_leaves()
    shardings = parameter_shardings(parameter_shapes(TEST), make_mesh(MeshConfig()))
    for leaves in (checkpoint.restore("float32"), checkpoint.restore(), checkpoint.restore(shardings=shardings)):
        assert leaves.keys() == expected.keys()
        for path, leaf in expected.items():
            np.testing.assert_allclose(leaves[path], leaf, atol=1e-6)
    for path in (("vision", "post_norm", "scale"), (*QUERY, "kernel"), ("language", "head", "kernel")):
        np.testing.assert_allclose(checkpoint.read_leaf(path), expected[path], atol=1e-6)
    halves = checkpoint.restore("bfloat16")
    assert {leaf.dtype for leaf in halves.values()} == {jnp.dtype("bfloat16")}
    # The sum is rounded, not its parts.
    kernel = halves[*QUERY, "kernel"]
    np.testing.assert_array_equal(kernel, checkpoint.read_leaf((*QUERY, "kernel")).astype(jnp.bfloat16))


def test_its_files_hold_what_was_trained_and_nothing_else(adapter_checkpoint: Path, converted: Path) -> None:
    checkpoint = Checkpoint.open(adapter_checkpoint)
    trained = trained_leaves()
    assert {path: leaf.shape for path, leaf in checkpoint.own.items()} == {
        path: leaf.shape for path, leaf in trained.items()
    }
    for path, leaf in trained.items():
        np.testing.assert_array_equal(checkpoint.read_own(path), leaf)

    def size(folder: Path) -> int:
        return sum(path.stat().st_size for path in (folder / "params").rglob("*") if path.is_file())

    assert size(adapter_checkpoint) < size(converted) / 20


@pytest.mark.parametrize(
    "only",
    [
        {(*QUERY, "kernel")},
        {("vision", "post_norm", "scale"), ("language", "head", "kernel")},
        {("language", "embedding")},
        set(),
    ],
)
def test_parameters_are_restored_alone(adapter_checkpoint: Path, converted: Path, only: set[tuple[str, ...]]) -> None:
    leaves = Checkpoint.open(adapter_checkpoint).restore("float32", only=only)
    assert leaves.keys() == only
    for path in only:
        np.testing.assert_allclose(leaves[path], merged_leaves()[path], atol=1e-6)
    plain = Checkpoint.open(converted).restore("bfloat16", only=only)
    assert plain.keys() == only
    for path in only:
        np.testing.assert_array_equal(plain[path], golden_leaves()[path].astype(jnp.bfloat16))


def test_it_scores_as_the_merged_checkpoint_does(
    adapter_checkpoint: Path, converted: Path, tmp_path: Path, images: Path
) -> None:
    whole = write_adapter(tmp_path / "W", merged_leaves(), Checkpoint.open(converted), None, adapter=None)
    ours, theirs = (
        Scorer(Checkpoint.open(folder), dtype="float32").predict([images / "landscape.jpg"])
        for folder in (adapter_checkpoint, whole)
    )
    np.testing.assert_allclose(ours.score, theirs.score, atol=1e-5)
    np.testing.assert_allclose(ours.logits, theirs.logits, atol=5e-5)


def test_a_kernel_that_was_trained_beside_its_adapter_is_not_lost(converted: Path, tmp_path: Path) -> None:
    trained = trained_leaves()
    trained[*QUERY, "kernel"] = golden_leaves()[*QUERY, "kernel"] + np.float32(0.5)
    checkpoint = Checkpoint.open(write_adapter(tmp_path / "A", trained, Checkpoint.open(converted), SMALL_LORA))
    expected = merged_leaves()[*QUERY, "kernel"] + np.float32(0.5)
    np.testing.assert_allclose(checkpoint.read_leaf((*QUERY, "kernel")), expected, atol=1e-6)
    np.testing.assert_allclose(checkpoint.restore("float32")[*QUERY, "kernel"], expected, atol=1e-6)
    np.testing.assert_array_equal(checkpoint.read_own((*QUERY, "kernel")), trained[*QUERY, "kernel"])


def test_trained_parameters_without_adapters_belong_on_a_base_too(converted: Path, tmp_path: Path) -> None:
    path = ("vision", "post_norm", "scale")
    checkpoint = Checkpoint.open(
        write_adapter(tmp_path / "A", {path: trained_leaves()[path]}, Checkpoint.open(converted), None)
    )
    leaves = checkpoint.restore("float32")
    np.testing.assert_array_equal(leaves[path], trained_leaves()[path])
    np.testing.assert_array_equal(leaves[*QUERY, "kernel"], golden_leaves()[*QUERY, "kernel"])


def test_an_adapter_on_an_adapter_adds_up(adapter_checkpoint: Path, tmp_path: Path) -> None:
    config = LoraConfig(rank=2, alpha=1.0, dropout=0.0, targets=("language/layers/query",))
    second = {
        path: np.asarray(leaf) for path, leaf in small_adapters(config, seed=9, shapes=parameter_shapes(TEST)).items()
    }
    checkpoint = Checkpoint.open(write_adapter(tmp_path / "B", second, Checkpoint.open(adapter_checkpoint), config))
    expected = merged_leaves()
    expected[*QUERY, "kernel"] = expected[*QUERY, "kernel"] + 0.5 * second[*QUERY, lora.A] @ second[*QUERY, lora.B]
    found = checkpoint.restore("float32")
    for path, leaf in expected.items():
        np.testing.assert_allclose(found[path], leaf, atol=1e-5)


def test_identity_follows_the_base_and_the_adapter(adapter_checkpoint: Path, converted: Path, tmp_path: Path) -> None:
    assert Checkpoint.open(adapter_checkpoint).identity != Checkpoint.open(converted).identity
    shutil.copytree(adapter_checkpoint, tmp_path / "C")
    assert Checkpoint.open(tmp_path / "C").identity == Checkpoint.open(adapter_checkpoint).identity


# ---- damage -----------------------------------------------------------------------------------------------


@pytest.fixture
def movable(converted: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A base and an adapter to do things to."""
    base = tmp_path / "base"
    shutil.copytree(converted, base)
    return base, write_adapter(tmp_path / "A", trained_leaves(), Checkpoint.open(base), SMALL_LORA)


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    written = json.loads((folder / "config.json").read_text())
    change(written)
    (folder / "config.json").write_text(json.dumps(written))


def test_a_base_that_moved_is_named_and_can_be_corrected(movable: tuple[Path, Path], tmp_path: Path) -> None:
    base, folder = movable
    base.rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(folder)
    assert str(base) in str(caught.value)
    assert "if it has moved, correct its config.json" in str(caught.value)
    edit(folder, lambda written: written["adapter"]["base"].update(folder=str(tmp_path / "elsewhere")))
    np.testing.assert_allclose(
        Checkpoint.open(folder).read_leaf((*QUERY, "kernel")), merged_leaves()[*QUERY, "kernel"], atol=1e-6
    )


def test_a_base_that_is_another_checkpoint_now_is_refused(movable: tuple[Path, Path]) -> None:
    base, folder = movable
    provenance = json.loads((base / "provenance.json").read_text())
    provenance["files"] = dict.fromkeys(provenance["files"], "0" * 64)
    (base / "provenance.json").write_text(json.dumps(provenance))
    with pytest.raises(CheckpointError, match="was trained on another checkpoint than"):
        Checkpoint.open(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda adapter: adapter.pop("base"),
        lambda adapter: adapter["base"].pop("identity"),
        lambda adapter: adapter.pop("lora"),
        lambda adapter: adapter["lora"].pop("targets"),
        lambda adapter: adapter["lora"].update(rank=0),
        lambda adapter: adapter["lora"].update(unknown=1),
        lambda adapter: adapter.update(base="somewhere"),
    ],
    ids=["no base", "no identity", "no lora", "no targets", "bad rank", "unknown setting", "odd base"],
)
def test_a_damaged_description_is_one_clear_error(movable: tuple[Path, Path], change: Callable[..., object]) -> None:
    edit(movable[1], lambda written: change(written["adapter"]))
    with pytest.raises(CheckpointError, match="does not say what it belongs on"):
        Checkpoint.open(movable[1])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda leaves: leaves.pop((*QUERY, lora.B)), "language/layers/query/lora_b"),
        (lambda leaves: leaves.update({("language", "layers", "up", "lora_a"): np.zeros((3, 64, 3))}), "up/lora_a"),
        (lambda leaves: leaves.update({(*QUERY, lora.A): np.zeros((3, 64, 4), np.float32)}), "query/lora_a"),
        (lambda leaves: leaves.update({("vision", "post_norm", "scale"): np.zeros(3, np.float32)}), "post_norm/scale"),
    ],
    ids=["missing", "surplus", "rank", "shape"],
)
def test_matrices_that_do_not_fit_are_named(
    converted: Path, tmp_path: Path, change: Callable[..., object], named: str
) -> None:
    leaves = trained_leaves()
    change(leaves)
    checkpoint = Checkpoint.open(write_adapter(tmp_path / "A", leaves, Checkpoint.open(converted), SMALL_LORA))
    with pytest.raises(CheckpointError) as caught:
        checkpoint.restore("float32")
    assert named in str(caught.value)
    assert "take another checkpoint of the run" in str(caught.value)


def test_a_base_of_another_model_is_refused(movable: tuple[Path, Path]) -> None:
    edit(movable[1], lambda written: written["model"]["language"].update(rope_theta=5.0))
    with pytest.raises(CheckpointError, match="is another model"):
        Checkpoint.open(movable[1])


def test_damaged_matrices_are_one_clear_error(movable: tuple[Path, Path]) -> None:
    shutil.rmtree(movable[1] / "params")
    (movable[1] / "params").mkdir()
    with pytest.raises(CheckpointError, match="take another checkpoint of the run"):
        Checkpoint.open(movable[1]).restore("float32")
