"""The report: what its page says and shows, by itself and in a browser."""

import base64
import dataclasses
import html
import io
import json
import math
import re
import sys
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
from browser import find_browser, open_page
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from deqa_jax import report
from deqa_jax.cli import main
from deqa_jax.data.datasets import DATASETS
from deqa_jax.data.metas import Item
from deqa_jax.evaluate import METRICS, Evaluation, Predictions, evaluate
from deqa_jax.prompt import LEVELS
from deqa_jax.report import report_page

WEIGHTS = np.array([5.0, 4.0, 3.0, 2.0, 1.0])
POLICY = (
    '<meta http-equiv="Content-Security-Policy" '
    "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">"
)
DATA_URI = re.compile(r'"data:(image/[a-z+]+);base64,([A-Za-z0-9+/=]+)"')
PLOTS = ["Prediction against opinion", "Standard deviation", "Calibration"]
# Runs where it gets, and says so, if it is not escaped.
MARKUP = "<img src=x onerror=\"window.ran='markup'\"><script>window.ran='script'</script>&amp;'"


def made(name: str = "toy", count: int = 16, seed: int = 0, images: list[str] | None = None) -> Predictions:
    """A set whose predictions go with its opinions more or less."""
    generator = np.random.default_rng(seed)
    logits = generator.normal(0, 2, (count, 5))
    probs = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    mean = probs @ WEIGHTS
    gt_mean = mean + generator.normal(0, 0.3, count)
    names = images or [f"X/{number}.png" for number in range(count)]
    return Predictions(
        name=name,
        items=[Item(id=str(number), image=names[number]) for number in range(count)],
        probs=probs,
        mean=mean,
        std=np.sqrt((probs * (WEIGHTS - mean[:, None]) ** 2).sum(axis=1)),
        gt_score=20 * gt_mean,
        gt_mean=gt_mean,
        gt_std=generator.uniform(0.2, 1, count),
        dataset=None,
    )


def evaluation(predictions: Predictions, fit: str = "4") -> Evaluation:
    return evaluate(predictions, fit=fit, resamples=20)


def page_of(*evaluations: Evaluation, root: Path | None = None, notes: tuple[str, ...] = ()) -> str:
    return report_page(evaluations, notes=notes, root=root)


