"""What `deqa init` starts a model from, so that it learns in thousands of images what else takes millions.

Of a picture's quality most is said by how much of each spatial frequency there is in its calmest parts, its busiest and
those between: noise shows where nothing else is, blur and compression where most is. So at first the patch filters are
cosines, sorted into bands; the first MLP leaves how strongly each answers; and the abstractor's queries read the mean
of each band over patches that they choose by how much of one band these have, from the least to the most.
"""

import itertools
from collections.abc import Mapping

import numpy as np
from jaxtyping import Float, Int

from deqa_jax.config import DeqaConfig, VisionConfig
from deqa_jax.model.abstractor import query_positions
from deqa_jax.parameters import ParamPath

PATCH_FILTERS = ("vision", "patch_embedding", "kernel")
PATCH_POSITIONS = ("vision", "position_embedding")
CLASS_TOKEN = ("vision", "class_token")
ATTENTION_OUT = ("vision", "layers", "out", "kernel")
UP, UP_BIAS, DOWN = (("vision", "layers", *name) for name in (("up", "kernel"), ("up", "bias"), ("down", "kernel")))
QUERIES = ("abstractor", "queries")
DRAWN = (PATCH_POSITIONS, CLASS_TOKEN, QUERIES)
"""What is made out of what was drawn for it."""
QUERY, KEY, VALUE = (("abstractor", "layers", name, "kernel") for name in ("query", "key", "value"))

# Groups of channels: those that are the same everywhere; bands of grey; grey and two colours of a patch's mean; bands
# of colour.
_CONSTANT, _GREY_BANDS, _MEANS, _COLOUR_BANDS = 0, range(1, 7), range(7, 10), range(10, 13)
_AXES = np.array([[1, 1, 1], [1, -1, 0], [1, 1, -2]]) / np.sqrt([[3], [2], [6]])
# What the constant channels add to the root mean square of all. Norms divide by it where a patch has little else, so
# that it tells how much that is.
_LEVEL = 0.053
# An answer counts so much up to the knee, and beyond it: in photographs answers lie within three decades.
_KNEE, _BELOW, _ABOVE = 0.4, 12.0, 2.0
_SHARPNESS = 10.0
# How strongly the first and the last query prefer patches with the least and the most of a band.
_PREFERENCE = 16.0


