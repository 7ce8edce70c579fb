import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recipe import published_shapes, recipe_tensors

from deqa_jax.config import PRESETS, DeqaConfig
from deqa_jax.convert.hf import open_weights
from deqa_jax.convert.names import PATCHES, ROTARY_FREQUENCIES, RULES, account, positions, rules_for
from deqa_jax.convert.tensors import Tensor
from deqa_jax.parameters import parameter_shapes


def _resized(**parts: dict[str, Any]) -> DeqaConfig:
    config = dataclasses.replace(PRESETS["test"], language=dataclasses.replace(PRESETS["test"].language, vocab_size=96))
    changed = {part: dataclasses.replace(getattr(config, part), **values) for part, values in parts.items()}
    return dataclasses.replace(config, **changed)


SIZES = {
    "test": _resized(),
    "shared-heads": _resized(language={"num_kv_heads": 2}),
    "one-shared-head": _resized(language={"num_kv_heads": 1, "hidden_size": 32}),
    "patches-of-8": _resized(vision={"image_size": 48, "patch_size": 8}),
    "one-patch": _resized(vision={"image_size": 5, "patch_size": 5}),
    "one-layer": _resized(vision={"num_layers": 1}, abstractor={"num_layers": 1}, language={"num_layers": 1}),
    "five-queries": _resized(abstractor={"num_queries": 5, "mlp_dim": 24}),
}


@pytest.fixture(scope="module", params=SIZES)
def sized(request: pytest.FixtureRequest) -> tuple[DeqaConfig, dict[tuple[str, ...], tuple[int, ...]]]:
    """A configuration and the shape of each of its parameters."""
    return SIZES[request.param], parameter_shapes(SIZES[request.param])


SMALL = SIZES["one-layer"]
SMALL_SHAPES = parameter_shapes(SMALL)
# A complete checkpoint; read only.
TENSORS = recipe_tensors(SMALL)
WEIGHTS = sorted(key for key in TENSORS if "pos_embed" not in key)


def _held(array: np.ndarray) -> Tensor:
    return Tensor(array.shape, array.dtype, lambda: array)


def _account(tensors: Mapping[str, np.ndarray]) -> list[str]:
    return account(SMALL, SMALL_SHAPES, {key: _held(array) for key, array in tensors.items()})


# ---- the table --------------------------------------------------------------------------------------------


def test_every_parameter_has_exactly_one_rule(sized: Any) -> None:
    _, shapes = sized
    assert len(RULES) == len({rule.path for rule in RULES}) == len(shapes)
    assert {path: rule.path for path, rule in rules_for(shapes).items()} == {path: path for path in shapes}


def test_no_published_name_has_two_rules(sized: Any) -> None:
    _, shapes = sized
    keys = [key for path, rule in rules_for(shapes).items() for key in rule.keys(shapes[path])]
    assert len(keys) == len(set(keys))


def test_every_rule_round_trips(sized: Any) -> None:
    config, shapes = sized
    tensors = published_shapes(config)
    for path, rule in rules_for(shapes).items():
        layer = shapes[path][1:] if rule.stacked else shapes[path]
        for key in rule.keys(shapes[path]):
            published = np.arange(np.prod(tensors[key])).reshape(tensors[key])
            ours = rule.form.to_ours(published)
            assert ours.shape == layer
            np.testing.assert_array_equal(rule.form.to_published(ours), published)
            assert len(np.unique(ours)) == published.size


def test_stacked_layers_keep_their_order(sized: Any) -> None:
    _, shapes = sized
    for path, rule in rules_for(shapes).items():
        numbers = [re.findall(r"layers\.(\d+)\.", key) for key in rule.keys(shapes[path])]
        assert numbers == ([[str(i)] for i in range(shapes[path][0])] if rule.stacked else [[]])


