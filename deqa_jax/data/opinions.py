"""Lists of opinion scores: the published JSON files, and CSV files of one's own."""

import collections
import csv
import dataclasses
import logging
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from jaxtyping import Float

from deqa_jax.config import ConfigError
from deqa_jax.files import first_of, read_json

COLUMNS = ("image", "mos", "std", "split", "reference")
"""What a CSV file can have; the first two are required."""
SPLITS = ("train", "test")

_logger = logging.getLogger(__name__)


class OpinionError(ValueError):
    """Opinion scores that cannot be used; the message names the file and what is wrong in it."""


@dataclasses.dataclass(frozen=True)
class Opinions:
    """Images with their opinion scores, in file order.

    Attributes:
      names: image files, relative to a folder.
      texts: the scores as the file writes them.
      mos: mean opinion scores `[N]`.
      std: their standard deviations `[N]`, in the same units; NaN where unknown.
      splits: `train`, `test` or None (in neither).
    """

    names: list[str]
    texts: list[str]
    mos: Float[np.ndarray, "N"]
    std: Float[np.ndarray, "N"]
    splits: list[str | None]


def read_published(mos_file: Path, split_file: Path) -> Opinions:
    """Reads the published `mos.json` (name to mos and std) and `split.json` (train and test, lists of names).

    Quirk of the published files: names in the split have no folders, those in the list of scores may.

    Raises:
      OpinionError: a file is missing or malformed; all malformed entries are named.
    """
    try:
        scores, split = read_json(mos_file), read_json(split_file)
    except (ConfigError, OSError) as error:
        raise OpinionError(str(error)) from error
    members: dict[str, str] = {}
    # An image in both is trained on.
    for name in reversed(SPLITS):
        if not isinstance(split.get(name), list):
            raise OpinionError(f"{split_file}: has no list {name!r} of image names")
        members |= {str(image): name for image in split[name]}
    if unrated := sorted(members.keys() - {PurePosixPath(image).name for image in scores}):
        _logger.warning("%s names images that %s has no scores of: %s", split_file, mos_file, first_of(unrated))

    def rows() -> Iterator[tuple[str, Mapping[str, Any]]]:
        for image, entry in scores.items():
            yield f"{mos_file}: {image}", {**(entry if isinstance(entry, dict) else {}), "image": image}

    return _opinions(mos_file, rows(), lambda row: members.get(PurePosixPath(row["image"]).name))


def read_csv(path: Path, columns: Mapping[str, str], *, test_ratio: float, seed: int) -> Opinions:
    """Reads a CSV file with a header.

    Without a split column, images are drawn for the test split, all of one reference together.

    Args:
      path: the file, in UTF-8.
      columns: names in the file of some of `COLUMNS`; the others have their own.
      test_ratio: the share of images to test on, 0 to 1.
      seed: of the draw.

    Raises:
      OpinionError: the file is missing or malformed; all malformed rows are named.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as lines:
            reader = csv.DictReader(lines, strict=True)
            header = list(reader.fieldnames or ())
            rows = [(f"{path}:{reader.line_num}", row) for row in reader]
    except FileNotFoundError as error:
        raise OpinionError(f"{path}: no such file") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise OpinionError(f"{path}: not a CSV file in UTF-8 ({error})") from error
    if not header:
        raise OpinionError(f"{path}: the first line does not name the columns")
    names = {column: columns.get(column, column) for column in COLUMNS}
    if shared := [column for column in columns if list(names.values()).count(names[column]) > 1]:
        raise OpinionError(f"{path}: {', '.join(shared)}: column {names[shared[0]]!r} is another one's too")
    missing = [names[column] for column in COLUMNS if column in ("image", "mos", *columns)]
    missing = [name for name in missing if name not in header]
    if missing:
        raise OpinionError(
            f"{path}: no column {', '.join(map(repr, missing))}; it has {', '.join(map(repr, header))}. "
            "Say which is which, for example --column mos=MOS"
        )
    if repeated := sorted({name for name in names.values() if header.count(name) > 1}):
        raise OpinionError(f"{path}: more than one column {', '.join(map(repr, repeated))}")
    if longer := [where for where, row in rows if None in row]:
        complaint = "more fields than the header has; put names with commas in quotes"
        raise OpinionError(first_of([f"{where}: {complaint}" for where in longer]))
    known = [(where, {column: row.get(name) for column, name in names.items()}) for where, row in rows]
    if names["split"] in header:
        return _opinions(path, known, lambda row: row["split"] or None)
    groups = [str(row["reference"] or row["image"]) for _, row in known]
    test = _draw(groups, test_ratio, seed)
    return _opinions(path, known, lambda row: "test" if (row["reference"] or row["image"]) in test else "train")


def _draw(groups: list[str], ratio: float, seed: int) -> set[str]:
    """Groups, drawn in an order that depends on their names and the seed alone, that hold about `ratio` of the rows."""
    sizes = collections.Counter(groups)
    order = sorted(sizes)
    random.Random(seed).shuffle(order)
    drawn: set[str] = set()
    wanted = ratio * len(groups)
    for group in order:
        # Take a group if that brings the count nearer to what is wanted.
        if sizes[group] / 2 < wanted:
            drawn.add(group)
            wanted -= sizes[group]
    return drawn


def _opinions(
    path: Path,
    rows: Iterable[tuple[str, Mapping[str, Any]]],
    split_of: Callable[[Mapping[str, Any]], str | None],
) -> Opinions:
    """Checks every row (where it stands, and its fields) before anything is made of any."""
    names, texts, mos, std, splits, problems = [], [], [], [], [], []
    for where, row in rows:
        found = [_number(row, "mos"), math.nan if row.get("std") in (None, "") else _number(row, "std")]
        split = split_of(row) if row["image"] else None
        wrong = [x for x in found if isinstance(x, str)]
        if not row["image"]:
            wrong.append("there is no image name")
        if not isinstance(found[1], str) and found[1] < 0:
            wrong.append(f"std {row['std']} is negative")
        if split not in (None, *SPLITS):
            wrong.append(f"split {split!r} is not one of {', '.join(SPLITS)} or empty")
        if wrong:
            problems.append(f"{where}: {'; '.join(wrong)}")
            continue
        names.append(str(row["image"]))
        texts.append(str(row["mos"]))
        mos.append(found[0])
        std.append(found[1])
        splits.append(split)
    counts = collections.Counter(names)
    problems += [f"{path}: {name} is listed {count} times" for name, count in counts.items() if count > 1]
    if problems:
        raise OpinionError(first_of(problems))
    if not names:
        raise OpinionError(f"{path}: has no images")
    return Opinions(names, texts, np.array(mos, np.float64), np.array(std, np.float64), splits)


def _number(row: Mapping[str, Any], field: str) -> float | str:
    """A finite number, or what is wrong with it."""
    value = row.get(field)
    if value in (None, ""):
        return f"there is no {field}"
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    return number if math.isfinite(number) else f"{field} {value!r} is not a number"
