"""`deqa synth`: complete and reproducible datasets in the published layout, and nothing where something went wrong."""

import collections
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.stats import spearmanr

from deqa_jax.data import synthetic
from deqa_jax.data.degradations import FAMILIES, Degradation, UnknownFamilyError, severity
from deqa_jax.data.metas import read_metas
from deqa_jax.data.opinions import read_published
from deqa_jax.data.synthetic import SyntheticError, SyntheticSettings, panel, synthesize
from deqa_jax.labels import label_published
from deqa_jax.preprocess import ImageError, NoImagesError, load_rgb

SMALL = SyntheticSettings(scenes=4, versions=5, seed=1)


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """Small pictures, made by this process; the working directory is a new one."""
    monkeypatch.setattr(synthetic, "_SIDES", (24, 40))
    monkeypatch.setattr(synthetic, "_LARGEST_SIDE", 48)
    monkeypatch.setattr(synthetic, "_in_processes", lambda jobs: (synthetic._write_scene(job) for job in jobs))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def files_below(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def pixels_below(folder):
    """The pixels of every image, by name."""
    found = {}
    for path in sorted(folder.glob("images/*")):
        with Image.open(path) as picture:
            found[path.name] = np.asarray(picture)
    return found


def read(path):
    return json.loads(path.read_text())


def scene_of(name):
    return name.split("_")[0]


# ---- what is made -----------------------------------------------------------------------------------------


def test_a_dataset_is_complete(quick):
    synthesize(Path("D"), SMALL)
    images = pixels_below(quick / "D")
    assert sorted(path.name for path in (quick / "D").iterdir()) == ["images", "labels.json", "metas", "samples.png"]
    assert sorted(path.name for path in (quick / "D" / "metas").iterdir()) == [
        "degradations.json",
        "mos.json",
        "split.json",
    ]
    assert os.listdir(quick) == ["D"]
    assert len(images) == 4 * 5
    assert collections.Counter(map(scene_of, images)) == {f"{number:05d}": 5 for number in range(4)}
    for name, pixels in images.items():
        assert (pixels.ndim, pixels.shape[2], pixels.dtype) == (3, 3, np.uint8)
        assert 24 <= max(pixels.shape) <= 40
        assert pixels.shape == next(one.shape for other, one in images.items() if scene_of(other) == scene_of(name))
    made_by = read(quick / "D" / "metas" / "degradations.json")
    assert list(made_by) == list(read(quick / "D" / "metas" / "mos.json")) == list(images)
    for name, chain in made_by.items():
        kind = name.removesuffix(".png").split("_", 2)[2]
        assert kind == ("+".join(family for family, _ in chain) or "original")
        assert (kind == "original") == (name.split("_")[1] == "00")
        assert all(0 <= strength <= 1 for _, strength in chain)


def test_opinions_are_read_as_published_ones(quick):
    synthesize(Path("D"), SMALL)
    metas = quick / "D" / "metas"
    opinions = read_published(metas / "mos.json", metas / "split.json")
    assert opinions.names == list(pixels_below(quick / "D"))
    assert collections.Counter(opinions.splits) == {"train": 15, "test": 5}
    assert np.all((opinions.mos >= 1) & (opinions.mos <= 5))
    assert np.all((opinions.std >= 0) & (opinions.std <= 1.5))


@pytest.mark.parametrize("out", ["D", "folder/ein Bild 図像", "absolute"])
def test_labels_are_made_of_it_and_images_found_from_its_parent(out, quick):
    out = quick / out if out == "absolute" else Path(out)
    synthesize(out, SMALL)
    label_published(out / "labels.json")
    train, test = (read_metas(out / "metas" / f"{split}.json") for split in ("train", "test"))
    assert (len(train), len(test)) == (15, 5)
    for item in (*train, *test):
        assert load_rgb(out.parent / item.image).width >= 1
        assert 1 <= item.gt_score_norm <= 5
    assert all(item.level_probs is not None and item.conversations is not None for item in train)


@pytest.mark.parametrize(("ratio", "tests"), [(0.0, 0), (0.2, 2), (0.5, 5), (1.0, 10)])
def test_scenes_are_split_not_their_versions(ratio, tests, quick):
    synthesize(Path("D"), SyntheticSettings(scenes=10, versions=2, test_ratio=ratio))
    split = read(quick / "D" / "metas" / "split.json")
    train, test = ({scene_of(name) for name in split[which]} for which in ("train", "test"))
    assert (len(train), len(test), len(train & test)) == (10 - tests, tests, 0)
    assert sorted(split["train"] + split["test"]) == list(pixels_below(quick / "D"))


def test_worse_pictures_are_liked_less(quick):
    synthesize(Path("D"), SyntheticSettings(scenes=20, versions=8))
    scores = read(quick / "D" / "metas" / "mos.json")
    made_by = read(quick / "D" / "metas" / "degradations.json")
    bad = [severity([Degradation(*one) for one in made_by[name]]) for name in scores]
    mos = [entry["mos"] for entry in scores.values()]
    assert spearmanr(bad, mos).statistic < -0.97
    assert min(mos) < 2
    assert min(entry["mos"] for name, entry in scores.items() if "original" in name) > 4


@pytest.mark.parametrize(
    ("scenes", "versions", "size"), [(1, 1, (168, 200)), (2, 3, (504, 400)), (8, 12, (1344, 1200))]
)
def test_samples_show_the_first_scenes_from_the_best_version_to_the_worst(scenes, versions, size, quick, monkeypatch):
    def shade(rng, pixels, chosen):
        return np.full_like(pixels, round(255 - 200 * severity(chosen)))

    monkeypatch.setattr(synthetic, "degrade", shade)
    monkeypatch.setattr(synthetic, "panel", lambda rng, quality: np.repeat(quality[:, None], 24, axis=1))
    synthesize(Path("D"), SyntheticSettings(scenes=scenes, versions=versions))
    with Image.open(quick / "D" / "samples.png") as sheet:
        assert sheet.size == size
        shades = np.int32(sheet.convert("L"))[159::200, 5::168]
    assert (shades[:, 0] == 255).all()
    assert (np.diff(shades, axis=1) <= 0).all()
    worst = [pixels[0, 0, 0] for pixels in pixels_below(quick / "D").values()]
    np.testing.assert_array_equal(shades[:, -1], np.reshape(worst, (scenes, versions)).min(axis=1)[:6])


def test_few_families_are_enough(quick):
    synthesize(Path("D"), SyntheticSettings(scenes=3, versions=12, families=("jpeg",)))
    chains = list(read(quick / "D" / "metas" / "degradations.json").values())
    assert sorted(map(len, chains)) == [0] * 3 + [1] * 33
    assert {family for chain in chains for family, _ in chain} == {"jpeg"}


def test_families_are_drawn_one_to_three_at_once_each_once(quick):
    synthesize(Path("D"), SyntheticSettings(scenes=10, versions=40, families=("haze", "banding", "jpeg", "webp")))
    chains = [chain for chain in read(quick / "D" / "metas" / "degradations.json").values() if chain]
    assert {len(chain) for chain in chains} == {1, 2, 3}
    assert {family for chain in chains for family, _ in chain} == {"haze", "banding", "jpeg", "webp"}
    for chain in chains:
        assert len({family for family, _ in chain}) == len(chain)
        # As they come over a picture: nothing is stored before its haze.
        assert [family for family, _ in chain] == sorted((family for family, _ in chain), key=list(FAMILIES).index)
        assert len(chain) == 1 or max(strength for _, strength in chain) <= 0.7
    # Photographs suffer from compression more often than from haze.
    drawn = collections.Counter(family for chain in chains for family, _ in chain)
    assert drawn["jpeg"] > 2 * drawn["haze"]


# ---- the same again ---------------------------------------------------------------------------------------


def test_processes_make_the_same_bytes_as_one(tmp_path, monkeypatch):
    settings = SyntheticSettings(scenes=3, versions=2, seed=3, families=("gaussian_noise",))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    for folder in ("several", "one"):
        (tmp_path / folder).mkdir()
        monkeypatch.chdir(tmp_path / folder)
        synthesize(Path("D"), settings)
        monkeypatch.setattr(synthetic, "_in_processes", lambda jobs: (synthetic._write_scene(job) for job in jobs))
    several, one = (files_below(tmp_path / folder) for folder in ("several", "one"))
    assert len(several) == 6 + 5
    assert several == one
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before


def test_another_seed_gives_other_pictures_opinions_and_splits(quick):
    for versions, seed in ((1, 1), (1, 2), (3, 1), (3, 2)):
        synthesize(Path(f"D{versions}{seed}"), SyntheticSettings(scenes=10, versions=versions, seed=seed))
    first, second = pixels_below(quick / "D11"), pixels_below(quick / "D12")
    assert list(first) == list(second)
    assert not any(np.array_equal(one, other) for one in first.values() for other in second.values())
    for name in ("mos", "split"):
        assert read(quick / "D11" / "metas" / f"{name}.json") != read(quick / "D12" / "metas" / f"{name}.json")
    chains = [list(read(quick / name / "metas" / "degradations.json").values()) for name in ("D31", "D32")]
    assert chains[0] != chains[1]


def test_a_picture_is_the_same_whatever_else_is_made(quick):
    synthesize(Path("D"), SMALL)
    synthesize(Path("few"), SyntheticSettings(scenes=2, versions=3, seed=1))
    synthesize(Path("blurred"), SyntheticSettings(scenes=4, versions=1, seed=1, families=("gaussian_blur",)))
    all, few, blurred = (pixels_below(quick / name) for name in ("D", "few", "blurred"))
    assert (len(few), len(blurred)) == (6, 4)
    for name, pixels in (few | blurred).items():
        np.testing.assert_array_equal(all[name], pixels)


# ---- pictures of one's own --------------------------------------------------------------------------------


@pytest.fixture
def own(quick):
    """A folder of pictures of all kinds, and of files that are none."""
    rng = np.random.default_rng(0)
    colours = Image.fromarray(rng.integers(0, 256, (60, 90, 3), np.uint8))
    (quick / "own" / "deeper" / "noch tiefer").mkdir(parents=True)
    pictures = {
        "rgb.jpg": colours,
        "UPPER.PNG": colours,
        "grey.png": colours.convert("L"),
        "alpha.png": colours.convert("RGBA"),
        "palette.gif": colours.convert("P"),
        "cmyk.jpg": colours.convert("CMYK"),
        "sixteen.png": Image.fromarray(rng.integers(0, 65536, (30, 20)).astype(np.uint16)),
        "bits.png": colours.convert("1"),
        "thin.png": colours.resize((1, 200)),
        "flat.png": colours.resize((200, 1)),
        "tiny.png": colours.resize((2, 2)),
        "pixel.png": colours.resize((1, 1)),
        "deeper/naïve 図像.png": colours,
        "deeper/noch tiefer/x.webp": colours,
    }
    for name, picture in pictures.items():
        picture.save(quick / "own" / name)
    (quick / "own" / "broken.png").write_bytes((quick / "own" / "grey.png").read_bytes()[:200])
    (quick / "own" / "empty.jpg").write_bytes(b"")
    (quick / "own" / "notes.txt").write_text("not a picture")
    (quick / "own" / "folder.png").mkdir()
    return pictures


def test_pictures_of_all_kinds_are_degraded_and_others_left_out(own, quick, caplog):
    synthesize(Path("D"), SyntheticSettings(versions=3, seed=2), source=Path("own"))
    images = pixels_below(quick / "D")
    assert len({scene_of(name) for name in images}) == len(own)
    assert len(images) == 3 * len(own)
    for pixels in images.values():
        assert (pixels.ndim, pixels.shape[2], pixels.dtype) == (3, 3, np.uint8)
    # None is larger than the limit, none is enlarged.
    assert sorted(pixels.shape[:2] for name, pixels in images.items() if "original" in name) == sorted(
        [(32, 48)] * 9 + [(30, 20), (48, 1), (1, 48), (2, 2), (1, 1)]
    )
    warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warned) == 2
    assert all(any(f"own/{name}: " in message for message in warned) for name in ("broken.png", "empty.jpg"))
    assert all(message.endswith("; left out") for message in warned)
    assert len(read_published(quick / "D/metas/mos.json", quick / "D/metas/split.json").names) == len(images)


