"""Work shared by devices gives what one device gives, and each of them holds its part and no more."""

import dataclasses
import functools
import itertools
import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from recipe import recipe_tensors, to_ours
from small_runs import QUICK_COMPILATION
from training import SMALL, SMALL_LEVELS, norm, preprocess, small_adapters, small_batch

from deqa_jax import Scorer, lora
from deqa_jax.checkpoint import PREPROCESSOR_FILE, Checkpoint, InMemory, write_checkpoint
from deqa_jax.config import PRESETS, ConfigError, DeqaConfig, MeshConfig
from deqa_jax.files import new_folder
from deqa_jax.lora import LoraConfig
from deqa_jax.parameters import Leaves, parameter_shapes
from deqa_jax.random_model import random_side_files
from deqa_jax.sharding import (
    AXES,
    BATCH,
    abstract,
    batch_shards,
    bytes_per_device,
    check_batch,
    check_memory,
    compile_for,
    feed,
    following,
    gather,
    make_mesh,
    mesh_shape,
    mesh_shapes,
    parameter_shardings,
    partition_specs,
)
from deqa_jax.train.objective import Batch
from deqa_jax.train.optimizer import OptimizerConfig, ParameterRule
from deqa_jax.train.program import Program
from deqa_jax.train.saving import Progress, Saver
from deqa_jax.train.settings import TrainConfig, read_config
from deqa_jax.train.step import TrainState

GOLDEN = Path(__file__).parent / "golden" / "partition_specs.json"
CONFIGS = Path(__file__).resolve().parents[1] / "configs"


@pytest.fixture(autouse=True)
def quick_compilation(monkeypatch: pytest.MonkeyPatch) -> None:
    real = jax.jit
    monkeypatch.setattr(
        jax, "jit", lambda function, **kwargs: real(function, **(kwargs | {"compiler_options": QUICK_COMPILATION}))
    )


Axes = tuple[int, int, int]
ALL_DATA, ALL_FSDP, CUBE, ALL_TENSOR = (8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 1, 8)
MESHES = [ALL_DATA, ALL_FSDP, CUBE, ALL_TENSOR]

_TEST = PRESETS["test"]
# Eight divides every size that a row of the table splits, and in `wide` every number of heads.
SIZES = {
    "wide": dataclasses.replace(
        _TEST,
        vision=dataclasses.replace(_TEST.vision, image_size=28, hidden_size=32, mlp_dim=64, num_heads=8),
        abstractor=dataclasses.replace(
            _TEST.abstractor, num_queries=4, hidden_size=32, mlp_dim=48, num_layers=1, num_heads=8
        ),
        language=dataclasses.replace(
            _TEST.language, vocab_size=480, hidden_size=64, mlp_dim=80, num_layers=2, num_heads=8, num_kv_heads=8
        ),
    ),
    # Heads that are split over several devices, and key/value heads that query heads share.
    "few heads": dataclasses.replace(
        _TEST,
        vision=dataclasses.replace(_TEST.vision, image_size=28, hidden_size=24, mlp_dim=40, num_layers=1, num_heads=3),
        abstractor=dataclasses.replace(
            _TEST.abstractor, num_queries=5, hidden_size=24, mlp_dim=32, num_layers=2, num_heads=2
        ),
        language=dataclasses.replace(
            _TEST.language, vocab_size=488, hidden_size=48, mlp_dim=56, num_layers=3, num_heads=6, num_kv_heads=2
        ),
    ),
}
LORA = LoraConfig(rank=3, alpha=6.0, dropout=0.3)


def config_of(axes: Axes) -> MeshConfig:
    return MeshConfig(**dict(zip(AXES, axes, strict=True)))


def mesh_of(axes: Axes, devices: Sequence[Any] | None = None) -> Mesh:
    return make_mesh(config_of(axes), devices)


def one_device() -> Mesh:
    return mesh_of((1, 1, 1), jax.devices()[:1])


def name_of(axes: Axes) -> str:
    return "×".join(map(str, axes))


# ---- the same numbers as on one device --------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Run:
    """A step of training, on whatever devices."""

    size: str
    seed: int = 0
    adapters: bool = False
    pairs: bool = True
    remat: str = "none"

    def program(self, mesh: Mesh) -> Program:
        # The steps that AdamW takes without its epsilon have the sign of the gradient, even where it is all rounding.
        optimizer = OptimizerConfig(
            learning_rate=0.1, epsilon=0.1, warmup_ratio=0.0, weight_decay=0.1, clip_norm=0.5 if self.seed else 1e9
        )
        rules = (
            ParameterRule("lora_" if self.adapters else "^vision/", 1.0),
            ParameterRule("", 0.0 if self.adapters else 0.5),
        )
        config = TrainConfig(
            model="",
            output="",
            optimizer=optimizer,
            parameters=rules,
            lora=LORA if self.adapters else None,
            batch_size_per_device=8 // mesh.size,
            dtype="float32",
            remat=self.remat,
            seed=self.seed,
        )
        return Program(config, SIZES[self.size], preprocess(), (1, 9, 7), SMALL_LEVELS, steps=10, mesh=mesh)

    def leaves(self) -> Leaves:
        return leaves_of(self.size, self.seed) | (adapters_of(self.size, self.seed) if self.adapters else {})

    def batch(self) -> Batch:
        # Descriptions are a task of their own, and lie on some devices only.
        return small_batch(8, 2 if self.pairs else 1, seed=self.seed, descriptions=[1, 2, 6])


