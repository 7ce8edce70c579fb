"""Parameters as flat dictionaries by path, and the shapes that a model's have."""

import functools
from collections.abc import Mapping
from typing import Any

from flax import nnx

from deqa_jax.config import DeqaConfig, Execution
from deqa_jax.model.deqa import Deqa
from deqa_jax.quantize import quantized_shapes

ParamPath = tuple[str, ...]
Leaves = dict[ParamPath, Any]
"""Parameters by path: `("language", "layers", "query", "kernel")` -> array."""


def abstract_model(config: DeqaConfig, execution: Execution = Execution()) -> Deqa:
    """The model with shapes in place of arrays."""
    return nnx.eval_shape(lambda: Deqa(config, execution=execution, rngs=nnx.Rngs(0)))


def flatten(tree: Mapping[str, Any]) -> Leaves:
    """Nested dicts to a flat one with paths for keys.

    >>> flatten({"a": {"b": 1}})
    {('a', 'b'): 1}
    """
    flat: Leaves = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= {(key, *path): leaf for path, leaf in flatten(value).items()}
        else:
            flat[(key,)] = value
    return flat


def unflatten(leaves: Mapping[tuple[Any, ...], Any]) -> dict[Any, Any]:
    """The inverse of `flatten`."""
    tree: dict[Any, Any] = {}
    for path, leaf in leaves.items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = leaf
    return tree


@functools.cache
def parameter_shapes(config: DeqaConfig, quantization: str | None = None) -> dict[ParamPath, tuple[int, ...]]:
    """Shape of every parameter of a model, by path; with a scheme of `quantize.SCHEMES`, of the quantised model."""
    if quantization is not None:
        return quantized_shapes(parameter_shapes(config), quantization)
    state = nnx.to_pure_dict(nnx.state(abstract_model(config)))
    return {path: leaf.shape for path, leaf in flatten(state).items()}
