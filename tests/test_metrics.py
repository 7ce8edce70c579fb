"""Metrics against references that share no code with them; the golden numbers are in test_evaluate.py."""

import math
from collections.abc import Callable
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy.integrate
import scipy.optimize
import scipy.stats
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from deqa_jax import metrics
from deqa_jax.metrics import (
    FitError,
    bootstrap_intervals,
    fit_logistic,
    js_divergence,
    kl_divergence,
    logistic_4,
    logistic_5,
    plcc,
    srcc,
    wasserstein,
)

# Few different values, so that ties and constants are common.
PAIRS = st.lists(st.tuples(st.integers(-4, 4), st.integers(-4, 4)), min_size=1, max_size=12)
POWERS = st.sampled_from([-1070, -600, -60, 0, 7, 600, 1020])
MEANS = st.floats(1, 5)
STDS = st.floats(0.05, 2)
CORRELATIONS = {"srcc": srcc, "plcc": plcc}


def columns(pairs: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.array(pairs, np.float64).reshape(-1, 2).T
    return x, y


def exact_plcc(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson's correlation in rational numbers, up to the last root."""
    if len(x) < 2:
        return math.nan
    rational = [[Fraction(float(value)) for value in values] for values in (x, y)]
    x_off, y_off = ([value - sum(values) / len(values) for value in values] for values in rational)
    squares = sum(a * a for a in x_off) * sum(b * b for b in y_off)
    if not squares:
        return math.nan
    products = sum(a * b for a, b in zip(x_off, y_off, strict=True))
    return math.copysign(math.sqrt(products**2 / squares), products)


def naive_ranks(values: np.ndarray) -> np.ndarray:
    """The mean of the places that a value takes among all."""
    return np.array([(values < value).sum() + ((values == value).sum() + 1) / 2 for value in values])


# ---- correlations -----------------------------------------------------------------------------------------


@settings(deadline=None)
@given(pairs=PAIRS)
@example(pairs=[(1, 1), (1, 1), (2, 2)])
@example(pairs=[(3, 2)])
@example(pairs=[(3, 2), (3, 4)])
@example(pairs=[(0, 1), (1, 0)])
def test_correlations_are_those_of_exact_arithmetic(pairs: list[tuple[int, int]]) -> None:
    x, y = columns(pairs)
    assert plcc(x, y) == pytest.approx(exact_plcc(x, y), abs=1e-12, nan_ok=True)
    assert srcc(x, y) == pytest.approx(exact_plcc(naive_ranks(x), naive_ranks(y)), abs=1e-12, nan_ok=True)


@settings(deadline=None)
@given(pairs=PAIRS)
def test_correlations_are_those_of_scipy(pairs: list[tuple[int, int]]) -> None:
    x, y = columns(pairs)
    assume(len(set(x)) > 1 and len(set(y)) > 1)
    assert plcc(x, y) == pytest.approx(scipy.stats.pearsonr(x, y).statistic, abs=1e-12)
    assert srcc(x, y) == pytest.approx(scipy.stats.spearmanr(x, y).statistic, abs=1e-12)


@settings(deadline=None)
@given(pairs=PAIRS, x_power=POWERS, y_power=POWERS)
@example(pairs=[(-4, 1), (4, 2), (3, 4)], x_power=1021, y_power=-1074)
def test_tiny_and_huge_values_have_the_same_correlation(
    pairs: list[tuple[int, int]], x_power: int, y_power: int
) -> None:
    """Though their squares are 0 or infinite; a power of two changes no digit."""
    x, y = columns(pairs)
    scaled = np.ldexp(x, x_power), np.ldexp(y, y_power)
    for correlation in CORRELATIONS.values():
        np.testing.assert_equal(correlation(*scaled), correlation(x, y))


@settings(deadline=None)
@given(x=st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=2, max_size=8), seed=st.integers(0, 9))
def test_correlations_are_from_minus_one_to_one_or_nan(x: list[float], seed: int) -> None:
    y = np.random.default_rng(seed).normal(size=len(x))
    for correlation in CORRELATIONS.values():
        found = correlation(np.array(x), y)
        assert math.isnan(found) == (len(set(x)) == 1)
        assert math.isnan(found) or -1 <= found <= 1


@pytest.mark.parametrize("name", CORRELATIONS)
@pytest.mark.parametrize(
    ("x", "y"),
    [
        ([], []),
        ([1], [2]),
        ([0.1, 0.1, 0.1], [1, 2, 3]),
        ([1, 2, 3], [0.1, 0.1, 0.1]),
        ([0, 0], [0, 0]),
        ([1e308, 1e308], [1, 2]),
    ],
    ids=repr,
)
def test_what_has_no_correlation_is_nan(name: str, x: list[float], y: list[float]) -> None:
    assert math.isnan(CORRELATIONS[name](np.array(x, np.float64), np.array(y, np.float64)))


def test_rank_correlation_sees_order_only() -> None:
    x = np.array([1.0, 5.0, 2.0, 9.0, 3.0])
    assert srcc(x, np.exp(x)) == pytest.approx(1, abs=1e-15)
    assert srcc(x, -(x**3)) == pytest.approx(-1, abs=1e-15)
    assert plcc(x, np.exp(x)) < 0.9


# ---- fit --------------------------------------------------------------------------------------------------

X = np.linspace(1, 5, 40)


@pytest.mark.parametrize(
    "found", [(90.0, 10.0, 3.0, 0.5), (10.0, 90.0, 3.0, 0.5), (5.0, -5.0, 2.5, 1.0)], ids=["rising", "falling", "wide"]
)
def test_a_logistic_curve_is_found_again(found: tuple[float, ...]) -> None:
    truth = logistic_4(X, *found)
    between = X[:-1] + 0.05
    curve = fit_logistic(X, truth, 4)
    np.testing.assert_allclose(curve(X), truth, rtol=0, atol=1e-6)
    np.testing.assert_allclose(curve(between), logistic_4(between, *found), rtol=0, atol=1e-6)


def test_after_the_fit_falling_predictions_correlate_rightly() -> None:
    truth = logistic_4(X, 10.0, 90.0, 3.0, 0.5)
    assert plcc(X, truth) < -0.9
    assert plcc(fit_logistic(X, truth, 4)(X), truth) == pytest.approx(1, abs=1e-9)


def test_five_parameters_make_a_line_of_a_line() -> None:
    """The start of the published code is on the way to one, whatever the scale of the opinions."""
    for truth in (7 * X + 3, -7 * X + 80):
        np.testing.assert_allclose(fit_logistic(X, truth, 5)(X), truth, rtol=0, atol=1e-6)


def test_the_curves_are_the_published_formulas() -> None:
    for x in (1.0, 2.5, 4.9):
        four = (90 - 10) / (1 + math.exp(-(x - 3) / 0.4)) + 10
        five = 8 * (0.5 - 1 / (1 + math.exp(1.5 * (x - 2)))) + 0.3 * x + 4
        assert logistic_4(np.array([x]), 90, 10, 3, 0.4)[0] == pytest.approx(four, abs=1e-12)
        assert logistic_5(np.array([x]), 8, 1.5, 2, 0.3, 4)[0] == pytest.approx(five, abs=1e-12)


def test_the_fit_starts_where_the_published_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    starts = []

    def curve_fit(function: Any, x: Any, y: Any, p0: list[float], **options: Any) -> tuple[list[float], None]:
        starts.append(p0)
        return p0, None

    monkeypatch.setattr(metrics.scipy, "optimize", SimpleNamespace(curve_fit=curve_fit, OptimizeWarning=UserWarning))
    x, y = np.array([1.0, 2.0, 3.0, 4.0, 5.0]), np.array([10.0, 50.0, 20.0, 30.0, 15.0])
    for parameters in (4, 5):
        fit_logistic(x, y, parameters)
    assert starts == [[50, 10, 3, pytest.approx(math.sqrt(2) / 4)], [10, 0, 25, 0.1, 0.1]]


@pytest.mark.parametrize("parameters", [4, 5])
@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_fewer_points_than_parameters_cannot_be_fitted(parameters: int, count: int) -> None:
    points = np.arange(float(count))
    with pytest.raises(FitError, match=f"{parameters} parameters cannot be fitted to {count} points"):
        fit_logistic(points, points, parameters)


@pytest.mark.parametrize("parameters", [4, 5])
def test_equal_predictions_cannot_be_fitted(parameters: int) -> None:
    with pytest.raises(FitError, match="cannot be fitted to 9 points"):
        fit_logistic(np.full(9, 3.1), np.arange(9.0), parameters)


@pytest.mark.parametrize(
    ("parameters", "x", "y"),
    [
        (4, [2, 1, 2, 1, 3], [1, 1, 1, 1, 5]),
        (5, [3, 4, 2, 1, 5], [2, 2, 1, 3, 5]),
        (5, [1, 2, 3, 4, 5, 6], [1e307, 2e307, 3e307, 4e307, 5e307, 1.7e308]),
    ],
    ids=["four", "five", "beyond all numbers"],
)
def test_a_fit_that_does_not_converge_says_so(parameters: int, x: list[float], y: list[float]) -> None:
    with pytest.raises(FitError, match=f"the {parameters}-parameter fit does not converge"):
        fit_logistic(np.array(x, np.float64), np.array(y, np.float64), parameters)


def test_a_fit_that_ends_at_no_curve_has_not_converged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scipy.optimize, "curve_fit", lambda *arguments, **options: (np.full(4, np.nan), None))
    with pytest.raises(FitError, match="does not converge"):
        fit_logistic(X, X, 4)


