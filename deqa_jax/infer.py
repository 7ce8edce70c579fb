"""`deqa infer`: predictions of whole datasets, in files that a killed run can go on with.

The folder of results has a prediction file per set, `errors.jsonl` with the images that could not be read, and
`run.json`, which says what made the predictions, so that those of two models are never mixed.
"""

import contextlib
import dataclasses
import fcntl
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from deqa_jax.config import ConfigError
from deqa_jax.data.datasets import Dataset
from deqa_jax.data.metas import Item, read_metas
from deqa_jax.files import read_json, write_text
from deqa_jax.preprocess import ImageLike
from deqa_jax.prompt import LEVELS
from deqa_jax.scorer import Result, Scorer

ERRORS_FILE = "errors.jsonl"
RUN_FILE = "run.json"

# Of every line; see `_line`.
_OPENING = b'{"id": "'

_logger = logging.getLogger(__name__)


class InferenceError(ValueError):
    """Sets or results that do not fit together; the message says what to do."""


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """Images to predict.

    Attributes:
      name: of the prediction file.
      items: their metas.
      load: what the scorer is to read for an index into `items`.
    """

    name: str
    items: Sequence[Item]
    load: Callable[[int], ImageLike]


def sets_of_files(metas: Sequence[Path], root: Path) -> list[ImageSet]:
    """Sets whose images are files below `root`.

    Raises:
      MetaError: a file of metas is missing or malformed.
      InferenceError: two have one name, and so would their results.
    """
    names = [path.name for path in metas]
    for name in names:
        if names.count(name) > 1:
            raise InferenceError(f"two metas are called {name}: write their predictions to different folders")
        if name in (RUN_FILE, ERRORS_FILE):
            raise InferenceError(f"{name} has another meaning among predictions; rename the metas")

    def of(path: Path) -> ImageSet:
        items = read_metas(path)
        return ImageSet(path.name, items, lambda index: root / items[index].image)

    return [of(path) for path in metas]


def sets_of_records(datasets: Sequence[Dataset], records: Path) -> list[ImageSet]:
    """Sets whose images are TFDS records that `deqa prepare` made.

    Raises:
      MetaError: there are none of a dataset.
      InferenceError: the extra that reads them is not installed.
    """
    try:
        from deqa_jax.data.tfds_builders import read_records
    except ModuleNotFoundError as error:
        raise InferenceError(f"{error}; records need an extra: pip install 'deqa-jax[tfds]'") from error
    return [ImageSet(dataset.test, *read_records(records, dataset.name, "test")) for dataset in datasets]


def metas_of(datasets: Sequence[Dataset], root: Path) -> list[Path]:
    """Where published datasets have their test metas."""
    return [root / dataset.folder / "metas" / dataset.test for dataset in datasets]


def infer(scorer: Scorer, sets: Sequence[ImageSet], out: Path) -> int:
    """Predicts what has no prediction yet, each written as soon as it is known.

    A line has the published fields (id, image, gt_score if known, the levels' logits, their probabilities in the whole
    vocabulary) and score and std. A file that becomes complete is put in the order of its metas.

    Args:
      scorer: the model.
      sets: what to predict.
      out: folder of the results, made if it is not there.

    Returns:
      How many images could not be read; they are listed in `errors.jsonl` and tried again by the next run.

    Raises:
      InferenceError: the folder has predictions of another model or other metas, or another process writes to it.
    """
    with _alone_in(out):
        _check_run(scorer, sets, out)
        finished = {image_set.name: _finished(out / image_set.name, image_set) for image_set in sets}
        errors = _Errors(out / ERRORS_FILE, retried=set(finished))
        total = sum(len(image_set.items) for image_set in sets)
        with tqdm(
            total=total,
            initial=sum(len(there.ids) for there in finished.values()),
            unit="image",
            file=sys.stderr,
            disable=None,
        ) as progress:
            for image_set in sets:
                progress.set_description(image_set.name)
                _infer_set(scorer, image_set, out / image_set.name, finished[image_set.name], errors, progress)
        return errors.count


class _Finished(NamedTuple):
    """Predictions that a file has: their ids, and the length of their lines, after which a torn one may follow."""

    ids: set[str]
    length: int


def _infer_set(
    scorer: Scorer, image_set: ImageSet, path: Path, finished: _Finished, errors: "_Errors", progress: "tqdm[Any]"
) -> None:
    todo = [index for index, item in enumerate(image_set.items) if item.id not in finished.ids]
    failed = 0
    with path.open("a", encoding="utf-8") as file:
        file.truncate(finished.length)
        results = scorer.stream((image_set.load(index) for index in todo), open_set=True)
        for index, result in zip(todo, results, strict=True):
            item = image_set.items[index]
            if result.error is not None:
                errors.add(image_set.name, item, result.error)
                failed += 1
            else:
                file.write(_line(item, result))
                file.flush()
            progress.update()
    # Also where this run had nothing to do: the one before may have ended between its last line and this.
    if not failed:
        _put_in_order(path, image_set.items)
    _logger.info(
        "%s: %d of %d images predicted, %d of them now", path, len(image_set.items) - failed, len(image_set.items),
        len(todo) - failed,
    )  # fmt: skip


