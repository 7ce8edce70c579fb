"""The gallery: what is put into its page, when the page is there, and what one can do with it in a browser."""

import base64
import hashlib
import html
import io
import json
import math
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import Visit, find_browser, open_page
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from deqa_jax import distributed, gallery
from deqa_jax.gallery import new_gallery
from deqa_jax.prompt import LEVEL_WEIGHTS, LEVELS
from deqa_jax.scorer import Result, Scorer

# Runs where it gets, and says so, if it is not escaped.
MARKUP = "<img src=x onerror=\"window.ran='markup'\"></script><script>window.ran='script'</script>&amp;'"
UNREADABLE = ["empty.png", "not_an_image.jpg", "truncated.jpg"]


def result_of(path: str, *probs: float) -> Result:
    """What a scorer that is so sure of each level says of a picture."""
    score = sum(p * weight for p, weight in zip(probs, LEVEL_WEIGHTS, strict=True))
    variance = sum(p * (weight - score) ** 2 for p, weight in zip(probs, LEVEL_WEIGHTS, strict=True))
    return Result(path, score, math.sqrt(variance), probs)


class FakeScorer:
    """Finds a picture the better the longer its name is, and nothing where nothing is."""

    def stream(self, paths: Iterable[str]) -> Iterator[Result]:
        for path in paths:
            best = min(len(Path(path).name), 20) / 20
            found = Path(path).is_file()
            yield result_of(path, best, 0, 0, 0, 1 - best) if found else Result(path, error=f"{path}: no such file")


