"""`deqa labels`: the published metas value for value, labels of one's own scores, and nothing written on any fault."""

import json
import lzma
import math
import os
import random
import re

import numpy as np
import pytest
from conftest import GOLDEN
from hypothesis import given
from hypothesis import strategies as st

from deqa_jax import labels as labels_module
from deqa_jax.config import ConfigError
from deqa_jax.data.metas import read_metas
from deqa_jax.data.opinions import OpinionError, Opinions, read_published
from deqa_jax.data.soft_labels import WEIGHTS
from deqa_jax.labels import ANSWER, QUESTIONS, LabelSettings, label_csv, label_published, make_labels

PUBLISHED = GOLDEN / "soft_labels"
CONFIG = json.loads((PUBLISHED / "config.json").read_text())
SETS = list(CONFIG["datasets"])
ROW = re.compile(r"^(?P<name>\S+) +(?P<kind>density as it is|soft|one-hot) +(?P<numbers>.*)$", re.MULTILINE)


def is_sentence(text):
    return text.startswith("deqa: ") and text.endswith("\n") and "Traceback" not in text and len(text) > 20


def files_below(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def opinions_of(mos, std=None, splits=None, names=None, texts=None):
    return Opinions(
        names or [f"{number}.png" for number in range(len(mos))],
        texts or [f"{score:g}" for score in mos],
        np.array(mos, np.float64),
        np.full(len(mos), np.nan) if std is None else np.array(std, np.float64),
        splits or ["train"] * len(mos),
    )


# ---- the published metas ----------------------------------------------------------------------------------


def unpacked(name):
    return lzma.decompress((PUBLISHED / f"{name}.json.xz").read_bytes())


@pytest.fixture(scope="session")
def published_inputs(tmp_path_factory):
    """A folder with the opinion scores and splits of every set, and a configuration that writes into `out`."""
    folder = tmp_path_factory.mktemp("soft_labels")
    datasets = {}
    for name in SETS:
        for kind in ("mos", "split"):
            (folder / f"{name}_{kind}.json").write_bytes(unpacked(f"{name}_{kind}"))
        datasets[name] = {key: value for key, value in CONFIG["datasets"][name].items() if key != "stdout"} | {
            "mos_json": f"{name}_mos.json",
            "split_json": f"{name}_split.json",
            "save_train": f"out/{name}_train.json",
            "save_test": f"out/{name}_test.json",
        }
    (folder / "config.json").write_text(json.dumps({"answer": CONFIG["answer"], "dataset_params": datasets}))
    return folder


@pytest.fixture(scope="session")
def published_outputs(published_inputs):
    """The folder of metas that the command writes for all sets at once, and what it prints."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(published_inputs)
        table = label_published(published_inputs / "config.json")
    return published_inputs / "out", table


@pytest.fixture(scope="session")
def published_labels(published_inputs):
    """Labels of every set."""
    found = {}
    for name in SETS:
        entry = CONFIG["datasets"][name]
        settings = LabelSettings(
            image_folder=entry["img_dir"],
            density=entry["density_type"],
            min_std=entry["thre_std"],
            max_error=entry["thre_diff"],
            answer=CONFIG["answer"],
        )
        opinions = read_published(published_inputs / f"{name}_mos.json", published_inputs / f"{name}_split.json")
        found[name] = make_labels(opinions, settings)
    return found


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("name", SETS)
def test_metas_are_those_published_value_for_value(name, split, published_outputs):
    folder, _ = published_outputs
    found = json.loads((folder / f"{name}_{split}.json").read_text())
    expected = json.loads(unpacked(f"{name}_{split}"))
    assert [list(item) for item in found] == [list(item) for item in expected]
    computed = ("level_probs_org", "level_probs")
    assert all((key in item) == (split == "train") for key in (*computed, "conversations") for item in found)
    for key in computed if split == "train" else ():
        np.testing.assert_allclose([x.pop(key) for x in found], [x.pop(key) for x in expected], rtol=0, atol=1e-11)
    assert found == expected


def test_all_published_sets_are_written_and_nothing_else(published_outputs):
    folder, _ = published_outputs
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        f"{name}_{split}.json" for name in SETS for split in ("train", "test")
    )


@pytest.mark.parametrize("name", SETS)
def test_statistics_are_those_that_the_published_code_prints(name, published_labels):
    labels = published_labels[name]
    printed = CONFIG["datasets"][name]["stdout"]
    numbers = [[float(word) for word in line.split() if word[-1].isdigit()] for line in printed]
    correlations, raw, soft, alpha, beta, (two_levels, images) = numbers
    found = {
        "correlations": ((labels.soft.srcc, labels.soft.plcc), correlations),
        "raw_diff": ((labels.raw.mean_l1, labels.raw.mean_l2), raw),
        "diff": ((labels.soft.mean_l1, labels.soft.mean_l2), soft),
        "alpha": ((labels.labels.alpha.mean(), labels.labels.alpha.std()), alpha),
        "beta": ((labels.labels.beta.mean(), labels.labels.beta.std()), beta),
    }
    for what, (mine, theirs) in found.items():
        assert mine == pytest.approx(theirs, rel=0, abs=1e-9), what
    assert labels.labels.two_levels.sum() == two_levels
    assert len(labels.labels.two_levels) == images == sum(map(len, labels.items.values()))


def test_the_table_has_a_row_per_set_and_kind_of_label(published_outputs, published_labels):
    _, table = published_outputs
    rows = [match.groupdict() for match in ROW.finditer(table)]
    assert [(row["name"], row["kind"]) for row in rows] == [
        (name, kind) for name in SETS for kind in ("density as it is", "soft", "one-hot")
    ]
    for row in rows:
        labels = published_labels[row["name"]]
        error = {"density as it is": labels.raw, "soft": labels.soft, "one-hot": labels.one_hot}[row["kind"]]
        assert row["numbers"].split() == [f"{x:.4f}" for x in error]
    assert "koniq: alpha 1.0348 ± 0.0396, beta -0.0045 ± 0.0045, two levels 76 of 9073" in table.splitlines()


@pytest.mark.parametrize("name", SETS)
def test_soft_labels_are_nearer_to_the_opinions_than_one_word(name, published_labels):
    """As in the paper, and by as much."""
    labels = published_labels[name]
    assert labels.soft.mean_l1 < labels.one_hot.mean_l1 / 10
    assert labels.soft.std_l1 < labels.one_hot.std_l1
    assert labels.soft.plcc > labels.one_hot.plcc


def test_published_questions_are_the_ones_drawn_from():
    assert list(QUESTIONS) == CONFIG["questions"]
    assert CONFIG["answer"] == ANSWER


# ---- labels -----------------------------------------------------------------------------------------------


def test_metas_of_a_small_table():
    opinions = opinions_of([20, 80, 100, 0], [25, 10, 5, 5], ["train", "test", "train", None], texts=list("abcd"))
    labels = make_labels(opinions, LabelSettings(image_folder="OWN/images"))
    assert [item.id for item in labels.items["train"]] == ["0.png->a", "2.png->c"]
    (test,) = labels.items["test"]
    assert test.fields() == {
        "id": "1.png->b",
        "image": "OWN/images/1.png",
        "gt_score": 80.0,
        "gt_score_norm": pytest.approx(4.2, rel=1e-15),
        "std": 10.0,
        "std_norm": 0.4,
    }
    first = labels.items["train"][0]
    assert list(first.fields()) == [
        "id", "image", "gt_score", "gt_score_norm", "level_probs_org", "level_probs", "std", "std_norm", "conversations"
    ]  # fmt: skip
    assert (first.gt_score, first.gt_score_norm, first.std, first.std_norm) == (20, 1.8, 25, 1)
    assert np.dot(first.level_probs, WEIGHTS) == pytest.approx(1.8, rel=0, abs=0.1)


def test_every_score_counts_for_the_range_those_in_neither_split_too():
    labels = make_labels(opinions_of([0, 25, 75, 100], None, [None, "train", "train", None]))
    assert [item.gt_score_norm for item in labels.items["train"]] == [2, 4]


def test_questions_are_drawn_for_images_in_a_split_those_to_test_on_too():
    splits = ["train", None, "test", "train", "train"] * 8
    labels = make_labels(opinions_of([1, 2, 3, 4, 5] * 8, None, splits))
    # The published code seeds the module's own generator.
    generator = random.Random(131)
    drawn = [(split, generator.choice(CONFIG["questions"])) for split in splits if split]
    expected = [question for split, question in drawn if split == "train"]
    asked = [item.conversations[0] for item in labels.items["train"]]
    assert asked == [{"from": "human", "value": f"{question}\n<|image|>"} for question in expected]


def test_drawing_leaves_the_global_random_state_alone():
    random.seed(3)
    before = random.getstate()
    first, second = (make_labels(opinions_of([1, 2, 5])).items["train"] for _ in range(2))
    assert first == second
    assert random.getstate() == before


def test_answers_name_one_word_of_five_equal_intervals():
    labels = make_labels(opinions_of([0, 20, 21, 41, 61, 80, 81, 100]), LabelSettings(answer="{}!"))
    said = [item.conversations[1] for item in labels.items["train"]]
    words = ["bad", "bad", "poor", "fair", "good", "good", "excellent", "excellent"]
    assert said == [{"from": "gpt", "value": f"{word}!"} for word in words]


def test_without_deviations_metas_have_none_and_scores_are_put_on_two_levels():
    opinions = opinions_of([1, 2.25, 3.5, 5], [np.nan, 0.5, np.nan, 1.0], ["train", "train", "test", "train"])
    labels = make_labels(opinions, LabelSettings(max_error=10))
    first, second, last = labels.items["train"]
    (test,) = labels.items["test"]
    assert [list(item.fields()) for item in (first, test)] == [
        ["id", "image", "gt_score", "gt_score_norm", "level_probs", "conversations"],
        ["id", "image", "gt_score", "gt_score_norm"],
    ]
    assert labels.labels.two_levels.tolist() == [True, False, True, False]
    for item in (second, last):
        assert len(item.fields()) == 9
    np.testing.assert_allclose(first.level_probs, [0, 0, 0, 0, 1], rtol=0, atol=1.1e-8)


def test_density_none_keeps_deviations_and_uses_two_levels():
    labels = make_labels(opinions_of([1, 2.25, 5], [0.5, 0.75, 1]), LabelSettings(density="none"))
    item = labels.items["train"][1]
    assert labels.labels.two_levels.all()
    assert (item.level_probs_org, item.std, item.std_norm) == (None, 0.75, 0.75)
    np.testing.assert_allclose(item.level_probs, [0, 0, 0.25, 0.75, 0], rtol=0, atol=1e-8)
    assert all(math.isnan(x) for x in labels.raw)


def test_a_deviation_of_zero_is_a_deviation():
    item = make_labels(opinions_of([1, 2.25, 5], [0.0, 0.0, 0.0])).items["train"][1]
    assert (item.std, item.std_norm, item.level_probs_org) == (0, 0, None)
    np.testing.assert_allclose(item.level_probs, [0, 0, 0.25, 0.75, 0], rtol=0, atol=1e-8)


@pytest.mark.parametrize("std", [1e-320, 1e-200, 1e-99])
def test_metas_are_json_whatever_rounding_left_of_a_deviation(std, tmp_path):
    (tmp_path / "scores.csv").write_text(f"image,mos,std\na.png,1,{std}\nb.png,3,{std}\nc.png,5,{std}\n")
    label_csv(tmp_path / "scores.csv", tmp_path / "out", LabelSettings(), columns={}, test_ratio=0.0)

    def refuse(constant):
        pytest.fail(f"{constant} is not JSON")

    json.loads((tmp_path / "out" / "train.json").read_text(), parse_constant=refuse)


def test_thresholds_are_those_of_the_settings():
    opinions = opinions_of([1, 2.3, 3.6, 5], [0.5, 0.6, 0.7, 0.8])
    for settings, two_levels in (
        (LabelSettings(max_error=10), [False] * 4),
        (LabelSettings(min_std=0.7, max_error=10), [True, True, False, False]),
        (LabelSettings(min_std=0, max_error=0), [True] * 4),
    ):
        assert make_labels(opinions, settings).labels.two_levels.tolist() == two_levels


# ---- ids and images ---------------------------------------------------------------------------------------


def test_ids_have_no_folders_where_names_alone_tell_images_apart():
    labels = make_labels(opinions_of([1, 5], names=["x/a.png", "y/b.png"], texts=["1.00", "5"]))
    assert [item.id for item in labels.items["train"]] == ["a.png->1.00", "b.png->5"]
    assert [item.image for item in labels.items["train"]] == ["x/a.png", "y/b.png"]


@pytest.mark.parametrize("splits", [["train"] * 3, ["train", "train", "test"], ["train", "train", None]])
def test_ids_have_folders_where_names_alone_collide(splits):
    names = ["x/a.png", "y/b.png", "z/a.png"]
    labels = make_labels(opinions_of([1, 5, 1], None, splits, names, ["1", "5", "1"]))
    assert [item.id for item in labels.items["train"]][:2] == ["x/a.png->1", "y/b.png->5"]


@given(
    names=st.lists(
        st.sampled_from(["a", "b", "x/a", "y/a", "x/y/a", "a->1", "a->1->1", "./a"]), min_size=2, unique=True
    ),
    data=st.data(),
)
def test_ids_are_unique(names, data):
    mos = [1.0, *data.draw(st.lists(st.sampled_from([1.0, 5.0]), min_size=len(names) - 1, max_size=len(names) - 1))]
    labels = make_labels(opinions_of(mos, names=names), LabelSettings(scale=(1, 5)))
    ids = [item.id for item in labels.items["train"]]
    assert len(set(ids)) == len(names)


@pytest.mark.parametrize("folder", ["OWN/images", "OWN/images/"])
def test_the_folder_is_written_in_front_of_names(folder):
    labels = make_labels(opinions_of([1, 5], names=["x/a.png", "b.png"]), LabelSettings(image_folder=folder))
    assert [item.image for item in labels.items["train"]] == ["OWN/images/x/a.png", "OWN/images/b.png"]


# ---- scale and direction ----------------------------------------------------------------------------------


def test_a_scale_takes_the_place_of_the_range():
    opinions = opinions_of([25, 50, 75], [10, 25, 50])
    items = make_labels(opinions, LabelSettings(scale=(0, 100), max_error=10)).items["train"]
    assert [item.gt_score_norm for item in items] == [2, 3, 4]
    assert [item.std_norm for item in items] == [0.4, 1, 2]
    assert [item.conversations[1]["value"] for item in items] == [ANSWER.format(x) for x in ("poor", "fair", "good")]


def test_scores_at_the_ends_of_the_scale_are_inside():
    items = make_labels(opinions_of([1, 5]), LabelSettings(scale=(1, 5))).items["train"]
    assert [item.gt_score_norm for item in items] == [1, 5]


@pytest.mark.parametrize("invert", [False, True])
@pytest.mark.parametrize(
    ("mos", "complaint"),
    [
        ([1, 5.0000001, 3], "1 scores are outside the scale from 1 to 5, the first 5.0000001 of 1.png"),
        ([0.9, 3, 7], "2 scores are outside the scale from 1 to 5, the first 0.9 of 0.png"),
        ([2, 3, -1], "1 scores are outside the scale from 1 to 5, the first -1 of 2.png"),
    ],
)
def test_scores_outside_of_the_scale_are_named(mos, complaint, invert):
    # Even if they are in neither split: then the scale is not that of the file.
    opinions = opinions_of(mos, None, [None, None, None], texts=[str(x) for x in mos])
    with pytest.raises(OpinionError, match=re.escape(complaint)):
        make_labels(opinions, LabelSettings(scale=(1, 5), invert=invert))


@pytest.mark.parametrize("mos", [[3.0], [3.0, 3.0, 3.0]])
def test_scores_that_are_all_equal_need_a_scale(mos):
    with pytest.raises(OpinionError, match="all scores are the same; give their scale, for example --scale 1 5"):
        make_labels(opinions_of(mos))
    labels = make_labels(opinions_of(mos), LabelSettings(scale=(1, 4)))
    assert {item.gt_score_norm for item in labels.items["train"]} == {4 * 2 / 3 + 1}
    assert math.isnan(labels.soft.srcc)


def test_images_must_be_in_a_split():
    with pytest.raises(OpinionError, match="no image is in the train or test split"):
        make_labels(opinions_of([1, 5], None, [None, None]))


def test_low_scores_are_good_when_inverted():
    opinions = opinions_of([0, 25, 90], [10, 20, 30], ["train", "test", "train"], texts=["0.0", "25.0", "90.0"])
    labels = make_labels(opinions, LabelSettings(scale=(0, 100), invert=True, max_error=10))
    best, worst = labels.items["train"]
    (test,) = labels.items["test"]
    assert [item.gt_score for item in (best, test, worst)] == [100, 75, 10]
    assert [item.gt_score_norm for item in (best, test, worst)] == [5, 4, 1.4]
    # Deviations have no direction, and ids keep the score of the file.
    assert [item.std for item in (best, test, worst)] == [10, 20, 30]
    assert [item.id for item in (best, test, worst)] == ["0.png->0.0", "1.png->25.0", "2.png->90.0"]
    assert best.conversations[1]["value"] == ANSWER.format("excellent")
    assert worst.conversations[1]["value"] == ANSWER.format("bad")
    assert np.argmax(best.level_probs) == 0


def test_without_a_scale_inversion_swaps_best_and_worst():
    items = make_labels(opinions_of([-10, 0, 30]), LabelSettings(invert=True)).items["train"]
    assert [item.gt_score for item in items] == [30, 20, -10]
    assert [item.gt_score_norm for item in items] == [5, 4, 1]


@given(
    scores=st.lists(st.integers(0, 4096).map(lambda x: x / 64), min_size=2, max_size=6),
    deviations=st.lists(st.just(math.nan) | st.floats(0, 20), min_size=6, max_size=6),
    density=st.sampled_from(["pdf", "cdf", "none"]),
)
def test_inversion_is_labelling_the_mirrored_scores(scores, deviations, density):
    """In numbers that have an exact mirror image."""
    mirrored = [64 - score for score in scores]
    settings = LabelSettings(scale=(0, 64), density=density)
    found = make_labels(
        opinions_of(scores, deviations[: len(scores)], texts=["x"] * len(scores)),
        LabelSettings(scale=(0, 64), density=density, invert=True),
    )
    expected = make_labels(opinions_of(mirrored, deviations[: len(scores)], texts=["x"] * len(scores)), settings)
    assert found.items == expected.items


@given(
    scores=st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=6).filter(lambda x: max(x) - min(x) > 1e-3),
    invert=st.booleans(),
)
def test_normalised_scores_are_from_1_to_5_in_order(scores, invert):
    items = make_labels(opinions_of(scores), LabelSettings(invert=invert)).items["train"]
    normalised = [item.gt_score_norm for item in items]
    assert all(1 <= x <= 5 for x in normalised)
    assert all(min(scores) <= item.gt_score <= max(scores) for item in items)
    best = normalised[int(np.argmin(scores) if invert else np.argmax(scores))]
    worst = normalised[int(np.argmax(scores) if invert else np.argmin(scores))]
    assert best == max(normalised) == pytest.approx(5, rel=1e-9)
    assert worst == min(normalised) == pytest.approx(1, rel=1e-9)


@pytest.mark.parametrize(
    ("mos", "std", "scale"),
    [
        ([-1e308, 1e308], None, None),
        ([-1e308, 0], None, (-1e308, 1e308)),
        ([-1e308, -1e308], None, (-1e308, 1e308)),
        ([-8e307, 0, 9e307], None, None),
        ([0, 1e-300], [1e10, 1e10], None),
    ],
)
@pytest.mark.parametrize("invert", [False, True])
def test_numbers_too_large_to_be_normalised_are_refused(mos, std, scale, invert):
    with pytest.raises(OpinionError, match="too large to be put on a scale from 1 to 5"):
        make_labels(opinions_of(mos, std), LabelSettings(scale=scale, invert=invert))


def test_deviations_on_another_scale_are_warned_of(caplog):
    make_labels(opinions_of([0, 40, 100], [60, 10, 51]))
    (warning,) = [record.getMessage() for record in caplog.records]
    assert warning.startswith("2 standard deviations are above 2 once scores are from 1 to 5")
    caplog.clear()
    make_labels(opinions_of([0, 40, 100], [50, np.nan, 0]))
    assert not caplog.records


# ---- files ------------------------------------------------------------------------------------------------

TABLE = "image,mos,std,split\n" + "".join(
    f"{number}.png,{number % 5 + 1},0.5,{'test' if number % 3 == 0 else 'train'}\n" for number in range(12)
)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working folder with a table and two published sets, `good` and `other`, in `config.json`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scores.csv").write_text(TABLE)
    entries = {}
    for name in ("good", "other"):
        mos = {f"{number}.png": {"mos": number % 5 + 1, "std": 0.5} for number in range(12)}
        split = {"train": [f"{number}.png" for number in range(8)], "test": ["8.png", "9.png"]}
        (tmp_path / f"{name}_mos.json").write_text(json.dumps(mos))
        (tmp_path / f"{name}_split.json").write_text(json.dumps(split))
        entries[name] = {
            "mos_json": f"{name}_mos.json",
            "split_json": f"{name}_split.json",
            "save_train": f"out/{name}/train.json",
            "save_test": f"out/{name}/test.json",
            "img_dir": name,
            "density_type": "pdf",
            "thre_std": 0.2,
            "thre_diff": 0.1,
        }
    (tmp_path / "config.json").write_text(json.dumps({"answer": "It is {}.", "dataset_params": entries}))
    return tmp_path


def rewrite(path, change):
    """Changes a JSON file in place."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_a_table_becomes_two_files_of_metas(place):
    table = label_csv(place / "scores.csv", place / "deep" / "out", LabelSettings(image_folder="F"), columns={})
    assert sorted(path.name for path in (place / "deep" / "out").iterdir()) == ["test.json", "train.json"]
    train, test = (read_metas(place / "deep" / "out" / f"{split}.json") for split in ("train", "test"))
    assert [item.image for item in test] == ["F/0.png", "F/3.png", "F/6.png", "F/9.png"]
    assert len(train) == 8
    assert train[0].id == "1.png->2"
    assert [match["kind"] for match in ROW.finditer(table)] == ["density as it is", "soft", "one-hot"]
    assert "two levels" in table


def test_what_is_written_is_what_was_made(place):
    label_published(place / "config.json")
    for name in ("good", "other"):
        opinions = read_published(place / f"{name}_mos.json", place / f"{name}_split.json")
        labels = make_labels(opinions, LabelSettings(image_folder=name, answer="It is {}.", flat_middle=True))
        for split in ("train", "test"):
            assert read_metas(place / "out" / name / f"{split}.json") == labels.items[split]


@pytest.mark.parametrize(("ratio", "written", "empty"), [(0.0, "train", "test"), (1.0, "test", "train")])
def test_a_split_without_images_is_not_written_and_said_not_to_be(ratio, written, empty, place, caplog):
    (place / "scores.csv").write_text("image,mos\na.png,1\nb.png,2\nc.png,3\n")
    label_csv(place / "scores.csv", place / "out", LabelSettings(), columns={}, test_ratio=ratio)
    assert [path.name for path in (place / "out").iterdir()] == [f"{written}.json"]
    assert len(read_metas(place / "out" / f"{written}.json")) == 3
    assert f"{place / 'out' / empty}.json: not written, there are no images for it" in caplog.messages


def test_the_table_has_a_dash_for_what_does_not_exist(place):
    (place / "scores.csv").write_text("image,mos\na.png,1\nb.png,2.5\nc.png,3\n")
    table = label_csv(place / "scores.csv", place / "out", LabelSettings(), columns={})
    rows = {match["kind"]: match["numbers"].split() for match in ROW.finditer(table)}
    assert rows["density as it is"] == ["-"] * 5
    assert rows["soft"] == ["0.0000", "0.0000", "-", "1.0000", "1.0000"]
    assert "nan" not in table


def test_a_set_may_be_called_like_a_number(place):
    (place / "scores.csv").rename(place / "2019.10.csv")
    table = label_csv(place / "2019.10.csv", place / "out", LabelSettings(), columns={})
    assert [match["name"] for match in ROW.finditer(table)] == ["2019.10"] * 3


# ---- nothing is left behind or overwritten ----------------------------------------------------------------


@pytest.mark.parametrize("existing", ["out/train.json", "out/test.json"])
@pytest.mark.parametrize("kind", ["file", "folder", "dangling link"])
def test_a_table_overwrites_nothing(existing, kind, place, deqa):
    (place / "out").mkdir()
    if kind == "file":
        (place / existing).write_text("mine")
    elif kind == "folder":
        (place / existing).mkdir()
    else:
        (place / existing).symlink_to("nowhere")
    before = files_below(place)
    status, out, err = deqa("labels", "--csv", "scores.csv", "--out", "out")
    assert (status, out) == (2, "")
    assert is_sentence(err)
    assert f"{existing} exists already" in err
    assert files_below(place) == before
    assert [path.name for path in (place / "out").iterdir()] == [existing[4:]]


@pytest.mark.parametrize("existing", ["out/good/train.json", "out/other/test.json"])
def test_a_configuration_overwrites_nothing(existing, place, deqa):
    (place / existing).parent.mkdir(parents=True)
    (place / existing).write_text("mine")
    before = files_below(place)
    status, out, err = deqa("labels", "--config", "config.json")
    assert (status, out) == (2, "")
    assert is_sentence(err)
    assert f"{existing} exists already" in err
    assert files_below(place) == before


def test_opinion_scores_are_not_overwritten(place, deqa):
    rewrite(place / "config.json", lambda c: c["dataset_params"]["good"].update(save_test="other_mos.json"))
    before = files_below(place)
    assert deqa("labels", "--config", "config.json")[0] == 2
    assert files_below(place) == before


@pytest.mark.parametrize("again", ["out/good/train.json", "./out//good/train.json", "out/other/../good/train.json"])
def test_no_file_is_written_twice(again, place, deqa):
    rewrite(place / "config.json", lambda c: c["dataset_params"]["other"].update(save_test=again))
    before = files_below(place)
    status, out, err = deqa("labels", "--config", "config.json")
    assert (status, out) == (1, "")
    assert is_sentence(err)
    assert "would be written twice" in err
    assert files_below(place) == before


def spoil_scores(place):
    rewrite(place / "other_mos.json", lambda mos: mos["3.png"].update(mos="x"))
    return "other_mos.json: 3.png: mos 'x' is not a number"


def spoil_split(place):
    (place / "other_split.json").write_text("[]")
    return "other_split.json: not a JSON object"


def spoil_names(place):
    (place / "other_split.json").write_text('{"train": ["nobody.png"], "test": []}')
    return "other: no image is in the train or test split"


def spoil_spread(place):
    rewrite(place / "other_mos.json", lambda mos: [entry.update(mos=2) for entry in mos.values()])
    return "other: all scores are the same"


def spoil_presence(place):
    (place / "other_mos.json").unlink()
    return "other_mos.json: no such file"


def spoil_threshold(place):
    rewrite(place / "config.json", lambda config: config["dataset_params"]["other"].update(thre_std="low"))
    return "other: thre_std 'low' is not a number from 0 up"


@pytest.mark.parametrize(
    "spoil", [spoil_scores, spoil_split, spoil_names, spoil_spread, spoil_presence, spoil_threshold]
)
def test_if_the_last_set_is_faulty_none_is_written(spoil, place, deqa):
    complaint = spoil(place)
    before = files_below(place)
    status, out, err = deqa("labels", "--config", "config.json")
    assert (status, out) == (1, "")
    assert is_sentence(err)
    assert complaint in err
    assert files_below(place) == before
    assert not (place / "out").exists()


@pytest.mark.parametrize("obstacle", ["out/other", "out/other/test.json/x"])
def test_if_the_last_file_cannot_be_written_none_is_left(obstacle, place, deqa):
    """A file where a folder should be, or one that another output needs as its folder."""
    if obstacle == "out/other":
        (place / "out").mkdir()
        (place / obstacle).write_text("mine")
    else:
        rewrite(
            place / "config.json", lambda config: config["dataset_params"]["other"].update(save_train=obstacle[:-2])
        )
        rewrite(place / "config.json", lambda config: config["dataset_params"]["other"].update(save_test=obstacle))
    before = files_below(place)
    status, out, err = deqa("labels", "--config", "config.json")
    assert (status, out) == (2, "")
    assert is_sentence(err)
    assert obstacle.removesuffix("/x") in err
    assert files_below(place) == before


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_if_the_last_write_fails_none_is_left(error, place, monkeypatch):
    replace, moves = os.replace, []

    def full_in_the_end(source, target):
        moves.append(target)
        if len(moves) == 4:
            raise error
        replace(source, target)

    monkeypatch.setattr(os, "replace", full_in_the_end)
    before = files_below(place)
    with pytest.raises(type(error)):
        label_published(place / "config.json")
    assert len(moves) == 4
    assert files_below(place) == before


def test_a_table_that_cannot_be_shown_writes_nothing(place, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError

    monkeypatch.setattr(labels_module, "tabulate", fail)
    with pytest.raises(RuntimeError):
        label_csv(place / "scores.csv", place / "out", LabelSettings(), columns={})
    assert not (place / "out").exists()


# ---- configurations ---------------------------------------------------------------------------------------


def complaints(place):
    with pytest.raises(ConfigError) as error:
        label_published(place / "config.json")
    prefix = f"{place / 'config.json'}: "
    assert str(error.value).startswith(prefix)
    assert not (place / "out").exists()
    return str(error.value).removeprefix(prefix).split("; ")


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '"config"', "\ufeff{}"])
def test_a_file_that_is_no_configuration_is_refused(content, place):
    (place / "config.json").write_text(content, encoding="utf-8")
    (complaint,) = complaints(place)
    assert complaint.startswith("not ")


