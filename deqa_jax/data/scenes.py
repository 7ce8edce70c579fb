"""Procedural pictures with the statistics of natural ones: dead leaves over all scales, 1/f textures, shading, lines.

The dead-leaves model covers a canvas with shapes whose radii follow a power law, each hiding what lies below it. That
gives photographs' spectra, edges and long-tailed derivatives (Lee, Mumford & Huang, Occlusion models for natural
images, IJCV 2001). Here the leaves have colours of one palette, textures and shading of their own, some scenes a
background out of focus, and others detail everywhere.
"""

import dataclasses

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image, ImageDraw, ImageFilter

from deqa_jax.data.degradations import encoded

# Everything is drawn larger and scaled down, which smooths the edges as a lens and a sensor do.
_OVERSAMPLING = 2
_TEXTURE_SIDE = 256
_ASPECTS = (1.0, 4 / 3, 4 / 3, 3 / 2, 3 / 2, 16 / 9)
_MAX_LEAVES = 3000
# Of small ones it takes more to leave no place between them.
_MAX_PEBBLES = 20_000


def scene_size(rng: np.random.Generator, sides: tuple[int, int]) -> tuple[int, int]:
    """Width and height of a scene: the longer side drawn from a range, in one of the usual aspect ratios."""
    # Large pictures take long to make and look like small ones once they are seen: there are fewer of them.
    long = round(sides[0] + (sides[1] - sides[0]) * rng.random() ** 2)
    short = round(long / _ASPECTS[rng.integers(len(_ASPECTS))])
    return (short, long) if rng.random() < 0.35 else (long, short)


def scene(rng: np.random.Generator, size: tuple[int, int]) -> UInt8[np.ndarray, "H W 3"]:
    """One scene, sharp and clean but for what a good camera leaves: uint8 RGB of `size` (width, height).

    >>> scene(np.random.default_rng(0), (64, 48)).shape
    (48, 64, 3)
    """
    width, height = (side * _OVERSAMPLING for side in size)
    palette = _palette(rng)
    textures = _textures(rng)
    picture = _backdrop(rng, palette, textures, (height, width))
    fine = float(rng.choice([2.0, 4.0, 10.0, 24.0, 60.0, 120.0]))
    if rng.random() < 0.1:
        # Gravel, fallen leaves, bark: detail everywhere, and nothing calm.
        _cover(rng, picture, palette, textures, radii=(rng.uniform(1.5, 6), 0.03), share=3.0, most=_MAX_PEBBLES)
    elif rng.random() < 0.5:
        # A far layer out of focus, as behind a portrait, and often hardly anything in front of it.
        _cover(rng, picture, palette, textures, radii=(max(fine, 12.0), 0.3), share=1.0)
        picture = _blurred(picture, 0.7 * 20 ** rng.random() * _OVERSAMPLING)
        _cover(rng, picture, palette, textures, radii=(fine, 0.35), share=rng.uniform(0.05, 0.7))
    else:
        _cover(rng, picture, palette, textures, radii=(fine, 0.35), share=2.0 * rng.uniform(0.2, 1) ** 2)
    if rng.random() < 0.6:
        _draw_lines(rng, picture, palette)
    if rng.random() < 0.25:
        _draw_writing(rng, picture)
    picture *= _illumination(rng, (height, width))
    return _developed(rng, picture, size)


# ---- colours and textures ---------------------------------------------------------------------------------


def _palette(rng: np.random.Generator) -> Float[np.ndarray, "N 3"]:
    """Twenty-four colours around a few hues, mostly muted, light and dark."""
    hues = rng.random(rng.integers(3, 8))
    hue = (rng.choice(hues, 24) + rng.normal(0, 0.04, 24)) % 1
    saturation = rng.beta(1.5, 2.2, 24) * rng.uniform(0.2, 2.1)
    value = rng.uniform(0.08, 0.95, 24)
    # HSV to RGB: how far each primary is from its place on the colour wheel.
    distance = np.abs((hue[:, None] * 6 + np.array([0.0, 4.0, 2.0])) % 6 - 3) - 1
    colours = value[:, None] * (1 - np.clip(saturation, 0, 1)[:, None] * (1 - np.clip(distance, 0, 1)))
    return colours.astype(np.float32)


