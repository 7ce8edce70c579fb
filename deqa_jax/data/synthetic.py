"""`deqa synth`: a dataset of degraded pictures with simulated opinions, in the published layout."""

import contextlib
import dataclasses
import itertools
import json
import logging
import multiprocessing
import os
import signal
import sys
import threading
import warnings
from collections.abc import Generator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from deqa_jax.data.degradations import FAMILIES, Degradation, degrade, named_families, severity
from deqa_jax.data.scenes import scene, scene_size
from deqa_jax.files import new_folder, write_text
from deqa_jax.preprocess import IMAGE_SUFFIXES, ImageError, images_below, load_rgb

SAMPLES_FILE = "samples.png"
LABELS_FILE = "labels.json"
"""The configuration with which `deqa labels` makes metas of the dataset."""

_OBSERVERS = 24
# Longer sides of procedural scenes; pictures of one's own are made no larger than this.
_SIDES = (400, 900)
_LARGEST_SIDE = 1024
# Streams of random numbers, so that a scene is the same whatever else is made.
_SPLIT, _PANEL, _SCENES = range(3)
_SHEET_ROWS, _SHEET_COLUMNS, _TILE = 6, 8, 160

_logger = logging.getLogger(__name__)


class SyntheticError(ValueError):
    """A dataset that cannot be made as asked; the message says why."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SyntheticSettings:
    """What a dataset is made of; with the seed it decides on every pixel and opinion.

    Attributes:
      scenes: how many different scenes.
      versions: pictures of each scene: one as it is, the others degraded.
      families: which degradations to draw from.
      test_ratio: the share of scenes to test on, 0 to 1.
      seed: of everything.

    Raises:
      SyntheticError: one of them is out of its range.
      UnknownFamilyError: a family is none.
    """

    scenes: int = 100
    versions: int = 10
    families: tuple[str, ...] = tuple(FAMILIES)
    test_ratio: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        problems = [
            f"{name} must be at least {least}, not {value}"
            for name, least in (("scenes", 1), ("versions", 1), ("seed", 0))
            if (value := getattr(self, name)) < least
        ]
        if not 0 <= self.test_ratio <= 1:
            problems.append(f"test_ratio must be from 0 to 1, not {self.test_ratio}")
        if problems:
            raise SyntheticError("; ".join(problems))
        named_families(",".join(self.families))


@dataclasses.dataclass(frozen=True)
class _Version:
    name: str
    degradations: tuple[Degradation, ...]


def synthesize(out: Path, settings: SyntheticSettings = SyntheticSettings(), *, source: Path | None = None) -> None:
    """Makes `out/images`, `out/metas/{mos,split,degradations}.json`, a labels configuration and a sheet of samples.

    Args:
      out: the folder to make; may be there if it is empty.
      settings: what to make.
      source: a folder of good pictures to degrade, searched recursively, in place of procedural scenes; as many of them
        as `settings.scenes` says are taken, in an order that depends on the seed.

    Raises:
      FileExistsError: `out` has something in it, or is no folder.
      NoImagesError: `source` has no picture.
      SyntheticError: it has none that can be read, or `out` no name.
      ImageError: a picture could be read at first, and no more when its turn came.
      ChildProcessError: a process that makes pictures was ended from outside.
    """
    if out.name in ("", ".."):
        raise SyntheticError(f"{out}: a dataset goes into a folder of its own; give it a name")
    if os.path.lexists(out) and (out.is_symlink() or not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} exists already and is not an empty folder; remove it or choose another name")
    pictures: Sequence[Path | None] = [None] * settings.scenes
    if source is not None:
        pictures = _readable_pictures(source, settings)
    if out.exists():
        out.rmdir()
    with new_folder(out) as temporary:
        (temporary / "images").mkdir()
        jobs = [(settings, number, picture, temporary / "images") for number, picture in enumerate(pictures)]
        # Closed here, as no process may write into the folder while it is being removed.
        with contextlib.closing(_in_processes(jobs)) as made:
            scenes = list(tqdm(made, total=len(jobs), unit="scene", file=sys.stderr, disable=None))
        _write_opinions(temporary, out, scenes, settings)
    _logger.info("%s: %d images of %d scenes", out, sum(map(len, scenes)), len(scenes))


def _readable_pictures(source: Path, settings: SyntheticSettings) -> list[Path]:
    if not source.is_dir():
        raise SyntheticError(f"{source}: no such folder")
    found = images_below(source)
    order = np.random.default_rng([settings.seed, _SPLIT]).permutation(len(found))
    readable: list[Path] = []
    for path in (found[i] for i in order):
        try:
            _read(path)
        except ImageError as error:
            _logger.warning("%s; left out", error)
            continue
        readable.append(path)
        if len(readable) == settings.scenes:
            break
    if not readable:
        raise SyntheticError(
            f"{source}: no readable pictures in this folder (looked for {', '.join(sorted(IMAGE_SUFFIXES))})"
        )
    return readable


def _read(path: Path) -> Image.Image:
    with warnings.catch_warnings():
        # Pillow refuses what is twice as large as what it warns of.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        return load_rgb(path)


# ---- pictures ---------------------------------------------------------------------------------------------

_Job = tuple[SyntheticSettings, int, Path | None, Path]


def _in_processes(jobs: Sequence[_Job]) -> Generator[list[_Version], None, None]:
    """The scenes in their order, as many at once as there are cores."""
    # Forking would copy the threads of whatever else is loaded.
    context = multiprocessing.get_context("spawn")
    ends, lifeline = context.Pipe(duplex=False)
    workers = min(os.cpu_count() or 1, len(jobs))
    pool = ProcessPoolExecutor(workers, context, initializer=_end_with, initargs=(ends,))
    try:
        # A terminal interrupts all processes at once. These inherit that it does not concern them: their tracebacks
        # would bury what this one says.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        try:
            scenes = pool.map(_write_scene, jobs)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        yield from scenes
        pool.shutdown()
    except BrokenProcessPool as error:
        raise ChildProcessError("a process that makes pictures was ended; is there enough memory for them?") from error
    finally:
        lifeline.close()
        pool.shutdown(cancel_futures=True)
        ends.close()


def _end_with(ends: Connection) -> None:
    """Ends this process at once when nobody has the other end of a pipe: when its parent has enough, or is no more."""

    def wait() -> None:
        with contextlib.suppress(EOFError):
            ends.recv()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _write_scene(job: _Job) -> list[_Version]:
    """Writes all versions of one scene. The scene depends on the seed and its number alone."""
    settings, number, picture, folder = job
    rng = np.random.default_rng([settings.seed, _SCENES, number])
    if picture is None:
        pixels = scene(rng, scene_size(rng, _SIDES))
    else:
        opened = _read(picture)
        opened.thumbnail((_LARGEST_SIDE, _LARGEST_SIDE), Image.Resampling.LANCZOS)
        pixels = np.asarray(opened)
    versions = []
    for version in range(settings.versions):
        chosen = () if version == 0 else _draw_degradations(rng, settings.families)
        kind = "+".join(one.family for one in chosen) or "original"
        name = f"{number:05d}_{version:02d}_{kind}.png"
        Image.fromarray(degrade(rng, pixels, chosen)).save(folder / name, compress_level=1)
        versions.append(_Version(name, chosen))
    return versions


def _draw_degradations(rng: np.random.Generator, families: tuple[str, ...]) -> tuple[Degradation, ...]:
    """One family at any strength, or two or three at less."""
    weights = np.array([FAMILIES[name].weight for name in families])
    count = min(int(rng.choice([1, 2, 3], p=[0.75, 0.2, 0.05])), len(families))
    drawn = rng.choice(len(families), count, replace=False, p=weights / weights.sum())
    most = 1.0 if count == 1 else 0.7
    chosen = sorted((families[i] for i in drawn), key=list(FAMILIES).index)
    return tuple(Degradation(name, round(float(rng.uniform(0, most)), 4)) for name in chosen)


# ---- opinions ---------------------------------------------------------------------------------------------


def panel(
    rng: np.random.Generator, quality: Float[np.ndarray, "N"], observers: int = _OBSERVERS
) -> Int[np.ndarray, "N O"]:
    """What a panel of people answers, each on the five-point scale.

    An observer has a bias, likes or dislikes everything a little, and an inconsistency of their own, as in ITU-T
    P.910's model of subjects (Li & Bampis, Recover subjective quality scores from noisy measurements, DCC 2017).

    Args:
      rng: decides on biases and slips.
      quality: what would be said without either, about 1 to 5.
      observers: how many.

    >>> answers = panel(np.random.default_rng(0), np.array([1.5, 4.5]))
    >>> answers.shape, bool(answers[0].mean() < answers[1].mean())
    ((2, 24), True)
    """
    bias = rng.normal(0, 0.3, observers)
    inconsistency = rng.uniform(0.25, 0.65, observers)
    said = quality[:, None] + bias + inconsistency * rng.standard_normal((len(quality), observers))
    return np.clip(np.rint(said), 1, 5).astype(int)


def _write_opinions(folder: Path, out: Path, scenes: Sequence[Sequence[_Version]], settings: SyntheticSettings) -> None:
    """Writes all but the images into `folder`, which will be `out`."""
    rng = np.random.default_rng([settings.seed, _PANEL])
    versions = list(itertools.chain.from_iterable(scenes))
    # Some scenes please more than others, whatever happens to them.
    appeal = np.repeat(rng.normal(0, 0.1, len(scenes)), [len(scene) for scene in scenes])
    quality = 4.8 - 3.9 * np.array([severity(version.degradations) for version in versions]) + appeal
    answers = panel(rng, quality)
    mos, std = answers.mean(axis=1), answers.std(axis=1, ddof=1)
    order = np.random.default_rng([settings.seed, _SPLIT]).permutation(len(scenes))
    tests = set(order[: round(settings.test_ratio * len(scenes))])
    split: dict[str, list[str]] = {"train": [], "test": []}
    for number, scene_versions in enumerate(scenes):
        split["test" if number in tests else "train"] += [version.name for version in scene_versions]
    scores = {
        version.name: {"mos": round(float(m), 4), "std": round(float(s), 4)}
        for version, m, s in zip(versions, mos, std, strict=True)
    }
    made_by = {version.name: [dataclasses.astuple(one) for one in version.degradations] for version in versions}
    for name, value in (("mos", scores), ("split", split), ("degradations", made_by)):
        write_text(folder / "metas" / f"{name}.json", json.dumps(value, indent=1) + "\n")
    write_text(folder / LABELS_FILE, json.dumps(_labels_config(out), indent=2) + "\n")
    _sheet(folder / "images", scenes, dict(zip(scores, mos, strict=True))).save(folder / SAMPLES_FILE)


def _labels_config(out: Path) -> dict[str, object]:
    """For `deqa labels --config`, run from the same folder; image names start at `out`'s parent."""
    metas = out / "metas"
    paths = {"mos_json": "mos", "split_json": "split", "save_train": "train", "save_test": "test"}
    dataset: dict[str, object] = {key: str(metas / f"{name}.json") for key, name in paths.items()}
    dataset |= {"img_dir": f"{out.name}/images", "density_type": "pdf", "thre_std": 0.2, "thre_diff": 0.1}
    return {"answer": "The quality of the image is {}.", "dataset_params": {"synthetic": dataset}}


