"""The progress bar of conversions."""

import contextlib
from collections.abc import Callable, Iterator

from tqdm import tqdm


@contextlib.contextmanager
def progress_bar(description: str, total: int) -> Iterator[Callable[[int], object]]:
    """A bar in bytes, on stderr where that is a terminal; yields what to call with the bytes just done."""
    with tqdm(desc=description, total=total, unit="B", unit_scale=True, unit_divisor=1024, disable=None) as bar:
        yield bar.update