def _noise(rng: np.random.Generator, shape: tuple[int, int], slope: float, stretch: float = 1.0) -> np.ndarray:
    """Gaussian noise with a spectrum of 1/f^slope, longer along one axis by `stretch`; mean 0, deviation 1."""
    rows = np.fft.fftfreq(shape[0])[:, None] * stretch
    columns = np.fft.rfftfreq(shape[1])[None]
    frequency = np.hypot(rows, columns)
    frequency[0, 0] = np.inf
    white = np.fft.rfft2(rng.standard_normal(shape).astype(np.float32))
    field = np.fft.irfft2(white * (frequency / frequency[0, 1]) ** -slope, s=shape)
    return ((field - field.mean()) / field.std()).astype(np.float32)


def _textures(rng: np.random.Generator) -> Float[np.ndarray, "6 S S"]:
    """Clouds, rough ground, grain, fibres, stripes and cells, each a tile that joins itself."""
    side = (_TEXTURE_SIDE, _TEXTURE_SIDE)
    y, x = np.mgrid[: side[0], : side[1]] / _TEXTURE_SIDE
    # Whole numbers of periods: the tiles join without a seam.
    waves = rng.integers(-40, 41, 2)
    stripes = np.sign(np.sin(2 * np.pi * (waves[0] * x + waves[1] * y + 0.3 * _noise(rng, side, 2.0))))
    rough = _noise(rng, side, 1.0)
    kinds = [
        _noise(rng, side, 1.6),
        rough,
        _noise(rng, side, 0.5),
        _noise(rng, side, 1.0, stretch=rng.choice([0.1, 10.0])),
        stripes * (0.6 + 0.2 * rough),
        np.abs(_noise(rng, side, 1.2)) - 0.8,
    ]
    return np.stack(kinds).astype(np.float32)


