"""What can be done to a picture that changes nothing about its quality."""

import numpy as np
from jaxtyping import UInt8

_MOST_SHIFT = 32


def augmented(rng: np.random.Generator, square: UInt8[np.ndarray, "H H 3"]) -> UInt8[np.ndarray, "H H 3"]:
    """A picture turned by right angles, mirrored, and moved by up to 32 pixels, of which what leaves comes in again.

    It has the same pixels, none of them resampled: sharpness, noise and colours are those of the original. But the
    vision tower's patches see them in other places, and a small model cannot learn them by heart.

    >>> square = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    >>> sorted(augmented(np.random.default_rng(0), square).ravel()) == list(range(12))
    True
    """
    turned = np.rot90(square, int(rng.integers(4)))
    mirrored = turned[:, ::-1] if rng.random() < 0.5 else turned
    return np.roll(mirrored, rng.integers(-_MOST_SHIFT, _MOST_SHIFT, 2, endpoint=True), (0, 1))
