"""Kinds of values that options of the command line have: text to value, or an error that says what is wrong with it."""

import argparse
import math
from collections.abc import Callable, Sequence


def whole_number(least: int, most: int) -> Callable[[str], int]:
    """A parser of whole numbers in a range."""

    def parse(text: str) -> int:
        if not text.isdecimal() or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} to {most}")
        return int(text)

    return parse


seed = whole_number(0, (1 << 32) - 1)


def number(text: str) -> float:
    """Any finite number."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number")
    return value


def megapixels(text: str) -> float:
    """A number above 0."""
    if not (value := number(text)) > 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of megapixels above 0")
    return value


def share(text: str) -> float:
    """A number from 0 to 1."""
    if not 0 <= (value := number(text)) <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 1")
    return value


def column(text: str) -> tuple[str, str]:
    """What a column is for, and its name in the file."""
    what, equals, name = text.partition("=")
    if what not in ("image", "mos", "std", "split", "reference") or not equals or not name:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not image, mos, std, split or reference, an equals sign and the name in the file"
        )
    return what, name


def mesh(text: str) -> dict[str, int]:
    """Sizes of the axes of a mesh, by name."""
    axes = {}
    for entry in text.split(","):
        name, _, size = entry.strip().partition("=")
        if name not in ("data", "fsdp", "tensor") or name in axes or not size.isdecimal() or int(size) < 1:
            raise argparse.ArgumentTypeError(
                f"{text!r} does not give data, fsdp or tensor a size each, such as tensor=2 or fsdp=2,tensor=4"
            )
        axes[name] = int(size)
    # Devices that are not spoken of hold copies of the model.
    return {"data": -1, "fsdp": 1, "tensor": 1, **axes}


def whole_numbers(least: int, most: int) -> Callable[[str], list[int]]:
    """A parser of such numbers with commas between."""
    parse = whole_number(least, most)
    return lambda text: [parse(entry) for entry in text.split(",")]


def names(known: Sequence[str]) -> Callable[[str], list[str]]:
    """A parser of names with commas between, each one of those known."""

    def parse(text: str) -> list[str]:
        if unknown := [name for name in text.split(",") if name not in known]:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not one of {', '.join(known)}")
        return text.split(",")

    return parse