def test_originals_are_the_pictures(own, quick):
    synthesize(Path("D"), SyntheticSettings(versions=1), source=Path("own/deeper/noch tiefer"))
    wanted = load_rgb(quick / "own/deeper/noch tiefer/x.webp")
    wanted.thumbnail((48, 48), Image.Resampling.LANCZOS)
    (found,) = pixels_below(quick / "D").values()
    np.testing.assert_array_equal(found, np.asarray(wanted))


def test_which_pictures_are_taken_depends_on_the_seed_alone(own, quick):
    def originals(name, scenes, seed):
        synthesize(Path(name), SyntheticSettings(scenes=scenes, versions=1, seed=seed), source=Path("own"))
        return [pixels.tobytes() for pixels in pixels_below(quick / name).values()]

    first = originals("D", 100, 0)
    assert originals("few", 3, 0) == first[:3]
    other = originals("other", 100, 1)
    assert other != first
    assert sorted(other) == sorted(first)


def test_huge_pictures_are_taken_without_a_warning_up_to_pillows_limit(own, quick, monkeypatch, caplog):
    # Pillow warns of more pixels than this and refuses more than twice as many.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3000)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        synthesize(Path("D"), SyntheticSettings(versions=1), source=Path("own"))
    assert warned == []
    assert len(pixels_below(quick / "D")) == len(own)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    synthesize(Path("E"), SyntheticSettings(versions=1), source=Path("own"))
    assert len(pixels_below(quick / "E")) == 5
    assert "could be decompression bomb" in caplog.text


