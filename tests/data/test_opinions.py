"""Lists of opinion scores, as published and as people have them: read exactly, or refused with every fault named."""

import collections
import csv
import io
import json
import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deqa_jax.data.opinions import OpinionError, read_csv, read_published

GOOD = "image,mos,std\na.png,1.5,0.5\nb.png,2,0.25\nc.png,4.75,1\n"


@pytest.fixture
def table(tmp_path):
    """Reads a CSV file of this content: text or bytes."""

    def read(content, columns=(), test_ratio=0.0, seed=0):
        path = tmp_path / "scores.csv"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return read_csv(path, dict(columns), test_ratio=test_ratio, seed=seed)

    return read


@pytest.fixture
def published(tmp_path):
    """Reads JSON files of these contents: text as it is, anything else as JSON."""

    def read(mos, split=None):
        if split is None:
            split = {"train": list(mos), "test": []}
        for name, content in (("mos.json", mos), ("split.json", split)):
            (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
        return read_published(tmp_path / "mos.json", tmp_path / "split.json")

    return read


def refusal(read, *arguments, **options):
    with pytest.raises(OpinionError) as error:
        read(*arguments, **options)
    return str(error.value)


# ---- CSV: what is read ------------------------------------------------------------------------------------


def test_rows_are_read_in_their_order(table):
    opinions = table(GOOD)
    assert opinions.names == ["a.png", "b.png", "c.png"]
    assert opinions.texts == ["1.5", "2", "4.75"]
    assert opinions.mos.tolist() == [1.5, 2, 4.75]
    assert opinions.std.tolist() == [0.5, 0.25, 1]
    assert opinions.splits == ["train"] * 3
    assert opinions.mos.dtype == opinions.std.dtype == np.float64


def test_scores_keep_the_text_of_the_file(table):
    assert table("image,mos\na.png,3.10\nb.png,1e0\nc.png,+2\n").texts == ["3.10", "1e0", "+2"]


def test_columns_may_stand_anywhere_between_others(table):
    opinions = table("date,std,,mos,image,notes\n1999,0.5,x,3,a.png,\n,0.25,,4,b.png,fine\n")
    assert opinions.names == ["a.png", "b.png"]
    assert opinions.mos.tolist() == [3, 4]
    assert opinions.std.tolist() == [0.5, 0.25]


def test_columns_may_have_other_names(table):
    content = "file,Mean Opinion,sd,set,ref\na.png,3,0.5,test,r\nb.png,4,0.25,train,r\n"
    names = {"image": "file", "mos": "Mean Opinion", "std": "sd", "split": "set", "reference": "ref"}
    opinions = table(content, names)
    assert opinions.names == ["a.png", "b.png"]
    assert opinions.mos.tolist() == [3, 4]
    assert opinions.std.tolist() == [0.5, 0.25]
    assert opinions.splits == ["test", "train"]


def test_a_renamed_column_is_not_read_under_its_own_name_too(table):
    opinions = table("image,mos,z_mos,std\na.png,50,1,9\nb.png,60,2,9\n", {"mos": "z_mos"})
    assert opinions.mos.tolist() == [1, 2]


def test_column_names_are_taken_as_they_are_written(table):
    message = refusal(table, "Image, mos\na.png,3\n")
    assert "no column 'image', 'mos'; it has 'Image', ' mos'" in message
    assert "--column mos=MOS" in message


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbf" + GOOD.encode(),
        GOOD.replace("\n", "\r\n").encode(),
        GOOD.replace("\n", "\r").encode(),
        GOOD.rstrip("\n").encode(),
        GOOD.replace("\n", "\n\n").encode(),
        GOOD.replace("image", '"image"').replace("1.5", '"1.5"').encode(),
    ],
    ids=["byte order mark", "CRLF", "CR", "no last newline", "empty lines", "quoted"],
)
def test_files_of_other_programs_are_read_alike(content, table):
    opinions = table(content)
    assert opinions.names == ["a.png", "b.png", "c.png"]
    assert opinions.texts == ["1.5", "2", "4.75"]
    assert opinions.std.tolist() == [0.5, 0.25, 1]


