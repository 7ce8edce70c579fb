"""`deqa export` of a LoRA run, as an adapter and merged: what comes back through `deqa convert` is the same model."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from training import (
    QUERY,
    SMALL_LORA,
    VALUE,
    golden_batches,
    golden_leaves,
    golden_task,
    jit,
    merged_leaves,
    to_published,
    trained_leaves,
    write_adapter,
)

from deqa_jax import cli, lora, losses
from deqa_jax.checkpoint import Checkpoint, CheckpointError
from deqa_jax.config import PRESETS
from deqa_jax.convert.hf import open_file
from deqa_jax.convert.tensors import ConversionError
from deqa_jax.convert.to_jax import convert
from deqa_jax.convert.to_peft import export_adapter
from deqa_jax.convert.to_published import export
from deqa_jax.lora import LoraConfig
from deqa_jax.parameters import parameter_shapes, unflatten
from deqa_jax.train.step import answer_logits

PREFIX = "base_model.model."
LAYERS = PRESETS["test"].language.num_layers


@pytest.fixture(scope="module")
def run_checkpoint(converted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a LoRA run; read only."""
    folder = tmp_path_factory.mktemp("run") / "A"
    return write_adapter(folder, trained_leaves(), Checkpoint.open(converted), SMALL_LORA)


