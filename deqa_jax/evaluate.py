"""`deqa evaluate`: predictions against human opinion, per set and on average."""

import dataclasses
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy.special
from jaxtyping import Float
from tabulate import tabulate

from deqa_jax import metrics
from deqa_jax.data.datasets import Dataset, of_metas
from deqa_jax.data.metas import Item, read_metas
from deqa_jax.data.soft_labels import moments
from deqa_jax.prompt import LEVELS

METRICS = ("srcc", "plcc", "kl", "js", "wd")
FITS = {"4": 4, "5": 5, "none": None}
"""Curve that predictions are mapped through before correlations are taken, to its number of parameters."""

_SHOWN_PROBLEMS = 5
# Of float32 softmax, with room for its rounding.
_MOST_PROBABLE = 1 + 1e-5


class EvaluationError(ValueError):
    """Predictions that cannot be evaluated; the message names the file and says why."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Predictions:
    """Predictions of one set with the opinions they are compared with; N images, in the order of the metas.

    Attributes:
      name: of the set.
      items: metas of the images.
      probs: `[N, 5]`, excellent to bad; of the open set they need not sum to 1.
      mean: `[N]`, predicted scores.
      std: `[N]`, their standard deviations.
      gt_score: `[N]`, mean opinion scores in the dataset's own units.
      gt_mean: `[N]`, the same from 1 to 5; None if the metas do not say.
      gt_std: `[N]`, their deviations on that scale; None if the metas do not say.
      dataset: the published dataset that this is, if it is one.
    """

    name: str
    items: list[Item]
    probs: Float[np.ndarray, "N 5"]
    mean: Float[np.ndarray, "N"]
    std: Float[np.ndarray, "N"]
    gt_score: Float[np.ndarray, "N"]
    gt_mean: Float[np.ndarray, "N"] | None
    gt_std: Float[np.ndarray, "N"] | None
    dataset: Dataset | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What one set comes to.

    Attributes:
      predictions: what was evaluated.
      values: each of `METRICS`; NaN where opinions have no spread or a correlation does not exist.
      intervals: 95 % bootstrap bounds of each; empty if none were asked for.
      curve: what predictions were mapped through before correlations were taken; None without a fit.
    """

    predictions: Predictions
    values: dict[str, float]
    intervals: dict[str, metrics.Interval]
    curve: metrics.Curve | None

    def fields(self) -> dict[str, Any]:
        """As JSON; null for what does not exist."""
        fields: dict[str, Any] = {"name": self.predictions.name, "n": len(self.predictions.items)}
        fields |= {name: _finite(value) for name, value in self.values.items()}
        fields["mean_score"] = float(self.predictions.mean.mean())
        fields["mean_std"] = float(self.predictions.std.mean())
        fields["ci"] = {name: [_finite(bound) for bound in bounds] for name, bounds in self.intervals.items()}
        if dataset := self.predictions.dataset:
            fields["published"] = {
                kind: {"plcc": plcc, "srcc": srcc}
                for kind, (plcc, srcc) in (("full", dataset.paper), ("lora", dataset.lora))
            }
        return fields


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


# ---- reading ----------------------------------------------------------------------------------------------


