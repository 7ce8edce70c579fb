import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from flax import nnx
from recipe import recipe_tensors, to_ours

from deqa_jax.config import PRESETS, DeqaConfig, Execution
from deqa_jax.model.deqa import Deqa, Forward
from deqa_jax.parameters import abstract_model, flatten, parameter_shapes, unflatten
from deqa_jax.preprocess import PreprocessConfig, load_square, normalize
from deqa_jax.random_model import random_side_files

TEST = PRESETS["test"]
BEFORE, AFTER = [1, 7, 3, 30, 12], [9, 2, 40]


def vary(config: DeqaConfig, **parts: Mapping[str, Any]) -> DeqaConfig:
    """The configuration with some numbers of some parts changed."""
    return dataclasses.replace(
        config, **{part: dataclasses.replace(getattr(config, part), **changes) for part, changes in parts.items()}
    )


# Small in every respect, and different from the golden model in every number.
SMALL = vary(
    TEST,
    vision={"image_size": 40, "patch_size": 8, "hidden_size": 24, "mlp_dim": 40, "num_layers": 3, "num_heads": 3},
    abstractor={"num_queries": 5, "hidden_size": 24, "mlp_dim": 28, "num_layers": 1, "num_heads": 2},
    language={"vocab_size": 50, "hidden_size": 48, "mlp_dim": 56, "num_layers": 2, "num_heads": 6, "num_kv_heads": 2},
)
SIZES = {
    "grouped heads": SMALL,
    "one layer each": vary(SMALL, vision={"num_layers": 1}, language={"num_layers": 1}),
    "one key head, wide patches": vary(
        SMALL, vision={"image_size": 42, "patch_size": 21}, language={"num_kv_heads": 1, "hidden_size": 36}
    ),
    "other constants": vary(
        SMALL,
        vision={"layer_norm_eps": 1e-2},
        abstractor={"norm_eps": 1e-2, "ffn_norm_eps": 3e-2, "num_layers": 3},
        language={"rope_theta": 500.0, "rms_norm_eps": 2e-2, "num_kv_heads": 6},
    ),
}


def pixels(config: DeqaConfig, batch: int, seed: int) -> jax.Array:
    size = config.vision.image_size
    return jnp.asarray(np.random.default_rng(seed).standard_normal((batch, size, size, 3), np.float32))


def build(config: DeqaConfig, seed: int) -> Deqa:
    leaves = {path: jnp.asarray(leaf) for path, leaf in to_ours(config, recipe_tensors(config, seed)).items()}
    return nnx.merge(nnx.graphdef(abstract_model(config)), unflatten(leaves))


def run(model: Deqa, images: jax.Array) -> Forward:
    batch = images.shape[0]
    ids = (jnp.tile(jnp.asarray(part)[None], (batch, 1)) for part in (BEFORE, AFTER))
    return jax.jit(lambda model, *inputs: model(*inputs))(model, images, *ids)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("size", SIZES)
def test_every_stage_equals_a_float64_implementation(size: str, seed: int) -> None:
    config = SIZES[size]
    images = pixels(config, 2, seed)
    model = build(config, seed)
    forward = run(model, images)
    logits = model.language.logits(forward.last_hidden_state)
    for i in range(2):
        expected = reference.forward(config, recipe_tensors(config, seed), np.asarray(images[i]), BEFORE, AFTER)
        np.testing.assert_allclose(forward.vision[i], expected["vision"], atol=2e-5)
        np.testing.assert_allclose(forward.visual_tokens[i], expected["visual_tokens"], atol=5e-5)
        np.testing.assert_allclose(forward.hidden_states[:, i], expected["hidden_states"], atol=5e-5)
        np.testing.assert_allclose(logits[i], expected["logits"], atol=1e-4)


@pytest.mark.parametrize("size", SIZES)
def test_cached_prefix_and_single_query_give_the_full_forward_pass(size: str) -> None:
    config = SIZES[size]
    model, images = build(config, 2), pixels(config, 3, 2)

    @jax.jit
    def short(model: Deqa, images: jax.Array) -> jax.Array:
        return model.last_hidden(images, model.prefill(jnp.asarray(BEFORE)), jnp.asarray(AFTER))

    np.testing.assert_allclose(short(model, images), run(model, images).last_hidden_state[:, -1], atol=2e-5)