def test_a_missing_configuration_is_named(place):
    (place / "config.json").unlink()
    assert complaints(place) == ["no such file"]


ANSWER_COMPLAINT = "'answer' is not a text with {} in the place of the level"
SETS_COMPLAINT = "'dataset_params' names no datasets"


@pytest.mark.parametrize("answer", [None, 3, "", "The quality is good.", ["{}"], "{level}"], ids=repr)
def test_an_answer_without_a_place_for_the_level_is_refused(answer, place):
    rewrite(place / "config.json", lambda config: config.update(answer=answer))
    assert complaints(place) == [ANSWER_COMPLAINT]


@pytest.mark.parametrize("datasets", [None, {}, [], "koniq", [{"mos_json": "x"}]], ids=repr)
def test_a_configuration_without_datasets_is_refused(datasets, place):
    rewrite(place / "config.json", lambda config: config.update(dataset_params=datasets))
    assert complaints(place) == [SETS_COMPLAINT]


def test_an_empty_configuration_lacks_both(place):
    (place / "config.json").write_text("{}")
    assert complaints(place) == [ANSWER_COMPLAINT, SETS_COMPLAINT]


KEYS = ["split_json", "mos_json", "save_train", "save_test", "img_dir", "density_type", "thre_std", "thre_diff"]


