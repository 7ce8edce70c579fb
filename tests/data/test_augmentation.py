"""Pictures shown another way: the same pixels in other places, or stored once more."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from deqa_jax.data.augmentation import augmented, stored_again


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


# ---- stored again -----------------------------------------------------------------------------------------


def ramps(width, height):
    """A smooth picture, as after a strong blur: its colours change slowly from side to side."""
    across, down = np.linspace(40, 210, width), np.linspace(200, 60, height)
    planes = np.broadcast_arrays(across[None], down[:, None], (across[None] + down[:, None]) / 2)
    return Image.fromarray(np.stack(planes, axis=-1).astype(np.uint8))


@given(width=st.integers(1, 60), height=st.integers(1, 60), seed=st.integers(0, 2**32 - 1))
def test_pictures_stay_what_they_are(width, height, seed):
    picture = ramps(width, height)
    before = np.array(picture)
    found = stored_again(np.random.default_rng(seed), picture)
    assert (found.size, found.mode) == (picture.size, "RGB")
    np.testing.assert_array_equal(picture, before)
    assert np.array_equal(found, stored_again(np.random.default_rng(seed), picture))


def test_some_are_left_alone_and_none_is_changed_to_be_seen():
    picture = ramps(160, 120)
    before = np.float32(picture)
    rng = np.random.default_rng(0)
    pictures = [np.float32(stored_again(rng, picture)) for _ in range(200)]
    errors = np.array([(found - before).std() for found in pictures])
    assert 40 <= np.count_nonzero(errors == 0) <= 80
    assert errors.max() < 2.5
    assert max(abs((found - before).mean()) for found in pictures) < 0.5
    # How strongly is another each time.
    assert len(np.unique(errors)) > 60


def test_what_is_added_reaches_pictures_that_end_at_black_and_white():
    for tone in (0, 255):
        flat = Image.new("RGB", (64, 64), (tone,) * 3)
        found = [np.int32(stored_again(np.random.default_rng(seed), flat)) for seed in range(40)]
        assert max(np.abs(one - tone).max() for one in found) < 8
        assert any((one != tone).any() for one in found)