def first_weights(
    config: DeqaConfig, seed: int, drawn: Mapping[ParamPath, np.ndarray]
) -> dict[ParamPath, Float[np.ndarray, "..."]]:
    """The parameters that do not start at random; of those that are stacked, the first block's.

    Args:
      config: the model's.
      seed: decides on which frequencies there are filters for.
      drawn: the parameters `DRAWN` as they were drawn at random.

    Returns:
      Arrays in float64 by path.

    >>> from deqa_jax.config import PRESETS
    >>> shapes = {PATCH_POSITIONS: (785, 128), CLASS_TOKEN: (128,), QUERIES: (16, 128)}
    >>> drawn = {path: np.random.default_rng(0).normal(size=shape) for path, shape in shapes.items()}
    >>> first_weights(PRESETS["tiny"], 0, drawn)[PATCH_FILTERS].shape
    (768, 128)
    """
    rng = np.random.default_rng(seed)
    filters, groups = _filters(rng, config.vision)
    # What is drawn for positions would drown what calm patches answer.
    positions = 0.1 * drawn[PATCH_POSITIONS]
    positions[:, groups == _CONSTANT] = _LEVEL / np.mean(groups == _CONSTANT) ** 0.5
    means = _group_means(rng, groups, config.abstractor.hidden_size // config.abstractor.num_heads)
    shared = np.tile(means, (1, config.abstractor.num_heads))
    return {
        PATCH_FILTERS: filters,
        PATCH_POSITIONS: positions,
        CLASS_TOKEN: 0.1 * drawn[CLASS_TOKEN],
        # Patches are looked at by themselves, until training finds a use for their surroundings.
        ATTENTION_OUT: np.zeros((len(groups), len(groups))),
        **_magnitudes(rng, config.vision, groups),
        QUERY: _choice(config, drawn[QUERIES]),
        KEY: shared,
        # Larger, so that what is read outweighs the query that reads it.
        VALUE: 4 * shared,
    }


def _filters(rng: np.random.Generator, config: VisionConfig) -> tuple[Float[np.ndarray, "PPC D"], Int[np.ndarray, "D"]]:
    """Cosines of a patch in bands, grey and coloured, its means, and nothing; and the group of each.

    Each is scaled to answer 1/f noise, which is what natural images are like, with a deviation of one (Field, Relations
    between the statistics of natural images and the response properties of cortical cells, JOSA A 1987).
    """
    side, width = config.patch_size, config.hidden_size
    place = np.pi * (np.arange(side) + 0.5) / side
    waves = np.cos(np.arange(side)[:, None] * place)
    frequency = np.add.outer(np.arange(side), np.arange(side))
    steps = 2 * (side - 1) * (np.arange(len(_GREY_BANDS) + 1) / len(_GREY_BANDS)) ** 1.5
    # A channel in thirty-two is constant, and so is what is left where a patch has fewer frequencies than that.
    varying = width - max(1, width // 32) - len(_MEANS)
    kinds = [(group, axis, [(0, 0)]) for group, axis in zip(_MEANS, _AXES, strict=True)]
    for band, group in enumerate(_GREY_BANDS):
        count = varying * 3 // 4 // len(_GREY_BANDS)
        kinds.append((group, _AXES[0], _band(rng, frequency, steps[band], steps[band + 1], count)))
    coloured = list(itertools.product(enumerate(_COLOUR_BANDS), _AXES[1:]))
    count = (varying + len(_MEANS) - sum(len(places) for *_, places in kinds)) // len(coloured)
    kinds += [
        (group, axis, _band(rng, frequency, steps[2 * band], steps[2 * band + 2], count))
        for (band, group), axis in coloured
    ]
    filters = np.zeros((side, side, 3, width))
    groups = np.full(width, _CONSTANT)
    chosen = [(group, axis, place) for group, axis, places in kinds for place in places]
    for number, (group, axis, (row, column)) in enumerate(chosen):
        filters[..., number] = np.einsum("y,x,c->yxc", waves[row], waves[column], axis)
        groups[number] = group
    flat = filters.reshape(-1, width)
    answers = (_pink_patches(rng, side) @ flat).std(axis=0)
    return flat / np.where(answers > 0, answers, 1), groups


def _band(
    rng: np.random.Generator, frequency: Int[np.ndarray, "P P"], low: float, high: float, count: int
) -> list[tuple[int, int]]:
    """Some frequencies `(row, column)`, in cosines' half periods a patch, whose sum lies within a band."""
    inside = np.argwhere((frequency > low) & (frequency <= high))
    return [(int(row), int(column)) for row, column in rng.permutation(inside)[:count]]


def _pink_patches(rng: np.random.Generator, side: int, across: int = 16) -> Float[np.ndarray, "N PPC"]:
    """Patches of 1/f noise, as the model's normalised pixels are: mostly grey, with a deviation of one."""
    whole = side * across
    frequency = np.hypot(np.fft.fftfreq(whole)[:, None], np.fft.fftfreq(whole)) * whole
    frequency[0, 0] = 1
    white = np.fft.fft2(rng.normal(size=(4, whole, whole)), axes=(1, 2))
    grey, *colours = np.fft.ifft2(white / frequency, axes=(1, 2)).real
    field = np.stack([grey + colour / 5 for colour in colours], axis=-1)
    field /= field.std()
    return field.reshape(across, side, across, side, 3).swapaxes(1, 2).reshape(across**2, -1)


def _magnitudes(
    rng: np.random.Generator, config: VisionConfig, groups: Int[np.ndarray, "D"]
) -> dict[ParamPath, np.ndarray]:
    """The first MLP: in place of what varies in a patch, how much that is, compressed; the rest is left alone."""
    width, hidden = config.hidden_size, config.mlp_dim
    up = rng.normal(0, width**-0.5, (width, hidden))
    bias, down = np.zeros(hidden), np.zeros((hidden, width))
    varying = np.flatnonzero(np.isin(groups, (*_GREY_BANDS, *_COLOUR_BANDS)))
    # quick_gelu(sx) / s is about max(x, 0). Four of them make one answer's size, as far as there are so many.
    for number, channel in enumerate(varying[: hidden // 4]):
        units = 4 * number + np.arange(4)
        up[:, units] = 0
        up[channel, units] = _SHARPNESS * np.array([1, -1, 1, -1])
        bias[units[2:]] = -_SHARPNESS * _KNEE
        # The residual stream adds x itself, which is taken away.
        down[units, channel] = np.array([_BELOW - 1, _BELOW + 1, _ABOVE - _BELOW, _ABOVE - _BELOW]) / _SHARPNESS
    return {UP: up, UP_BIAS: bias, DOWN: down}


def _group_means(rng: np.random.Generator, groups: Int[np.ndarray, "D"], head_dim: int) -> Float[np.ndarray, "D E"]:
    """What a head knows of a patch: the mean of each group of channels, and something at random for what is left."""
    means = rng.normal(0, len(groups) ** -0.5, (len(groups), head_dim))
    for group in range(min(head_dim, _COLOUR_BANDS.stop)):
        means[:, group] = (groups == group) / max(1, np.count_nonzero(groups == group))
    return means


def _choice(config: DeqaConfig, queries: Float[np.ndarray, "Q D"]) -> Float[np.ndarray, "D D"]:
    """What makes of each learned query its preference: each head for one group, from least to most over the queries."""
    abstractor = config.abstractor
    head_dim = abstractor.hidden_size // abstractor.num_heads
    watched = (*_GREY_BANDS, _MEANS[0], _COLOUR_BANDS[1])
    rank = np.linspace(-1, 1, abstractor.num_queries)
    wanted = np.zeros((abstractor.num_queries, abstractor.num_heads, head_dim))
    for head in range(abstractor.num_heads):
        wanted[:, head, watched[head % len(watched)]] = _PREFERENCE * np.sign(rank) * rank**2
    # Where everything is constant there is no picture: the borders of what is not square.
    wanted[..., _CONSTANT] = -1
    normed = (queries - queries.mean(axis=1, keepdims=True)) / queries.std(axis=1, keepdims=True)
    seen = normed + query_positions(abstractor)
    return np.linalg.pinv(seen) @ (head_dim**0.5 * wanted).reshape(len(queries), -1)
