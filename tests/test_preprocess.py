"""Images to pixels: the published numbers exactly, and an error that names the file for everything unreadable."""

import hashlib
import io
import json
import os
import re
import warnings
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from deqa_jax import preprocess
from deqa_jax.config import ConfigError
from deqa_jax.preprocess import ImageError, PreprocessConfig, load_rgb, load_square, normalize

SMALL = PreprocessConfig(size=32, resample=3, mean=(0.48, 0.45, 0.4), std=(0.27, 0.26, 0.28))
RASTER_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")


@pytest.fixture(scope="session")
def config(side_files):
    return PreprocessConfig.from_published(json.loads(side_files["preprocessor_config.json"]))


def picture(width=30, height=20, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def naive_square(image, config):
    """Pads the whole square, then resizes it: what the published code does."""
    rgb = image.convert("RGB")
    side = max(rgb.size)
    square = Image.new("RGB", (side, side), tuple(int(255 * m) for m in config.mean))
    square.paste(rgb, ((side - rgb.width) // 2, (side - rgb.height) // 2))
    return np.asarray(square.resize((config.size, config.size), config.resample))


def normalized(square, config):
    colours = np.float32(square / 255)
    return (colours - np.float32(config.mean)) / np.float32(config.std)


def pixel_hash(path, config):
    channels_first = normalized(load_square(path, config), config).transpose(2, 0, 1)
    assert channels_first.shape == (3, 448, 448)
    assert channels_first.dtype == np.float32
    return hashlib.sha256(np.ascontiguousarray(channels_first).tobytes()).hexdigest()


# ---- the published pixels ---------------------------------------------------------------------------------


def test_golden_images_have_the_published_pixels(golden, images, config):
    expected = dict(zip(golden[0]["images"], golden[0]["pixel_sha256"], strict=True))
    assert len(expected) == 13
    assert {name: pixel_hash(images / name, config) for name in expected} == expected


def test_photographs_have_the_published_pixels(shared, config):
    photos = json.loads((shared / "photos" / "forward.json").read_text())
    expected = dict(zip(photos["images"], photos["pixel_sha256"], strict=True))
    assert {name: pixel_hash(shared / "photos" / name, config) for name in expected} == expected


def test_the_padding_is_the_published_colour(config):
    assert config.fill == (122, 116, 104)
    square = load_square(Image.new("RGB", (30, 10)), config)
    np.testing.assert_array_equal(square[[0, -1]], np.broadcast_to(np.uint8([122, 116, 104]), (2, 448, 3)))


def test_normalize_on_the_device_agrees_with_float32_on_the_host(config):
    every_value = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 3, axis=1).reshape(2, 16, 8, 3)
    found = normalize(jnp.asarray(every_value), config)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, normalized(every_value, config), rtol=0, atol=1e-6)


@settings(deadline=None)
@given(
    width=st.integers(1, 300),
    height=st.integers(1, 300),
    block_pixels=st.integers(1, 100_000),
    resample=st.sampled_from(list(Image.Resampling)),
    seed=st.integers(0, 9),
)
@example(width=1, height=2000, block_pixels=30_000, resample=Image.Resampling.BICUBIC, seed=0)
@example(width=2000, height=3, block_pixels=4000, resample=Image.Resampling.BICUBIC, seed=0)
@example(width=257, height=256, block_pixels=257, resample=Image.Resampling.LANCZOS, seed=0)
@example(width=1, height=1, block_pixels=1, resample=Image.Resampling.BICUBIC, seed=0)
def test_padding_by_blocks_equals_resizing_the_whole_padded_square(width, height, block_pixels, resample, seed):
    config = PreprocessConfig(size=33, resample=resample, mean=SMALL.mean, std=SMALL.std)
    image = picture(width, height, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preprocess, "_BLOCK_PIXELS", block_pixels)
        np.testing.assert_array_equal(load_square(image, config), naive_square(image, config))


@pytest.mark.parametrize("size", [(60_000, 4), (4, 12_000)], ids=str)
def test_a_panorama_needs_no_giant_square(size, config, monkeypatch):
    image = Image.new("RGB", size, (10, 200, 90))
    make = Image.new

    def bounded(mode, size, *arguments):
        assert size[0] * size[1] < 1 << 25, f"{size} is {4 * size[0] * size[1] >> 20} MiB"
        return make(mode, size, *arguments)

    monkeypatch.setattr(Image, "new", bounded)
    assert load_square(image, config).shape == (448, 448, 3)


def test_an_image_longer_than_any_photograph_is_refused_before_it_is_decoded(config, tmp_path):
    path = tmp_path / "long.png"
    Image.new("RGB", (1_000_000, 2)).save(path)
    # What follows the header is damaged, which nobody finds out.
    path.write_bytes(path.read_bytes()[:64])
    for image, name in ((path, r"long\.png"), (Image.new("RGB", (1_000_000, 2)), "an image")):
        with pytest.raises(ImageError, match=f"{name}: 1000000x2 pixels; a side of more than 65536 is refused"):
            load_square(image, config)


# ---- kinds of images --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [("1", "png"), ("L", "png"), ("LA", "png"), ("P", "png"), ("RGB", "png"), ("RGBA", "png"), ("CMYK", "tif")],
)
def test_every_mode_is_read_from_files_and_from_memory(mode, suffix, tmp_path):
    image = picture().convert(mode)
    image.save(tmp_path / f"x.{suffix}")
    expected = naive_square(image, SMALL)
    np.testing.assert_array_equal(load_square(image, SMALL), expected)
    np.testing.assert_array_equal(load_square(tmp_path / f"x.{suffix}", SMALL), expected)