def test_names_may_have_commas_quotes_newlines_and_any_script(table):
    names = [
        "a, b.png",
        'the "best".png',
        "two\nlines.png",
        "as\r\nthere.png",
        "naïve 图像 😀.png",
        " spaces .png",
        "sub folder/x.png",
    ]
    content = io.StringIO()
    csv.writer(content).writerows([("image", "mos"), *((name, 3) for name in names)])
    assert table(content.getvalue()).names == names


def test_deviations_may_be_missing_here_and_there(table):
    opinions = table("image,mos,std\na.png,3,\nb.png,4,0.5\nc.png,5\n")
    assert np.isnan(opinions.std).tolist() == [True, False, True]
    assert np.isnan(table("image,mos\na.png,3\n").std).all()


# ---- CSV: what is refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ("x.png,,", "there is no mos"),
        ("x.png", "there is no mos"),
        ("x.png,good,", "mos 'good' is not a number"),
        ('x.png,"3,5",', "mos '3,5' is not a number"),
        ("x.png,nan,", "mos 'nan' is not a number"),
        ("x.png,inf,", "mos 'inf' is not a number"),
        ("x.png,-Infinity,", "mos '-Infinity' is not a number"),
        ("x.png,1e999,", "mos '1e999' is not a number"),
        ("x.png,3,nan", "std 'nan' is not a number"),
        ("x.png,3,inf", "std 'inf' is not a number"),
        ("x.png,3,n/a", "std 'n/a' is not a number"),
        ("x.png,3,-0.5", "std -0.5 is negative"),
        (",3,0.5", "there is no image name"),
        (",,-1", "there is no mos; there is no image name; std -1 is negative"),
    ],
)
def test_a_bad_row_is_named_with_its_line(row, complaint, table, tmp_path):
    message = refusal(table, f"{GOOD}{row}\nd.png,3,0.5\n")
    assert message == f"{tmp_path / 'scores.csv'}:5: {complaint}"


def test_a_deviation_of_zero_is_a_deviation(table, published):
    assert table("image,mos,std\na.png,3,0\n").std.tolist() == [0]
    assert published({"a.png": {"mos": 1, "std": 0}}).std.tolist() == [0]


def test_a_negative_score_is_a_score(table):
    assert table("image,mos\na.png,-3\nb.png,-0.5\n").mos.tolist() == [-3, -0.5]


def test_every_bad_row_is_named(table):
    message = refusal(table, "image,mos,split\na.png,x,\nb.png,3,\nc.png,,valid\nb.png,2,\n")
    first, second, third = message.splitlines()
    assert first.endswith("scores.csv:2: mos 'x' is not a number")
    assert second.endswith("scores.csv:4: there is no mos; split 'valid' is not one of train, test or empty")
    assert third.endswith("scores.csv: b.png is listed 2 times")


def test_of_many_bad_rows_the_first_are_named_and_the_others_counted(table):
    lines = refusal(table, "image,mos\n" + "a.png,bad\n" * 500).splitlines()
    assert len(lines) == 11
    assert lines[9].endswith("scores.csv:11: mos 'bad' is not a number")
    assert lines[10] == "… and 490 more"


def test_lines_are_counted_where_fields_have_several(table):
    assert "scores.csv:5: mos 'x'" in refusal(table, 'image,mos\n"a\nb.png",3\n\nc.png,x\n')


def test_images_are_listed_once(table):
    message = refusal(table, "image,mos\na.png,3\nb.png,3\na.png,3\na.png,4\nb.png,1\n")
    assert [line.partition("csv: ")[2] for line in message.splitlines()] == [
        "a.png is listed 3 times",
        "b.png is listed 2 times",
    ]


