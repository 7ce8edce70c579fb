"""The training stream: the published batches, the same for any number of hosts, and goes on where it was."""

import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_runs import QUESTIONS, description, rating, write_metas

from deqa_jax.data import pipeline
from deqa_jax.data.datasets import DATASETS
from deqa_jax.data.metas import MetaError, parse_item, read_metas
from deqa_jax.data.pairs import locate, partner
from deqa_jax.data.pipeline import DataConfig, TrainingData, TrainingSet, is_score, open_sets
from deqa_jax.preprocess import ImageError, PreprocessConfig, load_square
from deqa_jax.prompt import IGNORED_LABEL, IMAGE_ID, LEVELS, Tokenizer
from deqa_jax.train.objective import Batch

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
NEEDED = ("level_probs", "gt_score", "std")
# Level words of the published tokenizer, excellent to bad.
LEVEL_IDS = (15129, 1781, 6534, 6460, 4319)


def small(size=28):
    return PreprocessConfig(size=size, resample=3, mean=(0.48, 0.46, 0.41), std=(0.27, 0.26, 0.28))


@pytest.fixture(scope="module")
def tokenizer(side_files, tmp_path_factory):
    """A vocabulary of a few hundred pieces."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(side_files["tokenizer.model"])
    return Tokenizer(path)


@pytest.fixture
def make(tokenizer, tmp_path):
    """Training data of metas, each a file of their own: `(entries, …, seed, **configuration)`."""

    def build(*sets, seed=0, needed=NEEDED, **options):
        metas = tuple(str(write_metas(tmp_path, f"m{i}.json", entries)) for i, entries in enumerate(sets))
        config = DataConfig(metas=metas, root=str(tmp_path), **options)
        return TrainingData(open_sets(config), config, tokenizer, small(), needed=needed, seed=seed)

    return build


def ratings(*indices):
    return [rating(index) for index in indices]


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        assert array.dtype == theirs[name].dtype
        np.testing.assert_array_equal(array, theirs[name], err_msg=name)


def seen(data, position, index):
    """Which entries an example is made of."""
    return data.example(position, index)["gt_score"].tolist()


def refusal(call, *arguments, **options):
    with pytest.raises(MetaError) as error:
        call(*arguments, **options)
    return str(error.value)


# ---- the published batches --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published(shared):
    """Batches that the PyTorch implementation made, and the hashes of its pixels."""
    tiny = shared / "tiny"
    pixels = json.loads((GOLDEN / "forward.json").read_text())["pixel_sha256"]
    order = json.loads((GOLDEN / "forward.json").read_text())["images"]
    hashes = pixels if isinstance(pixels, dict) else dict(zip(order, pixels, strict=True))
    return tiny, dict(np.load(tiny / "train_batches.npz")), json.loads((tiny / "train.json").read_text()), hashes


def published_data(shared, names, images, **options):
    """Our data of published metas, one set a file, with the real tokenizer and preprocessing."""
    tokens = shared / "tokenizer"
    config = DataConfig(metas=tuple(str(shared / "tiny" / name) for name in names), root=str(images), **options)
    preprocess = PreprocessConfig.from_published(json.loads((tokens / "preprocessor_config.json").read_text()))
    data = TrainingData(open_sets(config), config, Tokenizer(tokens / "tokenizer.model"), preprocess, needed=NEEDED)
    return data, preprocess


def position_of(item, other, size):
    """A position in the stream at which `item` is compared with `other`."""
    return next(position for position in range(1000) if partner(item, size, seed=0, position=position) == other)


def assert_side(example, side, wanted, row, before, *, scored=True):
    """One image of an example against one row of a stored batch, which is padded to the longest of its rows."""
    after, labels = example["after"][side], example["labels"][side]
    ids, targets = wanted["input_ids"][row], wanted["labels"][row]
    ours = np.concatenate([before, [IMAGE_ID], after])
    our_labels = np.concatenate([np.full(len(before) + 1, IGNORED_LABEL), labels])
    width = len(ids)
    np.testing.assert_array_equal(ours[:width], ids)
    np.testing.assert_array_equal(our_labels[:width], targets)
    assert (ours[width:] == 0).all()
    assert (our_labels[width:] == IGNORED_LABEL).all()
    if scored:
        for name, theirs in (("gt_score", "gt_scores"), ("gt_std", "stds"), ("level_probs", "level_probs")):
            if theirs in wanted:
                np.testing.assert_array_equal(example[name][side], wanted[theirs][row])
        # The level word is the last but two of the labels: then come the full stop and the end.
        position = example["level_position"][side]
        assert after[position] == labels[position] == targets[targets >= 0][-3]
        assert labels[position] in LEVEL_IDS
        assert labels[position - 1] != IGNORED_LABEL


def assert_pixels(example, side, image, preprocess, hashes):
    colours = np.float32(example["images"][side] / 255)
    pixels = (colours - np.float32(preprocess.mean)) / np.float32(preprocess.std)
    assert hashlib.sha256(pixels.transpose(2, 0, 1).tobytes()).hexdigest() == hashes[image]


def columns(batches, name):
    """The arrays of one side of a stored batch."""
    return {key.removeprefix(f"{name}."): value for key, value in batches.items() if key.startswith(f"{name}.")}


@pytest.mark.parametrize("name", ["B1", "B2"])
def test_pairs_are_those_of_published_training(name, published, shared, images):
    tiny, batches, runs, hashes = published
    data, preprocess = published_data(shared, ["train_metas.json"], images)
    metas = json.loads((tiny / "train_metas.json").read_text())
    for row, pair in enumerate(runs["batches"][name]):
        example = data.example(position_of(*pair, len(metas)), pair[0])
        assert example["is_score"]
        for side, letter in enumerate("AB"):
            assert_side(example, side, columns(batches, f"{name}.item_{letter}"), row, data.before)
            assert runs["batches"][f"images_{name}"][side][row] == metas[pair[side]]["image"]
            assert_pixels(example, side, metas[pair[side]]["image"], preprocess, hashes)


def test_pairs_of_both_tasks_are_those_of_published_training(published, shared, images):
    tiny, batches, runs, hashes = published
    data, preprocess = published_data(shared, ["train_metas.json", "train_desp_metas.json"], images)
    sets = [json.loads((tiny / f"train{kind}_metas.json").read_text()) for kind in ("", "_desp")]
    assert data.epoch == len(sets[0]) + len(sets[1]) == 10
    for row, (task, *pair) in enumerate(runs["batches"]["MIX"]):
        metas = sets[task == "description"]
        index = pair[0] + len(sets[0]) * (task == "description")
        example = data.example(position_of(*pair, len(metas)), index)
        assert example["is_score"] == (task == "score")
        for side, letter in enumerate("AB"):
            wanted = columns(batches, f"MIX.item_{letter}")
            assert_side(example, side, wanted, row, data.before, scored=task == "score")
            assert_pixels(example, side, metas[pair[side]]["image"], preprocess, hashes)


@pytest.mark.parametrize("name", ["S", "SM"])
def test_single_images_are_those_of_published_training(name, published, shared, images):
    tiny, batches, runs, hashes = published
    data, preprocess = published_data(shared, ["train_metas.json", "train_desp_metas.json"], images, pairs=False)
    sets = [json.loads((tiny / f"train{kind}_metas.json").read_text()) for kind in ("", "_desp")]
    for row, entry in enumerate(runs["batches"][name]):
        task, item = ("score", entry) if name == "S" else entry
        described = task == "description"
        example = data.example(0, item + len(sets[0]) * described)
        assert example["is_score"] == (not described)
        assert_side(example, 0, columns(batches, name), row, data.before, scored=not described)
        assert_pixels(example, 0, sets[described][item]["image"], preprocess, hashes)


# ---- arrays -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("pairs", "sides"), [(True, 2), (False, 1)])
def test_batches_have_the_arrays_that_the_objective_takes(pairs, sides, make):
    data = make(ratings(*range(5)), pairs=pairs)
    rows = next(data.batches(3))
    batch = Batch(**rows)
    a = data.length
    assert batch.images.shape == (3, sides, 28, 28, 3)
    assert (batch.after.shape, batch.labels.shape) == ((3, sides, a), (3, sides, a))
    assert batch.level_position.shape == batch.gt_score.shape == batch.gt_std.shape == (3, sides)
    assert (batch.level_probs.shape, batch.is_score.shape) == ((3, sides, 5), (3,))
    dtypes = {name: str(array.dtype) for name, array in rows.items()}
    assert dtypes == {
        "images": "uint8",
        "after": "int32",
        "labels": "int32",
        "level_position": "int32",
        "level_probs": "float32",
        "gt_score": "float32",
        "gt_std": "float32",
        "is_score": "bool",
    }


def test_an_example_is_its_metas_and_its_picture(make, tmp_path, tokenizer):
    entries = ratings(*range(5))
    data = make(entries)
    items = [parse_item(entry) for entry in entries]
    for index, position in ((0, 0), (4, 17), (2, 3)):
        example = data.example(position, index)
        for side, item in enumerate((index, partner(index, 5, seed=0, position=position))):
            assert example["gt_score"][side] == np.float32(items[item].gt_score)
            assert example["gt_std"][side] == np.float32(items[item].std)
            np.testing.assert_array_equal(example["level_probs"][side], np.float32(items[item].level_probs))
            picture = load_square(tmp_path / items[item].image, small())
            np.testing.assert_array_equal(example["images"][side], picture)
            level = example["labels"][side][example["level_position"][side]]
            assert level == tokenizer.level_ids()[item % 5]


def test_texts_are_padded_to_the_longest(make):
    long = "word " * 40
    entries = [*ratings(0, 1), {**rating(2), "conversations": rating(2)["conversations"]}]
    entries[2]["conversations"] = [{"from": "human", "value": f"<|image|>{long}"}, entries[2]["conversations"][1]]
    short, both = make(entries[:2], pairs=False), make(entries, pairs=False)
    assert both.length > short.length + 40
    alone, padded = short.example(0, 1), both.example(0, 1)
    assert padded["after"].shape == padded["labels"].shape == (1, both.length)
    np.testing.assert_array_equal(padded["after"][0, : short.length], alone["after"][0])
    assert (padded["after"][0, short.length :] == 0).all()
    assert (padded["labels"][0, short.length :] == IGNORED_LABEL).all()
    assert padded["level_position"] == alone["level_position"]
    longest = both.example(0, 2)
    assert longest["labels"][0, -1] == longest["after"][0, -1] == 2


def test_the_first_mention_of_the_prefix_counts(make, tokenizer):
    """An answer may go on to say it again."""
    again = "The quality of the image is good. The quality of the image is bad."
    entry = rating(0)
    entry["conversations"] = [entry["conversations"][0], {"from": "gpt", "value": again}]
    example = make([entry, rating(1)], pairs=False).example(0, 0)
    assert example["labels"][0, example["level_position"][0]] == tokenizer.level_ids()[LEVELS.index("good")]


def test_the_prefix_in_a_question_does_not_count(make, tokenizer):
    entry = rating(0)
    question = {"from": "human", "value": "<|image|>Say: The quality of the image is bad."}
    entry["conversations"] = [question, entry["conversations"][1]]
    example = make([entry, rating(1)], pairs=False).example(0, 0)
    assert example["labels"][0, example["level_position"][0]] == tokenizer.level_ids()[LEVELS.index("excellent")]


def test_descriptions_are_mixed_in(make):
    data = make(ratings(0, 1, 2), [description(3), description(4, "No.")])
    kinds = [bool(data.example(0, index)["is_score"]) for index in range(5)]
    assert kinds == [True] * 3 + [False] * 2
    described = data.example(0, 3)
    assert (described["labels"] >= 0).any(axis=1).all()
    assert np.isfinite(described["gt_score"]).all()
    together = next(data.batches(10))
    assert set(together["is_score"].tolist()) == {True, False}


def test_single_images_may_mix_both_tasks_in_a_set(make):
    data = make([rating(0), description(1), rating(2)], pairs=False)
    assert [bool(data.example(0, index)["is_score"]) for index in range(3)] == [True, False, True]


def test_the_task_is_rating_where_nothing_is_said():
    assert is_score(parse_item(rating(0)))
    assert is_score(parse_item({**rating(0), "task_type": "score"}))
    assert not is_score(parse_item(description(0)))


# ---- the stream -------------------------------------------------------------------------------------------


def test_the_stream_is_a_function_of_the_seed(make):
    entries = ratings(*range(6))
    first, again, other = (take(make(entries, seed=seed).batches(4), 4) for seed in (5, 5, 6))
    for ours, theirs in zip(first, again, strict=True):
        assert_same(ours, theirs)
    assert any(not np.array_equal(a["gt_score"], b["gt_score"]) for a, b in zip(first, other, strict=True))


def test_the_number_of_threads_changes_nothing(make):
    data = make(ratings(*range(6)))
    for ours, theirs in zip(take(data.batches(4, threads=1), 5), take(data.batches(4, threads=7), 5), strict=True):
        assert_same(ours, theirs)


def test_each_epoch_has_every_entry_once_in_a_new_order(make):
    data = make(ratings(*range(11)))
    scores = np.concatenate([batch["gt_score"][:, 0] for batch in take(data.batches(1), 55)])
    epochs = scores.reshape(5, 11)
    everything = sorted(np.float32(entry["gt_score"]) for entry in ratings(*range(11)))
    for epoch in epochs:
        assert sorted(epoch) == everything
    assert len({tuple(epoch) for epoch in epochs}) == 5


def test_partners_change_from_epoch_to_epoch(make):
    data = make(ratings(*range(9)))
    rows = np.concatenate([batch["gt_score"] for batch in take(data.batches(3), 15)])
    met = {}
    for one, other in rows.tolist():
        assert one != other
        met.setdefault(one, set()).add(other)
    assert np.mean([len(others) for others in met.values()]) > 2.5


def test_partners_are_of_the_same_set(make):
    data = make(ratings(0, 1, 2), ratings(10, 11), ratings(20, 21, 22, 23))
    sets = [{np.float32(rating(i)["gt_score"]) for i in one} for one in ((0, 1, 2), (10, 11), (20, 21, 22, 23))]
    for batch in take(data.batches(9), 6):
        for pair in batch["gt_score"]:
            assert sum(set(pair) <= one for one in sets) == 1


def test_weights_repeat_a_set(make):
    data = make(ratings(0, 1, 2), ratings(10, 11), weights=(1, 3))
    assert data.epoch == 9
    scores = [float(batch["gt_score"][0, 0]) for batch in take(data.batches(1), 18)]
    for epoch in (scores[:9], scores[9:]):
        for index, times in ((0, 1), (1, 1), (2, 1), (10, 3), (11, 3)):
            assert epoch.count(float(np.float32(rating(index)["gt_score"]))) == times
    assert [locate(index, [3, 2], [1, 3])[0] for index in range(9)] == [0] * 3 + [1] * 6


@pytest.mark.parametrize("processes", [2, 3, 6])
def test_any_number_of_processes_makes_the_same_global_batches(processes, make):
    data = make(ratings(*range(7)), ratings(*range(10, 14)))
    alone = take(data.batches(6), 8)
    parts = [take(data.batches(6, process=p, processes=processes), 8) for p in range(processes)]
    for number, whole in enumerate(alone):
        rows = {name: np.concatenate([part[number][name] for part in parts]) for name in whole}
        # The same examples without overlap or loss; in which row one is does not matter to any loss.
        ours, theirs = (np.lexsort(x["gt_score"].T) for x in (rows, whole))
        assert_same({k: v[ours] for k, v in rows.items()}, {k: v[theirs] for k, v in whole.items()})


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("after", [0, 1, 4, 10])
def test_a_saved_state_goes_on_exactly(size, after, make):
    entries = ratings(*range(7))
    rows = make(entries).batches(size)
    take(rows, after)
    # As it travels in a checkpoint.
    state = json.loads(json.dumps(rows.get_state()))
    wanted = take(rows, 6)
    other = make(entries).batches(size)
    # However far the other one has come by itself.
    take(other, 2)
    other.set_state(state)
    for ours, theirs in zip(take(other, 6), wanted, strict=True):
        assert_same(ours, theirs)


def test_a_picture_that_cannot_be_read_is_named(make, tmp_path):
    data = make(ratings(0, 1))
    (tmp_path / "pictures" / "0.png").write_bytes(b"no picture")
    with pytest.raises(ImageError, match=r"0\.png"):
        take(data.batches(2), 2)


# ---- what is refused --------------------------------------------------------------------------------------


def without(entry, *names):
    return {name: value for name, value in entry.items() if name not in names}


def answered(entry, answer):
    return {**entry, "conversations": [entry["conversations"][0], {"from": "gpt", "value": answer}]}


def asked(entry, question):
    return {**entry, "conversations": [{"from": "human", "value": question}, entry["conversations"][1]]}


FAULTS = {
    "no level_probs": (without(rating(1), "level_probs"), "has no level_probs"),
    "no std": (without(rating(1), "std"), "has no std"),
    "std of the unknown": (rating(1) | {"std": -10000}, "std below 0"),
    "level_probs of the unknown": (rating(1) | {"level_probs": [-10000] * 5}, "level_probs below 0"),
    "nothing": (without(rating(1), *NEEDED), "has no level_probs, gt_score, std"),
    "no conversations": (without(rating(1), "conversations"), "has no conversations"),
    "no turns": ({**rating(1), "conversations": []}, "human, gpt"),
    "half a round": ({**rating(1), "conversations": rating(1)["conversations"][:1]}, "human, gpt"),
    "no placeholder": (asked(rating(1), "Rate this."), "exactly one image"),
    "two placeholders": (
        {**rating(1), "conversations": [*rating(1)["conversations"], *rating(1)["conversations"]]},
        "exactly one image",
    ),
    "no level": (answered(rating(1), "The quality of the image is splendid."), "and then a level"),
    "no prefix": (answered(rating(1), "It is good."), "and then a level"),
    "nothing after the prefix": (answered(rating(1), "The quality of the image is"), "and then a level"),
    "placeholder in the answer": (answered(rating(1), "The quality of the image is good <|image|>"), "answer"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_an_item_that_cannot_be_trained_on_is_named_with_its_file(fault, make):
    entry, complaint = FAULTS[fault]
    message = refusal(make, [rating(0), entry, rating(2)])
    (line,) = message.splitlines()
    assert "m0.json: 1->" in line
    assert complaint in line


def test_identity_is_that_of_everything_that_is_said_of_the_images(make):
    first = make([rating(0), rating(1)]).identity
    assert make([rating(0), rating(1)]).identity == first
    for other in ([rating(0), rating(2)], [rating(1), rating(0)], [rating(0), rating(1) | {"std": 0.25}]):
        assert make(other).identity != first


def test_all_faults_are_said_at_once_the_first_ten_in_full(make):
    faulty = [without(rating(index), "std") for index in range(13)]
    lines = refusal(make, ratings(20, 21), faulty).splitlines()
    assert len(lines) == 11
    assert all("m1.json: " in line and "has no std" in line for line in lines[:10])
    assert lines[10] == "… and 3 more"


def test_what_is_not_needed_may_be_missing(make):
    entries = [without(entry, *NEEDED, "gt_score_norm") for entry in ratings(0, 1)]
    example = make(entries, needed=()).example(0, 0)
    assert np.isfinite(example["level_probs"]).all()
    # Descriptions never need what belongs to ratings.
    make([description(0), description(1)], needed=NEEDED)


@pytest.mark.parametrize("entries", [[rating(0)], [rating(0), description(1)], [description(0)]], ids=str)
def test_sets_that_no_pair_can_be_made_of_are_refused(entries, make):
    message = refusal(make, ratings(5, 6), entries)
    assert "m1.json: pairs need two items or more, all of one task_type" in message


@pytest.mark.parametrize("weights", [(1,), (1, 1, 1), (1, 0), (2, -1)])
def test_weights_that_do_not_fit_are_refused(weights, make):
    message = refusal(make, ratings(0, 1), ratings(2, 3), weights=weights)
    assert str(list(weights)) in message
    assert "2 sets" in message


def test_missing_pictures_are_counted(make, tmp_path):
    metas = tmp_path / "gone.json"
    metas.write_text(json.dumps(ratings(*range(30, 43))))
    message = refusal(open_sets, DataConfig(metas=(str(metas),), root=str(tmp_path)))
    assert message.splitlines()[0] == f"{metas}: there is no image {tmp_path / 'pictures' / '30.png'}"
    assert message.splitlines()[-1] == "… and 3 more"


def test_nothing_to_train_on_is_refused():
    assert "data.metas" in refusal(open_sets, DataConfig())


def test_metas_that_are_not_there_are_named(tmp_path):
    assert "absent.json" in refusal(open_sets, DataConfig(metas=(str(tmp_path / "absent.json"),)))


def test_an_unknown_style_is_named(make):
    message = refusal(make, ratings(0, 1), system="chat")
    assert "'chat'" in message
    assert "v1" in message


def test_a_conversation_that_is_cut_off_before_its_level_is_refused(make):
    assert "and then a level" in refusal(make, ratings(0, 1), max_length=data_length(make) - 4)


def data_length(make):
    data = make(ratings(0, 0 + 2))
    return len(data.before) + 1 + data.length


def test_conversations_that_differ_before_the_image_are_refused(tokenizer, tmp_path):
    """One compiled step has the same text before every image."""
    second_round = [
        {"from": "human", "value": "Hello."},
        {"from": "gpt", "value": "The quality of the image is good."},
        *rating(1)["conversations"],
    ]
    path = write_metas(tmp_path, "m.json", [rating(0), {**rating(1), "conversations": second_round}])
    config = DataConfig(metas=(str(path),), root=str(tmp_path), pairs=False)
    assert "before the image" in refusal(TrainingData, open_sets(config), config, tokenizer, small())


def test_each_text_is_encoded_once(make, monkeypatch):
    calls = []
    encode = pipeline.encode_conversation
    monkeypatch.setattr(pipeline, "encode_conversation", lambda *a, **k: calls.append(1) or encode(*a, **k))
    make(
        [{**rating(index), "id": str(index), "conversations": rating(index % 2)["conversations"]} for index in range(8)]
    )
    assert len(calls) == 2


def test_questions_come_in_more_than_one_wording():
    assert len(set(QUESTIONS)) == 2


# ---- records ----------------------------------------------------------------------------------------------


def test_records_give_the_same_arrays_as_files(tokenizer, tmp_path):
    from deqa_jax.data.tfds_builders import prepare

    for split, count in (("train", 6), ("test", 2)):
        entries = ratings(*range(count))
        for entry in entries:
            image = tmp_path / "KONIQ" / "images" / f"{split}-{Path(entry['image']).name}"
            image.parent.mkdir(parents=True, exist_ok=True)
            index = int(Path(entry["image"]).stem)
            Image.fromarray(np.random.default_rng(index).integers(0, 256, (50, 40 + index, 3), np.uint8)).save(image)
            entry["image"] = str(image.relative_to(tmp_path))
        path = DATASETS["koniq"].metas(tmp_path, split)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(entries))
    prepare("koniq", tmp_path, tmp_path / "records")
    files = DataConfig(metas=(str(DATASETS["koniq"].metas(tmp_path, "train")),), root=str(tmp_path))
    records = DataConfig(metas=("koniq",), records=str(tmp_path / "records"))
    ours, theirs = (
        take(TrainingData(open_sets(config), config, tokenizer, small(), needed=NEEDED).batches(4), 5)
        for config in (records, files)
    )
    for one, other in zip(ours, theirs, strict=True):
        assert_same(one, other)
    assert open_sets(records)[0].items == read_metas(DATASETS["koniq"].metas(tmp_path, "train"))


def test_sets_of_ones_own_can_be_trained_on(tokenizer):
    """Anything that has items and pictures: here arrays."""
    items = [parse_item(rating(index)) for index in range(3)]
    pictures = np.random.default_rng(0).integers(0, 256, (3, 30, 20, 3), np.uint8)
    one = TrainingSet("mine", items, lambda index: pictures[index])
    config = dataclasses.replace(DataConfig(), pairs=False)
    example = TrainingData([one], config, tokenizer, small()).example(0, 2)
    np.testing.assert_array_equal(example["images"][0], load_square(pictures[2], small()))


# ---- augmentation -----------------------------------------------------------------------------------------


def test_augmented_examples_are_a_function_of_their_position(make, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(pipeline, "stored_again", lambda rng, picture: seen.append(picture.size) or picture)
    pixels = np.random.default_rng(0).integers(0, 256, (28, 28, 3), np.uint8)
    plain, data = make(ratings(0, 1, 2)), make(ratings(0, 1, 2), augment=True)
    for entry in ratings(0, 1, 2):
        Image.fromarray(pixels).save(tmp_path / entry["image"])
    first, again, later = data.example(0, 1), data.example(0, 1), data.example(3, 1)
    assert_same(first, again)
    assert (first["images"][0] != later["images"][0]).any()
    assert (first["images"][0] != first["images"][1]).any(), "each side in its own way"
    for name in ("after", "labels", "level_probs", "gt_score"):
        np.testing.assert_array_equal(first[name], plain.example(0, 1)[name])
    for image in (*first["images"], *later["images"]):
        np.testing.assert_array_equal(np.sort(image.reshape(-1)), np.sort(pixels.reshape(-1)))
    np.testing.assert_array_equal(plain.example(0, 1)["images"], [pixels, pixels])
    assert seen == [(28, 28)] * 6, "of each picture that was augmented"


def test_augmented_pictures_are_stored_again_before_they_are_padded(make, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "augmented", lambda rng, square: square)
    exact, data = make(ratings(0, 1, 2)), make(ratings(0, 1, 2), augment=True)
    for entry in ratings(0, 1, 2):
        Image.new("RGB", (140, 70), (200, 40, 40)).save(tmp_path / entry["image"])
    plain = exact.example(0, 0)["images"]
    found = np.stack([data.example(position, 0)["images"] for position in range(12)])
    # Twenty-eight rows, of which the picture has the middle half: beyond what resizing mixes, padding is as ever.
    for rows in (slice(0, 4), slice(24, 28)):
        np.testing.assert_array_equal(found[:, :, rows], np.broadcast_to(plain[:, rows], found[:, :, rows].shape))
    changed = [(square != one).any() for squares in found for square, one in zip(squares, plain, strict=True)]
    assert 0 < sum(changed) < 24
