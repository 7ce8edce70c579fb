"""Soft labels against the same once more in plain Python, and what they are when arithmetic gets hard."""

import math
import statistics

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from deqa_jax.data.soft_labels import (
    DENSITIES,
    WEIGHTS,
    discretisation_error,
    level_texts,
    normalise,
    one_hot_level,
    soft_labels,
)
from deqa_jax.prompt import LEVELS

VALUES = (5, 4, 3, 2, 1)
MARGIN = 1e-8


def of_one(mos, std, density="pdf", min_std=0.2, max_error=0.1):
    """Soft labels of one image: raw, probs, alpha, beta, two_levels."""
    labels = soft_labels(np.array([mos]), np.array([std]), density=density, min_std=min_std, max_error=max_error)
    return tuple(array[0] for array in labels)


# ---- the same in plain Python -----------------------------------------------------------------------------


def plain_density(mos, std, density):
    def mass_below(x):
        # The complementary error function keeps small tails.
        return math.erfc((mos - x) / std / math.sqrt(2)) / 2

    if density == "cdf":
        return [mass_below(value + 0.5) - mass_below(value - 0.5) for value in VALUES]
    return [math.exp(-(((value - mos) / std) ** 2) / 2) / (std * math.sqrt(2 * math.pi)) for value in VALUES]


def plain_two_levels(mos):
    for low in (1, 2, 3, 4):
        if mos <= low + 1 + MARGIN:
            break
    share = {
        low + 1: (mos - low + MARGIN) / (1 + 2 * MARGIN),
        low: (low + 1 - mos + MARGIN) / (1 + 2 * MARGIN),
    }
    return [share.get(value, 0.0) for value in VALUES]


def mean_of(probs):
    return math.fsum(p * value for p, value in zip(probs, VALUES, strict=True))


def plain_correction(raw, mos):
    slope = mean_of(raw) - 3 * math.fsum(raw) + 1e-9
    # Where the slope cancels, the last bit of the density is all that is left of it.
    assume(abs(slope) > 1e-3)
    alpha = (mos - 3) / slope
    beta = (1 - alpha * math.fsum(raw)) / 5
    return alpha, beta, [max(p * alpha + beta, 0.0) for p in raw]


WHOLE = st.sampled_from([1.0, 2.0, 3.0, 4.0, 5.0])
BESIDE_WHOLE = st.builds(
    lambda value, offset: min(max(value + offset, 1.0), 5.0),
    WHOLE,
    st.sampled_from([-1e-3, -2e-8, -0.9e-8, -1e-12, 1e-12, 0.9e-8, 1.1e-8, 2e-8, 1e-3]),
)
SCORES = st.floats(1, 5) | WHOLE | BESIDE_WHOLE
STDS = st.floats(0.1, 3) | st.sampled_from([0.2, math.nextafter(0.2, 0), math.nextafter(0.2, 1)])


@given(
    mos=SCORES,
    std=STDS,
    density=st.sampled_from(["pdf", "cdf"]),
    min_std=st.sampled_from([0.0, 0.2, 0.7]),
    max_error=st.floats(0, 0.5),
)
def test_labels_are_those_of_plain_python(mos, std, density, min_std, max_error):
    # At this one point, rounding decides which two levels are beside the score.
    assume(abs(mos - round(mos) - MARGIN) > 1e-14)
    expected_raw = plain_density(mos, std, density)
    raw, probs, alpha, beta, two_levels = of_one(mos, std, density, min_std, max_error)
    np.testing.assert_allclose(raw, expected_raw, rtol=0, atol=1e-14)
    if std < min_std:
        expected = (plain_two_levels(mos), 1, 0, True)
    else:
        *correction, corrected = plain_correction(expected_raw, mos)
        error = abs(mean_of(corrected) - mos)
        assume(abs(error - max_error) > 1e-10)
        expected = (plain_two_levels(mos), 1, 0, True) if error > max_error else (corrected, *correction, False)
    np.testing.assert_allclose(probs, expected[0], rtol=0, atol=1e-11)
    np.testing.assert_allclose((alpha, beta), expected[1:3], rtol=1e-11, atol=1e-11)
    assert two_levels == expected[3]


# Four in five of all scores are clipped. Near the middle broad ones are not; drawn as they come, too few would be left.
UNCLIPPED = st.tuples(st.floats(2.65, 2.95) | st.floats(3.05, 3.35), st.floats(0.8, 3))