def test_the_same_name_in_two_folders_is_two_images(table):
    assert table("image,mos\nx/a.png,3\ny/a.png,4\n").names == ["x/a.png", "y/a.png"]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("", "the first line does not name the columns"),
        ("\n\n", "the first line does not name the columns"),
        ("\nimage,mos\na.png,3\n", "the first line does not name the columns"),
        ("image,mos\n", "has no images"),
        ("image,mos", "has no images"),
        ("image\na.png\n", "no column 'mos'; it has 'image'"),
        ("image;mos\na.png;3\n", "no column 'image', 'mos'; it has 'image;mos'"),
        ("a.png,3\nb.png,4\n", "no column 'image', 'mos'; it has 'a.png', '3'"),
        ("image,mos,mos\na.png,3,4\n", "more than one column 'mos'"),
        ("image,mos,std,std\na.png,3,4,5\n", "more than one column 'std'"),
        ('image,mos\n"a.png,3\nb.png,4\n', "not a CSV file in UTF-8"),
        ("image,mos\ncaf\xe9.png,3\n".encode("latin-1"), "not a CSV file in UTF-8"),
        (GOOD.encode("utf-16"), "not a CSV file in UTF-8"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "not a CSV file in UTF-8"),
        ("image,mos\n" + "x" * 200_000 + ",3\n", "not a CSV file in UTF-8"),
    ],
)
def test_a_file_that_is_no_such_table_is_refused(content, complaint, table, tmp_path):
    message = refusal(table, content)
    assert message.startswith(f"{tmp_path / 'scores.csv'}: ")
    assert complaint in message


def test_other_columns_may_have_one_name(table):
    assert table("image,mos,,,x,x\na.png,3,1,2,3,4\n").mos.tolist() == [3]


@pytest.mark.parametrize("columns", [{"std": "sd"}, {"split": "set"}, {"reference": "ref"}, {"image": "file"}])
def test_a_column_that_was_named_must_be_there(columns, table):
    assert f"no column {next(iter(columns.values()))!r}; it has 'image', 'mos', 'std'." in refusal(table, GOOD, columns)


def test_one_column_cannot_be_two_things(table):
    message = refusal(table, "image,mos\na.png,3\n", {"image": "mos"})
    assert message.endswith(".csv: image: column 'mos' is another one's too")


def test_every_row_with_a_field_too_many_is_named(table):
    message = refusal(table, "image,mos\na, b.png,3\nc.png,4\nd.png,5,6,7\n")
    assert [line.partition(".csv:")[2][:26] for line in message.splitlines()] == [
        "2: more fields than the he",
        "4: more fields than the he",
    ]
    assert "put names with commas in quotes" in message


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(OpinionError, match=r"absent\.csv: no such file"):
        read_csv(tmp_path / "absent.csv", {}, test_ratio=0.2, seed=0)


# ---- CSV: splits ------------------------------------------------------------------------------------------


def test_a_split_column_decides(table):
    content = "image,mos,split,reference\na.png,3,test,r\nb.png,4,train,r\nc.png,5,,r\nd.png,5\n"
    # Even if references end up on both sides, and whatever the ratio.
    assert table(content, test_ratio=1.0, seed=7).splits == ["test", "train", None, None]


@pytest.mark.parametrize("name", ["Train", " train", "validation", "0"])
def test_other_splits_are_refused(name, table):
    message = refusal(table, f"image,mos,split\na.png,3,train\nb.png,3,{name}\n")
    assert f"scores.csv:3: split {name!r} is not one of train, test or empty" in message


NAMES = st.text("abcdef0123 é图", min_size=1, max_size=6)
REFERENCES = st.none() | st.sampled_from(["r1", "r2", "r3", "r4"])
SEEDS = st.integers(0, 2**32 - 1)


@pytest.fixture(scope="session")
def drawn(tmp_path_factory):
    """Splits of images with these references (None: an empty field), by image."""
    path = tmp_path_factory.mktemp("draws") / "scores.csv"

    def draw(references, ratio, seed):
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("reference", "image", "mos"))
            writer.writerows((reference or "", image, 3) for image, reference in references.items())
        opinions = read_csv(path, {}, test_ratio=ratio, seed=seed)
        assert opinions.names == list(references)
        return dict(zip(opinions.names, opinions.splits, strict=True))

    return draw


# Files are written: their speed is no concern of these tests.
@settings(deadline=None)
@given(
    references=st.dictionaries(NAMES, REFERENCES, min_size=1, max_size=30),
    ratio=st.floats(0, 1) | st.sampled_from([0.0, 1.0, 0.2]),
    seed=SEEDS,
    order=st.randoms(use_true_random=False),
)
def test_references_are_on_one_side_at_about_the_ratio_in_any_order(references, ratio, seed, order, drawn):
    splits = drawn(references, ratio, seed)
    assert set(splits.values()) <= {"train", "test"}
    sides = collections.defaultdict(set)
    for image, split in splits.items():
        sides[references[image] or image].add(split)
    assert all(len(side) == 1 for side in sides.values())
    # As near as the largest group lets it be.
    tested = sum(split == "test" for split in splits.values())
    largest = max(collections.Counter(reference or image for image, reference in references.items()).values())
    assert abs(tested - ratio * len(references)) <= largest / 2 + 1e-9
    if ratio in (0, 1):
        assert tested == ratio * len(references)
    shuffled = list(references.items())
    order.shuffle(shuffled)
    assert drawn(dict(shuffled), ratio, seed) == splits


