"""What `deqa init` starts a model from, so that it learns in thousands of images what else takes millions.

Of a picture's quality most is said by how much of each spatial frequency there is in its calmest parts, its busiest and
those between: noise shows where nothing else is, blur and compression where most is; and much of the rest by its tones.
So at first the patch filters are cosines, sorted into bands, and small squares; the first MLP leaves how strongly each
answers, and how far squares go beyond some tones; and the abstractor's queries read the mean of each band over patches
that they choose by how much of one band these have, from the least to the most.
"""

import itertools
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from deqa_jax.config import AbstractorConfig, DeqaConfig, VisionConfig
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
# of colour; and of squares of two pixels, how much colour they have, and how far they go beyond each of the tones.
_CONSTANT, _GREY_BANDS, _MEANS, _COLOUR_BANDS = 0, range(1, 7), range(7, 10), range(10, 13)
_SATURATION, _TONES = 13, range(14, 20)
_AXES = np.array([[1, 1, 1], [1, -1, 0], [1, 1, -2]]) / np.sqrt([[3], [2], [6]])
# Half a dozen tones of the normalised picture, of 255 about 64, 38, 13 and 191, 217, 242. What lies beyond each counts
# so much, as there is less of it the further out it is.
_BEYOND = (-0.76, -1.14, -1.5, 1.07, 1.46, 1.82)
_COUNTS = (0.2, 0.4, 0.8, 0.2, 0.4, 0.8)
_SQUARE = 2
# How strongly filters of a group answer. Norms divide a patch by all of its answers: what it looks like must not hide
# how little there is in it.
_STRENGTH = np.ones(_TONES.stop)
_STRENGTH[_MEANS] = 0.3
_STRENGTH[_SATURATION:] = 0.1
# What the constant channels add to the root mean square of all. Norms divide by it where a patch has little else, so
# that it tells how much that is.
_LEVEL = 0.053
# An answer counts so much up to the knee, and beyond it: in photographs answers lie within three decades.
_KNEE, _BELOW, _ABOVE = 0.7, 9.0, 2.0
_SHARPNESS = 8.0
# How strongly the first and the last query prefer patches with the least and the most of a band.
_PREFERENCE = 16.0
# What each head chooses patches by.
_WATCHED = (*_GREY_BANDS, _MEANS[0], _COLOUR_BANDS[1])


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
    >>> shapes = {PATCH_POSITIONS: (785, 192), CLASS_TOKEN: (192,), QUERIES: (16, 192)}
    >>> drawn = {path: np.random.default_rng(0).normal(size=shape) for path, shape in shapes.items()}
    >>> first_weights(PRESETS["tiny"], 0, drawn)[PATCH_FILTERS].shape
    (768, 192)
    """
    rng = np.random.default_rng(seed)
    filters, groups, leaning = _filters(rng, config.vision)
    # What is drawn for positions would drown what calm patches answer.
    positions = 0.1 * drawn[PATCH_POSITIONS]
    positions[:, groups == _CONSTANT] = _constant(groups)
    knowledge = _knowledge(rng, config.abstractor, groups, leaning)
    return {
        PATCH_FILTERS: filters,
        PATCH_POSITIONS: positions,
        CLASS_TOKEN: 0.1 * drawn[CLASS_TOKEN],
        # Patches are looked at by themselves, until training finds a use for their surroundings.
        ATTENTION_OUT: np.zeros((len(groups), len(groups))),
        **_first_mlp(rng, config.vision, groups),
        QUERY: _choice(config, drawn[QUERIES]),
        KEY: knowledge,
        # Larger, so that what is read outweighs the query that reads it.
        VALUE: 4 * knowledge,
    }


def _constant(groups: Int[np.ndarray, "D"]) -> float:
    """What each of the constant channels is, so that all of them add their level."""
    return float(_LEVEL / np.mean(groups == _CONSTANT) ** 0.5)


class _Filters(NamedTuple):
    """Patch filters, the group of each, and the sign of how much more it varies down than across."""

    kernel: Float[np.ndarray, "PPC D"]
    groups: Int[np.ndarray, "D"]
    leaning: Int[np.ndarray, "D"]


def _filters(rng: np.random.Generator, config: VisionConfig) -> _Filters:
    """Cosines of a patch in bands, grey and coloured, its means, small squares of it, and nothing.

    Each is scaled to answer 1/f noise, which is what natural images are like, with the deviation of its group (Field,
    Relations between the statistics of natural images and the response properties of cortical cells, JOSA A 1987).
    """
    side, width = config.patch_size, config.hidden_size
    place = np.pi * (np.arange(side) + 0.5) / side
    waves = np.cos(np.arange(side)[:, None] * place)
    frequency = np.add.outer(np.arange(side), np.arange(side))
    steps = 2 * (side - 1) * (np.arange(len(_GREY_BANDS) + 1) / len(_GREY_BANDS)) ** 1.5
    # A channel in thirty-two is constant, and so is what is left where a patch has fewer frequencies than that.
    varying = width - max(1, width // 32) - len(_MEANS) - 2 * len(_TONES)
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
    chosen = [(group, axis, place) for group, axis, places in kinds for place in places]
    filters = [np.einsum("y,x,c->yxc", waves[row], waves[column], axis) for _, axis, (row, column) in chosen]
    names = [group for group, *_ in chosen]
    leaning = np.array([np.sign(row - column) for *_, (row, column) in chosen])
    # A grey square for each tone, and as many of the two colours in turn.
    coloured_squares = [(_SATURATION, axis) for axis in itertools.islice(itertools.cycle(_AXES[1:]), len(_TONES))]
    for group, axis in [*((tone, _AXES[0]) for tone in _TONES), *coloured_squares]:
        top, left = rng.integers(0, side - _SQUARE + 1, 2)
        square = np.zeros((side, side, 3))
        square[top : top + _SQUARE, left : left + _SQUARE] = axis
        filters.append(square)
        names.append(group)
    rest = width - len(filters)
    kernel = np.pad(np.stack(filters, axis=-1).reshape(-1, len(filters)), ((0, 0), (0, rest)))
    groups = np.pad(np.array(names), (0, rest), constant_values=_CONSTANT)
    answers = (_pink_patches(rng, side) @ kernel).std(axis=0)
    kernel = kernel * _STRENGTH[groups] / np.where(answers > 0, answers, 1)
    return _Filters(kernel, groups, np.pad(leaning, (0, width - len(leaning))))


def _band(
    rng: np.random.Generator, frequency: Int[np.ndarray, "P P"], low: float, high: float, count: int
) -> list[tuple[int, int]]:
    """Some frequencies `(row, column)`, in cosines' half periods a patch, whose sum lies within a band.

    With each comes its transpose, so that they lean down as much as across.
    """
    places = rng.permutation(np.argwhere(frequency > low)).tolist()
    inside = [(row, column) for row, column in places if row >= column and row + column <= high]
    return list(dict.fromkeys(turned for row, column in inside for turned in ((row, column), (column, row))))[:count]


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


def _first_mlp(
    rng: np.random.Generator, config: VisionConfig, groups: Int[np.ndarray, "D"]
) -> dict[ParamPath, np.ndarray]:
    """In place of what varies in a patch, how much that is, compressed; of squares, how far beyond each tone.

    Means and what is constant are left alone. quick_gelu(sx) / s is about max(x, 0), of which all is made, as far as
    there are so many units.
    """
    width, hidden = config.hidden_size, config.mlp_dim
    up = rng.normal(0, width**-0.5, (width, hidden))
    bias, down = np.zeros(hidden), np.zeros((hidden, width))
    units = iter(range(hidden))
    constant = groups == _CONSTANT
    level = _constant(groups) * np.count_nonzero(constant)

    def add(channel: int, sign: int, output: int, gain: float, *, beyond: float = 0, tone: float = 0) -> None:
        if (unit := next(units, None)) is None:
            return
        up[:, unit] = 0
        up[channel, unit] = sign * _SHARPNESS
        # A norm has divided all channels by the same: beside the constant ones a tone is what it was.
        up[constant, unit] = -_SHARPNESS * tone * _STRENGTH[groups[channel]] / level
        bias[unit] = -_SHARPNESS * beyond
        down[unit, output] = gain / _SHARPNESS

    # The residual stream adds x itself, which is taken away.
    for channel in np.flatnonzero(np.isin(groups, (*_GREY_BANDS, *_COLOUR_BANDS))).tolist():
        for sign in (1, -1):
            add(channel, sign, channel, _BELOW - sign)
            add(channel, sign, channel, _ABOVE - _BELOW, beyond=_KNEE)
    for channel in np.flatnonzero(groups == _SATURATION).tolist():
        add(channel, -1, channel, 2)
    squares = np.flatnonzero(np.isin(groups, _TONES)).tolist()
    for channel in squares:
        for sign in (1, -1):
            add(channel, sign, channel, -sign)
        for output, tone, count in zip(squares, _BEYOND, _COUNTS, strict=True):
            add(channel, 1 if tone > 0 else -1, output, count / len(squares), tone=abs(tone))
    return {UP: up, UP_BIAS: bias, DOWN: down}


def _knowledge(
    rng: np.random.Generator, config: AbstractorConfig, groups: Int[np.ndarray, "D"], leaning: Int[np.ndarray, "D"]
) -> Float[np.ndarray, "D E"]:
    """What each head knows of a patch, as far as it has room for it.

    That is the mean of each group of channels; where it watches a band of grey, whether bands lean down or across, as
    motion makes them, and elsewhere the tones; and something at random for what room is left.
    """
    head_dim = config.head_dim

    def mean(chosen: np.ndarray) -> np.ndarray:
        return chosen / max(1, np.count_nonzero(chosen))

    groups_means = [mean(groups == group) / _STRENGTH[group] for group in range(_TONES.stop)]
    bands = [groups == band for band in _GREY_BANDS[2:5]]
    leans = [mean(band & (leaning > 0)) - mean(band & (leaning < 0)) for band in bands]
    heads = []
    for head in range(config.num_heads):
        own = leans if _WATCHED[head % len(_WATCHED)] in _GREY_BANDS else groups_means[_TONES.start :]
        known = np.stack([*groups_means[: _TONES.start], *own], axis=1)[:, :head_dim]
        rest = rng.normal(0, len(groups) ** -0.5, (len(groups), head_dim - known.shape[1]))
        heads.append(np.concatenate([known, rest], axis=1))
    return np.concatenate(heads, axis=1)


def _choice(config: DeqaConfig, queries: Float[np.ndarray, "Q D"]) -> Float[np.ndarray, "D D"]:
    """What makes of each learned query its preference: each head for one group, from least to most over the queries."""
    abstractor = config.abstractor
    head_dim = abstractor.head_dim
    rank = np.linspace(-1, 1, abstractor.num_queries)
    wanted = np.zeros((abstractor.num_queries, abstractor.num_heads, head_dim))
    for head in range(abstractor.num_heads):
        wanted[:, head, _WATCHED[head % len(_WATCHED)]] = _PREFERENCE * np.sign(rank) * rank**2
    # Where everything is constant there is no picture: the borders of what is not square.
    wanted[..., _CONSTANT] = -1
    normed = (queries - queries.mean(axis=1, keepdims=True)) / queries.std(axis=1, keepdims=True)
    seen = normed + query_positions(abstractor)
    return np.linalg.pinv(seen) @ (head_dim**0.5 * wanted).reshape(len(queries), -1)
