"""Files that are whole or not there."""

import os
import shutil

import pytest

from deqa_jax.config import ConfigError
from deqa_jax.files import new_folder, new_text, read_json, read_json_value, refuse_existing, write_text


def test_reading_json_names_the_file(tmp_path):
    with pytest.raises(ConfigError, match=r"x\.json: no such file"):
        read_json(tmp_path / "x.json")
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(ConfigError, match=r"x\.json: not JSON"):
        read_json(tmp_path / "x.json")
    (tmp_path / "x.json").write_text('[{"a": 1, "b": {"c": 2, "d": 3, "c": 4}}]')
    with pytest.raises(ConfigError, match=r"x\.json: 'c' is there twice$"):
        read_json_value(tmp_path / "x.json")
    (tmp_path / "x.json").write_text("3")
    with pytest.raises(ConfigError, match=r"x\.json: not a JSON object"):
        read_json(tmp_path / "x.json")


# ---- folders that appear when complete --------------------------------------------------------------------


def test_a_new_folder_appears_when_it_is_complete(tmp_path):
    out = tmp_path / "deep" / "down" / "M"
    with new_folder(out) as temporary:
        (temporary / "x").write_text("content")
        assert not out.exists()
        inode = temporary.stat().st_ino
    assert out.stat().st_ino == inode  # renamed, not copied
    assert (out / "x").read_text() == "content"
    assert list(out.parent.iterdir()) == [out]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failure_leaves_nothing(error, tmp_path):
    def fail():
        with new_folder(tmp_path / "M") as temporary:
            (temporary / "x").write_text("content")
            raise error

    with pytest.raises(error):
        fail()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_exists_is_refused_and_left_alone(kind, tmp_path):
    out = tmp_path / "M"
    if kind == "folder":
        out.mkdir()
    else:
        out.write_text("mine")
    with pytest.raises(FileExistsError, match="M exists already; remove it"), new_folder(out):
        pytest.fail("the block must not run")
    assert list(tmp_path.iterdir()) == [out]
    assert kind == "folder" or out.read_text() == "mine"


def test_what_appears_meanwhile_is_refused_and_left_alone(tmp_path):
    out = tmp_path / "M"

    def race():
        with new_folder(out):
            out.mkdir()
            (out / "x").write_text("of another process")

    with pytest.raises(FileExistsError, match="M exists already"):
        race()
    assert [path.name for path in tmp_path.iterdir()] == ["M"]
    assert (out / "x").read_text() == "of another process"


def test_two_that_make_the_same_folder_do_not_touch_each_others(tmp_path):
    """Two threads, or processes of one number in containers: the one that is done first wins."""
    with new_folder(tmp_path / "M") as first:
        (first / "x").write_text("first")
        with pytest.raises(FileExistsError, match="made meanwhile"), new_folder(tmp_path / "M") as second:  # noqa: PT012
            (second / "x").write_text("second")
            assert (first / "x").read_text() == "first"
            assert {first.name[:3], second.name[:3]} == {".M."}
            assert {first.suffix, second.suffix} == {".tmp"}
            (tmp_path / "M").mkdir()
            (tmp_path / "M" / "x").write_text("of a third")
        shutil.rmtree(tmp_path / "M")
    assert (tmp_path / "M" / "x").read_text() == "first"
    assert list(tmp_path.iterdir()) == [tmp_path / "M"]


# ---- files ------------------------------------------------------------------------------------------------


def test_any_json_value_can_be_read(tmp_path):
    (tmp_path / "x.json").write_text("[1, 2]")
    assert read_json_value(tmp_path / "x.json") == [1, 2]


@pytest.mark.parametrize("content", ["", "{", "[1,", "[" * 100_000, "\udc80"])
def test_what_is_no_json_is_said_to_be_none(content, tmp_path):
    (tmp_path / "x.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(ConfigError, match=r"x\.json: not JSON"):
        read_json_value(tmp_path / "x.json")


def test_a_dangling_link_exists_too(tmp_path):
    (tmp_path / "x").symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileExistsError, match="x exists already"):
        refuse_existing(tmp_path / "x")


def test_text_replaces_a_file_whole_and_leaves_nothing_beside_it(tmp_path):
    path = tmp_path / "deep" / "x.json"
    write_text(path, "one")
    write_text(path, "zwei é\udcff")
    assert path.read_bytes() == "zwei é\\udcff".encode()
    assert list(path.parent.iterdir()) == [path]


def test_text_that_cannot_be_written_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    write_text(path, "old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


# ---- files that appear when complete ----------------------------------------------------------------------


def test_a_new_file_appears_when_it_is_complete(tmp_path):
    out = tmp_path / "x.html"
    with new_text(out) as file:
        file.write("one\nzwei é\udcff\n")
        file.flush()
        assert not out.exists()
    assert out.read_bytes() == "one\nzwei é\\udcff\n".encode()
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failure_leaves_no_file(error, tmp_path):
    def fail():
        with new_text(tmp_path / "x.html") as file:
            file.write("half")
            raise error

    with pytest.raises(error):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_exists_is_refused_and_left_alone(tmp_path):
    out = tmp_path / "x.html"
    out.write_text("mine")
    with pytest.raises(FileExistsError, match=r"x\.html exists already; remove it"), new_text(out):
        pytest.fail("the block must not run")
    assert list(tmp_path.iterdir()) == [out]
    assert out.read_text() == "mine"


def test_a_file_that_was_made_meanwhile_is_left_alone(tmp_path):
    def late():
        with new_text(tmp_path / "x.html") as file:
            file.write("ours")
            (tmp_path / "x.html").write_text("theirs")

    with pytest.raises(FileExistsError, match="exists already"):
        late()
    assert (tmp_path / "x.html").read_text() == "theirs"
    assert list(tmp_path.iterdir()) == [tmp_path / "x.html"]