@pytest.mark.parametrize(("ratio", "tested"), [(0.24, 0), (0.25, 0), (0.26, 2), (0.75, 2), (0.76, 4)])
def test_a_reference_is_drawn_only_if_that_brings_the_share_nearer(ratio, tested, drawn):
    """Two references of two versions each."""
    splits = drawn({"a": "r", "b": "r", "c": "s", "d": "s"}, ratio, 0)
    assert list(splits.values()).count("test") == tested


def test_another_seed_draws_other_images(drawn):
    references = {f"{number}.png": None for number in range(50)}
    assert len({tuple(drawn(references, 0.5, seed).values()) for seed in range(5)}) == 5


def test_drawing_leaves_the_global_random_state_alone(drawn):
    random.seed(5)
    before = random.getstate()
    drawn({"a": None, "b": None}, 0.5, 0)
    assert random.getstate() == before


def test_a_new_score_moves_no_image(table):
    rows = [f"{number}.png,{number}" for number in range(20)]
    first = table("image,mos\n" + "\n".join(rows), test_ratio=0.3)
    second = table("image,mos\n" + "\n".join(f"{row}.5" for row in rows), test_ratio=0.3)
    assert first.splits == second.splits
    assert first.splits.count("test") == 6


def test_a_reference_that_is_an_image_itself_stays_with_its_versions(drawn):
    references = {"r.png": None, "r_blurred.png": "r.png", "s.png": "s.png", "s_noisy.png": "s.png"}
    for seed in range(10):
        splits = drawn(references, 0.5, seed)
        assert splits["r.png"] == splits["r_blurred.png"]
        assert splits["s.png"] == splits["s_noisy.png"] != splits["r.png"]


# ---- the published JSON files -----------------------------------------------------------------------------


def test_published_scores_are_read_in_file_order(published):
    mos = {"b.png": {"mos": 3.8285714285704997, "std": 0.5}, "a.png": {"mos": 2, "std": 1}}
    opinions = published(mos, {"train": ["a.png"], "test": ["b.png"]})
    assert opinions.names == ["b.png", "a.png"]
    assert opinions.texts == ["3.8285714285704997", "2"]
    assert opinions.mos.tolist() == [3.8285714285704997, 2]
    assert opinions.std.tolist() == [0.5, 1]
    assert opinions.splits == ["test", "train"]


def test_published_numbers_may_be_texts_and_keep_their_zeros(published):
    opinions = published({"a.png": {"mos": "1.270", "std": "0.3360"}})
    assert opinions.texts == ["1.270"]
    assert opinions.mos.tolist() == [1.27]
    assert opinions.std.tolist() == [0.336]


def test_published_deviations_may_be_missing(published):
    opinions = published({"a.png": {"mos": 1}, "b.png": {"mos": 1, "std": None}, "c.png": {"mos": 1, "std": ""}})
    assert np.isnan(opinions.std).all()


def test_split_names_have_no_folders_while_scored_names_may(published, caplog):
    """A quirk of the published files."""
    entry = {"mos": 1, "std": 1}
    opinions = published(
        {"Distortion_1/x.bmp": entry, "Distortion_2/y.bmp": entry, "z.bmp": entry},
        {"train": ["y.bmp", "absent.bmp"], "test": ["x.bmp"]},
    )
    assert opinions.names == ["Distortion_1/x.bmp", "Distortion_2/y.bmp", "z.bmp"]
    assert opinions.splits == ["test", "train", None]
    (warning,) = caplog.messages
    assert "split.json names images that " in warning
    assert warning.endswith("mos.json has no scores of: absent.bmp")


def test_an_image_in_both_splits_is_trained_on(published):
    split = {"train": ["a.png"], "test": ["a.png", "b.png"], "val": ["b.png"]}
    assert published({"a.png": {"mos": 1}, "b.png": {"mos": 1}}, split).splits == ["train", "test"]


