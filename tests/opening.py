"""Opens published checkpoints as `deqa convert` does: everything that is wrong in one error."""

from pathlib import Path

from deqa_jax.convert import hf, peft
from deqa_jax.convert.tensors import ConversionError


def open_published(folder: Path) -> hf.Published:
    problems: list[str] = []
    published = hf.open_published(folder, problems)
    if problems or published is None:
        raise ConversionError(problems)
    return published


def merge_adapter(folder: Path, base: hf.Published) -> hf.Published:
    problems: list[str] = []
    merged = peft.merge_adapter(folder, base, problems)
    if problems or merged is None:
        raise ConversionError(problems)
    return merged
