"""Procedural scenes: any size, the same for the same seed, and with the statistics of photographs."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deqa_jax.data import scenes as scenes_module
from deqa_jax.data.scenes import scene, scene_size


@pytest.fixture(scope="module")
def scenes():
    return [scene(np.random.default_rng(seed), (256, 192)) for seed in range(8)]


def spectral_slope(pixels):
    """How the logarithm of the amplitude falls with that of the spatial frequency, the finest ones left out."""
    grey = pixels.mean(axis=-1)
    side = min(grey.shape)
    window = np.hanning(side)
    amplitude = np.abs(np.fft.fft2((grey[:side, :side] - grey.mean()) * np.outer(window, window)))
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(side), np.fft.fftfreq(side))) * side
    ring = np.rint(frequency).astype(int).ravel()
    radial = np.bincount(ring, amplitude.ravel()) / np.bincount(ring)
    known = np.arange(3, side // 8)
    return np.polyfit(np.log(known), np.log(radial[known]), 1)[0]


def kurtosis(values):
    return np.mean((values - values.mean()) ** 4) / values.var() ** 2


@settings(deadline=None, max_examples=25)
@given(width=st.integers(1, 40), height=st.integers(1, 40), seed=st.integers(0, 2**32 - 1))
def test_any_size_can_be_had(width, height, seed):
    pixels = scene(np.random.default_rng(seed), (width, height))
    assert (pixels.shape, pixels.dtype) == ((height, width, 3), np.uint8)


def test_the_same_seed_gives_the_same_picture_and_another_one_another(scenes):
    np.testing.assert_array_equal(scene(np.random.default_rng(0), (256, 192)), scenes[0])
    for i, one in enumerate(scenes):
        for other in scenes[:i]:
            assert np.abs(np.int32(one) - other).mean() > 10


def test_amplitudes_fall_with_spatial_frequency_as_in_photographs(scenes):
    assert spectral_slope(np.random.default_rng(0).normal(128, 30, (192, 256, 3))) == pytest.approx(0, abs=0.1)
    assert -1.6 < np.mean([spectral_slope(pixels) for pixels in scenes]) < -0.7


def test_derivatives_have_the_long_tails_of_edges(scenes):
    """Gaussian noise has a kurtosis of 3 whatever its spectrum; photographs have one from 5 on."""
    for pixels in scenes:
        assert kurtosis(np.diff(pixels.mean(axis=-1), axis=1)) > 5


def test_shapes_are_of_all_sizes_most_of_them_small(monkeypatch):
    radii = []
    for name in ("_blob", "_polygon"):
        honest = getattr(scenes_module, name)
        monkeypatch.setattr(
            scenes_module, name, lambda rng, radius, f=honest: (radii.append(radius), f(rng, radius))[1]
        )
    for seed in range(6):
        scene(np.random.default_rng(seed), (256, 192))
    smallest, median, largest = np.quantile(radii, (0, 0.5, 1))
    assert smallest >= 4
    assert median < 4 * smallest
    assert 20 * smallest < largest < 0.351 * 512


def test_scenes_are_exposed_and_have_contrast(scenes):
    for pixels in scenes:
        assert 30 < pixels.mean() < 225
        assert pixels.std() > 15
        # The darkest and the brightest of a scene's exposure, at most 0.08 and at least 0.85, after its tone curve.
        low, high = np.percentile(pixels, (1, 99.5))
        assert low < 90
        assert high > 140


def test_scenes_have_colour_in_different_measure(scenes):
    colourfulness = [np.ptp(np.int32(pixels), axis=-1).mean() for pixels in scenes]
    assert np.mean(colourfulness) > 10
    assert np.ptp(colourfulness) > 10


def test_a_scene_fills_its_picture(scenes):
    """No corner is left empty: every sixteenth of some scene has detail of its own."""
    detail = [np.add.reduceat(np.add.reduceat(np.abs(np.diff(np.int32(pixels).sum(-1), axis=1)), range(0, 192, 48), 0),
                              range(0, 255, 64), 1) for pixels in scenes]  # fmt: skip
    assert np.max(detail, axis=0).min() > 48 * 64


def calmest(pixels):
    """The deviation within the patch of 8 × 8 pixels that a tenth of all patches are calmer than."""
    height, width = (side // 8 * 8 for side in pixels.shape[:2])
    patches = pixels[:height, :width].mean(axis=-1).reshape(height // 8, 8, width // 8, 8)
    return np.quantile(patches.std(axis=(1, 3)), 0.1)


def test_some_scenes_have_detail_everywhere_and_most_have_calm_parts():
    """Gravel or grass is no noise: photographs of it have 16 to 20 here, most others less than 3."""
    calm = np.array([calmest(scene(np.random.default_rng(seed), (256, 192))) for seed in range(60)])
    assert 2 <= np.sum(calm > 8) <= 15
    assert np.median(calm) < 3


# ---- sizes ------------------------------------------------------------------------------------------------


def test_sizes_have_the_longer_side_in_the_range_and_usual_aspects():
    rng = np.random.default_rng(0)
    sizes = [scene_size(rng, (384, 640)) for _ in range(300)]
    longer = [max(size) for size in sizes]
    assert 384 <= min(longer) < 400
    assert 620 < max(longer) <= 640
    for size in sizes:
        assert min(abs(max(size) / min(size) - aspect) for aspect in (1, 4 / 3, 3 / 2, 16 / 9)) < 0.01
    upright = sum(height > width for width, height in sizes)
    assert 50 < upright < 130
    assert sum(width == height for width, height in sizes) > 20


def test_a_range_may_be_one_size():
    assert {max(scene_size(np.random.default_rng(seed), (10, 10))) for seed in range(20)} == {10}
