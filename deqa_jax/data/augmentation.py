"""What can be done to a picture that changes nothing about its quality, or nothing that is to be seen."""

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from deqa_jax.data.degradations import encoded

_MOST_SHIFT = 32
# Of 255; the mildest noise that datasets have is about twice as strong.
_MOST_DEVIATION = 1.5
_BYTES_DEVIATION = (256**2 / 12) ** 0.5
_JPEG_QUALITIES = (85, 97)


def stored_again(rng: np.random.Generator, picture: Image.Image) -> Image.Image:
    """A picture in the state in which pictures come: half have a last faint noise, and half have been JPEG files.

    Those of datasets are degraded and then stored without loss, so that what was blurred is free of noise to the last
    bit. A model that learns to look for that takes the blurred JPEG of a camera for a sharp picture.

    Args:
      rng: decides what is done, and how strongly.
      picture: RGB; in its own size, as it is stored before anyone looks at it.

    Returns:
      RGB of the same size.

    >>> grey = Image.new("RGB", (40, 30), "grey")
    >>> stored_again(np.random.default_rng(0), grey).size
    (40, 30)
    """
    noisy, compressed = rng.random(2) < 0.5
    pixels = np.asarray(picture)
    if noisy:
        # Bytes are drawn four times as fast as normal deviates.
        strength = np.float32(rng.uniform(0, _MOST_DEVIATION) / _BYTES_DEVIATION)
        noise = rng.integers(-128, 128, pixels.shape, np.int8) * strength
        pixels = np.clip(pixels + noise + 0.5, 0, 255).astype(np.uint8)
    if compressed:
        pixels = encoded(pixels, "JPEG", int(rng.integers(*_JPEG_QUALITIES, endpoint=True)))
    return Image.fromarray(pixels)


def augmented(rng: np.random.Generator, square: UInt8[np.ndarray, "H H 3"]) -> UInt8[np.ndarray, "H H 3"]:
    """A picture turned by right angles, mirrored, and moved by up to 32 pixels, of which what leaves comes in again.

    It has the same pixels, none of them resampled: sharpness, noise and colours are those of the original. But the
    vision tower's patches see them in other places, and a small model cannot learn them by heart.

    >>> square = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    >>> sorted(augmented(np.random.default_rng(0), square).ravel()) == list(range(12))
    True
    """
    turned = np.rot90(square, int(rng.integers(4)))
    mirrored = turned[:, ::-1] if rng.random() < 0.5 else turned
    return np.roll(mirrored, rng.integers(-_MOST_SHIFT, _MOST_SHIFT, 2, endpoint=True), (0, 1))