@functools.cache
def leaves_of(size: str, seed: int) -> Leaves:
    return dict(to_ours(SIZES[size], recipe_tensors(SIZES[size], seed)))


def adapters_of(size: str, seed: int) -> Leaves:
    return small_adapters(LORA, seed, parameter_shapes(SIZES[size]))


def first_state(program: Program, leaves: Leaves) -> tuple[TrainState, Leaves]:
    """What a step starts from, in its places: the state, and what is frozen."""
    params = {path: jax.device_put(leaves[path], program.shardings[path]) for path in program.trained}
    frozen = {path: jax.device_put(leaves[path], program.shardings[path]) for path in program.frozen_paths}
    step = jax.device_put(jnp.int32(3), program.state().step.sharding)
    return TrainState(step, params, program.first_optimizer(params)), frozen


def take_step(run: Run, mesh: Mesh) -> tuple[TrainState, dict[str, Any]]:
    program = run.program(mesh)
    assert program.batch_size == 8
    state, frozen = first_state(program, run.leaves())
    batch = jax.device_put(run.batch(), program.batch_sharding)
    state, metrics = program.compile(batch)(state, frozen, batch)
    for leaf, shape in zip(jax.tree.leaves(state), jax.tree.leaves(program.state()), strict=True):
        assert (leaf.shape, leaf.dtype, leaf.sharding) == (shape.shape, shape.dtype, shape.sharding)
    return state, metrics


@functools.cache
def step_on_one_device(run: Run) -> tuple[TrainState, dict[str, Any]]:
    return take_step(run, one_device())


def cases() -> list[Any]:
    wide, few = Run("wide"), Run("few heads", seed=1, adapters=True, pairs=False)
    adapters = Run("wide", seed=2, adapters=True)
    chosen = [(axes, wide) for axes in (ALL_DATA, ALL_FSDP, ALL_TENSOR)] + [(axes, adapters) for axes in MESHES]
    chosen += [(CUBE, dataclasses.replace(run, remat="full")) for run in (wide, adapters)]
    chosen.append((CUBE, few))
    return [
        pytest.param(
            axes,
            run,
            id=f"{name_of(axes)} {run.size} {'LoRA' if run.adapters else 'full'} {run.remat} seed {run.seed}",
        )
        for axes, run in chosen
    ]


@pytest.mark.parametrize(("axes", "run"), cases())
def test_a_step_on_a_mesh_is_the_step_of_one_device(axes: Axes, run: Run) -> None:
    expected, wanted_metrics = step_on_one_device(dataclasses.replace(run, remat="none"))
    state, metrics = take_step(run, mesh_of(axes))
    assert {"loss", "grad_norm", "next_token_A", "score_A"} | (
        {"rank", "score_B"} if run.pairs else set()
    ) <= metrics.keys()
    assert metrics.keys() == wanted_metrics.keys()
    for name, value in metrics.items():
        np.testing.assert_allclose(value, wanted_metrics[name], rtol=1e-5, atol=1e-5, err_msg=name)
    assert int(state.step) == 4
    assert state.params.keys() == expected.params.keys()
    for path, leaf in state.params.items():
        np.testing.assert_allclose(leaf, expected.params[path], rtol=1e-5, atol=1e-5, err_msg=str(path))
    assert jax.tree.structure(state.optimizer) == jax.tree.structure(expected.optimizer)
    for one, other in zip(jax.tree.leaves(state.optimizer), jax.tree.leaves(expected.optimizer), strict=True):
        # Moments are what became of the gradient: small numbers, which 1e-5 would let pass whatever they are.
        assert norm(np.asarray(one) - np.asarray(other)) <= 1e-5 * norm(other) + 1e-7
    before = run.leaves()
    still = {path for path, leaf in expected.params.items() if np.abs(np.asarray(leaf) - before[path]).max() < 1e-4}
    # The gradient of the keys' shared bias is zero but for rounding.
    assert still <= {("abstractor", "layers", "key", "bias")}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Checkpoint]:
    """Converted checkpoints of the recipe's weights, by size and seed."""

    @functools.cache
    def write(size: str, seed: int) -> Checkpoint:
        side_files = random_side_files()
        preprocessor = {**json.loads(side_files[PREPROCESSOR_FILE]), "size": 28, "crop_size": 28}
        side_files[PREPROCESSOR_FILE] = json.dumps(preprocessor).encode()
        folder = tmp_path_factory.mktemp("model") / "M"
        return write_model(folder, SIZES[size], leaves_of(size, seed), side_files)

    return write


def write_model(folder: Path, config: DeqaConfig, leaves: Leaves, side_files: dict[str, bytes]) -> Checkpoint:
    with new_folder(folder) as temporary:
        write_checkpoint(
            temporary,
            config=config,
            leaves={path: InMemory(leaf) for path, leaf in leaves.items()},
            side_files=side_files,
            published_config=None,
            provenance={"source": "a test"},
        )
    return Checkpoint.open(folder)


@pytest.fixture(scope="module")
def alone(checkpoints: Callable[[str, int], Checkpoint]) -> Callable[[str, int], Scorer]:
    return functools.cache(lambda size, seed: Scorer(checkpoints(size, seed), batch_size=8))


