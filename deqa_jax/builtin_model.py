"""The model that comes with the package, `deqa-tiny`: where it lies, and whether it is whole.

Its folder is a checkpoint in the published format like any other, with a model card (`README.md`) and the hashes of its
files besides.
"""

import functools
import logging
from pathlib import Path

from deqa_jax.checkpoint import CheckpointError
from deqa_jax.distributed import is_first
from deqa_jax.files import sha256

NAME = "deqa-tiny"
FOLDER = Path(__file__).parent / "assets" / NAME
HASHES_FILE = "SHA256SUMS"
"""As `sha256sum` writes and checks it."""

_logger = logging.getLogger(__name__)


def whole_folder() -> Path:
    """The folder of this model.

    Raises:
      CheckpointError: a file of the model is missing or damaged.
    """
    if problems := damaged_files(FOLDER):
        raise CheckpointError(
            f"{FOLDER}: {', '.join(problems)} missing or damaged; install the package again: "
            "pip install --force-reinstall deqa-jax"
        )
    return FOLDER


def folder_of(model: str) -> Path | str:
    """The folder of this model if it is the one that is named; what else is named comes back as it is.

    A folder of that name in the working directory goes first, which is said.

    Raises:
      CheckpointError: a file of the model is missing or damaged.
    """
    if model != NAME:
        return model
    if Path(model).exists():
        _logger.warning("%s is the folder of that name in this one, not the model that comes with the package", NAME)
        return model
    return whole_folder()


@functools.cache
def announce() -> None:
    """Says once that this model is used because none was named."""
    if is_first():
        # A warning, so that those see it who have not set up any logging.
        _logger.warning(
            "no model named: using %s, a small one trained on synthetic pictures. "
            "The published one is zhiyuanyou/DeQA-Score-Mix3",
            NAME,
        )


def damaged_files(model: Path) -> list[str]:
    """Files that are not what the folder's list of hashes says; the list itself, if there is none."""
    try:
        lines = (model / HASHES_FILE).read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        lines = []
    expected = [line.split(maxsplit=1) for line in lines if line.strip()]
    if not expected or any(len(entry) != 2 for entry in expected):
        return [HASHES_FILE]
    return [name for digest, name in expected if not _has_hash(model / name, digest)]


def _has_hash(path: Path, digest: str) -> bool:
    try:
        return sha256(path) == digest
    except OSError:
        return False