def test_sixteen_bits_are_read_from_files_and_from_memory(tmp_path):
    image = Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30) * 100)
    assert image.mode == "I;16"
    image.save(tmp_path / "x.png")
    expected = naive_square(image, SMALL)
    np.testing.assert_array_equal(load_square(image, SMALL), expected)
    np.testing.assert_array_equal(load_square(tmp_path / "x.png", SMALL), expected)


@pytest.mark.parametrize("transparency", [3, bytes(range(256))], ids=["one colour", "alpha by colour"])
def test_transparent_colours_of_a_palette_are_dropped(transparency, tmp_path):
    image = picture().convert("P")
    expected = naive_square(image, SMALL)
    image.save(tmp_path / "x.png", transparency=transparency)
    np.testing.assert_array_equal(load_square(tmp_path / "x.png", SMALL), expected)
    with Image.open(tmp_path / "x.png") as opened:
        assert "transparency" in opened.info
        np.testing.assert_array_equal(load_square(opened, SMALL), expected)


def test_alpha_is_dropped_not_blended():
    opaque = picture()
    transparent = opaque.copy()
    transparent.putalpha(0)
    np.testing.assert_array_equal(load_square(transparent, SMALL), load_square(opaque, SMALL))


def test_a_mode_that_has_no_colours_to_give_is_an_image_error():
    with pytest.raises(ImageError, match="La"):
        load_square(Image.new("La", (3, 3)), SMALL)


def test_path_content_image_and_array_of_one_picture_give_the_same_pixels(tmp_path):
    image = picture()
    path = tmp_path / "x.png"
    image.save(path)
    expected = naive_square(image, SMALL)
    for given_as in (path, str(path), path.read_bytes(), image, np.asarray(image)):
        np.testing.assert_array_equal(load_square(given_as, SMALL), expected)


def test_grey_and_four_channel_arrays_are_read():
    rgb = np.asarray(picture())
    grey = rgb[..., 0]
    expected = naive_square(Image.fromarray(grey), SMALL)
    np.testing.assert_array_equal(load_square(grey, SMALL), expected)
    np.testing.assert_array_equal(load_square(grey[..., None], SMALL), expected)
    with_alpha = np.concatenate([rgb, grey[..., None]], axis=-1)
    np.testing.assert_array_equal(load_square(with_alpha, SMALL), naive_square(Image.fromarray(rgb), SMALL))


