"""The training stream: metas and images to batches of one static shape, by Grain (SPEC 4 and 5)."""

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import grain
import numpy as np
from jaxtyping import UInt8

from deqa_jax.data.augmentation import augmented, stored_again
from deqa_jax.data.metas import Item, MetaError, read_metas
from deqa_jax.data.pairs import locate, partner
from deqa_jax.files import first_of
from deqa_jax.preprocess import ImageLike, PreprocessConfig, load_rgb, load_square
from deqa_jax.prompt import IGNORED_LABEL, IMAGE_ID, PromptError, Tokenizer, encode_conversation

LEVEL_PREFIX = "The quality of the image is"
"""What an answer says in front of its level word."""

_PADDING_ID = 0


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What is trained on.

    Attributes:
      metas: files of metas or, with `records`, names of published datasets.
      root: folder that image names start from.
      weights: how often each of them is seen in an epoch; once without it.
      records: folder of TFDS records, in place of `root`.
      pairs: train on pairs of images of one dataset; else on single ones.
      system: conversation style, a key of `prompt.SYSTEM_SENTENCES`.
      max_length: token ids of a conversation beyond are cut off.
      augment: show each image as if stored once more, turned, mirrored and moved a little at random, another way every
        time; the published runs did not. For models from nothing and for small datasets, which are else soon known by
        heart.
    """

    metas: tuple[str, ...] = ()
    root: str = ""
    weights: tuple[int, ...] = ()
    records: str = ""
    pairs: bool = True
    system: str = "v1"
    max_length: int = 2048
    augment: bool = False


class Text(NamedTuple):
    """One item's conversation as the model reads it.

    Attributes:
      before: ids in front of the image.
      after: ids behind it.
      labels: of those; `IGNORED_LABEL` where nothing is predicted.
      level_position: where in `after` the level word stands; 0 for descriptions.
    """

    before: tuple[int, ...]
    after: np.ndarray
    labels: np.ndarray
    level_position: int


@dataclasses.dataclass(frozen=True)
class TrainingSet:
    """Items of one file of metas, and what `load_square` is to read for an index into them."""

    name: str
    items: Sequence[Item]
    load: Callable[[int], ImageLike]


class TrainingData:
    """The stream of examples; the one at a position is a function of the position and the seed alone.

    Attributes:
      before: ids in front of every image.
      length: of `after` and `labels` in every batch.
      epoch: examples in one epoch.
    """

    def __init__(
        self,
        sets: Sequence[TrainingSet],
        config: DataConfig,
        tokenizer: Tokenizer,
        preprocess: PreprocessConfig,
        *,
        needed: Sequence[str] = (),
        seed: int = 0,
    ):
        """Reads all texts; images are read when they are needed.

        Args:
          sets: what to train on.
          config: how.
          tokenizer: the model's.
          preprocess: the model's.
          needed: fields of `Item` without which an item of the rating task cannot be trained on.
          seed: of shuffling and pairing.

        Raises:
          MetaError: items lack what is needed, or their texts do not fit; the first ones are named.
        """
        self._sets, self._config, self._preprocess, self._seed = sets, config, preprocess, seed
        self._weights = config.weights or (1,) * len(sets)
        if len(self._weights) != len(sets) or min(self._weights) < 1:
            raise MetaError(f"data: {len(sets)} sets need as many weights, each at least 1, not {list(self._weights)}")
        self._texts = _read_texts(sets, config, tokenizer, needed)
        self.before = self._texts[0][0].before
        self.length = max(len(text.after) for texts in self._texts for text in texts)
        self.epoch = sum(len(x.items) * weight for x, weight in zip(sets, self._weights, strict=True))

    @functools.cached_property
    def identity(self) -> str:
        """A short name of what examples are made of, but for the pictures' bytes."""
        sets = [[item.fields() for item in one.items] for one in self._sets]
        return hashlib.sha256(json.dumps(sets, sort_keys=True).encode()).hexdigest()[:16]

    def batches(
        self, size: int, *, process: int = 0, processes: int = 1, threads: int | None = None
    ) -> grain.DatasetIterator[dict[str, np.ndarray]]:
        """This process's rows of every batch, without end; each epoch is shuffled anew.

        Together the processes see every position once; a global batch holds the same examples for any number of them.
        The iterator's `get_state` and `set_state` go on at any batch.

        Args:
          size: of the global batch.
          process: which process this is.
          processes: how many there are; divides `size`.
          threads: that read images; as many as there are cores without it.
        """
        # Grain adds the epoch to the seed: seeds next to each other would shuffle alike.
        seed = int(np.random.SeedSequence(self._seed).generate_state(1)[0])
        stream = grain.MapDataset.range(self.epoch).shuffle(seed=seed).repeat()
        stream = stream.map_with_index(lambda position, index: self.example(int(position), int(index)))
        # There is no remainder; but rounding up, Grain takes its endless length beyond what fits for batches of one.
        stream = stream.batch(size // processes, drop_remainder=True)[process::processes]
        options = grain.ReadOptions(num_threads=threads or os.cpu_count() or 1, prefetch_buffer_size=4)
        return iter(stream.to_iter_dataset(options))

    def example(self, position: int, index: int) -> dict[str, np.ndarray]:
        """Arrays of one example (`train.objective.Batch` without its first axis).

        Args:
          position: in the stream, which decides on the partner.
          index: into an epoch.
        """
        sizes = [len(x.items) for x in self._sets]
        dataset, item = locate(index, sizes, self._weights)
        chosen = [item]
        if self._config.pairs:
            chosen.append(partner(item, sizes[dataset], seed=self._seed, position=position))
        rng = np.random.default_rng([self._seed, position]) if self._config.augment else None
        sides = [self._side(dataset, one, rng) for one in chosen]
        arrays = {name: np.stack([side[name] for side in sides]) for name in sides[0]}
        arrays["is_score"] = np.asarray(is_score(self._sets[dataset].items[item]))
        return arrays

    def _square(self, image: ImageLike, rng: np.random.Generator | None) -> UInt8[np.ndarray, "H H 3"]:
        """An image as the model reads it; augmented, if there is something that decides how."""
        if rng is None:
            return load_square(image, self._preprocess)
        return augmented(rng, load_square(stored_again(rng, load_rgb(image)), self._preprocess))

    def _side(self, dataset: int, index: int, rng: np.random.Generator | None) -> dict[str, np.ndarray]:
        item, text = self._sets[dataset].items[index], self._texts[dataset][index]
        padding = (0, self.length - len(text.after))
        return {
            "images": self._square(self._sets[dataset].load(index), rng),
            "after": np.pad(text.after, padding, constant_values=_PADDING_ID),
            "labels": np.pad(text.labels, padding, constant_values=IGNORED_LABEL),
            "level_position": np.asarray(text.level_position, np.int32),
            "level_probs": np.asarray(item.level_probs or (0.0,) * 5, np.float32),
            "gt_score": np.asarray(item.gt_score or 0.0, np.float32),
            "gt_std": np.asarray(item.std or 0.0, np.float32),
        }


def is_score(item: Item) -> bool:
    """Whether an item is of the rating task, and not a description."""
    return item.task_type != "description"


def open_sets(config: DataConfig) -> list[TrainingSet]:
    """The sets that a configuration names.

    Raises:
      MetaError: metas or images are missing or malformed; all missing images of a file are counted.
    """
    if not config.metas:
        raise MetaError("data.metas names nothing to train on")
    if config.records:
        from deqa_jax.data.tfds_builders import read_records

        return [TrainingSet(name, *read_records(Path(config.records), name, "train")) for name in config.metas]
    return [_open_files(Path(name), Path(config.root)) for name in config.metas]


def _open_files(path: Path, root: Path) -> TrainingSet:
    items = read_metas(path)
    missing = [item.image for item in items if not (root / item.image).is_file()]
    if missing:
        raise MetaError(first_of([f"{path}: there is no image {root / image}" for image in missing]))
    return TrainingSet(str(path), items, lambda index: root / items[index].image)


# ---- texts ------------------------------------------------------------------------------------------------


def _read_texts(
    sets: Sequence[TrainingSet], config: DataConfig, tokenizer: Tokenizer, needed: Sequence[str]
) -> list[list[Text]]:
    encode = _Encoder(tokenizer, config)
    texts: list[list[Text]] = []
    problems: list[str] = []
    for one in sets:
        found: list[Text] = []
        for item in one.items:
            known = {name: getattr(item, name) for name in needed} if is_score(item) else {}
            missing = [name for name, value in known.items() if value is None]
            text = encode(item)
            if missing:
                problems.append(f"{one.name}: {item.id}: has no {', '.join(missing)}")
            elif negative := [name for name in known if name != "gt_score" and np.min(known[name]) < 0]:
                problems.append(f"{one.name}: {item.id}: {', '.join(negative)} below 0, as where nothing is known")
            elif isinstance(text, str):
                problems.append(f"{one.name}: {item.id}: {text}")
            else:
                found.append(text)
        texts.append(found)
        if config.pairs and (len(one.items) < 2 or len({is_score(item) for item in one.items}) > 1):
            problems.append(f"{one.name}: pairs need two items or more, all of one task_type")
    if not problems and len({text.before for found in texts for text in found}) > 1:
        problems.append("conversations differ in the text before the image")
    if problems:
        raise MetaError(first_of(problems))
    return texts


class _Encoder:
    """Conversations to `Text`, each distinct one once: datasets of tens of thousands have fifty."""

    def __init__(self, tokenizer: Tokenizer, config: DataConfig):
        self._tokenizer, self._config = tokenizer, config
        self._prefix = tokenizer.encode(LEVEL_PREFIX)[1:]
        self._levels = set(tokenizer.level_ids())
        self._known: dict[Any, Text | str] = {}

    def __call__(self, item: Item) -> Text | str:
        """The text, or what is wrong with it."""
        if item.conversations is None:
            return "has no conversations; make training metas with `deqa labels`"
        key = is_score(item), *(turn["value"] for turn in item.conversations)
        if key not in self._known:
            self._known[key] = self._encode(item.conversations, rating=is_score(item))
        return self._known[key]

    def _encode(self, conversation: Sequence[Mapping[str, str]], *, rating: bool) -> Text | str:
        try:
            encoded = encode_conversation(
                self._tokenizer, conversation, style=self._config.system, max_length=self._config.max_length
            )
        except PromptError as error:
            return str(error)
        if encoded.input_ids.count(IMAGE_ID) != 1:
            return "its conversation does not have exactly one image"
        where = encoded.input_ids.index(IMAGE_ID)
        after, labels = encoded.input_ids[where + 1 :], encoded.labels[where + 1 :]
        position = _after_prefix(labels, self._prefix)
        if rating and (position is None or labels[position] not in self._levels):
            return f"its answer does not say {LEVEL_PREFIX!r} and then a level"
        ids, targets = np.array(after, np.int32), np.array(labels, np.int32)
        return Text(tuple(encoded.input_ids[:where]), ids, targets, position or 0)


def _after_prefix(labels: Sequence[int], prefix: Sequence[int]) -> int | None:
    """The place behind the first occurrence of a prefix, if there is one and something behind it."""
    for start in range(len(labels) - len(prefix)):
        if list(labels[start : start + len(prefix)]) == list(prefix):
            return start + len(prefix)
    return None
