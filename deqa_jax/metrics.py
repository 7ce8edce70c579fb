"""How well predictions agree with human opinion (SPEC 7; DeQA-Score, section 5.1), in float64 NumPy.

Correlations compare scores; divergences compare the distributions, taken as Gaussians of their mean and deviation.
"""

import warnings
from collections.abc import Callable, Mapping

import numpy as np
import scipy.optimize
import scipy.stats
from jaxtyping import Float

Array1d = Float[np.ndarray, "N"]

_EPSILON = 1e-8
# Resamples that are worked on together: bounds memory at any number of them.
_BLOCK = 64


class FitError(ValueError):
    """Scores that no curve can be fitted to, or on which the fit does not converge."""


def srcc(prediction: Array1d, truth: Array1d) -> float:
    """Spearman's rank correlation, −1 to 1; tied values share their mean rank. NaN if either side is constant.

    >>> round(srcc(np.array([1.0, 2.0, 3.0, 3.0]), np.array([10.0, 20.0, 40.0, 30.0])), 4)
    0.9487
    """
    return plcc(scipy.stats.rankdata(prediction), scipy.stats.rankdata(truth))


def plcc(prediction: Array1d, truth: Array1d) -> float:
    """Pearson's linear correlation, −1 to 1. NaN if either side is constant or there are fewer than two values.

    >>> round(plcc(np.array([1.0, 2.0, 3.0]), np.array([1.0, 2.0, 4.0])), 4)
    0.982
    """
    if len(prediction) < 2:
        return float("nan")
    prediction, truth = _moderate(prediction), _moderate(truth)
    if np.ptp(prediction) == 0 or np.ptp(truth) == 0:
        return float("nan")
    with np.errstate(invalid="ignore"):
        return float(np.corrcoef(prediction, truth)[0, 1])


def _moderate(values: Array1d) -> Array1d:
    """The same times a power of two, which no correlation sees, so that no square over- or underflows."""
    return np.ldexp(values, -np.frexp(np.abs(values).max())[1])


def logistic_4(x: Array1d, top: float, bottom: float, centre: float, width: float) -> Array1d:
    """The four-parameter logistic curve: from `bottom` to `top`, steepest at `centre`."""
    return (top - bottom) / (1 + np.exp(-(x - centre) / width)) + bottom


def logistic_5(x: Array1d, height: float, steepness: float, centre: float, slope: float, offset: float) -> Array1d:
    """The five-parameter curve of VQEG: a logistic step on a line."""
    return height * (0.5 - 1 / (1 + np.exp(steepness * (x - centre)))) + slope * x + offset


Curve = Callable[[Array1d], Array1d]


def fit_logistic(prediction: Array1d, truth: Array1d, parameters: int) -> Curve:
    """The logistic curve that maps predictions onto opinion scores with the least squared error.

    Quirk of the published evaluation: the five-parameter fit starts its centre at the mean of the *truth*, on another
    scale than the predictions, and so often ends as a line.

    Args:
      prediction: float64 `[N]`.
      truth: float64 `[N]`, on any scale.
      parameters: 4 or 5.

    Returns:
      The curve, to be called with predictions.

    Raises:
      FitError: there are fewer points than parameters, all predictions are equal, or the fit does not converge to a
        curve with finite values.

    >>> curve = fit_logistic(np.arange(9.0), np.tanh(np.arange(9.0) - 4), 4)
    >>> curve(np.array([4.0])).round(3) + 0.0
    array([0.])
    """
    if len(prediction) < parameters or np.ptp(prediction) == 0:
        raise FitError(f"a curve of {parameters} parameters cannot be fitted to {len(prediction)} points like these")
    # On its way the fit may try any curve, such as a width at which exp overflows, to the right limit; what counts is
    # where it ends. Its covariance is not used.
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", scipy.optimize.OptimizeWarning)
        if parameters == 4:
            function: Callable[..., Array1d] = logistic_4
            start = [truth.max(), truth.min(), prediction.mean(), prediction.std() / 4]
        else:
            function = logistic_5
            start = [10.0, 0.0, truth.mean(), 0.1, 0.1]
        try:
            found, _ = scipy.optimize.curve_fit(function, prediction, truth, p0=start, maxfev=10000)
        except RuntimeError as error:
            raise FitError(f"the {parameters}-parameter fit does not converge") from error

    def curve(x: Array1d) -> Array1d:
        with np.errstate(all="ignore"):
            return function(x, *found)

    if not np.isfinite(curve(prediction)).all():
        raise FitError(f"the {parameters}-parameter fit does not converge")
    return curve


def kl_divergence(mean: Array1d, std: Array1d, other_mean: Array1d, other_std: Array1d) -> Array1d:
    """KL(first ‖ other) of Gaussians, per image, with the published small constants.

    >>> kl_divergence(np.array([3.0]), np.array([1.0]), np.array([4.0]), np.array([1.0])).round(6)
    array([0.5])
    """
    # A deviation of zero has a divergence without bound.
    with np.errstate(divide="ignore"):
        ratio = np.log(other_std / (std + _EPSILON))
    return ratio + (std**2 + (mean - other_mean) ** 2) / (2 * other_std**2 + _EPSILON) - 0.5