def read_predictions(pred: Path, gt: Path, *, open_set: bool, allow_missing: bool = False) -> Predictions:
    """Reads a prediction file and its metas, and puts them side by side.

    Args:
      pred: JSON lines with id and `logits` or, for the open set, `probs` of the five levels.
      gt: metas.
      open_set: whether to take the levels' probabilities in the whole vocabulary, as they are.
      allow_missing: whether to go on without the images that have no prediction.

    Raises:
      EvaluationError: a file is malformed, or predictions and metas are not of the same images.
      MetaError: the metas are malformed.
    """
    field = "probs" if open_set else "logits"
    found: dict[str, list[float]] = {}
    for number, entry in _json_lines(pred):
        levels = _levels(entry, field)
        if levels is None:
            hint = "; it was made without open-set probabilities" if _levels(entry, "logits") else ""
            raise EvaluationError(f"{pred}:{number}: no id with {field} of {', '.join(LEVELS)}{hint}")
        if open_set and not 0 <= min(levels) <= max(levels) <= _MOST_PROBABLE:
            raise EvaluationError(f"{pred}:{number}: its {field} are not probabilities from 0 to 1")
        if str(entry["id"]) in found:
            raise EvaluationError(f"{pred}:{number}: the id {entry['id']!r} is there twice")
        found[str(entry["id"])] = levels
    items = read_metas(gt)
    if unknown := found.keys() - {item.id for item in items}:
        raise EvaluationError(f"{pred}: {_some(unknown)} not in {gt}: are they of the same set?")
    if missing := [item.id for item in items if item.id not in found]:
        if not allow_missing:
            raise EvaluationError(
                f"{pred}: {_some(missing)} of {gt} not in it; run `deqa infer` again, "
                "or evaluate the others with --allow-missing"
            )
        items = [item for item in items if item.id in found]
    scores = _column(items, "gt_score")
    if scores is None:
        raise EvaluationError(f"{gt}: has no gt_score for every image: there is nothing to compare with")
    gt_std = _column(items, "std_norm")
    if gt_std is not None and (gt_std < 0).any():
        raise EvaluationError(f"{gt}: {items[int(gt_std.argmin())].id} has a negative std_norm")
    probs = np.array([found[item.id] for item in items], np.float64)
    if not open_set:
        with np.errstate(over="ignore"):  # logits further apart than any number: a probability of 0
            probs = scipy.special.softmax(probs, axis=1)
    mean, std = moments(probs)
    dataset = of_metas((gt.name, pred.name))
    return Predictions(
        name=dataset.name if dataset else pred.stem,
        items=items,
        probs=probs,
        mean=mean,
        std=std,
        gt_score=scores,
        gt_mean=_column(items, "gt_score_norm"),
        gt_std=gt_std,
        dataset=dataset,
    )


def _json_lines(path: Path) -> list[tuple[int, Any]]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError as error:
        raise EvaluationError(f"{path}: no such file") from error
    except UnicodeDecodeError as error:
        raise EvaluationError(f"{path}: not text in UTF-8 ({error})") from error
    entries = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                entries.append((number, json.loads(line)))
            except (ValueError, RecursionError) as error:
                raise EvaluationError(f"{path}:{number}: not JSON ({error})") from error
    if not entries:
        raise EvaluationError(f"{path}: has no predictions")
    return entries


def _levels(entry: Any, field: str) -> list[float] | None:
    """Five finite numbers from a line with an id; None if it has no such thing."""
    levels = entry.get(field) if isinstance(entry, dict) and "id" in entry else None
    values = [levels.get(level) for level in LEVELS] if isinstance(levels, dict) else [None]
    try:
        numbers = [float(x) for x in values if isinstance(x, int | float) and not isinstance(x, bool)]
    except OverflowError:  # a whole number of hundreds of digits
        return None
    return numbers if len(numbers) == len(LEVELS) and all(map(math.isfinite, numbers)) else None


def _some(ids: Sequence[str] | set[str]) -> str:
    shown = ", ".join(sorted(ids)[:_SHOWN_PROBLEMS])
    return f"{len(ids)} images ({shown}{', …' if len(ids) > _SHOWN_PROBLEMS else ''}) are"


def _column(items: list[Item], field: str) -> Float[np.ndarray, "N"] | None:
    values = [getattr(item, field) for item in items]
    return None if None in values else np.array(values, np.float64)


# ---- numbers ----------------------------------------------------------------------------------------------


