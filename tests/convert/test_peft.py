import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from opening import merge_adapter, open_published
from recipe import recipe_tensors
from torch_writer import save_tensors

from deqa_jax.config import PRESETS, to_published
from deqa_jax.convert.hf import Published, open_file
from deqa_jax.convert.peft import is_adapter
from deqa_jax.convert.tensors import ConversionError

CONFIG = dataclasses.replace(PRESETS["test"], language=dataclasses.replace(PRESETS["test"].language, vocab_size=96))
PREFIX = "base_model.model."
QUERY = "model.layers.0.self_attn.q_proj"
VALUE = "model.layers.1.self_attn.v_proj.multiway.1"
SETTINGS = {
    "peft_type": "LORA",
    "r": 4,
    "lora_alpha": 6,
    "lora_dropout": 0.05,
    "bias": "none",
    "fan_in_fan_out": False,
    "modules_to_save": None,
    "use_dora": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "target_modules": [QUERY, VALUE],
    "task_type": "CAUSAL_LM",
}
RANDOM = np.random.RandomState(0)
MATRICES = {
    f"{PREFIX}{module}.lora_{side}.weight": RANDOM.standard_normal(shape).astype(np.float16)
    for module in (QUERY, VALUE)
    for side, shape in (("A", (4, 64)), ("B", (64, 4)))
}
TRAINED = {
    f"{PREFIX}{name}": array + np.float16(1)
    for name, array in recipe_tensors(CONFIG).items()
    if "vision_model" in name or "visual_fc" in name
}