@pytest.mark.parametrize(
    ("size", "seed", "axes"),
    [*(("wide", 0, axes) for axes in MESHES), ("few heads", 3, ALL_TENSOR)],
)
def test_scores_of_a_batch_on_a_mesh_are_those_of_one_device(
    size: str, seed: int, axes: Axes, checkpoints: Callable[[str, int], Checkpoint], alone: Callable[[str, int], Scorer]
) -> None:
    scorer = Scorer(checkpoints(size, seed), batch_size=8, mesh=config_of(axes))
    images = list(np.random.default_rng(seed).integers(0, 256, (8, 28, 28, 3), np.uint8))
    expected = alone(size, seed).predict(images, open_set=True, hidden=True)
    found = scorer.predict(images, open_set=True, hidden=True)
    assert np.ptp(expected.score) > 1e-3
    for name, wanted in expected._asdict().items():
        np.testing.assert_allclose(getattr(found, name), wanted, rtol=1e-5, atol=1e-5, err_msg=name)
    # What pads a short batch has a place on a device of its own.
    short = scorer.predict(images[:3], open_set=True, hidden=True)
    for ours, whole in zip(short, found, strict=True):
        np.testing.assert_array_equal(ours, whole[:3])


@pytest.mark.parametrize("axes", MESHES, ids=name_of)
def test_a_scorer_holds_its_parameters_in_parts(axes: Axes, checkpoints: Callable[[str, int], Checkpoint]) -> None:
    mesh = mesh_of(axes)
    scorer = Scorer(checkpoints("wide", 0), mesh=config_of(axes))
    assert scorer.batch_size == batch_shards(mesh) == axes[0] * axes[1]
    shardings = parameter_shardings(parameter_shapes(SIZES["wide"]), mesh)
    found = {tuple(key.key for key in keys): leaf for keys, leaf in jax.tree_util.tree_leaves_with_path(scorer._params)}
    assert {path: leaf.sharding for path, leaf in found.items()} == shardings


# ---- each device holds its part ---------------------------------------------------------------------------

MEGABYTE = 1 << 20


@functools.cache
def published_program(name: str, axes: Axes) -> Program:
    """A published run at full size; there are shapes only."""
    config = read_config(CONFIGS / name)
    full = PRESETS["full"]
    pixels = dataclasses.replace(preprocess(), size=full.vision.image_size)
    return Program(config, full, pixels, (1, 9, 7), SMALL_LEVELS, steps=100, mesh=mesh_of(axes))


def size_of(leaf: Any, shape: Sequence[int]) -> int:
    return math.prod(shape) * leaf.dtype.itemsize


@pytest.mark.parametrize("name", ["mix3_full.yaml", "mix3_lora.yaml"])
def test_no_large_leaf_of_a_full_size_run_is_whole_on_any_device(name: str) -> None:
    program = published_program(name, ALL_FSDP)
    leaves = jax.tree_util.tree_leaves_with_path((program.state(), program.frozen()))
    large = [(keys, leaf) for keys, leaf in leaves if size_of(leaf, leaf.shape) > MEGABYTE]
    # Parameters and, of the trained ones, two moments.
    adapted = name == "mix3_lora.yaml"
    kernels = [leaf for keys, leaf in leaves if jax.tree_util.keystr(keys[-1:]).endswith("'kernel')]")]
    assert len(kernels) > 25
    assert len(large) >= len(kernels)
    assert any("lora_b" in str(keys) for keys, _ in large) == adapted
    for keys, leaf in large:
        assert not leaf.sharding.is_fully_replicated, keys
        part = leaf.sharding.shard_shape(leaf.shape)
        assert size_of(leaf, part) * 8 == size_of(leaf, leaf.shape), keys


@pytest.mark.parametrize("name", ["mix3_full.yaml", "mix3_lora.yaml"])
@pytest.mark.parametrize("axes", [ALL_FSDP, (1, 4, 2), (1, 2, 4)], ids=name_of)
def test_devices_share_a_full_size_run_evenly(name: str, axes: Axes) -> None:
    program = published_program(name, axes)
    total = sum(size_of(leaf, leaf.shape) for leaf in jax.tree.leaves((program.state(), program.frozen())))
    parameters = sum(map(math.prod, parameter_shapes(PRESETS["full"]).values()))
    assert total > (12 if name == "mix3_full.yaml" else 2) * parameters
    assert total / 8 <= program.bytes_per_device() <= 1.15 * total / 8
    # What is small, and left whole by one axis of the two, is a larger part of the trained parameters alone.
    for part in (program.state().params, program.state().optimizer, program.frozen()) if axes != (1, 2, 4) else ():
        whole = sum(size_of(leaf, leaf.shape) for leaf in jax.tree.leaves(part))
        assert whole / 8 <= bytes_per_device(part) <= 1.15 * whole / 8