def test_names_and_shapes_are_those_of_the_published_checkpoint(shared: Path) -> None:
    tensors, _ = open_weights(shared / "tiny" / "checkpoint")
    config = PRESETS["test"]
    expected = dict(published_shapes(config))
    for template, values in positions(config).items():
        expected |= {template.format(i): values.shape for i in range(config.abstractor.num_layers)}
    half = (config.language.head_dim // 2,)
    expected |= {ROTARY_FREQUENCIES.format(i): half for i in range(config.language.num_layers)}
    assert {key: tensor.shape for key, tensor in tensors.items()} == expected


def test_shared_key_and_value_heads_are_narrower() -> None:
    shapes = published_shapes(SIZES["shared-heads"])
    for name in ("k_proj.multiway.0", "k_proj.multiway.1", "v_proj.multiway.0", "v_proj.multiway.1"):
        assert shapes[f"model.layers.0.self_attn.{name}.weight"] == (32, 64)
    assert shapes["model.layers.0.self_attn.q_proj.weight"] == (64, 64)


@given(st.integers(1, 6), st.integers(1, 5))
@settings(deadline=None)
def test_patch_kernel_reads_rows_then_columns_then_colours(side: int, outputs: int) -> None:
    published = np.arange(outputs * 3 * side * side).reshape(outputs, 3, side, side)
    ours = PATCHES.to_ours(published)
    for output, colour, row, column in np.ndindex(published.shape):
        assert ours[(row * side + column) * 3 + colour, output] == published[output, colour, row, column]
    np.testing.assert_array_equal(PATCHES.to_published(ours), published)


def test_dense_weights_are_transposed_and_branches_kept_apart() -> None:
    rules = {rule.published: rule for rule in RULES}
    weight = np.arange(6).reshape(2, 3)
    for number, branch in enumerate(("text", "visual")):
        rule = rules[f"model.layers.{{}}.self_attn.k_proj.multiway.{number}.weight"]
        assert branch in rule.path
        np.testing.assert_array_equal(rule.form.to_ours(weight), weight.T)


def test_table_that_does_not_fit_the_model_is_an_error() -> None:
    with pytest.raises(LookupError, match="extra"):
        rules_for({**SMALL_SHAPES, ("language", "extra"): (1,)})
    missing = {path: shape for path, shape in SMALL_SHAPES.items() if path[-1] != "end_token"}
    with pytest.raises(LookupError, match="end_token"):
        rules_for(missing)


# ---- the accounting ---------------------------------------------------------------------------------------


def test_complete_checkpoint_has_no_problems() -> None:
    assert _account(TENSORS) == []


def test_buffers_may_be_absent() -> None:
    assert _account({key: array for key, array in TENSORS.items() if "pos_embed" not in key}) == []


def test_rotary_frequencies_of_each_layer_are_ignored() -> None:
    assert _account({**TENSORS, ROTARY_FREQUENCIES.format(0): np.ones(8, np.float16)}) == []
    beyond = ROTARY_FREQUENCIES.format(SMALL.language.num_layers)
    (problem,) = _account({**TENSORS, beyond: np.ones(8, np.float16)})
    assert problem.startswith(f"{beyond}: not a tensor of this model")


@given(st.data())
@settings(deadline=None, max_examples=40)
def test_exactly_the_bad_tensors_are_listed(data: Any) -> None:
    tensors = dict(TENSORS)
    damages = data.draw(
        st.dictionaries(st.sampled_from(WEIGHTS), st.sampled_from(["missing", "shape", "integers"]), max_size=8)
    )
    extra = data.draw(st.sets(st.text("abc.", min_size=1, max_size=9).map("model.vision_model.{}".format), max_size=3))
    words = {}
    for key, damage in damages.items():
        array = tensors.pop(key)
        words[key] = {"missing": "missing", "shape": "shape [", "integers": "int8"}[damage]
        if damage == "shape":
            tensors[key] = array[None]
        elif damage == "integers":
            tensors[key] = array.astype(np.int8)
    for key in extra:
        tensors[key] = np.zeros(3, np.float16)
        words[key] = "not a tensor of this model"
    problems = {problem.partition(": ")[0]: problem for problem in _account(tensors)}
    assert problems.keys() == words.keys()
    for key, word in words.items():
        assert word in problems[key]


def test_layers_beyond_the_configuration_are_extra() -> None:
    key = "model.layers.1.self_attn.q_proj.weight"
    (problem,) = _account({**TENSORS, key: np.zeros((64, 64), np.float16)})
    assert problem.startswith(f"{key}: not a tensor of this model")


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.int8, np.uint8, np.bool_])
def test_weights_that_are_no_floats_are_refused(dtype: Any) -> None:
    (problem,) = _account({**TENSORS, "model.norm.weight": TENSORS["model.norm.weight"].astype(dtype)})
    assert problem.startswith("model.norm.weight: stored as ")
    assert np.dtype(dtype).name in problem


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_weights_of_every_float_are_taken(dtype: Any) -> None:
    assert _account({key: array.astype(dtype) for key, array in TENSORS.items()}) == []


