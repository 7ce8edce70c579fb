"""Images per second: the model alone, on pixels that are on the device, and end to end from JPEG files.

    python benchmarks/speed.py --size small --batch-size 4

Weights are random, which changes no timing. The model-only figure is the median of several runs of one batch; end
to end, 64 JPEGs the size of photographs (1024x768) go through `Scorer.stream`.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from deqa_jax.checkpoint import Checkpoint
from deqa_jax.config import PRESETS
from deqa_jax.random_model import init
from deqa_jax.scorer import DTYPES, Scorer


def write_jpegs(folder: Path, count: int) -> list[Path]:
    """Files of the size and detail of photographs."""
    random = np.random.default_rng(0)
    paths = []
    for i in range(count):
        coarse = Image.fromarray(random.integers(0, 255, (96, 128, 3), np.uint8))
        paths.append(folder / f"{i}.jpg")
        coarse.resize((1024, 768), Image.Resampling.BICUBIC).save(paths[-1], quality=90)
    return paths


def measure(scorer: Scorer, size: int, repeats: int, jpegs: list[Path]) -> dict[str, float]:
    """Images per second of both kinds; the first run, which compiles, is not counted."""
    pixels = jax.device_put(np.zeros((scorer.batch_size, size, size, 3), np.uint8))
    jax.block_until_ready(scorer.predict_pixels(pixels).score)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(scorer.predict_pixels(pixels).score)
        times.append(time.perf_counter() - start)
    start = time.perf_counter()
    scored = sum(result.error is None for result in scorer.stream(jpegs))
    end_to_end = scored / (time.perf_counter() - start)
    model = scorer.batch_size / statistics.median(times)
    return {"model_images_per_s": model, "end_to_end_images_per_s": end_to_end, "ratio": end_to_end / model}


def main() -> None:
    """Runs the script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=PRESETS, default="small")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--dtype", choices=DTYPES, default="auto")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--images", type=int, default=64)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        init(Path(folder) / "model", size=options.size)
        checkpoint = Checkpoint.open(Path(folder) / "model")
        scorer = Scorer(checkpoint, dtype=options.dtype, batch_size=options.batch_size)
        jpegs = write_jpegs(Path(folder), options.images)
        found = measure(scorer, checkpoint.config.vision.image_size, options.repeats, jpegs)
    device = jax.devices()[0]
    about = {
        "size": options.size,
        "batch_size": options.batch_size,
        "dtype": scorer.dtype,
        "device": device.device_kind,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "jax": importlib.metadata.version("jax"),
    }
    print(json.dumps(about | {name: round(value, 3) for name, value in found.items()}))


if __name__ == "__main__":
    main()