def _line(item: Item, result: Result) -> str:
    assert result.logits is not None  # as there is no error
    assert result.open_probs is not None  # as it was asked for
    fields: dict[str, Any] = {"id": item.id, "image": item.image}
    if item.gt_score is not None:
        fields["gt_score"] = item.gt_score
    fields["logits"] = dict(zip(LEVELS, result.logits, strict=True))
    fields["probs"] = dict(zip(LEVELS, result.open_probs, strict=True))
    fields |= {"score": result.score, "std": result.std}
    return json.dumps(fields) + "\n"


@contextlib.contextmanager
def _alone_in(out: Path) -> Iterator[None]:
    """Keeps other processes out of a folder; the system lets go of it when this process ends, however it ends."""
    out.mkdir(parents=True, exist_ok=True)
    folder = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InferenceError(
                f"{out}: another process is writing predictions there; wait for it, or choose another folder with --out"
            ) from error
        yield
    finally:
        os.close(folder)


def _check_run(scorer: Scorer, sets: Sequence[ImageSet], out: Path) -> None:
    """Notes what makes the predictions, or sees that it is what made those that are there."""
    path = out / RUN_FILE
    run = {"model": scorer.identity, "prompt": scorer.prompt, "dtype": scorer.dtype, "batch_size": scorer.batch_size}
    if not path.exists():
        known = [image_set.name for image_set in sets if (out / image_set.name).exists()]
        if known:
            raise InferenceError(f"{out / known[0]}: no {RUN_FILE} says what made it; choose another folder with --out")
        write_text(path, json.dumps(run, indent=2) + "\n")
        return
    try:
        before = read_json(path)
    except ConfigError as error:
        raise InferenceError(f"{error}; choose another folder with --out") from error
    if different := [name for name in run if before.get(name) != run[name]]:
        shown = ", ".join(f"{name} {before.get(name)} (now {run[name]})" for name in different)
        raise InferenceError(
            f"{out}: its predictions were made with {shown}, and would not compare; "
            "give the same options, or choose another folder with --out"
        )


def _finished(path: Path, image_set: ImageSet) -> _Finished:
    """What a file has; it is not changed, as other files may yet be refused."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return _Finished(set(), 0)
    length = content.rfind(b"\n") + 1
    ids: set[str] = set()
    known = {item.id for item in image_set.items}
    number = 0
    for number, line in enumerate(content[:length].splitlines(), 1):
        try:
            id = json.loads(line)["id"]
            foreign, twice = id not in known, id in ids
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise InferenceError(f"{path}:{number}: not a prediction; remove the line, or the file") from error
        if foreign:
            raise InferenceError(f"{path}:{number}: {id!r} is not in these metas; choose another folder with --out")
        if twice:
            raise InferenceError(f"{path}:{number}: {id!r} is there twice; remove the line, or the file")
        ids.add(id)
    torn = content[length:]
    # Only what can be the beginning of a prediction is cut off: the file may be someone's metas.
    if torn[: len(_OPENING)] != _OPENING[: len(torn)]:
        raise InferenceError(f"{path}:{number + 1}: not a prediction; remove the line, or the file")
    return _Finished(ids, length)


def _put_in_order(path: Path, items: Sequence[Item]) -> None:
    """Sorts predictions as their metas are: the published evaluation compares line by line."""
    place = {item.id: index for index, item in enumerate(items)}
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    ordered = sorted(lines, key=lambda line: place[json.loads(line)["id"]])
    if ordered != lines:
        write_text(path, "".join(ordered))


class _Errors:
    """The list of images that could not be read, over all sets of a folder."""

    def __init__(self, path: Path, *, retried: set[str]):
        """Opens the list, and takes out what this run tries again."""
        self.count = 0
        self._path = path
        kept = []
        if path.exists():
            for line in path.read_bytes().splitlines():
                with contextlib.suppress(ValueError, TypeError, KeyError):
                    if json.loads(line)["metas"] not in retried:
                        kept.append(line.decode() + "\n")
        self._replace("".join(kept))

    def _replace(self, text: str) -> None:
        if text:
            write_text(self._path, text)
        else:
            self._path.unlink(missing_ok=True)

    def add(self, metas: str, item: Item, error: str) -> None:
        """Lists an image."""
        self.count += 1
        line = json.dumps({"metas": metas, "id": item.id, "image": item.image, "error": error})
        with self._path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