def test_a_picture_that_goes_away_meanwhile_ends_it(own, quick, monkeypatch):
    def late(jobs):
        (quick / "own" / "grey.png").unlink()
        return (synthetic._write_scene(job) for job in jobs)

    monkeypatch.setattr(synthetic, "_in_processes", late)
    with pytest.raises(ImageError, match=r"grey\.png: no such file"):
        synthesize(Path("D"), SyntheticSettings(versions=1), source=Path("own"))
    assert os.listdir(quick) == ["own"]


@pytest.mark.parametrize(
    ("source", "error", "complaint"),
    [
        ("absent", SyntheticError, "absent: no such folder"),
        ("own/rgb.jpg", SyntheticError, "rgb.jpg: no such folder"),
        ("own/folder.png", NoImagesError, "folder.png: no images in this folder"),
        ("bad", SyntheticError, "bad: no readable pictures in"),
    ],
)
def test_a_source_without_pictures_is_refused(source, error, complaint, own, quick):
    (quick / "bad").mkdir()
    (quick / "own" / "broken.png").rename(quick / "bad" / "broken.png")
    with pytest.raises(error, match=complaint):
        synthesize(Path("D"), SMALL, source=Path(source))
    assert not list(quick.glob("*D*"))


# ---- where it goes ----------------------------------------------------------------------------------------


