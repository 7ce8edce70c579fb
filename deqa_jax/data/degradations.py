"""What makes pictures worse: the families of degradation that image-quality datasets are made of, at any strength.

A strength goes from 0, hardly to be seen, to 1, about the worst that such datasets have. Sizes in pixels are those of
the picture as it is looked at, 448 pixels along its longer side (see `VIEWED_SIDE`).
"""

import collections
import dataclasses
import io
import itertools
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageFilter

VIEWED_SIDE = 448
"""A blur of two pixels in a picture four times as large is half of one to whoever sees it whole."""

Pixels = UInt8[np.ndarray, "H W 3"]


class UnknownFamilyError(ValueError):
    """A name that is no family; the message lists them."""


@dataclasses.dataclass(frozen=True)
class Family:
    """One kind of degradation.

    Attributes:
      apply: makes a picture worse: `apply(rng, pixels, strength)`.
      worst: the perceptual severity at strength 1, from 0 (nothing to be seen) to 1 (nothing left to look at).
      weight: how often it is drawn.
    """

    apply: Callable[[np.random.Generator, Pixels, float], Pixels]
    worst: float
    weight: float = 1.0


@dataclasses.dataclass(frozen=True)
class Degradation:
    """One family at one strength."""

    family: str
    strength: float


def named_families(names: str) -> tuple[str, ...]:
    """Families by their names with commas between, each once.

    Raises:
      UnknownFamilyError: one of them is none, or none is named.

    >>> named_families("jpeg,haze")
    ('jpeg', 'haze')
    """
    found = tuple(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))
    unknown = [name for name in found if name not in FAMILIES]
    if unknown or not found:
        raise UnknownFamilyError(
            f"no family {', '.join(map(repr, unknown)) or 'named'}; there are {', '.join(FAMILIES)}"
        )
    return found


def degrade(rng: np.random.Generator, pixels: Pixels, degradations: Sequence[Degradation]) -> Pixels:
    """A picture after some degradations, one after the other.

    >>> flat = np.full((32, 448, 3), 99, np.uint8)
    >>> int(degrade(np.random.default_rng(0), flat, [Degradation("gaussian_noise", 1.0)]).std()) > 20
    True
    """
    for one in degradations:
        pixels = FAMILIES[one.family].apply(rng, pixels, one.strength)
    return pixels


_MINKOWSKI_EXPONENT = 3


def severity(degradations: Sequence[Degradation]) -> float:
    """How bad they are together, from 0 to 1: the worst decides, and hides much of what the others do.

    A Minkowski sum, whose exponent comes to 3 for what is plain to see (Keelan, Handbook of Image Quality, 2002,
    chapter 11).

    >>> severity([Degradation("jpeg", 1.0)]), severity([])
    (0.95, 0.0)
    >>> round(severity([Degradation("jpeg", 0.5), Degradation("gaussian_blur", 0.5)]), 3)
    0.598
    """
    total = sum((FAMILIES[one.family].worst * one.strength) ** _MINKOWSKI_EXPONENT for one in degradations)
    return min(1.0, total ** (1 / _MINKOWSKI_EXPONENT))


# ---- helpers of several families --------------------------------------------------------------------------


def _between(strength: float, mildest: float, worst: float) -> float:
    """A size at a strength: equal steps of strength are equal ratios, as the eye has it."""
    return mildest * (worst / mildest) ** strength


def _scale(pixels: Pixels) -> float:
    """Pixels of the picture for each one that is looked at."""
    return max(pixels.shape[:2]) / VIEWED_SIDE


def _as_pixels(values: Float[np.ndarray, "H W 3"]) -> Pixels:
    return np.clip(values + 0.5, 0, 255).astype(np.uint8)


def _luma(pixels: np.ndarray) -> Float[np.ndarray, "H W 1"]:
    return (pixels @ np.array([0.299, 0.587, 0.114], np.float32))[..., None]


# ---- the families -----------------------------------------------------------------------------------------


def _gaussian_blur(rng: np.random.Generator, pixels: Pixels, strength: float) -> Pixels:
    sigma = _between(strength, 0.4, 10.0) * _scale(pixels)
    return np.asarray(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(sigma)))


