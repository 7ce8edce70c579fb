"""Checkpoints of quantised weights: what is stored, where it comes from, and what they are refused for."""

import dataclasses
import json
import tracemalloc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from recipe import recipe_tensors, to_ours
from small_runs import TINY, write_tiny
from test_sharding import quick_compilation  # noqa: F401  # a fixture of every test here too
from training import SMALL_LORA, trained_leaves, write_adapter

from deqa_jax import Scorer
from deqa_jax.checkpoint import Checkpoint, CheckpointError
from deqa_jax.config import PRESETS, ConfigError, DeqaConfig, MeshConfig, QuantizedError
from deqa_jax.convert.describe import describe
from deqa_jax.convert.quantized import quantized
from deqa_jax.convert.tensors import ConversionError, Tensor
from deqa_jax.convert.to_jax import convert
from deqa_jax.parameters import Leaves, parameter_shapes
from deqa_jax.quantize import KERNEL_SCALE, SCHEMES, is_quantized, quantize, write_scheme

TEST = PRESETS["test"]
FEW_WORDS = dataclasses.replace(TEST, language=dataclasses.replace(TEST.language, vocab_size=96))
QUERY = ("language", "layers", "query", "kernel")
Deqa = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str | None, Path]:
    """A small converted checkpoint, as it is and in every scheme; read only."""
    folder = tmp_path_factory.mktemp("tiny")
    whole = write_tiny(folder / "M")
    for scheme in SCHEMES:
        convert(str(whole), folder / scheme, quantization=scheme)
    return {None: whole, **{scheme: folder / scheme for scheme in SCHEMES}}


def pictures(count: int = 3) -> list[np.ndarray]:
    return list(np.random.default_rng(0).integers(0, 256, (count, 28, 28, 3), np.uint8))


def assert_quantised(found: Leaves, whole: Mapping[tuple[str, ...], np.ndarray], scheme: str) -> None:
    """The leaves are those of the whole model, in a scheme."""
    for path, leaf in whole.items():
        if not is_quantized(path):
            np.testing.assert_array_equal(found[path], leaf)
            assert found[path].dtype == leaf.dtype
            continue
        for i, layer in enumerate(leaf):
            kernel, scale = quantize(layer, scheme)
            np.testing.assert_array_equal(found[path][i], kernel)
            np.testing.assert_array_equal(found[*path[:-1], KERNEL_SCALE][i], scale)
    assert len(found) == len(whole) + sum(map(is_quantized, whole))


# ---- what is stored ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_published_checkpoint_is_quantised(write_published: Callable[..., Path], tmp_path: Path, scheme: str) -> None:
    published = write_published(tmp_path / "P", FEW_WORDS)
    convert(str(published), tmp_path / "Q", quantization=scheme)
    found = Checkpoint.open(tmp_path / "Q")
    assert found.quantization == scheme
    ours = {path: leaf.astype(np.float16) for path, leaf in to_ours(FEW_WORDS, recipe_tensors(FEW_WORDS)).items()}
    assert_quantised(found.restore(), ours, scheme)
    assert {path: leaf.shape for path, leaf in found.stored.items()} == parameter_shapes(FEW_WORDS, scheme)
    assert json.loads((tmp_path / "Q" / "config.json").read_text())["quantization"] == write_scheme(scheme)
    # Rounded once: the dtype is of what is not quantised.
    convert(str(published), tmp_path / "half", quantization=scheme, dtype="bfloat16")
    half = Checkpoint.open(tmp_path / "half").restore()
    np.testing.assert_array_equal(half[QUERY], found.restore()[QUERY])
    assert {str(leaf.dtype) for path, leaf in half.items()} == {"int8", "float32", "bfloat16"}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_converted_checkpoint_is_quantised(tiny: dict[str | None, Path], scheme: str) -> None:
    whole, found = Checkpoint.open(tiny[None]), Checkpoint.open(tiny[scheme])
    assert_quantised(found.restore(), whole.restore(), scheme)
    assert (found.config, found.provenance["source"]) == (whole.config, whole.provenance["source"])
    assert found.provenance["converted_again"] == whole.identity
    for name in ("tokenizer.model", "preprocessor_config.json"):
        assert (tiny[scheme] / name).read_bytes() == (whole.folder / name).read_bytes()


def test_a_converted_checkpoint_is_stored_in_another_dtype(tiny: dict[str | None, Path], tmp_path: Path) -> None:
    convert(str(tiny[None]), tmp_path / "M", dtype="bfloat16")
    found, whole = Checkpoint.open(tmp_path / "M"), Checkpoint.open(tiny[None])
    assert found.quantization is None
    for path, leaf in whole.restore("bfloat16").items():
        np.testing.assert_array_equal(found.read_leaf(path), leaf)


