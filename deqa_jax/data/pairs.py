"""Which images a position of the training stream stands for: pure functions, so any host can compute any of them."""

from collections.abc import Sequence

import numpy as np


def locate(index: int, sizes: Sequence[int], weights: Sequence[int]) -> tuple[int, int]:
    """Dataset and item of an entry of one epoch, in which dataset d occurs `weights[d]` times.

    >>> [locate(index, sizes=[2, 1], weights=[1, 3]) for index in range(5)]
    [(0, 0), (0, 1), (1, 0), (1, 0), (1, 0)]
    """
    for dataset, (size, weight) in enumerate(zip(sizes, weights, strict=True)):
        if index < size * weight:
            return dataset, index % size
        index -= size * weight
    raise IndexError("beyond the end of the epoch")


def partner(item: int, size: int, *, seed: int, position: int) -> int:
    """Another item of a dataset of `size`, drawn uniformly; it depends on nothing but its arguments.

    Args:
      item: the one that it is to be compared with.
      size: of the dataset, at least 2.
      seed: of the run.
      position: in the stream, counted on over epochs.

    >>> partner(1, 2, seed=0, position=7)
    0
    """
    other = int(np.random.default_rng((seed, position)).integers(size - 1))
    return other + (other >= item)
