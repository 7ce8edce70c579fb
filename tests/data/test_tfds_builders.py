"""Published datasets as TFDS records: what goes in comes out, without TensorFlow, and damage is one error."""

import io
import json
import math
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.core import shuffle
from tensorflow_datasets.core.features import image_feature

from deqa_jax.data import tfds_builders
from deqa_jax.data.datasets import DATASETS
from deqa_jax.data.metas import MetaError, read_metas
from deqa_jax.data.tfds_builders import UNKNOWN, Deqa, prepare, read_records

# Fields that float32 cannot hold, and turns as they are published.
KNOWN = {
    "gt_score_norm": 1 / 3 + 1e-12,
    "level_probs_org": [0.1, 0.2, 0.3, 1 / 7, 1e-300],
    "level_probs": [0.1, 0.2, 0.3, 0.4 + 1e-16, 1 / 3],
    "std": math.pi,
    "std_norm": math.e,
    "conversations": [
        {"from": "human", "value": "How would you rate the quality of this image?\n<|image|>"},
        {"from": "gpt", "value": 'The quality of the image is "good", naïve 図.'},
    ],
}


def draw(path, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (9 + seed, 17, 3), np.uint8)).save(path)


def write_split(root, name, split, images):
    """Images and their metas: the first has every field, the second those it must have."""
    for seed, image in enumerate(images):
        draw(root / image, seed)
    entries = [{"id": f"{x}->{i / 7}", "image": x, "gt_score": i / 7, **KNOWN} for i, x in enumerate(images)]
    if len(entries) > 1:
        entries[1] = {"image": images[1]}
    path = DATASETS[name].metas(root, split)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(entries))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Three of the eight datasets, with the kinds of files they have; read only."""
    root = tmp_path_factory.mktemp("Data-DeQA-Score")
    # Neither in the order of their names nor of any hash of them.
    write_split(root, "koniq", "test", [f"KONIQ/images/{name}.jpg" for name in ("7", "10", "ü", "1", "図", "2")])
    write_split(root, "koniq", "train", [f"KONIQ/images/{100 - i}.jpg" for i in range(13)])
    write_split(root, "kadid", "test", [f"KADID10K/images/I{i}.png" for i in (3, 1, 2)])
    write_split(root, "pipal", "test", [f"PIPAL/images/Distortion_{i}/A_{i}.bmp" for i in (2, 1)])
    return root


@pytest.fixture(scope="module")
def records(data, tmp_path_factory):
    """Their records; read only."""
    out = tmp_path_factory.mktemp("records")
    for name in ("koniq", "kadid", "pipal"):
        prepare(name, data, out)
    return out


@pytest.fixture
def damaged(records, tmp_path):
    """A copy to damage: all of it, and the folder of KonIQ in it."""
    copy = tmp_path / "damaged"
    shutil.copytree(records, copy)
    return copy, copy / "deqa" / "koniq" / "1.0.0"


def contents(folder):
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {path.relative_to(folder): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


SPLITS = [("koniq", "test"), ("koniq", "train"), ("kadid", "test"), ("pipal", "test")]


# ---- what goes in comes out -------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "split"), SPLITS)
def test_metas_and_files_come_back_as_they_are(name, split, data, records):
    found = read_records(records, name, split)
    assert found.items == read_metas(DATASETS[name].metas(data, split))
    assert found.items[0].fields() == {**found.items[0].fields(), **as_tuples(KNOWN)}
    for index, item in enumerate(found.items):
        assert found.load(index) == (data / item.image).read_bytes()


def as_tuples(fields):
    return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}


def test_records_are_read_in_any_order(data, records):
    found = read_records(records, "koniq", "train")
    for index in (12, 3, 0, 3, 11):
        assert found.load(index) == (data / found.items[index].image).read_bytes()


def test_the_folder_is_that_of_tfds(data, tmp_path):
    assert prepare("kadid", data, tmp_path / "new" / "out") == tmp_path / "new" / "out" / "deqa" / "kadid" / "1.0.0"


def test_there_is_a_configuration_for_each_of_the_eight():
    assert list(Deqa.builder_configs) == list(DATASETS)


def test_a_dataset_has_the_splits_that_are_there(records, tmp_path):
    builder = Deqa(config="koniq", data_dir=records)
    assert {name: split.num_examples for name, split in builder.info.splits.items()} == {"train": 13, "test": 6}
    # PIPAL is not trained on; of KADID, the training metas are not there.
    for name in ("pipal", "kadid"):
        assert list(Deqa(config=name, data_dir=records).info.splits) == ["test"]
        with pytest.raises(MetaError, match="has no train records"):
            read_records(records, name, "train")


@pytest.mark.parametrize(("name", "split"), SPLITS)
def test_plain_tfds_reads_them(name, split, data, records, monkeypatch):
    # With OpenCV, where that happens to be installed, TFDS decodes JPEG a little differently.
    monkeypatch.setattr(image_feature, "cv2", None)
    items = read_metas(DATASETS[name].metas(data, split))
    source = tfds.builder_from_directory(records / "deqa" / name / "1.0.0").as_data_source(split=split)
    assert len(source) == len(items)
    for record, item in zip(source, items, strict=True):
        assert record.keys() == {"id", "image", "mos", "std", "level_probs"}
        assert record["id"].decode() == item.id
        with Image.open(data / item.image) as image:
            np.testing.assert_array_equal(record["image"], np.asarray(image))
        assert record["mos"] == np.float32(UNKNOWN if item.gt_score is None else item.gt_score)
        assert record["std"] == np.float32(UNKNOWN if item.std is None else item.std)
        probs = (UNKNOWN,) * 5 if item.level_probs is None else item.level_probs
        np.testing.assert_array_equal(record["level_probs"], np.float32(probs))


def test_an_unknown_number_is_what_published_training_writes():
    assert UNKNOWN == -10000


def test_files_that_no_decoder_reads_travel_too(data, tmp_path):
    """That they are bad is for whoever reads them to say, as it is with the folder."""
    root = tmp_path / "root"
    write_split(root, "csiq", "test", ["CSIQ/images/dst_imgs/x/1.png", "CSIQ/images/dst_imgs/x/2.png"])
    (root / "CSIQ/images/dst_imgs/x/1.png").write_bytes(b"")
    (root / "CSIQ/images/dst_imgs/x/2.png").write_bytes(b"no image\0\xff")
    prepare("csiq", root, tmp_path / "out")
    found = read_records(tmp_path / "out", "csiq", "test")
    assert [found.load(0), found.load(1)] == [b"", b"no image\0\xff"]


@pytest.mark.parametrize("limit", [1, 1200, 1 << 40])
def test_a_split_of_several_shards_keeps_its_order(limit, data, tmp_path, monkeypatch):
    monkeypatch.setattr(tfds_builders, "_SHARD_BYTES", limit)
    folder = prepare("koniq", data, tmp_path)
    items = read_metas(DATASETS["koniq"].metas(data, "train"))
    shards = list(folder.glob("deqa-train.array_record-*"))
    assert {1: len(shards) == 13, 1200: 2 < len(shards) < 10, 1 << 40: len(shards) == 1}[limit]
    found = read_records(tmp_path, "koniq", "train")
    assert [found.load(i) for i in range(13)] == [(data / item.image).read_bytes() for item in items]


def test_a_split_larger_than_tfds_keeps_in_memory_needs_no_tensorflow(data, tmp_path, monkeypatch):
    """Above a gigabyte, the usual kind of builder sorts its records with TensorFlow's files."""
    monkeypatch.setattr(shuffle, "MAX_MEM_BUFFER_SIZE", 1000)
    prepare("koniq", data, tmp_path)
    assert read_records(tmp_path, "koniq", "train").items == read_metas(DATASETS["koniq"].metas(data, "train"))


