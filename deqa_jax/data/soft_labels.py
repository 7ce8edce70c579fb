"""Opinion scores to the five levels' probabilities and texts (SPEC 6; DeQA-Score, section 3.2 and its appendix).

N images; every array has an entry or row per image. Levels are in the order of `prompt.LEVELS`, excellent first.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import scipy.special
from jaxtyping import Bool, Float, Int

from deqa_jax import metrics
from deqa_jax.prompt import LEVEL_WEIGHTS, LEVELS

DENSITIES = ("pdf", "cdf", "none")
"""How a Gaussian becomes five numbers: its density at the levels, its mass around them, or not at all."""

WEIGHTS = np.array(LEVEL_WEIGHTS)
# What the published code adds to keep divisions and comparisons away from zero.
_LEVEL_MARGIN = 1e-8
_SLOPE_MARGIN = 1e-9
# Closer to 3 than this, the correction's slope is mostly rounding.
_MIDDLE = 1e-6
# Deviations up to this one are rounding errors, whose density would overflow.
_LEAST_STD = 1e-100


class SoftLabels(NamedTuple):
    """Probabilities of the levels, and how they came about.

    Attributes:
      raw: `[N, 5]`, the density as it is; NaN where there is no standard deviation.
      probs: `[N, 5]`, after the correction; not below 0, and of a sum of about 1 (up to 1.07: it is clipped).
      alpha: `[N]`, the factor of the correction; 1 where two levels are used.
      beta: `[N]`, what it adds; 0 where two levels are used.
      two_levels: `[N]`, whether only the two levels beside the score are used.
    """

    raw: Float[np.ndarray, "N 5"]
    probs: Float[np.ndarray, "N 5"]
    alpha: Float[np.ndarray, "N"]
    beta: Float[np.ndarray, "N"]
    two_levels: Bool[np.ndarray, "N"]


def soft_labels(
    mos: Float[np.ndarray, "N"],
    std: Float[np.ndarray, "N"],
    *,
    density: str,
    min_std: float,
    max_error: float,
    flat_middle: bool = True,
) -> SoftLabels:
    """Discretises Gaussians so that the levels' mean is the opinion score.

    Args:
      mos: mean opinion scores from 1 to 5.
      std: their standard deviations on that scale; NaN where unknown.
      density: one of `DENSITIES`.
      min_std: below this deviation, a score is put on its two neighbouring levels (`thre_std`).
      max_error: likewise, if the corrected levels' mean is further than this from the score (`thre_diff`).
      flat_middle: whether a score of exactly 3 gets a fifth on each level whatever its deviation. Quirk of the
        published correction, which divides zero by zero there.

    >>> labels = soft_labels(np.array([3.25]), np.array([0.9]), density="pdf", min_std=0.2, max_error=0.1)
    >>> float((labels.probs @ WEIGHTS).round(3)[0])
    3.25
    """
    raw = _density(mos, std, density)
    with np.errstate(invalid="ignore"):
        total, mean = raw.sum(axis=1), raw @ WEIGHTS
        alpha = (mos - 3) / (mean - 3 * total + _SLOPE_MARGIN)
        if not flat_middle:
            alpha = np.where(np.abs(mos - 3) < _MIDDLE, 1.0, alpha)
        beta = (1 - alpha * total) / 5
        corrected = np.maximum(raw * alpha[:, None] + beta[:, None], 0.0)
        fits = (std >= min_std) & (np.abs(corrected @ WEIGHTS - mos) <= max_error)
    return SoftLabels(
        raw,
        np.where(fits[:, None], corrected, _two_levels(mos)),
        np.where(fits, alpha, 1.0),
        np.where(fits, beta, 0.0),
        ~fits,
    )


def _density(mos: Float[np.ndarray, "N"], std: Float[np.ndarray, "N"], density: str) -> Float[np.ndarray, "N 5"]:
    known = (std > _LEAST_STD) & (density != "none")
    scale = np.where(known, std, np.nan)[:, None]
    if density == "cdf":
        above, below = WEIGHTS + 0.5 - mos[:, None], WEIGHTS - 0.5 - mos[:, None]
        return scipy.special.ndtr(above / scale) - scipy.special.ndtr(below / scale)
    distance = (WEIGHTS - mos[:, None]) / scale
    return np.exp(-(distance**2) / 2) / np.sqrt(2 * np.pi) / scale


def _two_levels(mos: Float[np.ndarray, "N"]) -> Float[np.ndarray, "N 5"]:
    """Linear interpolation between the two levels beside each score."""
    lower = np.clip(np.ceil(mos - _LEVEL_MARGIN) - 1, 1, 4)
    left, right = lower - _LEVEL_MARGIN, lower + 1 + _LEVEL_MARGIN
    probs = np.zeros((len(mos), 5))
    rows, column = np.arange(len(mos)), 5 - lower.astype(int)  # levels run from 5 down to 1
    probs[rows, column] = (right - mos) / (right - left)
    probs[rows, column - 1] = (mos - left) / (right - left)
    return probs


def one_hot_level(mos: Float[np.ndarray, "N"], low: float, high: float) -> Int[np.ndarray, "N"]:
    """Index into `prompt.LEVELS` of the one word for each score: five equal intervals from `low` to `high`.

    >>> one_hot_level(np.array([1.0, 50.0, 100.0]), 0.0, 100.0)
    array([4, 2, 0])
    """
    # A score on a border belongs to the lower interval.
    borders = [low + level / 5 * (high - low) + _LEVEL_MARGIN for level in range(1, 5)]
    return len(LEVELS) - 1 - np.searchsorted(borders, mos, side="left")


class DiscretisationError(NamedTuple):
    """How far the levels' mean and deviation are from those of the opinions (DeQA-Score, table 1).

    Attributes:
      mean_l1: mean absolute error of the mean.
      mean_l2: root mean square error of the mean.
      std_l1: mean absolute error of the standard deviation; NaN where none is known.
      srcc: rank correlation of the means.
      plcc: linear correlation of the means.
    """

    mean_l1: float
    mean_l2: float
    std_l1: float
    srcc: float
    plcc: float


def moments(probs: Float[np.ndarray, "N 5"]) -> tuple[Float[np.ndarray, "N"], Float[np.ndarray, "N"]]:
    """Mean and standard deviation of the levels' weights, with the probabilities as they are.

    >>> moments(np.array([[0.5, 0.0, 0.0, 0.0, 0.5]]))
    (array([3.]), array([2.]))
    """
    mean = probs @ WEIGHTS
    return mean, np.sqrt((probs * (WEIGHTS - mean[:, None]) ** 2).sum(axis=1))


def discretisation_error(
    probs: Float[np.ndarray, "N 5"], mos: Float[np.ndarray, "N"], std: Float[np.ndarray, "N"]
) -> DiscretisationError:
    """Compares probabilities, as they are, with the opinions they stand for. Rows with NaN are left out."""
    there = ~np.isnan(probs).any(axis=1)
    probs, mos, std = probs[there], mos[there], std[there]
    if not len(probs):
        return DiscretisationError(*[float("nan")] * len(DiscretisationError._fields))
    mean, deviation = moments(probs)
    error, std_error = mean - mos, np.abs(deviation - std)[~np.isnan(std)]
    return DiscretisationError(
        float(np.abs(error).mean()),
        float(np.sqrt((error**2).mean())),
        float(std_error.mean()) if len(std_error) else float("nan"),
        metrics.srcc(mean, mos),
        metrics.plcc(mean, mos),
    )


def normalise(
    mos: Float[np.ndarray, "N"], std: Float[np.ndarray, "N"], low: float, high: float
) -> tuple[Float[np.ndarray, "N"], Float[np.ndarray, "N"]]:
    """Scores from `[low, high]` to `[1, 5]`, and their standard deviations alike.

    >>> mos, std = normalise(np.array([0.0, 50.0]), np.array([25.0, 10.0]), 0.0, 100.0)
    >>> mos, std
    (array([1., 3.]), array([1. , 0.4]))
    """
    return 4 * (mos - low) / (high - low) + 1, 4 * std / (high - low)


def level_texts(levels: Sequence[int] | Int[np.ndarray, "N"], answer: str) -> list[str]:
    """Answers with the levels' words in the place of `{}`.

    >>> level_texts([0], "The quality of the image is {}.")
    ['The quality of the image is excellent.']
    """
    return [answer.replace("{}", LEVELS[level]) for level in levels]