@pytest.fixture(scope="module")
def exported(run_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In PEFT's format; read only."""
    out = tmp_path_factory.mktemp("exported") / "E"
    export_adapter(run_checkpoint, out)
    return out


@pytest.fixture(scope="module")
def scores() -> Any:
    """Scores of golden images by parameters, compiled once for all checkpoints."""
    task = golden_task()
    batch = jax.tree.map(lambda x: x[:1, :1] if x.ndim > 1 else x[:1], golden_batches().batches["B1"])

    @jit
    def run(leaves: Any) -> jax.Array:
        model = nnx.merge(task.graph(training=False), unflatten(leaves))
        with jax.default_matmul_precision("highest"):
            logits = answer_logits(model, task, batch)[:, 0, batch.level_position[0, 0]]
        return losses.rating(logits, jnp.asarray(task.level_ids), closed_set=True).mean

    return lambda folder: np.asarray(run(Checkpoint.open(folder).restore("float32")))


def check_same(folder: Path, scores: Any, run_checkpoint: Path, converted: Path) -> None:
    found = Checkpoint.open(folder).restore("float32")
    assert found.keys() == parameter_shapes(PRESETS["test"]).keys()
    for path, leaf in merged_leaves().items():
        np.testing.assert_allclose(found[path], leaf, atol=2e-6)
    np.testing.assert_allclose(scores(folder), scores(run_checkpoint), atol=1e-5)
    assert np.abs(scores(run_checkpoint) - scores(converted)).max() > 1e-3


def test_an_exported_adapter_comes_back_through_convert(
    exported: Path, run_checkpoint: Path, published: Path, converted: Path, scores: Any, tmp_path: Path
) -> None:
    convert(str(exported), tmp_path / "M", base=str(published), dtype="float32")
    check_same(tmp_path / "M", scores, run_checkpoint, converted)


def test_a_merged_export_comes_back_through_convert(
    run_checkpoint: Path, converted: Path, scores: Any, tmp_path: Path
) -> None:
    export(run_checkpoint, tmp_path / "P")
    convert(str(tmp_path / "P"), tmp_path / "M", dtype="float32")
    check_same(tmp_path / "M", scores, run_checkpoint, converted)


def run_cli(*arguments: str) -> Any:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    return caught.value.code


def test_the_command_line_exports_both(run_checkpoint: Path, exported: Path, tmp_path: Path) -> None:
    assert run_cli("export", str(run_checkpoint), str(tmp_path / "E"), "--adapter") == 0
    assert sorted(path.name for path in (tmp_path / "E").iterdir()) == sorted(path.name for path in exported.iterdir())
    for name in ("adapter_model.bin", "non_lora_trainables.bin", "adapter_config.json"):
        assert (tmp_path / "E" / name).read_bytes() == (exported / name).read_bytes()
    assert run_cli("export", str(run_checkpoint), str(tmp_path / "P")) == 0
    assert not (tmp_path / "P" / "adapter_config.json").exists()


def test_files_hold_only_what_was_trained(exported: Path) -> None:
    names = ("self_attn.q_proj", "self_attn.v_proj.multiway.1")
    adapters = open_file(exported / "adapter_model.bin")
    assert adapters.keys() == {
        f"{PREFIX}model.layers.{i}.{name}.lora_{side}.weight" for i in range(LAYERS) for name in names for side in "AB"
    }
    leaves = trained_leaves()
    for i in range(LAYERS):
        for path, name in zip((QUERY, VALUE), names, strict=True):
            for side, ours in (("A", lora.A), ("B", lora.B)):
                found = adapters[f"{PREFIX}model.layers.{i}.{name}.lora_{side}.weight"]
                # PyTorch's are [r, inputs] and [outputs, r].
                assert found.shape == ((3, 64) if side == "A" else (64, 3))
                np.testing.assert_array_equal(found.read(), leaves[*path, ours][i].T)
    trained = open_file(exported / "non_lora_trainables.bin")
    expected = to_published({path: leaf for path, leaf in leaves.items() if "lora" not in path[-1]})
    assert trained.keys() == {f"{PREFIX}{name}" for name in expected}
    assert f"{PREFIX}model.vision_model.embeddings.post_layernorm.weight" not in trained
    for name, leaf in expected.items():
        assert trained[f"{PREFIX}{name}"].dtype == np.float32
        np.testing.assert_array_equal(trained[f"{PREFIX}{name}"].read(), leaf)


def test_the_settings_are_those_of_peft(exported: Path, published: Path, shared: Path) -> None:
    settings = json.loads((exported / "adapter_config.json").read_text())
    theirs = json.loads((shared / "tiny" / "checkpoint-lora" / "adapter_config.json").read_text())
    assert settings.keys() <= theirs.keys()
    own = {"r", "lora_alpha", "lora_dropout", "target_modules", "base_model_name_or_path"}
    assert {name: settings[name] for name in settings.keys() - own} == {
        name: theirs[name] for name in settings.keys() - own
    }
    assert sorted(settings["target_modules"]) == sorted(theirs["target_modules"])
    assert (settings["r"], settings["lora_alpha"], settings["lora_dropout"]) == (3, 6.0, 0.0)
    assert settings["base_model_name_or_path"] == str(published)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_another_dtype_is_stored_if_asked_for(run_checkpoint: Path, tmp_path: Path, dtype: str) -> None:
    export_adapter(run_checkpoint, tmp_path / "E", dtype=dtype)
    for name in ("adapter_model.bin", "non_lora_trainables.bin"):
        tensors = open_file(tmp_path / "E" / name)
        assert {tensor.dtype for tensor in tensors.values()} == {jnp.dtype(dtype)}
    found = open_file(tmp_path / "E" / "adapter_model.bin")[f"{PREFIX}model.layers.1.self_attn.q_proj.lora_A.weight"]
    np.testing.assert_array_equal(found.read(), trained_leaves()[*QUERY, lora.A][1].T.astype(jnp.dtype(dtype)))


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ((*QUERY, lora.B), r"model\.layers\.0\.self_attn\.q_proj\.lora_B\.weight"),
        (("language", "final_norm", "scale"), r"model\.norm\.weight"),
    ],
    ids=["adapter", "trained whole"],
)
def test_values_that_a_dtype_cannot_hold_are_named(
    converted: Path, tmp_path: Path, path: tuple[str, ...], name: str
) -> None:
    trained = trained_leaves()
    trained[path] = np.full_like(trained.get(path, golden_leaves().get(path)), 1e5)
    run = write_adapter(tmp_path / "A", trained, Checkpoint.open(converted), SMALL_LORA)
    with pytest.raises(ConversionError, match=rf"^base_model\.model\.{name}: has values that float16 cannot hold$"):
        export_adapter(run, tmp_path / "out" / "E", dtype="float16")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("targets", [("abstractor/layers/gate", "abstractor/projection"), ("vision/layers/.*",)])
