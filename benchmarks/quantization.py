"""What quantised weights do to logits and scores: a table against the same model in float32, in Markdown.

    python benchmarks/quantization.py                           # deqa-tiny
    python benchmarks/make_checkpoint.py mid P
    python benchmarks/quantization.py --model P --images 8      # published widths

Pictures are those of `deqa synth`; SRCC is with the scores in float32, and with the simulated opinions, which only a
trained model agrees with. Random weights have no outliers, which cost a trained model more than anything.
"""

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from tabulate import tabulate

from deqa_jax import builtin_model
from deqa_jax.checkpoint import Checkpoint
from deqa_jax.compilation import use_compilation_cache
from deqa_jax.config import MeshConfig
from deqa_jax.convert.to_jax import convert, resolve
from deqa_jax.data.opinions import read_published
from deqa_jax.data.synthetic import SyntheticSettings, synthesize
from deqa_jax.metrics import srcc
from deqa_jax.quantize import SCHEMES
from deqa_jax.scorer import Scorer
from deqa_jax.scoring_program import Prediction, scoring_parameters
from deqa_jax.sharding import bytes_per_device, make_mesh

_VERSIONS = 10
# The scenes of deqa-tiny's model card, none of which it was trained on.
_SEED = 2026


class Way(NamedTuple):
    """How a model is stored and run."""

    quantization: str | None = None
    dtype: str = "float32"
    int8_activations: bool = False

    def __str__(self) -> str:
        products = "half of the products int8" if self.int8_activations else f"{self.dtype} products"
        return f"{self.quantization or self.dtype} kernels, {products}"


# The first is what the others are compared with.
WAYS = (Way(), Way(dtype="bfloat16"), Way("int8"), Way("int8", int8_activations=True), Way("int4"))


def make_pictures(folder: Path, count: int) -> tuple[list[Path], np.ndarray]:
    """Pictures and their opinions, in one order."""
    settings = SyntheticSettings(scenes=-(-count // _VERSIONS), versions=_VERSIONS, test_ratio=0.0, seed=_SEED)
    synthesize(folder, settings)
    opinions = read_published(folder / "metas" / "mos.json", folder / "metas" / "split.json")
    return [folder / "images" / name for name in opinions.names], opinions.mos


def measure(
    folders: dict[str | None, Path], pictures: list[Path], batch_size: int
) -> Iterator[tuple[Way, int, Prediction]]:
    """What the model says in every way, and the bytes that its parameters take on a device."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    for way in WAYS:
        checkpoint = Checkpoint.open(folders[way.quantization])
        scorer = Scorer(checkpoint, dtype=way.dtype, batch_size=batch_size, int8_activations=way.int8_activations)
        parameters = scoring_parameters(checkpoint.config, way.dtype, mesh, way.quantization)
        yield way, bytes_per_device(parameters), scorer.predict(pictures)
        # Before the next one is loaded: the name alone would keep it.
        del scorer


def table(measured: Iterator[tuple[Way, int, Prediction]], opinions: np.ndarray) -> str:
    """A row a way."""
    rows, exact = [], None
    for way, size, found in measured:
        exact = exact or found
        logits, scores = np.abs(found.logits - exact.logits), np.abs(found.score - exact.score)
        rows.append(
            [
                str(way),
                f"{size / 1e6:.1f}",
                *(f"{value:.4f}" for value in (logits.mean(), logits.max(), scores.mean(), scores.max())),
                *(f"{srcc(found.score, other):.4f}" for other in (exact.score, opinions)),
            ]
        )
    headers = ["", "MB", "logits, mean", "max", "score, mean", "max", "SRCC with float32", "with opinions"]
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def main() -> None:
    """Runs the script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default=builtin_model.NAME, help="published or converted folder (default: deqa-tiny)"
    )
    parser.add_argument("--images", type=int, default=500, help="pictures, in tens (default: 500)")
    parser.add_argument("--batch-size", type=int, help="images at once, over all devices")
    options = parser.parse_args()
    use_compilation_cache()
    with tempfile.TemporaryDirectory() as temporary:
        pictures, opinions = make_pictures(Path(temporary) / "pictures", options.images)
        whole = resolve(options.model)
        folders: dict[str | None, Path] = {None: whole}
        for scheme in SCHEMES:
            folders[scheme] = Path(temporary) / scheme
            convert(str(whole), folders[scheme], quantization=scheme)
        measured = measure(folders, pictures[: options.images], options.batch_size)
        print(table(measured, opinions[: options.images]))


if __name__ == "__main__":
    main()
