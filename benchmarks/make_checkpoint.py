"""Writes a checkpoint of random float16 weights in the published format, tensor by tensor, in any preset's size.

    python benchmarks/make_checkpoint.py mid OUT
    python benchmarks/make_checkpoint.py full OUT     # 16.4 GB

Its tokenizer is the small one of `deqa init`; scores mean nothing.
"""

import argparse
import functools
import zlib
from pathlib import Path

import numpy as np

from deqa_jax.config import PRESETS, DeqaConfig, to_published
from deqa_jax.convert.hf import write_published
from deqa_jax.convert.names import rules_for
from deqa_jax.convert.progress import progress_bar
from deqa_jax.convert.tensors import Tensor
from deqa_jax.files import new_folder
from deqa_jax.parameters import parameter_shapes
from deqa_jax.random_model import random_side_files

_SHARD_BYTES = 2 << 30


def random_tensors(config: DeqaConfig) -> dict[str, Tensor]:
    """Every published tensor of a model, made when it is read; norms are ones, biases zeros."""
    shapes = parameter_shapes(config)
    tensors = {}
    for path, rule in rules_for(shapes).items():
        shape = rule.published_shape(shapes[path])
        for key in rule.keys(shapes[path]):
            read = functools.partial(_random_tensor, key, shape)
            tensors[key] = Tensor(shape, np.dtype(np.float16), read)
    return tensors


def _random_tensor(key: str, shape: tuple[int, ...]) -> np.ndarray:
    if len(shape) == 1:
        return np.full(shape, float(key.endswith("weight")), np.float16)
    fan_in = int(np.prod(shape[1:]))
    random = np.random.default_rng(zlib.crc32(key.encode()))
    # Uniform of variance 1 / fan_in: as good as normal here, and several times as fast to draw.
    bound = (3 / fan_in) ** 0.5
    return (random.random(shape, dtype=np.float32) * (2 * bound) - bound).astype(np.float16)


def main() -> None:
    """Runs the script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", choices=PRESETS)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    config = PRESETS[options.size]
    tensors = random_tensors(config)
    total = sum(tensor.num_bytes for tensor in tensors.values())
    with new_folder(options.out) as folder, progress_bar("write", total) as progress:
        write_published(
            folder,
            tensors.items(),
            config=to_published(config) | {"torch_dtype": "float16"},
            shard_bytes=_SHARD_BYTES,
            progress=progress,
        )
        for name, content in random_side_files().items():
            (folder / name).write_bytes(content)


if __name__ == "__main__":
    main()