@given(score=UNCLIPPED | st.tuples(st.floats(1, 5), st.floats(0.3, 3)), density=st.sampled_from(["pdf", "cdf"]))
def test_where_nothing_is_clipped_sum_and_mean_are_right(score, density):
    mos, std = score
    _, probs, alpha, _, two_levels = of_one(mos, std, density)
    assume(not two_levels and (probs > 0).all() and abs(mos - 3) > 1e-3)
    assert probs.sum() == pytest.approx(1, rel=0, abs=1e-11)
    # The published margin in the slope is all that is missing.
    assert probs @ WEIGHTS + alpha * 1e-9 == pytest.approx(mos, rel=0, abs=1e-11)


@given(
    mos=SCORES,
    std=STDS | st.sampled_from([0.0, math.nan, 5e-324, 1e-200, 1e-99, 50.0, 1e200]),
    density=st.sampled_from(DENSITIES),
    min_std=st.sampled_from([0.0, 0.2]),
    max_error=st.floats(0, 0.5),
)
@example(mos=3.0, std=5e-324, density="pdf", min_std=0.0, max_error=0.5)
@example(mos=3.0, std=1e-200, density="cdf", min_std=0.0, max_error=0.5)
@example(mos=4.5, std=1e-99, density="pdf", min_std=0.0, max_error=0.5)
def test_labels_are_never_negative_and_their_mean_is_the_score(mos, std, density, min_std, max_error):
    """Whatever the deviation; warnings of the arithmetic are errors here."""
    raw, probs, alpha, beta, two_levels = of_one(mos, std, density, min_std, max_error)
    assert (probs >= 0).all()
    assert abs(probs @ WEIGHTS - mos) <= max(max_error, 3e-8) + 1e-12
    assert np.isfinite(alpha)
    assert np.isfinite(beta)
    if two_levels:
        assert (alpha, beta) == (1, 0)
        assert probs.sum() == pytest.approx(1, rel=0, abs=1e-12)
        first, *others = np.flatnonzero(probs)
        assert others in ([], [first + 1])
    # Either a density, or none: JSON has neither NaN nor infinity.
    assert np.isfinite(raw).all() or np.isnan(raw).all()


# ---- which way is gone ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mos", "expected"),
    [
        (1.0, (0, 0, 0, 0, 1)),
        (2.0, (0, 0, 0, 1, 0)),
        (3.0, (0, 0, 1, 0, 0)),
        (4.0, (0, 1, 0, 0, 0)),
        (5.0, (1, 0, 0, 0, 0)),
        (1.25, (0, 0, 0, 0.25, 0.75)),
        (3.5, (0, 0.5, 0.5, 0, 0)),
        (4.75, (0.75, 0.25, 0, 0, 0)),
    ],
)
def test_two_levels_share_by_distance(mos, expected):
    _, probs, *_ = of_one(mos, math.nan)
    np.testing.assert_allclose(probs, expected, rtol=0, atol=1.1e-8)


@pytest.mark.parametrize("mos", [1.0, 2.0, 3.0, 4.0, 5.0])
def test_a_whole_score_has_the_published_margin_on_one_neighbour(mos):
    """The one below, but for the lowest score, which has none."""
    _, probs, *_ = of_one(mos, 0.0)
    neighbour = 3 if mos == 1 else 5 - int(mos) + 1
    assert np.flatnonzero(probs).tolist() == sorted([5 - int(mos), neighbour])
    assert probs[neighbour] == pytest.approx(1e-8, rel=1e-6)


@pytest.mark.parametrize("density", ["pdf", "cdf"])
def test_a_deviation_at_the_threshold_is_large_enough(density):
    assert not of_one(3.4, 0.5, density, min_std=0.5)[-1]
    assert of_one(3.4, math.nextafter(0.5, 0), density, min_std=0.5)[-1]
    assert not of_one(3.4, math.nextafter(0.5, 1), density, min_std=0.5)[-1]


@pytest.mark.parametrize("density", ["pdf", "cdf"])
@pytest.mark.parametrize(("mos", "std"), [(4.7, 0.6), (1.2, 0.5), (3.3, 0.4)])
def test_an_error_at_the_threshold_is_small_enough(mos, std, density):
    _, probs, *_ = of_one(mos, std, density, max_error=10.0)
    error = abs(probs @ WEIGHTS - mos)
    assert error > 0
    assert not of_one(mos, std, density, max_error=error)[-1]
    assert of_one(mos, std, density, max_error=math.nextafter(error, 0))[-1]


@pytest.mark.parametrize("std", [0.0, -0.0, math.nan])
@pytest.mark.parametrize("density", ["pdf", "cdf"])
@pytest.mark.parametrize("min_std", [0.0, 0.2])
def test_no_deviation_means_no_density_and_two_levels(std, density, min_std):
    raw, probs, alpha, beta, two_levels = of_one(2.3, std, density, min_std)
    assert np.isnan(raw).all()
    assert (alpha, beta, two_levels) == (1, 0, True)
    np.testing.assert_allclose(probs, (0, 0, 0.3, 0.7, 0), rtol=0, atol=1e-8)