@pytest.fixture(scope="module")
def base(write_published: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Published:
    """The checkpoint that adapters are put on; read only."""
    return open_published(write_published(tmp_path_factory.mktemp("base") / "P", CONFIG))


def _adapter(
    folder: Path,
    settings: Mapping[str, Any] = SETTINGS,
    matrices: Mapping[str, np.ndarray] = MATRICES,
    trained: Mapping[str, np.ndarray] = TRAINED,
    kind: str = "bin",
) -> Path:
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    for name, tensors in (("adapter_model", matrices), ("non_lora_trainables", trained)):
        path = folder / f"{name}.{kind}"
        if kind == "bin":
            save_tensors(path, tensors)
        else:
            safetensors.numpy.save_file(dict(tensors), path)
    return folder


def _problems(folder: Path, base: Published) -> tuple[str, ...]:
    with pytest.raises(ConversionError) as caught:
        merge_adapter(folder, base)
    return caught.value.problems


def _expected(base: Published, module: str, scale: float) -> np.ndarray:
    a, b = (MATRICES[f"{PREFIX}{module}.lora_{side}.weight"].astype(np.float32) for side in "AB")
    return base.tensors[f"{module}.weight"].read().astype(np.float32) + np.float32(scale) * (b @ a)


# ---- merging ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bin", "safetensors"])
def test_adapter_is_merged_in_float32(tmp_path: Path, base: Published, kind: str) -> None:
    merged = merge_adapter(_adapter(tmp_path, kind=kind), base)
    for module in (QUERY, VALUE):
        tensor = merged.tensors[f"{module}.weight"]
        assert tensor.dtype == np.float32
        np.testing.assert_array_equal(tensor.read(), _expected(base, module, 6 / 4))


def test_merge_is_right_to_the_last_digits(tmp_path: Path, base: Published) -> None:
    """Against double precision, and far enough from the base to tell a transposed update from a right one."""
    a, b = (MATRICES[f"{PREFIX}{QUERY}.lora_{side}.weight"].astype(np.float64) for side in "AB")
    weight = base.tensors[f"{QUERY}.weight"].read().astype(np.float64)
    merged = merge_adapter(_adapter(tmp_path), base).tensors[f"{QUERY}.weight"].read()
    np.testing.assert_allclose(merged, weight + 1.5 * b @ a, rtol=0, atol=1e-5)
    assert np.abs(merged - weight).mean() > 1


def test_every_other_tensor_is_the_trained_one_or_the_base_s(tmp_path: Path, base: Published) -> None:
    merged = merge_adapter(_adapter(tmp_path), base)
    assert merged.tensors.keys() == base.tensors.keys()
    for name in merged.tensors.keys() - {f"{QUERY}.weight", f"{VALUE}.weight"}:
        expected = TRAINED[f"{PREFIX}{name}"] if f"{PREFIX}{name}" in TRAINED else base.tensors[name].read()
        assert merged.tensors[name].dtype == expected.dtype
        np.testing.assert_array_equal(merged.tensors[name].read(), expected)


def test_trained_weight_is_what_its_adapter_is_merged_into(tmp_path: Path, base: Published) -> None:
    trained = {f"{PREFIX}{QUERY}.weight": np.zeros((64, 64), np.float32)}
    merged = merge_adapter(_adapter(tmp_path, trained=trained), base).tensors[f"{QUERY}.weight"].read()
    zero = base.tensors[f"{QUERY}.weight"].read().astype(np.float32)
    np.testing.assert_allclose(merged, _expected(base, QUERY, 1.5) - zero, rtol=0, atol=1e-5)


def test_rank_stabilised_adapter_is_scaled_by_the_root_of_its_rank(tmp_path: Path, base: Published) -> None:
    merged = merge_adapter(_adapter(tmp_path, SETTINGS | {"use_rslora": True}), base)
    np.testing.assert_array_equal(merged.tensors[f"{QUERY}.weight"].read(), _expected(base, QUERY, 6 / 2))


def test_names_with_the_adapter_s_name_and_without_prefix_are_understood(tmp_path: Path, base: Published) -> None:
    matrices = {
        key.removeprefix(PREFIX).replace(".weight", ".default.weight"): array for key, array in MATRICES.items()
    }
    trained = {key.removeprefix(PREFIX): array for key, array in TRAINED.items()}
    merged = merge_adapter(_adapter(tmp_path, matrices=matrices, trained=trained), base)
    np.testing.assert_array_equal(merged.tensors[f"{QUERY}.weight"].read(), _expected(base, QUERY, 1.5))
    name = "model.visual_abstractor.visual_fc.bias"
    np.testing.assert_array_equal(merged.tensors[name].read(), TRAINED[f"{PREFIX}{name}"])


def test_bfloat16_matrices_are_merged_in_float32(tmp_path: Path, base: Published) -> None:
    matrices = {key: array.astype(ml_dtypes.bfloat16) for key, array in MATRICES.items()}
    merged = merge_adapter(_adapter(tmp_path, matrices=matrices), base)
    a, b = (matrices[f"{PREFIX}{QUERY}.lora_{side}.weight"].astype(np.float32) for side in "AB")
    weight = base.tensors[f"{QUERY}.weight"].read().astype(np.float32)
    np.testing.assert_array_equal(merged.tensors[f"{QUERY}.weight"].read(), weight + np.float32(1.5) * (b @ a))


@pytest.mark.parametrize("targets", [["q_proj", "multiway.1"], r".*(q_proj|v_proj\.multiway\.1)", None])
def test_targets_may_be_endings_or_a_pattern(tmp_path: Path, base: Published, targets: Any) -> None:
    merge_adapter(_adapter(tmp_path, SETTINGS | {"target_modules": targets}), base)


def test_all_weight_files_are_remembered(tmp_path: Path, base: Published) -> None:
    merged = merge_adapter(_adapter(tmp_path), base)
    assert [path.name for path in merged.weight_files] == [
        "model.safetensors",
        "adapter_model.bin",
        "non_lora_trainables.bin",
    ]


def test_folder_with_an_adapter_configuration_is_an_adapter(tmp_path: Path, base: Published) -> None:
    assert is_adapter(_adapter(tmp_path))
    assert not is_adapter(base.folder)


def test_golden_adapter_is_merged_exactly(shared: Path) -> None:
    """By its own arithmetic on what the files hold; α / r is 16 / 8."""
    folder, base = shared / "tiny" / "checkpoint-lora", open_published(shared / "tiny" / "checkpoint")
    merged = merge_adapter(folder, base)
    matrices = {key.removeprefix(PREFIX): t.read() for key, t in open_file(folder / "adapter_model.bin").items()}
    trained = {key.removeprefix(PREFIX): t.read() for key, t in open_file(folder / "non_lora_trainables.bin").items()}
    targets = json.loads((folder / "adapter_config.json").read_text())["target_modules"]
    assert len(matrices) == 2 * len(targets)
    assert merged.tensors.keys() == base.tensors.keys() >= trained.keys()
    for name, tensor in merged.tensors.items():
        expected = trained[name] if name in trained else base.tensors[name].read()
        if (module := name.removesuffix(".weight")) in targets:
            a, b = (matrices[f"{module}.lora_{side}.weight"].astype(np.float32) for side in "AB")
            expected = expected.astype(np.float32) + np.float32(2) * (b @ a)
        assert tensor.dtype == expected.dtype
        np.testing.assert_array_equal(tensor.read(), expected)


# ---- what does not fit ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"use_dora": True}, "use_dora: true"),
        ({"modules_to_save": ["lm_head"]}, 'modules_to_save: ["lm_head"]'),
        ({"bias": "all"}, 'bias: "all"'),
        ({"bias": "lora_only"}, 'bias: "lora_only"'),
        ({"peft_type": "IA3"}, 'peft_type: "IA3"'),
        ({"fan_in_fan_out": True}, "fan_in_fan_out: true"),
        ({"rank_pattern": {"q_proj": 8}}, 'rank_pattern: {"q_proj": 8}'),
        ({"alpha_pattern": {"q_proj": 8}}, 'alpha_pattern: {"q_proj": 8}'),
        ({"lora_alpha": None}, "lora_alpha: None"),
        ({"lora_alpha": "16"}, "lora_alpha: '16'"),
        ({"lora_alpha": True}, "lora_alpha: True"),
    ],
)
def test_unsupported_setting_is_named(tmp_path: Path, base: Published, settings: dict[str, Any], words: str) -> None:
    (problem,) = _problems(_adapter(tmp_path, SETTINGS | settings), base)
    assert problem.startswith(f"adapter_config.json: {words}")