@pytest.mark.parametrize("axes", MESHES, ids=name_of)
@pytest.mark.parametrize("adapters", [False, True], ids=["full", "LoRA"])
def test_bytes_of_a_device_are_what_it_holds(axes: Axes, adapters: bool) -> None:
    run = Run("wide", adapters=adapters)
    program = run.program(mesh_of(axes))
    held = first_state(program, run.leaves())
    found = dict.fromkeys(jax.devices(), 0)
    for leaf in jax.tree.leaves(held):
        for shard in leaf.addressable_shards:
            found[shard.device] += shard.data.nbytes
    assert len(found) == 8
    assert set(found.values()) == {bytes_per_device(held)} == {program.bytes_per_device()}
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(held))
    assert program.bytes_per_device() == total if axes == ALL_DATA else program.bytes_per_device() < 0.55 * total


def test_first_adapters_are_the_same_on_every_mesh_and_in_their_places() -> None:
    expected = Run("wide", adapters=True).program(one_device()).first_adapters()
    assert {path[-1] for path in expected} == {lora.A, lora.B}
    for axes in MESHES:
        program = Run("wide", adapters=True).program(mesh_of(axes))
        found = program.first_adapters()
        assert found.keys() == expected.keys()
        for path, leaf in found.items():
            assert leaf.sharding == program.shardings[path]
            np.testing.assert_array_equal(leaf, expected[path])


@pytest.mark.parametrize("axes", MESHES, ids=name_of)
def test_a_batch_is_split_by_its_rows(axes: Axes) -> None:
    mesh = mesh_of(axes)
    program = Run("wide").program(mesh)
    for leaf in program.batch(16, 2, 11):
        assert leaf.shape[0] == 16
        assert leaf.sharding == NamedSharding(mesh, BATCH)
        assert leaf.sharding.shard_shape(leaf.shape) == (16 // batch_shards(mesh), *leaf.shape[1:])
    assert jax.tree.map(lambda x: (x.shape, x.dtype), program.batch(8, 2, 11)) == jax.tree.map(
        lambda x: (x.shape, x.dtype), small_batch(8)
    )


def test_what_belongs_to_a_parameter_lies_with_it_and_the_rest_everywhere() -> None:
    mesh = mesh_of(CUBE)
    kernel, scale = ("language", "layers", "query", "kernel"), ("vision", "pre_norm", "scale")
    shardings = parameter_shardings({kernel: (2, 8, 8), scale: (8,)}, mesh)
    tree = {"count": 1, "inner": [{kernel: 2, scale: 3}, {scale: {"mean": 4}}], "other": {("vision", "x"): 5}}
    found = following(tree, shardings, mesh)
    everywhere = NamedSharding(mesh, PartitionSpec())
    assert found == {
        "count": everywhere,
        "inner": [{kernel: shardings[kernel], scale: shardings[scale]}, {scale: {"mean": shardings[scale]}}],
        "other": {("vision", "x"): everywhere},
    }
    assert shardings[kernel].spec == PartitionSpec(None, "fsdp", "tensor")


def test_shapes_know_their_places() -> None:
    place = NamedSharding(mesh_of(CUBE), PartitionSpec("fsdp", "tensor"))
    found = abstract({"a": np.zeros((4, 6), np.int8)}, {"a": place})["a"]
    assert (found.shape, found.dtype, found.sharding) == ((4, 6), np.int8, place)
    assert bytes_per_device([found]) == 6
    assert bytes_per_device([jax.device_put(np.zeros((4, 6), np.float32), place)]) == 24


@pytest.mark.parametrize("axes", MESHES, ids=name_of)
def test_what_is_gathered_is_whole(axes: Axes) -> None:
    whole = np.arange(64 * 8, dtype=np.float32).reshape(64, 8)
    found = gather(jax.device_put(whole, NamedSharding(mesh_of(axes), BATCH)))
    assert isinstance(found, np.ndarray)
    np.testing.assert_array_equal(found, whole)
    np.testing.assert_array_equal(gather(whole), whole)


def test_a_program_is_compiled_for_the_devices_of_a_mesh() -> None:
    place = NamedSharding(mesh_of((1, 4, 1), jax.devices()[4:]), BATCH)
    array = jax.device_put(np.arange(8, dtype=np.float32), place)
    compiled = compile_for(
        place.mesh, jax.jit(lambda x: 2 * x).trace(jax.ShapeDtypeStruct((8,), np.float32, sharding=place))
    )
    found = compiled(array)
    assert found.sharding.device_set == set(jax.devices()[4:])
    np.testing.assert_array_equal(found, 2 * np.arange(8))


# ---- the table at full size -------------------------------------------------------------------------------


def full_size_table() -> str:
    """Every parameter of the published LoRA run, a line each: shape, split, and a device's part on three meshes."""
    shapes = parameter_shapes(PRESETS["full"])
    config = read_config(CONFIGS / "mix3_lora.yaml").lora
    assert config is not None
    shapes = {**shapes, **lora.adapter_shapes(shapes, config)}
    specs = partition_specs(shapes)
    meshes = {name_of(axes): parameter_shardings(shapes, mesh_of(axes)) for axes in (ALL_FSDP, CUBE, (1, 4, 2))}
    rows = {
        "/".join(path): {
            "shape": shape,
            "spec": list(specs[path]),
            **{name: shardings[path].shard_shape(shape) for name, shardings in meshes.items()},
        }
        for path, shape in sorted(shapes.items())
    }
    lines = (f"  {json.dumps(name)}: {json.dumps(row, ensure_ascii=False)}" for name, row in rows.items())
    return "{\n" + ",\n".join(lines) + "\n}\n"


def test_the_table_at_full_size_is_the_golden_one(tmp_path: Path) -> None:
    found = tmp_path / "partition_specs.json"
    found.write_text(full_size_table(), encoding="utf-8")
    stored = json.loads(GOLDEN.read_text(encoding="utf-8"))
    assert json.loads(found.read_text(encoding="utf-8")) == stored, f"if this was meant: cp {found} {GOLDEN}"
    assert found.read_bytes() == GOLDEN.read_bytes()
    assert sum("lora_" in name for name in stored) == 4


@pytest.mark.parametrize("size", PRESETS)
def test_the_table_covers_every_model(size: str) -> None:
    shapes = parameter_shapes(PRESETS[size])
    every = LoraConfig(rank=4, targets=(r"(?!language/head).*",))
    shapes = {**shapes, **lora.adapter_shapes(shapes, every)}
    specs = partition_specs(shapes)
    assert specs.keys() == shapes.keys()
    assert sum(path[-1] == lora.A for path in specs) == sum(path[-1] == "kernel" for path in specs) - 1
    for path, spec in specs.items():
        assert len(spec) == len(shapes[path])
        if "layers" in path:
            assert spec[0] is None
        named = [name for axes in spec for name in (axes if isinstance(axes, tuple) else [axes]) if name]
        assert len(set(named)) == len(named)
        assert set(named) <= {"fsdp", "tensor"}
        if path[-1] == "kernel":
            assert "fsdp" in named, path
            assert ("tensor" in named) == (path != ("vision", "patch_embedding", "kernel")), path
        elif path[-1] in (lora.A, lora.B):
            # The rank is never split.
            assert spec[-1 if path[-1] == lora.A else -2] is None


@pytest.mark.parametrize(
    ("into", "out"),
    [(("query", "key", "value"), ("out",)), (("up", "gate"), ("down",)), (("query_key_value", "up"), ("out", "down"))],
)
def test_products_into_a_block_are_split_by_columns_and_those_out_of_it_by_rows(
    into: tuple[str, ...], out: tuple[str, ...]
) -> None:
    specs = partition_specs(parameter_shapes(PRESETS["full"]))
    for names, wanted in ((into, (None, "fsdp", "tensor")), (out, (None, "tensor", "fsdp"))):
        found = {spec for path, spec in specs.items() if path[-1] == "kernel" and set(path) & set(names)}
        assert found == {PartitionSpec(*wanted)}


# ---- checkpoints ------------------------------------------------------------------------------------------

PAIRS = [
    pytest.param(one, other, id=f"{name_of(one)} to {name_of(other)}")
    for one, other in itertools.permutations(MESHES, 2)
]


@pytest.fixture(scope="module")
def written_on(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Axes], Checkpoint]:
    """Checkpoints whose parameters lay on a mesh when they were written."""

    @functools.cache
    def write(axes: Axes) -> Checkpoint:
        shardings = parameter_shardings(parameter_shapes(SIZES["wide"]), mesh_of(axes))
        leaves = {path: jax.device_put(leaf, shardings[path]) for path, leaf in leaves_of("wide", 5).items()}
        return write_model(tmp_path_factory.mktemp("written") / "M", SIZES["wide"], leaves, random_side_files())

    return write