def test_without_a_density_every_score_is_put_on_two_levels():
    labels = soft_labels(
        np.array([1.0, 2.6, 4.9]), np.array([0.5, 1.0, math.nan]), density="none", min_std=0.0, max_error=10.0
    )
    assert labels.two_levels.all()
    assert np.isnan(labels.raw).all()
    np.testing.assert_allclose(labels.probs @ WEIGHTS, [1.0, 2.6, 4.9], rtol=0, atol=3e-8)


@pytest.mark.parametrize("density", ["pdf", "cdf"])
@pytest.mark.parametrize("std", [0.3, 0.7, 1.5])
def test_a_score_in_the_very_middle_is_spread_evenly(density, std):
    """Quirk of the published code: its slope is 0 / 1e-9 there, whatever the deviation."""
    _, probs, alpha, beta, two_levels = of_one(3.0, std, density)
    assert abs(alpha) < 1e-6
    assert beta == pytest.approx(0.2, rel=0, abs=1e-6)
    assert not two_levels
    np.testing.assert_allclose(probs, 0.2, rtol=0, atol=1e-6)


def test_the_density_is_not_the_mass():
    """For a small deviation the one exceeds 1 between levels, the other cannot."""
    assert of_one(4.0, 0.25, "pdf")[0].max() == pytest.approx(1 / 0.25 / math.sqrt(2 * math.pi), rel=1e-12)
    assert of_one(4.0, 0.25, "cdf")[0].max() == pytest.approx(math.erf(2 / math.sqrt(2)), rel=1e-12)


@pytest.mark.parametrize("std", [0.01, 1e-9, 1e-99])
def test_a_small_deviation_has_a_density_though_not_one_that_labels_come_from(std):
    raw, *_, two_levels = of_one(4.0, std)
    assert raw.tolist() == [0, pytest.approx(1 / std / math.sqrt(2 * math.pi), rel=1e-12), 0, 0, 0]
    assert two_levels


def test_images_do_not_change_each_other():
    random = np.random.default_rng(0)
    mos, std = random.uniform(1, 5, 50), random.uniform(0.1, 1.5, 50)
    std[::7] = np.nan
    together = soft_labels(mos, std, density="pdf", min_std=0.2, max_error=0.1)
    assert 0 < together.two_levels.sum() < 50
    for row in range(50):
        for whole, one in zip(together, of_one(mos[row], std[row]), strict=True):
            # A product of a matrix may add in another order than that of a row.
            np.testing.assert_allclose(whole[row], one, rtol=0, atol=1e-11)


def test_no_images_have_no_labels():
    labels = soft_labels(np.zeros(0), np.zeros(0), density="pdf", min_std=0.2, max_error=0.1)
    assert [array.shape for array in labels] == [(0, 5), (0, 5), (0,), (0,), (0,)]


# ---- one word ---------------------------------------------------------------------------------------------

SCALES = st.sampled_from([(1.0, 5.0), (0.0, 100.0), (0.0, 1.0), (-3.0, 3.0), (1.0, 4.91), (-100.0, -20.0)])


def plain_word(mos, low, high):
    for interval in range(1, 6):
        if mos <= low + interval / 5 * (high - low) + MARGIN:
            return 5 - interval
    raise AssertionError(f"{mos} is above {high}")


@given(scale=SCALES, share=st.floats(0, 1) | st.sampled_from([0.0, 0.2, 0.4, 0.6, 0.8, 1.0]))
def test_words_are_those_of_five_equal_intervals(scale, share):
    low, high = scale
    mos = min(max(low + share * (high - low), low), high)
    (level,) = one_hot_level(np.array([mos]), low, high)
    assert level == plain_word(mos, low, high)


@pytest.mark.parametrize(("low", "high"), [(0.0, 100.0), (1.0, 5.0), (-3.0, 2.0), (0.0, 1.0)])
def test_a_score_on_a_border_belongs_to_the_lower_word(low, high):
    borders = [low + level / 5 * (high - low) for level in range(6)]
    assert one_hot_level(np.array(borders), low, high).tolist() == [4, 4, 3, 2, 1, 0]
    margins = [low + level / 5 * (high - low) + 1e-8 for level in range(1, 5)]
    assert one_hot_level(np.array(margins), low, high).tolist() == [4, 3, 2, 1]
    # Rounding may have moved it up; that much is forgiven, and no more.
    assert one_hot_level(np.array(borders[1:5]) + 0.9e-8, low, high).tolist() == [4, 3, 2, 1]
    assert one_hot_level(np.array(borders[1:5]) + 1.1e-8, low, high).tolist() == [3, 2, 1, 0]


