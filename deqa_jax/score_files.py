"""`deqa score`: which files to score, and how the rows are written."""

import csv
import glob
import json
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Protocol, TextIO

import jax
from tqdm import tqdm

from deqa_jax import distributed
from deqa_jax.files import refuse_existing
from deqa_jax.preprocess import NoImagesError, images_below
from deqa_jax.prompt import LEVELS
from deqa_jax.scorer import Result, Scorer


class UsageError(ValueError):
    """A command that asks for something that cannot be done; the message says what to do instead."""


def check_new_files(*, output: Path | None, report: Path | None) -> None:
    """Sees that what is to be written can be, before long work whose result could not be kept.

    Raises:
      FileExistsError: one of the files is there already.
      UsageError: there is no folder for one of them, or both are the same.
    """
    files = [file for file in (output, report) if file is not None]
    for file in files:
        refuse_existing(file)
        if not file.absolute().parent.is_dir():
            raise UsageError(f"{file}: no such folder to write in; make it first")
    if len({file.resolve() for file in files}) < len(files):
        raise UsageError(f"{report}: rows and report go to files of their own; name another one for --report")


def find_images(patterns: Iterable[str], stdin: TextIO) -> list[str]:
    """The image files that the command line names.

    Args:
      patterns: files, folders (searched recursively), globs, or `-` for one path per line of `stdin`.
      stdin: where `-` reads.

    Raises:
      UsageError: a folder or glob has no images, or nothing is named at all.
    """
    paths: list[str] = []
    for pattern in patterns:
        if not pattern:
            raise UsageError("an empty path; is a variable of the shell not set?")
        if pattern == "-":
            paths += [line for line in (raw.rstrip("\r\n") for raw in stdin) if line]
        elif Path(pattern).is_dir():
            try:
                paths += sorted(map(str, images_below(Path(pattern))))
            except NoImagesError as error:
                raise UsageError(str(error)) from error
        elif glob.has_magic(pattern) and not Path(pattern).exists():
            matches = sorted(path for path in glob.glob(pattern, recursive=True) if Path(path).is_file())
            if not matches:
                raise UsageError(f"{pattern}: matches no file")
            paths += matches
        else:
            paths.append(pattern)
    if not paths:
        raise UsageError("no images named: give files, folders, globs, or - and a list on standard input")
    return paths


class RowWriter(Protocol):
    """Writes results as rows of text."""

    def header(self) -> str:
        """What comes before the first row, newline included."""

    def row(self, path: str, result: Result) -> str:
        """One row, newline included."""


def _digits(value: float) -> float:
    """As few digits as tell float32 values apart."""
    return float(f"{value:.9g}")


class JsonlRows:
    """One JSON object a line; fields without a value are null."""

    def header(self) -> str:
        """Nothing."""
        return ""

    def row(self, path: str, result: Result) -> str:
        """The object: path, score, std, probs (excellent to bad), error."""
        fields = {
            "path": path,
            "score": None if result.score is None else _digits(result.score),
            "std": None if result.std is None else _digits(result.std),
            "probs": None if result.probs is None else [_digits(p) for p in result.probs],
            "error": result.error,
        }
        return json.dumps(fields, ensure_ascii=False) + "\n"


class _Line:
    """Keeps what csv writes."""

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> int:
        self.text = text
        return len(text)


class CsvRows:
    """Comma-separated values with a header and one column per level."""

    def __init__(self) -> None:
        self._line = _Line()
        # With this line end csv quotes fields that hold either of its characters.
        self._writer = csv.writer(self._line, lineterminator="\r\n")

    def header(self) -> str:
        """The names of the columns."""
        return self._csv(["path", "score", "std", *LEVELS, "error"])

    def row(self, path: str, result: Result) -> str:
        """One record; the fields of an image that could not be read are empty."""
        numbers = (result.score, result.std, *(result.probs or (None,) * len(LEVELS)))
        return self._csv([path, *("" if x is None else _digits(x) for x in numbers), result.error or ""])

    def _csv(self, fields: list[object]) -> str:
        self._writer.writerow(fields)
        return self._line.text.removesuffix("\r\n") + "\n"


