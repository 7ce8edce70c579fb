"""The converted-checkpoint folder: what is written is read back, and damage is one error that says what to do."""

import contextlib
import dataclasses
import json
import re
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_runs import TINY

from deqa_jax import checkpoint
from deqa_jax.checkpoint import (
    Checkpoint,
    CheckpointError,
    flatten,
    is_checkpoint,
    parameter_shapes,
    unflatten,
    write_checkpoint,
)
from deqa_jax.config import PRESETS, MeshConfig
from deqa_jax.convert.to_jax import convert
from deqa_jax.files import new_folder
from deqa_jax.sharding import make_mesh, parameter_shardings

TEST = PRESETS["test"]


@dataclasses.dataclass
class Made:
    """A parameter in memory."""

    array: np.ndarray

    @property
    def shape(self):
        return self.array.shape

    @property
    def dtype(self):
        return self.array.dtype

    def read(self):
        return self.array


@pytest.fixture(scope="module")
def arrays():
    """Parameters of the tiny model: float16, every third one bfloat16."""
    random = np.random.default_rng(0)
    return {
        path: random.standard_normal(shape).astype(np.float16 if i % 3 else ml_dtypes.bfloat16)
        for i, (path, shape) in enumerate(sorted(parameter_shapes(TINY).items()))
    }


def write(out, arrays, side_files, **options):
    with new_folder(out) as temporary:
        write_checkpoint(
            temporary,
            config=TINY,
            leaves={path: Made(array) for path, array in arrays.items()},
            side_files=side_files,
            published_config={"model_type": "mplug_owl2"},
            provenance={"source": "a test"},
            **options,
        )
    return out


@pytest.fixture(scope="module")
def written(arrays, side_files, tmp_path_factory):
    """A checkpoint; read only."""
    return write(tmp_path_factory.mktemp("checkpoint") / "M", arrays, side_files)


@pytest.fixture
def damaged(written, tmp_path):
    """A copy of it to damage."""
    return Path(shutil.copytree(written, tmp_path / "damaged"))


@pytest.fixture
def unread(written, tmp_path):
    """A copy to damage that has everything but the contents of `params`."""
    return Path(shutil.copytree(written, tmp_path / "unread", ignore=lambda folder, _: ["d"]))


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for path, array in expected.items():
        assert found[path].dtype == array.dtype, path
        np.testing.assert_array_equal(found[path], array, err_msg=str(path))


# ---- round trip -------------------------------------------------------------------------------------------


def test_what_is_written_is_read_back(written, arrays, side_files):
    opened = Checkpoint.open(written)
    assert opened.config == TINY
    assert opened.published_config == {"model_type": "mplug_owl2"}
    assert opened.provenance == {"source": "a test"}
    assert {path: (leaf.shape, leaf.dtype) for path, leaf in opened.stored.items()} == {
        path: (array.shape, array.dtype) for path, array in arrays.items()
    }
    assert_same(opened.restore(), arrays)
    assert all(isinstance(array, np.ndarray) for array in opened.restore().values())
    assert {name: (written / name).read_bytes() for name in side_files} == side_files


def test_a_folder_may_be_named_by_text_and_relative(written, arrays, monkeypatch):
    monkeypatch.chdir(written.parent)
    assert_same(Checkpoint.open(written.name).restore(), arrays)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_parameters_are_cast_while_they_are_read(dtype, written, arrays):
    expected = {path: array.astype(dtype) for path, array in arrays.items()}
    assert_same(Checkpoint.open(written).restore(dtype), expected)


@pytest.mark.parametrize("axes", [(1, 1, 8), (1, 8, 1), (2, 2, 2)])
def test_parameters_go_to_the_devices_that_they_are_split_over(axes, written, arrays):
    mesh = make_mesh(MeshConfig(data=axes[0], fsdp=axes[1], tensor=axes[2]))
    shardings = parameter_shardings({path: array.shape for path, array in arrays.items()}, mesh)
    restored = Checkpoint.open(written).restore("float32", shardings=shardings)
    assert {path: array.sharding for path, array in restored.items()} == shardings
    assert_same(restored, {path: array.astype(np.float32) for path, array in arrays.items()})


