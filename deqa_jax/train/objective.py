"""The loss of a batch: which terms of `losses` it is made of, and their weights (SPEC 5)."""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt8

from deqa_jax import losses
from deqa_jax.config import ConfigError
from deqa_jax.losses import Rating


@dataclasses.dataclass(frozen=True)
class Objective:
    """Terms and weights, under their published names; the defaults are those of the published runs.

    Attributes:
      weight_rank: of the fidelity loss between the two images of a pair.
      weight_next_token: of the next-token loss, the soft-label KL included.
      weight_softkl: of the soft-label KL inside it.
      weight_in_level: of the probability outside the five level words.
      weight_desp: of the next-token loss of description items.
      softkl_loss: train the level word on soft labels; else on the word of the answer.
      continuous_rating_loss: the fidelity loss compares with human preferences; else only with their order.
      binary_rating_loss: where only the order counts: `fidelity` or `bce`.
      closeset_rating_loss: take scores from the five level words; else from the whole vocabulary.
      use_fix_std: take the predictions' standard deviations for 1 in the fidelity loss.
      detach_pred_std: if not, let no gradient through them.
    """

    weight_rank: float = 1.0
    weight_next_token: float = 0.05
    weight_softkl: float = 1.0
    weight_in_level: float = 0.0
    weight_desp: float = 1.0
    softkl_loss: bool = True
    continuous_rating_loss: bool = True
    binary_rating_loss: str = "fidelity"
    closeset_rating_loss: bool = True
    use_fix_std: bool = True
    detach_pred_std: bool = True

    def __post_init__(self) -> None:
        if self.binary_rating_loss not in ("fidelity", "bce"):
            raise ConfigError(f"binary_rating_loss is fidelity or bce, not {self.binary_rating_loss!r}")


class Batch(NamedTuple):
    """B examples of S images each: two where pairs are trained on, else one. A tokens come after the image.

    Attributes:
      images: uint8 squares.
      after: token ids behind the image, padded at the end.
      labels: what is to be predicted at each of them; `IGNORED_LABEL` where nothing is.
      level_position: where in `after` the level word stands; anything for description items.
      level_probs: soft labels; anything for description items, and where they are not used.
      gt_score: mean opinion scores in the dataset's own units; likewise.
      gt_std: their standard deviations; likewise.
      is_score: whether an example is of the rating task, and not a description.
    """

    images: UInt8[Array, "B S H W 3"]
    after: Int[Array, "B S A"]
    labels: Int[Array, "B S A"]
    level_position: Int[Array, "B S"]
    level_probs: Float[Array, "B S 5"]
    gt_score: Float[Array, "B S"]
    gt_std: Float[Array, "B S"]
    is_score: Bool[Array, "B"]


class Side(NamedTuple):
    """What one image of every example comes to."""

    rating: Rating
    next_token: losses.Scalar
    in_level: losses.Scalar
    description: losses.Scalar


def batch_loss(
    logits: Float[Array, "B S A V"], batch: Batch, level_ids: Int[Array, "5"], objective: Objective
) -> tuple[losses.Scalar, dict[str, Array]]:
    """The loss, and its unweighted terms by name (scores and deviations `[B]`, the others scalars).

    Args:
      logits: those that predict each token of `batch.after`.
      batch: what they should have predicted.
      level_ids: the level words' tokens.
      objective: terms and weights.
    """
    sides = [_side(logits[:, i], batch, i, level_ids, objective) for i in range(logits.shape[1])]
    terms: dict[str, Array] = {"description": sides[0].description}
    loss = objective.weight_desp * sides[0].description
    for name, side in zip("AB", sides, strict=False):
        terms |= {f"score_{name}": side.rating.mean, f"std_{name}": side.rating.std}
        terms |= {f"next_token_{name}": side.next_token, f"in_level_{name}": side.in_level}
        loss = loss + objective.weight_next_token * side.next_token
    if len(sides) == 2:
        terms["rank"] = _rank(sides[0].rating, sides[1].rating, batch, objective)
        loss = loss + objective.weight_rank * terms["rank"]
        if objective.weight_in_level:
            loss = loss + objective.weight_in_level * (sides[0].in_level + sides[1].in_level)
    return loss, terms


def _side(
    logits: Float[Array, "B A V"], batch: Batch, side: int, level_ids: Int[Array, "5"], objective: Objective
) -> Side:
    labels, position, rows = batch.labels[:, side], batch.level_position[:, side], batch.is_score
    level_logits = jnp.take_along_axis(logits, position[:, None, None], axis=1)[:, 0]
    labelled = labels >= 0
    counted = labelled & rows[:, None]
    if objective.softkl_loss:
        # The level word is trained on its soft label instead.
        counted &= jnp.arange(labels.shape[1])[None] != position[:, None]
    next_token = losses.next_token(logits, labels, counted)
    if objective.softkl_loss:
        kl = losses.soft_label_kl(level_logits, level_ids, batch.level_probs[:, side], rows)
        next_token = next_token + objective.weight_softkl * kl
    return Side(
        losses.rating(level_logits, level_ids, closed_set=objective.closeset_rating_loss),
        next_token,
        losses.in_level(level_logits, level_ids, rows),
        losses.next_token(logits, labels, labelled & ~rows[:, None]),
    )


def _rank(a: Rating, b: Rating, batch: Batch, objective: Objective) -> losses.Scalar:
    opinions = [Rating(batch.gt_score[:, i], batch.gt_std[:, i]) for i in (0, 1)]
    if objective.continuous_rating_loss:
        predicted = losses.preference(a, b, fixed_std=objective.use_fix_std, detach_std=objective.detach_pred_std)
        return losses.fidelity(predicted, opinions[0], opinions[1], batch.is_score)
    a_is_better = opinions[0].mean > opinions[1].mean
    binary = losses.binary_fidelity if objective.binary_rating_loss == "fidelity" else losses.binary_cross_entropy
    return binary(a, b, a_is_better, batch.is_score)