def assert_lies(leaf: Any, whole: np.ndarray, place: Any) -> None:
    """The same bits, each device's part on that device."""
    assert (leaf.shape, leaf.dtype, leaf.sharding) == (whole.shape, whole.dtype, place)
    assert len(leaf.addressable_shards) == 8
    for shard in leaf.addressable_shards:
        assert shard.data.shape == place.shard_shape(whole.shape)
        np.testing.assert_array_equal(np.asarray(shard.data), whole[shard.index])


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_a_checkpoint_of_one_mesh_is_restored_onto_another(
    one: Axes, other: Axes, written_on: Callable[[Axes], Checkpoint]
) -> None:
    shardings = parameter_shardings(parameter_shapes(SIZES["wide"]), mesh_of(other))
    found = written_on(one).restore(None, shardings=shardings)
    assert found.keys() == shardings.keys()
    for path, leaf in found.items():
        assert_lies(leaf, leaves_of("wide", 5)[path], shardings[path])


@pytest.mark.parametrize("axes", MESHES, ids=name_of)
def test_a_checkpoint_of_a_mesh_is_that_of_the_host(axes: Axes, written_on: Callable[[Axes], Checkpoint]) -> None:
    found = written_on(axes).restore()
    for path, leaf in leaves_of("wide", 5).items():
        assert isinstance(found[path], np.ndarray)
        np.testing.assert_array_equal(found[path], leaf)
    cast = written_on(axes).restore(
        "bfloat16", shardings=parameter_shardings(parameter_shapes(SIZES["wide"]), mesh_of(axes))
    )
    for path, leaf in leaves_of("wide", 5).items():
        assert cast[path].dtype == jnp.bfloat16
        np.testing.assert_array_equal(np.asarray(cast[path]), leaf.astype(jnp.bfloat16))


