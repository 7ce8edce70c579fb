"""`deqa evaluate --report`: one page with every set's plots and worst images, and no other file (extra `plots`)."""

import base64
import html
import io
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
import numpy as np
import scipy.special
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from deqa_jax.data.soft_labels import WEIGHTS
from deqa_jax.evaluate import Evaluation, as_table
from deqa_jax.preprocess import ImageError, PreprocessConfig, load_square
from deqa_jax.prompt import LEVELS

_WORST = 12
_THUMBNAIL = PreprocessConfig(size=192, resample=Image.Resampling.BICUBIC, mean=(0.93,) * 3, std=(1.0,) * 3)
_BINS = 10
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .8rem .25rem 0; text-align: left; border-bottom: 1px solid #ddd; white-space: nowrap }
.wide { overflow-x: auto }
.plots { display: flex; flex-wrap: wrap; gap: 1rem }
.plots img { width: 24rem; max-width: 100% }
.worst { display: flex; flex-wrap: wrap; gap: 1rem }
figure { margin: 0; width: 12rem; overflow-wrap: anywhere; font-size: 13px }
figure img { width: 12rem; height: 12rem; display: block }
.none { color: #666 }
"""


def report_page(evaluations: Sequence[Evaluation], *, notes: Sequence[str], root: Path | None) -> str:
    """The page as text.

    Args:
      evaluations: one section each.
      notes: how the numbers were made, a line each.
      root: the folder with the datasets' folders, for thumbnails of the images furthest off; without it there are none.
    """
    sections = "\n".join(_section(evaluation, root) for evaluation in evaluations)
    lines = "".join(f"<li>{html.escape(note)}</li>" for note in notes)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>DeQA-Score: evaluation</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>Evaluation of {len(evaluations)} {"set" if len(evaluations) == 1 else "sets"}</h1>
<div class="wide">{as_table(evaluations, "html")}</div>
<ul>{lines}</ul>
{sections}
</body>
</html>
"""


def _section(evaluation: Evaluation, root: Path | None) -> str:
    predictions = evaluation.predictions
    plots = [_plot("Prediction against opinion", lambda axes: _scatter(axes, evaluation))]
    if predictions.gt_mean is None or predictions.gt_std is None:
        plots.append('<p class="none">Its metas have no standard deviations to compare with.</p>')
    else:
        human = predictions.gt_mean, predictions.gt_std
        plots.append(_plot("Standard deviation", lambda axes: _deviations(axes, predictions.std, human[1])))
        plots.append(_plot("Calibration", lambda axes: _calibration(axes, predictions.probs, *human)))
    worst = "" if root is None else f"<h3>Furthest off</h3>{_thumbnails(evaluation, root)}"
    title = f"{html.escape(predictions.name)}: {len(predictions.items)} images"
    return f'<section><h2>{title}</h2><div class="plots">{"".join(plots)}</div>{worst}</section>'


# ---- plots ------------------------------------------------------------------------------------------------


def _plot(title: str, draw: Callable[[Axes], None]) -> str:
    figure = Figure(figsize=(4.8, 4.2), layout="constrained")
    axes = figure.add_subplot()
    draw(axes)
    axes.set_title(title)
    axes.spines[["top", "right"]].set_visible(False)
    content = io.BytesIO()
    # Without a salt, names inside the SVG are random.
    with matplotlib.rc_context({"svg.hashsalt": "deqa"}):
        figure.savefig(content, format="svg", dpi=150, metadata={"Date": None})
    return f'<img class="plot" alt="{html.escape(title)}" src="{_data_uri("image/svg+xml", content.getvalue())}">'


def _points(axes: Axes, x: Float[np.ndarray, "N"], y: Float[np.ndarray, "N"]) -> None:
    # As pixels: ten thousand shapes would make the page slow.
    axes.scatter(x, y, s=6, alpha=0.35, linewidths=0, rasterized=True)


def _scatter(axes: Axes, evaluation: Evaluation) -> None:
    predictions = evaluation.predictions
    _points(axes, predictions.mean, predictions.gt_score)
    if evaluation.curve is not None:
        line = np.linspace(predictions.mean.min(), predictions.mean.max(), 200)
        axes.plot(line, evaluation.curve(line), color="C3", label="fitted curve")
        axes.legend()
    axes.set(xlabel="predicted score", ylabel="mean opinion score")


def _deviations(axes: Axes, predicted: Float[np.ndarray, "N"], human: Float[np.ndarray, "N"]) -> None:
    _points(axes, predicted, human)
    ends = [0, max(predicted.max(), human.max())]
    axes.plot(ends, ends, color="0.6", linestyle="--")
    axes.set(xlabel="predicted std", ylabel="std of opinions (1 to 5)")


def _calibration(
    axes: Axes, probs: Float[np.ndarray, "N 5"], mean: Float[np.ndarray, "N"], std: Float[np.ndarray, "N"]
) -> None:
    """Where the model says p of a level, what share do people give it?"""
    human = _level_shares(mean, std)
    bins = np.minimum((probs * _BINS).astype(int), _BINS - 1)
    for index, level in enumerate(LEVELS):
        filled = [bins[:, index] == number for number in np.unique(bins[:, index])]
        x = [probs[rows, index].mean() for rows in filled]
        y = [human[rows, index].mean() for rows in filled]
        axes.plot(x, y, marker="o", markersize=3, label=level)
    axes.plot([0, 1], [0, 1], color="0.6", linestyle="--")
    axes.legend()
    axes.set(xlabel="predicted probability of a level", ylabel="its share of opinions")


def _level_shares(mean: Float[np.ndarray, "N"], std: Float[np.ndarray, "N"]) -> Float[np.ndarray, "N 5"]:
    """Mass of the opinions' Gaussian around each level, the outermost open: sums to 1."""
    borders = (WEIGHTS[:-1] + WEIGHTS[1:]) / 2
    below = scipy.special.ndtr((borders - mean[:, None]) / np.maximum(std, 1e-6)[:, None])
    ends = np.ones((len(mean), 1)), below, np.zeros((len(mean), 1))
    return -np.diff(np.concatenate(ends, axis=1), axis=1)


# ---- thumbnails -------------------------------------------------------------------------------------------


def _thumbnails(evaluation: Evaluation, root: Path) -> str:
    predictions = evaluation.predictions
    off = _distance(evaluation)
    figures = []
    for index in np.argsort(-off, kind="stable")[:_WORST]:
        item = predictions.items[index]
        caption = (
            f"{html.escape(item.image)}<br>predicted {predictions.mean[index]:.2f} ± {predictions.std[index]:.2f}, "
            f"opinion {predictions.gt_score[index]:.4g}"
        )
        figures.append(f"<figure>{_thumbnail(root / item.image)}<figcaption>{caption}</figcaption></figure>")
    return f'<div class="worst">{"".join(figures)}</div>'


def _distance(evaluation: Evaluation) -> Float[np.ndarray, "N"]:
    """How far each prediction is from its opinion: on the scale of the opinions with a curve, from 1 to 5 without."""
    predictions = evaluation.predictions
    if evaluation.curve is not None:
        return np.abs(evaluation.curve(predictions.mean) - predictions.gt_score)
    truth = predictions.gt_score if predictions.gt_mean is None else predictions.gt_mean
    return np.abs(predictions.mean - truth)


def _thumbnail(path: Path) -> str:
    try:
        with warnings.catch_warnings():
            # Pillow refuses what is twice as large as what it warns of.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            pixels = load_square(path, _THUMBNAIL)
    except ImageError as error:
        return f'<p class="none">{html.escape(str(error))}</p>'
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, format="JPEG", quality=85)
    return f'<img class="thumbnail" alt="" src="{_data_uri("image/jpeg", content.getvalue())}">'


def _data_uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