@pytest.mark.parametrize("key", ["modules_to_save", "use_dora", "rank_pattern", "alpha_pattern", "use_rslora"])
def test_setting_that_is_absent_or_empty_changes_nothing(tmp_path: Path, base: Published, key: str) -> None:
    """As older and newer versions of PEFT write it."""
    settings = {name: value for name, value in SETTINGS.items() if name != key}
    merged = merge_adapter(_adapter(tmp_path, settings), base)
    np.testing.assert_array_equal(merged.tensors[f"{QUERY}.weight"].read(), _expected(base, QUERY, 1.5))
    merge_adapter(_adapter(tmp_path, SETTINGS | {key: None}), base)


def _without(key: str) -> dict[str, np.ndarray]:
    return {name: array for name, array in MATRICES.items() if name != key}


def _shaped(**shapes: tuple[int, ...]) -> dict[str, np.ndarray]:
    changed = {f"{PREFIX}{QUERY}.lora_{side}.weight": np.ones(shape, np.float16) for side, shape in shapes.items()}
    return MATRICES | changed


@pytest.mark.parametrize("side", ["A", "B"])
def test_missing_half_of_a_pair_is_named(tmp_path: Path, base: Published, side: str) -> None:
    folder = _adapter(tmp_path, matrices=_without(f"{PREFIX}{VALUE}.lora_{side}.weight"))
    assert _problems(folder, base) == (f"adapter_model.bin: {VALUE}: lora_{side} is missing",)


@pytest.mark.parametrize(
    "shapes",
    [
        {"A": (4, 63)},
        {"B": (63, 4)},
        {"A": (5, 64)},
        {"A": (64, 4), "B": (4, 64)},
        {"A": (4, 64, 1)},
        {"B": (256,)},
        {"A": (0,), "B": (0,)},
        {"A": (0, 64), "B": (64, 0)},
    ],
    ids=["inputs", "outputs", "ranks", "transposed", "three-axes", "one-axis", "emptied", "rank-of-zero"],
)
def test_matrices_of_a_wrong_shape_are_named(
    tmp_path: Path, base: Published, shapes: dict[str, tuple[int, ...]]
) -> None:
    (problem,) = _problems(_adapter(tmp_path, matrices=_shaped(**shapes)), base)
    assert problem.startswith(f"adapter_model.bin: {QUERY}: ")
    assert all(str(list(shape)) in problem for shape in shapes.values())


def test_rank_that_the_settings_deny_is_named(tmp_path: Path, base: Published) -> None:
    """PEFT scales by the rank of the settings and could not load these matrices."""
    problems = _problems(_adapter(tmp_path, SETTINGS | {"r": 8}), base)
    assert problems
    assert all("says r = 8" in problem for problem in problems)


def test_integer_matrices_are_named(tmp_path: Path, base: Published) -> None:
    key = f"{PREFIX}{QUERY}.lora_A.weight"
    (problem,) = _problems(_adapter(tmp_path, matrices=MATRICES | {key: MATRICES[key].astype(np.int64)}), base)
    assert problem.startswith(f"adapter_model.bin: {QUERY}: ")
    assert "int64" in problem


def test_module_that_the_base_lacks_is_named(tmp_path: Path, base: Published) -> None:
    extra = {key.replace("layers.0", "layers.9"): array for key, array in MATRICES.items() if QUERY in key}
    (problem,) = _problems(_adapter(tmp_path, matrices=MATRICES | extra), base)
    assert problem.startswith("adapter_model.bin: model.layers.9.self_attn.q_proj: ")


