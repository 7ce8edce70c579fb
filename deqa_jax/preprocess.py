"""Image file, PIL image or array to the uint8 square that the model reads, and its normalisation (SPEC 1)."""

import contextlib
import dataclasses
import functools
import io
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8
from PIL import Image

from deqa_jax.config import ConfigError

IMAGE_SUFFIXES = frozenset(
    (".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
)
"""What counts as an image in a folder."""

# Raster formats only: Pillow hands some others (EPS) to outside programs.
_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
# All that JPEG can hold; the square around an image of this length has four gigapixels.
_MAX_SIDE = 1 << 16
# Pixels that are padded at a time: bounds memory for panoramas, whose square would be enormous.
_BLOCK_PIXELS = 1 << 24

ImageLike = str | os.PathLike[str] | bytes | Image.Image | np.ndarray
"""A path, the content of an image file, a PIL image, or an array."""


class ImageError(ValueError):
    """An image that cannot be read; the message names the file."""


class NoImagesError(ValueError):
    """A folder in which no file is an image by its name; the message names it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreprocessConfig:
    """How pixels are made: side in pixels, Pillow's resampling filter, and the mean and deviation of each colour."""

    size: int
    resample: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @property
    def fill(self) -> tuple[int, int, int]:
        """The colour of the padding."""
        red, green, blue = (int(255 * m) for m in self.mean)
        return red, green, blue

    @classmethod
    def from_published(cls, published: Mapping[str, Any]) -> "PreprocessConfig":
        """Reads a checkpoint's `preprocessor_config.json`.

        Raises:
          ConfigError: entries are missing or ask for another preprocessing than the published one (all named).
        """
        problems = [
            f"{switch}: {published[switch]!r} is not supported"
            for switch in ("do_resize", "do_center_crop", "do_normalize", "do_rescale", "do_convert_rgb")
            if not published.get(switch, True)
        ]
        if published.get("rescale_factor", 1 / 255) != 1 / 255:
            problems.append(f"rescale_factor: {published['rescale_factor']!r} is not supported (only 1/255)")
        size, crop = _side(published.get("size")), _side(published.get("crop_size"))
        if size is None or size != crop:
            problems.append(
                f"size {published.get('size')!r} and crop_size {published.get('crop_size')!r} are not the same square"
            )
        resample = published.get("resample")
        if type(resample) is not int or resample not in {int(filter) for filter in Image.Resampling}:
            problems.append(f"resample: {resample!r} is not one of Pillow's filters")
        colours = {}
        for key in ("image_mean", "image_std"):
            value: Any = published.get(key)
            if _is_colour(value) and (key == "image_mean" or all(x > 0 for x in value)):
                colours[key] = (float(value[0]), float(value[1]), float(value[2]))
            else:
                problems.append(f"{key}: {value!r} is not three {'positive ' * (key == 'image_std')}numbers")
        if problems or size is None or resample is None:
            raise ConfigError("preprocessor_config.json: " + "; ".join(problems))
        return cls(size=size, resample=resample, mean=colours["image_mean"], std=colours["image_std"])


def _side(value: Any) -> int | None:
    """The side of a square, in any of the ways that processors write it: 448, {"shortest_edge": 448}, …"""
    sides = list(value.values()) if isinstance(value, Mapping) else [value]
    square = bool(sides) and all(type(side) is int and side == sides[0] > 0 for side in sides)
    return sides[0] if square else None


def _is_colour(value: Any) -> bool:
    return (
        isinstance(value, list) and len(value) == 3 and all(type(x) in (int, float) and math.isfinite(x) for x in value)
    )


def images_below(folder: Path) -> list[Path]:
    """All files below a folder that are images by their names, sorted.

    Raises:
      NoImagesError: there are none.
    """
    if found := [path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()]:
        return sorted(found)
    raise NoImagesError(f"{folder}: no images in this folder (looked for {', '.join(sorted(IMAGE_SUFFIXES))})")


def load_square(
    image: ImageLike, config: PreprocessConfig, *, most_pixels: float = math.inf
) -> UInt8[np.ndarray, "H H 3"]:
    """Reads an image, pads it to a centred square and resizes it.

    Args:
      image: a path, the bytes of an image file, a PIL image of any mode, or a uint8 array `[H, W, 3]` (also `[H, W]`,
        `[H, W, 1]`, `[H, W, 4]`).
      config: the checkpoint's preprocessing.
      most_pixels: of an image that has more, nothing is decoded.

    Returns:
      uint8 `[size, size, 3]`, RGB. Alpha is dropped and EXIF orientation ignored, as in training.

    Raises:
      ImageError: the file is missing, damaged, larger than Pillow's limit or `most_pixels`, or no image.
    """
    rgb = load_rgb(image, most_pixels=most_pixels)
    with _naming(image):
        return _square(rgb, config)


def load_rgb(image: ImageLike, *, enough: int | None = None, most_pixels: float = math.inf) -> Image.Image:
    """Decodes an image as `load_square` does, in its own size. Raises `ImageError` likewise.

    With `enough`, a JPEG file may come smaller, and much faster, as long as no side has fewer pixels than that.
    """
    if isinstance(image, np.ndarray):
        image = _from_array(image)
    with _naming(image):
        if isinstance(image, Image.Image):
            _check_size(image, most_pixels)
            return _to_rgb(image)
        with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image, formats=_formats()) as opened:
            _check_size(opened, most_pixels)
            if enough is not None:
                opened.draft(None, (enough, enough))
            return _to_rgb(opened)