def test_an_empty_folder_is_filled(quick):
    (quick / "D").mkdir()
    synthesize(Path("D"), SyntheticSettings(scenes=1, versions=1))
    assert len(pixels_below(quick / "D")) == 1


@pytest.mark.parametrize("out", ["full", "file", "link", "dangling"])
def test_a_place_that_is_taken_is_left_alone_before_any_work(out, quick, monkeypatch):
    monkeypatch.setattr(synthetic, "_in_processes", lambda jobs: pytest.fail("made for nothing"))
    (quick / "full").mkdir()
    (quick / "full" / "mine").write_text("mine")
    (quick / "file").write_text("mine")
    (quick / "empty").mkdir()
    (quick / "link").symlink_to("empty")
    (quick / "dangling").symlink_to("nowhere")
    before = sorted(path.name for path in quick.rglob("*"))
    with pytest.raises(FileExistsError, match=f"{out} exists already and is not an empty folder"):
        synthesize(Path(out), SMALL)
    assert sorted(path.name for path in quick.rglob("*")) == before


@pytest.mark.parametrize("out", [".", "..", "/"])
def test_a_place_without_a_name_is_refused(out, quick):
    with pytest.raises(SyntheticError, match="give it a name"):
        synthesize(Path(out), SMALL)
    assert os.listdir(quick) == []


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("at", ["degrade", "_sheet"])
def test_a_failure_leaves_nothing(at, error, quick, monkeypatch):
    honest, calls = getattr(synthetic, at), []

    def fail(*arguments):
        calls.append(arguments)
        if at == "_sheet" or len(calls) == 7:
            raise error
        return honest(*arguments)

    monkeypatch.setattr(synthetic, at, fail)
    with pytest.raises(type(error)):
        synthesize(Path("folder/D"), SMALL)
    assert list((quick / "folder").iterdir()) == []