@pytest.mark.parametrize("key", KEYS)
def test_every_key_is_needed(key, place):
    rewrite(place / "config.json", lambda config: config["dataset_params"]["other"].pop(key))
    assert complaints(place) == [f"other: no {key!r}"]


@pytest.mark.parametrize(
    ("key", "value", "complaint"),
    [
        *((key, value, f"{key} {value!r} is not a text") for key in KEYS[:5] for value in (None, 3, ["x"])),
        *(("density_type", x, f"density_type {x!r} is not one of pdf, cdf, none") for x in ("PDF", None, ["pdf"], 1)),
        *(
            (key, value, f"{key} {value!r} is not a number from 0 up")
            for key in KEYS[6:]
            for value in (-0.1, "0.2", None, True, [0.2], math.nan, math.inf, 10**400)
        ),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_value_of_another_kind_is_refused(key, value, complaint, place):
    rewrite(place / "config.json", lambda config: config["dataset_params"]["good"].update({key: value}))
    assert complaints(place) == [f"good: {complaint}"]


@pytest.mark.parametrize(
    ("min_std", "max_error", "count"), [(0, 10, 0), (0.5, 10, 0), (0.51, 10, 10), (1, 10, 10), (0, 0, 10)]
)
def test_thresholds_of_the_configuration_are_used_whole_numbers_and_zero_too(min_std, max_error, count, place):
    thresholds = {"thre_std": min_std, "thre_diff": max_error}
    rewrite(place / "config.json", lambda config: config["dataset_params"]["good"].update(thresholds))
    table = label_published(place / "config.json")
    assert re.search(f"^good: .* two levels {count} of 10$", table, re.MULTILINE)


def test_every_fault_is_named_at_once(place):
    def spoil(config):
        del config["answer"]
        good = config["dataset_params"]["good"]
        del good["img_dir"], good["thre_diff"]
        good.update(density_type="normal", thre_std=-1)
        config["dataset_params"]["other"] = ["mos.json"]
        config["dataset_params"]["third"] = {}

    rewrite(place / "config.json", spoil)
    assert complaints(place) == [
        ANSWER_COMPLAINT,
        "good: no 'img_dir'",
        "good: no 'thre_diff'",
        "good: thre_std -1 is not a number from 0 up",
        "good: density_type 'normal' is not one of pdf, cdf, none",
        "other: not a JSON object",
        *(f"third: no {key!r}" for key in KEYS),
    ]


def test_keys_that_only_the_published_code_knows_are_passed_over(place):
    rewrite(place / "config.json", lambda config: config.update(seed=131, questions=[]))
    rewrite(place / "config.json", lambda config: config["dataset_params"]["good"].update(note="x"))
    assert label_published(place / "config.json")


# ---- the command ------------------------------------------------------------------------------------------


def test_a_table_exits_with_0_and_prints_what_labels_cost(place, deqa, caplog):
    status, out, err = deqa("labels", "--csv", "scores.csv", "--out", "out")
    assert (status, err) == (0, "")
    assert out.split()[:2] == ["dataset", "labels"]
    assert "scores: alpha " in out
    assert sorted(path.name for path in (place / "out").iterdir()) == ["test.json", "train.json"]
    assert caplog.messages == ["out/train.json: 8 images", "out/test.json: 4 images"]


def test_a_configuration_exits_with_0_and_prints_what_labels_cost(place, deqa, caplog):
    status, out, err = deqa("labels", "--config", "config.json")
    assert (status, err) == (0, "")
    assert [match["name"] for match in ROW.finditer(out)] == ["good"] * 3 + ["other"] * 3
    assert len(files_below(place / "out")) == 4
    assert caplog.messages == [
        f"out/{name}/{split}.json: {count} images"
        for name in ("good", "other")
        for split, count in (("train", 8), ("test", 2))
    ]


def test_options_reach_the_labels(place, deqa):
    names = [f"{number}.png" for number in range(10)]
    rows = [f"{name},{number},{2.5},r{number % 2}" for number, name in enumerate(names)]
    (place / "dmos.csv").write_text("file,DMOS,sd,ref\n" + "\n".join(rows))
    columns = ("image=file", "mos=DMOS", "std=sd", "reference=ref")
    status, _, err = deqa(
        *("labels", "--csv", "dmos.csv", "--out", "out", "--scale", "0", "10", "--invert", "--density", "none"),
        *("--image-folder", "F", "--test-ratio", "0.5", "--seed", "3"),
        *(word for column in columns for word in ("--column", column)),
    )
    assert (status, err) == (0, "")
    train, test = (read_metas(place / "out" / f"{split}.json") for split in ("train", "test"))
    assert len(train) == len(test) == 5
    assert len({int(item.image[2]) % 2 for item in test}) == 1
    assert {item.image for item in (*train, *test)} == {f"F/{name}" for name in names}
    for item in (*train, *test):
        assert item.gt_score == 10 - int(item.image[2])
        assert (item.std, item.std_norm, item.level_probs_org) == (2.5, 1, None)


def test_other_seeds_draw_other_tests_and_the_same_seed_the_same(place, deqa):
    (place / "scores.csv").write_text("image,mos\n" + "".join(f"{x}.png,{x}\n" for x in range(40)))
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert deqa("labels", "--csv", "scores.csv", "--out", name, "--seed", seed)[0] == 0
    first, same, other = (files_below(place / name) for name in "abc")
    assert first == same != other
    assert len(read_metas(place / "a" / "test.json")) == 8


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("", "scores.csv: the first line does not name the columns"),
        ("image,mos\n", "scores.csv: has no images"),
        ("image,score\na.png,3\n", "scores.csv: no column 'mos'"),
        ("image,mos\na.png,x\nb.png,\n", "scores.csv:2: mos 'x' is not a number\nscores.csv:3: there is no mos\n"),
        ("image,mos\na.png,3\na.png,4\n", "scores.csv: a.png is listed 2 times"),
        ("image,mos\na,b.png,3\n", "scores.csv:2: more fields than the header has"),
        ("image,mos\na.png,3\nb.png,3\n", "scores.csv: all scores are the same; give their scale"),
        ("image,mos,split\na.png,3,\nb.png,4,\n", "scores.csv: no image is in the train or test split"),
        ("image,mos\na.png,1e308\nb.png,-1e308\n", "scores.csv: scores or standard deviations are too large"),
        ("image,mos\ncaf\udce9.png,3\n", "scores.csv: not a CSV file in UTF-8"),
        (None, "scores.csv: no such file"),
    ],
)
def test_bad_scores_exit_with_1_and_write_nothing(content, complaint, place, deqa):
    (place / "scores.csv").unlink()
    if content is not None:
        (place / "scores.csv").write_bytes(content.encode("utf-8", "surrogateescape"))
    status, out, err = deqa("labels", "--csv", "scores.csv", "--out", "out")
    assert (status, out) == (1, "")
    assert is_sentence(err)
    assert complaint in err
    assert not (place / "out").exists()


