"""Metas: published files are read as they are, malformed ones refused with every fault named."""

import dataclasses
import json
import lzma
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deqa_jax.data.metas import Item, MetaError, parse_item, read_metas, write_metas

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "soft_labels"
FIELDS = [
    "id",
    "image",
    "gt_score",
    "gt_score_norm",
    "level_probs_org",
    "level_probs",
    "std",
    "std_norm",
    "conversations",
    "task_type",
]
TURNS = [{"from": "human", "value": "Rate it.\n<|image|>"}, {"from": "gpt", "value": "The quality is good."}]
FULL = {
    "id": "a.png->3.10",
    "image": "KONIQ/images/a.png",
    "gt_score": 3.1,
    "gt_score_norm": 3.5,
    "level_probs_org": [0.1, 0.4, 0.5, 0.05, 0.0],
    "level_probs": [0.1, 0.4, 0.4, 0.1, 0.0],
    "std": 0.5,
    "std_norm": 0.625,
    "conversations": TURNS,
    "task_type": "score",
}


@pytest.fixture
def metas(tmp_path):
    """Reads a file of this content: text as it is, anything else as JSON."""

    def read(content):
        path = tmp_path / "metas.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return read_metas(path)

    return read


def refusal(read, *arguments):
    with pytest.raises(MetaError) as error:
        read(*arguments)
    return str(error.value)


# ---- reading ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["spaq_like_train", "spaq_like_test", "kadid_like_train", "kadid_like_test"])
def test_published_metas_are_read_whole(name, metas):
    text = lzma.decompress((GOLDEN / f"{name}.json.xz").read_bytes()).decode()
    expected = json.loads(text)
    items = metas(text)
    assert [list(item.fields()) for item in items] == [list(entry) for entry in expected]
    # Through JSON, where tuples are lists.
    assert json.loads(json.dumps([item.fields() for item in items])) == expected


def test_metas_of_training_and_of_descriptions_are_read(shared):
    train = read_metas(shared / "tiny" / "train_metas.json")
    expected = json.loads((shared / "tiny" / "train_metas.json").read_text())
    assert [item.image for item in train] == [entry["image"] for entry in expected]
    assert [item.gt_score for item in train] == [entry.get("gt_score") for entry in expected]
    described = read_metas(shared / "tiny" / "train_desp_metas.json")
    assert {item.gt_score for item in described} == {None}
    assert {item.task_type for item in described} == {"description"}
    assert all(item.conversations for item in described)


def test_every_field_is_read():
    item = parse_item(FULL)
    assert isinstance(item, Item)
    assert item.fields() == FULL | {
        "level_probs_org": (0.1, 0.4, 0.5, 0.05, 0.0),
        "level_probs": (0.1, 0.4, 0.4, 0.1, 0.0),
        "conversations": tuple(TURNS),
    }
    assert list(item.fields()) == FIELDS == [field.name for field in dataclasses.fields(Item)]


@pytest.mark.parametrize("field", FIELDS[2:])
def test_what_is_missing_or_null_is_not_known(field):
    without = {name: value for name, value in FULL.items() if name != field}
    for entry in (without, FULL | {field: None}):
        item = parse_item(entry)
        assert isinstance(item, Item)
        assert getattr(item, field) is None
        assert list(item.fields()) == [name for name in FIELDS if name != field]


@pytest.mark.parametrize("entry", [{"image": "x/a.png"}, {"id": None, "image": "x/a.png"}, {"img_path": "x/a.png"}])
def test_without_an_id_the_image_is_one(entry):
    assert parse_item(entry) == Item(id="x/a.png", image="x/a.png")


def test_ids_may_be_numbers_and_zero_is_one():
    assert parse_item({"id": 0, "image": "a.png"}) == Item(id="0", image="a.png")


def test_whole_numbers_become_floats():
    item = parse_item({"image": "a.png", "gt_score": 3, "level_probs": [1, 0, 0, 0, 0]})
    assert isinstance(item, Item)
    assert [type(x) for x in (item.gt_score, *item.level_probs)] == [float] * 6


def test_zero_is_a_score_and_a_deviation():
    item = parse_item({"image": "a.png", "gt_score": 0, "std": 0.0})
    assert isinstance(item, Item)
    assert item.fields() == {"id": "a.png", "image": "a.png", "gt_score": 0, "std": 0}


def test_probabilities_need_not_sum_to_1():
    assert isinstance(parse_item(FULL | {"level_probs": [0.5, 0.5, 0.07, 0, 0]}), Item)


def test_other_fields_are_passed_over():
    item = parse_item(FULL | {"crop": "left", "mask": [1]})
    assert isinstance(item, Item)
    assert list(item.fields()) == FIELDS


# ---- what is refused --------------------------------------------------------------------------------------

NO_NUMBERS = ["3.5", True, math.nan, math.inf, -math.inf, [3], {}, 10**400]


@pytest.mark.parametrize("value", NO_NUMBERS, ids=lambda value: repr(value)[:20])
@pytest.mark.parametrize("field", ["gt_score", "gt_score_norm", "std", "std_norm"])
def test_what_is_no_number_is_refused(field, value):
    assert parse_item(FULL | {field: value}) == f"{field} {value!r} is not a number"