def test_a_step_is_fitted_without_a_warning() -> None:
    """Its width goes to zero, and exp overflows on the way; as it does far away from the data."""
    curve = fit_logistic(np.array([1.0, 1.5, 2.0, 4.0, 4.5, 5.0]), np.array([0.0, 0.0, 0.0, 1.0, 1.0, 1.0]), 4)
    np.testing.assert_allclose(curve(np.array([-1e6, 1.0, 5.0, 1e6])), [0, 0, 1, 1], rtol=0, atol=1e-6)


@settings(deadline=None, max_examples=40)
@given(pairs=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), min_size=1, max_size=12))
@example(pairs=[(1, 5)] * 3 + [(2, 5)] * 3)
def test_any_points_give_a_finite_curve_or_a_fit_error(pairs: list[tuple[int, int]]) -> None:
    x, y = columns(pairs)
    for parameters in (4, 5):
        try:
            curve = fit_logistic(x, y, parameters)
        except FitError:
            continue
        assert np.isfinite(curve(x)).all()


# ---- distributions ----------------------------------------------------------------------------------------


def one(
    function: Callable[..., np.ndarray], mean: float, std: float, other_mean: float, other_std: float
) -> tuple[float, float]:
    """Of single numbers, and with both Gaussians swapped."""
    first, second = (np.array([mean]), np.array([std])), (np.array([other_mean]), np.array([other_std]))
    return float(function(*first, *second)[0]), float(function(*second, *first)[0])


