"""Files that are whole or not there, and JSON read with errors that name the file."""

import collections
import contextlib
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from deqa_jax.config import ConfigError


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises `ConfigError` or `OSError` naming the file."""
    value = read_json_value(path)
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: not a JSON object")
    return value


def read_json_value(path: Path) -> Any:
    """Any JSON value from a file, without names that are there twice. Raises `ConfigError` or `OSError` naming it."""
    repeated: list[str] = []

    def once(entries: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(entries)
        if len(value) < len(entries):
            times = collections.Counter(name for name, _ in entries)
            repeated.extend(name for name in value if times[name] > 1)
        return value

    try:
        value = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=once)
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such file") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not JSON ({error})") from error
    if repeated:
        raise ConfigError(first_of([f"{path}: {name!r} is there twice" for name in repeated]))
    return value


def sha256(path: Path) -> str:
    """The hash of a file's content, in hexadecimal digits. Raises `OSError` if it cannot be read."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def first_of(problems: Sequence[str], shown: int = 10) -> str:
    """Problems a line each, the first few of many.

    >>> print(first_of(["a.json: no id", "a.json: no image", "b.json: empty"], shown=2))
    a.json: no id
    a.json: no image
    … and 1 more
    """
    more = [f"… and {len(problems) - shown} more"] if len(problems) > shown else []
    return "\n".join([*problems[:shown], *more])


def refuse_existing(out: Path) -> None:
    """Raises `FileExistsError` if `out` is there: called before long work whose result could not be kept."""
    if os.path.lexists(out):
        raise FileExistsError(f"{out} exists already; remove it or choose another name")


def _temporary(out: Path) -> Path:
    """Where to make what will be `out`: beside it, so that a rename is all that is left to do.

    Threads share a process number, and containers on common storage often do, so it would not tell two writers apart.
    """
    return out.parent / f".{out.name}.{uuid.uuid4().hex}.tmp"


def write_text(path: Path, text: str) -> None:
    """Puts `text` in a file, replacing it; whoever reads the file, or finds it after a crash, finds all or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    try:
        # What is no text in any encoding (file names may not be) is written with escapes, which JSON understands too.
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def new_text(out: Path) -> Iterator[TextIO]:
    """A text file to fill under a temporary name, which becomes `out` when the block ends well and vanishes if not.

    Raises:
      FileExistsError: `out` is there already, or was made meanwhile.
    """
    refuse_existing(out)
    temporary = _temporary(out)
    try:
        with temporary.open("w", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
            yield file
        refuse_existing(out)
        os.replace(temporary, out)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to fill under a temporary name, which becomes `out` when the block ends well and vanishes if not.

    Raises:
      FileExistsError: `out` is there already.
    """
    refuse_existing(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(out)
    temporary.mkdir()
    try:
        yield temporary
        try:
            os.rename(temporary, out)
        except OSError as error:
            if out.exists():
                raise FileExistsError(f"{out} exists already; it was made meanwhile") from error
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