def _check_size(image: Image.Image, most_pixels: float) -> None:
    width, height = image.size
    if not width or not height:
        raise ImageError(f"an image of {width}x{height} pixels")
    if width * height > most_pixels:
        raise ImageError(f"{width}x{height} pixels; the limit is {most_pixels / 1e6:g} megapixels")
    if max(width, height) > _MAX_SIDE:
        raise ImageError(f"{width}x{height} pixels; a side of more than {_MAX_SIDE} is refused")


@contextlib.contextmanager
def _naming(image: ImageLike) -> Iterator[None]:
    # Decoders raise nearly anything on damaged files; whatever it is, this image cannot be read.
    try:
        yield
    except Exception as error:
        raise ImageError(f"{_name(image)}: {_reason(image, error)}") from error


def _name(image: ImageLike) -> str:
    if isinstance(image, str | os.PathLike):
        return os.fspath(image)
    return getattr(image, "filename", "") or "an image"


def _to_rgb(image: Image.Image) -> Image.Image:
    # Pillow warns that a palette with transparency were better RGBA; alpha is dropped here all the same.
    if image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
        image = image.convert("RGBA")
    return image.convert("RGB")


@functools.cache
def _formats() -> tuple[str, ...]:
    """Those of the formats that this build of Pillow has; it loads their decoders only when asked to."""
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _reason(image: ImageLike, error: Exception) -> str:
    match error:
        case FileNotFoundError():
            return "no such file"
        case IsADirectoryError():
            return "is a folder"
        case Image.UnidentifiedImageError():
            empty = image == b"" if isinstance(image, bytes) else not Path(_name(image)).stat().st_size
            return "empty file" if empty else "not an image (or of an unsupported format)"
        case OSError() if error.strerror:
            return error.strerror
    return str(error)


def _from_array(array: np.ndarray) -> Image.Image:
    shape_fits = array.ndim == 2 or (array.ndim == 3 and array.shape[-1] in (1, 3, 4))
    if array.dtype != np.uint8 or not shape_fits or 0 in array.shape:
        raise ImageError(f"an image array is uint8 [H, W, 3], not {array.dtype} {list(array.shape)}")
    if array.shape[-1] == 1 and array.ndim == 3:
        array = array[..., 0]
    return Image.fromarray(array).convert("RGB")


def _square(image: Image.Image, config: PreprocessConfig) -> UInt8[np.ndarray, "H H 3"]:
    """Pads and resizes. Equal, bit for bit, to resizing the whole padded square.

    Pillow resizes columns first and rows then, with uint8 in between, and a constant row stays constant. So only
    rows with picture in them are resized, a block at a time, and the padding above and below is put in after.
    """
    width, height = image.size
    side, size = max(width, height), config.size
    left, top = (side - width) // 2, (side - height) // 2
    narrow = Image.new("RGB", (size, side), config.fill)
    rows = max(1, _BLOCK_PIXELS // side)
    for y in range(0, height, rows):
        block = image.crop((0, y, width, min(y + rows, height)))
        if width < side:
            padded = Image.new("RGB", (side, block.height), config.fill)
            padded.paste(block, (left, 0))
            block = padded
        narrow.paste(block.resize((size, block.height), config.resample), (0, top + y))
    return np.asarray(narrow.resize((size, size), config.resample))


def normalize(pixels: UInt8[Array, "*N 3"], config: PreprocessConfig) -> Float[Array, "*N 3"]:
    """uint8 RGB to the float32 that the vision tower reads; meant to run on the device."""
    shape = (1,) * (pixels.ndim - 1) + (3,)
    mean = jnp.asarray(config.mean, jnp.float32).reshape(shape)
    std = jnp.asarray(config.std, jnp.float32).reshape(shape)
    return (pixels.astype(jnp.float32) / 255.0 - mean) / std