def _motion_blur(rng: np.random.Generator, pixels: Pixels, strength: float) -> Pixels:
    length = _between(strength, 2.0, 32.0) * _scale(pixels)
    angle = rng.uniform(0, np.pi)
    steps = max(3, round(length))
    way = np.linspace(-length / 2, length / 2, steps)
    y, x = way * np.sin(angle), way * np.cos(angle)
    # A place between pixels is shared among the four around it.
    shares: dict[tuple[int, int], float] = collections.defaultdict(float)
    for down, right in itertools.product((0, 1), repeat=2):
        at = np.floor(y).astype(int) + down, np.floor(x).astype(int) + right
        for place, share in zip(zip(*at, strict=True), (1 - abs(y - at[0])) * (1 - abs(x - at[1])), strict=True):
            shares[place] += share / steps
    border = steps + 1
    edge = np.pad(pixels, ((border, border), (border, border), (0, 0)), mode="edge").astype(np.float32)
    height, width = pixels.shape[:2]
    total = np.zeros(pixels.shape, np.float32)
    for (down, right), share in shares.items():
        total += np.float32(share) * edge[border + down :, border + right :][:height, :width]
    return _as_pixels(total)


def _gaussian_noise(rng: np.random.Generator, pixels: Pixels, strength: float) -> Pixels:
    deviation = _between(strength, 2.0, 70.0) * _scale(pixels)
    # Some sensors' noise is grey once their firmware is done with it.
    channels = 3 if rng.random() < 0.75 else 1
    noise = rng.standard_normal((*pixels.shape[:2], channels), np.float32)
    return _as_pixels(pixels + deviation * noise)


def _poisson_noise(rng: np.random.Generator, pixels: Pixels, strength: float) -> Pixels:
    deviation = _between(strength, 2.0, 70.0) * _scale(pixels)
    # Photons for a step of brightness, so that mid-grey gets this deviation.
    photons = 128 / deviation**2
    return _as_pixels(rng.poisson(pixels * photons).astype(np.float32) / photons)


def _impulse_noise(rng: np.random.Generator, pixels: Pixels, strength: float) -> Pixels:
    hit = rng.random(pixels.shape[:2], np.float32) < _between(strength, 0.002, 0.25)
    noisy = pixels.copy()
    noisy[hit] = 255 * rng.integers(0, 2, (int(hit.sum()), 1))
    return noisy


# Quality by strength, at the viewed size: between 100 and 60 there is less to be seen than between 30 and 10.
_JPEG_QUALITY = ((0.0, 0.2, 0.4, 0.6, 0.8, 1.0), (90, 60, 36, 20, 10, 5))


def encoded(pixels: Pixels, format: str, quality: int) -> Pixels:
    """A picture after it was stored in a lossy format of Pillow's and read again."""
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, format, quality=quality)
    return np.asarray(Image.open(content).convert("RGB"))


def _as_seen(quality: float, scale: float) -> int:
    """The quality that looks to whoever sees a picture `scale` times smaller as `quality` does at its own size."""
    # Steps of rounding as libjpeg has them, relative to quality 50. Seen smaller, a picture's errors are averaged.
    step = scale * (50 / max(quality, 1) if quality < 50 else 2 - quality / 50)
    return max(1, round(50 / step if step > 1 else 100 - 50 * step))


def _jpeg(rng: np.random.Generator, pixels: Pixels, strength: float) -> Pixels:
    return encoded(pixels, "JPEG", _as_seen(np.interp(strength, *_JPEG_QUALITY), _scale(pixels)))


def _webp(rng: np.random.Generator, pixels: Pixels, strength: float) -> Pixels:
    # Of the format's 128 quantisers, the coarser the higher. As measured, one that is 60 log(scale) higher looks the
    # same in a picture `scale` times as large; the last one in 900 pixels as the 70th in 448.
    quantizer = np.clip(15 + 55 * strength + 60 * np.log(_scale(pixels)), 0, 127)
    # libwebp's quality for it.
    fineness = (1 - quantizer / 127) ** 3
    quality = 1.5 * fineness if fineness < 0.5 else (1 + fineness) / 2
    return encoded(pixels, "WEBP", round(100 * quality))


_UPSAMPLING = (Image.Resampling.BICUBIC, Image.Resampling.BILINEAR, Image.Resampling.NEAREST)