def test_adapters_of_any_dense_layers_come_back(
    converted: Path, published: Path, tmp_path: Path, targets: tuple[str, ...]
) -> None:
    config = LoraConfig(rank=2, alpha=3.0, dropout=0.1, targets=targets)
    random = np.random.default_rng(0)
    adapters = {
        path: random.normal(0, 0.2, shape).astype(np.float32)
        for path, shape in lora.adapter_shapes(parameter_shapes(PRESETS["test"]), config).items()
    }
    run = write_adapter(tmp_path / "A", adapters, Checkpoint.open(converted), config)
    export_adapter(run, tmp_path / "E")
    # Nothing was trained beside the adapters, and the file that PyTorch's code insists on is there all the same.
    assert open_file(tmp_path / "E" / "non_lora_trainables.bin") == {}
    convert(str(tmp_path / "E"), tmp_path / "M", base=str(published), dtype="float32")
    found, expected = Checkpoint.open(tmp_path / "M").restore(), Checkpoint.open(run).restore()
    moved = 0
    for path, leaf in expected.items():
        np.testing.assert_allclose(found[path], leaf, atol=2e-6)
        moved += bool(np.abs(leaf - golden_leaves()[path]).max() > 1e-3)
    assert moved == len(adapters) / 2


def test_a_kernel_that_was_trained_beside_its_adapter_comes_back(
    converted: Path, published: Path, tmp_path: Path
) -> None:
    trained = trained_leaves()
    trained[*VALUE, "kernel"] = golden_leaves()[*VALUE, "kernel"] * np.float32(-1)
    run = write_adapter(tmp_path / "A", trained, Checkpoint.open(converted), SMALL_LORA)
    export_adapter(run, tmp_path / "E")
    convert(str(tmp_path / "E"), tmp_path / "M", base=str(published), dtype="float32")
    for path in (QUERY, VALUE):
        np.testing.assert_allclose(
            Checkpoint.open(tmp_path / "M").read_leaf((*path, "kernel")),
            Checkpoint.open(run).read_leaf((*path, "kernel")),
            atol=2e-6,
        )


@pytest.mark.parametrize("kind", ["whole", "trained parameters without adapters"])
def test_without_adapters_there_is_nothing_to_export(converted: Path, tmp_path: Path, kind: str) -> None:
    model = converted
    if kind != "whole":
        path = ("vision", "post_norm", "scale")
        model = write_adapter(tmp_path / "A", {path: golden_leaves()[path]}, Checkpoint.open(converted), None)
    with pytest.raises(CheckpointError, match="has no adapters of its own; export it without --adapter"):
        export_adapter(model, tmp_path / "E")
    assert not (tmp_path / "E").exists()


def test_nothing_is_overwritten(run_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "E").mkdir()
    with pytest.raises(FileExistsError):
        export_adapter(run_checkpoint, tmp_path / "E")
    assert not list((tmp_path / "E").iterdir())


def test_adapters_on_adapters_are_exported_merged_or_not_at_all(run_checkpoint: Path, tmp_path: Path) -> None:
    """PEFT would put the second ones on the published base, without the first."""
    model = write_adapter(tmp_path / "A", trained_leaves(), Checkpoint.open(run_checkpoint), SMALL_LORA)
    with pytest.raises(CheckpointError, match=r"was trained on adapters itself.*export it without --adapter"):
        export_adapter(model, tmp_path / "P")
    assert not (tmp_path / "P").exists()
    export(model, tmp_path / "P")
    assert (tmp_path / "P" / "config.json").is_file()