WITHOUT_TENSORFLOW = """
import socket, sys
from pathlib import Path
def refuse(*_, **__): raise SystemExit("asked the network")
socket.socket.connect = socket.getaddrinfo = refuse
from deqa_jax.data.tfds_builders import prepare, read_records
data, out = map(Path, sys.argv[1:])
prepare("koniq", data, out)
found = read_records(out, "koniq", "test")
assert [found.load(i) for i in range(len(found.items))] == [(data / item.image).read_bytes() for item in found.items]
sys.exit("tensorflow" in sys.modules)
"""


def test_neither_tensorflow_nor_the_network_is_needed(data, tmp_path):
    # One that can be imported, so that whoever asks for it gets it and is found out.
    (tmp_path / "found" / "tensorflow").mkdir(parents=True)
    (tmp_path / "found" / "tensorflow" / "__init__.py").write_text("")
    program = f"import sys; sys.path.insert(0, {str(tmp_path / 'found')!r})\n{WITHOUT_TENSORFLOW}"
    command = [sys.executable, "-c", program, data, tmp_path / "out"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout) == (0, ""), found.stderr


# ---- preparing --------------------------------------------------------------------------------------------


def test_the_command_says_where_the_records_are(deqa, data, tmp_path):
    arguments = ("prepare", "--dataset", "pipal,kadid,pipal", "--root", data, "--out", tmp_path)
    expected = "".join(f"{tmp_path}/deqa/{name}/1.0.0\n" for name in ("pipal", "kadid"))
    for _ in range(2):
        status, out, err = deqa(*arguments)
        assert (status, out) == (0, expected)
        assert "Traceback" not in err