def test_a_trained_adapter_is_merged_and_quantised(converted: Path, tmp_path: Path) -> None:
    run = write_adapter(tmp_path / "A", trained_leaves(), Checkpoint.open(converted), SMALL_LORA)
    convert(str(run), tmp_path / "Q", quantization="int8")
    assert_quantised(Checkpoint.open(tmp_path / "Q").restore(), Checkpoint.open(run).restore(), "int8")


def test_every_kernel_is_read_once_and_its_scales_are_not_kept() -> None:
    read = []

    def leaf(path: tuple[str, ...], shape: tuple[int, ...]) -> Tensor:
        return Tensor(shape, np.dtype(np.float32), lambda: read.append(path) or np.ones(shape, np.float32))

    shapes = parameter_shapes(TINY)
    made = quantized({path: leaf(path, shape) for path, shape in shapes.items()}, "int4")
    for path in sorted(made):
        assert made[path].read().shape == made[path].shape == parameter_shapes(TINY, "int4")[path]
    assert sorted(read) == sorted(shapes)
    scales = (*QUERY[:-1], KERNEL_SCALE)
    np.testing.assert_array_equal(made[scales].read(), np.full(made[scales].shape, 1 / 7, np.float32))
    assert read.count(QUERY) == 2


def test_memory_does_not_grow_with_the_checkpoint(write_published: Callable[..., Path], tmp_path: Path) -> None:
    config = larger()
    source = write_published(tmp_path / "P", config)
    sizes = [2 * int(np.prod(shape)) for shape in parameter_shapes(config).values()]
    tracemalloc.start()
    try:
        convert(str(source), tmp_path / "Q", quantization="int8")
        # A stack in float16, the same in int8, and a layer in float32.
        assert tracemalloc.get_traced_memory()[1] < 2 * max(sizes) + (2 << 20) < sum(sizes) / 2
    finally:
        tracemalloc.stop()


def larger() -> DeqaConfig:
    """Many layers, none of whose stacked parameters is much of the whole."""
    language = dataclasses.replace(FEW_WORDS.language, hidden_size=384, mlp_dim=384, num_layers=8)
    return dataclasses.replace(FEW_WORDS, language=language)


# ---- scores -----------------------------------------------------------------------------------------------


def test_a_quantised_golden_model_scores_nearly_the_same(
    converted: Path, images: Path, tmp_path: Path, deqa: Deqa
) -> None:
    assert deqa("convert", converted, tmp_path / "Q", "--quantize", "int8")[0] == 0
    scores = {}
    for name, model, options in (("whole", converted, ()), ("int8", tmp_path / "Q", ("--int8-activations",))):
        command = ("score", images / "square.png", images / "wide.png", "--model", model, "--format", "jsonl", *options)
        status, out, _ = deqa(*command)
        assert status == 0
        scores[name] = np.array([json.loads(line)["score"] for line in out.splitlines()])
    assert 0 < np.abs(scores["int8"] - scores["whole"]).max() < 0.2


def test_scores_on_a_mesh_are_those_of_one_device(tiny: dict[str | None, Path]) -> None:
    """One has its blocks side by side, the other stacked."""
    checkpoint = Checkpoint.open(tiny["int8"])
    alone = Scorer(checkpoint, batch_size=8, dtype="bfloat16")
    together = Scorer(checkpoint, batch_size=8, dtype="bfloat16", mesh=MeshConfig(data=2, fsdp=2, tensor=2))
    dtypes = {str(leaf.dtype) for scorer in (alone, together) for leaf in map(np.asarray, leaves(scorer))}
    assert dtypes == {"int8", "float32", "bfloat16"}
    found = [scorer.predict(pictures()).score for scorer in (alone, together)]
    np.testing.assert_allclose(*found, atol=0.05)
    # In another place of the batch, to the bit.
    for scorer, scores in zip((alone, together), found, strict=True):
        np.testing.assert_array_equal(scorer.predict(pictures()[::-1]).score, scores[::-1])


def leaves(scorer: Scorer) -> list[Any]:
    import jax

    return jax.tree.leaves(scorer._params)


@pytest.mark.parametrize(
    ("scheme", "dtype", "chosen"),
    [("int8", "auto", True), ("int8", "float32", False), ("int4", "auto", False), (None, "auto", False)],
)
def test_on_cpu_activations_of_int8_kernels_are_int8_unless_a_dtype_is_named(
    tiny: dict[str | None, Path], scheme: str | None, dtype: str, chosen: bool
) -> None:
    scorer = Scorer(Checkpoint.open(tiny[scheme]), dtype=dtype, batch_size=2)
    assert (scorer.dtype, scorer.int8_activations) == ("float32", chosen)


@pytest.mark.parametrize("scheme", [None, "int4"])
def test_int8_activations_need_int8_kernels(tiny: dict[str | None, Path], scheme: str | None) -> None:
    with pytest.raises(ConfigError, match="int8 activations need int8 kernels, which `deqa convert --quantize int8`"):
        Scorer(Checkpoint.open(tiny[scheme]), int8_activations=True)