# ---- position buffers -------------------------------------------------------------------------------------

BUFFERS = sorted(template.format(0) for template in positions(SMALL))


@pytest.mark.parametrize("key", BUFFERS)
@pytest.mark.parametrize("stored", [np.float16, np.float32])
def test_positions_once_in_half_precision_are_accepted(key: str, stored: Any) -> None:
    assert _account({**TENSORS, key: TENSORS[key].astype(np.float16).astype(stored)}) == []


@pytest.mark.parametrize("key", BUFFERS)
def test_positions_in_bfloat16_are_accepted(key: str) -> None:
    assert _account({**TENSORS, key: TENSORS[key].astype(ml_dtypes.bfloat16)}) == []


@pytest.mark.parametrize("key", BUFFERS)
@pytest.mark.parametrize("stored", [np.float16, ml_dtypes.bfloat16, np.float32])
@pytest.mark.parametrize("places", ["everywhere", "one"])
def test_positions_off_by_a_hundredth_are_refused(key: str, stored: Any, places: str) -> None:
    moved = TENSORS[key].copy()
    moved[... if places == "everywhere" else (-1, 3)] += 0.01
    (problem,) = _account({**TENSORS, key: moved.astype(stored)})
    assert problem.startswith(f"{key}: differs by 0.0")


@pytest.mark.parametrize("key", BUFFERS)
def test_positions_that_are_no_numbers_are_refused(key: str) -> None:
    (problem,) = _account({**TENSORS, key: np.full_like(TENSORS[key], np.nan)})
    assert problem.startswith(f"{key}: differs by nan")


@pytest.mark.parametrize("key", BUFFERS)
def test_positions_in_another_order_are_refused(key: str) -> None:
    """Sine after cosine, and rows before columns: nothing that a shape tells."""
    reordered = np.roll(TENSORS[key], TENSORS[key].shape[1] // 2, axis=1)
    (problem,) = _account({**TENSORS, key: reordered})
    assert problem.startswith(f"{key}: differs by")


@pytest.mark.parametrize("key", BUFFERS)
def test_positions_of_another_shape_are_refused(key: str) -> None:
    (problem,) = _account({**TENSORS, key: TENSORS[key][:-1]})
    assert problem.startswith(f"{key}: shape ")
    (problem,) = _account({**TENSORS, key: TENSORS[key].astype(np.int64)})
    assert problem.startswith(f"{key}: stored as int64")


@pytest.mark.parametrize("key", [BUFFERS[0], "model.norm.weight", ROTARY_FREQUENCIES.format(0)])
def test_what_is_of_another_shape_is_not_read(key: str) -> None:
    """One stored number can be repeated to more than any memory holds."""

    def read() -> np.ndarray:
        raise AssertionError("read")

    tensors = {name: _held(array) for name, array in TENSORS.items()}
    problems = account(SMALL, SMALL_SHAPES, {**tensors, key: Tensor((1 << 39,), np.dtype(np.float32), read)})
    expected = [] if key == ROTARY_FREQUENCIES.format(0) else [f"{key}: shape [{1 << 39}], but"]
    assert [problem[: len(words)] for problem, words in zip(problems, expected, strict=True)] == expected