@pytest.fixture(scope="module")
def saved_on(
    tmp_path_factory: pytest.TempPathFactory, written_on: Callable[[Axes], Checkpoint]
) -> Callable[[Axes], tuple[Path, Any]]:
    """Folders of runs that were saved on a mesh, and the state on the host."""

    @functools.cache
    def save(axes: Axes) -> tuple[Path, Any]:
        folder = tmp_path_factory.mktemp("saved")
        shapes = Run("wide", adapters=True).program(mesh_of(axes)).state()
        random = np.random.default_rng(1)
        state = jax.tree.map(lambda x: random.integers(-99, 99, x.shape).astype(x.dtype) / x.dtype.type(1), shapes)
        state = jax.tree.map(lambda x, shape: x.astype(shape.dtype), state, shapes)
        placed = jax.tree.map(lambda x, shape: jax.device_put(x, shape.sharding), state, shapes)
        with Saver(folder, written_on(axes), LORA, keep=1, batch_size=8, data="d") as saver:
            saver.save(placed, Progress(4), {"next_index": 32})
        return folder, state

    return save


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_a_run_of_one_mesh_goes_on_with_another(
    one: Axes, other: Axes, saved_on: Callable[[Axes], tuple[Path, Any]], written_on: Callable[[Axes], Checkpoint]
) -> None:
    folder, state = saved_on(one)
    like = Run("wide", adapters=True).program(mesh_of(other)).state()
    with Saver(folder, written_on(one), LORA, keep=1, batch_size=8, data="d") as saver:
        restored = saver.restore(like)
    assert restored is not None
    found, progress, data = restored
    assert (progress, data) == (Progress(4), {"next_index": 32})
    assert jax.tree.structure(found) == jax.tree.structure(state)
    for leaf, whole, shape in zip(*map(jax.tree.leaves, (found, state, like)), strict=True):
        assert_lies(leaf, whole, shape.sharding)


# ---- meshes -----------------------------------------------------------------------------------------------


@given(st.integers(1, 600))
@settings(max_examples=40, deadline=None)
def test_meshes_of_so_many_devices_are_all_there_are(devices: int) -> None:
    found = mesh_shapes(devices)
    assert all(math.prod(shape) == devices for shape in found)
    assert len(set(found)) == len(found)
    # Of p^k devices, as many as there are ways to put k things into three places.
    count, rest = 1, devices
    for prime in range(2, devices + 1):
        power = 0
        while rest % prime == 0:
            rest, power = rest // prime, power + 1
        count *= math.comb(power + 2, 2)
    assert len(found) == count


def axis_sizes() -> st.SearchStrategy[tuple[int, int, int]]:
    size = st.one_of(st.integers(1, 9), st.sampled_from([12, 16, 32]))
    return st.tuples(size, size, size)


@given(axis_sizes(), st.sampled_from([0, 1, 2, None]))
@settings(deadline=None)
def test_one_axis_takes_the_devices_that_the_others_leave(shape: Axes, free: int | None) -> None:
    wanted = tuple(-1 if axis == free else size for axis, size in enumerate(shape))
    assert mesh_shape(config_of(wanted), math.prod(shape)) == shape


@given(axis_sizes(), st.sampled_from([0, 1, 2, None]), st.integers(1, 96))
@settings(deadline=None)
def test_a_mesh_fits_or_the_message_has_some_that_do(shape: Axes, free: int | None, devices: int) -> None:
    wanted = tuple(-1 if axis == free else size for axis, size in enumerate(shape))
    known = math.prod(size for size in wanted if size != -1)
    if devices % known == 0 if free is not None else devices == known:
        found = mesh_shape(config_of(wanted), devices)
        assert math.prod(found) == devices
        assert all(size in (-1, axis) for size, axis in zip(wanted, found, strict=True))
        return
    with pytest.raises(ConfigError) as raised:
        mesh_shape(config_of(wanted), devices)
    message = str(raised.value)
    said, suggested = message.split("; nearest: ")
    assert said == f"mesh {config_of(wanted)} does not fit {devices} device{'s' if devices > 1 else ''}"
    nearest = [tuple(map(int, re.findall(r"\d+", one))) for one in suggested.split(" or ")]
    assert len(set(nearest)) == len(nearest) == min(3, len(mesh_shapes(devices)))
    for one in nearest:
        assert mesh_shape(config_of(one), devices) == one


@pytest.mark.parametrize(
    ("wanted", "devices", "nearest"),
    [
        ((3, -1, 1), 8, "data 4, fsdp 2, tensor 1 or data 2, fsdp 4, tensor 1 or data 4, fsdp 1, tensor 2"),
        ((1, 7, 1), 8, "data 1, fsdp 8, tensor 1 or data 1, fsdp 4, tensor 2 or data 2, fsdp 4, tensor 1"),
        ((2, 2, 2), 16, "data 2, fsdp 2, tensor 4 or data 2, fsdp 4, tensor 2 or data 4, fsdp 2, tensor 2"),
        ((1, 2, 1), 1, "data 1, fsdp 1, tensor 1"),
    ],
)
def test_the_nearest_meshes_are_near(wanted: Axes, devices: int, nearest: str) -> None:
    with pytest.raises(ConfigError) as raised:
        mesh_shape(config_of(wanted), devices)
    assert str(raised.value).partition("nearest: ")[2] == nearest


@pytest.mark.parametrize("wanted", [(-1, -1, 1), (0, 1, 1), (1, -2, 1)])
def test_sizes_that_mean_nothing_are_refused(wanted: Axes) -> None:
    with pytest.raises(ConfigError, match=r"at least 1, or one of them -1"):
        config_of(wanted)


