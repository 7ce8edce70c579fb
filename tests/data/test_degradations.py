"""Degradations: each worse the stronger it is, measured by what this code does not use, and harmless to its input."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from deqa_jax.data.degradations import (
    FAMILIES,
    VIEWED_SIDE,
    Degradation,
    UnknownFamilyError,
    degrade,
    named_families,
    severity,
)
from deqa_jax.data.scenes import scene

STRENGTHS = (0.0, 0.1, 0.2, 0.3, 0.45, 0.6, 0.75, 0.9, 1.0)
chains = st.lists(st.builds(Degradation, st.sampled_from(list(FAMILIES)), st.floats(0, 1)), max_size=4)


@pytest.fixture(scope="module")
def scenes():
    """Of the size that strengths are meant for, in one direction."""
    return [scene(np.random.default_rng(seed), (VIEWED_SIDE, 72)) for seed in range(4)]


def degraded(pixels, family, strength, seed=0):
    return degrade(np.random.default_rng(seed), pixels, [Degradation(family, strength)])


def flat(level, shape=(96, VIEWED_SIDE)):
    return np.full((*shape, 3), level, np.uint8)


def error(pixels, original):
    return np.sqrt(np.mean((np.float64(pixels) - original) ** 2))


def detail(pixels):
    return np.abs(np.diff(np.float64(pixels), axis=1)).mean()


# ---- all families -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_worse_the_stronger_it_is(family, scenes):
    errors = [
        np.mean([error(degraded(pixels, family, strength, seed), pixels) for seed, pixels in enumerate(scenes)])
        for strength in STRENGTHS
    ]
    assert all(weaker < stronger for weaker, stronger in itertools.pairwise(errors)), errors
    # What is hardly to be seen is a small part of the worst, which cannot be overlooked.
    assert errors[0] < errors[-1] / 2
    assert errors[0] < 30
    assert errors[-1] > 15 * FAMILIES[family].worst


@pytest.mark.parametrize(
    ("family", "more"),
    [("gaussian_blur", False), ("motion_blur", False), ("resampling", False), ("webp", False), ("haze", False),
     ("low_contrast", False), ("underexposure", False), ("vignetting", False), ("gaussian_noise", True),
     ("poisson_noise", True), ("impulse_noise", True)],
)  # fmt: skip
def test_detail_goes_or_comes(family, more, scenes):
    found = [
        np.mean([detail(degraded(pixels, family, strength, seed)) for seed, pixels in enumerate(scenes)])
        for strength in (0.1, 0.5, 1.0)
    ]
    assert (found[0] < found[1] < found[2]) if more else (found[0] > found[1] > found[2]), found


@settings(deadline=None, max_examples=150)
@given(
    chain=chains,
    shape=st.tuples(st.integers(1, 24), st.integers(1, 24)),
    seed=st.integers(0, 2**32 - 1),
    extreme=st.sampled_from([None, 0, 255]),
)
def test_shape_and_dtype_stay_and_the_input_is_left_alone(chain, shape, seed, extreme):
    pixels = (
        np.random.default_rng(seed).integers(0, 256, (*shape, 3), np.uint8) if extreme is None else flat(extreme, shape)
    )
    before = pixels.copy()
    pixels.flags.writeable = False
    found = degrade(np.random.default_rng(seed), pixels, chain)
    assert (found.shape, found.dtype) == (pixels.shape, np.uint8)
    np.testing.assert_array_equal(pixels, before)
    np.testing.assert_array_equal(degrade(np.random.default_rng(seed), pixels, chain), found)


@pytest.mark.parametrize("shape", [(1, 300), (300, 1), (7, 1024)])
@pytest.mark.parametrize("family", FAMILIES)
def test_pictures_may_be_thin(family, shape):
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    assert degraded(pixels, family, 1.0).shape == pixels.shape


def test_without_degradations_a_picture_stays_as_it_is(scenes):
    np.testing.assert_array_equal(degrade(np.random.default_rng(0), scenes[0], []), scenes[0])


def test_degradations_are_applied_one_after_the_other(scenes):
    first, second = Degradation("gaussian_blur", 0.8), Degradation("banding", 0.9)
    both = degrade(np.random.default_rng(0), scenes[0], [first, second])
    np.testing.assert_array_equal(both, degraded(degraded(scenes[0], "gaussian_blur", 0.8), "banding", 0.9))
    assert (both != degrade(np.random.default_rng(0), scenes[0], [second, first])).any()


@pytest.mark.parametrize("family", ["gaussian_noise", "poisson_noise", "impulse_noise", "motion_blur", "color_cast"])
def test_chance_is_the_generators(family, scenes):
    assert (degraded(scenes[0], family, 0.8, seed=1) != degraded(scenes[0], family, 0.8, seed=2)).any()


# ---- what each family does --------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gaussian_blur", "motion_blur", "resampling", "low_contrast", "jpeg", "webp"])
def test_there_is_nothing_to_lose_in_one_colour(family):
    assert np.abs(np.int32(degraded(flat(90), family, 1.0)) - 90).max() <= 2


@pytest.mark.parametrize(("strength", "deviation"), [(0, 2), (0.5, 11.8), (0.75, 28.8)])
def test_noise_has_the_deviation_of_its_strength(strength, deviation):
    for family in ("gaussian_noise", "poisson_noise"):
        noise = degraded(flat(128), family, strength)
        assert noise.std() == pytest.approx(deviation, rel=0.05)
        assert noise.mean() == pytest.approx(128, abs=1)


def test_photon_noise_grows_with_the_root_of_the_light():
    dark, light = (degraded(flat(level), "poisson_noise", 0.3).std() for level in (20, 180))
    assert light / dark == pytest.approx(3, rel=0.1)


def test_noise_does_not_turn_white_into_black():
    for family in ("gaussian_noise", "poisson_noise"):
        assert degraded(flat(250), family, 0.3).min() > 200
        assert degraded(flat(5), family, 0.3).max() < 60


def test_some_noise_is_grey():
    grey = [
        np.ptp(np.int32(degraded(flat(128), "gaussian_noise", 0.5, seed)), axis=-1).max() == 0 for seed in range(40)
    ]
    assert 2 < sum(grey) < 20


def test_impulses_are_black_and_white():
    noisy = degraded(flat(90), "impulse_noise", 1.0)
    assert np.ptp(np.int32(noisy), axis=-1).max() == 0
    shares = [np.mean(noisy[..., 0] == level) for level in (0, 90, 255)]
    assert shares == pytest.approx([0.125, 0.75, 0.125], abs=0.01)


def test_exposure_moves_the_light_and_keeps_black(scenes):
    for pixels in scenes:
        assert (
            degraded(pixels, "underexposure", 0.5).mean() < pixels.mean() < degraded(pixels, "overexposure", 0.5).mean()
        )
    for family in ("underexposure", "overexposure"):
        assert degraded(flat(0), family, 1.0).max() == 0
    # Three stops brighter, a quarter is far beyond white; five stops darker, white is a 32nd of the light.
    assert degraded(flat(140), "overexposure", 1.0).min() == 255
    assert degraded(flat(255), "underexposure", 1.0).max() == pytest.approx(255 * 2 ** (-5 / 2.2), abs=1)


def test_contrast_is_lost_around_the_mean(scenes):
    for pixels in scenes:
        found = degraded(pixels, "low_contrast", 0.6)
        assert found.std() < pixels.std() / 2
        assert found.mean() == pytest.approx(pixels.mean(), abs=6)


def test_colour_casts_colour_what_is_grey():
    assert max(np.ptp(degraded(flat(128), "color_cast", 0.6, seed)[0, 0].astype(int)) for seed in range(5)) > 40
    assert np.ptp(degraded(flat(128), "color_cast", 0.0)[0, 0].astype(int)) <= 1


def test_saturation_leaves_grey_and_spreads_colours():
    assert np.abs(np.int32(degraded(flat(90), "saturation", 1.0)) - 90).max() <= 1
    colour = np.broadcast_to(np.uint8([120, 100, 90]), (8, 8, 3))
    assert np.ptp(np.int32(degraded(colour, "saturation", 0.5)), axis=-1).min() > 90


def test_banding_leaves_few_levels():
    ramp = np.broadcast_to(np.arange(256, dtype=np.uint8)[None, :, None], (4, 256, 3))
    assert [len(np.unique(degraded(ramp, "banding", strength))) for strength in (0.0, 1.0)] == [24, 3]
    assert np.unique(degraded(ramp, "banding", 1.0)).tolist() == [0, 128, 255]


def test_vignettes_darken_the_corners_evenly_and_not_the_middle():
    found = np.int32(degraded(flat(200, (65, 65)), "vignetting", 1.0)[..., 0])
    assert found[32, 32] == 200
    assert found[0, 0] < 10
    np.testing.assert_array_equal(found, found[::-1])
    np.testing.assert_array_equal(found, found.T)


def test_haze_veils_the_dark_more_than_the_light():
    dark, light = (degraded(flat(level), "haze", 0.7).mean() for level in (0, 255))
    assert dark > 80
    assert dark < light < 255


def test_strong_compression_shows_its_blocks(scenes):
    """They are eight pixels wide, and the steps across their borders larger than those within."""
    found = np.float64(degraded(scenes[0], "jpeg", 1.0)).mean(axis=-1)
    steps = np.abs(np.diff(found, axis=1)).mean(axis=0)
    assert steps[7::8].mean() > 2 * np.delete(steps, slice(7, None, 8)).mean()


@pytest.mark.parametrize("family", ["gaussian_blur", "motion_blur", "resampling"])
def test_sizes_are_those_of_the_picture_as_it_is_looked_at(family, scenes):
    """A picture of twice as many pixels looks the same when it is scaled down."""
    for pixels in scenes[:2]:
        size = (pixels.shape[1], pixels.shape[0])
        larger = np.asarray(Image.fromarray(pixels).resize((2 * size[0], 2 * size[1]), Image.Resampling.BICUBIC))
        found = Image.fromarray(degraded(larger, family, 0.8)).resize(size, Image.Resampling.BOX)
        wanted = degraded(pixels, family, 0.8)
        assert error(np.asarray(found), wanted) < 0.35 * error(wanted, pixels)


@pytest.mark.parametrize(("family", "least"), [("jpeg", 0.7), ("webp", 0.9)])
def test_a_larger_picture_is_compressed_until_it_looks_nearly_as_bad(family, least, scenes):
    """With the same quality both would come to little more than half."""
    parts = []
    for pixels in scenes:
        size = (pixels.shape[1], pixels.shape[0])
        large = np.asarray(Image.fromarray(pixels).resize((2 * size[0], 2 * size[1]), Image.Resampling.BICUBIC))
        seen = [Image.fromarray(x).resize(size, Image.Resampling.BOX) for x in (degraded(large, family, 0.6), large)]
        parts.append(error(*map(np.asarray, seen)) / error(degraded(pixels, family, 0.6), pixels))
    assert least < np.mean(parts) < 1.1


# ---- severity ---------------------------------------------------------------------------------------------


@given(chain=chains)
def test_severities_add_up_to_no_more_than_all(chain):
    found = severity(chain)
    assert max((severity([one]) for one in chain), default=0) - 1e-12 <= found <= 1
    assert severity(chain[::-1]) == pytest.approx(found, abs=1e-12)


@given(chain=chains, family=st.sampled_from(list(FAMILIES)), strengths=st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_severity_grows_with_strength(chain, family, strengths):
    weaker, stronger = (severity([*chain, Degradation(family, strength)]) for strength in sorted(strengths))
    assert weaker <= stronger


def test_severity_is_nothing_at_first_and_the_familys_worst_in_the_end():
    for name, family in FAMILIES.items():
        assert severity([Degradation(name, 0.0)]) == 0
        assert severity([Degradation(name, 1.0)]) == pytest.approx(family.worst)
        assert 0 < family.worst < 1
        assert family.weight > 0
    two = [Degradation("webp", 1.0), Degradation("jpeg", 0.5)]
    webp, jpeg = FAMILIES["webp"].worst, FAMILIES["jpeg"].worst / 2
    assert severity(two) == pytest.approx(np.cbrt(webp**3 + jpeg**3))


def test_what_is_hardly_to_be_seen_is_hidden_by_what_is_plain_to_see():
    blurred, also_noisy = [Degradation("gaussian_blur", 0.8)], Degradation("gaussian_noise", 0.2)
    alone = severity([also_noisy])
    assert 0 < severity([*blurred, also_noisy]) - severity(blurred) < alone / 20


# ---- names ------------------------------------------------------------------------------------------------


def test_families_are_found_by_name():
    assert named_families(",".join(FAMILIES)) == tuple(FAMILIES)
    assert named_families(" haze , jpeg,, haze") == ("haze", "jpeg")


@pytest.mark.parametrize(
    ("names", "complaint"),
    [("jpg", "no family 'jpg'; there are "), ("jpeg,JPEG,x", "no family 'JPEG', 'x'; there are "),
     ("", "no family named"), (" ,", "no family named")],
)  # fmt: skip
def test_unknown_names_are_answered_with_all_there_are(names, complaint):
    with pytest.raises(UnknownFamilyError) as raised:
        named_families(names)
    assert str(raised.value).startswith(complaint)
    assert all(name in str(raised.value) for name in FAMILIES)
