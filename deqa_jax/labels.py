"""`deqa labels`: opinion scores to training and test metas, and what the discretisation costs."""

import contextlib
import dataclasses
import logging
import math
import posixpath
import random
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate

from deqa_jax.config import ConfigError
from deqa_jax.data.metas import Item, write_metas
from deqa_jax.data.opinions import SPLITS, OpinionError, Opinions, read_csv, read_published
from deqa_jax.data.soft_labels import (
    DENSITIES,
    DiscretisationError,
    SoftLabels,
    discretisation_error,
    level_texts,
    normalise,
    one_hot_level,
    soft_labels,
)
from deqa_jax.files import read_json, refuse_existing
from deqa_jax.prompt import IMAGE_PLACEHOLDER

QUESTIONS = (
    "What do you think about the quality of this image?",
    "Can you rate the quality of this picture?",
    "Can you judge the quality of this image?",
    "How would you rate the quality of this image?",
    "How would you judge the quality of this image?",
    "What is your quality rating for this image?",
    "What's your opinion on the quality of this picture?",
    "Rate the quality of this image.",
    "Could you evaluate the quality of this image?",
    "How do you assess the quality of this image?",
)
ANSWER = "The quality of the image is {}."
_QUESTION_SEED = 131

_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LabelSettings:
    """How labels are made.

    Attributes:
      image_folder: written in front of every image name.
      density: one of `DENSITIES`.
      min_std: normalised deviation below which a score is put on its two neighbouring levels.
      max_error: likewise, for the error of the levels' mean.
      scale: lowest and highest possible score; those that occur without it.
      invert: whether low scores are good (DMOS).
      answer: what the model is to say, with `{}` for the level.
      flat_middle: a quirk of the published labels, see `soft_labels`.
    """

    image_folder: str = ""
    density: str = "pdf"
    min_std: float = 0.2
    max_error: float = 0.1
    scale: Sequence[float] | None = None
    invert: bool = False
    answer: str = ANSWER
    flat_middle: bool = False


@dataclasses.dataclass(frozen=True)
class Labels:
    """What is made of one dataset.

    Attributes:
      items: metas by split; those to test on carry no levels and no text.
      soft: error of the soft labels' mean and deviation, over both splits.
      one_hot: the same of one word per image.
      raw: the same of the density as it is.
      labels: the soft labels of both splits, in file order.
    """

    items: dict[str, list[Item]]
    soft: DiscretisationError
    one_hot: DiscretisationError
    raw: DiscretisationError
    labels: SoftLabels


def make_labels(opinions: Opinions, settings: LabelSettings = LabelSettings()) -> Labels:
    """Metas of a dataset's two splits, in file order.

    Raises:
      OpinionError: scores are all the same or outside the scale, or no image is in a split.
    """
    low, high = _scale(opinions, settings)
    # Every score counts for the range, those in neither split too.
    rows = np.flatnonzero([split is not None for split in opinions.splits])
    if not len(rows):
        raise OpinionError("no image is in the train or test split; do the names in both files match?")
    scores, deviations = opinions.mos[rows], opinions.std[rows]
    if settings.invert:
        # Rounded, the sum of both less the best score may be above the best.
        scores = np.clip(low + high - scores, low, high)
    mos, std = _normalised(scores, deviations, low, high)
    labels = soft_labels(
        mos,
        std,
        density=settings.density,
        min_std=settings.min_std,
        max_error=settings.max_error,
        flat_middle=settings.flat_middle,
    )
    levels = one_hot_level(scores, low, high)
    answers = level_texts(levels, settings.answer)
    draw = random.Random(_QUESTION_SEED)
    ids = _ids(opinions)
    items: dict[str, list[Item]] = {split: [] for split in SPLITS}
    for position, row in enumerate(rows):
        # The published code draws a question for test images too, and does not use it.
        question = draw.choice(QUESTIONS)
        split = opinions.splits[row]
        assert split is not None  # by the choice of rows
        items[split].append(
            _item(
                opinions,
                int(row),
                id=ids[row],
                image=posixpath.join(settings.image_folder, opinions.names[row]),
                numbers=(scores[position], mos[position], std[position]),
                levels=None if split == "test" else (labels.raw[position], labels.probs[position]),
                turns=None if split == "test" else (question, answers[position]),
            )
        )
    return Labels(
        items,
        discretisation_error(labels.probs, mos, std),
        discretisation_error(np.eye(5)[levels], mos, std),
        discretisation_error(labels.raw, mos, std),
        labels,
    )