def test_arrays_that_do_not_own_their_rows_are_read():
    rgb = np.asarray(picture())
    expected = load_square(np.ascontiguousarray(rgb[::-1, ::2]), SMALL)
    np.testing.assert_array_equal(load_square(rgb[::-1, ::2], SMALL), expected)


@pytest.mark.parametrize(
    ("dtype", "shape"),
    [
        ("float32", (20, 30, 3)),
        ("int64", (20, 30, 3)),
        ("uint8", (20, 30, 2)),
        ("uint8", (3, 20, 30)),
        ("uint8", (2, 20, 30, 3)),
        ("uint8", (30,)),
        ("uint8", ()),
        ("uint8", (0, 30, 3)),
    ],
)
def test_other_arrays_are_refused_with_their_shape(dtype, shape):
    with pytest.raises(ImageError, match=re.escape(f"{dtype} {list(shape)}")):
        load_square(np.zeros(shape, dtype), SMALL)


@pytest.mark.parametrize(
    ("suffix", "enough", "size"),
    [("jpg", None, (400, 240)), ("jpg", 60, (100, 60)), ("jpg", 61, (200, 120)), ("jpg", 999, (400, 240)),
     ("png", 60, (400, 240))],
)  # fmt: skip
def test_a_jpeg_of_which_less_is_enough_comes_smaller(suffix, enough, size, tmp_path):
    path = tmp_path / f"x.{suffix}"
    Image.linear_gradient("L").resize((400, 240)).convert("RGB").save(path, quality=95)
    whole, found = load_rgb(path), load_rgb(path, enough=enough)
    assert whole.size == (400, 240)
    assert found.size == size
    assert found.mode == "RGB"
    difference = np.int32(found.resize((40, 24), Image.Resampling.BOX)) - whole.resize((40, 24), Image.Resampling.BOX)
    assert np.abs(difference).max() <= 3


def test_exif_orientation_is_ignored(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turned by a quarter
    picture().save(tmp_path / "plain.jpg")
    picture().save(tmp_path / "turned.jpg", exif=exif)
    with Image.open(tmp_path / "turned.jpg") as opened:
        assert opened.getexif()[0x0112] == 6
    np.testing.assert_array_equal(
        load_square(tmp_path / "turned.jpg", SMALL), load_square(tmp_path / "plain.jpg", SMALL)
    )


def test_the_first_frame_of_several_is_scored(tmp_path):
    first, second = Image.new("RGB", (20, 20), (255, 0, 0)), Image.new("RGB", (20, 20), (0, 0, 255))
    for name, format in (("x.gif", "GIF"), ("x.jpg", "MPO")):
        first.save(tmp_path / name, format=format, save_all=True, append_images=[second])
        red, _, blue = load_square(tmp_path / name, SMALL)[16, 16]
        assert red > 250
        assert blue < 5


# ---- what cannot be read ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["truncated.jpg", "empty.png", "not_an_image.jpg"])
def test_damaged_files_are_named(name, images):
    with pytest.raises(ImageError, match=re.escape(str(images / name))):
        load_square(images / name, SMALL)


@pytest.mark.parametrize(
    ("name", "reason"),
    [("truncated.jpg", "truncated"), ("empty.png", "empty file$"), ("not_an_image.jpg", "not an image ")],
)
def test_damaged_content_is_told_apart_without_a_name(name, reason, images):
    content = (images / name).read_bytes()
    with pytest.raises(ImageError, match=f"^an image: .*{reason}") as caught:
        load_square(content, SMALL)
    with pytest.raises(ImageError) as same:
        load_square(images / name, SMALL)
    assert str(caught.value) == str(same.value).replace(str(images / name), "an image")


def test_content_is_not_taken_for_a_path(images):
    """Python's own functions take the bytes of a path."""
    with pytest.raises(ImageError, match=r"^an image: not an image"):
        load_square(os.fsencode(images / "gray.png"), SMALL)


def test_a_missing_file_and_a_folder_are_told_apart(tmp_path):
    with pytest.raises(ImageError, match=r"absent\.png: no such file"):
        load_square(tmp_path / "absent.png", SMALL)
    with pytest.raises(ImageError, match=f"{tmp_path.name}: is a folder"):
        load_square(tmp_path, SMALL)


@pytest.mark.parametrize(
    "name", ["file.txt/x.png", "x" * 300, "loop.png", "a\0b.png"], ids=["in a file", "long", "loop", "nul"]
)
def test_paths_that_cannot_exist_are_image_errors(name, tmp_path):
    (tmp_path / "file.txt").write_text("")
    (tmp_path / "loop.png").symlink_to("loop.png")
    with pytest.raises(ImageError, match=re.escape(name)):
        load_square(str(tmp_path / name), SMALL)


def test_formats_that_need_other_programs_are_not_read(tmp_path):
    path = tmp_path / "x.png"
    picture().save(path, format="EPS")
    with pytest.raises(ImageError, match=r"x\.png: not an image"):
        load_square(path, SMALL)
    with pytest.raises(ImageError, match="an image: not an image"):
        load_square(path.read_bytes(), SMALL)


def test_a_decompression_bomb_is_refused(tmp_path, monkeypatch):
    picture().save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ImageError, match=r"bomb\.png: .*limit"):
        load_square(tmp_path / "bomb.png", SMALL)
    with pytest.raises(ImageError, match=r"an image: .*limit"):
        load_square((tmp_path / "bomb.png").read_bytes(), SMALL)