def test_words_take_the_place_of_the_braces():
    assert level_texts([0, 4, 2], "A {} image.") == ["A excellent image.", "A bad image.", "A fair image."]
    assert level_texts(np.array([1]), "{}, {x} {0} {}") == ["good, {x} {0} good"]
    assert level_texts(range(5), "{}") == list(LEVELS)
    assert level_texts([], "{}") == []


# ---- normalisation ----------------------------------------------------------------------------------------


@given(
    ends=st.tuples(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6)).filter(lambda ends: ends[1] - ends[0] > 1e-6),
    shares=st.lists(st.floats(0, 1), min_size=1, max_size=8),
    std=st.floats(0, 1e6),
)
def test_normalised_scores_are_from_1_to_5_in_the_same_order(ends, shares, std):
    low, high = ends
    mos = np.clip([low + share * (high - low) for share in sorted(shares)], low, high)
    scores, deviations = normalise(np.array([low, *mos, high]), np.full(len(mos) + 2, std), low, high)
    assert scores[0] == 1
    assert scores[-1] == 5
    assert (np.diff(scores) >= 0).all()
    np.testing.assert_allclose(deviations, std * (4 / (high - low)), rtol=1e-14)


def test_unknown_deviations_stay_unknown():
    _, std = normalise(np.array([0.0, 10.0]), np.array([np.nan, 5.0]), 0.0, 10.0)
    assert np.isnan(std[0])
    assert std[1] == 2


# ---- what it costs ----------------------------------------------------------------------------------------


def test_errors_are_those_of_plain_python():
    random = np.random.default_rng(1)
    probs = random.dirichlet(np.ones(5), 40) * random.uniform(0.9, 1.1, (40, 1))
    mos, std = random.uniform(1, 5, 40), random.uniform(0.2, 1, 40)
    found = discretisation_error(probs, mos, std)
    means = [mean_of(row) for row in probs]
    deviations = [
        math.sqrt(sum(p * (value - mean) ** 2 for p, value in zip(row, VALUES, strict=True)))
        for row, mean in zip(probs, means, strict=True)
    ]
    differences = [mean - score for mean, score in zip(means, mos, strict=True)]
    assert found.mean_l1 == pytest.approx(statistics.fmean(map(abs, differences)), rel=1e-12)
    assert found.mean_l2 == pytest.approx(math.sqrt(statistics.fmean(x * x for x in differences)), rel=1e-12)
    assert found.std_l1 == pytest.approx(
        statistics.fmean(abs(mine - theirs) for mine, theirs in zip(deviations, std, strict=True)), rel=1e-12
    )
    assert found.plcc == pytest.approx(statistics.correlation(means, mos.tolist()), rel=1e-12)
    assert found.srcc == pytest.approx(
        statistics.correlation([sorted(means).index(x) for x in means], [sorted(mos).index(x) for x in mos]), rel=1e-12
    )


def test_images_without_levels_or_deviation_are_left_out_of_what_they_lack():
    probs = np.array([[0, 0, 1.0, 0, 0], [np.nan] * 5, [1.0, 0, 0, 0, 0], [0, 0, 0, 0.5, 0.5]])
    mos, std = np.array([3.5, 1.0, 5.0, 1.5]), np.array([0.25, 0.5, np.nan, 0.0])
    found = discretisation_error(probs, mos, std)
    assert found.mean_l1 == pytest.approx(0.5 / 3, rel=1e-12)
    assert found.mean_l2 == pytest.approx(math.sqrt(0.25 / 3), rel=1e-12)
    assert found.std_l1 == pytest.approx((0.25 + 0.5) / 2, rel=1e-12)
    assert found.srcc == 1


def test_what_does_not_exist_is_not_a_number():
    every = [np.nan] * 5
    assert all(math.isnan(x) for x in discretisation_error(np.array([every]), np.array([3.0]), np.array([1.0])))
    assert all(math.isnan(x) for x in discretisation_error(np.zeros((0, 5)), np.zeros(0), np.zeros(0)))
    one = discretisation_error(np.eye(5)[[2]], np.array([3.0]), np.array([np.nan]))
    assert (one.mean_l1, one.mean_l2) == (0, 0)
    assert math.isnan(one.std_l1)
    assert math.isnan(one.srcc)
    assert math.isnan(one.plcc)
