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
from typing import Any

import jax
from tqdm import tqdm

from deqa_jax import distributed
from deqa_jax.config import ConfigError
from deqa_jax.data.datasets import Dataset
from deqa_jax.data.metas import Item, read_metas
from deqa_jax.files import read_json, write_text
from deqa_jax.preprocess import ImageLike
from deqa_jax.prompt import LEVELS
from deqa_jax.scorer import Result, Scorer

ERRORS_FILE = "errors.jsonl"
RUN_FILE = "run.json"
# Of a folder in it that one of several processes writes to.
_PART = ".part-"

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
    vocabulary) and score and std. In the end a file is put in the order of its metas. Of several processes each
    predicts its share into files of its own, and the first puts them together.

    Args:
      scorer: the model.
      sets: what to predict.
      out: folder of the results, made if it is not there.

    Returns:
      How many images could not be read; they are listed in `errors.jsonl` and tried again by the next run.

    Raises:
      InferenceError: the folder has predictions of another model or other metas, or another run writes to it.
      DistributedError: the processes do not share the folder.
    """
    process, processes = jax.process_index(), jax.process_count()
    with _alone_in(out) if distributed.is_first() else contextlib.nullcontext():
        distributed.check_shared(out)
        with distributed.first_goes_first():
            if distributed.is_first():
                _check_run(scorer, sets, out)
                _collect(out, sets, retried={image_set.name for image_set in sets})
        part = out if processes == 1 else out / f"{_PART}{process}"
        part.mkdir(exist_ok=True)
        finished = {image_set.name: _finished(out / image_set.name, image_set) for image_set in sets}
        before = sum(map(len, finished.values()))
        errors = _Errors(part / ERRORS_FILE)
        with tqdm(
            total=sum(len(image_set.items) for image_set in sets) // processes,
            initial=before // processes,
            unit="image",
            file=sys.stderr,
            disable=None if distributed.is_first() else True,
        ) as progress:
            for image_set in sets:
                progress.set_description(image_set.name)
                # By the place in the metas: where storage shows processes different results, none is left out.
                share = range(process, len(image_set.items), processes)
                todo = [index for index in share if image_set.items[index].id not in finished[image_set.name]]
                _infer_set(scorer, image_set, todo, part / image_set.name, errors, progress)
        failed = distributed.total(errors.count)
        if distributed.is_first():
            there = _collect(out, sets, retried=set())
            missing = sum(len(image_set.items) for image_set in sets) - failed - sum(there.values())
            if missing:
                raise InferenceError(
                    f"{out}: {missing} predictions of other processes do not show here yet; give the same command again"
                )
            for image_set in sets:
                _logger.info(
                    "%s: %d of %d images predicted, %d of them now",
                    out / image_set.name, there[image_set.name], len(image_set.items),
                    there[image_set.name] - len(finished[image_set.name]),
                )  # fmt: skip
        return failed


def _infer_set(
    scorer: Scorer, image_set: ImageSet, todo: Sequence[int], path: Path, errors: "_Errors", progress: "tqdm[Any]"
) -> None:
    with path.open("a", encoding="utf-8") as file:
        results = scorer.stream((image_set.load(index) for index in todo), open_set=True)
        for index, result in zip(todo, results, strict=True):
            item = image_set.items[index]
            if result.error is not None:
                errors.add(image_set.name, item, result.error)
            else:
                file.write(_line(item, result))
                file.flush()
            progress.update()


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
    # Only where it is: what earlier versions have begun goes on.
    run |= {"int8_activations": True} if scorer.int8_activations else {}
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
    names = {**run, "int8_activations": None}
    if different := [name for name in names if before.get(name) != run.get(name)]:
        shown = ", ".join(f"{name} {before.get(name)} (now {run.get(name)})" for name in different)
        raise InferenceError(
            f"{out}: its predictions were made with {shown}, and would not compare; "
            "give the same options, or choose another folder with --out"
        )


def _finished(path: Path, image_set: ImageSet) -> set[str]:
    """Ids of the predictions that a file has; the file is not changed, as others may yet be refused."""
    ids: set[str] = set()
    number = 0
    known = {item.id: item.image for item in image_set.items}
    content = path.read_bytes() if path.exists() else b""
    lines = _whole_lines(content)
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
            id = entry["id"]
            foreign, twice, of_another = id not in known, id in ids, entry.get("image", known.get(id)) != known.get(id)
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise InferenceError(f"{path}:{number}: not a prediction; remove the line, or the file") from error
        if foreign:
            raise InferenceError(f"{path}:{number}: {id!r} is not in these metas; choose another folder with --out")
        if of_another:
            raise InferenceError(
                f"{path}:{number}: {id!r} was predicted of {entry['image']!r}, but is {known[id]!r} in these metas; "
                "choose another folder with --out"
            )
        if twice:
            raise InferenceError(f"{path}:{number}: {id!r} is there twice; remove the line, or the file")
        ids.add(id)
    torn = content[sum(map(len, lines)) :]
    # Only what can be the beginning of a prediction is cut off: the file may be someone's metas.
    if torn[: len(_OPENING)] != _OPENING[: len(torn)]:
        raise InferenceError(f"{path}:{number + 1}: not a prediction; remove the line, or the file")
    return ids


def _whole_lines(content: bytes) -> list[bytes]:
    """Lines without a last one that a killed process did not end."""
    return content[: content.rfind(b"\n") + 1].splitlines(keepends=True)


def _collect(out: Path, sets: Sequence[ImageSet], *, retried: set[str]) -> dict[str, int]:
    """Puts what processes have written, of this run or an earlier one, into the files of results.

    Predictions are put in the order of their metas: the published evaluation compares line by line.

    Args:
      out: folder of the results.
      sets: whose predictions.
      retried: names of sets whose errors are forgotten.

    Returns:
      How many predictions there are, by set.
    """
    folders = [out, *sorted(out.glob(f"{_PART}*"))]
    for image_set in sets:
        for folder in folders:
            _finished(folder / image_set.name, image_set)
    there = {}
    for image_set in sets:
        path, *parts = (folder / image_set.name for folder in folders)
        content = path.read_bytes() if path.exists() else None
        lines: dict[str, bytes] = {}
        for text in (content or b"", *(part.read_bytes() for part in parts if part.exists())):
            for line in _whole_lines(text):
                # One that is there twice was collected when the run before was killed.
                lines.setdefault(json.loads(line)["id"], line)
        ordered = b"".join(lines[item.id] for item in image_set.items if item.id in lines)
        if ordered != content:
            write_text(path, ordered.decode())
        for part in parts:
            part.unlink(missing_ok=True)
        there[image_set.name] = len(lines)
    _collect_errors([folder / ERRORS_FILE for folder in folders], retried)
    for folder in folders[1:]:
        # A part may have predictions of other sets.
        with contextlib.suppress(OSError):
            folder.rmdir()
    return there


def _collect_errors(files: Sequence[Path], retried: set[str]) -> None:
    kept: list[str] = []
    for path in files:
        for line in path.read_bytes().splitlines() if path.exists() else ():
            with contextlib.suppress(ValueError, TypeError, KeyError):
                if json.loads(line)["metas"] not in retried:
                    kept.append(line.decode() + "\n")
    if kept:
        write_text(files[0], "".join(kept))
    for path in files[bool(kept) :]:
        path.unlink(missing_ok=True)


class _Errors:
    """A list of images that could not be read, over all sets of a folder."""

    def __init__(self, path: Path):
        self.count = 0
        self._path = path

    def add(self, metas: str, item: Item, error: str) -> None:
        """Lists an image."""
        self.count += 1
        line = json.dumps({"metas": metas, "id": item.id, "image": item.image, "error": error})
        with self._path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
