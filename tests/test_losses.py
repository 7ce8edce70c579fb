"""Each term of the objective against float64 written from the published description, and where floats end."""

import math

import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from hypothesis import given, settings
from hypothesis import strategies as st

from deqa_jax import losses
from deqa_jax.losses import Rating

VOCABULARY = 12
LEVELS = (7, 2, 11, 0, 4)
IDS = jnp.asarray(LEVELS)
WEIGHTS = np.array([5.0, 4.0, 3.0, 2.0, 1.0])
ROWS = 4
QUICK = settings(max_examples=40, deadline=None)

# Logits of real models lie within ±30; far beyond, probabilities are 0 and 1 in float32.
LOGITS = hnp.arrays(np.float32, (ROWS, VOCABULARY), elements=st.floats(-60, 60, width=32))
MASKS = hnp.arrays(np.bool_, ROWS)
# After clipping, published labels reach 1.07 in sum.
PROBS = hnp.arrays(np.float32, (ROWS, 5), elements=st.one_of(st.just(0.0), st.floats(2**-10, 1.0625, width=32)))
MEANS = hnp.arrays(np.float32, ROWS, elements=st.floats(1, 5, width=32))
STDS = hnp.arrays(np.float32, ROWS, elements=st.floats(np.float32(1e-3), 2, width=32))
OPINIONS = hnp.arrays(np.float32, ROWS, elements=st.floats(0, 100, width=32))
SPREADS = hnp.arrays(np.float32, ROWS, elements=st.floats(0, 30, width=32))

# What may stand in rows that do not count: the published filling, and what a careless one would leave.
GARBAGE = [-10000.0, 1e30, math.nan, math.inf, -math.inf]


def masked_mean(values: np.ndarray, mask: np.ndarray) -> float:
    return float(np.mean(values[mask])) if mask.any() else 0.0


def exact_log_softmax(logits: np.ndarray) -> np.ndarray:
    return scipy.special.log_softmax(np.asarray(logits, np.float64), axis=-1)


def exact_rating(logits: np.ndarray, closed_set: bool) -> tuple[np.ndarray, np.ndarray]:
    logits = np.asarray(logits, np.float64)
    if closed_set:
        probs = scipy.special.softmax(logits[:, LEVELS], axis=-1)
    else:
        probs = scipy.special.softmax(logits, axis=-1)[:, LEVELS]
    mean = probs @ WEIGHTS
    return mean, np.sqrt(np.sum(probs * (WEIGHTS - mean[:, None]) ** 2, axis=-1))


def phi(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + scipy.special.erf(np.asarray(x, np.float64) / math.sqrt(2)))


def ratings(mean: np.ndarray, std: np.ndarray) -> Rating:
    return Rating(jnp.asarray(mean), jnp.asarray(std))


# ---- score and deviation ----------------------------------------------------------------------------------


@QUICK
@given(LOGITS, st.booleans())
def test_rating_is_mean_and_deviation_of_the_five_levels(logits: np.ndarray, closed_set: bool) -> None:
    ours = losses.rating(jnp.asarray(logits), IDS, closed_set=closed_set)
    mean, std = exact_rating(logits, closed_set)
    np.testing.assert_allclose(ours.mean, mean, rtol=5e-6, atol=1e-6)
    # The deviation of a nearly certain prediction is the root of a difference.
    np.testing.assert_allclose(ours.std, std, rtol=1e-4, atol=2e-3)
    np.testing.assert_allclose(np.square(ours.std), np.square(std), rtol=1e-4, atol=4e-6)


