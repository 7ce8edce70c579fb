"""What a model starts from: which answers its filters give, and what of them the abstractor is told."""

import numpy as np
import pytest

from deqa_jax import first_weights
from deqa_jax.checkpoint import Checkpoint
from deqa_jax.config import PRESETS
from deqa_jax.model.abstractor import query_positions
from deqa_jax.random_model import EMBEDDING, init

GREY = list(first_weights._GREY_BANDS)


def filters_of(config, seed=0):
    return first_weights._filters(np.random.default_rng(seed), config.vision)


def drawn(config, seed=0):
    rng = np.random.default_rng(seed)
    vision, abstractor = config.vision, config.abstractor
    shapes = {
        first_weights.PATCH_POSITIONS: (vision.num_tokens, vision.hidden_size),
        first_weights.CLASS_TOKEN: (vision.hidden_size,),
        first_weights.QUERIES: (abstractor.num_queries, abstractor.hidden_size),
    }
    return {path: rng.normal(0, 0.02, shape) for path, shape in shapes.items()}


@pytest.mark.parametrize("size", ["test", "tiny", "small"])
def test_every_channel_has_a_group_and_the_rest_is_constant(size):
    config = PRESETS[size]
    filters, groups, leaning = filters_of(config)
    assert filters.shape == (3 * config.vision.patch_size**2, config.vision.hidden_size)
    assert set(groups) == set(range(20))
    np.testing.assert_array_equal(groups == 0, ~filters.any(axis=0))
    # Only those that are there for it see the mean of a patch, or of a part of it.
    bands = np.isin(groups, [0, *GREY, *first_weights._COLOUR_BANDS])
    means = np.abs(filters.reshape(-1, 3, len(groups)).mean(axis=0)).max(axis=0)
    assert means[bands].max() < 1e-9
    assert means[~bands].min() > 1e-5
    # Of each band as many lean down as across, but for one.
    for band in GREY:
        assert abs(leaning[groups == band].sum()) <= 1
    assert not leaning[~bands].any()


@pytest.mark.parametrize("size", ["test", "tiny"])
@pytest.mark.parametrize("seed", [0, 3])
def test_bands_answer_blur_and_noise_the_more_the_finer_they_are(size, seed):
    config = PRESETS[size].vision
    filters, groups, _ = filters_of(PRESETS[size], seed)
    rng = np.random.default_rng(seed)
    sharp = first_weights._pink_patches(rng, config.patch_size)
    answers = (sharp @ filters).std(axis=0)
    # Scaled on one sample of such noise, tried on another.
    assert np.median((answers / first_weights._STRENGTH[groups])[groups > 0]) == pytest.approx(1, abs=0.25)
    grid = sharp.reshape(-1, config.patch_size, config.patch_size, 3)
    smooth = (grid + np.roll(grid, 1, 1) + np.roll(grid, 1, 2) + np.roll(grid, (1, 1), (1, 2))) / 4
    blurred = (smooth.reshape(sharp.shape) @ filters).std(axis=0)
    noisy = ((sharp + rng.normal(0, 0.6, sharp.shape)) @ filters).std(axis=0)
    kept = [np.mean(blurred[groups == band] / answers[groups == band]) for band in GREY]
    gained = [np.mean(noisy[groups == band] / answers[groups == band]) for band in GREY]
    assert kept[0] > 0.7 > 0.5 > kept[-1]
    assert gained[0] < 1.2 < gained[-1]


def first_mlp(groups, x):
    """What the first MLP makes of patches: a model of it in NumPy."""
    first = first_weights._first_mlp(np.random.default_rng(0), PRESETS["tiny"].vision, groups)
    hidden = x @ first[first_weights.UP] + first[first_weights.UP_BIAS]
    return x + (hidden / (1 + np.exp(-1.702 * hidden))) @ first[first_weights.DOWN]


def test_the_first_mlp_leaves_how_much_a_patch_varies():
    _, groups, _ = filters_of(PRESETS["tiny"])
    x = np.random.default_rng(1).normal(size=(400, len(groups))) * np.geomspace(0.05, 3, 400)[:, None]
    out = first_mlp(groups, x)
    alone = np.isin(groups, [0, *first_weights._MEANS])
    np.testing.assert_allclose(out[:, alone], x[:, alone], atol=1e-12)
    varying = np.isin(groups, [*GREY, *first_weights._COLOUR_BANDS])
    size = np.abs(x[:, varying])
    expected = np.where(size < 0.7, 9 * size, 6.3 + 2 * (size - 0.7))
    # Both ends of the activation are soft.
    np.testing.assert_allclose(out[:, varying], expected, atol=0.7)
    assert abs(np.corrcoef(out[:, varying].ravel(), x[:, varying].ravel())[0, 1]) < 0.05
    colours = groups == first_weights._SATURATION
    np.testing.assert_allclose(out[:, colours], np.abs(x[:, colours]), atol=0.05)