def test_what_is_prepared_already_is_kept(data, tmp_path):
    root = tmp_path / "root"
    shutil.copytree(data / "PIPAL", root / "PIPAL")
    prepare("pipal", root, tmp_path / "out")
    before = contents(tmp_path / "out")
    draw(root / "PIPAL/images/Distortion_1/A_1.bmp", 50)
    assert prepare("pipal", root, tmp_path / "out") == tmp_path / "out" / "deqa" / "pipal" / "1.0.0"
    shutil.rmtree(root)
    prepare("pipal", root, tmp_path / "out")
    assert contents(tmp_path / "out") == before


def test_an_unknown_dataset_is_bad_usage(deqa, data, tmp_path):
    status, out, err = deqa("prepare", "--dataset", "kadid,Kadid", "--root", data, "--out", tmp_path / "out")
    assert (status, out) == (2, "")
    assert err.startswith("deqa: no dataset 'Kadid'; there are koniq, ")
    assert not (tmp_path / "out").exists()


def remove_image(root):
    (root / "KADID10K/images/I1.png").unlink()


def folder_for_image(root):
    remove_image(root)
    (root / "KADID10K/images/I1.png").mkdir()


def remove_metas(root):
    DATASETS["kadid"].metas(root, "test").unlink()


def cut_metas(root):
    path = DATASETS["kadid"].metas(root, "test")
    path.write_text(path.read_text()[:-1])


def no_metas(root):
    DATASETS["kadid"].metas(root, "test").write_text("[]")


def bad_training_metas(root):
    DATASETS["kadid"].metas(root, "train").write_text("{}")


