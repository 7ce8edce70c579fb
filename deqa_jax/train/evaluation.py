"""Scores of held-out images while a model trains, with the prompt and program of `deqa infer`."""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import scipy.special
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.stages import Compiled

from deqa_jax import metrics
from deqa_jax.checkpoint import Checkpoint
from deqa_jax.data.metas import Item, MetaError, read_metas
from deqa_jax.data.soft_labels import moments, soft_labels
from deqa_jax.distributed import wait_for_all
from deqa_jax.parameters import Leaves, unflatten
from deqa_jax.preprocess import load_square
from deqa_jax.scoring_program import Prediction, check_fit, programs
from deqa_jax.sharding import BATCH, feed, gather


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """One file of metas with opinions of every image."""

    name: str
    items: Sequence[Item]
    paths: Sequence[Path]


def open_held_out(metas: Sequence[str], root: str) -> list[HeldOut]:
    """Reads metas to evaluate on.

    Raises:
      MetaError: metas or images are missing, or have no gt_score, gt_score_norm and std_norm.
    """
    return [_open_one(Path(name), Path(root)) for name in metas]


def _open_one(path: Path, root: Path) -> HeldOut:
    items = read_metas(path)
    for item in items:
        if None in (item.gt_score, item.gt_score_norm, item.std_norm):
            raise MetaError(f"{path}: {item.id}: evaluation needs gt_score, gt_score_norm and std_norm")
        if not (root / item.image).is_file():
            raise MetaError(f"{path}: there is no image {root / item.image}")
    return HeldOut(path.stem, items, [root / item.image for item in items])


class Evaluator:
    """Scores sets with whatever parameters the model has by now."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        graphdef: nnx.GraphDef[object],
        sets: Sequence[HeldOut],
        *,
        dtype: str,
        batch_size: int,
        mesh: Mesh,
    ):
        self._preprocess = checkpoint.preprocess()
        ids, level_ids = check_fit(checkpoint, self._preprocess, "eval")
        self._prefill, self._run = programs(
            graphdef, ids, level_ids, self._preprocess, dtype, mesh.devices.flat[0].platform
        )
        self._sets, self._batch_size = sets, batch_size
        self._sharding, self._feed = NamedSharding(mesh, BATCH), feed(mesh)
        self._compiled: tuple[Compiled, Compiled] | None = None

    def __call__(self, params: Leaves) -> dict[str, float]:
        """SRCC and PLCC without a fit, JS, and the loss, each the mean over the sets.

        The loss is the KL of soft labels, made of the opinions, from the five levels' probabilities.
        """
        tree = unflatten(params)
        prefill, run = self._compiled = self._compiled or self._compile(tree)
        cache = prefill(tree)
        results = [self._evaluate(one, functools.partial(run, tree, cache)) for one in self._sets]
        return {name: float(np.mean([result[name] for result in results])) for name in results[0]}

    def _compile(self, tree: object) -> tuple[Compiled, Compiled]:
        """Both programs; none runs before all processes have it."""
        prefill = self._prefill.lower(tree).compile()
        wait_for_all()
        pixels = jax.ShapeDtypeStruct(
            (self._batch_size, self._preprocess.size, self._preprocess.size, 3), np.uint8, sharding=self._sharding
        )
        run = self._run.lower(tree, prefill(tree), pixels, open_set=False).compile()
        wait_for_all()
        return prefill, run

    def _evaluate(self, one: HeldOut, run: Callable[[jax.Array], Prediction]) -> dict[str, float]:
        logits = []
        for pixels in self._batches(one):
            batch = jax.make_array_from_process_local_data(
                self._sharding, pixels, (self._batch_size, *pixels.shape[1:])
            )
            logits.append(gather(run(batch).logits))
        probs = scipy.special.softmax(np.concatenate(logits)[: len(one.items)].astype(np.float64), axis=1)
        mean, std = moments(probs)
        truth, truth_mean, truth_std = (
            np.array([getattr(item, name) for item in one.items], np.float64)
            for name in ("gt_score", "gt_score_norm", "std_norm")
        )
        labels = soft_labels(truth_mean, truth_std, density="pdf", min_std=0.2, max_error=0.1).probs
        return {
            "loss": float(scipy.special.rel_entr(labels, probs).sum(axis=1).mean()),
            "srcc": metrics.srcc(mean, truth),
            "plcc": metrics.plcc(mean, truth),
            "js": float(metrics.js_divergence(truth_mean, truth_std, mean, std).mean()),
        }

    def _batches(self, one: HeldOut) -> Iterator[np.ndarray]:
        """Pixels of this process's rows of every batch; the last one is padded."""
        part, parts = self._feed
        rows, size = self._batch_size // parts, self._preprocess.size
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            # A batch at a time: all paths at once would put every image of the set into memory.
            for start in range(0, len(one.paths), self._batch_size):
                paths = one.paths[start : start + self._batch_size][part * rows : (part + 1) * rows]
                batch = np.zeros((rows, size, size, 3), np.uint8)
                for row, pixels in enumerate(pool.map(lambda path: load_square(path, self._preprocess), paths)):
                    batch[row] = pixels
                yield batch