def test_scores_outside_of_the_scale_exit_with_1(place, deqa):
    status, out, err = deqa("labels", "--csv", "scores.csv", "--out", "out", "--scale", "2", "5")
    assert (status, out) == (1, "")
    assert err == "deqa: scores.csv: 3 scores are outside the scale from 2 to 5, the first 1 of 0.png\n"
    assert not (place / "out").exists()


@pytest.mark.parametrize("option", ["--csv", "--config"])
def test_a_folder_in_place_of_a_file_is_a_sentence(option, place, deqa):
    status, out, err = deqa("labels", option, ".", *(["--out", "out"] if option == "--csv" else []))
    assert (status, out) == (1, "")
    assert is_sentence(err)
    assert not (place / "out").exists()


def test_a_file_in_place_of_the_folder_to_write_in_is_a_sentence(place, deqa):
    (place / "out").write_text("mine")
    status, out, err = deqa("labels", "--csv", "scores.csv", "--out", "out")
    assert (status, out) == (2, "")
    assert is_sentence(err)
    assert "out" in err
    assert (place / "out").read_text() == "mine"


CSV = ("--csv", "scores.csv", "--out", "out")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ((), "is required"),
        ((*CSV, "--config", "config.json"), "not allowed with"),
        (("--csv", "scores.csv"), "say with --out where train.json and test.json go"),
        (("--config", "config.json", "--out", "out"), "--out goes with --csv"),
        (("--config", "config.json", "--seed", "0"), "--seed goes with --csv"),
        (("--config", "config.json", "--test-ratio", "0"), "--test-ratio goes with --csv"),
        (("--config", "config.json", "--scale", "0", "1"), "--scale goes with --csv"),
        (("--config", "config.json", "--invert"), "--invert goes with --csv"),
        (("--config", "config.json", "--density", "pdf"), "--density goes with --csv"),
        (("--config", "config.json", "--image-folder", "F"), "--image-folder goes with --csv"),
        (("--config", "config.json", "--column", "mos=x"), "--column goes with --csv"),
        ((*CSV, "--scale", "5", "1"), "lowest possible score first"),
        ((*CSV, "--scale", "3", "3"), "lowest possible score first"),
        ((*CSV, "--scale", "0"), "--scale"),
        ((*CSV, "--scale", "0", "many"), "'many' is not a number"),
        ((*CSV, "--scale", "nan", "1"), "'nan' is not a number"),
        ((*CSV, "--scale", "0", "inf"), "'inf' is not a number"),
        ((*CSV, "--density", "normal"), "'normal'"),
        ((*CSV, "--test-ratio", "1.1"), "'1.1' is not a number from 0 to 1"),
        ((*CSV, "--test-ratio", "nan"), "'nan' is not a number"),
        ((*CSV, "--seed", "-1"), "'-1' is not a whole number"),
        ((*CSV, "--seed", "1.5"), "'1.5' is not a whole number"),
        ((*CSV, "--column", "mos"), "'mos' is not image, mos, std"),
        ((*CSV, "--column", "mos="), "'mos=' is not image, mos, std"),
        ((*CSV, "--column", "score=MOS"), "'score=MOS' is not image, mos, std"),
    ],
    ids=" ".join,
)
def test_bad_usage_exits_with_2_and_writes_nothing(arguments, complaint, place, deqa):
    before = files_below(place)
    status, out, err = deqa("labels", *arguments)
    assert (status, out) == (2, "")
    assert complaint in err
    assert err.startswith("deqa")
    assert "Traceback" not in err
    assert files_below(place) == before


def test_negative_scales_are_numbers_not_options(place, deqa):
    (place / "scores.csv").write_text("image,mos\na.png,-3\nb.png,0\n")
    assert deqa("labels", "--csv", "scores.csv", "--out", "out", "--scale", "-4", "0", "--test-ratio", "0")[0] == 0
    assert [item.gt_score_norm for item in read_metas(place / "out" / "train.json")] == [2, 5]


def test_a_score_in_the_middle_keeps_its_spread_in_ones_own_labels(tmp_path, deqa):
    (tmp_path / "scores.csv").write_text(
        "image,mos,std,split\na.png,3,0.7,train\nb.png,1,0.7,train\nc.png,5,0.7,test\n"
    )
    status, _, _ = deqa("labels", "--csv", tmp_path / "scores.csv", "--scale", "1", "5", "--out", tmp_path / "out")
    probs = json.loads((tmp_path / "out" / "train.json").read_text())[0]["level_probs"]
    assert status == 0
    assert probs[2] > 0.5
    assert probs[1] == pytest.approx(probs[3], abs=1e-12)
    assert sum(p * w for p, w in zip(probs, (5, 4, 3, 2, 1), strict=True)) == pytest.approx(3, abs=1e-6)