def evaluate(predictions: Predictions, *, fit: str = "4", resamples: int = 1000, seed: int = 0) -> Evaluation:
    """All metrics of one set (SPEC 7).

    Args:
      predictions: what to evaluate.
      fit: one of `FITS`. Quirk of the published evaluation: the rank correlation is taken after the fit too, which
        flips its sign where predictions run against opinions.
      resamples: of the bootstrap; 0 for no intervals. The curve stays that of all images.
      seed: of the bootstrap.

    Raises:
      EvaluationError: the curve cannot be fitted.
    """
    parameters, curve = FITS[fit], None
    fitted, truth = predictions.mean, predictions.gt_score
    if parameters is not None:
        try:
            curve = metrics.fit_logistic(predictions.mean, truth, parameters)
        except metrics.FitError as error:
            raise EvaluationError(f"{predictions.name}: {error}; --fit none does without") from error
        fitted = curve(predictions.mean)
    averages: dict[str, np.ndarray] = {}
    if predictions.gt_mean is not None and predictions.gt_std is not None:
        gaussians = predictions.gt_mean, predictions.gt_std, predictions.mean, predictions.std
        functions = (metrics.kl_divergence, metrics.js_divergence, metrics.wasserstein)
        averages = {name: of(*gaussians) for name, of in zip(METRICS[2:], functions, strict=True)}
    values = {"srcc": metrics.srcc(fitted, truth), "plcc": metrics.plcc(fitted, truth)}
    values |= {name: float(averages[name].mean()) if name in averages else math.nan for name in METRICS[2:]}
    intervals = {}
    if resamples:
        intervals = metrics.bootstrap_intervals(fitted, truth, averages, resamples=resamples, seed=seed)
    return Evaluation(predictions=predictions, values=values, intervals=intervals, curve=curve)


def average(evaluations: Sequence[Evaluation]) -> dict[str, float]:
    """Mean of each metric over the sets that have it; NaN where none does."""
    columns = {name: [x.values[name] for x in evaluations if math.isfinite(x.values[name])] for name in METRICS}
    return {name: statistics.fmean(column) if column else math.nan for name, column in columns.items()}


# ---- writing ----------------------------------------------------------------------------------------------

FORMATS = {"table": "simple", "markdown": "github", "latex": "latex_booktabs", "html": "html"}


def as_json(evaluations: Sequence[Evaluation], settings: Mapping[str, Any]) -> str:
    """One JSON object: `sets`, their `mean`, and the settings it was made with."""
    mean = {name: _finite(value) for name, value in average(evaluations).items()}
    result = {"sets": [evaluation.fields() for evaluation in evaluations], "mean": mean, "settings": dict(settings)}
    return json.dumps(result, indent=2)


def as_table(evaluations: Sequence[Evaluation], format: str) -> str:
    """A row per set and one for the mean, in one of `FORMATS`, next to the published numbers where there are some."""
    published = any(evaluation.predictions.dataset for evaluation in evaluations)
    rows = []
    for evaluation in evaluations:
        dataset = evaluation.predictions.dataset
        cells = [_cell(evaluation.values[name], evaluation.intervals.get(name)) for name in METRICS]
        beside = [_pair(dataset.paper), _pair(dataset.lora)] if dataset else ["", ""]
        # A row is one line, and in Markdown a bar ends a cell.
        name = evaluation.predictions.name.replace("\n", "\\n")
        name = name.replace("|", "\\|") if format == "markdown" else name
        rows.append([name, str(len(evaluation.predictions.items)), *cells, *beside])
    rows.append(["mean", "", *(_cell(value, None) for value in average(evaluations).values()), "", ""])
    headers = ["set", "n", *(name.upper() for name in METRICS), "paper PLCC/SRCC", "LoRA PLCC/SRCC"]
    if not published:
        rows, headers = [row[:-2] for row in rows], headers[:-2]
    return tabulate(rows, headers, tablefmt=FORMATS[format], disable_numparse=True)


def _cell(value: float, interval: metrics.Interval | None) -> str:
    if not math.isfinite(value):
        return "-"
    # Of very few images, it may be that no resample has a correlation.
    if interval is None or not math.isfinite(interval[0]):
        return f"{value:.4f}"
    return f"{value:.4f} [{interval[0]:.4f}, {interval[1]:.4f}]"


def _pair(plcc_srcc: tuple[float, float]) -> str:
    return f"{plcc_srcc[0]:.3f}/{plcc_srcc[1]:.3f}"
