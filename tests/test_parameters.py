"""Parameters by path: flat and nested are the same, and the shapes are those of a model that is made."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from recipe import recipe_tensors, to_ours
from training import SMALL

from deqa_jax.config import PRESETS, Execution
from deqa_jax.parameters import abstract_model, flatten, parameter_shapes, unflatten

TREES = st.recursive(
    st.integers(),
    lambda nodes: st.dictionaries(st.text("abc", max_size=3), nodes, min_size=1, max_size=3),
    max_leaves=12,
).filter(lambda tree: isinstance(tree, dict))


@given(TREES)
def test_unflatten_undoes_flatten(tree: dict[str, Any]) -> None:
    flat = flatten(tree)
    assert unflatten(flat) == tree
    assert all(not isinstance(leaf, dict) for leaf in flat.values())
    for path, leaf in flat.items():
        node: Any = tree
        for key in path:
            node = node[key]
        assert node == leaf


def test_a_flat_dict_does_not_depend_on_the_order_of_its_paths() -> None:
    leaves = {("a", "b"): 1, ("c",): 2, ("a", "d", "e"): 3}
    assert unflatten(leaves) == unflatten(dict(reversed(leaves.items()))) == {"a": {"b": 1, "d": {"e": 3}}, "c": 2}
    assert flatten({}) == unflatten({}) == {}


def test_abstract_model_has_no_arrays() -> None:
    """The published size would be 32 GB."""
    state = nnx.to_pure_dict(nnx.state(abstract_model(PRESETS["full"])))
    assert not any(isinstance(leaf, np.ndarray | jnp.ndarray) for leaf in flatten(state).values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_abstract_model_stores_what_it_is_told_to(dtype: str) -> None:
    state = flatten(nnx.to_pure_dict(nnx.state(abstract_model(SMALL, Execution(param_dtype=dtype)))))
    assert {leaf.dtype for leaf in state.values()} == {jnp.dtype(dtype)}
    assert {path: leaf.shape for path, leaf in state.items()} == parameter_shapes(SMALL)


def test_models_made_of_one_structure_do_not_share_parameters() -> None:
    leaves = {path: jnp.asarray(leaf) for path, leaf in to_ours(SMALL, recipe_tensors(SMALL)).items()}
    graphdef = nnx.graphdef(abstract_model(SMALL))
    one, other = nnx.merge(graphdef, unflatten(leaves)), nnx.merge(graphdef, unflatten(leaves))
    one.language.head.kernel[...] = jnp.zeros_like(leaves["language", "head", "kernel"])
    assert np.asarray(other.language.head.kernel[...]).any()


def test_shapes_follow_the_configuration() -> None:
    deeper = dataclasses.replace(SMALL, language=dataclasses.replace(SMALL.language, num_layers=7))
    before, after = parameter_shapes(SMALL), parameter_shapes(deeper)
    assert before.keys() == after.keys()
    changed = {path for path in before if before[path] != after[path]}
    assert changed == {path for path in before if path[:2] == ("language", "layers")}
    assert all(after[path] == (7, *before[path][1:]) for path in changed)
