"""The golden batches and weights of training, published names for gradients, and a small task for quick tests."""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from recipe import recipe_tensors, to_ours

from deqa_jax import lora
from deqa_jax.checkpoint import Adapter, Checkpoint, InMemory, write_checkpoint
from deqa_jax.config import PRESETS, DeqaConfig, Execution
from deqa_jax.convert.names import RULES
from deqa_jax.files import new_folder
from deqa_jax.lora import LoraConfig
from deqa_jax.parameters import Leaves, parameter_shapes
from deqa_jax.preprocess import PreprocessConfig, load_square
from deqa_jax.prompt import IGNORED_LABEL, IMAGE_ID
from deqa_jax.random_model import random_side_files
from deqa_jax.train.objective import Batch, Objective
from deqa_jax.train.step import Task

GOLDEN = Path(__file__).parent / "golden"
TRAIN = GOLDEN / "train"
# What the published tokenizer makes of the five words, and of the text in front of them.
LEVEL_IDS = (15129, 1781, 6534, 6460, 4319)
LEVEL_PREFIX = (450, 11029, 310, 278, 1967, 338)
# Absent fields of the published metas.
ABSENT = -10000.0


def jit(function: Callable[..., Any], **options: Any) -> Any:
    """`jax.jit` that compiles in half the time; what is run once or twice need not be fast."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0}, **options)


@functools.cache
def preprocess() -> PreprocessConfig:
    return PreprocessConfig.from_published(json.loads(random_side_files()["preprocessor_config.json"]))


# ---- the golden runs --------------------------------------------------------------------------------------


@functools.cache
def golden_runs() -> dict[str, Any]:
    """`train.json`."""
    return json.loads((TRAIN / "train.json").read_text())


GOLDEN_SETTINGS = [name for name, run in golden_runs().items() if "config" in run]
_BATCH_OF = {
    "default_b2": "B2",
    "mixed_tasks": "MIX",
    "single_softkl": "S",
    "single_no_softkl": "S",
    "single_mixed": "SM",
}


def batch_name(setting: str) -> str:
    return _BATCH_OF.get(setting, "B1")


def golden_objective(name: str) -> Objective:
    settings = golden_runs()[name]["config"]
    return Objective(**{**settings, "weight_in_level": settings["weight_in_level"] or 0.0})


class GoldenBatches(NamedTuple):
    """What is in front of every image, and the batches by name, all padded to one length."""

    before: tuple[int, ...]
    batches: dict[str, Batch]


@functools.cache
def golden_batches() -> GoldenBatches:
    arrays = np.load(TRAIN / "train_batches.npz")
    names = {"B1": "AB", "B2": "AB", "MIX": "AB", "S": "", "SM": ""}
    prefixes = {name: [f"{name}.item_{side}" for side in sides] or [name] for name, sides in names.items()}
    ids = {prefix: arrays[f"{prefix}.input_ids"] for group in prefixes.values() for prefix in group}
    placeholder = {int(np.flatnonzero(row == IMAGE_ID)[0]) for rows in ids.values() for row in rows}
    assert len(placeholder) == 1
    start = placeholder.pop() + 1
    length = max(rows.shape[1] for rows in ids.values()) - start
    images = {name: _golden_images(golden_runs()["batches"][name]) for name in names}

    def side(prefix: str) -> dict[str, np.ndarray]:
        count = len(ids[prefix])
        padding = ((0, 0), (0, start + length - ids[prefix].shape[1]))
        labels = np.pad(arrays[f"{prefix}.labels"], padding, constant_values=IGNORED_LABEL)[:, start:]
        given = {
            ours: arrays[f"{prefix}.{theirs}"] if f"{prefix}.{theirs}" in arrays else np.zeros(count, np.float32)
            for ours, theirs in (("gt_score", "gt_scores"), ("gt_std", "stds"), ("level_probs", "level_probs"))
        }
        return {
            "after": np.pad(ids[prefix], padding)[:, start:].astype(np.int32),
            "labels": labels.astype(np.int32),
            "level_position": np.array([_level_position(row) for row in labels], np.int32),
            **given,
        }

    batches = {}
    for name, group in prefixes.items():
        sides = [side(prefix) for prefix in group]
        fields = {field: np.stack([one[field] for one in sides], axis=1) for field in sides[0]}
        is_score = np.array([spec[0] != "description" if isinstance(spec, list) else True for spec in _specs(name)])
        batch = Batch(images=images[name], is_score=is_score, **fields)
        batches[name] = jax.tree.map(jnp.asarray, batch)
    before = {tuple(row[: start - 1].tolist()) for rows in ids.values() for row in rows}
    assert len(before) == 1
    return GoldenBatches(before.pop(), batches)


def _specs(name: str) -> list[Any]:
    return golden_runs()["batches"][name]


def _level_position(labels: np.ndarray) -> int:
    """Behind the first occurrence of the prefix; anything where there is none, as for descriptions."""
    width = len(LEVEL_PREFIX)
    found = [i for i in range(len(labels) - width) if tuple(labels[i : i + width]) == LEVEL_PREFIX]
    return found[0] + width if found else 0


def _golden_images(specs: Sequence[Any]) -> np.ndarray:
    """Squares `[B, S, H, W, 3]` of `[a, b]`, `[task, a, b]`, `[task, a]` or `a`, which count the metas of the task."""
    metas = {
        "score": json.loads((TRAIN / "train_metas.json").read_text()),
        "description": json.loads((TRAIN / "train_desp_metas.json").read_text()),
    }

    @functools.cache
    def square(name: str) -> np.ndarray:
        return load_square(GOLDEN / "images" / name, preprocess())

    rows = []
    for spec in specs:
        task, *indices = (
            spec if isinstance(spec, list) and isinstance(spec[0], str) else ["score", *np.atleast_1d(spec)]
        )
        rows.append(np.stack([square(metas[task][i]["image"]) for i in indices]))
    return np.stack(rows)


@functools.cache
def golden_leaves() -> Leaves:
    """The golden model's parameters, float32 NumPy arrays."""
    return dict(to_ours(PRESETS["test"], recipe_tensors(PRESETS["test"])))


