"""`deqa convert --average`: means of several models, and which have none."""

import dataclasses
import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from small_runs import TINY, write_tiny

from deqa_jax.checkpoint import Checkpoint, InMemory
from deqa_jax.config import QuantizedError
from deqa_jax.convert.average import averaged
from deqa_jax.convert.hf import open_weights
from deqa_jax.convert.tensors import ConversionError
from deqa_jax.convert.to_jax import convert
from deqa_jax.convert.to_published import export
from deqa_jax.quantize import KERNEL_SCALE, quantize

PATH = ("language", "final_norm", "scale")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Three models of one size; read only."""
    folder = tmp_path_factory.mktemp("models")
    return [write_tiny(folder / f"M{seed}", seed=seed) for seed in range(3)]


def leaves_of(folder):
    return Checkpoint.open(folder).restore()


def test_every_parameter_is_the_mean(models, tmp_path, deqa):
    others = [word for other in models[1:] for word in ("--average", other)]
    assert deqa("convert", models[0], tmp_path / "out", *others)[0] == 0
    found, given = leaves_of(tmp_path / "out"), [leaves_of(model) for model in models]
    assert found.keys() == given[0].keys()
    for path, leaf in found.items():
        np.testing.assert_allclose(leaf, np.mean([one[path] for one in given], axis=0), rtol=1e-6, atol=1e-7)
        assert leaf.dtype == np.float32
    named = Checkpoint.open(tmp_path / "out").provenance["averaged_with"]
    assert [(one["model"], one["source"]) for one in named] == [
        (str(model), f"a test, seed {seed}") for seed, model in enumerate(models[1:], 1)
    ]


def test_published_models_have_a_mean_with_converted_ones(models, tmp_path):
    """Of what is stored in few digits too it is float32, if nothing else is said."""
    export(models[1], tmp_path / "published", dtype="float16")
    convert(str(tmp_path / "published"), tmp_path / "out", average=[str(models[0])])
    convert(str(tmp_path / "published"), tmp_path / "half", average=[str(models[0])], dtype="float16")
    rounded = leaves_of(models[1])[PATH].astype(np.float16).astype(np.float32)
    expected = (rounded + leaves_of(models[0])[PATH]) / 2
    np.testing.assert_array_equal(leaves_of(tmp_path / "out")[PATH], expected)
    half = leaves_of(tmp_path / "half")[PATH]
    assert half.dtype == np.float16
    np.testing.assert_array_equal(half, expected.astype(np.float16))


def test_a_mean_is_exported_with_all_its_digits(models, tmp_path):
    """What it is the mean of came with fewer."""
    for seed in (0, 1):
        export(models[seed], tmp_path / f"P{seed}", dtype="float16")
    convert(str(tmp_path / "P0"), tmp_path / "mean", average=[str(tmp_path / "P1")])
    export(tmp_path / "mean", tmp_path / "out")
    export(tmp_path / "mean", tmp_path / "half", dtype="float16")
    mean = leaves_of(tmp_path / "mean")[PATH]
    assert (mean != mean.astype(np.float16)).any()
    for folder, dtype in (("out", np.float32), ("half", np.float16)):
        tensors, _ = open_weights(tmp_path / folder)
        assert {tensor.dtype for tensor in tensors.values()} == {np.dtype(dtype)}
        np.testing.assert_array_equal(tensors["model.norm.weight"].read(), mean.astype(dtype))


def test_a_mean_of_the_same_files_is_one_wherever_they_lay(models, tmp_path):
    for seed in (0, 1):
        export(models[seed], tmp_path / f"P{seed}")
    moved = [str(shutil.copytree(tmp_path / f"P{seed}", tmp_path / "moved" / f"Q{seed}")) for seed in (0, 1)]
    convert(str(tmp_path / "P0"), tmp_path / "one", average=[str(tmp_path / "P1")])
    convert(moved[0], tmp_path / "two", average=[moved[1]])
    convert(moved[0], tmp_path / "other", average=[moved[0]])
    identities = [Checkpoint.open(tmp_path / name).identity for name in ("one", "two", "other")]
    assert identities[0] == identities[1] != identities[2]


def test_a_mean_with_itself_is_the_model(models, tmp_path):
    convert(str(models[0]), tmp_path / "out", average=[str(models[0])])
    found = leaves_of(tmp_path / "out")
    for path, leaf in leaves_of(models[0]).items():
        np.testing.assert_array_equal(found[path], leaf)


def test_a_mean_can_be_quantised(models, tmp_path):
    convert(str(models[0]), tmp_path / "out", average=[str(models[1])], quantization="int8")
    found, given = leaves_of(tmp_path / "out"), [leaves_of(model) for model in models[:2]]
    kernel = ("language", "layers", "down", "kernel")
    for i, layer in enumerate((given[0][kernel] + given[1][kernel]) / 2):
        packed, scale = quantize(layer, "int8")
        np.testing.assert_array_equal(found[kernel][i], packed)
        np.testing.assert_array_equal(found[*kernel[:-1], KERNEL_SCALE][i], scale)


@given(
    st.lists(
        hnp.arrays(np.float32, (2, 3), elements=st.floats(-(2.0**100), 2.0**100, width=32)), min_size=1, max_size=4
    )
)
def test_a_mean_lies_between(arrays):
    (mean,) = averaged([{PATH: InMemory(array)} for array in arrays], lambda path: None).values()
    assert (mean.shape, mean.dtype) == ((2, 3), np.float32)
    slack = 1e-6 * np.abs(arrays).max(axis=0) * len(arrays)
    assert (mean.read() >= np.min(arrays, axis=0) - slack).all()
    assert (mean.read() <= np.max(arrays, axis=0) + slack).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_what_is_stored_in_other_dtypes_is_summed_in_float32(dtype):
    leaves = [{PATH: InMemory(np.full(2, value).astype(jnp.dtype(dtype)))} for value in (256.0, 1.0)]
    (mean,) = averaged(leaves, lambda path: None).values()
    np.testing.assert_array_equal(mean.read(), np.full(2, 128.5, np.float32), strict=True)


def test_what_a_dtype_cannot_hold_is_refused():
    large = InMemory(np.full(2, 1e6, np.float32))
    (mean,) = averaged([{PATH: large}, {PATH: large}], lambda path: np.dtype(np.float16)).values()
    with pytest.raises(ConversionError, match="language/final_norm/scale: has values that float16 cannot hold"):
        mean.read()


def refused(deqa, tmp_path, source, other, *words):
    status, _, err = deqa("convert", source, tmp_path / "out", "--average", other)
    assert status == 1
    for word in words:
        assert word in err
    assert not (tmp_path / "out").exists()


def test_models_of_other_sizes_have_none(models, tmp_path, deqa):
    config = dataclasses.replace(TINY, language=dataclasses.replace(TINY.language, num_layers=1))
    write_tiny(tmp_path / "other", config=config)
    refused(deqa, tmp_path, models[0], tmp_path / "other", f"{tmp_path / 'other'}: is not of the same sizes as")


def test_models_of_other_vocabularies_have_none(models, tmp_path, deqa):
    other = write_tiny(tmp_path / "other")
    (other / "tokenizer.model").write_bytes(b"another")
    refused(deqa, tmp_path, models[0], other, f"{other}: has another vocabulary than")


def test_a_published_adapter_is_to_be_merged_first(models, tmp_path, deqa):
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
    refused(deqa, tmp_path, models[0], folder, f"merge it first: deqa convert {folder} OUT --base BASE")


def test_what_is_not_there_is_named(models, tmp_path, deqa):
    refused(deqa, tmp_path, models[0], tmp_path / "absent", f"{tmp_path / 'absent'}: no such folder")


def test_quantised_models_have_none(models, tmp_path):
    convert(str(models[0]), tmp_path / "int8", quantization="int8")
    with pytest.raises(QuantizedError, match="int8"):
        convert(str(models[0]), tmp_path / "out", average=[str(tmp_path / "int8")])
    assert not (tmp_path / "out").exists()