# ---- the sheet of samples ---------------------------------------------------------------------------------


def _sheet(images: Path, scenes: Sequence[Sequence[_Version]], mos: dict[str, float]) -> Image.Image:
    """The first few scenes, a row each, from the best version to the worst, with families and opinion below."""
    rows = [sorted(scene_versions, key=lambda version: -mos[version.name]) for scene_versions in scenes[:_SHEET_ROWS]]
    columns = min(_SHEET_COLUMNS, len(rows[0]))
    cell = _TILE + 40
    sheet = Image.new("RGB", (columns * (_TILE + 8), len(rows) * cell), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    for row, versions in enumerate(rows):
        shown = [versions[i] for i in np.linspace(0, len(versions) - 1, columns).round().astype(int)]
        for column, version in enumerate(shown):
            with Image.open(images / version.name) as picture:
                small = picture.convert("RGB")
            small.thumbnail((_TILE, _TILE))
            x, y = column * (_TILE + 8), row * cell
            sheet.paste(small, (x, y + _TILE - small.height))
            kinds = "\n".join(f"{one.family} {one.strength:.2f}" for one in version.degradations[:2]) or "original"
            draw.multiline_text((x, y + _TILE + 1), f"{mos[version.name]:.2f}  {kinds}", "black", font, spacing=0)
    return sheet