def js_divergence(mean: Array1d, std: Array1d, other_mean: Array1d, other_std: Array1d) -> Array1d:
    """Jensen-Shannon divergence of Gaussians, per image.

    Quirk of the published evaluation: the midpoint is not the mixture but a Gaussian, whose mean is the mean of both
    means and whose deviation is the root mean square of both.
    """
    middle = (mean + other_mean) / 2
    middle_std = np.sqrt((std**2 + other_std**2) / 2)
    return (kl_divergence(mean, std, middle, middle_std) + kl_divergence(other_mean, other_std, middle, middle_std)) / 2


def wasserstein(mean: Array1d, std: Array1d, other_mean: Array1d, other_std: Array1d) -> Array1d:
    """2-Wasserstein distance of Gaussians, per image.

    >>> wasserstein(np.array([3.0]), np.array([1.0]), np.array([6.0]), np.array([5.0]))
    array([5.])
    """
    return np.hypot(mean - other_mean, std - other_std)


Interval = tuple[float, float]


def bootstrap_intervals(
    prediction: Array1d, truth: Array1d, averages: Mapping[str, Array1d], *, resamples: int, seed: int
) -> dict[str, Interval]:
    """95 % percentile intervals of both correlations, and of averages over the same images.

    Images are drawn again with replacement. A resample is a count per image, so that values are sorted once and not
    once per resample.

    Args:
      prediction: `[N]`, fitted or not; a fit is not repeated for a resample.
      truth: `[N]`.
      averages: name to per-image values `[N]` whose mean is reported.
      resamples: how many, at least 1.
      seed: of the draws.

    Returns:
      `srcc`, `plcc` and every name of `averages`, each to its bounds (NaN where no resample has a value).
    """
    generator = np.random.default_rng(seed)
    size = len(prediction)
    ranks = _Ranks(prediction), _Ranks(truth)
    values = _moderate(prediction)[None], _moderate(truth)[None]
    drawn: dict[str, list[np.ndarray]] = {"srcc": [], "plcc": [], **{name: [] for name in averages}}
    for start in range(0, resamples, _BLOCK):
        rows = min(_BLOCK, resamples - start)
        draws = generator.integers(size, size=(rows, size)) + size * np.arange(rows)[:, None]
        counts = np.bincount(draws.ravel(), minlength=rows * size).reshape(rows, size).astype(np.float64)
        drawn["srcc"].append(_weighted_plcc(ranks[0].of(counts), ranks[1].of(counts), counts))
        # Means of ranks are exact. Those of values are not, and a constant resample would seem to have a correlation.
        constant = np.isnan(drawn["srcc"][-1])
        drawn["plcc"].append(np.where(constant, np.nan, _weighted_plcc(*values, counts)))
        for name, average in averages.items():
            with np.errstate(invalid="ignore"):  # of an infinite value that is not drawn
                drawn[name].append(counts @ average / size)
    return {name: _percentiles(np.concatenate(blocks)) for name, blocks in drawn.items()}


class _Ranks:
    """Mean ranks of values in resamples of them."""

    def __init__(self, values: Array1d):
        _, self._group, sizes = np.unique(values, return_inverse=True, return_counts=True)
        self._order = np.argsort(values, kind="stable")
        self._starts = np.cumsum(sizes) - sizes

    def of(self, counts: Float[np.ndarray, "R N"]) -> Float[np.ndarray, "R N"]:
        """Ranks of every value where value i occurs `counts[:, i]` times."""
        sizes = np.add.reduceat(counts[:, self._order], self._starts, axis=1)
        return (np.cumsum(sizes, axis=1) - (sizes - 1) / 2)[:, self._group]


def _weighted_plcc(
    x: Float[np.ndarray, "#R N"], y: Float[np.ndarray, "#R N"], counts: Float[np.ndarray, "R N"]
) -> Float[np.ndarray, "R"]:
    size = counts.shape[1]
    x = x - (counts * x).sum(axis=1, keepdims=True) / size
    y = y - (counts * y).sum(axis=1, keepdims=True) / size
    covariance = (counts * x * y).sum(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        correlation = covariance / np.sqrt((counts * x**2).sum(axis=1) * (counts * y**2).sum(axis=1))
    return np.clip(correlation, -1, 1)  # which rounding may pass


def _percentiles(values: Float[np.ndarray, "R"]) -> Interval:
    # A resample of very few images may be constant and have no correlation.
    values = values[np.isfinite(values)]
    if not len(values):
        return float("nan"), float("nan")
    low, high = np.quantile(values, (0.025, 0.975))
    return float(low), float(high)