def _resampling(rng: np.random.Generator, pixels: Pixels, strength: float) -> Pixels:
    factor = max(1.05, _between(strength, 1.2, 10.0) * _scale(pixels))
    picture = Image.fromarray(pixels)
    down = [Image.Resampling.BICUBIC, Image.Resampling.BOX, Image.Resampling.NEAREST][rng.choice(3, p=[0.6, 0.3, 0.1])]
    small = picture.resize([max(2, round(side / factor)) for side in picture.size], down)
    return np.asarray(small.resize(picture.size, _UPSAMPLING[rng.choice(3, p=[0.5, 0.25, 0.25])]))


def _overexposure(rng: np.random.Generator, pixels: Pixels, strength: float) -> Pixels:
    linear = (pixels / np.float32(255)) ** np.float32(2.2) * 2 ** (0.1 + 2.9 * strength)
    return _as_pixels(255 * np.minimum(linear, 1) ** np.float32(1 / 2.2))


def _underexposure(rng: np.random.Generator, pixels: Pixels, strength: float) -> Pixels:
    linear = (pixels / np.float32(255)) ** np.float32(2.2) * 2 ** -(0.1 + 4.9 * strength)
    return _as_pixels(255 * linear ** np.float32(1 / 2.2))


def _low_contrast(rng: np.random.Generator, pixels: Pixels, strength: float) -> Pixels:
    grey = _luma(pixels).mean()
    return _as_pixels(grey + (pixels - grey) * (0.95 - 0.85 * strength))


def _color_cast(rng: np.random.Generator, pixels: Pixels, strength: float) -> Pixels:
    tint = rng.dirichlet((0.6, 0.6, 0.6)).astype(np.float32)
    return _as_pixels(pixels * (1 - 0.7 * strength) + 255 * 0.7 * strength * tint * (0.3 + 0.7 * _luma(pixels) / 255))


def _saturation(rng: np.random.Generator, pixels: Pixels, strength: float) -> Pixels:
    grey = _luma(pixels)
    return _as_pixels(grey + (pixels - grey) * (1.1 + 4 * strength))


def _banding(rng: np.random.Generator, pixels: Pixels, strength: float) -> Pixels:
    levels = round(_between(strength, 24, 3))
    return _as_pixels(np.round(pixels * np.float32((levels - 1) / 255)) * np.float32(255 / (levels - 1)))


def _vignetting(rng: np.random.Generator, pixels: Pixels, strength: float) -> Pixels:
    y, x = (np.linspace(-1, 1, length, dtype=np.float32) for length in pixels.shape[:2])
    distance = (y[:, None] ** 2 + x[None] ** 2)[..., None]
    return _as_pixels(pixels / (1 + _between(strength, 0.05, 4.0) * distance) ** 2)


def _haze(rng: np.random.Generator, pixels: Pixels, strength: float) -> Pixels:
    depth = np.linspace(rng.uniform(0.7, 1.3), rng.uniform(0.5, 1.0), len(pixels), dtype=np.float32)[:, None, None]
    seen = np.exp(-_between(strength, 0.05, 2.5) * depth)
    air = np.float32(rng.uniform(190, 235)) + rng.uniform(-8, 8, 3).astype(np.float32)
    return _as_pixels(pixels * seen + air * (1 - seen))


FAMILIES: dict[str, Family] = {
    "haze": Family(_haze, 0.7, 0.4),
    "vignetting": Family(_vignetting, 0.5, 0.3),
    "gaussian_blur": Family(_gaussian_blur, 0.95, 2.0),
    "motion_blur": Family(_motion_blur, 0.95),
    "overexposure": Family(_overexposure, 0.6, 0.4),
    "underexposure": Family(_underexposure, 0.8, 0.4),
    "gaussian_noise": Family(_gaussian_noise, 0.9, 1.5),
    "poisson_noise": Family(_poisson_noise, 0.9),
    "impulse_noise": Family(_impulse_noise, 0.9),
    "color_cast": Family(_color_cast, 0.5, 0.3),
    "saturation": Family(_saturation, 0.5, 0.3),
    "low_contrast": Family(_low_contrast, 0.65, 0.4),
    "banding": Family(_banding, 0.75, 0.5),
    "resampling": Family(_resampling, 0.95, 2.0),
    "jpeg": Family(_jpeg, 0.95, 2.5),
    "webp": Family(_webp, 0.5, 0.7),
}
"""All families by name, in the order in which they come over a picture: on the way to the camera, in it, in processing,
in storage. Those that photographs suffer from most are drawn most often."""
