"""The training objective, one function a term (SPEC 5; DeQA-Score, sections 3.3 and 3.4). Everything in float32.

Axis letters: B images (or pairs)   A answer positions   V vocabulary   5 levels, excellent first

Batches have static shapes, so a function that averages takes `rows`, which of its B entries count; where none does,
the average is 0.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from deqa_jax.prompt import LEVEL_WEIGHTS

_EPSILON = 1e-8
_FIXED_VARIANCE = 1.0
_LEAST_IN_LEVEL = 0.01

Scalar = Float[Array, ""]


class Rating(NamedTuple):
    """Predicted scores, 1 to 5, and their standard deviations."""

    mean: Float[Array, "B"]
    std: Float[Array, "B"]


def rating(level_logits: Float[Array, "B V"], level_ids: Int[Array, "5"], *, closed_set: bool) -> Rating:
    """Score and spread from the logits that predict the level word.

    Args:
      level_logits: of the whole vocabulary.
      level_ids: the level words' tokens.
      closed_set: softmax over the five; else over the vocabulary, with the five's probabilities taken as they are.
    """
    if closed_set:
        probs = jax.nn.softmax(level_logits[:, level_ids], axis=-1)
    else:
        probs = jax.nn.softmax(level_logits, axis=-1)[:, level_ids]
    weights = jnp.asarray(LEVEL_WEIGHTS, jnp.float32)[None]
    mean = jnp.sum(probs * weights, axis=-1)
    variance = jnp.sum(probs * jnp.square(weights - mean[:, None]), axis=-1)
    # Of a certain prediction it is 0, where the root's slope is infinite and the gradient would be no number.
    return Rating(mean, jnp.sqrt(jnp.maximum(variance, jnp.finfo(jnp.float32).tiny)))


def soft_label_kl(
    level_logits: Float[Array, "B V"],
    level_ids: Int[Array, "5"],
    level_probs: Float[Array, "B 5"],
    rows: Bool[Array, "B"],
) -> Scalar:
    """KL(labels ‖ prediction) over the whole vocabulary at the level word, mean over rows.

    The labels are 0 outside the level words, and need not sum to 1. Negative ones stand for absent labels: their rows
    must be off.
    """
    log_probs = jax.nn.log_softmax(level_logits, axis=-1)[:, level_ids]
    labels = jnp.where(rows[:, None], level_probs, 0.0)
    entropy = jax.scipy.special.xlogy(labels, labels)
    return _mean(jnp.sum(entropy - labels * log_probs, axis=-1), rows)


def next_token(logits: Float[Array, "B A V"], labels: Int[Array, "B A"], counted: Bool[Array, "B A"]) -> Scalar:
    """Cross entropy, mean over the counted positions of the whole batch; logits predict the label at their position."""
    chosen = jnp.take_along_axis(logits, jnp.where(counted, labels, 0)[..., None], axis=-1)[..., 0]
    return _mean(jax.nn.logsumexp(logits, axis=-1) - chosen, counted)


def in_level(level_logits: Float[Array, "B V"], level_ids: Int[Array, "5"], rows: Bool[Array, "B"]) -> Scalar:
    """Probability outside the five level words, mean over rows, but not below 0.01."""
    inside = jnp.sum(jax.nn.softmax(level_logits, axis=-1)[:, level_ids], axis=-1)
    return jnp.maximum(_LEAST_IN_LEVEL, _mean(1.0 - inside, rows))


def preference(a: Rating, b: Rating, *, fixed_std: bool, detach_std: bool) -> Float[Array, "B"]:
    """Probability that A is better than B under Thurstone's model (eq. 8).

    Args:
      a: ratings of the first images.
      b: ratings of the second ones.
      fixed_std: take both standard deviations for 1.
      detach_std: let no gradient through them.
    """
    if fixed_std:
        variance = jnp.full_like(a.mean, 2 * _FIXED_VARIANCE)
    else:
        variance = jnp.square(a.std) + jnp.square(b.std)
        variance = jax.lax.stop_gradient(variance) if detach_std else variance
    return _phi((a.mean - b.mean) / jnp.sqrt(variance + _EPSILON))


def fidelity(predicted: Float[Array, "B"], a: Rating, b: Rating, rows: Bool[Array, "B"]) -> Scalar:
    """Fidelity loss between two preferences, mean over rows (eq. 9).

    Args:
      predicted: what `preference` says of the predictions.
      a: opinions of the first images, in the dataset's own units.
      b: opinions of the second ones.
      rows: pairs that count.
    """
    spread = jnp.sqrt(jnp.square(a.std) + jnp.square(b.std) + _EPSILON)
    target = _phi(jnp.where(rows, (a.mean - b.mean) / spread, 0.0))
    same = jnp.sqrt(predicted * target + _EPSILON)
    other = jnp.sqrt((1 - predicted) * (1 - target) + _EPSILON)
    return _mean(1 - same - other, rows)


def binary_fidelity(a: Rating, b: Rating, a_is_better: Bool[Array, "B"], rows: Bool[Array, "B"]) -> Scalar:
    """Fidelity loss where only the order is known: 1 − √p of the right order, mean over rows.

    Quirk of the published code: here neither the deviations are predicted nor a small constant added.
    """
    right = _right(a, b, a_is_better)
    return _mean(1 - jnp.sqrt(right), rows)


def binary_cross_entropy(a: Rating, b: Rating, a_is_better: Bool[Array, "B"], rows: Bool[Array, "B"]) -> Scalar:
    """−log p of the right order, mean over rows; the other choice where only the order is known."""
    return _mean(-jnp.log(_right(a, b, a_is_better)), rows)


def _right(a: Rating, b: Rating, a_is_better: Bool[Array, "B"]) -> Float[Array, "B"]:
    better = _phi((a.mean - b.mean) / jnp.sqrt(2 * _FIXED_VARIANCE))
    return jnp.where(a_is_better, better, 1 - better)


def _phi(x: Float[Array, "B"]) -> Float[Array, "B"]:
    """The normal distribution function."""
    return (1 + jax.lax.erf(x / jnp.sqrt(2.0))) / 2


def _mean(values: Float[Array, "*N"], counted: Bool[Array, "*N"]) -> Scalar:
    return jnp.sum(jnp.where(counted, values, 0.0)) / jnp.maximum(jnp.sum(counted), 1).astype(jnp.float32)