class TableRows:
    """Aligned columns for people, the path last."""

    def header(self) -> str:
        """The names of the columns."""
        return f"{'score':>6} {'std':>6} " + " ".join(f"{level:>9}" for level in LEVELS) + "  path\n"

    def row(self, path: str, result: Result) -> str:
        """Numbers to three digits, or why there are none."""
        shown = path.replace("\n", "\\n")
        if result.score is None or result.std is None or result.probs is None:
            reason = (result.error or "").removeprefix(f"{path}: ").replace("\n", " ")
            return f"{'-':>6} {'-':>6} " + " ".join(f"{'-':>9}" for _ in LEVELS) + f"  {shown}: {reason}\n"
        probs = " ".join(f"{p:9.3f}" for p in result.probs)
        return f"{result.score:6.3f} {result.std:6.3f} {probs}  {shown}\n"


_ROWS: dict[str, type[RowWriter]] = {"table": TableRows, "jsonl": JsonlRows, "csv": CsvRows}


def score_files(
    scorer: Scorer,
    paths: list[str],
    output: TextIO,
    *,
    format: str,
    also: Callable[[str, Result], None] | None = None,
) -> int:
    """Scores files and writes a row each, in order, as soon as its batch is done.

    Args:
      scorer: what scores them.
      paths: the files.
      output: where the rows go.
      format: `table`, `jsonl` or `csv`.
      also: is given every path with its result, when its row is written.

    Returns:
      How many could not be read.
    """
    rows = _ROWS[format]()
    output.write(rows.header())
    return _write_rows(scorer, paths, output, rows, also)


def score_together(scorer: Scorer, paths: list[str], output: Path, *, format: str) -> int:
    """Scores files as one of several processes: each writes the rows of its share, the first puts them together.

    Returns:
      How many could not be read, by any process.

    Raises:
      UsageError: the processes were given different files.
      DistributedError: they do not share the output's folder.
      FileExistsError: the output was made meanwhile.
    """
    rows = _ROWS[format]()
    process, processes = jax.process_index(), jax.process_count()
    if not distributed.agree("\0".join(paths).encode(errors="surrogateescape")):
        raise UsageError("the processes were given different files; give all of them the same, not a list to share")
    distributed.check_shared(output.parent)
    parts = [output.with_name(f".{output.name}.part-{part}") for part in range(processes)]
    bounds = [len(paths) * part // processes for part in range(processes + 1)]
    with parts[process].open("w", encoding="utf-8", errors="backslashreplace") as part:
        failed = _write_rows(scorer, paths[bounds[process] : bounds[process + 1]], part, rows)
    failed = distributed.total(failed)
    if distributed.is_first():
        with output.open("xb") as whole:
            whole.write(rows.header().encode())
            for path in parts:
                with path.open("rb") as part_of_it:
                    shutil.copyfileobj(part_of_it, whole)
        for path in parts:
            path.unlink()
    return failed


def _write_rows(
    scorer: Scorer,
    paths: list[str],
    output: TextIO,
    rows: RowWriter,
    also: Callable[[str, Result], None] | None = None,
) -> int:
    failed = 0
    for path, result in zip(paths, _with_progress(scorer.stream(paths), len(paths), output), strict=True):
        output.write(rows.row(path, result))
        output.flush()
        if also is not None:
            also(path, result)
        failed += result.error is not None
    return failed


def _with_progress(results: Iterator[Result], total: int, output: TextIO) -> Iterator[Result]:
    """A bar on stderr if that is a terminal, unless the rows themselves appear there; of one process's share."""
    disable = True if output.isatty() or not distributed.is_first() else None
    return iter(tqdm(results, total=total, unit="image", file=sys.stderr, disable=disable))
