"""What a model starts from that is measured on pictures, so that training finds its way in minutes.

What the abstractor reads of pictures are means over patches, which differ far more between pictures in some directions
than in others: an optimizer whose steps are of one size sees little of the rest. Here all directions are made alike, as
in data-dependent initialisation (Krähenbühl, Doersch, Donahue & Darrell, ICLR 2016): values are standardised, and the
product behind them whitens.
"""

import concurrent.futures
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, UInt8
from tqdm import tqdm

from deqa_jax.config import DeqaConfig, Execution
from deqa_jax.first_weights import QUERIES
from deqa_jax.model.abstractor import AbstractorBlock, key_positions, query_positions
from deqa_jax.model.vision import VisionTower
from deqa_jax.parameters import ParamPath, unflatten
from deqa_jax.preprocess import PreprocessConfig, images_below, load_square, normalize

_BLOCK = ("abstractor", "layers")
VALUE, VALUE_BIAS, OUT = ((*_BLOCK, *name) for name in (("value", "kernel"), ("value", "bias"), ("out", "kernel")))
# Of so many pictures the variances of a few hundred channels are known to a few per cent.
_MOST_PICTURES = 2000
_BATCH = 16
# What is added to the variance of each direction, that of a channel being one: less is noise.
_LEAST_VARIANCE = 1e-3


def measured_weights(
    config: DeqaConfig, arrays: Mapping[ParamPath, Array], folder: Path, preprocess: PreprocessConfig
) -> dict[ParamPath, Float[np.ndarray, "..."]]:
    """The parameters of the first block of the abstractor that pictures decide on.

    Args:
      config: the model's.
      arrays: all parameters, as they are without pictures.
      folder: of pictures such as the model will be trained on, searched recursively; of more than 2000, as many evenly.
      preprocess: the checkpoint's.

    Returns:
      Arrays in float64 by path.

    Raises:
      NoImagesError: there are none.
      ImageError: one of them cannot be read.
    """
    found = images_below(folder)
    chosen = [found[i] for i in np.unique(np.linspace(0, len(found) - 1, _MOST_PICTURES).round().astype(int))]
    contexts = np.concatenate(list(_contexts(config, arrays, chosen, preprocess)))
    contexts = contexts.reshape(-1, contexts.shape[-1])
    mean = contexts.mean(axis=0, dtype=np.float64)
    # A channel that is the same in all pictures stays as it is.
    deviation = np.where((spread := contexts.std(axis=0, dtype=np.float64)) > 0, spread, 1)
    standard = (contexts - mean) / deviation
    variances, directions = np.linalg.eigh(standard.T @ standard / len(standard))
    value, bias = (np.asarray(arrays[path][0], np.float64) for path in (VALUE, VALUE_BIAS))
    return {
        # What attention weighs sums to one, so that what is taken from every value is taken from the context.
        VALUE: value / deviation,
        VALUE_BIAS: (bias - mean) / deviation,
        OUT: directions / np.sqrt(np.maximum(variances, 0) + _LEAST_VARIANCE),
    }


def _contexts(
    config: DeqaConfig, arrays: Mapping[ParamPath, Array], paths: Sequence[Path], preprocess: PreprocessConfig
) -> Iterator[Float[np.ndarray, "B Q D"]]:
    """What the queries of the first block read of each picture."""
    tower = nnx.graphdef(nnx.eval_shape(lambda: VisionTower(config.vision, execution=Execution(), rngs=nnx.Rngs(0))))
    reader = nnx.graphdef(
        nnx.eval_shape(lambda: AbstractorBlock(config.abstractor, execution=Execution(), rngs=nnx.Rngs(0)))
    )
    positions = query_positions(config.abstractor), key_positions(config.abstractor, config.vision.grid_size)

    @jax.jit
    def read(params: Mapping[ParamPath, Array], pixels: UInt8[Array, "B H W 3"]) -> Float[Array, "B Q D"]:
        vision_params, stacked = (
            unflatten({path[len(of) :]: array for path, array in params.items() if path[: len(of)] == of})
            for of in (("vision",), _BLOCK)
        )
        vision = nnx.merge(tower, vision_params)(normalize(pixels, preprocess))
        block = nnx.merge(reader, jax.tree.map(lambda blocks: blocks[0], stacked))
        queries = jnp.broadcast_to(params[QUERIES], (len(pixels), *params[QUERIES].shape))
        return block.context(block.query_norm(queries), vision, *(jnp.asarray(place)[None] for place in positions))

    # The language model, nearly all of a large one, takes no part.
    params = {path: jnp.asarray(array, jnp.float32) for path, array in arrays.items() if path[0] != "language"}
    progress = tqdm(total=len(paths), unit="picture", file=sys.stderr, disable=None)
    with progress, concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as decoders:
        for start in range(0, len(paths), _BATCH):
            batch = paths[start : start + _BATCH]
            squares = list(decoders.map(lambda path: load_square(path, preprocess), batch))
            # One shape, so that it is compiled once.
            padded = np.stack(squares + squares[:1] * (_BATCH - len(squares)))
            yield np.asarray(read(params, padded))[: len(batch)]
            progress.update(len(batch))
