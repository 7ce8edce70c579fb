"""`deqa score --report`: one page with every picture, its levels and its score, and no other file.

The page is `gallery_page.html`, with the pictures' data put in where its comments say so. It grows on disk while scores
arrive, and thumbnails are made in threads beside the model, so that ten thousand pictures need no more memory than ten.
"""

import base64
import collections
import contextlib
import hashlib
import html
import importlib.resources
import io
import json
import math
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TextIO

from deqa_jax.files import new_text
from deqa_jax.preprocess import ImageError, load_rgb
from deqa_jax.scorer import Result

_SIDE = 160
_QUALITY = 80
# The model and its own decoding want the processors too.
_WORKERS = max(1, (os.cpu_count() or 1) // 2)
# Pictures that wait for their thumbnail, or for one in front of them; the next one waits for them in turn.
_AHEAD = 256
# Pictures in one block of JSON: a browser does not take a single text of any length.
_BLOCK = 500
_OPENING, _CLOSING = '<script type="application/json" class="pictures">[\n', "\n]</script>\n"

Add = Callable[[str, Result], None]
"""Puts the picture of a path into a page, with its result."""


@contextlib.contextmanager
def new_gallery(out: Path, model: str) -> Iterator[Add]:
    """A page to put pictures in; it becomes `out` when the block ends well and vanishes if not.

    Args:
      out: the file to make.
      model: who scores, as the page says it.

    Raises:
      FileExistsError: `out` is there already, or was made meanwhile.
    """
    before, after = _template(model)
    pool = ThreadPoolExecutor(_WORKERS, thread_name_prefix="thumbnail")
    try:
        with new_text(out) as page:
            pictures = _Pictures(page, pool)
            page.write(before)
            yield pictures.add
            pictures.finish()
            page.write(after)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _template(model: str) -> tuple[str, str]:
    """What stands in front of the pictures and behind them, with the policy and the model in their places.

    The page may run its own script and use its own style, known by their hashes, show images that are part of it, and
    nothing else.
    """
    page = importlib.resources.files("deqa_jax").joinpath("gallery_page.html").read_text(encoding="utf-8")
    script, style = (_hash_of(tag, page) for tag in ("script", "style"))
    policy = (
        f"default-src 'none'; script-src {script}; style-src {style}; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    page = page.replace("<!-- policy -->", f'<meta http-equiv="Content-Security-Policy" content="{policy}">')
    before, _, after = page.partition("<!-- pictures -->\n")
    return before.replace("<!-- model -->", html.escape(model)), after


def _hash_of(tag: str, page: str) -> str:
    (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


class _Pictures:
    """The blocks of data in the middle of a page; holds a bounded number of pictures whose thumbnails are not made."""

    def __init__(self, page: TextIO, pool: ThreadPoolExecutor):
        self._page = page
        self._pool = pool
        self._waiting: collections.deque[tuple[dict[str, Any], Future[str | None] | None]] = collections.deque()
        self._written = 0

    def add(self, path: str, result: Result) -> None:
        thumbnail = None if result.error else self._pool.submit(_thumbnail, path)
        self._waiting.append((_fields(path, result), thumbnail))
        while self._waiting and (len(self._waiting) > _AHEAD or _is_done(self._waiting[0][1])):
            self._write_next()

    def finish(self) -> None:
        while self._waiting:
            self._write_next()
        if self._written % _BLOCK:
            self._page.write(_CLOSING)

    def _write_next(self) -> None:
        fields, thumbnail = self._waiting.popleft()
        fields["thumbnail"] = None if thumbnail is None else thumbnail.result()
        self._page.write(",\n" if self._written % _BLOCK else _OPENING)
        self._page.write(_json(fields))
        self._written += 1
        if self._written % _BLOCK == 0:
            self._page.write(_CLOSING)


def _is_done(thumbnail: Future[str | None] | None) -> bool:
    return thumbnail is None or thumbnail.done()


def _fields(path: str, result: Result) -> dict[str, Any]:
    """What the page knows of a picture; the numbers are null where there is an error."""
    fields: dict[str, Any] = {"path": path, "score": None, "std": None, "probs": None}
    if result.score is None or result.std is None or result.probs is None:
        return fields | {"error": (result.error or "").removeprefix(f"{path}: ")}
    numbers = (result.score, result.std, *result.probs)
    if not all(math.isfinite(number) for number in numbers):
        # JSON has no word for these, and one of them would keep the whole page from being read.
        return fields | {"error": "the model's answer is not a number"}
    # As many digits as tell float32 scores apart.
    score, std, *probs = (round(number, 7) for number in numbers)
    return fields | {"score": score, "std": std, "probs": probs, "error": None}


def _json(fields: dict[str, Any]) -> str:
    """JSON that can stand between script tags, whatever a file is called.

    >>> _json({"path": "</script>"})
    '{"path": "\\\\u003c/script>"}'
    """
    # What is no text in any encoding is shown with escapes, as in the rows.
    shown = {
        key: value.encode(errors="backslashreplace").decode() if isinstance(value, str) else value
        for key, value in fields.items()
    }
    return json.dumps(shown, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")


def _thumbnail(path: str) -> str | None:
    """A small JPEG of what the model saw (without alpha, turned as it is stored), in base64.

    None if the file was removed or replaced since it was scored.
    """
    try:
        image = load_rgb(path, enough=2 * _SIDE)
    except ImageError:
        return None
    image.thumbnail((_SIDE, _SIDE), reducing_gap=2.0)
    content = io.BytesIO()
    image.save(content, format="JPEG", quality=_QUALITY)
    return base64.b64encode(content.getvalue()).decode()