def test_a_mesh_has_all_devices_unless_it_is_told_which() -> None:
    mesh = make_mesh(MeshConfig())
    assert dict(mesh.shape) == {"data": 1, "fsdp": 8, "tensor": 1}
    assert mesh.axis_names == AXES
    assert set(mesh.devices.flat) == set(jax.devices())
    some = make_mesh(MeshConfig(data=-1, fsdp=1), jax.devices()[2:5])
    assert dict(some.shape) == {"data": 3, "fsdp": 1, "tensor": 1}
    assert list(some.devices.flat) == jax.devices()[2:5]
    with pytest.raises(ConfigError, match="mesh data 4, fsdp 4, tensor 1 does not fit 8 devices; nearest: data "):
        make_mesh(MeshConfig(data=4, fsdp=4))


# ---- errors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "axes", "nearest"),
    [(3, ALL_DATA, "8"), (12, (2, 4, 1), "8 or 16"), (7, CUBE, "4 or 8"), (1, (2, 1, 4), "2")],
)
def test_a_batch_that_cannot_be_split_is_refused_with_sizes_that_can(size: int, axes: Axes, nearest: str) -> None:
    mesh = mesh_of(axes)
    with pytest.raises(ConfigError) as raised:
        check_batch("batch size", size, mesh)
    assert str(raised.value) == (
        f"batch size {size} does not divide by data × fsdp = {axes[0] * axes[1]} of the mesh; nearest: {nearest}"
    )
    for one in nearest.split(" or "):
        check_batch("batch size", int(one), mesh)


def test_a_scorer_refuses_a_mesh_and_a_batch_that_do_not_fit(checkpoints: Callable[[str, int], Checkpoint]) -> None:
    checkpoint = checkpoints("wide", 0)
    with pytest.raises(ConfigError, match="mesh data 3, fsdp 1, tensor 1 does not fit 8 devices"):
        Scorer(checkpoint, mesh=config_of((3, 1, 1)))
    with pytest.raises(ConfigError, match="batch size 6 does not divide by data × fsdp = 4 of the mesh"):
        Scorer(checkpoint, batch_size=6, mesh=config_of(CUBE))
    scorer = Scorer(checkpoint, mesh=config_of(CUBE))
    with pytest.raises(
        ConfigError, match="batch size 5 does not divide by data × fsdp = 4 of the mesh; nearest: 4 or 8"
    ):
        scorer.predict_pixels(jnp.zeros((5, 28, 28, 3), jnp.uint8))


def test_what_the_table_does_not_cover_is_an_error_that_names_all_of_it() -> None:
    shapes = {
        ("vision", "pre_norm", "scale"): (8,),
        ("vision", "thing"): (3, 4),
        # Covered by name, but of another rank.
        ("language", "embedding"): (8,),
        ("language", "layers", "up", "kernel"): (8, 8),
        ("kernel",): (8, 8),
    }
    with pytest.raises(ConfigError) as raised:
        partition_specs(shapes)
    assert str(raised.value) == (
        "no row of the table in sharding.py covers vision/thing (3, 4), language/embedding (8,), "
        "language/layers/up/kernel (8, 8), kernel (8, 8)"
    )
    with pytest.raises(ConfigError, match=r"covers vision/thing \(3, 4\)$"):
        parameter_shardings({("vision", "thing"): (3, 4)}, mesh_of(CUBE))