class Read(HTMLParser):
    """Text of headings, cells and captions, and attributes of every tag; complains of tags that do not match."""

    VOID = ("meta", "img", "br")

    def __init__(self, page: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self._open: list[str] = []
        self.feed(page)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self._open.append(tag)
            self.texts.append((tag, ""))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open:
            self.texts[-1] = (self.texts[-1][0], self.texts[-1][1] + data)

    def all(self, tag: str) -> list[str]:
        return [text.strip() for name, text in self.texts if name == tag]

    def images(self, kind: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag == "img" and attributes.get("class") == kind]


def pixels_of(image: dict[str, str | None]) -> np.ndarray:
    found = DATA_URI.fullmatch(f'"{image["src"]}"')
    assert found is not None
    assert found[1] == "image/jpeg"
    with Image.open(io.BytesIO(base64.b64decode(found[2]))) as opened:
        return np.asarray(opened)


@pytest.fixture
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take a while."""
    monkeypatch.setattr(report, "_plot", lambda title, draw: "")


# ---- the page by itself -----------------------------------------------------------------------------------


def test_every_set_has_a_section_with_its_name_and_three_plots() -> None:
    found = Read(page_of(evaluation(made("first")), evaluation(made("second", count=9, seed=1))))
    assert found.all("h1") == ["Evaluation of 2 sets"]
    assert found.all("h2") == ["first: 16 images", "second: 9 images"]
    assert [image["alt"] for image in found.images("plot")] == PLOTS * 2
    assert len({image["src"] for image in found.images("plot")}) == 6
    assert found.all("h3") == []


def test_the_page_has_the_table_and_how_it_was_made() -> None:
    known = dataclasses.replace(made("koniq"), dataset=DATASETS["koniq"])
    found_evaluation = evaluation(known)
    found = Read(page_of(found_evaluation, notes=("fit: 4", "seed: <0>")))
    assert found.all("h1") == ["Evaluation of 1 set"]
    assert found.all("li") == ["fit: 4", "seed: <0>"]
    assert found.all("th") == ["set", "n", *(name.upper() for name in METRICS), "paper PLCC/SRCC", "LoRA PLCC/SRCC"]
    cells = found.all("td")
    low, high = found_evaluation.intervals["srcc"]
    assert cells[:3] == ["koniq", "16", f"{found_evaluation.values['srcc']:.4f} [{low:.4f}, {high:.4f}]"]
    assert cells[7:9] == ["0.957/0.944", "0.956/0.944"]


@pytest.mark.parametrize("gone", ["gt_mean", "gt_std"])
def test_without_deviations_there_is_one_plot_and_a_reason(gone: str) -> None:
    page = page_of(evaluation(dataclasses.replace(made(), **{gone: None})))
    found = Read(page)
    assert [image["alt"] for image in found.images("plot")] == PLOTS[:1]
    assert "no standard deviations" in found.all("p")[0]
    assert "nan" not in re.sub(DATA_URI, "", page)


def test_the_same_input_gives_the_same_page(tmp_path: Path) -> None:
    Image.new("RGB", (9, 9), (200, 30, 30)).save(tmp_path / "0.png")
    first, again, other = (
        page_of(evaluation(made(images=["0.png"] * 16, seed=seed)), root=tmp_path, notes=("x",)) for seed in (0, 0, 1)
    )
    assert first == again
    assert first != other


def test_the_page_refers_to_nothing_outside_and_runs_nothing(tmp_path: Path) -> None:
    Image.new("RGB", (9, 9)).save(tmp_path / "0.png")
    page = page_of(evaluation(made(images=["0.png"] * 16)), root=tmp_path)
    assert page.count(POLICY) == 1
    for tag, attributes in Read(page).tags:
        assert tag not in ("script", "link", "iframe", "object", "embed", "base", "form", "a", "svg")
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("href", "srcset", "background", "action", "data", "style"):
            assert name not in attributes
        if "src" in attributes:
            assert tag == "img"
            assert DATA_URI.fullmatch(f'"{attributes["src"]}"')
        assert attributes.get("http-equiv") in (None, "Content-Security-Policy")
    rest = DATA_URI.sub("", page).lower()
    assert "//" not in rest
    assert "url(" not in rest
    assert "@import" not in rest


def test_plots_refer_to_nothing_outside_either() -> None:
    kinds = []
    for kind, content in DATA_URI.findall(page_of(evaluation(made()))):
        kinds.append(kind)
        tree = ET.fromstring(base64.b64decode(content))
        for element in tree.iter():
            assert element.tag.rsplit("}", 1)[-1] not in ("script", "foreignObject", "a", "text")
            for name, value in element.attrib.items():
                if name.endswith("href"):
                    assert value.startswith(("#", "data:image/png;base64,"))
                assert re.findall(r"url\((.)", value) in ([], ["#"])
                assert not name.startswith("on")
            assert "@import" not in (element.text or "")
    assert kinds == ["image/svg+xml"] * 3


def test_markup_in_names_is_text(tmp_path: Path) -> None:
    page = page_of(
        evaluation(made(MARKUP, images=[f"{MARKUP}{number}.png" for number in range(16)])),
        root=tmp_path,
        notes=(MARKUP,),
    )
    found = Read(page)
    assert [tag for tag, _ in found.tags if tag == "script"] == []
    assert len([tag for tag, _ in found.tags if tag == "img"]) == 3
    assert found.all("h2") == [f"{MARKUP}: 16 images"]
    assert found.all("td")[0] == MARKUP
    assert found.all("li") == [MARKUP]
    assert all(text.startswith(MARKUP) for text in found.all("figcaption"))
    assert all(MARKUP in text for text in found.all("p"))


@pytest.mark.usefixtures("no_plots")
def test_names_that_are_not_unicode_are_written_with_escapes(tmp_path: Path) -> None:
    """As a file name, and as one that no file can have."""
    page = page_of(evaluation(made("caf\udce9", images=["x\udce9.png", "y\ud800.png"] * 8)), root=tmp_path)
    written = Read(page.encode(errors="backslashreplace").decode())
    assert written.all("h2") == ["caf\\udce9: 16 images"]
    assert {text[:11] for text in written.all("figcaption")} == {"x\\udce9.png", "y\\ud800.png"}


# ---- what the plots draw ----------------------------------------------------------------------------------


def axes() -> Axes:
    return Figure().add_subplot()


def lines_of(axes: Axes) -> dict[str, np.ndarray]:
    return {str(line.get_label()): np.array(line.get_xydata()) for line in axes.lines}


def test_predictions_are_drawn_against_opinions_with_their_curve() -> None:
    drawn, found = axes(), evaluation(made())
    report._scatter(drawn, found)
    points = np.asarray(drawn.collections[0].get_offsets())
    np.testing.assert_array_equal(points, np.stack([found.predictions.mean, found.predictions.gt_score], 1))
    (line,) = lines_of(drawn).values()
    assert line[:, 0].min() == found.predictions.mean.min()
    assert line[:, 0].max() == found.predictions.mean.max()
    assert found.curve is not None
    np.testing.assert_array_equal(line[:, 1], found.curve(line[:, 0]))
    drawn = axes()
    report._scatter(drawn, evaluation(made(), "none"))
    assert not drawn.lines


def test_deviations_are_drawn_with_the_line_where_they_are_equal() -> None:
    drawn, predicted, human = axes(), np.array([0.1, 0.5, 0.2]), np.array([0.3, 0.4, 1.5])
    report._deviations(drawn, predicted, human)
    np.testing.assert_array_equal(np.asarray(drawn.collections[0].get_offsets()), np.stack([predicted, human], 1))
    (line,) = lines_of(drawn).values()
    assert line.tolist() == [[0, 0], [1.5, 1.5]]


def test_shares_of_levels_are_the_mass_of_the_gaussian_around_them() -> None:
    mean, std = np.array([1.0, 2.3, 3.0, 4.9]), np.array([0.3, 0.9, 1e-3, 2.0])
    shares = report._level_shares(mean, std)
    for row, (m, s) in enumerate(zip(mean, std, strict=True)):
        people = scipy.stats.norm(m, s)
        for column, level in enumerate(WEIGHTS):
            above = math.inf if level == 5 else level + 0.5
            below = -math.inf if level == 1 else level - 0.5
            assert shares[row, column] == pytest.approx(people.cdf(above) - people.cdf(below), abs=1e-12)
    # Of one opinion.
    np.testing.assert_array_equal(report._level_shares(np.array([4.0]), np.array([0.0])), [[0, 1, 0, 0, 0]])


def test_calibration_is_the_mean_of_what_falls_into_a_tenth() -> None:
    drawn, predictions = axes(), made(count=60)
    assert predictions.gt_mean is not None
    assert predictions.gt_std is not None
    probs = predictions.probs.copy()
    probs[0] = [1, 0, 0, 0, 0]  # both ends
    report._calibration(drawn, probs, predictions.gt_mean, predictions.gt_std)
    shares = report._level_shares(predictions.gt_mean, predictions.gt_std)
    lines = lines_of(drawn)
    assert list(lines)[:5] == list(LEVELS)
    for column, level in enumerate(LEVELS):
        tenths: dict[int, list[int]] = {}
        for row in range(60):
            tenths.setdefault(min(int(probs[row, column] * 10), 9), []).append(row)
        wanted = [[np.mean(probs[rows, column]), np.mean(shares[rows, column])] for _, rows in sorted(tenths.items())]
        np.testing.assert_allclose(lines[level], wanted, rtol=0, atol=1e-12)


def test_every_plot_is_of_the_columns_it_names(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[Any, ...]] = []
    for name in ("_scatter", "_deviations", "_calibration"):
        monkeypatch.setattr(report, name, lambda axes, *columns: drawn.append(columns))
    sets = [evaluation(made(seed=seed)) for seed in range(2)]
    page_of(*sets)
    wanted: list[tuple[Any, ...]] = []
    for each in sets:
        of = each.predictions
        wanted += [(each,), (of.std, of.gt_std), (of.probs, of.gt_mean, of.gt_std)]
    assert [[id(column) for column in columns] for columns in drawn] == [[id(x) for x in columns] for columns in wanted]


@pytest.mark.parametrize("count", [1, 2])
def test_very_small_and_uniform_sets_are_drawn_without_a_warning(count: int) -> None:
    predictions = made(count=count)
    equal = dataclasses.replace(
        predictions, mean=np.full(count, 3.0), std=np.zeros(count), gt_std=np.zeros(count), gt_score=np.full(count, 7.0)
    )
    for each in (predictions, equal):
        assert len(Read(page_of(evaluation(each, "none"))).images("plot")) == 3


# ---- thumbnails -------------------------------------------------------------------------------------------


def colour_of(number: int) -> tuple[int, int, int]:
    return 10 + 15 * number, 250 - 15 * number, 128


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Images that their colour tells apart."""
    (tmp_path / "X").mkdir()
    for number in range(16):
        Image.new("RGB", (24, 24), colour_of(number)).save(tmp_path / "X" / f"{number}.png")
    return tmp_path


@pytest.mark.usefixtures("no_plots")
@pytest.mark.parametrize("fit", ["4", "none"])
@pytest.mark.parametrize("known", [True, False], ids=["from 1 to 5", "in the dataset's units"])
def test_the_images_furthest_off_are_shown_furthest_first(fit: str, known: bool, pictures: Path) -> None:
    predictions = made()
    if not known:
        predictions = dataclasses.replace(predictions, gt_mean=None, gt_score=predictions.gt_score / 20)
    found_evaluation = evaluation(predictions, fit)
    curve = found_evaluation.curve
    assert predictions.gt_mean is not None or not known
    if curve is not None:
        off = np.abs(curve(predictions.mean) - predictions.gt_score)
    else:
        off = np.abs(predictions.mean - (predictions.gt_score if not known else predictions.gt_score / 20))
    worst = sorted(range(16), key=lambda number: -off[number])[:12]
    found = Read(page_of(found_evaluation, root=pictures))
    assert found.all("h3") == ["Furthest off"]
    thumbnails, captions = found.images("thumbnail"), found.all("figcaption")
    assert len(thumbnails) == len(captions) == 12
    for number, thumbnail, caption in zip(worst, thumbnails, captions, strict=True):
        pixels = pixels_of(thumbnail)
        assert pixels.shape == (192, 192, 3)
        assert np.abs(pixels.mean(axis=(0, 1)) - colour_of(number)).max() < 4
        assert caption == (
            f"X/{number}.pngpredicted {predictions.mean[number]:.2f} ± {predictions.std[number]:.2f}, "
            f"opinion {predictions.gt_score[number]:.4g}"
        )


@pytest.mark.usefixtures("no_plots")
def test_a_thumbnail_keeps_its_proportions_on_a_light_ground(pictures: Path) -> None:
    for number in range(16):
        Image.new("RGB", (80, 20), (255, 0, 0)).save(pictures / "X" / f"{number}.png")
    pixels = pixels_of(Read(page_of(evaluation(made()), root=pictures)).images("thumbnail")[0]).astype(int)
    assert np.abs(pixels[96] - [254, 0, 0]).max() < 6
    for row in (0, 60, 131, 191):
        assert np.abs(pixels[row] - 237).max() < 12


@pytest.mark.usefixtures("no_plots")
def test_few_images_are_all_shown(pictures: Path) -> None:
    assert len(Read(page_of(evaluation(made(count=5)), root=pictures)).images("thumbnail")) == 5


@pytest.mark.usefixtures("no_plots")
def test_an_unreadable_image_shows_its_reason(pictures: Path) -> None:
    found = Read(page_of(evaluation(made()), root=pictures))
    shown = [text.split(".png")[0] for text in found.all("figcaption")]
    for number, spoil in zip(shown, (Path.unlink, Path.touch, lambda path: path.write_text("text")), strict=False):
        path = pictures / f"{number}.png"
        if spoil is Path.touch:
            path.unlink()
        spoil(path)
    found = Read(page_of(evaluation(made()), root=pictures))
    assert len(found.images("thumbnail")) == 9
    assert [text.split(".png")[0] for text in found.all("figcaption")] == shown
    reasons = ("no such file", "empty file", "not an image (or of an unsupported format)")
    assert found.all("p") == [f"{pictures / number}.png: {why}" for number, why in zip(shown, reasons, strict=False)]


@pytest.mark.usefixtures("no_plots")
def test_a_very_large_image_is_shown_without_a_warning(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow warns above one limit, and refuses above twice that."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 24 * 24 - 1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = Read(page_of(evaluation(made()), root=pictures))
    assert len(found.images("thumbnail")) == 12
    assert not caught


# ---- the command line -------------------------------------------------------------------------------------


def write_files(folder: Path, predictions: Predictions) -> tuple[Path, Path]:
    """The files that these predictions are read from."""
    pred, gt = folder / f"{predictions.name}.jsonl", folder / f"{predictions.name}.json"
    assert predictions.gt_mean is not None
    assert predictions.gt_std is not None
    rows = zip(
        predictions.items, predictions.probs, predictions.gt_score, predictions.gt_mean, predictions.gt_std, strict=True
    )
    lines, metas = [], []
    for item, probs, gt_score, gt_mean, gt_std in rows:
        lines.append(json.dumps({"id": item.id, "logits": dict(zip(LEVELS, np.log(probs), strict=True))}))
        scores = {"gt_score": gt_score, "gt_score_norm": gt_mean, "std_norm": gt_std}
        metas.append({"id": item.id, "image": item.image, **scores})
    pred.write_text("\n".join(lines))
    gt.write_text(json.dumps(metas))
    return pred, gt


def deqa(*arguments: Any) -> int:
    with pytest.raises(SystemExit) as exit:
        main([str(argument) for argument in arguments])
    assert isinstance(exit.value.code, int)
    return exit.value.code


@pytest.mark.parametrize("with_root", [True, False], ids=["with --root", "without --root"])
def test_the_command_line_writes_the_page_and_nothing_else(
    with_root: bool, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pred, gt = write_files(pictures, made("<toy>"))
    folder = pictures / "new" / "report"
    flags = ["--root", pictures] if with_root else []
    assert deqa("evaluate", "--pred", pred, "--gt", gt, "--report", folder, "--bootstrap", 10, *flags) == 0
    out, err = capsys.readouterr()
    assert err == f"{folder / 'index.html'}\n"
    assert out.startswith("set ")
    assert [path.name for path in folder.iterdir()] == ["index.html"]
    page = (folder / "index.html").read_text(encoding="utf-8")
    found = Read(page)
    assert found.all("h2") == ["<toy>: 16 images"]
    assert found.all("li") == ["open_set: False", "fit: 4", "bootstrap: 10", "seed: 0"]
    assert len(found.images("plot")) == 3
    assert len(found.images("thumbnail")) == (12 if with_root else 0)
    # A second run changes nothing.
    assert deqa("evaluate", "--pred", pred, "--gt", gt, "--report", folder, *flags) == 2
    assert capsys.readouterr().out == ""
    assert (folder / "index.html").read_text(encoding="utf-8") == page


def test_without_its_extra_the_report_is_a_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pred, gt = write_files(tmp_path, made())
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "deqa_jax.report")
    assert deqa("evaluate", "--pred", pred, "--gt", gt, "--report", tmp_path / "report") == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "pip install 'deqa-jax[plots]'" in err
    assert not (tmp_path / "report").exists()
    assert deqa("evaluate", "--pred", pred, "--gt", gt) == 0


# ---- in a browser -----------------------------------------------------------------------------------------

OUTSIDE = {
    "image": '<img src="http://outside.example/a.png">',
    "style": '<link rel="stylesheet" href="https://outside.example/b.css">',
    "rule": "<style>body { background: url(http://outside.example/c.png) }</style>",
    "frame": '<iframe src="http://outside.example/d.html"></iframe>',
    "script": '<script src="https://outside.example/e.js"></script>',
    "request": '<script>fetch("http://outside.example/f.json").catch(() => 0)</script>',
}
PROBE = """<script>addEventListener("load", () => {
  const all = (selector) => [...document.querySelectorAll(selector)];
  const found = {
    images: all("img").map((image) => [image.className, image.complete, image.naturalWidth, image.naturalHeight]),
    shown: all("img").map((image) => image.getBoundingClientRect().width),
    sections: all("section").map((section) => ({
      heading: section.querySelector("h2").textContent,
      plots: [...section.querySelectorAll("img.plot")].map((image) => image.alt),
      thumbnails: section.querySelectorAll("img.thumbnail").length,
      captions: [...section.querySelectorAll("figcaption")].map((caption) => caption.textContent),
      reasons: [...section.querySelectorAll("p.none")].map((reason) => reason.textContent),
    })),
    scripts: all("script").length,
    ran: window.ran ?? null,
    wide: document.documentElement.scrollWidth - document.documentElement.clientWidth,
    blue: all("img.plot").map((image) => {
      const canvas = document.createElement("canvas");
      [canvas.width, canvas.height] = [480, 420];
      const context = canvas.getContext("2d");
      context.drawImage(image, 0, 0, 480, 420);
      const data = context.getImageData(0, 0, 480, 420).data;
      let blue = 0;
      for (let i = 0; i < data.length; i += 4) blue += data[i + 3] > 20 && data[i + 2] > data[i] + 40;
      return blue;
    }),
  };
  const shown = document.createElement("pre");
  shown.id = "probe";
  shown.textContent = JSON.stringify(found);
  document.body.append(shown);
})</script>"""

Open = Callable[[str], tuple[str, list[str]]]


@pytest.fixture(scope="module")
def visit(tmp_path_factory: pytest.TempPathFactory) -> Open:
    """Opens a page: the document as it ends up, and what it asked the network for."""
    browser = find_browser()
    return lambda page: open_page(browser, page, tmp_path_factory.mktemp("browser"))[:2]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A report with everything in it: fine, without deviations, with markup, and with unreadable images."""
    root = tmp_path_factory.mktemp("root")
    for number in range(16):
        Image.new("RGB", (60, 40), colour_of(number)).save(root / f"{number}.png")
    (root / "broken.png").write_bytes(b"")
    names = [f"{number}.png" for number in range(16)]
    plain = dataclasses.replace(made("plain", images=names), gt_mean=None, gt_std=None)
    damaged = made("damaged", count=6, images=["broken.png", "absent.png", *names[:4]])
    marked = made(MARKUP, images=[f"{MARKUP}.png"] * 16)
    each = (made("koniq", images=names), plain, damaged, marked)
    return page_of(*map(evaluation, each), root=root, notes=(MARKUP,))


@pytest.fixture(scope="module")
def probed(page: str, visit: Open) -> dict[str, Any]:
    """What a script finds in the page; its policy has to let it run, and to let a canvas be looked at."""
    assert page.count(POLICY) == 1
    lax = page.replace(POLICY, POLICY.replace("style-src", "script-src 'unsafe-inline'; style-src"))
    document, _ = visit(lax.replace("</body>", f"{PROBE}</body>"))
    found = re.search(r'<pre id="probe">(.*?)</pre>', document, re.DOTALL)
    assert found is not None
    read: dict[str, Any] = json.loads(html.unescape(found[1]))
    return read


def test_in_a_browser_every_set_has_its_heading_and_plots(probed: dict[str, Any]) -> None:
    assert [section["heading"] for section in probed["sections"]] == [
        "koniq: 16 images",
        "plain: 16 images",
        "damaged: 6 images",
        f"{MARKUP}: 16 images",
    ]
    assert [section["plots"] for section in probed["sections"]] == [PLOTS, PLOTS[:1], PLOTS, PLOTS]


def test_in_a_browser_every_image_has_loaded(probed: dict[str, Any]) -> None:
    kinds = [kind for kind, *_ in probed["images"]]
    assert (kinds.count("plot"), kinds.count("thumbnail"), len(kinds)) == (10, 28, 38)
    for (kind, complete, width, height), shown in zip(probed["images"], probed["shown"], strict=True):
        assert complete
        assert shown > 100
        assert (width, height) == (192, 192) if kind == "thumbnail" else min(width, height) > 100


def test_in_a_browser_plots_have_their_points(probed: dict[str, Any]) -> None:
    """They are an image inside of an image, and blue."""
    assert len(probed["blue"]) == 10
    assert min(probed["blue"]) > 20


def test_in_a_browser_the_worst_images_are_shown_or_their_reason(probed: dict[str, Any]) -> None:
    sections = probed["sections"]
    assert [section["thumbnails"] for section in sections] == [12, 12, 4, 0]
    assert [len(section["captions"]) for section in sections] == [12, 12, 6, 12]
    assert len(sections[0]["reasons"]) == 0
    assert sections[1]["reasons"] == ["Its metas have no standard deviations to compare with."]
    assert sorted(reason.split("/")[-1] for reason in sections[2]["reasons"]) == [
        "absent.png: no such file",
        "broken.png: empty file",
    ]
    assert all(MARKUP in text for text in (*sections[3]["captions"], *sections[3]["reasons"]))


def test_in_a_browser_markup_in_names_does_not_run(probed: dict[str, Any], page: str, visit: Open) -> None:
    assert probed["ran"] is None
    assert probed["scripts"] == 1  # the probe
    # And it would, were it not escaped.
    lax = page.replace(POLICY, "").replace("</body>", f"{MARKUP}{PROBE}</body>")
    document, _ = visit(lax)
    assert '"ran":"' in html.unescape(document)


def test_in_a_browser_the_page_is_not_wider_than_its_window(probed: dict[str, Any]) -> None:
    assert probed["wide"] <= 0


def test_in_a_browser_the_page_asks_the_network_for_nothing(page: str, visit: Open) -> None:
    for each in (page, page.replace(POLICY, "")):
        document, requests = visit(each)
        assert "plain: 16 images" in document
        assert requests == []


def test_in_a_browser_the_policy_keeps_the_page_from_asking(page: str, visit: Open) -> None:
    """And without it every request is seen, so that the test above would see one."""
    additions = page.replace("</body>", "".join(OUTSIDE.values()) + "</body>")
    _, requests = visit(additions.replace(POLICY, ""))
    asked = {url for url in requests if url.startswith("http")}
    assert asked == set(re.findall(r"https?://outside[^\")]+", "".join(OUTSIDE.values())))
    assert len(asked) == len(OUTSIDE)
    _, requests = visit(additions)
    assert requests == []