def integrated_kl(mean: float, std: float, other_mean: float, other_std: float) -> float:
    """∫ p log(p/q), over the p that counts."""
    p, q = scipy.stats.norm(mean, std), scipy.stats.norm(other_mean, other_std)
    found, _ = scipy.integrate.quad(
        lambda x: p.pdf(x) * (p.logpdf(x) - q.logpdf(x)), mean - 12 * std, mean + 12 * std, epsabs=1e-10, epsrel=1e-10
    )
    return float(found)


def off_by(kl: float, std: float, other_std: float) -> float:
    """How far the published small constants can move a divergence."""
    quadratic = abs(kl) + 0.5 + abs(math.log(other_std / std))
    return 1e-8 / std + quadratic * 5e-9 / other_std**2 + 1e-9


@settings(deadline=None, max_examples=25)
@given(mean=MEANS, std=STDS, other_mean=MEANS, other_std=STDS)
def test_divergence_of_gaussians_is_its_integral(mean: float, std: float, other_mean: float, other_std: float) -> None:
    exact = integrated_kl(mean, std, other_mean, other_std)
    found, _ = one(kl_divergence, mean, std, other_mean, other_std)
    assert abs(found - exact) <= off_by(exact, std, other_std)


@settings(deadline=None, max_examples=15)
@given(mean=MEANS, std=STDS, other_mean=MEANS, other_std=STDS)
def test_jensen_shannon_is_taken_to_the_gaussian_in_the_middle(
    mean: float, std: float, other_mean: float, other_std: float
) -> None:
    middle = (mean + other_mean) / 2, math.sqrt((std**2 + other_std**2) / 2)
    halves = [integrated_kl(mean, std, *middle), integrated_kl(other_mean, other_std, *middle)]
    allowed = off_by(halves[0], std, middle[1]) + off_by(halves[1], other_std, middle[1])
    found, swapped = one(js_divergence, mean, std, other_mean, other_std)
    assert abs(found - sum(halves) / 2) <= allowed / 2
    assert found == pytest.approx(swapped, abs=1e-12)


@settings(deadline=None, max_examples=25)
@given(mean=MEANS, std=STDS, other_mean=MEANS, other_std=STDS)
def test_wasserstein_is_the_root_mean_square_way_between_quantiles(
    mean: float, std: float, other_mean: float, other_std: float
) -> None:
    def cost(z: float) -> float:
        return float(scipy.stats.norm.pdf(z)) * (mean + z * std - other_mean - z * other_std) ** 2

    squared, _ = scipy.integrate.quad(cost, -12, 12, epsabs=1e-12, epsrel=1e-12)
    found, swapped = one(wasserstein, mean, std, other_mean, other_std)
    assert found**2 == pytest.approx(squared, abs=1e-9)
    assert found == swapped