def golden_task(**changes: Any) -> Task:
    task = Task(PRESETS["test"], preprocess(), golden_batches().before, LEVEL_IDS, Objective(), Execution())
    return dataclasses.replace(task, **changes)


def to_published(leaves: Mapping[tuple[str, ...], Any]) -> dict[str, np.ndarray]:
    """Parameters, or their gradients, under their published names and in their published form."""
    rules = {rule.path: rule for rule in RULES}
    published = {}
    for path, leaf in leaves.items():
        rule, array = rules[path], np.asarray(leaf)
        for i, key in enumerate(rule.keys(array.shape)):
            published[key] = rule.form.to_published(array[i] if rule.stacked else array)
    return published


def norm(array: Any) -> float:
    """In float64: float32 sums of many squares lose the digits that are compared."""
    return float(np.linalg.norm(np.asarray(array, np.float64)))


# ---- a small task -----------------------------------------------------------------------------------------

_TEST = PRESETS["test"]
SMALL: DeqaConfig = dataclasses.replace(
    _TEST,
    vision=dataclasses.replace(_TEST.vision, image_size=28, hidden_size=24, mlp_dim=32, num_layers=2, num_heads=3),
    abstractor=dataclasses.replace(
        _TEST.abstractor, num_queries=4, hidden_size=24, mlp_dim=28, num_layers=2, num_heads=2
    ),
    language=dataclasses.replace(
        _TEST.language, vocab_size=64, hidden_size=32, mlp_dim=40, num_layers=3, num_heads=4, num_kv_heads=4
    ),
)
SMALL_LEVELS = (11, 5, 40, 23, 8)
SMALL_LORA = LoraConfig(rank=3, alpha=6.0, dropout=0.0)
_ANSWER = (30, 31, 32)  # in front of the level word


def small_task(**changes: Any) -> Task:
    task = Task(SMALL, preprocess(), (1, 9, 7), SMALL_LEVELS, Objective(), Execution())
    return dataclasses.replace(task, **changes)