def _scale(opinions: Opinions, settings: LabelSettings) -> tuple[float, float]:
    """The lowest and highest possible score, which no score is outside of."""
    low, high = settings.scale or (float(opinions.mos.min()), float(opinions.mos.max()))
    if not low < high:
        raise OpinionError("all scores are the same; give their scale, for example --scale 1 5")
    outside = (opinions.mos < low) | (opinions.mos > high)
    if outside.any():
        worst = int(np.argmax(outside))
        raise OpinionError(
            f"{outside.sum()} scores are outside the scale from {low:g} to {high:g}, "
            f"the first {opinions.texts[worst]} of {opinions.names[worst]}"
        )
    return low, high


def _normalised(scores: np.ndarray, deviations: np.ndarray, low: float, high: float) -> tuple[np.ndarray, np.ndarray]:
    """Scores and deviations on the scale from 1 to 5; says so if the latter look like those of another scale."""
    with np.errstate(over="ignore", invalid="ignore"):
        mos, std = normalise(scores, deviations, low, high)
    if math.isinf(high - low) or not np.isfinite(mos).all() or np.isinf(std).any():
        raise OpinionError("scores or standard deviations are too large to be put on a scale from 1 to 5")
    if (std > 2).any():
        _logger.warning(
            "%d standard deviations are above 2 once scores are from 1 to 5, which hardly any opinions can have: "
            "are they on the scale of the scores?",
            (std > 2).sum(),
        )
    return mos, std


def _ids(opinions: Opinions) -> list[str]:
    """`name->mos`, with the folders of the name only where names alone would not tell images apart."""
    names = [posixpath.basename(name) for name in opinions.names]
    if len(set(names)) < len(names):
        names = opinions.names
    return [f"{name}->{text}" for name, text in zip(names, opinions.texts, strict=True)]


def _item(
    opinions: Opinions,
    row: int,
    *,
    id: str,
    image: str,
    numbers: tuple[float, float, float],
    levels: tuple[np.ndarray, np.ndarray] | None,
    turns: tuple[str, str] | None,
) -> Item:
    has_std = not np.isnan(opinions.std[row])
    score, score_norm, std_norm = map(float, numbers)
    raw, probs = levels or (None, None)
    return Item(
        id=id,
        image=image,
        gt_score=score,
        gt_score_norm=score_norm,
        level_probs_org=None if raw is None or np.isnan(raw).any() else tuple(raw.tolist()),
        level_probs=None if probs is None else tuple(probs.tolist()),
        std=float(opinions.std[row]) if has_std else None,
        std_norm=std_norm if has_std else None,
        conversations=turns
        and (
            {"from": "human", "value": f"{turns[0]}\n{IMAGE_PLACEHOLDER}"},
            {"from": "gpt", "value": turns[1]},
        ),
    )


# ---- the command ------------------------------------------------------------------------------------------


def label_published(config_file: Path) -> str:
    """Makes the metas that a published configuration asks for; its paths start at the working directory.

    Returns:
      A table of what the discretisation costs.

    Raises:
      ConfigError, OpinionError: the configuration or the opinion scores are malformed; all faults are named.
      FileExistsError: a file that it would write is there already.
    """
    made: dict[str, Labels] = {}
    outputs: dict[Path, list[Item]] = {}
    for name, settings, paths in _read_config(config_file):
        made[name] = _of_dataset(name, read_published(paths["mos_json"], paths["split_json"]), settings)
        outputs |= {paths[f"save_{split}"]: made[name].items[split] for split in SPLITS}
    return _write(outputs, made)


def label_csv(
    csv_file: Path,
    out: Path,
    settings: LabelSettings,
    *,
    columns: Mapping[str, str],
    test_ratio: float = 0.2,
    seed: int = 0,
) -> str:
    """Makes `out/train.json` and `out/test.json` of one's own opinion scores; see `opinions.read_csv`.

    Returns:
      A table of what the discretisation costs.

    Raises:
      OpinionError: the opinion scores are malformed; all faults are named.
      FileExistsError: a file that it would write is there already.
    """
    outputs = {split: out / f"{split}.json" for split in SPLITS}
    for path in outputs.values():
        refuse_existing(path)
    opinions = read_csv(csv_file, columns, test_ratio=test_ratio, seed=seed)
    labels = _of_dataset(str(csv_file), opinions, settings)
    return _write({outputs[split]: labels.items[split] for split in SPLITS}, {csv_file.stem: labels})