def test_divergences_have_the_published_small_constants() -> None:
    """Where they count: deviations as small as they are."""
    found, _ = one(kl_divergence, 3.0, 1e-8, 3.0, 1e-4)
    assert found == pytest.approx(math.log(1e-4 / 2e-8) + 1e-16 / 3e-8 - 0.5, abs=1e-9)
    found, _ = one(kl_divergence, 3.0, 1e-4, 3.0002, 1e-4)
    assert found == pytest.approx(math.log(1e-4 / 1.0001e-4) + 5e-8 / 3e-8 - 0.5, abs=1e-9)


def test_equal_gaussians_are_not_apart() -> None:
    for function, allowed in ((kl_divergence, 1e-7), (js_divergence, 1e-7), (wasserstein, 0)):
        assert one(function, 3.3, 0.4, 3.3, 0.4) == (pytest.approx(0, abs=allowed),) * 2


def test_a_predicted_deviation_of_zero_is_without_bound_and_without_a_warning() -> None:
    assert one(kl_divergence, 3.0, 0.5, 3.0, 0.0)[0] == -math.inf
    assert one(js_divergence, 3.0, 0.0, 3.0, 0.0)[0] == -math.inf
    assert one(wasserstein, 3.0, 0.5, 3.0, 0.0)[0] == 0.5
    # Opinions without deviation are not without bound: that is what the constant is for.
    assert one(kl_divergence, 3.0, 0.0, 3.0, 1.0)[0] == pytest.approx(math.log(1e8) - 0.5, abs=1e-9)


def test_distances_beyond_squares_are_measured() -> None:
    assert one(wasserstein, 3e200, 1e200, 0.0, 5e200)[0] == pytest.approx(5e200, rel=1e-12)
    assert one(wasserstein, 3e-200, 1e-200, 0.0, 5e-200)[0] == pytest.approx(5e-200, rel=1e-12)


def test_images_do_not_mix() -> None:
    rows = np.random.default_rng(0).uniform(0.5, 2, (4, 20))
    for function in (kl_divergence, js_divergence, wasserstein):
        together = function(*rows)
        assert together.shape == (20,)
        np.testing.assert_array_equal(together, [function(*rows[:, i : i + 1])[0] for i in range(20)])


# ---- bootstrap --------------------------------------------------------------------------------------------


def naive_intervals(
    x: np.ndarray, y: np.ndarray, average: np.ndarray, resamples: int, seed: int
) -> dict[str, tuple[float, float]]:
    """Every resample written out as the images that are in it."""
    generator = np.random.default_rng(seed)
    drawn: dict[str, list[float]] = {"srcc": [], "plcc": [], "average": []}
    while len(drawn["plcc"]) < resamples:
        for chosen in generator.integers(len(x), size=(min(64, resamples - len(drawn["plcc"])), len(x))):
            drawn["srcc"].append(float_plcc(naive_ranks(x[chosen]), naive_ranks(y[chosen])))
            drawn["plcc"].append(float_plcc(x[chosen], y[chosen]))
            drawn["average"].append(math.fsum(average[chosen]) / len(x))
    return {name: naive_percentiles(values) for name, values in drawn.items()}


