"""Draws what `deqa bench --json` measured: images per second by batch size, and where the time of an image goes.

    deqa bench --size small,mid --batch-size 1,4,8 --json > cpu.json
    python benchmarks/plot.py cpu.json --output cpu.png

Several files are drawn side by side, to compare machines or versions. Needs the extra `plots`.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from deqa_jax.bench import STAGES, precision
from deqa_jax.config import ConfigError
from deqa_jax.files import read_json, refuse_existing


class Point(NamedTuple):
    """One row of one file.

    Attributes:
      series: what it is of: device, model, dtype and kernels; of several files, which one too.
      batch_size: images at once.
      images_per_second: of the model alone.
      milliseconds: an image, by stage.
    """

    series: str
    batch_size: int
    images_per_second: float
    milliseconds: dict[str, float]


def read_points(paths: Sequence[Path]) -> list[Point]:
    """Rows with figures. Raises `ConfigError` if a file is not what `deqa bench --json` prints, or has none."""
    points = []
    for path in paths:
        written = read_json(path)
        try:
            name = f"{path.stem}: " * (len(paths) > 1) + written["machine"]["device"]
            points += [_point(name, row) for row in written["rows"] if row["error"] is None]
        except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
            raise ConfigError(f"{path}: not the output of `deqa bench --json` ({error!r})") from error
    if not points:
        raise ConfigError(f"{', '.join(map(str, paths))}: no row has figures")
    return points


def _point(name: str, row: dict[str, Any]) -> Point:
    batch_size, rate = int(row["batch_size"]), float(row["images_per_second"])
    milliseconds = {stage: 1e3 * float(row["seconds"][stage]["median"]) / batch_size for stage in STAGES}
    if not all(0 < number < math.inf for number in (batch_size, rate, *milliseconds.values())):
        raise ValueError("a figure that none can be")
    return Point(f"{name}, {row['model']}, {precision(row)}", batch_size, rate, milliseconds)


def draw(points: Sequence[Point], output: Path) -> None:
    """Writes the picture."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 5), layout="constrained")
    rates, stages = figure.subplots(1, 2, width_ratios=(2, 3))
    for series in dict.fromkeys(point.series for point in points):
        own = sorted((point for point in points if point.series == series), key=lambda point: point.batch_size)
        rates.plot([p.batch_size for p in own], [p.images_per_second for p in own], marker="o", label=series)
    rates.set(xscale="log", yscale="log", xlabel="batch size", ylabel="images/s, model alone")
    sizes = sorted({point.batch_size for point in points})
    rates.set_xticks(sizes, labels=map(str, sizes))
    rates.minorticks_off()
    rates.legend()

    names = [f"{point.series}\nbatch {point.batch_size}" for point in points]
    places = range(len(points))
    bottom = [0.0] * len(points)
    for stage in STAGES:
        heights = [point.milliseconds[stage] for point in points]
        stages.bar(places, heights, bottom=bottom, label=stage)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    stages.set_xticks(places, labels=names, rotation=30, ha="right")
    stages.set(ylabel="ms an image, each stage by itself")
    stages.legend()
    figure.savefig(output, format="png")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the script. Exits with 0, or with 2 if what it is given is of no use."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measured", nargs="+", type=Path, metavar="F", help="output of `deqa bench --json`")
    parser.add_argument("--output", required=True, type=Path, metavar="PNG", help="picture to write; must not exist")
    options = parser.parse_args(arguments)
    try:
        refuse_existing(options.output)
        draw(read_points(options.measured), options.output)
    except ModuleNotFoundError as error:
        sys.exit(f"{error}; plots need an extra: pip install 'deqa-jax[plots]'")
    except (ConfigError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