def test_nothing_is_decoded_above_ones_own_limit(tmp_path):
    path = tmp_path / "large.png"
    picture().save(path)
    width, height = picture().size
    # What follows the header is damaged, which nobody finds out.
    path.write_bytes(path.read_bytes()[:64])
    for image, name in ((path, r"large\.png"), (picture(), "an image"), (np.asarray(picture()), "an image")):
        with pytest.raises(ImageError, match=rf"{name}: {width}x{height} pixels; the limit is .* megapixels"):
            load_square(image, SMALL, most_pixels=width * height - 1)
    np.testing.assert_array_equal(
        load_square(picture(), SMALL, most_pixels=width * height), load_square(picture(), SMALL)
    )


def test_an_image_that_turns_out_truncated_in_memory_is_an_image_error(images):
    with Image.open(images / "truncated.jpg") as opened, pytest.raises(ImageError):
        load_square(opened, SMALL)


def test_an_image_without_pixels_is_an_image_error():
    with pytest.raises(ImageError, match="0x5"):
        load_square(Image.new("RGB", (0, 5)), SMALL)


@pytest.fixture(scope="session")
def encoded():
    """A small picture in every format."""
    files = {}
    for name in RASTER_FORMATS:
        file = io.BytesIO()
        picture().save(file, format=name)
        files[name] = file.getvalue()
    return files


def test_every_format_that_a_folder_is_searched_for_is_read(encoded, tmp_path):
    Image.init()
    formats = {Image.EXTENSION[suffix] for suffix in preprocess.IMAGE_SUFFIXES}
    assert formats == set(RASTER_FORMATS)
    for name, content in encoded.items():
        (tmp_path / name).write_bytes(content)
        square = load_square(tmp_path / name, SMALL)
        assert square.shape == (32, 32, 3)
        np.testing.assert_array_equal(load_square(content, SMALL), square)


def pixels_or_error(image):
    try:
        return load_square(image, SMALL)
    except ImageError as error:
        return str(error)