def float_plcc(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson's correlation by its definition; exact arithmetic would take minutes."""
    if len(set(x)) == 1 or len(set(y)) == 1:
        return math.nan
    x, y = x - math.fsum(x) / len(x), y - math.fsum(y) / len(y)
    return math.fsum(x * y) / math.sqrt(math.fsum(x * x) * math.fsum(y * y))


def naive_percentiles(values: list[float]) -> tuple[float, float]:
    """By linear interpolation between order statistics."""
    kept = sorted(value for value in values if not math.isnan(value))
    if not kept:
        return math.nan, math.nan
    bounds = []
    for share in (0.025, 0.975):
        place = share * (len(kept) - 1)
        below = math.floor(place)
        above = min(below + 1, len(kept) - 1)
        bounds.append(kept[below] + (place - below) * (kept[above] - kept[below]))
    return bounds[0], bounds[1]


@settings(deadline=None, max_examples=25)
@given(
    pairs=PAIRS,
    x_unit=st.sampled_from([1.0, 0.1, 1 / 3, 1e-5]),
    y_unit=st.sampled_from([1.0, 0.1, 1 / 3, 100.0]),
    resamples=st.sampled_from([1, 2, 63, 64, 65, 150]),
    seed=st.integers(0, 1000),
)
@example(pairs=[(1, 2), (2, 3), (3, 5)], x_unit=0.1, y_unit=0.1, resamples=150, seed=0)
@example(pairs=[(1, 2), (2, 2), (3, 2)], x_unit=0.1, y_unit=0.1, resamples=65, seed=0)
@example(pairs=[(1, 2)], x_unit=0.1, y_unit=0.1, resamples=65, seed=0)
@example(pairs=[(1, 2), (2, 1)], x_unit=0.1, y_unit=0.1, resamples=1, seed=0)
@example(pairs=[(i % 5, i % 7) for i in range(40)], x_unit=0.1, y_unit=1 / 3, resamples=150, seed=1)
def test_intervals_are_those_of_resamples_written_out(
    pairs: list[tuple[int, int]], x_unit: float, y_unit: float, resamples: int, seed: int
) -> None:
    x, y = columns(pairs)
    x, y, average = x * x_unit, y * y_unit, (x - y) ** 2 / 7
    found = bootstrap_intervals(x, y, {"average": average}, resamples=resamples, seed=seed)
    expected = naive_intervals(x, y, average, resamples, seed)
    assert list(found) == list(expected)
    for name, bounds in expected.items():
        assert found[name] == pytest.approx(bounds, abs=1e-9, nan_ok=True), name


def test_the_written_out_resamples_are_right_themselves() -> None:
    values = np.random.default_rng(0).normal(size=37)
    low, high = np.quantile(values, (0.025, 0.975))
    assert naive_percentiles([*values, math.nan]) == pytest.approx((low, high), abs=1e-12)
    x, y = np.array([0.1, 0.7, 0.2, 0.7]), np.array([1.0, 3.0, -2.0, 0.5])
    assert float_plcc(x, y) == pytest.approx(exact_plcc(x, y), abs=1e-12)


def test_a_resample_of_one_image_alone_has_no_correlation() -> None:
    """Three times 0.1 is not 0.3, and the rest must not look like a correlation of 1."""
    x, y = np.array([0.1, 0.2, 0.3]), np.array([0.1, 0.3, 0.2])
    alone = [seed for seed in range(60) if len(set(np.random.default_rng(seed).integers(3, size=3))) == 1]
    assert len(alone) > 3
    for seed in alone:
        found = bootstrap_intervals(x, y, {}, resamples=1, seed=seed)
        np.testing.assert_equal(found, {"srcc": (math.nan,) * 2, "plcc": (math.nan,) * 2})


@pytest.mark.parametrize("count", [1, 2, 3, 7, 10])
def test_constants_have_no_interval_of_correlation(count: int) -> None:
    x = np.arange(float(count))
    for pair in ((x, np.full(count, 0.1)), (np.full(count, 0.1), x)):
        found = bootstrap_intervals(*pair, {"average": np.full(count, 0.25)}, resamples=200, seed=0)
        np.testing.assert_equal(found, {"srcc": (math.nan,) * 2, "plcc": (math.nan,) * 2, "average": (0.25, 0.25)})


def test_intervals_are_those_of_the_seed() -> None:
    x = np.random.default_rng(0).normal(size=30)
    y = x + np.random.default_rng(1).normal(size=30)
    first, again, other = (bootstrap_intervals(x, y, {"x": x}, resamples=100, seed=seed) for seed in (5, 5, 6))
    assert first == again
    for name, bounds in first.items():
        assert not set(bounds) & set(other[name]), name


@pytest.mark.parametrize("powers", [(900, -900), (-1000, 1000)], ids=str)
def test_intervals_of_tiny_and_huge_values_are_the_same(powers: tuple[int, int]) -> None:
    x, y = np.array([1.0, 2.0, 3.0, 5.0]), np.array([1.0, 3.0, 2.0, 2.0])
    scaled = np.ldexp(x, powers[0]), np.ldexp(y, powers[1])
    expected = bootstrap_intervals(x, y, {}, resamples=100, seed=0)
    assert bootstrap_intervals(*scaled, {}, resamples=100, seed=0) == expected


def test_intervals_of_perfect_correlations_end_at_one() -> None:
    """Rounding would pass it."""
    x = np.random.default_rng(0).normal(size=9)
    found = bootstrap_intervals(x, 3 * x, {}, resamples=500, seed=0)
    for low, high in found.values():
        assert 1 - 1e-12 < low <= high <= 1


def test_an_infinite_average_has_no_interval_and_no_warning() -> None:
    x = np.array([1.0, 2.0, 4.0])
    found = bootstrap_intervals(x, x, {"infinite": np.array([1.0, -np.inf, 2.0]), "x": x}, resamples=100, seed=0)
    np.testing.assert_equal(found["infinite"], (math.nan, math.nan))
    assert found["x"][0] < x.mean() < found["x"][1]