def test_no_field_of_an_entry_replaces_its_name(published):
    opinions = published({"a.png": {"image": 5, "mos": 1}, "b.png": {"image": "a.png", "split": "test", "mos": 1}})
    assert opinions.names == ["a.png", "b.png"]
    assert opinions.splits == ["train", "train"]


@pytest.mark.parametrize(
    ("entry", "complaint"),
    [
        ({}, "there is no mos"),
        (3.5, "there is no mos"),
        (None, "there is no mos"),
        ([3.5, 1], "there is no mos"),
        ({"mos": None}, "there is no mos"),
        ({"mos": ""}, "there is no mos"),
        ({"mos": "good"}, "mos 'good' is not a number"),
        ({"mos": True}, "mos True is not a number"),
        ({"mos": [3]}, "mos [3] is not a number"),
        ({"mos": {"x": 3}}, "mos {'x': 3} is not a number"),
        ({"mos": math.nan}, "mos nan is not a number"),
        ({"mos": -math.inf}, "mos -inf is not a number"),
        ({"mos": 10**400}, f"mos {10**400} is not a number"),
        ({"mos": 3, "std": "x"}, "std 'x' is not a number"),
        ({"mos": 3, "std": -1}, "std -1 is negative"),
        ({"mos": 3, "std": "-0.1"}, "std -0.1 is negative"),
        ({"mos": 3, "std": False}, "std False is not a number"),
        ({"mos": "x", "std": math.nan}, "mos 'x' is not a number; std nan is not a number"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_bad_entry_is_named(entry, complaint, published, tmp_path):
    message = refusal(published, {"a.png": {"mos": 1}, "bad.png": entry})
    assert message == f"{tmp_path / 'mos.json'}: bad.png: {complaint}"


def test_every_bad_entry_is_named(published):
    message = refusal(published, {"a.png": {}, "": {"mos": 3}, "c.png": {"mos": 2}, "d.png": {"mos": "x"}})
    assert [line.partition("mos.json: ")[2] for line in message.splitlines()] == [
        "a.png: there is no mos",
        ": there is no image name",
        "d.png: mos 'x' is not a number",
    ]


@pytest.mark.parametrize(
    ("mos", "split", "complaint"),
    [
        ({}, {"train": [], "test": []}, "mos.json: has no images"),
        ([], {"train": [], "test": []}, "mos.json: not a JSON object"),
        ("{", {"train": [], "test": []}, "mos.json: not JSON"),
        ("", {"train": [], "test": []}, "mos.json: not JSON"),
        ({"a.png": {"mos": 1}}, [], "split.json: not a JSON object"),
        ({"a.png": {"mos": 1}}, "nothing", "split.json: not JSON"),
        ({"a.png": {"mos": 1}}, {"train": []}, "split.json: has no list 'test' of image names"),
        ({"a.png": {"mos": 1}}, {"test": []}, "split.json: has no list 'train' of image names"),
        ({"a.png": {"mos": 1}}, {"train": "a.png", "test": []}, "split.json: has no list 'train' of image names"),
        ({"a.png": {"mos": 1}}, {"train": {"a.png": 1}, "test": []}, "split.json: has no list 'train'"),
        ({"a.png": {"mos": 1}}, {"train": [], "test": None}, "split.json: has no list 'test' of image names"),
    ],
)
def test_published_files_of_another_kind_are_refused(mos, split, complaint, published, tmp_path):
    assert f"{tmp_path}/{complaint}" in refusal(published, mos, split)


@pytest.mark.parametrize("name", ["mos.json", "split.json"])
@pytest.mark.parametrize("replacement", ["nothing", "folder", "bytes"])
def test_published_files_that_cannot_be_read_are_named(name, replacement, published, tmp_path):
    published({"a.png": {"mos": 1}})
    (tmp_path / name).unlink()
    if replacement == "folder":
        (tmp_path / name).mkdir()
    elif replacement == "bytes":
        (tmp_path / name).write_bytes(b"\xff\xfe{\0}\0")
    with pytest.raises(OpinionError, match=name.replace(".", r"\.")):
        read_published(tmp_path / "mos.json", tmp_path / "split.json")
