"""Which files a command line names, and how their scores are written."""

import csv
import io
import json
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deqa_jax.prompt import LEVELS
from deqa_jax.score_files import CsvRows, JsonlRows, TableRows, UsageError, find_images, score_files
from deqa_jax.scorer import Result

NO_STDIN = io.StringIO("")


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A working folder with images and other files at several depths."""
    for name in ("b.png", "a.JPG", "notes.txt", "sub/c.webp", "sub/deep/d.tiff", "sub/e.csv", "empty/readme.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    return tmp_path


# ---- finding ----------------------------------------------------------------------------------------------


def test_folders_are_searched_recursively_and_sorted(tree):
    expected = ["a.JPG", "b.png", "sub/c.webp", "sub/deep/d.tiff"]
    assert find_images(["."], NO_STDIN) == expected
    assert find_images([str(tree)], NO_STDIN) == [str(tree / name) for name in expected]
    assert find_images(["sub/"], NO_STDIN) == expected[2:]


def test_files_are_taken_as_they_are_in_the_order_given(tree):
    """Whatever their ending, and even if they are not there: that is an error of the row."""
    named = ["notes.txt", "b.png", "absent.png", "a.JPG", "b.png"]
    assert find_images(named, NO_STDIN) == named


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.png", ["b.png"]),
        ("[ab].*", ["a.JPG", "b.png"]),
        ("*/*.webp", ["sub/c.webp"]),
        ("**/*.webp", ["sub/c.webp"]),
        ("sub/**/*.t*", ["sub/deep/d.tiff"]),
        ("**/?.[wt]*", ["sub/c.webp", "sub/deep/d.tiff"]),
        ("s*/*", ["sub/c.webp", "sub/e.csv"]),
    ],
)
def test_globs_match_files_sorted(pattern, expected, tree):
    assert find_images([pattern], NO_STDIN) == expected


def test_a_file_whose_name_looks_like_a_glob_is_a_file(tree):
    (tree / "x[1].png").write_bytes(b"")
    (tree / "x1.png").write_bytes(b"")
    assert find_images(["x[1].png"], NO_STDIN) == ["x[1].png"]


def test_a_dash_reads_a_list_from_standard_input(tree):
    stdin = io.StringIO("b.png\r\n\n with spaces .png\nabsent*.png\nlast.png")
    assert find_images(["a.JPG", "-", "b.png"], stdin) == [
        "a.JPG",
        "b.png",
        " with spaces .png",
        "absent*.png",
        "last.png",
        "b.png",
    ]


def test_a_folder_named_like_an_image_is_searched_not_scored(tree):
    (tree / "album.jpg").mkdir()
    (tree / "album.jpg" / "f.png").write_bytes(b"")
    assert find_images(["."], NO_STDIN) == ["a.JPG", "album.jpg/f.png", "b.png", "sub/c.webp", "sub/deep/d.tiff"]


def test_names_that_are_not_unicode_are_found(tmp_path):
    """Linux file names are bytes; old archives are full of Latin-1."""
    path = os.fsencode(tmp_path) + b"/caf\xe9.png"
    with open(path, "wb"):
        pass
    assert [os.fsencode(name) for name in find_images([str(tmp_path)], NO_STDIN)] == [path]


@pytest.mark.parametrize(
    ("patterns", "complaint"),
    [
        (["empty"], "empty: no images in this folder .*webp"),
        (["b.png", "empty"], "empty: no images"),
        (["*.bmp"], r"\*\.bmp: matches no file"),
        (["su*"], r"su\*: matches no file"),
        ([], "no images named"),
        (["-"], "no images named"),
    ],
)
def test_naming_no_image_is_an_error(patterns, complaint, tree):
    with pytest.raises(UsageError, match=complaint):
        find_images(patterns, io.StringIO("\n\n"))


def test_an_empty_name_is_not_the_working_folder(tree):
    """As `deqa score "$FOLDER"` without that variable gives."""
    with pytest.raises(UsageError):
        find_images([""], NO_STDIN)


# ---- rows -------------------------------------------------------------------------------------------------

FLOATS = st.floats(0, 5, width=32)
RESULTS = st.builds(
    lambda score, std, probs: Result("x", score, std, tuple(probs)),
    FLOATS,
    FLOATS,
    st.lists(FLOATS, min_size=5, max_size=5),
)
PATHS = st.text(min_size=1) | st.sampled_from(
    ['comma, "quote".png', "new\nline.png", "naïve 图像 😀.jpg", "a;b\tc.png"]
)
GOOD = Result("x", 3.5, 0.25, (0.5, 0.25, 0.125, 0.0625, 0.0625))


@given(path=PATHS, result=RESULTS)
def test_json_lines_round_trip_float32(path, result):
    row = JsonlRows().row(path, result)
    assert row.endswith("\n")
    assert row.count("\n") == 1
    read = json.loads(row)
    assert list(read) == ["path", "score", "std", "probs", "error"]
    assert read["path"] == path
    assert read["error"] is None
    assert np.float32(read["score"]) == np.float32(result.score)
    assert np.float32(read["std"]) == np.float32(result.std)
    assert np.array_equal(np.float32(read["probs"]), np.float32(result.probs))


@given(rows=st.lists(st.tuples(PATHS, RESULTS), max_size=5))
def test_comma_separated_values_round_trip_float32(rows):
    writer = CsvRows()
    text = writer.header() + "".join(writer.row(path, result) for path, result in rows)
    header, *records = csv.reader(io.StringIO(text, newline=""))
    assert header == ["path", "score", "std", *LEVELS, "error"]
    assert [record[0] for record in records] == [path for path, _ in rows]
    for (*_, error), (_, result) in zip(records, rows, strict=True):
        assert error == ""
        assert result.error is None
    found = [np.float32(record[1:-1]) for record in records]
    assert [list(numbers) for numbers in found] == [
        list(np.float32([result.score, result.std, *result.probs])) for _, result in rows
    ]


def test_json_lines_keep_unicode_readable():
    assert "naïve 图像 😀.jpg" in JsonlRows().row("naïve 图像 😀.jpg", GOOD)


def test_numbers_have_no_more_digits_than_they_need():
    row = JsonlRows().row("x", GOOD._replace(score=float(np.float32(3.1))))
    assert json.loads(row)["score"] == 3.0999999
    assert "3.0999999," in row


def test_failures_are_rows_without_numbers():
    failure = Result("a, b.png", error="a, b.png: no such file")
    read = json.loads(JsonlRows().row("a, b.png", failure))
    assert read == {"path": "a, b.png", "score": None, "std": None, "probs": None, "error": failure.error}
    assert next(csv.reader([CsvRows().row("a, b.png", failure)])) == ["a, b.png", *[""] * 7, failure.error]
    row = TableRows().row("a, b.png", failure)
    assert row.count("a, b.png") == 1
    assert row.endswith("a, b.png: no such file\n")


def test_tables_are_aligned():
    rows = TableRows()
    header, good, bad = rows.header(), rows.row("x", GOOD), rows.row("x", Result("x", error="x: empty file"))
    assert header.split() == ["score", "std", *LEVELS, "path"]
    assert good.split() == ["3.500", "0.250", "0.500", "0.250", "0.125", "0.062", "0.062", "x"]
    assert header.index("path") == good.index("x") == bad.index("x")
    for level, number in zip(LEVELS, good.split()[2:7], strict=True):
        end = header.index(level) + len(level)
        assert good[end - len(number) : end] == number


def test_a_table_row_is_one_line_whatever_the_path():
    assert TableRows().row("new\nline.png", GOOD).count("\n") == 1
    assert TableRows().row("new\nline.png", Result("x", error="new\nline.png: empty file")).count("\n") == 1


# ---- scoring ----------------------------------------------------------------------------------------------


class FakeScorer:
    """Scores everything that does not say otherwise."""

    def stream(self, paths):
        for path in paths:
            yield Result(path, error=f"{path}: bad") if "bad" in path else GOOD._replace(image=path)


class Flushed(io.StringIO):
    """Notes what could be seen from outside after each flush."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def flush(self):
        self.seen.append(self.getvalue())