@pytest.mark.parametrize(
    ("axes", "shapes", "wanted"),
    [
        (
            ALL_TENSOR,
            parameter_shapes(SMALL),
            "mesh: tensor = 8 does not divide the 28 of abstractor/layers/down/kernel; "
            "nearest for 8 devices: 2 or 4, and the rest on data",
        ),
        (
            (1, 2, 4),
            {("language", "layers", "query", "lora_b"): (3, 2, 12)},
            "mesh: tensor × fsdp = 8 does not divide the 12 of language/layers/query/lora_b; "
            "nearest for 8 devices: 2 or 4, and the rest on data",
        ),
        (
            (1, 3, 2),
            {("language", "head", "kernel"): (12, 16), ("vision", "position_embedding"): (5, 16)},
            "mesh: fsdp = 3 does not divide the 16 of vision/position_embedding; "
            "nearest for 6 devices: 1 or 2, and the rest on data",
        ),
        (
            (1, 5, 1),
            {("language", "embedding"): (15, 12)},
            "mesh: fsdp = 5 does not divide the 12 of language/embedding; "
            "nearest for 5 devices: 1, and the rest on data",
        ),
    ],
)
def test_a_mesh_that_does_not_divide_a_parameter_is_refused(axes: Axes, shapes: Any, wanted: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parameter_shardings(shapes, mesh_of(axes, jax.devices()[: math.prod(axes)]))
    assert str(raised.value) == wanted


def test_a_training_program_refuses_a_mesh_that_does_not_divide_its_model() -> None:
    config = TrainConfig(model="", output="", batch_size_per_device=1, dtype="float32")
    with pytest.raises(ConfigError, match="tensor = 8 does not divide the 28 of abstractor/layers/"):
        Program(config, SMALL, preprocess(), (1,), SMALL_LEVELS, steps=1, mesh=mesh_of(ALL_TENSOR))


def mesh_with_memory(*stats: dict[str, int] | None, size: int) -> Any:
    devices = [SimpleNamespace(memory_stats=lambda one=one: one) for one in stats]
    return SimpleNamespace(local_devices=devices, shape={"data": 1, "fsdp": size, "tensor": 1}, size=size)


def test_a_model_larger_than_a_device_is_refused_with_the_devices_it_takes() -> None:
    gib = 2**30
    mesh = mesh_with_memory({"bytes_limit": 16 * gib}, None, {"bytes_limit": 32 * gib, "bytes_in_use": 0}, size=4)
    check_memory("the model", 16 * gib, mesh)
    with pytest.raises(ConfigError) as raised:
        check_memory("the model", 25 * gib, mesh)
    assert str(raised.value) == (
        "the model takes 25.0 GiB a device on the mesh {'data': 1, 'fsdp': 4, 'tensor': 1}; there are 16.0. "
        "Split it over 7 devices or more, by fsdp or tensor"
    )


@pytest.mark.parametrize("stats", [None, {}, {"bytes_in_use": 1}, {"bytes_limit": 0}])
def test_devices_that_do_not_say_what_they_have_are_not_asked_for_less(stats: dict[str, int] | None) -> None:
    check_memory("the model", 2**60, mesh_with_memory(stats, size=1))


# ---- who reads which rows ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class StandIn:
    """A device of another process."""

    id: int
    process_index: int
    platform: str = "tpu"
    device_kind: str = "stand-in"


def mesh_over(axes: Axes, processes: Sequence[int]) -> Mesh:
    """A mesh of stand-ins; the process of each in the order of the mesh."""
    devices = [StandIn(number, process) for number, process in enumerate(processes)]
    return Mesh(np.array(devices, object).reshape(axes), AXES)


def feeds(mesh: Mesh) -> dict[int, tuple[int, int]]:
    """What every process reads."""
    found = {}
    for process in sorted({device.process_index for device in mesh.devices.flat}):
        with mock.patch.object(jax, "process_index", lambda process=process: process):
            found[process] = feed(mesh)
    return found


@pytest.mark.parametrize(
    ("axes", "per_process", "expected"),
    [
        (ALL_DATA, 8, [(0, 1)]),
        (ALL_DATA, 2, [(0, 4), (1, 4), (2, 4), (3, 4)]),
        (ALL_FSDP, 4, [(0, 2), (1, 2)]),
        (CUBE, 4, [(0, 2), (1, 2)]),
        (CUBE, 2, [(0, 4), (1, 4), (2, 4), (3, 4)]),
        # Two processes, one row: both read it.
        (CUBE, 1, [(0, 4), (0, 4), (1, 4), (1, 4), (2, 4), (2, 4), (3, 4), (3, 4)]),
        ((1, 2, 4), 2, [(0, 2), (0, 2), (1, 2), (1, 2)]),
        (ALL_TENSOR, 2, [(0, 1), (0, 1), (0, 1), (0, 1)]),
    ],
)
def test_processes_read_the_rows_of_their_devices(axes: Axes, per_process: int, expected: list[Any]) -> None:
    mesh = mesh_over(axes, [number // per_process for number in range(8)])
    assert list(feeds(mesh).values()) == expected


def test_a_process_alone_reads_everything() -> None:
    assert all(feed(mesh_of(axes)) == (0, 1) for axes in MESHES)


@pytest.mark.parametrize(
    ("axes", "processes"),
    [
        # A row of three devices over processes of two: the second process has a part of two rows.
        ((2, 1, 3), [0, 0, 1, 1, 2, 2]),
        ((1, 2, 3), [0, 0, 0, 0, 1, 1]),
        # Whole rows, but more of them for one process.
        ((3, 1, 2), [0, 0, 0, 0, 1, 1]),
        # Every other row.
        ((4, 1, 1), [0, 1, 0, 1]),
    ],
)
def test_processes_whose_rows_overlap_in_part_are_refused(axes: Axes, processes: list[int]) -> None:
    mesh = mesh_over(axes, processes)
    with pytest.raises(ConfigError, match=r"processes of \d devices cannot split a batch evenly") as raised:
        feed(mesh)
    assert str(dict(mesh.shape)) in str(raised.value)


@given(st.sampled_from(mesh_shapes(8) + mesh_shapes(12) + mesh_shapes(16)), st.data())
@settings(max_examples=60, deadline=None)
def test_together_processes_read_every_row_and_each_what_its_devices_need(axes: Axes, data: st.DataObject) -> None:
    size = math.prod(axes)
    per_process = data.draw(st.sampled_from([n for n in range(1, size + 1) if size % n == 0]))
    mesh = mesh_over(axes, [number // per_process for number in range(size)])
    shards, tensor = axes[0] * axes[1], axes[2]
    try:
        found = feeds(mesh)
    except ConfigError:
        assert per_process % tensor
        assert tensor % per_process
        return
    assert {part for part, _ in found.values()} == set(range(next(iter(found.values()))[1]))
    for process, (part, parts) in found.items():
        rows = {number // tensor for number in range(process * per_process, (process + 1) * per_process)}
        assert rows == set(range(part * shards // parts, (part + 1) * shards // parts))