def _of_dataset(name: str, opinions: Opinions, settings: LabelSettings) -> Labels:
    try:
        return make_labels(opinions, settings)
    except OpinionError as error:
        raise OpinionError(f"{name}: {error}") from error


def _write(outputs: Mapping[Path, list[Item]], made: Mapping[str, Labels]) -> str:
    table = _table(made)
    with contextlib.ExitStack() as undo:
        for path, items in outputs.items():
            if not items:
                _logger.warning("%s: not written, there are no images for it", path)
                continue
            write_metas(path, items)
            undo.callback(path.unlink)
            _logger.info("%s: %d images", path, len(items))
        # All are written: none is taken back.
        undo.pop_all()
    return table


def _table(made: Mapping[str, Labels]) -> str:
    rows = [
        [name, kind, *(None if math.isnan(x) else x for x in error)]
        for name, labels in made.items()
        for kind, error in (("density as it is", labels.raw), ("soft", labels.soft), ("one-hot", labels.one_hot))
    ]
    headers = ("dataset", "labels", "L1 of mean", "RMS of mean", "L1 of std", "SRCC", "PLCC")
    details = [
        f"{name}: alpha {labels.labels.alpha.mean():.4f} ± {labels.labels.alpha.std():.4f}, "
        f"beta {labels.labels.beta.mean():.4f} ± {labels.labels.beta.std():.4f}, "
        f"two levels {labels.labels.two_levels.sum()} of {len(labels.labels.alpha)}"
        for name, labels in made.items()
    ]
    return "\n".join([tabulate(rows, headers, floatfmt=".4f", disable_numparse=[0, 1], missingval="-"), *details])


_KEYS = ("split_json", "mos_json", "save_train", "save_test", "img_dir", "density_type", "thre_std", "thre_diff")


def _read_config(path: Path) -> list[tuple[str, LabelSettings, dict[str, Path]]]:
    """Name, settings and files of every dataset in a published configuration."""
    config = read_json(path)
    answer, datasets = config.get("answer"), config.get("dataset_params")
    problems = []
    if not isinstance(answer, str) or "{}" not in answer:
        problems.append("'answer' is not a text with {} in the place of the level")
    if not isinstance(datasets, dict) or not datasets:
        problems.append("'dataset_params' names no datasets")
        datasets = {}
    for name, entry in datasets.items():
        problems += [f"{name}: {problem}" for problem in _entry_problems(entry)]
    if problems:
        raise ConfigError(f"{path}: " + "; ".join(problems))
    outputs = [Path(entry[key]) for entry in datasets.values() for key in ("save_train", "save_test")]
    places = [output.resolve() for output in outputs]
    for output, place in zip(outputs, places, strict=True):
        refuse_existing(output)
        if places.count(place) > 1:
            raise ConfigError(f"{path}: {output} would be written twice")
    return [
        (
            name,
            LabelSettings(
                image_folder=entry["img_dir"],
                density=entry["density_type"],
                min_std=float(entry["thre_std"]),
                max_error=float(entry["thre_diff"]),
                answer=str(answer),
                flat_middle=True,
            ),
            {key: Path(entry[key]) for key in _KEYS[:4]},
        )
        for name, entry in datasets.items()
    ]


def _entry_problems(entry: Any) -> list[str]:
    if not isinstance(entry, dict):
        return ["not a JSON object"]
    problems = [f"no {key!r}" for key in _KEYS if key not in entry]
    problems += [f"{key} {entry[key]!r} is not a text" for key in _KEYS[:5] if not isinstance(entry.get(key, ""), str)]
    for key in ("thre_std", "thre_diff"):
        value = entry.get(key, 0)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= sys.float_info.max:
            problems.append(f"{key} {value!r} is not a number from 0 up")
    if entry.get("density_type", "pdf") not in DENSITIES:
        problems.append(f"density_type {entry['density_type']!r} is not one of {', '.join(DENSITIES)}")
    return problems