@settings(deadline=None, max_examples=500)
@given(
    format=st.sampled_from(("PNG", "JPEG", *RASTER_FORMATS)),
    edits=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=8),
    kept=st.one_of(st.just(1.0), st.floats(0, 1)),
)
def test_corrupted_files_give_pixels_or_an_image_error(format, edits, kept, encoded, tmp_path_factory):
    content = bytearray(encoded[format])
    for where, value in edits:
        content[int(where * len(content))] = value
    path = tmp_path_factory.getbasetemp() / "corrupted.image"
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        # Lest a corrupted width fill the memory; and some decoders only warn of what they skip.
        patch.setattr(Image, "MAX_IMAGE_PIXELS", 50_000)
        warnings.simplefilter("ignore")
        outcome, of_content = pixels_or_error(path), pixels_or_error(path.read_bytes())
    if isinstance(outcome, str):
        assert str(path) in outcome
        assert of_content == outcome.replace(str(path), "an image", 1)
    else:
        assert outcome.shape == (32, 32, 3)
        np.testing.assert_array_equal(of_content, outcome)


# ---- preprocessor_config.json -----------------------------------------------------------------------------

PUBLISHED = {
    "size": 448,
    "crop_size": 448,
    "do_normalize": True,
    "image_mean": [0.48, 0.45, 0.4],
    "image_std": [0.27, 0.26, 0.28],
    "resample": 3,
}


@pytest.mark.parametrize("size", [448, {"shortest_edge": 448}, {"height": 448, "width": 448}], ids=str)
@pytest.mark.parametrize("crop_size", [448, {"height": 448, "width": 448}], ids=str)
def test_size_is_read_in_every_way_it_is_written(size, crop_size):
    config = PreprocessConfig.from_published({**PUBLISHED, "size": size, "crop_size": crop_size})
    assert config == PreprocessConfig(size=448, resample=3, mean=(0.48, 0.45, 0.4), std=(0.27, 0.26, 0.28))


def test_another_preprocessing_is_refused_naming_every_difference():
    with pytest.raises(ConfigError) as caught:
        PreprocessConfig.from_published(
            {"size": 448, "crop_size": 336, "do_normalize": False, "image_std": [1, 1, 1], "resample": 77}
        )
    for part in ("preprocessor_config.json", "do_normalize", "448", "336", "image_mean", "resample: 77"):
        assert part in str(caught.value)
    assert "image_std" not in str(caught.value)


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("do_resize", False),
        ("do_center_crop", False),
        ("do_rescale", False),
        ("do_convert_rgb", False),
        ("rescale_factor", 1 / 127.5),
        ("size", {"height": 448, "width": 336}),
        ("size", None),
        ("size", "448"),
        ("size", [448, 448]),
        ("size", 0),
        ("crop_size", {}),
        ("crop_size", {"height": [448]}),
        ("resample", None),
        ("resample", "bicubic"),
        ("resample", [3]),
        ("resample", 3.0),
        ("image_mean", [0.5, 0.5]),
        ("image_mean", 0.5),
        ("image_mean", ["a", "b", "c"]),
        ("image_mean", [float("nan"), 0.5, 0.5]),
        ("image_std", [0.5, 0.5, 0.0]),
        ("image_std", None),
    ],
    ids=repr,
)
def test_an_unusable_entry_is_refused_by_name(entry, value):
    with pytest.raises(ConfigError, match=entry):
        PreprocessConfig.from_published({**PUBLISHED, entry: value})


@pytest.mark.parametrize("entry", ["size", "crop_size", "resample", "image_mean", "image_std"])
def test_a_missing_entry_is_refused_by_name(entry):
    with pytest.raises(ConfigError, match=entry):
        PreprocessConfig.from_published({key: value for key, value in PUBLISHED.items() if key != entry})


def test_the_published_file_is_read(shared):
    published = json.loads((Path(shared) / "tokenizer" / "preprocessor_config.json").read_text())
    assert PreprocessConfig.from_published(published) == PreprocessConfig(
        size=448,
        resample=Image.Resampling.BICUBIC,
        mean=(0.48145466, 0.4578275, 0.40821073),
        std=(0.26862954, 0.26130258, 0.27577711),
    )