class Read(HTMLParser):
    """A page's tags, the data of its pictures, and what else stands between its script tags."""

    def __init__(self, page: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.pictures: list[dict[str, Any]] = []
        self.blocks: list[int] = []
        self.contents: dict[str, str] = {}
        self._within = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._within = dict(attrs).get("class") or tag
        if tag == "script":
            self.contents.setdefault(self._within, "")

    def handle_endtag(self, tag: str) -> None:
        if self._within == "pictures":
            pictures = json.loads(self.contents.pop("pictures"))
            self.blocks.append(len(pictures))
            self.pictures += pictures
        self._within = ""

    def handle_data(self, data: str) -> None:
        if self._within in ("pictures", "script", "style", "p", "model"):
            self.contents[self._within] = self.contents.get(self._within, "") + data


Results = Sequence[tuple[str, Result]]


def write(out: Path, results: Results) -> str:
    with new_gallery(out, "M") as add:
        for path, result in results:
            add(path, result)
    return out.read_bytes().decode("utf-8")


def plain(count: int) -> list[tuple[str, Result]]:
    return [(f"{number}.png", result_of(f"{number}.png", 0.2, 0.2, 0.2, 0.2, 0.2)) for number in range(count)]


@pytest.fixture
def no_thumbnails(monkeypatch: pytest.MonkeyPatch) -> None:
    """For names without a file."""
    monkeypatch.setattr(gallery, "_thumbnail", lambda path: None)


def jpeg_of(picture: dict[str, Any]) -> Image.Image:
    with Image.open(io.BytesIO(base64.b64decode(picture["thumbnail"], validate=True))) as opened:
        assert opened.format == "JPEG"
        return opened.convert("RGB")


# ---- what is put in ---------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_thumbnails")
def test_the_page_has_what_was_found_in_the_order_it_was_found_in(tmp_path: Path) -> None:
    good, failed = result_of("x/z.png", 0.5, 0.25, 0.125, 0.125, 0), Result("a.png", error="a.png: empty file")
    found = Read(write(tmp_path / "page.html", [("x/z.png", good), ("a.png", failed), ("x/z.png", good)]))
    numbers = {"score": 4.125, "std": pytest.approx(1.0532687, abs=1e-7), "probs": [0.5, 0.25, 0.125, 0.125, 0.0]}
    seen = {"path": "x/z.png", **numbers, "error": None, "thumbnail": None}
    unseen = {"path": "a.png", "score": None, "std": None, "probs": None, "error": "empty file", "thumbnail": None}
    assert found.pictures == [seen, unseen, seen]


@pytest.mark.usefixtures("no_thumbnails")
def test_scores_that_differ_in_the_last_bit_differ_in_the_page(tmp_path: Path) -> None:
    scores = [float(np.nextafter(np.float32(value), np.float32(9))) for value in (1, 2, 3, 4)] + [1.0, 2.0, 3.0, 4.0]
    results = [(f"{score}", Result("", score, 0.5, (0.2,) * 5)) for score in scores]
    found = Read(write(tmp_path / "page.html", results)).pictures
    assert np.float32([picture["score"] for picture in found]).tolist() == scores


@pytest.mark.usefixtures("no_thumbnails")
@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_an_answer_that_is_no_number_does_not_spoil_the_page(number: float, tmp_path: Path) -> None:
    spoilt = Result("x.png", number, 0.5, (0.2,) * 5)
    first, second = Read(write(tmp_path / "page.html", [("x.png", spoilt), *plain(1)])).pictures
    assert first["score"] is None
    assert first["error"] == "the model's answer is not a number"
    assert second["score"] == pytest.approx(3)


@pytest.mark.usefixtures("no_thumbnails")
@pytest.mark.parametrize(("count", "blocks"), [(0, []), (1, [1]), (3, [3]), (7, [3, 3, 1])])
def test_no_block_of_data_is_very_long(
    count: int, blocks: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gallery, "_BLOCK", 3)
    found = Read(write(tmp_path / "page.html", plain(count)))
    assert found.blocks == blocks
    assert [picture["path"] for picture in found.pictures] == [f"{number}.png" for number in range(count)]


@pytest.mark.usefixtures("no_thumbnails")
def test_no_name_of_a_file_ends_its_block(tmp_path: Path) -> None:
    names = [MARKUP, "<!--<script>", "a\"b'c\\d", "new\nline\u2028.png", "nul\0.png", "naïve 图像 😀.jpg", "]]>"]
    results = [(name, Result(name, error=f"{name}: {MARKUP}")) for name in names]
    found = Read(write(tmp_path / "page.html", results))
    assert [picture["path"] for picture in found.pictures] == names
    assert {picture["error"] for picture in found.pictures} == {MARKUP}
    assert [tag for tag, _ in found.tags].count("script") == 2
    assert [tag for tag, _ in found.tags].count("img") == 0


@given(st.text())
def test_any_text_stays_itself_and_has_no_tags(text: str) -> None:
    written = gallery._json({"path": text})
    assert json.loads(written) == {"path": text}
    assert "<" not in written


@pytest.mark.usefixtures("no_thumbnails")
def test_names_that_are_not_unicode_are_written_with_escapes(tmp_path: Path) -> None:
    """As a file name, and as one that no file can have."""
    names = ["caf\udce9.png", "y\ud800.png"]
    results = [(name, Result(name, error=f"{name}: of \udce9")) for name in names]
    found = Read(write(tmp_path / "page.html", results)).pictures
    assert [picture["path"] for picture in found] == ["caf\\udce9.png", "y\\ud800.png"]
    assert [picture["error"] for picture in found] == ["of \\udce9"] * 2


# ---- thumbnails -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "wanted"),
    [((640, 320), (160, 80)), ((300, 900), (53, 160)), ((40, 30), (40, 30)), ((2000, 3), (160, 1))],
    ids=str,
)
@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_a_thumbnail_keeps_its_proportions(
    size: tuple[int, int], wanted: tuple[int, int], suffix: str, tmp_path: Path
) -> None:
    path = tmp_path / f"x.{suffix}"
    picture = Image.new("RGB", size, (200, 30, 90))
    picture.paste((20, 60, 220), (0, 0, size[0] // 2, size[1]))
    picture.save(path)
    (found,) = Read(write(tmp_path / "page.html", [(str(path), result_of("", 1, 0, 0, 0, 0))])).pictures
    thumbnail = jpeg_of(found)
    assert thumbnail.size == wanted
    if min(wanted) > 1:
        for x, colour in ((wanted[0] // 4, (20, 60, 220)), (3 * wanted[0] // 4, (200, 30, 90))):
            shown = thumbnail.getpixel((x, wanted[1] // 2))
            assert np.abs(np.subtract(shown, colour)).max() < 8


def test_every_picture_that_is_scored_has_its_thumbnail(images: Path, tmp_path: Path) -> None:
    paths = sorted(images.iterdir())
    results = [(str(path), result_of("", 1, 0, 0, 0, 0)) for path in paths]
    for path, picture in zip(paths, Read(write(tmp_path / "page.html", results)).pictures, strict=True):
        if path.name in UNREADABLE:
            assert picture["thumbnail"] is None
        else:
            with Image.open(path) as opened:
                shape = opened.size
            scale = min(1, 160 / max(shape))
            assert np.abs(np.subtract(jpeg_of(picture).size, np.multiply(scale, shape))).max() <= 0.5


def test_a_picture_that_vanished_meanwhile_keeps_its_score(tmp_path: Path) -> None:
    (picture,) = Read(write(tmp_path / "page.html", plain(1))).pictures
    assert picture["thumbnail"] is None
    assert picture["score"] == pytest.approx(3)


def test_scoring_does_not_wait_for_thumbnails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go, threads = threading.Event(), set()

    def thumbnail(path: str) -> str:
        assert go.wait(60)
        threads.add(threading.current_thread().name.split("_")[0])
        return base64.b64encode(path.encode()).decode()

    monkeypatch.setattr(gallery, "_thumbnail", thumbnail)
    with new_gallery(tmp_path / "page.html", "M") as add:
        for path, result in plain(100):
            add(path, result)
        go.set()
    found = Read((tmp_path / "page.html").read_text()).pictures
    assert [base64.b64decode(picture["thumbnail"]).decode() for picture in found] == [path for path, _ in plain(100)]
    assert threads == {"thumbnail"}


class Sleepy(ThreadPoolExecutor):
    """Nothing is done before somebody waits for it."""

    def submit(self, run: Callable[..., Any], /, *arguments: Any, **options: Any) -> Future[Any]:
        class Later(Future[Any]):
            def result(self, timeout: float | None = None) -> Any:
                return run(*arguments, **options)

        return Later()


@pytest.mark.usefixtures("no_thumbnails")
@pytest.mark.parametrize("errors", [False, True], ids=["all scored", "every second not"])
def test_few_pictures_are_held_at_a_time(errors: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gallery, "_AHEAD", 5)
    page = io.StringIO()
    pictures, lengths = gallery._Pictures(page, Sleepy()), []
    for number, (path, result) in enumerate(plain(40)):
        failed = errors and number % 2
        pictures.add(path, Result(path, error="x") if failed else result)
        lengths.append(len(pictures._waiting))
    assert max(lengths) == 5
    assert page.getvalue().count('"path"') >= 35
    pictures.finish()
    assert [picture["path"] for picture in Read(page.getvalue()).pictures] == [path for path, _ in plain(40)]


@pytest.mark.usefixtures("no_thumbnails")
def test_what_is_ready_is_written_at_once() -> None:
    page = io.StringIO()
    pictures = gallery._Pictures(page, Sleepy())
    for number in range(3):
        pictures.add(f"{number}", Result("", error="x"))
        assert page.getvalue().count('"path"') == number + 1


# ---- the page as a file -----------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_thumbnails")
def test_the_page_is_there_when_it_is_whole(tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    with new_gallery(out, "M") as add:
        for path, result in plain(3):
            add(path, result)
        assert not out.exists()
    assert list(tmp_path.iterdir()) == [out]
    assert out.read_text().endswith("</html>\n")


@pytest.mark.parametrize("name", ["<script>alert(1)</script>", 'a "model" & co', "\udcff"])
def test_a_models_name_is_text(name: str, tmp_path: Path) -> None:
    with new_gallery(tmp_path / "page.html", name):
        pass
    found = Read((tmp_path / "page.html").read_text())
    assert found.contents["model"] == f"Scored by {name.encode(errors='backslashreplace').decode()}"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_page_leaves_nothing(error: type[BaseException], tmp_path: Path) -> None:
    def interrupted() -> None:
        with new_gallery(tmp_path / "page.html", "M") as add:
            add(*plain(1)[0])
            raise error

    with pytest.raises(error):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_the_same_results_give_the_same_bytes(images: Path, tmp_path: Path) -> None:
    results = [(str(path), result_of("", 0.5, 0.5, 0, 0, 0)) for path in sorted(images.iterdir())] * 3
    assert write(tmp_path / "a.html", results) == write(tmp_path / "b.html", results)


@pytest.fixture
def page(tmp_path: Path) -> str:
    return write(tmp_path / "page.html", plain(2))


def test_the_policy_lets_the_page_run_its_own_script_and_nothing_else(page: str) -> None:
    found = Read(page)
    (policy,) = (of["content"] for tag, of in found.tags if tag == "meta" and of.get("http-equiv"))
    allowed = {
        tag: "'sha256-" + base64.b64encode(hashlib.sha256(found.contents[tag].encode()).digest()).decode() + "'"
        for tag in ("script", "style")
    }
    assert policy == (
        f"default-src 'none'; script-src {allowed['script']}; style-src {allowed['style']}; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    assert page.index("Content-Security-Policy") < min(page.index("<style>"), page.index("<script"))


def test_the_page_refers_to_nothing_outside(page: str) -> None:
    for tag, attributes in Read(page).tags:
        assert tag not in ("iframe", "object", "embed", "base", "a")
        assert not [name for name in attributes if name.startswith("on") or name in ("style", "action", "srcset")]
        assert attributes.get("href") in (None, "data:,")
        assert "src" not in attributes
    rest = page.lower()
    for outside in ("http:", "https:", "url(", "@import", "fetch(", "innerhtml"):
        assert outside not in rest


def test_every_field_has_a_label(page: str) -> None:
    fields = re.findall(r"<label>[^<]*<(?:input|select) id=\"(\w+)\"|<label><input id=\"(\w+)\"[^>]*> \w", page)
    labelled = {first or second for first, second in fields}
    every = {of["id"] for tag, of in Read(page).tags if tag in ("input", "select")}
    assert labelled == every == {"text", "least", "most", "errors", "order"}


def test_without_scripts_the_page_says_what_is_missing(page: str) -> None:
    sentence = re.findall("<noscript><p>(.*?)</p></noscript>", page, re.DOTALL)
    assert "scripts are turned off" in sentence[0]


# ---- the command line -------------------------------------------------------------------------------------

Deqa = Callable[..., tuple[Any, str, str]]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder with pictures, and a model that is there at once."""
    monkeypatch.setattr(Scorer, "from_pretrained", lambda *_, **__: FakeScorer())
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    for name in ("a.png", "bbb.png", 'c"<b>.png'):
        Image.new("RGB", (20, 10)).save(tmp_path / "in" / name)
    return tmp_path


SCORE = ("score", "in", "absent.png", "--model", "M", "--format", "jsonl")


@pytest.mark.parametrize("to", ["file", "stdout"])
def test_the_report_is_written_besides_the_rows(to: str, fake: Path, deqa: Deqa) -> None:
    output = ("--output", "rows") if to == "file" else ()
    status, out, err = deqa(*SCORE, *output, "--report", "page.html")
    assert (status, err) == (1, "deqa: 1 of 4 images could not be scored\n")
    text = (fake / "rows").read_text() if to == "file" else out
    rows = [json.loads(line) for line in text.splitlines()]
    found = Read((fake / "page.html").read_text()).pictures
    assert [row["path"] for row in rows] == [picture["path"] for picture in found]
    assert [row["path"] for row in rows] == ["in/a.png", "in/bbb.png", 'in/c"<b>.png', "absent.png"]
    assert [row["score"] for row in rows] == [picture["score"] for picture in found]
    assert [bool(picture["thumbnail"]) for picture in found] == [True, True, True, False]
    assert found[3]["error"] == "no such file"
    assert "Scored by M<" in (fake / "page.html").read_text()
    assert {path.name for path in fake.iterdir()} == {"in", "page.html", *(("rows",) if to == "file" else ())}
    # The rows are what they are without it.
    assert deqa(*SCORE)[1] == text


def test_the_report_names_the_model_that_comes_with_the_package(fake: Path, deqa: Deqa) -> None:
    assert deqa("score", "in", "--report", "page.html")[0] == 0
    assert "Scored by deqa-tiny<" in (fake / "page.html").read_text()


@pytest.fixture
def no_model(fake: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No usage error may wait for a model to load."""
    monkeypatch.setattr(Scorer, "from_pretrained", lambda *_, **__: pytest.fail("loaded a model"))
    return fake


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (("--report", "mine.html"), "mine.html exists already; remove it or choose another name"),
        (("--report", "link.html"), "link.html exists already; remove it or choose another name"),
        (("--report", "no/page.html"), "no/page.html: no such folder to write in; make it first"),
        (("--report", "new.html", "--output", "mine.html"), "mine.html exists already"),
        (("--report", "mine.html", "--output", "rows"), "mine.html exists already"),
        (("--report", "new.html", "--output", "new.html"), "name another one for --report"),
        (("--report", "in/../new.html", "--output", "new.html"), "name another one for --report"),
    ],
    ids=" ".join,
)
def test_a_report_that_cannot_be_is_refused_first(
    options: tuple[str, ...], complaint: str, no_model: Path, deqa: Deqa
) -> None:
    (no_model / "mine.html").write_text("mine")
    (no_model / "link.html").symlink_to("nowhere")
    status, out, err = deqa(*SCORE, *options)
    assert (status, out) == (2, "")
    assert err.startswith("deqa: ")
    assert complaint in err
    assert (no_model / "mine.html").read_text() == "mine"
    assert {path.name for path in no_model.iterdir()} == {"in", "mine.html", "link.html"}


def test_one_of_several_processes_refuses_a_report(no_model: Path, deqa: Deqa, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "several", lambda: True)
    monkeypatch.setattr(distributed, "fail", lambda status: None)
    status, out, err = deqa(*SCORE, "--output", "rows", "--report", "page.html")
    assert (status, out) == (2, "")
    assert err == "deqa: --report is written by one process; run several without it, or one with it\n"
    assert {path.name for path in no_model.iterdir()} == {"in"}


def test_an_interrupted_run_keeps_its_rows_and_leaves_no_page(
    fake: Path, deqa: Deqa, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Interrupted(FakeScorer):
        def stream(self, paths: Iterable[str]) -> Iterator[Result]:
            yield next(super().stream(paths))
            raise KeyboardInterrupt

    monkeypatch.setattr(Scorer, "from_pretrained", lambda *_, **__: Interrupted())
    status, _, _ = deqa(*SCORE, "--output", "rows", "--report", "page.html")
    assert status == 130
    assert len((fake / "rows").read_text().splitlines()) == 1
    assert {path.name for path in fake.iterdir()} == {"in", "rows"}


def test_a_page_that_was_made_meanwhile_is_left_alone(fake: Path, deqa: Deqa, monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow(FakeScorer):
        def stream(self, paths: Iterable[str]) -> Iterator[Result]:
            yield from super().stream(paths)
            (fake / "page.html").write_text("mine")

    monkeypatch.setattr(Scorer, "from_pretrained", lambda *_, **__: Slow())
    status, out, err = deqa(*SCORE, "--report", "page.html")
    assert status == 2
    assert len(out.splitlines()) == 4
    assert "exists already" in err
    assert (fake / "page.html").read_text() == "mine"
    assert {path.name for path in fake.iterdir()} == {"in", "page.html"}


# ---- in a browser -----------------------------------------------------------------------------------------

# What a reader does to a page, and what it shows then. Fields are set as by hand: with the event that this gives.
PROBE = """addEventListener("load", async () => {
  const found = {}, all = (selector) => [...document.querySelectorAll(selector)];
  const field = (id) => document.getElementById(id);
  const wait = () => new Promise((done) => setTimeout(done, 50));
  const paths = () => all("#cards .path").map((path) => path.textContent);
  const set = async (values) => {
    for (const [id, value] of Object.entries(values)) {
      if (typeof value === "boolean") field(id).checked = value; else field(id).value = value;
      field(id).dispatchEvent(new Event("input", { bubbles: true }));
    }
    await wait();
    return { paths: paths(), count: field("count").value, numbers: field("numbers").textContent };
  };
  const reset = async () => { all("button[type=reset]")[0].click(); await wait(); };
  const scroll = async (y) => { scrollTo(0, y); dispatchEvent(new Event("scroll")); await wait(); };
  try {
    await wait();
    STEPS
  } catch (error) { found.error = String(error); }
  found.ran = window.ran ?? null;
  const shown = document.createElement("pre");
  shown.id = "probe";
  shown.textContent = JSON.stringify(found);
  document.body.append(shown);
});"""
Open = Callable[[str], Visit]


@pytest.fixture(scope="module")
def visit(tmp_path_factory: pytest.TempPathFactory) -> Open:
    browser = find_browser()
    return lambda page: open_page(browser, page, tmp_path_factory.mktemp("browser"))


def probe(visit: Open, page: str, steps: str) -> dict[str, Any]:
    """What a script finds in the page, whose policy lets this one script run too. Nothing else may come of it."""
    script = PROBE.replace("STEPS", steps)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert page.count("script-src ") == 1
    probed = page.replace("script-src ", f"script-src 'sha256-{digest}' ")
    seen = visit(probed.replace("</body>", f"<script>{script}</script></body>"))
    assert seen.requests == []
    assert seen.console == []
    found = re.search(r'<pre id="probe">(.*?)</pre>', seen.document, re.DOTALL)
    assert found is not None
    read: dict[str, Any] = json.loads(html.unescape(found[1]))
    assert "error" not in read, read["error"]
    assert read["ran"] is None
    return read


# Name, colour, and probabilities of the levels; the ones without are not there.
PICTURES: list[tuple[str, tuple[int, int, int], tuple[float, ...]]] = [
    ("img10.png", (230, 20, 20), (0.0, 0.0, 0.1, 0.8, 0.1)),
    ("img2.png", (20, 230, 20), (0.5, 0.5, 0.0, 0.0, 0.0)),
    ("Deep/img7.jpg", (20, 20, 230), (0.1, 0.2, 0.4, 0.2, 0.1)),
    ("absent.png", (0, 0, 0), ()),
    (f"{MARKUP.replace('/', '|')}.png", (230, 230, 20), (1.0, 0.0, 0.0, 0.0, 0.0)),
    ("caf\udce9.png", (20, 230, 230), (0.0, 0.0, 0.0, 0.0, 1.0)),
    ("img1.png", (0, 0, 0), ()),
]
NAMES = [name.replace("\udce9", "\\udce9") for name, _, _ in PICTURES]
BEST = [4, 1, 2, 0, 5, 3, 6]  # by score, those without at the end in the order they came in

STEPS = """
    found.first = { paths: paths(), count: field("count").value, numbers: field("numbers").textContent };
    found.images = all("#cards img").map((image) => {
      const canvas = document.createElement("canvas");
      [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
      const context = canvas.getContext("2d");
      context.drawImage(image, 0, 0);
      const { width, height } = image.getBoundingClientRect();
      return [[width, height], [...context.getImageData(canvas.width / 2, canvas.height / 2, 1, 1).data]];
    });
    found.scores = all("#cards .score").map((score) => score.textContent.trim());
    found.levels = all("#cards .levels").map((levels) => [levels.role, levels.ariaLabel]);
    found.widths = all("#cards .levels").map((levels) => {
      const whole = levels.getBoundingClientRect().width;
      return [...levels.children].map((level) => level.getBoundingClientRect().width / whole);
    });
    found.reasons = all("#cards .unread .picture").map((picture) => picture.textContent);
    found.places = all("#cards li").map((card) => [card.ariaPosInSet, card.ariaSetSize]);
    found.titles = all("#cards .path").map((path) => path.title);
    found.bars = field("histogram").ariaLabel;
    found.overflowing = all("#cards li").filter((card) => card.scrollHeight > card.clientHeight + 1).length;
    for (const order of [...field("order").options].map((option) => option.value)) {
      found[order] = (await set({ order })).paths;
    }
    await reset();
    found.text = await set({ text: "IMG1" });
    await reset();
    found.folder = await set({ text: "deep/" });
    await reset();
    found.none = await set({ text: "no such name" });
    await reset();
    found.range = await set({ least: "2", most: "3" });
    found.errors = await set({ errors: true });
    found.disabled = [field("least").disabled, field("most").disabled, field("text").disabled];
    found.both = await set({ text: "absent" });
    await reset();
    found.again = await set({});
    found.enabled = field("least").disabled;
    found.wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
    found.focusable = all("#controls input, #controls select, #controls button").map((each) => each.tabIndex);
"""


@pytest.fixture(scope="module")
def small_page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A few pictures, with everything that can be the matter with them."""
    root = tmp_path_factory.mktemp("root")
    with pytest.MonkeyPatch.context() as patch, new_gallery(root / "page.html", "M") as add:
        patch.chdir(root)
        for name, colour, probs in PICTURES:
            if not probs:
                add(name, Result(name, error=f"{name}: no such file"))
                continue
            Path(name).parent.mkdir(exist_ok=True)
            Image.new("RGB", (320, 160), colour).save(name)
            add(name, result_of(name, *probs))
    return (root / "page.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def probed(small_page: str, visit: Open) -> dict[str, Any]:
    return probe(visit, small_page, STEPS)


def names(*numbers: int) -> list[str]:
    return [NAMES[number] for number in numbers]


def test_in_a_browser_the_best_picture_comes_first(probed: dict[str, Any]) -> None:
    assert probed["first"]["paths"] == probed["titles"] == names(*BEST)
    assert probed["first"]["count"] == "7 of 7 pictures"
    assert probed["first"]["numbers"] == "Scores: mean 3.100, median 3.000; 2 without a score"
    assert probed["places"] == [[str(place), "7"] for place in range(1, 8)]


def test_in_a_browser_every_picture_is_its_own(probed: dict[str, Any]) -> None:
    assert len(probed["images"]) == 5
    for number, (size, pixel) in zip(BEST, probed["images"], strict=False):
        assert size == [160, 80]
        assert np.abs(np.subtract(pixel[:3], PICTURES[number][1])).max() < 8


def test_in_a_browser_a_card_has_score_levels_and_reason(probed: dict[str, Any]) -> None:
    assert probed["scores"] == [
        "5.000 ± 0.000", "4.500 ± 0.500", "3.000 ± 1.095", "2.000 ± 0.447", "1.000 ± 0.000", "no score", "no score"
    ]  # fmt: skip
    for number, (role, told), widths in zip(BEST, probed["levels"], probed["widths"], strict=False):
        probs = PICTURES[number][2]
        assert role == "img"
        assert told == ", ".join(f"{level} {100 * p:.1f} %" for level, p in zip(LEVELS, probs, strict=True))
        np.testing.assert_allclose(widths, probs, atol=0.01)
    assert len(probed["levels"]) == 5
    assert probed["reasons"] == ["no such file"] * 2
    assert probed["overflowing"] == 0


def test_in_a_browser_the_histogram_counts_scores(probed: dict[str, Any]) -> None:
    assert probed["bars"] == (
        "Pictures by score: 1.0 to 1.2: 1, 2.0 to 2.2: 1, 3.0 to 3.2: 1, 4.4 to 4.6: 1, 4.8 to 5.0: 1"
    )


def test_in_a_browser_pictures_can_be_sorted(probed: dict[str, Any]) -> None:
    assert probed["best"] == names(*BEST)
    assert probed["worst"] == names(5, 0, 2, 1, 4, 3, 6)
    assert probed["unsure"] == names(2, 1, 0, 4, 5, 3, 6)
    assert probed["sure"] == names(4, 5, 0, 1, 2, 3, 6)
    assert probed["path"] == names(4, 3, 5, 2, 6, 1, 0)
    assert probed["input"] == names(*range(7))


def test_in_a_browser_pictures_can_be_filtered(probed: dict[str, Any]) -> None:
    assert probed["text"] == {
        "paths": names(0, 6),
        "count": "2 of 7 pictures",
        "numbers": "Scores: mean 2.000, median 2.000; 1 without a score",
    }
    assert probed["folder"]["paths"] == names(2)
    assert probed["none"] == {"paths": [], "count": "0 of 7 pictures", "numbers": ""}
    assert probed["range"]["paths"] == names(2, 0)
    assert probed["range"]["count"] == "2 of 7 pictures"
    assert probed["errors"]["paths"] == names(3, 6)
    assert probed["disabled"] == [True, True, False]
    assert probed["both"]["paths"] == names(3)
    assert probed["again"] == probed["first"]
    assert probed["enabled"] is False


def test_in_a_browser_the_page_fits_its_window_and_the_keyboard(probed: dict[str, Any]) -> None:
    assert probed["wide"] <= 0
    assert probed["focusable"] == [0] * 6


def test_in_a_browser_nothing_that_is_put_into_the_page_runs_or_asks(small_page: str, visit: Open) -> None:
    """And without its policy it would, so that the tests above would see it."""
    outside = '<img src="http://outside.example/a.png"><script>document.title = "taken"</script>'
    page = small_page.replace("</body>", f"{outside}</body>")
    kept = visit(page)
    assert kept.requests == []
    assert "<title>DeQA-Score: gallery</title>" in kept.document
    assert len(kept.console) == 2
    taken = visit(re.sub("<meta http-equiv.*?>", "", page))
    assert taken.requests == ["http://outside.example/a.png"]
    assert "<title>taken</title>" in taken.document


MANY = 10_000
MANY_STEPS = """
    const cards = () => all("#cards li").length;
    found.count = field("count").value;
    found.cards = [cards()];
    found.first = paths()[0];
    found.scripts = all("script.pictures").length;
    await scroll(document.documentElement.scrollHeight);
    found.last = paths().at(-1);
    found.place = all("#cards li").at(-1).ariaPosInSet;
    const end = all("#cards li").at(-1).getBoundingClientRect();
    found.end = [end.top < innerHeight, Math.round(end.bottom - field("cards").getBoundingClientRect().bottom)];
    found.cards.push(cards());
    await scroll(document.documentElement.scrollHeight / 2);
    found.cards.push(cards());
    const middle = all("#cards li").map((card) => card.getBoundingClientRect());
    const edges = [Math.min(...middle.map((box) => box.top)), Math.max(...middle.map((box) => box.bottom))];
    found.covered = [...edges, innerHeight];
    await set({ order: "worst" });
    found.worst = paths()[0];
    found.scrolled = scrollY;
    found.cards.push(cards());
    found.one = await set({ text: "/9999.jpg" });
    found.some = (await set({ text: "7.jpg" })).count;
    found.cards.push(cards());
    found.every = await set({ text: "", errors: true });
    found.every.paths = found.every.paths.length;
"""


@pytest.fixture(scope="module")
def many(visit: Open, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What ten thousand pictures look like."""
    content = io.BytesIO()
    Image.new("RGB", (160, 120), (90, 90, 200)).save(content, format="JPEG")
    thumbnail = base64.b64encode(content.getvalue()).decode()
    out = tmp_path_factory.mktemp("many") / "page.html"
    with pytest.MonkeyPatch.context() as patch, new_gallery(out, "M") as add:
        patch.setattr(gallery, "_thumbnail", lambda path: thumbnail)
        for number in range(MANY):
            path = f"photos/{number}.jpg"
            failed = number % 100 == 50
            share = number / (MANY - 1)
            add(path, Result(path, error=f"{path}: x") if failed else result_of(path, share, 0, 0, 0, 1 - share))
    return probe(visit, out.read_text(), MANY_STEPS)


def test_in_a_browser_ten_thousand_pictures_are_some_dozen_cards(many: dict[str, Any]) -> None:
    assert many["count"] == "10,000 of 10,000 pictures"
    assert min(many["cards"]) > 10
    assert max(many["cards"]) < 120
    assert many["scripts"] == 0


def test_in_a_browser_ten_thousand_pictures_can_be_scrolled_to_the_last(many: dict[str, Any]) -> None:
    assert many["first"] == "photos/9999.jpg"
    assert many["last"] == "photos/9950.jpg"  # of those without a score
    assert many["place"] == "10000"
    assert many["end"] == [True, 0]
    top, bottom, height = many["covered"]
    assert top <= 0
    assert bottom >= height


def test_in_a_browser_ten_thousand_pictures_are_sorted_and_filtered_from_the_top(many: dict[str, Any]) -> None:
    assert many["worst"] == "photos/0.jpg"
    assert many["scrolled"] < 400
    assert many["one"]["paths"] == ["photos/9999.jpg"]
    assert many["some"] == "1,000 of 10,000 pictures"
    assert many["every"]["count"] == "100 of 10,000 pictures"
    assert many["every"]["paths"] < 100