def test_single_parameters_are_read(written, arrays):
    opened = Checkpoint.open(written)
    for path in list(arrays)[:: len(arrays) // 5]:
        assert_same({path: opened.read_leaf(path)}, {path: arrays[path]})


def test_parameters_of_several_chunks_are_read_back(arrays, side_files, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "_CHUNK_BYTES", 1000)
    assert_same(Checkpoint.open(write(tmp_path / "M", arrays, side_files)).restore(), arrays)


def test_progress_counts_every_byte(arrays, side_files, tmp_path):
    done = []
    write(tmp_path / "M", arrays, side_files, progress=done.append)
    assert sorted(done) == sorted(array.nbytes for array in arrays.values())


def test_one_parameter_is_in_memory_at_a_time(arrays, side_files, tmp_path):
    events = []

    class Watched(Made):
        def read(self):
            events.append("read")
            return super().read()

    with new_folder(tmp_path / "M") as temporary:
        write_checkpoint(
            temporary,
            config=TINY,
            leaves={path: Watched(array) for path, array in arrays.items()},
            side_files=side_files,
            published_config=None,
            provenance={},
            progress=lambda done: events.append("written"),
        )
    assert events == ["read", "written"] * len(arrays)


def test_tokenizer_and_preprocessing_come_from_the_folder(written):
    opened = Checkpoint.open(written)
    assert len(opened.tokenizer().level_ids()) == 5
    assert opened.preprocess().size == 448


def test_only_converted_folders_are_checkpoints(written, published, tmp_path):
    assert is_checkpoint(written)
    for other in (published, tmp_path, tmp_path / "absent", written / "config.json"):
        assert not is_checkpoint(other)


# ---- identity ---------------------------------------------------------------------------------------------

FILES = {"a.safetensors": "12ab", "b.safetensors": "34cd"}
CONVERTED = {"source": "P", "base": None, "files": FILES, "tensors": {"x": "float16"}, "versions": {"jax": "1"}}


def identity_with(folder, **provenance):
    (folder / "provenance.json").write_text(json.dumps(provenance))
    return Checkpoint.open(folder).identity


def test_an_identity_is_short_and_always_the_same(written, damaged, monkeypatch):
    identity = Checkpoint.open(written).identity
    assert re.fullmatch("[0-9a-f]{16}", identity)
    assert Checkpoint.open(damaged).identity == identity
    monkeypatch.chdir(damaged)
    assert Checkpoint.open(".").identity == identity


@pytest.mark.parametrize(
    "change",
    [
        {"source": "hub/P"},
        {"base": "B"},
        {"versions": {"jax": "2"}},
        {"files": dict(reversed(FILES.items()))},
    ],
    ids=str,
)
def test_where_a_checkpoint_comes_from_is_not_what_it_is(change, damaged):
    assert identity_with(damaged, **{**CONVERTED, **change}) == identity_with(damaged, **CONVERTED)
    assert identity_with(damaged, **dict(reversed(CONVERTED.items()))) == identity_with(damaged, **CONVERTED)


@pytest.mark.parametrize(
    "change",
    [{"model": "N"}, {"source": "hub/P"}, {"base": "B"}, {"versions": {"jax": "2"}}],
    ids=str,
)
@pytest.mark.parametrize("depth", [1, 2])
def test_where_the_models_of_a_mean_come_from_is_not_what_it_is(change, depth, damaged):
    identities = []
    for other in ({"model": "M", **CONVERTED}, {"model": "M", **CONVERTED, **change}):
        mean = other
        for _ in range(depth):
            mean = {**CONVERTED, "averaged_with": [CONVERTED, mean]}
        identities.append(identity_with(damaged, **mean))
    assert identities[0] == identities[1]


@pytest.mark.parametrize(
    "change", [{"files": {**FILES, "b.safetensors": "34ce"}}, {"tensors": {}}, {"files": {}, "source": "Q"}], ids=str
)
def test_a_mean_with_another_model_is_another(change, damaged):
    one, two = ([{"model": "M", **CONVERTED, **changes}] for changes in ({}, change))
    assert identity_with(damaged, **CONVERTED, averaged_with=one) != identity_with(
        damaged, **CONVERTED, averaged_with=two
    )
    assert identity_with(damaged, **CONVERTED, averaged_with=one) != identity_with(
        damaged, **CONVERTED, averaged_with=one * 2
    )


@pytest.mark.parametrize(
    "change",
    [
        {"files": {**FILES, "b.safetensors": "34ce"}},
        {"files": {"a.safetensors": "12ab"}},
        {"files": {"a.safetensors": "34cd", "b.safetensors": "12ab"}},
        {"files": {}},
        {"tensors": {"x": "bfloat16"}},
        {"trained": {"steps": 3}},
    ],
    ids=str,
)
def test_a_checkpoint_made_of_other_files_is_another(change, damaged):
    assert identity_with(damaged, **{**CONVERTED, **change}) != identity_with(damaged, **CONVERTED)


def test_without_files_the_source_is_all_there_is(damaged):
    """As with random weights, whose source names their seed."""
    for files in ({}, {"files": {}}, {"files": None}):
        one, two = (identity_with(damaged, source=f"--seed {seed}", **files) for seed in (1, 2))
        assert one != two


def test_weights_cast_when_they_were_converted_are_others(arrays, side_files, written, tmp_path):
    cast = write(tmp_path / "M", {path: array.astype(np.float32) for path, array in arrays.items()}, side_files)
    again = write(tmp_path / "N", arrays, side_files)
    identities = [Checkpoint.open(folder).identity for folder in (written, cast, again)]
    assert identities[0] == identities[2] != identities[1]


def test_a_configuration_of_other_numbers_is_another_model(damaged):
    before = Checkpoint.open(damaged).identity
    in_config(lambda written: written["model"]["language"].update(rope_theta=5e5))(damaged)
    assert Checkpoint.open(damaged).identity != before


def test_the_identity_of_a_damaged_checkpoint_is_an_error(damaged):
    gone("params/_METADATA")(damaged)
    with pytest.raises(CheckpointError, match="convert "):
        _ = Checkpoint.open(damaged).identity


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_checkpoint_converted_twice_from_two_places_is_one(dtype, published, converted, tmp_path):
    convert(str(shutil.copytree(published, tmp_path / "moved")), tmp_path / "M", dtype=dtype)
    same = Checkpoint.open(tmp_path / "M").identity == Checkpoint.open(converted).identity
    assert same == (dtype == "float32")


# ---- damage -----------------------------------------------------------------------------------------------


def in_config(change):
    def damage(folder):
        path = folder / "config.json"
        written = json.loads(path.read_text())
        change(written)
        path.write_text(json.dumps(written))

    return damage


def content(name, value):
    return lambda folder: (folder / name).write_bytes(value)


def gone(name):
    def damage(folder):
        if (folder / name).is_dir():
            shutil.rmtree(folder / name)
        else:
            (folder / name).unlink()

    return damage


def a_folder_instead(name):
    def damage(folder):
        gone(name)(folder)
        (folder / name).mkdir()

    return damage


# What breaks, and what the message must name.
OPEN_DAMAGE = {
    "no configuration": (gone("config.json"), "config.json"),
    "empty configuration": (content("config.json", b""), "config.json"),
    "configuration cut short": (content("config.json", b'{"format": "deqa-'), "config.json"),
    "configuration not text": (content("config.json", b"\xff\xfe\x00"), "config.json"),
    "configuration a list": (content("config.json", b"[]"), "config.json"),
    "configuration a folder": (a_folder_instead("config.json"), "config.json"),
    "another program's configuration": (content("config.json", b'{"model_type": "llama"}'), "not a converted"),
    "later format": (in_config(lambda written: written.update(version=2)), "version 2"),
    "no format version": (in_config(lambda written: written.pop("version")), "version None"),
    "no model": (in_config(lambda written: written.pop("model")), "model"),
    "model a list": (in_config(lambda written: written.update(model=[])), "model"),
    "part missing": (in_config(lambda written: written["model"].pop("vision")), "vision: missing"),
    "part no object": (in_config(lambda written: written["model"].update(vision=3)), "vision"),
    "entry missing": (in_config(lambda written: written["model"]["vision"].pop("mlp_dim")), "vision.mlp_dim: missing"),
    "entry unknown": (in_config(lambda written: written["model"]["vision"].update(x=1)), "vision.x: unknown"),
    "entry not a number": (in_config(lambda written: written["model"]["vision"].update(mlp_dim="9")), "vision.mlp_dim"),
    "impossible size": (in_config(lambda written: written["model"]["vision"].update(num_heads=5)), "5 heads"),
    "no provenance": (gone("provenance.json"), "provenance.json"),
    "empty provenance": (content("provenance.json", b""), "provenance.json"),
    "no tokenizer": (gone("tokenizer.model"), "tokenizer.model"),
    "no preprocessing": (gone("preprocessor_config.json"), "preprocessor_config.json"),
    "no parameters": (gone("params"), "params"),
}


@pytest.mark.parametrize("damage", OPEN_DAMAGE)
def test_a_damaged_folder_is_named_with_what_is_wrong(damage, unread):
    break_it, named = OPEN_DAMAGE[damage]
    break_it(unread)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(unread)
    assert str(unread) in str(caught.value)
    assert named in str(caught.value)


@pytest.mark.parametrize("damage", OPEN_DAMAGE)
def test_an_error_of_a_damaged_folder_says_what_to_do(damage, unread):
    OPEN_DAMAGE[damage][0](unread)
    with pytest.raises(CheckpointError, match=r"deqa convert|convert (it|the)\b"):
        Checkpoint.open(unread)


def test_a_missing_folder_and_a_file_are_no_checkpoint(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "absent", tmp_path / "file"):
        with pytest.raises(CheckpointError, match=f"{path}: no such folder"):
            Checkpoint.open(path)


def test_everything_missing_is_named_at_once(unread):
    for name in ("params", "tokenizer.model", "preprocessor_config.json"):
        gone(name)(unread)
    with pytest.raises(CheckpointError, match=r"params, tokenizer\.model, preprocessor_config\.json missing"):
        Checkpoint.open(unread)


def largest(folder):
    files = [path for path in (folder / "params").rglob("*") if path.is_file()]
    return max(files, key=lambda path: path.stat().st_size)


def emptied(folder):
    gone("params")(folder)
    (folder / "params").mkdir()


PARAMS_DAMAGE = {
    "emptied": emptied,
    "a file instead": lambda folder: (gone("params")(folder), (folder / "params").write_text("x")),
    "metadata gone": gone("params/_METADATA"),
    "metadata empty": content("params/_METADATA", b""),
    "metadata cut short": content("params/_METADATA", b'{"tree_metadata": {'),
    "metadata a list": content("params/_METADATA", b"[]"),
    "manifest gone": gone("params/manifest.ocdbt"),
    "manifest empty": content("params/manifest.ocdbt", b""),
    "manifest garbage": content("params/manifest.ocdbt", b"garbage" * 20),
    "index gone": gone("params/d"),
    "values gone": gone("params/ocdbt.process_0"),
    "largest file gone": lambda folder: largest(folder).unlink(),
    "largest file empty": lambda folder: largest(folder).write_bytes(b""),
    "largest file cut short": lambda folder: largest(folder).write_bytes(
        largest(folder).read_bytes()[: largest(folder).stat().st_size // 2]
    ),
}


@pytest.mark.parametrize("damage", PARAMS_DAMAGE)
def test_damaged_parameters_are_named_with_what_to_do(damage, damaged):
    PARAMS_DAMAGE[damage](damaged)
    with pytest.raises(CheckpointError, match="convert ") as caught:
        Checkpoint.open(damaged).restore()
    assert str(damaged) in str(caught.value)


def test_a_damaged_parameter_is_noticed_when_it_alone_is_read(damaged):
    shutil.rmtree(damaged / "params" / "ocdbt.process_0" / "d")
    opened = Checkpoint.open(damaged)
    with pytest.raises(CheckpointError, match="convert "):
        opened.read_leaf(("language", "embedding"))


def test_any_file_of_the_parameters_is_missed_or_not_needed(damaged, arrays):
    files = sorted(path for path in (damaged / "params").rglob("*") if path.is_file())
    for path in files[::8]:
        kept = path.read_bytes()
        path.unlink()
        with contextlib.suppress(CheckpointError):
            assert_same(Checkpoint.open(damaged).restore(), arrays)
        path.write_bytes(kept)


@pytest.mark.parametrize(
    ("part", "name", "value", "wrong"),
    [
        ("language", "mlp_dim", 168, "language/layers/gate/kernel"),
        ("vision", "num_layers", 2, "vision/layers"),
        ("language", "vocab_size", 481, "language/embedding"),
    ],
)
def test_a_configuration_that_does_not_fit_the_parameters_is_refused(part, name, value, wrong, damaged):
    in_config(lambda written: written["model"][part].update({name: value}))(damaged)
    with pytest.raises(CheckpointError, match=r"do not fit its config\.json; convert") as caught:
        Checkpoint.open(damaged).restore()
    assert str(damaged) in str(caught.value)
    assert wrong in str(caught.value)


def test_a_parameter_too_many_or_too_few_is_named(arrays, side_files, tmp_path):
    extra = {**arrays, ("language", "extra"): np.zeros(3, np.float32)}
    missing = dict(list(arrays.items())[1:])
    for name, leaves, wrong in (
        ("extra", extra, "language/extra"),
        ("missing", missing, "/".join(next(iter(arrays)))),
    ):
        folder = write(tmp_path / name, leaves, side_files)
        with pytest.raises(CheckpointError, match=wrong):
            Checkpoint.open(folder).restore()


# ---- trees ------------------------------------------------------------------------------------------------

TREES = st.recursive(
    st.integers(), lambda inner: st.dictionaries(st.text(max_size=3), inner, min_size=1, max_size=4), max_leaves=12
).filter(lambda tree: isinstance(tree, dict))


@given(tree=TREES)
def test_unflatten_undoes_flatten(tree):
    flat = flatten(tree)
    assert all(isinstance(leaf, int) for leaf in flat.values())
    assert unflatten(flat) == tree


def test_the_parameters_of_every_layer_are_one_stack():
    shapes = parameter_shapes(TINY)
    assert {path[0] for path in shapes} == {"vision", "abstractor", "language"}
    assert {shape[0] for path, shape in shapes.items() if path[:2] == ("language", "layers")} == {2}