@pytest.mark.parametrize("divided_by", [0.1, 0.5])
@pytest.mark.parametrize("tone", [-1.6, -1.3, -0.9, 0.0, 0.9, 1.3, 2.0])
def test_squares_say_how_far_beyond_each_tone_they_are_whatever_a_norm_divides_by(tone, divided_by):
    _, groups, _ = filters_of(PRESETS["tiny"])
    x = np.zeros((1, len(groups)))
    x[:, groups == 0] = 0.053 / np.mean(groups == 0) ** 0.5
    x[:, np.isin(groups, first_weights._TONES)] = 0.1 * tone
    out = divided_by * first_mlp(groups, x / divided_by)
    tones = [out[0, groups == group].item() for group in first_weights._TONES]
    ends = [(-1, 0.76), (-1, 1.14), (-1, 1.5), (1, 1.07), (1, 1.46), (1, 1.82)]
    beyond = [max(0, sign * tone - end) for sign, end in ends]
    np.testing.assert_allclose(tones, 0.1 * np.array([0.2, 0.4, 0.8] * 2) * beyond, atol=0.02 * divided_by)


@pytest.mark.parametrize("size", ["test", "tiny"])
def test_queries_prefer_patches_from_the_least_to_the_most_of_a_band(size):
    config = PRESETS[size]
    given = drawn(config)
    first = first_weights.first_weights(config, 0, given)
    _, groups, _ = filters_of(config)
    heads = config.abstractor.num_heads
    queries = given[first_weights.QUERIES]
    normed = (queries - queries.mean(axis=1, keepdims=True)) / queries.std(axis=1, keepdims=True)
    query = ((normed + query_positions(config.abstractor)) @ first[first_weights.QUERY]).reshape(
        len(queries), heads, -1
    )
    for head in range(min(heads, len(GREY))):
        calm, busy = np.zeros(len(groups)), (groups == GREY[head]).astype(float)
        key, value = (
            (np.stack([calm, busy]) @ first[path]).reshape(2, heads, -1)[:, head]
            for path in (first_weights.KEY, first_weights.VALUE)
        )
        logits = query[:, head] @ key.T / key.shape[-1] ** 0.5
        preference = logits[:, 1] - logits[:, 0]
        rank = np.linspace(-1, 1, len(queries))
        if len(queries) <= queries.shape[1]:
            np.testing.assert_allclose(preference, 16 * np.sign(rank) * rank**2, rtol=1e-3, atol=1e-6)
        else:
            # More of them than their width can tell apart get it as nearly as it can.
            assert np.corrcoef(preference, np.sign(rank) * rank**2)[0, 1] > 0.8
        assert value[1, GREY[head]] - value[0, GREY[head]] == pytest.approx(4)


def test_a_border_is_no_patch_to_look_at():
    """Where all is constant, as beside a picture that is not square, every query looks less."""
    config = PRESETS["tiny"]
    first = first_weights.first_weights(config, 0, drawn(config))
    _, groups, _ = filters_of(config)
    border = (first[first_weights.PATCH_POSITIONS] * (groups == 0))[0]
    assert border.std() == pytest.approx(0.053, rel=0.05)
    key = ((border / border.std()) @ first[first_weights.KEY]).reshape(config.abstractor.num_heads, -1)
    assert key[0, 0] > 3
    np.testing.assert_allclose(key[0, 1:14], 0, atol=1e-9)


def test_heads_of_bands_know_how_these_lean_and_the_others_tones():
    config = PRESETS["tiny"]
    _, groups, leaning = filters_of(config)
    value = first_weights.first_weights(config, 0, drawn(config))[first_weights.VALUE] / 4
    heads = value.reshape(len(groups), config.abstractor.num_heads, -1)
    down = ((groups == GREY[3]) & (leaning > 0)).astype(float)
    across = ((groups == GREY[3]) & (leaning < 0)).astype(float)
    for head in range(len(GREY)):
        assert [round((patch @ heads[:, head])[15], 9) for patch in (down, across, down + across)] == [1, -1, 0]
    dark = (groups == first_weights._TONES[1]).astype(float)
    np.testing.assert_allclose(np.tensordot(dark, heads, 1)[6:, 14:20], [[0, 10, 0, 0, 0, 0]] * 2)


def test_they_are_in_the_checkpoint(tmp_path):
    init(tmp_path / "M", seed=7)
    stored = Checkpoint.open(tmp_path / "M").restore("float32")
    given = {path: stored[path] for path in first_weights.DRAWN}
    first = first_weights.first_weights(PRESETS["test"], 7, given)
    for path in set(first) - {first_weights.PATCH_POSITIONS, first_weights.CLASS_TOKEN}:
        block = stored[path][0] if "layers" in path else stored[path]
        np.testing.assert_allclose(block, first[path], rtol=1e-3, atol=1e-4)
    assert stored[EMBEDDING].std() == pytest.approx(1, abs=0.05)