@pytest.mark.parametrize(("format", "lines"), [("table", 4), ("jsonl", 3), ("csv", 4)])
def test_every_file_gets_a_row_in_order_and_failures_are_counted(format, lines):
    output = io.StringIO()
    assert score_files(FakeScorer(), ["z.png", "bad.png", "a.png"], output, format=format) == 1
    rows = output.getvalue().splitlines()
    assert len(rows) == lines
    for row, path in zip(rows[-3:], ["z.png", "bad.png", "a.png"], strict=True):
        assert path in row


def test_every_row_can_be_seen_when_it_is_done():
    output = Flushed()
    score_files(FakeScorer(), ["a.png", "b.png", "c.png"], output, format="jsonl")
    assert [text.count("\n") for text in output.seen[:3]] == [1, 2, 3]


def test_whoever_else_wants_them_is_given_every_result_after_its_row():
    output, given = io.StringIO(), []

    def also(path, result):
        given.append((path, result.error, output.getvalue().count("\n")))

    score_files(FakeScorer(), ["z.png", "bad.png"], output, format="jsonl", also=also)
    assert given == [("z.png", None, 1), ("bad.png", "bad.png: bad", 2)]


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("output", "stderr", "bar"),
    [
        (io.StringIO, Terminal, True),
        (Terminal, Terminal, False),
        (io.StringIO, io.StringIO, False),
    ],
    ids=["rows to a file", "rows on the terminal", "no terminal"],
)
def test_progress_is_shown_on_a_terminal_that_shows_no_rows(output, stderr, bar, monkeypatch):
    shown = stderr()
    monkeypatch.setattr("sys.stderr", shown)
    score_files(FakeScorer(), ["a.png", "b.png"], output(), format="jsonl")
    assert ("2/2" in shown.getvalue()) == bar