@pytest.mark.parametrize(
    "key",
    [
        f"{PREFIX}{QUERY}.lora_B.bias",
        f"{PREFIX}model.embed_tokens.lora_embedding_A",
        f"{PREFIX}{QUERY}.lora_magnitude_vector",
        f"{PREFIX}{QUERY}.weight",
    ],
)
def test_tensor_that_is_no_matrix_of_an_adapter_is_named(tmp_path: Path, base: Published, key: str) -> None:
    (problem,) = _problems(_adapter(tmp_path, matrices=MATRICES | {key: np.ones(4, np.float16)}), base)
    assert problem.startswith(f"adapter_model.bin: {key} is no LoRA matrix")


def test_matrix_that_is_there_twice_is_named(tmp_path: Path, base: Published) -> None:
    """With the adapter's name and without: one of the two would be dropped."""
    key = f"{PREFIX}{QUERY}.lora_A.weight"
    twice = MATRICES | {key.replace(".weight", ".default.weight"): MATRICES[key] + np.float16(1)}
    (problem,) = _problems(_adapter(tmp_path, matrices=twice), base)
    assert QUERY in problem


def test_trained_tensor_that_the_base_lacks_is_named(tmp_path: Path, base: Published) -> None:
    key = f"{PREFIX}model.vision_model.extra.weight"
    (problem,) = _problems(_adapter(tmp_path, trained=TRAINED | {key: np.ones(4, np.float16)}), base)
    assert problem.startswith(f"non_lora_trainables.bin: {key} is not a tensor of the base")


def test_target_without_matrices_is_named(tmp_path: Path, base: Published) -> None:
    targets = [QUERY, VALUE, "model.layers.2.self_attn.q_proj"]
    (problem,) = _problems(_adapter(tmp_path, SETTINGS | {"target_modules": targets}), base)
    assert problem.startswith("adapter_config.json: target model.layers.2.self_attn.q_proj ")


@pytest.mark.parametrize("name", ["adapter_model.bin", "non_lora_trainables.bin"])
def test_missing_file_is_named(tmp_path: Path, base: Published, name: str) -> None:
    (_adapter(tmp_path) / name).unlink()
    assert any(problem.endswith(f"{name} is missing") for problem in _problems(tmp_path, base))


@pytest.mark.parametrize("name", ["adapter_model.bin", "non_lora_trainables.bin"])
def test_truncated_file_is_named(tmp_path: Path, base: Published, name: str) -> None:
    path = _adapter(tmp_path) / name
    path.write_bytes(path.read_bytes()[:-1])
    assert any(problem.startswith(f"{name}: truncated") for problem in _problems(tmp_path, base))


@pytest.mark.parametrize("content", ["", "[]", "{"])
def test_settings_that_are_no_json_object_are_named(tmp_path: Path, base: Published, content: str) -> None:
    (_adapter(tmp_path) / "adapter_config.json").write_text(content)
    (problem,) = _problems(tmp_path, base)
    assert "adapter_config.json" in problem


def test_adapter_of_another_model_is_named(tmp_path: Path, base: Published) -> None:
    (_adapter(tmp_path) / "config.json").write_text(json.dumps(to_published(CONFIG)))
    merge_adapter(tmp_path, base)
    (tmp_path / "config.json").write_text(json.dumps(to_published(PRESETS["test"])))
    (problem,) = _problems(tmp_path, base)
    assert "config.json: describes another model" in problem


def test_everything_that_does_not_fit_is_named_at_once(tmp_path: Path, base: Published) -> None:
    settings = SETTINGS | {"use_dora": True, "bias": "all", "target_modules": [QUERY, VALUE, "nowhere"]}
    matrices = {key: array for key, array in _shaped(A=(4, 63)).items() if key != f"{PREFIX}{VALUE}.lora_B.weight"}
    folder = _adapter(tmp_path, settings, matrices, TRAINED | {f"{PREFIX}extra": np.ones(1, np.float16)})
    (folder / "config.json").write_text(json.dumps(to_published(PRESETS["test"])))
    problems = "\n".join(_problems(folder, base))
    for words in (
        "use_dora",
        "bias",
        "nowhere",
        f"{QUERY}: lora_A [4, 63]",
        f"{VALUE}: lora_B",
        "extra",
        "config.json:",
    ):
        assert words in problems


@pytest.mark.parametrize("damaged", ["adapter_config.json", "config.json"])
def test_damaged_settings_do_not_hide_the_other_problems(tmp_path: Path, base: Published, damaged: str) -> None:
    folder = _adapter(tmp_path, matrices=_shaped(A=(4, 63)), trained={f"{PREFIX}extra": np.ones(1, np.float16)})
    (folder / damaged).write_text("{")
    problems = "\n".join(_problems(folder, base))
    for words in (damaged, f"{PREFIX}extra", f"{QUERY}: lora_A [4, 63]"):
        assert words in problems