def test_ratings_by_hand() -> None:
    logits = np.full((3, VOCABULARY), -100.0, np.float32)
    logits[0, LEVELS[0]] = 0  # certainly excellent
    logits[1, [LEVELS[0], LEVELS[4]]] = 0  # excellent or bad
    logits[2, [*LEVELS, 1, 3, 5, 6, 8]] = 0  # half of it outside the five
    closed = losses.rating(jnp.asarray(logits), IDS, closed_set=True)
    np.testing.assert_allclose(closed.mean, [5, 3, 3], rtol=1e-6)
    np.testing.assert_allclose(closed.std, [0, 2, math.sqrt(2)], rtol=1e-6, atol=1e-6)
    opened = losses.rating(jnp.asarray(logits), IDS, closed_set=False)
    # The five sum to a half and are taken as they are: a mean of 1.5, and squares of 3.5, 2.5, 1.5, 0.5, 0.5.
    np.testing.assert_allclose(opened.mean, [5, 3, 1.5], rtol=1e-6)
    np.testing.assert_allclose(opened.std[2], math.sqrt((12.25 + 6.25 + 2.25 + 0.25 + 0.25) / 10), rtol=1e-6)


@pytest.mark.parametrize("closed_set", [True, False])
@pytest.mark.parametrize("gap", [0.0, 20.0, 200.0, 1e4, 3e38])
def test_certain_predictions_have_finite_gradients(gap: float, closed_set: bool) -> None:
    """Where one level has all probability, the deviation is 0, whose root has no slope."""
    logits = jnp.zeros((1, VOCABULARY)).at[0, LEVELS[1]].set(gap)

    def both(logits: jax.Array) -> jax.Array:
        rating = losses.rating(logits, IDS, closed_set=closed_set)
        return jnp.sum(rating.mean) + jnp.sum(rating.std) + jnp.sum(jnp.square(rating.std))

    gradient = jax.grad(both)(logits)
    assert np.isfinite(gradient).all()
    # And where none of the five has any.
    gradient = jax.grad(both)(jnp.zeros((1, VOCABULARY)).at[0, 1].set(gap))
    assert np.isfinite(gradient).all()


# ---- soft-label KL ----------------------------------------------------------------------------------------


def exact_kl(logits: np.ndarray, probs: np.ndarray, mask: np.ndarray) -> float:
    target = np.zeros(logits.shape)
    target[:, LEVELS] = probs
    # Zeros of the target add nothing: neither in the vocabulary nor among the five.
    rows = np.sum(scipy.special.xlogy(target, target) - target * exact_log_softmax(logits), axis=-1)
    return masked_mean(rows, mask)


@QUICK
@given(LOGITS, PROBS, MASKS)
def test_soft_label_kl_is_over_the_whole_vocabulary(logits: np.ndarray, probs: np.ndarray, mask: np.ndarray) -> None:
    ours = losses.soft_label_kl(jnp.asarray(logits), IDS, jnp.asarray(probs), jnp.asarray(mask))
    np.testing.assert_allclose(ours, exact_kl(logits, probs, mask), rtol=1e-5, atol=2e-5)


def test_labels_that_sum_to_more_than_one_are_not_normalised() -> None:
    logits = np.random.default_rng(0).normal(0, 3, (1, VOCABULARY)).astype(np.float32)
    probs = np.array([[0.0, 0.3, 0.57, 0.2, 0.0]], np.float32)
    on = np.array([True])
    ours = losses.soft_label_kl(jnp.asarray(logits), IDS, jnp.asarray(probs), jnp.asarray(on))
    np.testing.assert_allclose(ours, exact_kl(logits, probs, on), rtol=1e-6)
    normalised = exact_kl(logits, probs / probs.sum(), on)
    assert abs(float(ours) - normalised) > 0.05
    gradient = jax.grad(losses.soft_label_kl)(jnp.asarray(logits), IDS, jnp.asarray(probs), jnp.asarray(on))
    # d/dlogits of −Σ t log softmax is softmax · Σt − t.
    expected = 1.07 * scipy.special.softmax(logits[0].astype(np.float64))
    expected[list(LEVELS)] -= probs[0]
    np.testing.assert_allclose(gradient[0], expected, atol=1e-6)


# ---- next token -------------------------------------------------------------------------------------------