def test_pictures_are_no_longer_made_when_the_folder_is_removed(quick, monkeypatch):
    """Even if whatever goes wrong does so while no picture is waited for."""
    ended = []

    def in_processes(jobs):
        try:
            yield from map(synthetic._write_scene, jobs)
        finally:
            ended.append(list(quick.glob(".D*")))

    def interrupted(scenes, **_):
        yield next(scenes)
        raise KeyboardInterrupt

    monkeypatch.setattr(synthetic, "_in_processes", in_processes)
    monkeypatch.setattr(synthetic, "tqdm", interrupted)
    with pytest.raises(KeyboardInterrupt):
        synthesize(Path("D"), SMALL)
    assert len(ended) == len(ended[0]) == 1
    assert os.listdir(quick) == []


# ---- processes --------------------------------------------------------------------------------------------


def test_a_process_that_is_ended_from_outside_is_an_error(monkeypatch):
    """As the kernel does when there is no memory left."""
    monkeypatch.setattr(synthetic, "_write_scene", signal.raise_signal)
    with pytest.raises(ChildProcessError, match="is there enough memory"):
        list(synthetic._in_processes([signal.SIGKILL, signal.SIGKILL]))


def test_processes_end_with_the_one_that_started_them(tmp_path):
    """Whatever ended it; nobody else would."""
    program = (
        "from deqa_jax.data.synthetic import *\n"
        "synthesize(Path('D'), SyntheticSettings(scenes=10000, families=('gaussian_noise',)))"
    )
    process = subprocess.Popen([sys.executable, "-c", program], cwd=tmp_path, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob(".D*/images/*")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    # Standard error is at its end when nobody is left that could write there.
    process.communicate(timeout=60)
    assert not (tmp_path / "D").exists()


# ---- settings ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({"scenes": 0}, "scenes must be at least 1, not 0"),
        ({"versions": -1}, "versions must be at least 1, not -1"),
        ({"seed": -1}, "seed must be at least 0, not -1"),
        ({"test_ratio": 1.1}, "test_ratio must be from 0 to 1, not 1.1"),
        ({"test_ratio": float("nan")}, "test_ratio must be from 0 to 1, not nan"),
        ({"scenes": 0, "test_ratio": -1}, "scenes must be at least 1, not 0; test_ratio must be from 0 to 1, not -1"),
    ],
    ids=str,
)
def test_settings_out_of_range_are_all_named(given, complaint):
    with pytest.raises(SyntheticError) as raised:
        SyntheticSettings(**given)
    assert str(raised.value) == complaint


def test_unknown_families_are_named():
    with pytest.raises(UnknownFamilyError, match="no family 'jpg'; there are haze, vignetting, gaussian_blur, "):
        SyntheticSettings(families=("jpeg", "jpg"))
    with pytest.raises(UnknownFamilyError, match="no family named"):
        SyntheticSettings(families=())
    assert SyntheticSettings().families == tuple(FAMILIES)


# ---- the panel --------------------------------------------------------------------------------------------


def test_answers_are_on_the_scale_and_reproducible():
    quality = np.linspace(0.5, 5.5, 50)
    answers = panel(np.random.default_rng(0), quality)
    assert answers.shape == (50, 24)
    assert np.issubdtype(answers.dtype, np.integer)
    assert set(np.unique(answers)) == {1, 2, 3, 4, 5}
    np.testing.assert_array_equal(panel(np.random.default_rng(0), quality), answers)
    assert (panel(np.random.default_rng(1), quality) != answers).any()
    assert panel(np.random.default_rng(0), quality, observers=7).shape == (50, 7)


def test_a_large_panel_agrees_on_the_quality():
    quality = np.array([2.0, 2.3, 2.5, 3.0, 3.4, 4.0])
    answers = panel(np.random.default_rng(0), quality, observers=20_000)
    np.testing.assert_allclose(answers.mean(axis=1), quality, rtol=0, atol=0.04)


def test_opinions_differ_most_in_the_middle_of_the_scale():
    deviations = panel(np.random.default_rng(0), np.array([1.0, 2.0, 3.0, 4.0, 5.0]), observers=5000).std(axis=1)
    assert max(deviations[[0, 4]]) < 0.7 * min(deviations[1:4])
    assert 0.5 < deviations[2] < 0.8


def test_observers_have_a_bias_and_an_inconsistency_of_their_own():
    answers = panel(np.random.default_rng(0), np.full(2000, 3.0), observers=300)
    assert answers.mean(axis=0).std() == pytest.approx(0.3, rel=0.15)
    slips = answers.std(axis=0)
    assert slips.max() > 1.5 * slips.min()