def test_unrolled_blocks_give_what_stacked_ones_do() -> None:
    leaves = to_ours(SMALL, recipe_tensors(SMALL, 3))
    apart: dict[tuple[Any, ...], jax.Array] = {}
    for path, leaf in leaves.items():
        if path[1] == "layers":
            apart |= {(path[0], "layers", i, *path[2:]): jnp.asarray(layer) for i, layer in enumerate(leaf)}
        else:
            apart[path] = jnp.asarray(leaf)
    unrolled = nnx.merge(nnx.graphdef(abstract_model(SMALL).unrolled()), unflatten(apart))
    images = pixels(SMALL, 2, 3)
    for ours, theirs in zip(run(unrolled, images), run(build(SMALL, 3), images), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


# What cannot simply be made larger.
OTHER_VALUES = {
    ("vision", "patch_size"): {"vision": {"patch_size": 10}},
    ("vision", "hidden_size"): {"vision": {"hidden_size": 48}, "abstractor": {"hidden_size": 48}},
    ("abstractor", "hidden_size"): {"vision": {"hidden_size": 48}, "abstractor": {"hidden_size": 48}},
    ("language", "num_kv_heads"): {"language": {"num_kv_heads": 3}},
}


@pytest.mark.parametrize(
    ("part", "name"), [(part, name) for part, numbers in dataclasses.asdict(SMALL).items() for name in numbers]
)
def test_every_number_of_the_configuration_matters(part: str, name: str) -> None:
    """Changing it changes a parameter's shape or, with the same parameters, what the model says."""
    larger = {part: {name: getattr(getattr(SMALL, part), name) * (100 if name.endswith("eps") else 2)}}
    changed = vary(SMALL, **OTHER_VALUES.get((part, name), larger))
    if parameter_shapes(changed) != parameter_shapes(SMALL):
        return
    leaves = {path: jnp.asarray(leaf) for path, leaf in to_ours(SMALL, recipe_tensors(SMALL)).items()}
    images = pixels(SMALL, 1, 0)
    if name.endswith("eps"):  # shows where the variance is small
        leaves = {path: leaf if path[-1] in ("scale", "bias") else leaf * 1e-2 for path, leaf in leaves.items()}
    stages = zip(
        *(
            run(nnx.merge(nnx.graphdef(abstract_model(config)), unflatten(leaves)), images)
            for config in (SMALL, changed)
        ),
        strict=True,
    )
    assert max(np.abs(one - other).max() for one, other in stages) > 1e-5


def test_published_size_has_the_published_shapes() -> None:
    model = abstract_model(PRESETS["full"], Execution(dtype="bfloat16", param_dtype="bfloat16"))
    sizes = dict.fromkeys(("vision", "abstractor", "language"), 0)
    for path, leaf in flatten(nnx.to_pure_dict(nnx.state(model))).items():
        sizes[path[0]] += math.prod(leaf.shape)
        assert leaf.dtype == jnp.bfloat16
    assert sizes == {"vision": 303_966_208, "abstractor": 81_473_536, "language": 7_812_419_584}
    images = jax.ShapeDtypeStruct((2, 448, 448, 3), jnp.bfloat16)
    before, after = (jax.ShapeDtypeStruct((2, n), jnp.int32) for n in (15, 12))
    forward = jax.eval_shape(lambda model, *inputs: model(*inputs), model, images, before, after)
    assert forward.vision.shape == (2, 1025, 1024)
    assert forward.visual_tokens.shape == (2, 65, 4096)
    assert forward.hidden_states.shape == (33, 2, 92, 4096)
    cache = jax.eval_shape(lambda model, ids: model.prefill(ids), model, jax.ShapeDtypeStruct((15,), jnp.int32))
    assert cache.key.shape == (32, 1, 15, 32, 128)


@pytest.fixture(scope="module")
def golden_forward(golden: tuple[dict[str, Any], Mapping[str, np.ndarray]], images: Path) -> Forward:
    described, _ = golden
    settings = PreprocessConfig.from_published(json.loads(random_side_files()["preprocessor_config.json"]))
    squares = np.stack([load_square(images / name, settings) for name in described["images"][:2]])
    ids = described["prompts"]["scorer"]["input_ids"]
    where = ids.index(-200)
    before, after = (jnp.tile(jnp.asarray(part)[None], (2, 1)) for part in (ids[:where], ids[where + 1 :]))
    return build(TEST, 0)(normalize(jnp.asarray(squares), settings), before, after)


def test_vision_tower_equals_pytorch(golden_forward: Forward, golden: tuple[Any, Mapping[str, np.ndarray]]) -> None:
    np.testing.assert_allclose(golden_forward.vision[:, ::8], golden[1]["vision_last_hidden"], atol=1e-5)


def test_abstractor_equals_pytorch(golden_forward: Forward, golden: tuple[Any, Mapping[str, np.ndarray]]) -> None:
    # Against float64 either is off by up to 1.8e-5, on a processor without AVX-512.
    np.testing.assert_allclose(golden_forward.visual_tokens, golden[1]["abstractor_out"], atol=4e-5)


@pytest.mark.parametrize("layer", range(TEST.language.num_layers + 1))
def test_language_layer_equals_pytorch(
    golden_forward: Forward, golden: tuple[Any, Mapping[str, np.ndarray]], layer: int
) -> None:
    expected = golden[1]["llm_hidden_states"][layer]
    np.testing.assert_allclose(golden_forward.hidden_states[layer], expected, atol=5e-5)


def test_logits_equal_pytorch(golden_forward: Forward, golden: tuple[Any, Mapping[str, np.ndarray]]) -> None:
    logits = build(TEST, 0).language.logits(golden_forward.last_hidden_state[:, -1])
    np.testing.assert_allclose(logits[:, ::97], golden[1]["scorer_last_logits_strided"][:2], atol=5e-5)