@pytest.mark.parametrize(
    "value",
    [3, "excellent", {}, [], [0.2] * 4, [0.2] * 6, *([0.2, 0.2, bad, 0.2, 0.2] for bad in (*NO_NUMBERS, None))],
    ids=lambda value: repr(value)[:30],
)
@pytest.mark.parametrize("field", ["level_probs", "level_probs_org"])
def test_what_is_no_five_numbers_is_refused(field, value):
    assert parse_item(FULL | {field: value}) == f"{field} is not a list of five numbers"


@pytest.mark.parametrize(
    "value",
    [
        3,
        "text",
        {"from": "human", "value": "x"},
        ["x"],
        [None],
        [{"from": "human"}],
        [*TURNS, {"value": "x"}],
        [{"from": "human", "value": 3}],
        [{"from": None, "value": "x"}],
    ],
    ids=repr,
)
def test_what_is_no_conversation_is_refused(value):
    assert parse_item(FULL | {"conversations": value}) == (
        "conversations is not a list of turns with 'from' and 'value'"
    )


@pytest.mark.parametrize("value", ["", "Score", "caption", 3, ["score"]], ids=repr)
def test_another_task_is_refused(value):
    assert parse_item(FULL | {"task_type": value}) == f"task_type {value!r} is not one of score, description"


@pytest.mark.parametrize("entry", [{}, {"id": "x"}, {"image": ""}, {"image": 3}, {"image": ["a.png"]}], ids=repr)
def test_an_entry_without_an_image_is_refused(entry):
    assert parse_item(entry) == "no 'image'"


@pytest.mark.parametrize("entry", [None, "a.png", 3, ["a.png"]], ids=repr)
def test_what_is_no_object_is_refused(entry):
    assert parse_item(entry) == "not a JSON object"


def test_every_bad_entry_is_named_with_its_place(metas, tmp_path):
    entries = [{"image": "a.png"}, {"id": "x"}, {"image": "b.png", "std": "x"}, {"image": "a.png"}, 5]
    path = tmp_path / "metas.json"
    assert refusal(metas, entries).splitlines() == [
        f"{path}: entry 1: no 'image'",
        f"{path}: entry 2: std 'x' is not a number",
        f"{path}: entry 3: the id 'a.png' is there twice",
        f"{path}: entry 4: not a JSON object",
    ]


def test_of_many_bad_entries_the_first_are_named_and_the_others_counted(metas):
    lines = refusal(metas, [{}] * 300).splitlines()
    assert len(lines) == 11
    assert lines[-1] == "… and 290 more"


def test_two_images_of_one_id_are_refused_even_as_text_and_number(metas):
    message = refusal(metas, [{"id": 1, "image": "a.png"}, {"id": "1", "image": "b.png"}])
    assert message.endswith("entry 1: the id '1' is there twice")


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("", "not JSON"),
        ("[{", "not JSON"),
        ({}, "not a JSON list of images"),
        ({"image": "a.png"}, "not a JSON list of images"),
        ("null", "not a JSON list of images"),
        ('"a.png"', "not a JSON list of images"),
        ([], "lists no images"),
    ],
)
def test_a_file_of_another_kind_is_refused(content, complaint, metas, tmp_path):
    assert refusal(metas, content).startswith(f"{tmp_path / 'metas.json'}: {complaint}")


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    assert refusal(read_metas, tmp_path / "absent.json") == f"{tmp_path / 'absent.json'}: no such file"
    (tmp_path / "folder.json").mkdir()
    assert str(tmp_path / "folder.json") in refusal(read_metas, tmp_path / "folder.json")
    (tmp_path / "bytes.json").write_bytes(b'[{"image": "caf\xe9.png"}]')
    assert refusal(read_metas, tmp_path / "bytes.json").startswith(f"{tmp_path / 'bytes.json'}: not JSON")


# ---- writing ----------------------------------------------------------------------------------------------

TEXTS = st.text(min_size=1)
NUMBERS = st.none() | st.floats(allow_nan=False, allow_infinity=False)
PROBS = st.none() | st.tuples(*[st.floats(0, 2)] * 5)
ITEMS = st.builds(
    Item,
    id=TEXTS,
    image=TEXTS,
    gt_score=NUMBERS,
    gt_score_norm=NUMBERS,
    level_probs_org=PROBS,
    level_probs=PROBS,
    std=NUMBERS,
    std_norm=NUMBERS,
    conversations=st.none()
    | st.lists(st.fixed_dictionaries({"from": st.text(), "value": st.text()}), max_size=3).map(tuple),
    task_type=st.sampled_from([None, "score", "description"]),
)


@pytest.fixture(scope="session")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("metas") / "metas.json"


# Files are written: their speed is no concern of these tests.
@settings(deadline=None)
@given(items=st.lists(ITEMS, min_size=1, max_size=5, unique_by=lambda item: item.id))
def test_what_is_written_is_read_again_bit_for_bit(items, scratch):
    write_metas(scratch, items)
    assert read_metas(scratch) == items


def test_files_look_as_published(tmp_path):
    """Four spaces, ASCII, no newline at the end."""
    item = parse_item(FULL | {"image": "é.png", "conversations": None, "task_type": None})
    assert isinstance(item, Item)
    write_metas(tmp_path / "deep" / "metas.json", iter([item]))
    written = (tmp_path / "deep" / "metas.json").read_bytes()
    assert written.startswith(
        b'[\n    {\n        "id": "a.png->3.10",\n        "image": "\\u00e9.png",\n        "gt_score": 3.1,\n'
    )
    assert written.endswith(b'        "std": 0.5,\n        "std_norm": 0.625\n    }\n]')
