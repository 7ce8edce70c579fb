"""The mean of several models' parameters (https://arxiv.org/abs/2203.05482; with what a run began with, 2109.01903)."""

import functools
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from deqa_jax.checkpoint import Leaf
from deqa_jax.parameters import ParamPath

from .tensors import Tensor, cast


def averaged(
    models: Sequence[Mapping[ParamPath, Leaf]], stored: Callable[[ParamPath], np.dtype | None]
) -> dict[ParamPath, Tensor]:
    """Parameters of the mean, each made of the models' when it is read, which is in float32.

    Args:
      models: the same parameters of each.
      stored: what to store a parameter in; float32 where it says nothing.
    """
    leaves = {}
    for path, leaf in models[0].items():
        dtype = stored(path) or np.dtype(np.float32)
        read = functools.partial(_mean, path, [model[path] for model in models], dtype)
        leaves[path] = Tensor(leaf.shape, dtype, read)
    return leaves


def _mean(path: ParamPath, leaves: Sequence[Leaf], dtype: np.dtype) -> np.ndarray:
    total = np.zeros(leaves[0].shape, np.float32)
    for leaf in leaves:
        total += leaf.read()
    total /= len(leaves)
    return cast("/".join(path), total, dtype)