FAULTS = {
    remove_image: "KADID10K/images/I1.png: no such file",
    folder_for_image: "KADID10K/images/I1.png: no such file",
    remove_metas: "KADID10K/metas/test_kadid_2k.json: no such file",
    cut_metas: "KADID10K/metas/test_kadid_2k.json: not JSON",
    no_metas: "KADID10K/metas/test_kadid_2k.json: lists no images",
    bad_training_metas: "KADID10K/metas/train_kadid_8k.json: not a JSON list",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_of_the_folder_is_named_and_leaves_nothing(fault, deqa, data, tmp_path):
    root = tmp_path / "root"
    shutil.copytree(data / "KADID10K", root / "KADID10K")
    fault(root)
    with pytest.raises(MetaError) as caught:
        prepare("kadid", root, tmp_path / "out")
    assert str(caught.value).startswith(f"{root}/{FAULTS[fault]}")
    status, out, err = deqa("prepare", "--dataset", "kadid", "--root", root, "--out", tmp_path / "out")
    assert (status, out) == (1, "")
    assert f"deqa: {root}/{FAULTS[fault]}" in err
    assert "Traceback" not in err
    # Not under another name either: the folder of all configurations is there, and empty.
    assert list((tmp_path / "out" / "deqa" / "kadid").iterdir()) == []


def test_a_repaired_folder_is_prepared(data, tmp_path):
    root = tmp_path / "root"
    shutil.copytree(data / "KADID10K", root / "KADID10K")
    remove_image(root)
    with pytest.raises(MetaError):
        prepare("kadid", root, tmp_path / "out")
    draw(root / "KADID10K/images/I1.png")
    prepare("kadid", root, tmp_path / "out")
    assert read_records(tmp_path / "out", "kadid", "test").load(1) == (root / "KADID10K/images/I1.png").read_bytes()


def test_many_missing_images_are_named_a_few_at_a_time(data, tmp_path):
    root = tmp_path / "root"
    shutil.copytree(data / "KONIQ" / "metas", root / "KONIQ" / "metas")
    with pytest.raises(MetaError) as caught:
        prepare("koniq", root, tmp_path / "out")
    lines = str(caught.value).splitlines()
    assert lines[0] == f"{root}/KONIQ/images/100.jpg: no such file"
    assert len(lines) == 11
    assert lines[-1] == "… and 3 more"


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_nothing_is_left_of_records_that_were_half_written(error, data, tmp_path, monkeypatch):
    read = tfds_builders.Path.read_bytes

    def failing(path):
        if path.name == "1.jpg":
            raise error
        return read(path)

    monkeypatch.setattr(tfds_builders.Path, "read_bytes", failing)
    with pytest.raises(error):
        prepare("koniq", data, tmp_path / "out")
    assert list((tmp_path / "out" / "deqa" / "koniq").iterdir()) == []
    monkeypatch.undo()
    prepare("koniq", data, tmp_path / "out")
    assert len(read_records(tmp_path / "out", "koniq", "test").items) == 6


def test_remains_of_a_killed_process_are_in_nobodys_way(data, tmp_path):
    remains = tmp_path / "deqa" / "pipal" / "incomplete.ABCDEF_1.0.0"
    remains.mkdir(parents=True)
    (remains / "deqa-test.array_record-00000-of-00001").write_bytes(b"half")
    prepare("pipal", data, tmp_path)
    assert len(read_records(tmp_path, "pipal", "test").items) == 2


def test_preparing_without_a_folder_of_data_says_what_is_missing(tmp_path):
    with pytest.raises(MetaError, match="say where the datasets are"):
        Deqa(config="koniq", data_dir=tmp_path).download_and_prepare(
            download_dir=tmp_path / "downloads", file_format="array_record"
        )


# ---- damage -----------------------------------------------------------------------------------------------

TEST_FILE = "deqa-test.array_record-00000-of-00001"


def rewritten(change, name="metadata.json"):
    def damage(folder):
        written = json.loads((folder / name).read_text())
        change(written)
        (folder / name).write_text(json.dumps(written))

    return damage


def described(change):
    return rewritten(change, "dataset_info.json")


def cut(name, share):
    return lambda folder: (folder / name).write_bytes(
        (folder / name).read_bytes()[: int(share * (folder / name).stat().st_size)]
    )


def content(name, value):
    return lambda folder: (folder / name).write_bytes(value)


def gone(name):
    return lambda folder: (folder / name).unlink()


def from_training(folder):
    shutil.copy(folder / TEST_FILE.replace("test", "train"), folder / TEST_FILE)


def flipped(folder):
    """One bit of the last image."""
    stored = bytearray((folder / TEST_FILE).read_bytes())
    stored[stored.index(b"JFIF") + 200] ^= 1
    (folder / TEST_FILE).write_bytes(stored)


DAMAGE = {
    "no metas": gone("metadata.json"),
    "metas empty": content("metadata.json", b""),
    "metas cut short": cut("metadata.json", 0.5),
    "metas a list": content("metadata.json", b"[1]"),
    "metas a number": content("metadata.json", b'{"test": 5}'),
    "no test metas": rewritten(lambda metas: metas.pop("test")),
    "test metas empty": rewritten(lambda metas: metas["test"].clear()),
    "one of the metas gone": rewritten(lambda metas: metas["test"].pop()),
    "one of the metas malformed": rewritten(lambda metas: metas["test"][-1].pop("image")),
    "metas in another order": rewritten(lambda metas: metas["test"].reverse()),
    "metas of other images": rewritten(lambda metas: metas["test"][5].update(id="another")),
    "no description": gone("dataset_info.json"),
    "description empty": content("dataset_info.json", b""),
    "description cut short": cut("dataset_info.json", 0.5),
    "description garbage": content("dataset_info.json", b"\xff\xfe"),
    "description of another format": described(lambda found: found.update(fileFormat="tfrecord")),
    "description without splits": described(lambda found: found.pop("splits")),
    "description of fewer records": described(lambda found: found["splits"][1].update(shardLengths=["5"])),
    "description of more shards": described(
        lambda description: description["splits"][1].update(shardLengths=["3", "3"])
    ),
    "no records": gone(TEST_FILE),
    "records empty": content(TEST_FILE, b""),
    "records cut short": cut(TEST_FILE, 0.9),
    "records cut in half": cut(TEST_FILE, 0.5),
    "records garbage": content(TEST_FILE, b"garbage" * 30_000),
    "records of other images": from_training,
    "a bit of an image": flipped,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_records_are_named_with_what_to_do(damage, damaged):
    data_dir, folder = damaged
    DAMAGE[damage](folder)

    def read_all():
        found = read_records(data_dir, "koniq", "test")
        for index in range(len(found.items)):
            found.load(index)

    with pytest.raises(MetaError, match="; remove it and prepare it again") as caught:
        read_all()
    assert str(data_dir / "deqa" / "koniq") in str(caught.value)


def test_damage_of_one_dataset_leaves_the_others(damaged):
    data_dir, folder = damaged
    shutil.rmtree(folder)
    assert len(read_records(data_dir, "kadid", "test").items) == 3
    with pytest.raises(MetaError, match="has no records of koniq; `deqa prepare` makes them"):
        read_records(data_dir, "koniq", "test")


def test_preparing_over_a_damaged_description_is_a_sentence(deqa, data, damaged):
    data_dir, folder = damaged
    (folder / "dataset_info.json").write_text("{")
    status, out, err = deqa("prepare", "--dataset", "koniq", "--root", data, "--out", data_dir)
    assert (status, out) == (1, "")
    assert err.startswith(f"deqa: {data_dir}/deqa/koniq: damaged (")
    assert "remove it and prepare it again" in err
    shutil.rmtree(folder.parent)
    assert deqa("prepare", "--dataset", "koniq", "--root", data, "--out", data_dir)[0] == 0
    assert len(read_records(data_dir, "koniq", "test").items) == 6


def test_the_content_of_a_record_is_an_image_file(records):
    with Image.open(io.BytesIO(read_records(records, "pipal", "test").load(0))) as image:
        assert image.format == "BMP"