@functools.cache
def small_arrays(seed: int = 0) -> Leaves:
    return dict(to_ours(SMALL, recipe_tensors(SMALL, seed)))


def small_leaves(seed: int = 0) -> Leaves:
    """New arrays at every call: a step that is given its state may reuse their memory."""
    return {path: jnp.array(leaf) for path, leaf in small_arrays(seed).items()}


def small_batch(size: int = 3, sides: int = 2, *, seed: int = 0, descriptions: Sequence[int] = ()) -> Batch:
    """A batch as the pipeline makes them: question, answer with a level word and its end, padding."""
    random = np.random.default_rng(seed)
    question, length = 4, 11
    position = question + len(_ANSWER)
    after = np.zeros((size, sides, length), np.int32)
    after[..., :question] = random.integers(1, 60, (size, sides, question))
    after[..., question:position] = _ANSWER
    after[..., position] = random.choice(SMALL_LEVELS, (size, sides))
    after[..., position + 1] = 2
    labels = np.where(np.arange(length) < question, IGNORED_LABEL, after)
    labels[..., position + 2 :] = IGNORED_LABEL
    is_score = ~np.isin(np.arange(size), descriptions)
    batch = Batch(
        images=random.integers(0, 256, (size, sides, 28, 28, 3), np.uint8),
        after=after,
        labels=labels.astype(np.int32),
        level_position=np.full((size, sides), position, np.int32),
        level_probs=random.dirichlet(np.ones(5), (size, sides)).astype(np.float32),
        gt_score=random.uniform(10, 90, (size, sides)).astype(np.float32),
        gt_std=random.uniform(5, 15, (size, sides)).astype(np.float32),
        is_score=is_score,
    )
    return jax.tree.map(jnp.asarray, batch)


# ---- adapters ---------------------------------------------------------------------------------------------

QUERY, VALUE = ("language", "layers", "query"), ("language", "layers", "value", "visual")


def small_adapters(config: LoraConfig = SMALL_LORA, seed: int = 0, shapes: Any = None) -> Leaves:
    """Adapters as after some training: both matrices random."""
    random = np.random.default_rng(seed)
    shapes = lora.adapter_shapes(parameter_shapes(SMALL) if shapes is None else shapes, config)
    return {path: jnp.asarray(random.normal(0, 0.2, shape).astype(np.float32)) for path, shape in shapes.items()}


def write_adapter(
    folder: Path, leaves: Mapping[Any, Any], base: Checkpoint, config: LoraConfig | None, **options: Any
) -> Path:
    with new_folder(folder) as temporary:
        write_checkpoint(
            temporary,
            config=base.config,
            leaves={path: InMemory(leaf) for path, leaf in leaves.items()},
            side_files={
                name: (base.folder / name).read_bytes() for name in ("tokenizer.model", "preprocessor_config.json")
            },
            published_config=base.published_config,
            provenance={"source": "a run"},
            **({"adapter": Adapter(base, config)} | options),
        )
    return folder


def trained_leaves(config: LoraConfig = SMALL_LORA) -> dict[Any, np.ndarray]:
    """Adapters, and two parameters that were trained beside them."""
    found = {path: np.asarray(leaf) for path, leaf in small_adapters(config, shapes=parameter_shapes(_TEST)).items()}
    for path in (("vision", "post_norm", "scale"), ("abstractor", "layers", "up", "kernel")):
        found[path] = golden_leaves()[path] * np.float32(1.25)
    return found


def merged_leaves(config: LoraConfig = SMALL_LORA) -> dict[Any, np.ndarray]:
    trained = trained_leaves(config)
    whole = {**golden_leaves(), **{path: leaf for path, leaf in trained.items() if "lora" not in path[-1]}}
    for path in (QUERY, VALUE):
        update = trained[*path, lora.A] @ trained[*path, lora.B]
        whole[*path, "kernel"] = whole[*path, "kernel"] + np.float32(config.scale) * update
    return whole