def _tiled(texture: Float[np.ndarray, "S S"], shape: tuple[int, int]) -> Float[np.ndarray, "H W"]:
    """As much of a texture as covers a canvas."""
    return np.tile(texture, [-(-length // _TEXTURE_SIDE) for length in shape])[: shape[0], : shape[1]]


def _backdrop(
    rng: np.random.Generator, palette: np.ndarray, textures: np.ndarray, shape: tuple[int, int]
) -> Float[np.ndarray, "H W 3"]:
    """A sky or a wall, one colour that becomes another from top to bottom with faint clouds, and mostly some ground."""
    height, width = shape
    top, bottom, ground = palette[rng.integers(len(palette), size=3)]
    down = np.linspace(0, 1, height, dtype=np.float32)[:, None, None] ** rng.uniform(0.6, 1.6)
    clouds = 1 + np.float32(rng.uniform(0, 0.25)) * _noise(rng, (64, 64), 1.6)
    stretched = np.asarray(Image.fromarray(clouds).resize((width, height), Image.Resampling.BICUBIC))
    picture = (top * (1 - down) + bottom * down) * stretched[..., None]
    if rng.random() < 0.6:
        horizon = rng.uniform(0.2, 0.9) + rng.uniform(0, 0.08) * _noise(rng, (1, width), 1.5)
        below = np.linspace(0, 1, height)[:, None] > horizon
        kinds = rng.integers(len(textures), size=2)
        grain = 1 + np.tensordot(rng.uniform(0.05, 0.6, 2).astype(np.float32), textures[kinds], 1)
        picture[below] = ground * _tiled(np.clip(grain, 0.1, 3), shape)[below][:, None]
    return picture


# ---- leaves -----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Leaves:
    """What the leaves of one layer are, by their number; number 0 is where there is none."""

    colour: Float[np.ndarray, "N 3"]
    slope: Float[np.ndarray, "N 2"]
    centre: Float[np.ndarray, "N 2"]
    texture: Int[np.ndarray, "N"]
    contrast: Float[np.ndarray, "N"]
    phase: Int[np.ndarray, "N 2"]


def _cover(
    rng: np.random.Generator,
    picture: Float[np.ndarray, "H W 3"],
    palette: np.ndarray,
    textures: np.ndarray,
    *,
    radii: tuple[float, float],
    share: float,
    most: int = _MAX_LEAVES,
) -> None:
    """Throws leaves on a picture until their areas sum up to about a share of it.

    Args:
      rng: decides everything.
      picture: is painted on.
      palette: colours.
      textures: see `_textures`.
      radii: the smallest one in pixels of the finished scene, the largest one as a part of the longer side.
      share: of the area, overlaps counted.
      most: how many leaves there are at the most.
    """
    height, width = picture.shape[:2]
    largest = radii[1] * max(height, width)
    smallest = min(radii[0] * _OVERSAMPLING, largest)
    exponent = rng.uniform(1.4, 2.4)
    uniform = rng.random(most)
    # A power law's radii, by inverting its distribution function.
    radius = (smallest**-exponent + uniform * (largest**-exponent - smallest**-exponent)) ** (-1 / exponent)
    # Half as much again in circles: corners cut them, and so do the edges of the picture.
    radius = radius[np.cumsum(np.pi * radius**2) < share * height * width * 1.5]
    count = len(radius) + 1
    centre = rng.uniform(-0.05, 1.05, (count, 2)) * (width, height)
    numbers = Image.new("I", (width, height), 0)
    draw = ImageDraw.Draw(numbers)
    angular = rng.random() < 0.4
    for number, size in enumerate(radius, start=1):
        outline = _polygon(rng, size) if angular or rng.random() < 0.2 else _blob(rng, size)
        draw.polygon([tuple(point) for point in outline + centre[number]], fill=number)
    smooth = rng.random(count) < rng.uniform(0, 0.8)
    leaves = _Leaves(
        colour=np.clip(palette[rng.integers(len(palette), size=count)] + rng.normal(0, 0.05, (count, 3)), 0.02, 1),
        slope=rng.normal(0, 0.25, (count, 2)) / np.maximum(np.append(largest, radius), 1)[:, None],
        centre=centre,
        texture=rng.integers(len(textures), size=count),
        contrast=np.where(smooth, 0.02, rng.gamma(1.5, 0.12 * np.exp(rng.normal(0, 0.5)), count)),
        phase=rng.integers(_TEXTURE_SIDE, size=(count, 2)),
    )
    _paint(picture, np.asarray(numbers), leaves, textures)


def _polygon(rng: np.random.Generator, radius: float) -> Float[np.ndarray, "N 2"]:
    """A rectangle or another convex shape with corners, turned at random: what people build."""
    corners = int(rng.choice([3, 4, 4, 4, 5]))
    turn = 0.0 if corners == 4 and rng.random() < 0.6 else rng.uniform(0, 2 * np.pi)
    angle = 2 * np.pi * (np.arange(corners) + 0.5) / corners
    return _outline(angle, radius, flat=np.exp(rng.normal(0, 0.5)), turn=turn)


def _blob(rng: np.random.Generator, radius: float) -> Float[np.ndarray, "N 2"]:
    """An ellipse with dents: what grows."""
    angle = np.linspace(0, 2 * np.pi, int(np.clip(radius, 8, 48)), endpoint=False)
    waves = rng.integers(2, 9, 2)
    dents = 1 + 0.12 * np.sin(waves[0] * angle + rng.uniform(0, 6)) + 0.06 * np.sin(waves[1] * angle)
    turn, flat = rng.uniform(0, np.pi), np.exp(rng.normal(0, 0.35))
    return _outline(angle, (radius * dents)[:, None], flat=flat, turn=turn)


def _outline(
    angle: Float[np.ndarray, "N"], radius: float | Float[np.ndarray, "N 1"], *, flat: float, turn: float
) -> Float[np.ndarray, "N 2"]:
    """Points around a centre, pulled along one axis, pushed along the other, and turned."""
    points = np.stack([np.cos(angle) * flat, np.sin(angle) / flat], axis=1) * radius
    return points @ np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])


def _paint(
    picture: Float[np.ndarray, "H W 3"], numbers: Int[np.ndarray, "H W"], leaves: _Leaves, textures: np.ndarray
) -> None:
    """Colours every pixel that a leaf covers: its colour, shaded across it, times its texture."""
    covered = np.flatnonzero(numbers)
    number = numbers.ravel()[covered]
    y, x = np.divmod(covered.astype(np.int32), np.int32(numbers.shape[1]))
    colour, slope, contrast = (value.astype(np.float32) for value in (leaves.colour, leaves.slope, leaves.contrast))
    # What a leaf's shade would be at the canvas's corner.
    base = (1 - (leaves.centre * leaves.slope).sum(axis=1)).astype(np.float32)
    shade = base[number] + x * slope[:, 0][number] + y * slope[:, 1][number]
    # Each leaf has its own part of the tile.
    row = (y + leaves.phase[:, 1].astype(np.int32)[number]) % _TEXTURE_SIDE
    column = (x + leaves.phase[:, 0].astype(np.int32)[number]) % _TEXTURE_SIDE
    grain = 1 + contrast[number] * textures[leaves.texture[number], row, column]
    picture.reshape(-1, 3)[covered] = colour[number] * (np.clip(shade, 0.3, 1.8) * np.clip(grain, 0.1, 3))[:, None]


# ---- lines, writing, light --------------------------------------------------------------------------------


def _draw_lines(rng: np.random.Generator, picture: np.ndarray, palette: np.ndarray) -> None:
    """Branches, wires, hairs: curved lines of one to several pixels."""
    height, width = picture.shape[:2]
    mask = Image.new("L", (width, height), 0)
    draw = ImageDraw.Draw(mask)
    for _ in range(rng.integers(3, 40)):
        steps = rng.normal(rng.normal(0, 0.02, 2), 0.012, (24, 2)).cumsum(axis=0) + rng.random(2)
        draw.line([tuple(point) for point in steps * (width, height)], fill=255, width=int(rng.integers(1, 9)))
    _stamp(picture, mask, palette[rng.integers(len(palette))] * rng.uniform(0.2, 1))


def _draw_writing(rng: np.random.Generator, picture: np.ndarray) -> None:
    """Rows of strokes with the look of print on a plate; no font is needed."""
    height, width = picture.shape[:2]
    letter = int(rng.integers(8, 28)) * _OVERSAMPLING
    columns, rows = int(rng.integers(5, 24)), int(rng.integers(1, 6))
    left, top = rng.uniform(0, 0.6, 2) * (width, height)
    plate, ink = Image.new("L", (width, height), 0), Image.new("L", (width, height), 0)
    right, bottom = left + (columns + 1) * 0.7 * letter, top + (rows + 0.5) * 1.4 * letter
    ImageDraw.Draw(plate).rectangle((left - letter / 2, top - letter / 2, right, bottom), fill=255)
    draw = ImageDraw.Draw(ink)
    grid = np.array([[x, y] for x in (0, 0.25, 0.5) for y in (0, 0.5, 1)])
    for row in range(rows):
        for column in range(columns):
            if rng.random() < 0.15:
                continue  # a space between words
            origin = np.array([left + column * 0.7 * letter, top + row * 1.4 * letter])
            strokes = origin + grid[rng.permutation(9)[: rng.integers(3, 6)]] * letter
            draw.line([tuple(point) for point in strokes], fill=255, width=max(1, letter // 9))
    light, dark = rng.uniform(0.75, 1), rng.uniform(0, 0.25)
    _stamp(picture, plate, np.full(3, light if rng.random() < 0.7 else dark))
    _stamp(picture, ink, np.full(3, dark if picture[int(top), int(left)].mean() > 0.5 else light))


def _stamp(picture: np.ndarray, mask: Image.Image, colour: np.ndarray) -> None:
    picture[np.asarray(mask) > 0] = colour


def _illumination(rng: np.random.Generator, shape: tuple[int, int]) -> Float[np.ndarray, "H W 1"]:
    """Uneven light, and in some scenes the soft edge of a shadow."""
    field = rng.uniform(0, 0.35) * _noise(rng, (32, 32), 1.8)
    if rng.random() < 0.4:
        y, x = np.mgrid[:32, :32] / 32 - rng.uniform(0.2, 0.8, (2, 1, 1))
        across = y * rng.normal() + x * rng.normal()
        field = field - rng.uniform(0.2, 1.0) / (1 + np.exp(-across * rng.uniform(4, 40)))
    light = Image.fromarray(np.exp(field).astype(np.float32))
    return np.asarray(light.resize(shape[::-1], Image.Resampling.BICUBIC))[..., None]


def _developed(
    rng: np.random.Generator, picture: Float[np.ndarray, "H W 3"], size: tuple[int, int]
) -> UInt8[np.ndarray, "H W 3"]:
    """What a good camera makes of it: exposed to use the range, slightly soft, slightly noisy."""
    width, height = size
    # The mean of each square, in two steps: numpy takes four times as long for both axes at once.
    rows = picture.reshape(height, _OVERSAMPLING, -1, 3).mean(axis=1)
    seen = rows.reshape(height, width, _OVERSAMPLING, 3).mean(axis=2)
    # White balance takes most of the light's colour away.
    mean = seen.mean(axis=(0, 1))
    seen *= (mean.mean() / np.maximum(mean, 1e-3)) ** np.float32(rng.uniform(0.6, 1))
    low, high = np.percentile(seen[::2, ::2], (rng.uniform(0.1, 1.5), rng.uniform(98, 99.8)))
    black, white = 0.08 * rng.random() ** 2, 1 - 0.15 * rng.random() ** 2
    exposed = np.clip(black + (seen - np.float32(low)) * np.float32((white - black) / max(high - low, 1e-3)), 0, 1)
    # Half of a picture is darker than about a middle grey; not always the same one, nor is a lens always as sharp.
    middle = np.clip(np.median(exposed[::2, ::2]), 0.05, 0.95)
    toned = exposed ** np.float32(np.clip(np.log(rng.uniform(0.33, 0.5)) / np.log(middle), 0.4, 2.5))
    whole = Image.fromarray((toned * 255 + 0.5).astype(np.uint8))
    whole = whole.filter(ImageFilter.GaussianBlur(rng.uniform(0, 0.5)))
    if rng.random() < 0.5:
        # Firmware sharpens.
        whole = whole.filter(ImageFilter.UnsharpMask(rng.uniform(0.6, 1.2), int(rng.integers(30, 130)), 0))
    pixels = np.asarray(whole, np.float32)
    if rng.random() < 0.08:
        pixels = np.repeat(pixels.mean(axis=2, keepdims=True), 3, axis=2)
    noisy = pixels + np.float32(rng.uniform(0, 2.0)) * rng.standard_normal(pixels.shape, np.float32)
    finished = np.clip(noisy + 0.5, 0, 255).astype(np.uint8)
    return encoded(finished, "JPEG", int(rng.integers(88, 98))) if rng.random() < 0.5 else finished


def _blurred(picture: Float[np.ndarray, "H W 3"], sigma: float) -> Float[np.ndarray, "H W 3"]:
    # Pillow blurs bytes only, with boxes that take as long for any deviation.
    as_bytes = Image.fromarray((np.clip(picture, 0, 1) * 255 + 0.5).astype(np.uint8))
    return np.asarray(as_bytes.filter(ImageFilter.GaussianBlur(sigma)), np.float32) / 255
