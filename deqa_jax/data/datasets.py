"""The eight published datasets: names, folders, files, and the numbers to reproduce (SPEC 8 and 9)."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path


class UnknownDatasetError(ValueError):
    """A name that is none of the eight; the message lists them."""


@dataclasses.dataclass(frozen=True)
class Dataset:
    """One dataset as published beside DeQA-Score.

    Attributes:
      name: what the paper calls it.
      folder: below the data folder; has `images/` and `metas/`.
      train: file name of the training metas, for the three that are trained on.
      test: file name of the test metas.
      paper: PLCC and SRCC of the full model (paper).
      lora: PLCC and SRCC of the LoRA model (model card).
    """

    name: str
    folder: str
    train: str | None
    test: str
    paper: tuple[float, float]
    lora: tuple[float, float]

    def metas(self, root: Path, split: str) -> Path | None:
        """Where the metas of `train` or `test` are; None if this dataset has none for training."""
        name = {"train": self.train, "test": self.test}[split]
        return None if name is None else root / self.folder / "metas" / name


_ALL = (
    Dataset("koniq", "KONIQ", "train_koniq_7k.json", "test_koniq_2k.json", (0.957, 0.944), (0.956, 0.944)),
    Dataset("spaq", "SPAQ", "train_spaq_9k.json", "test_spaq_2k.json", (0.938, 0.934), (0.939, 0.935)),
    Dataset("kadid", "KADID10K", "train_kadid_8k.json", "test_kadid_2k.json", (0.955, 0.953), (0.953, 0.951)),
    Dataset("pipal", "PIPAL", None, "test_pipal_5k.json", (0.495, 0.496), (0.481, 0.481)),
    Dataset("livew", "LIVE-WILD", None, "test_livew_1k.json", (0.900, 0.887), (0.903, 0.890)),
    Dataset("agiqa", "AGIQA3K", None, "test_agiqa_3k.json", (0.808, 0.745), (0.806, 0.754)),
    Dataset("tid2013", "TID2013", None, "test_tid2013_3k.json", (0.852, 0.820), (0.851, 0.821)),
    Dataset("csiq", "CSIQ", None, "test_csiq_866.json", (0.900, 0.857), (0.900, 0.860)),
)
DATASETS: dict[str, Dataset] = {dataset.name: dataset for dataset in _ALL}


def named(names: str) -> list[Dataset]:
    """The datasets of a comma-separated list.

    Raises:
      UnknownDatasetError: a name is none of them.

    >>> [dataset.folder for dataset in named("koniq,spaq")]
    ['KONIQ', 'SPAQ']
    """
    unknown = [name for name in names.split(",") if name not in DATASETS]
    if unknown:
        raise UnknownDatasetError(f"no dataset {', '.join(map(repr, unknown))}; there are {', '.join(DATASETS)}")
    return [DATASETS[name] for name in dict.fromkeys(names.split(","))]


def of_metas(file_names: Sequence[str]) -> Dataset | None:
    """The dataset whose test metas have one of these file names."""
    return next((dataset for dataset in _ALL if dataset.test in file_names), None)
