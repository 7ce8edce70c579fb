"""Metas: the published JSON lists of images with their scores, labels and conversations (SPEC 6 and 8)."""

import dataclasses
import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from deqa_jax.config import ConfigError
from deqa_jax.files import first_of, read_json_value, write_text

TASKS = ("score", "description")
_NUMBERS = ("gt_score", "gt_score_norm", "std", "std_norm")
_PROBS = ("level_probs", "level_probs_org")


class MetaError(ValueError):
    """A file of metas that cannot be used; the message names it and what is wrong in it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Item:
    """One image of a dataset; None for what its metas do not say.

    Attributes:
      id: unique in its file; published ones are `name->mos`.
      image: file, relative to the data folder.
      gt_score: mean opinion score in the dataset's own units.
      gt_score_norm: the same from 1 to 5.
      std: standard deviation of the opinions, in the dataset's own units.
      std_norm: the same on the scale from 1 to 5.
      level_probs_org: probabilities of excellent to bad before their correction.
      level_probs: probabilities of excellent to bad.
      conversations: turns of question and answer, `{"from": "human" or "gpt", "value": text}`.
      task_type: `score` (also where it is not said) or `description`.
    """

    id: str
    image: str
    gt_score: float | None = None
    gt_score_norm: float | None = None
    level_probs_org: tuple[float, ...] | None = None
    level_probs: tuple[float, ...] | None = None
    std: float | None = None
    std_norm: float | None = None
    conversations: tuple[Mapping[str, str], ...] | None = None
    task_type: str | None = None

    def fields(self) -> dict[str, Any]:
        """What is known, in the published order."""
        known = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in known.items() if value is not None}


def read_metas(path: Path) -> list[Item]:
    """Reads a file of metas.

    Raises:
      MetaError: it is missing or malformed, or two items have one id; the first faults are named.
    """
    try:
        entries = read_json_value(path)
    except (ConfigError, OSError) as error:
        raise MetaError(str(error)) from error
    if not isinstance(entries, list):
        raise MetaError(f"{path}: not a JSON list of images")
    items, problems, seen = [], [], set()
    for index, entry in enumerate(entries):
        found = parse_item(entry)
        if isinstance(found, str):
            problems.append(f"{path}: entry {index}: {found}")
        elif found.id in seen:
            problems.append(f"{path}: entry {index}: the id {found.id!r} is there twice")
        else:
            seen.add(found.id)
            items.append(found)
    if problems:
        raise MetaError(first_of(problems))
    if not items:
        raise MetaError(f"{path}: lists no images")
    return items


def parse_item(entry: Any) -> Item | str:
    """An item from JSON, or what is wrong with it.

    >>> parse_item({"image": "a.png", "gt_score": 3}).id
    'a.png'
    >>> parse_item({"id": "x"})
    "no 'image'"
    """
    if not isinstance(entry, dict):
        return "not a JSON object"
    # Quirk of the published inference: some metas call it img_path.
    image = entry.get("image", entry.get("img_path"))
    if not isinstance(image, str) or not image:
        return "no 'image'"
    for name in _NUMBERS:
        if entry.get(name) is not None and not _is_number(entry[name]):
            return f"{name} {entry[name]!r} is not a number"
    for name in _PROBS:
        probs = entry.get(name)
        if probs is not None and not (isinstance(probs, list) and len(probs) == 5 and all(map(_is_number, probs))):
            return f"{name} is not a list of five numbers"
    turns = entry.get("conversations")
    if turns is not None and not (isinstance(turns, list) and all(map(_is_turn, turns))):
        return "conversations is not a list of turns with 'from' and 'value'"
    if entry.get("task_type") not in (None, *TASKS):
        return f"task_type {entry['task_type']!r} is not one of {', '.join(TASKS)}"
    known: dict[str, Any] = {name: float(entry[name]) for name in _NUMBERS if entry.get(name) is not None}
    known |= {name: tuple(map(float, entry[name])) for name in _PROBS if entry.get(name) is not None}
    if turns is not None:
        known["conversations"] = tuple(turns)
    id = entry.get("id")
    return Item(id=image if id is None else str(id), image=image, task_type=entry.get("task_type"), **known)


def _is_number(value: Any) -> bool:
    # JSON's whole numbers may be larger than any float.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _is_turn(turn: Any) -> bool:
    return isinstance(turn, dict) and all(isinstance(turn.get(key), str) for key in ("from", "value"))


def write_metas(path: Path, items: Iterable[Item]) -> None:
    """Writes a file of metas, whole or not at all."""
    write_text(path, json.dumps([item.fields() for item in items], indent=4))
