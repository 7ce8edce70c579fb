"""The eight datasets as TFDS records (extra `tfds`): made once from the published folders, read without TensorFlow.

A record has the image file as it is, so that the scorer and training read the same pixels from it as from the folder.
TFDS keeps numbers in float32; the metas travel beside the records as they are, in the same order.
"""

import contextlib
import functools
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import array_record.python.array_record_module  # noqa: F401  # TFDS imports it late; its absence is to be said early
import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core.dataset_builder import ShardBasedBuilder

from deqa_jax.data.datasets import DATASETS, Dataset
from deqa_jax.data.metas import Item, MetaError, parse_item, read_metas
from deqa_jax.files import first_of

UNKNOWN = -10000.0
"""Stands in a record for a number that the metas do not have, as it does in published training."""

# TFDS has a shard in memory while it writes it.
_SHARD_BYTES = 256 << 20


# Not a GeneratorBasedBuilder: that one needs TensorFlow for more than a gigabyte.
class Deqa(ShardBasedBuilder):
    """One configuration per dataset, named as the paper does; splits `test` and, for three of them, `train`.

    Args:
      root: the folder with the datasets' folders; needed to prepare records, not to read them.
      **options: those of TFDS, `config` and `data_dir` above all.
    """

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=name) for name in DATASETS]  # noqa: RUF012

    def __init__(self, *, root: str | Path | None = None, **options: Any):
        self._root = None if root is None else Path(root)
        super().__init__(**options)

    @property
    def dataset(self) -> Dataset:
        """Which of the eight this is."""
        return DATASETS[self.builder_config.name]

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "id": tfds.features.Text(),
            "image": tfds.features.Image(doc="the file as published; scores need it decoded by `load_square`"),
            "mos": tfds.features.Scalar(np.float32, doc="mean opinion score in the dataset's own units"),
            "std": tfds.features.Scalar(np.float32, doc="its standard deviation, or -10000"),
            "level_probs": tfds.features.Tensor(shape=(5,), dtype=np.float32, doc="excellent to bad, or -10000"),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description=f"{self.dataset.name} with the opinion scores and soft labels published beside DeQA-Score.",
            features=tfds.features.FeaturesDict(features),
            homepage="https://arxiv.org/abs/2501.11561",
            metadata=tfds.core.MetadataDict(),
            disable_shuffling=True,  # the order of the metas is the order of the records
        )

    def _shard_iterators_per_split(self, dl_manager: Any) -> Mapping[str, Sequence[Callable[[], Any]]]:
        if self._root is None:
            raise MetaError("to prepare records, say where the datasets are: Deqa(root=…)")
        shards = {}
        for split in ("train", "test"):
            path = self.dataset.metas(self._root, split)
            # A folder may hold the images and metas of the test split only.
            if path is not None and (split == "test" or path.exists()):
                items = read_metas(path)
                files = [self._root / item.image for item in items]
                missing = [f"{file}: no such file" for file in files if not file.is_file()]
                if missing:
                    raise MetaError(first_of(missing))
                self.info.metadata[split] = [item.fields() for item in items]
                shards[split] = [functools.partial(self._examples, items, part) for part in _shards(files)]
        return shards

    def _examples(self, items: Sequence[Item], indices: range) -> Iterator[tuple[int, dict[str, Any]]]:
        assert self._root is not None  # seen to before
        for index in indices:
            item = items[index]
            example = {
                "id": item.id,
                "image": (self._root / item.image).read_bytes(),
                "mos": UNKNOWN if item.gt_score is None else item.gt_score,
                "std": UNKNOWN if item.std is None else item.std,
                "level_probs": (UNKNOWN,) * 5 if item.level_probs is None else item.level_probs,
            }
            yield index, example


def _shards(files: Sequence[Path]) -> Iterator[range]:
    """Indices of the images of each shard."""
    first = size = 0
    for index, file in enumerate(files):
        size += file.stat().st_size
        if size >= _SHARD_BYTES:
            yield range(first, index + 1)
            first, size = index + 1, 0
    if first < len(files):
        yield range(first, len(files))


def prepare(name: str, root: Path, out: Path) -> Path:
    """Makes the records of one dataset; what is there already is kept.

    Args:
      name: one of `DATASETS`.
      root: the folder with the datasets' folders.
      out: the folder of records (TFDS's `data_dir`).

    Returns:
      Where the records are.

    Raises:
      MetaError: metas or images are missing or malformed.
    """
    # TFDS speaks on standard output, and wants a place for downloads even where there are none.
    with contextlib.redirect_stdout(sys.stderr), tempfile.TemporaryDirectory() as downloads:
        with _damage_named(out, name):
            builder = Deqa(config=name, data_dir=out, root=root)
        builder.download_and_prepare(download_dir=downloads, file_format="array_record")
    return Path(builder.data_dir)


@contextlib.contextmanager
def _damage_named(data_dir: Path, name: str) -> Iterator[None]:
    """Names the records whose reading fails."""
    try:
        yield
    # TFDS and ArrayRecord raise nearly anything on damaged files.
    except Exception as error:
        where = data_dir / Deqa.name / name
        raise MetaError(f"{where}: damaged ({error}); remove it and prepare it again") from error


class Records(NamedTuple):
    """Metas, and the content of the image file for an index into them."""

    items: list[Item]
    load: Callable[[int], bytes]


def read_records(data_dir: Path, name: str, split: str) -> Records:
    """Opens what `prepare` made.

    Raises:
      MetaError: there are no records of this dataset or split, or they are damaged.
    """
    with _damage_named(data_dir, name):
        builder = Deqa(config=name, data_dir=data_dir)
        known = (builder.info.metadata or {}).get(split, [])
        items = [item for item in map(parse_item, known) if isinstance(item, Item)]
    if not Path(builder.data_dir).is_dir():
        raise MetaError(f"{data_dir}: has no records of {name}; `deqa prepare` makes them")
    if not known:
        raise MetaError(f"{builder.data_dir}: has no {split} records; remove it and prepare it again")
    with _damage_named(data_dir, name):
        source = builder.as_data_source(split=split, decoders={"image": tfds.decode.SkipDecoding()})
    if not len(source) == len(items) == len(known):
        raise MetaError(f"{builder.data_dir}: damaged; remove it and prepare it again")

    def load(index: int) -> bytes:
        with _damage_named(data_dir, name):
            record = source[index]
            id = record["id"].decode()
        if id != items[index].id:
            raise MetaError(
                f"{builder.data_dir}: record {index} is not of {items[index].id}; remove it and prepare it again"
            )
        return record["image"]

    return Records(items, load)