TOKEN_LOGITS = hnp.arrays(np.float32, (2, 5, VOCABULARY), elements=st.floats(-60, 60, width=32))


@QUICK
@given(
    TOKEN_LOGITS,
    hnp.arrays(np.int32, (2, 5), elements=st.integers(0, VOCABULARY - 1)),
    hnp.arrays(np.bool_, (2, 5)),
)
def test_next_token_averages_over_counted_positions_of_the_batch(
    logits: np.ndarray, labels: np.ndarray, counted: np.ndarray
) -> None:
    ours = losses.next_token(jnp.asarray(logits), jnp.asarray(labels), jnp.asarray(counted))
    chosen = -np.take_along_axis(exact_log_softmax(logits), labels[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(ours, masked_mean(chosen, counted), rtol=1e-5, atol=2e-5)


def test_long_answers_weigh_more_than_short_ones() -> None:
    """The mean is of positions, not of examples' means."""
    logits = jnp.zeros((2, 4, VOCABULARY)).at[1, :, 3].set(5.0)
    labels = jnp.full((2, 4), 3)
    counted = jnp.asarray([[True, True, True, False], [True, False, False, False]])
    hard, easy = math.log(VOCABULARY), math.log(math.exp(5) + VOCABULARY - 1) - 5
    np.testing.assert_allclose(losses.next_token(logits, labels, counted), (3 * hard + easy) / 4, rtol=1e-6)


# ---- in-level ---------------------------------------------------------------------------------------------


@QUICK
@given(LOGITS, MASKS)
def test_in_level_is_what_lies_outside_the_five(logits: np.ndarray, mask: np.ndarray) -> None:
    ours = losses.in_level(jnp.asarray(logits), IDS, jnp.asarray(mask))
    outside = np.delete(np.exp(exact_log_softmax(logits)), LEVELS, axis=-1).sum(axis=-1)
    np.testing.assert_allclose(ours, max(0.01, masked_mean(outside, mask)), rtol=1e-5, atol=1e-6)


def test_in_level_is_bounded_after_the_mean_and_then_pulls_no_more() -> None:
    logits = np.zeros((2, VOCABULARY), np.float32)
    logits[0, 7], logits[1, 1] = 50, 50  # inside; outside
    rows = jnp.ones(2, bool)
    np.testing.assert_allclose(losses.in_level(jnp.asarray(logits), IDS, rows), 0.5, rtol=1e-6)
    logits[1] = logits[0]
    value, gradient = jax.value_and_grad(losses.in_level)(jnp.asarray(logits), IDS, rows)
    assert float(value) == pytest.approx(0.01, rel=1e-6)
    assert not np.asarray(gradient).any()


# ---- preferences ------------------------------------------------------------------------------------------


def exact_preference(a: Rating, b: Rating, fixed: bool) -> np.ndarray:
    means = np.asarray(a.mean, np.float64) - np.asarray(b.mean, np.float64)
    variance = 2.0 if fixed else np.asarray(a.std, np.float64) ** 2 + np.asarray(b.std, np.float64) ** 2
    return 0.5 * (1 + scipy.special.erf(means / np.sqrt(2 * (variance + 1e-8))))


@QUICK
@given(MEANS, STDS, MEANS, STDS, st.booleans(), st.booleans())
def test_preference_is_the_published_formula(
    mean_a: np.ndarray, std_a: np.ndarray, mean_b: np.ndarray, std_b: np.ndarray, fixed: bool, detached: bool
) -> None:
    a, b = ratings(mean_a, std_a), ratings(mean_b, std_b)
    ours = losses.preference(a, b, fixed_std=fixed, detach_std=detached)
    np.testing.assert_allclose(ours, exact_preference(a, b, fixed), rtol=1e-4, atol=2e-6)
    swapped = losses.preference(b, a, fixed_std=fixed, detach_std=detached)
    np.testing.assert_allclose(ours + swapped, 1, atol=1e-6)


def test_gradient_reaches_the_deviations_only_where_it_should() -> None:
    a, b = ratings(np.float32([4.0]), np.float32([0.5])), ratings(np.float32([3.0]), np.float32([1.5]))

    def slope(**options: bool) -> tuple[Rating, Rating]:
        return jax.grad(lambda a, b: jnp.sum(losses.preference(a, b, **options)), argnums=(0, 1))(a, b)

    for options in ({"fixed_std": True, "detach_std": False}, {"fixed_std": False, "detach_std": True}):
        for side in slope(**options):
            assert float(side.mean[0]) != 0
            assert float(side.std[0]) == 0
    through = slope(fixed_std=False, detach_std=False)
    # p = Φ(d / s), s² = σA² + σB²: dp/dσ = −φ(d / s) · d σ / s³.
    s = math.sqrt(0.25 + 2.25)
    density = math.exp(-0.5 / s**2) / math.sqrt(2 * math.pi)
    for side, std in zip(through, (0.5, 1.5), strict=True):
        np.testing.assert_allclose(side.std, [-density * std / s**3], rtol=1e-5)
    # A deviation that is taken as it is has the same slope for the mean, detached or not.
    np.testing.assert_allclose(through[0].mean, slope(fixed_std=False, detach_std=True)[0].mean, rtol=1e-6)


@QUICK
@given(MEANS, MEANS, OPINIONS, SPREADS, OPINIONS, SPREADS, MASKS)
def test_fidelity_is_the_published_formula(
    mean_a: np.ndarray,
    mean_b: np.ndarray,
    gt_a: np.ndarray,
    std_a: np.ndarray,
    gt_b: np.ndarray,
    std_b: np.ndarray,
    mask: np.ndarray,
) -> None:
    ones = np.ones(ROWS, np.float32)
    predicted = losses.preference(ratings(mean_a, ones), ratings(mean_b, ones), fixed_std=True, detach_std=True)
    a, b = ratings(gt_a, std_a), ratings(gt_b, std_b)
    ours = losses.fidelity(predicted, a, b, jnp.asarray(mask))
    # Of a probability near 1, float32 keeps so much that the root of the rest is good to 2e-4.
    np.testing.assert_allclose(ours, masked_mean(exact_fidelity(predicted, a, b), mask), atol=2e-4)
    near = jnp.asarray(np.abs(exact_preference(a, b, fixed=False) - 0.5) < 0.49)
    ours = losses.fidelity(predicted, a, b, near)
    np.testing.assert_allclose(ours, masked_mean(exact_fidelity(predicted, a, b), np.asarray(near)), atol=2e-6)


def exact_fidelity(predicted: jax.Array, a: Rating, b: Rating) -> np.ndarray:
    p, target = np.asarray(predicted, np.float64), exact_preference(a, b, fixed=False)
    return 1 - np.sqrt(p * target + 1e-8) - np.sqrt((1 - p) * (1 - target) + 1e-8)


def test_fidelity_is_least_where_the_preferences_agree() -> None:
    opinions = ratings(np.float32([60.0]), np.float32([8.0])), ratings(np.float32([55.0]), np.float32([6.0]))
    rows = jnp.ones(1, bool)
    target = float(phi(np.array(5 / 10)))

    def loss(p: jax.Array) -> jax.Array:
        return losses.fidelity(p[None], *opinions, rows)

    value, slope = jax.value_and_grad(loss)(jnp.float32(target))
    assert abs(float(value)) < 1e-6
    assert abs(float(slope)) < 1e-5
    assert float(loss(jnp.float32(target + 0.2))) > 0.01
    assert float(jax.grad(loss)(jnp.float32(target + 0.2))) > 0 > float(jax.grad(loss)(jnp.float32(target - 0.2)))


@QUICK
@given(MEANS, MEANS, hnp.arrays(np.bool_, ROWS), MASKS)
def test_binary_losses_are_those_of_the_right_order(
    mean_a: np.ndarray, mean_b: np.ndarray, a_is_better: np.ndarray, mask: np.ndarray
) -> None:
    # Deviations of which nothing is asked.
    a, b = ratings(mean_a, np.full(ROWS, np.nan, np.float32)), ratings(mean_b, np.full(ROWS, np.nan, np.float32))
    better = phi((mean_a.astype(np.float64) - mean_b.astype(np.float64)) / math.sqrt(2))
    right = np.where(a_is_better, better, 1 - better)
    given = jnp.asarray(a_is_better), jnp.asarray(mask)
    np.testing.assert_allclose(losses.binary_fidelity(a, b, *given), masked_mean(1 - np.sqrt(right), mask), atol=1e-5)
    np.testing.assert_allclose(losses.binary_cross_entropy(a, b, *given), masked_mean(-np.log(right), mask), rtol=2e-4)


# ---- rows that do not count -------------------------------------------------------------------------------


def with_garbage(array: np.ndarray, mask: np.ndarray, value: float) -> jax.Array:
    """The array with garbage wherever the mask is off."""
    where = mask.reshape(mask.shape + (1,) * (array.ndim - mask.ndim))
    return jnp.asarray(np.where(where, array, np.asarray(value).astype(array.dtype)))


@pytest.mark.parametrize("value", GARBAGE)
@pytest.mark.parametrize("mask", [[True, False, True, False], [False] * 4])
def test_labels_of_rows_that_do_not_count_change_neither_loss_nor_gradient(mask: list[bool], value: float) -> None:
    random = np.random.default_rng(1)
    logits = jnp.asarray(random.normal(0, 3, (ROWS, VOCABULARY)).astype(np.float32))
    probs = random.dirichlet(np.ones(5), ROWS).astype(np.float32)
    opinions = [random.uniform(1, 90, ROWS).astype(np.float32) for _ in range(4)]
    rows = np.array(mask)

    def loss(logits: jax.Array, probs: jax.Array, *opinions: jax.Array) -> jax.Array:
        on = jnp.asarray(rows)
        a = losses.rating(logits, IDS, closed_set=True)
        b = losses.rating(jnp.roll(logits, 1, axis=1), IDS, closed_set=True)
        predicted = losses.preference(a, b, fixed_std=False, detach_std=False)
        kl = losses.soft_label_kl(logits, IDS, probs, on)
        return kl + losses.fidelity(predicted, Rating(*opinions[:2]), Rating(*opinions[2:]), on)

    clean = jax.value_and_grad(loss)(logits, jnp.asarray(probs), *map(jnp.asarray, opinions))
    dirty = jax.value_and_grad(loss)(logits, *(with_garbage(x, rows, value) for x in (probs, *opinions)))
    np.testing.assert_array_equal(clean[0], dirty[0])
    np.testing.assert_array_equal(clean[1], dirty[1])
    assert np.isfinite(dirty[1]).all()
    assert not np.asarray(dirty[1])[~rows].any()
    assert np.asarray(dirty[1])[rows].any() == rows.any()


@pytest.mark.parametrize("label", [-100, -10000, VOCABULARY, 2**31 - 1])
def test_labels_of_positions_that_do_not_count_change_nothing(label: int) -> None:
    random = np.random.default_rng(2)
    logits = jnp.asarray(random.normal(0, 3, (2, 5, VOCABULARY)).astype(np.float32))
    labels = random.integers(0, VOCABULARY, (2, 5)).astype(np.int32)
    counted = random.random((2, 5)) < 0.5
    clean = jax.value_and_grad(losses.next_token)(logits, jnp.asarray(labels), jnp.asarray(counted))
    dirty = jax.value_and_grad(losses.next_token)(logits, with_garbage(labels, counted, label), jnp.asarray(counted))
    np.testing.assert_array_equal(clean[0], dirty[0])
    np.testing.assert_array_equal(clean[1], dirty[1])
    assert not np.asarray(dirty[1])[~counted].any()


def test_where_no_row_counts_losses_are_zero_and_pull_nowhere() -> None:
    logits = jnp.asarray(np.random.default_rng(3).normal(0, 3, (ROWS, VOCABULARY)).astype(np.float32))
    off = jnp.zeros(ROWS, bool)
    nothing = Rating(jnp.full(ROWS, jnp.nan), jnp.full(ROWS, jnp.nan))
    terms = {
        "kl": lambda x: losses.soft_label_kl(x, IDS, jnp.full((ROWS, 5), -1e4), off),
        "next token": lambda x: losses.next_token(x[None], jnp.full((1, ROWS), -100), off[None]),
        "fidelity": lambda x: losses.fidelity(
            losses.preference(
                losses.rating(x, IDS, closed_set=True),
                losses.rating(-x, IDS, closed_set=True),
                fixed_std=False,
                detach_std=False,
            ),
            nothing,
            nothing,
            off,
        ),
        "binary": lambda x: losses.binary_cross_entropy(
            losses.rating(x, IDS, closed_set=True), losses.rating(-x, IDS, closed_set=True), off, off
        ),
    }
    for name, term in terms.items():
        value, gradient = jax.value_and_grad(term)(logits)
        assert float(value) == 0, name
        assert not np.asarray(gradient).any(), name


@pytest.mark.parametrize("gap", [30.0, 200.0, 1e30])
@pytest.mark.parametrize("detached", [True, False])
@pytest.mark.parametrize("fixed", [True, False])
def test_every_term_has_finite_gradients_at_extreme_logits(gap: float, fixed: bool, detached: bool) -> None:
    """Certain and wrong, certain and right, certain of a word outside the five, and undecided."""
    logits = np.zeros((ROWS, VOCABULARY), np.float32)
    logits[0, LEVELS[0]] = logits[1, LEVELS[4]] = logits[2, 1] = gap
    probs = np.tile(np.float32([0, 0, 0, 0.07, 1.0]), (ROWS, 1))
    opinions = ratings(np.float32([10, 90, 50, 50]), np.zeros(ROWS, np.float32))
    others = ratings(np.float32([90, 10, 50, 20]), np.zeros(ROWS, np.float32))
    on = jnp.ones(ROWS, bool)

    def loss(logits: jax.Array) -> jax.Array:
        a = losses.rating(logits, IDS, closed_set=True)
        b = losses.rating(logits[::-1], IDS, closed_set=False)
        predicted = losses.preference(a, b, fixed_std=fixed, detach_std=detached)
        total = losses.fidelity(predicted, opinions, others, on)
        total += losses.binary_fidelity(a, b, on, on) + losses.binary_cross_entropy(a, b, ~on, on)
        total += losses.in_level(logits, IDS, on) + losses.soft_label_kl(logits, IDS, jnp.asarray(probs), on)
        return total + losses.next_token(logits[None], jnp.full((1, ROWS), 3), on[None])

    value, gradient = jax.value_and_grad(loss)(jnp.asarray(logits))
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()
    assert np.asarray(gradient).any()


def test_losses_do_not_depend_on_the_order_of_rows() -> None:
    random = np.random.default_rng(4)
    logits = random.normal(0, 3, (ROWS, VOCABULARY)).astype(np.float32)
    probs = random.dirichlet(np.ones(5), ROWS).astype(np.float32)
    on = np.array([True, False, True, True])
    order = np.array([2, 0, 3, 1])
    for loss in (
        lambda order: losses.soft_label_kl(*map(jnp.asarray, (logits[order], LEVELS, probs[order], on[order]))),
        lambda order: losses.in_level(*map(jnp.asarray, (logits[order], LEVELS, on[order]))),
    ):
        np.testing.assert_allclose(loss(np.arange(ROWS)), loss(order), rtol=1e-6)
