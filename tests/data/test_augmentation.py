"""Pictures shown another way: the same pixels in other places."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from deqa_jax.data.augmentation import augmented


def numbered(side):
    """A picture of which every pixel is another."""
    values = np.arange(side * side).reshape(side, side)
    return np.stack([values % 256, values // 256, np.zeros_like(values)], axis=-1).astype(np.uint8)


@given(side=st.integers(1, 80), seed=st.integers(0, 2**32 - 1))
def test_no_pixel_is_changed_or_lost(side, seed):
    picture = numbered(side)
    before = picture.copy()
    found = augmented(np.random.default_rng(seed), picture)
    assert (found.shape, found.dtype) == (picture.shape, np.uint8)
    np.testing.assert_array_equal(picture, before)
    np.testing.assert_array_equal(np.unique(found.reshape(-1, 3), axis=0), np.unique(picture.reshape(-1, 3), axis=0))


def test_neighbours_stay_neighbours_and_move_by_32_pixels_at_the_most():
    picture = numbered(100)
    ways, shifts = set(), []
    for seed in range(200):
        found = augmented(np.random.default_rng(seed), picture)
        number = found[..., 0] + 256 * found[..., 1].astype(int)
        # Where the picture's own first pixel lies, and what follows it downwards and to the right.
        (y,), (x,) = np.nonzero(number == 0)
        down, right = number[(y + 1) % 100, x], number[y, (x + 1) % 100]
        ways.add((down, right))
        assert {int(down), int(right)} <= {1, 99, 100, 9900}
        shifts += [min(y, 99 - y), min(x, 99 - x)]
    assert len(ways) == 8
    assert 25 < max(shifts) <= 32


def test_chance_is_the_generators():
    picture = numbered(64)
    first, again, other = (augmented(np.random.default_rng(seed), picture) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
