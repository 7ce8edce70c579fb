"""Who is compared with whom: another image of the same set, any of them alike, and the same one every time."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deqa_jax.data.pairs import locate, partner

SIZES = st.integers(2, 10**6)


@given(st.data(), SIZES, st.integers(0, 2**32 - 1), st.integers(0, 10**9))
def test_a_partner_is_another_item_of_the_set(data, size, seed, position):
    item = data.draw(st.integers(0, size - 1))
    other = partner(item, size, seed=seed, position=position)
    assert isinstance(other, int)
    assert 0 <= other < size
    assert other != item
    assert other == partner(item, size, seed=seed, position=position)


@given(st.integers(0, 1), st.integers(0, 2**32 - 1), st.integers(0, 10**9))
def test_of_two_it_is_the_other(item, seed, position):
    assert partner(item, 2, seed=seed, position=position) == 1 - item


@pytest.mark.parametrize("item", [0, 3, 6])
def test_every_other_item_is_drawn_alike(item):
    drawn = np.bincount([partner(item, 7, seed=1, position=position) for position in range(12000)], minlength=7)
    others = np.delete(drawn, item)
    assert drawn[item] == 0
    # χ² with five degrees of freedom is above 30 once in a hundred thousand times.
    assert (np.square(others - 2000) / 2000).sum() < 30


def test_positions_and_seeds_draw_anew():
    by_position = [partner(0, 1000, seed=0, position=position) for position in range(200)]
    by_seed = [partner(0, 1000, seed=seed, position=0) for seed in range(200)]
    # Two positions next to each other, or one under two seeds, share nothing but chance.
    assert len(set(by_position)) > 160
    assert len(set(by_seed)) > 160
    assert by_position != [partner(0, 1000, seed=1, position=position) for position in range(200)]


def test_a_partner_is_drawn_without_touching_the_global_generator():
    np.random.seed(0)  # noqa: NPY002
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    partner(3, 10, seed=0, position=0)
    np.testing.assert_array_equal(np.random.get_state()[1], before)  # noqa: NPY002


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 4)), min_size=1, max_size=4))
def test_an_epoch_has_every_item_as_often_as_its_set_weighs(sets):
    sizes, weights = zip(*sets, strict=True)
    total = sum(size * weight for size, weight in sets)
    found = [locate(index, sizes, weights) for index in range(total)]
    for dataset, (size, weight) in enumerate(sets):
        for item in range(size):
            assert found.count((dataset, item)) == weight
    for beyond in (total, total + 5):
        with pytest.raises(IndexError):
            locate(beyond, sizes, weights)


def test_sets_and_weights_go_together():
    with pytest.raises(ValueError, match="argument"):
        locate(9, [3, 4], [1])