# ---- what a checkpoint says of itself ---------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
def test_info_tells_how_it_is_stored(tiny: dict[str | None, Path], scheme: str) -> None:
    lines = describe(str(tiny[scheme])).splitlines()
    shapes = parameter_shapes(TINY)
    packed = sum(int(np.prod(shape)) for path, shape in shapes.items() if is_quantized(path)) / 1e6
    rest = sum(int(np.prod(shape)) for path, shape in shapes.items() if not is_quantized(path)) / 1e6
    (stored,) = (line for line in lines if line.startswith("stored"))
    assert f"{packed:.1f} M in {scheme}" in stored
    assert f"{rest:.1f} M in float32" in stored
    assert any(line.startswith("quantised   for scoring only: ") for line in lines)
    assert not any(line.startswith("quantised") for line in describe(str(tiny[None])).splitlines())


def test_every_scheme_is_another_checkpoint(tiny: dict[str | None, Path]) -> None:
    assert len({Checkpoint.open(folder).identity for folder in tiny.values()}) == 3


@pytest.mark.parametrize("written", [{"scheme": "int2", "version": 1}, {"scheme": "int8", "version": 9}, "int8"])
def test_an_unknown_scheme_is_refused(tiny: dict[str | None, Path], tmp_path: Path, written: Any) -> None:
    """Rather than read as what it is not."""
    for path in tiny["int8"].iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "config.json").unlink()
    config = json.loads((tiny["int8"] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization": written}))
    with pytest.raises(CheckpointError, match="is not known to this program"):
        Checkpoint.open(tmp_path)
    # Of another scheme than the parameters, or of none.
    for other, wrong in (({"quantization": write_scheme("int4")}, "query/kernel"), ({}, KERNEL_SCALE)):
        kept = {key: value for key, value in config.items() if key != "quantization"}
        (tmp_path / "config.json").write_text(json.dumps({**kept, **other}))
        with pytest.raises(CheckpointError, match=f"{wrong}.* do not fit its config.json"):
            Checkpoint.open(tmp_path).restore()


# ---- what it is refused for -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command",
    [
        ("export", "Q", "OUT"),
        ("export", "Q", "OUT", "--adapter"),
        ("convert", "Q", "OUT", "--quantize", "int4"),
        ("convert", "Q", "OUT", "--dtype", "float32"),
        ("train", "--config_path", "configs/finetune_lora.yaml", "--model", "Q"),
    ],
    ids=" ".join,
)
def test_what_needs_exact_weights_is_refused(
    tiny: dict[str | None, Path], tmp_path: Path, deqa: Deqa, command: tuple[str, ...]
) -> None:
    names = {"Q": tiny["int8"], "OUT": tmp_path / "OUT"}
    config = Path(__file__).parents[2] / "configs" / "finetune_lora.yaml"
    arguments = [config if word.endswith(".yaml") else names.get(word, word) for word in command]
    status, out, err = deqa(*arguments)
    assert (status, out) == (2, "")
    assert f"{tiny['int8']}: its weights are quantised (int8), which is for scoring only" in err
    assert "starts from the checkpoint that it was made from" in err
    assert not (tmp_path / "OUT").exists()


def test_refusals_are_no_damage(tiny: dict[str | None, Path]) -> None:
    Checkpoint.open(tiny[None]).require_exact("anything")
    with pytest.raises(QuantizedError, match="anything starts from"):
        Checkpoint.open(tiny["int4"]).require_exact("anything")


def test_weights_that_are_not_finite_are_named(write_published: Callable[..., Path], tmp_path: Path) -> None:
    tensors = recipe_tensors(FEW_WORDS)
    tensors["model.layers.1.self_attn.q_proj.weight"][3, 5] = np.nan
    source = write_published(tmp_path / "P", FEW_WORDS, tensors=tensors)
    with pytest.raises(ConversionError, match=r"^language/layers/query/kernel: layer 1 has values that are not fin"):
        convert(str(source), tmp_path / "Q", quantization="int8")
    assert not (tmp_path / "Q").exists()


def test_a_damaged_checkpoint_is_an_error_with_a_name(tiny: dict[str | None, Path], tmp_path: Path, deqa: Deqa) -> None:
    for path in tiny[None].iterdir():
        if path.name != "provenance.json":
            (tmp_path / path.name).symlink_to(path)
    status, _, err = deqa("convert", tmp_path, tmp_path / "Q", "--quantize", "int8")
    assert status == 1
    assert "provenance.json" in err


def test_a_converted_checkpoint_has_no_base(tiny: dict[str | None, Path], tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="--base is for LoRA adapters"):
        convert(str(tiny[None]), tmp_path / "Q", base="B", quantization="int8")
