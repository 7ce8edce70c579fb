"""Imports go down only; torch and other heavy things are not imported at all."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# From the bottom up; a module may import those of lower rows, and of its own row what is listed in OWN_ROW.
ROWS = [
    ["deqa_jax", "deqa_jax.config", "deqa_jax.convert", "deqa_jax.data", "deqa_jax.metrics"],
    ["deqa_jax.option_values", "deqa_jax.flops", "deqa_jax.allocation", "deqa_jax.compilation"],
    ["deqa_jax.model.tpu_attention", "deqa_jax.model.cuda_attention"],
    ["deqa_jax.shared_options"],
    ["deqa_jax.arguments"],
    ["deqa_jax.model.layers", "deqa_jax.files", "deqa_jax.data.pairs", "deqa_jax.train", "deqa_jax.distributed"],
    ["deqa_jax.quantize"],
    ["deqa_jax.model", "deqa_jax.model.vision", "deqa_jax.model.abstractor", "deqa_jax.model.llama"],
    ["deqa_jax.model.deqa", "deqa_jax.preprocess", "deqa_jax.prompt"],
    ["deqa_jax.parameters", "deqa_jax.losses", "deqa_jax.model.quantized"],
    ["deqa_jax.first_weights"],
    ["deqa_jax.measured_weights"],
    ["deqa_jax.data.datasets", "deqa_jax.data.metas", "deqa_jax.data.opinions", "deqa_jax.data.soft_labels"],
    ["deqa_jax.data.degradations"],
    ["deqa_jax.data.augmentation", "deqa_jax.data.scenes"],
    ["deqa_jax.data.synthetic"],
    ["deqa_jax.lora", "deqa_jax.data.tfds_builders", "deqa_jax.sharding"],
    ["deqa_jax.checkpoint", "deqa_jax.data.pipeline"],
    ["deqa_jax.builtin_model"],
    ["deqa_jax.scoring_program"],
    ["deqa_jax.scorer"],
    ["deqa_jax.train.objective", "deqa_jax.train.optimizer", "deqa_jax.train.evaluation", "deqa_jax.train.log"],
    ["deqa_jax.train.step", "deqa_jax.train.settings"],
    ["deqa_jax.train.program"],
    ["deqa_jax.train.saving"],
    ["deqa_jax.score_files", "deqa_jax.labels", "deqa_jax.infer", "deqa_jax.evaluate"],
    ["deqa_jax.report", "deqa_jax.gallery", "deqa_jax.random_model", "deqa_jax.train.loop"],
    ["deqa_jax.convert.tensors", "deqa_jax.convert.progress"],
    [
        "deqa_jax.convert.average",
        "deqa_jax.convert.names",
        "deqa_jax.convert.torch_file",
        "deqa_jax.convert.torch_save",
        "deqa_jax.convert.quantized",
    ],
    ["deqa_jax.convert.hf"],
    ["deqa_jax.convert.peft", "deqa_jax.convert.to_published"],
    ["deqa_jax.convert.to_jax", "deqa_jax.convert.describe", "deqa_jax.convert.to_peft"],
    ["deqa_jax.launch", "deqa_jax.launch.hlo", "deqa_jax.launch.local", "deqa_jax.launch.topology"],
    ["deqa_jax.launch.aot"],
    ["deqa_jax.failures"],
    ["deqa_jax.bench"],
    ["deqa_jax.bench_table"],
    ["deqa_jax.cli_measuring"],
    ["deqa_jax.cli"],
]
RANK = {module: rank for rank, row in enumerate(ROWS) for module in row}
# Inside a function, and only there: what a user names as a model may need converting first.
UPWARD = {
    ("deqa_jax.scorer", "deqa_jax.convert.to_jax"),
    ("deqa_jax.train.loop", "deqa_jax.convert.to_jax"),
    ("deqa_jax", "deqa_jax.scorer"),
}


def modules() -> dict[str, Path]:
    files = {
        f"deqa_jax.{'.'.join(path.relative_to(ROOT / 'deqa_jax').with_suffix('').parts)}": path
        for path in (ROOT / "deqa_jax").rglob("*.py")
    }
    for folder in ("convert", "launch"):
        files |= {f"deqa_jax.{folder}.{path.stem}": path for path in (ROOT / folder).glob("*.py")}
    return {name.removesuffix(".__init__"): path for name, path in files.items()}


def imported(module: str, path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            source = node.module or ""
            if node.level:
                source = ".".join([*module.split(".")[: -node.level], *([source] if source else [])])
            yield source
            yield from (f"{source}.{alias.name}" for alias in node.names if f"{source}.{alias.name}" in RANK)


def test_every_module_has_its_place() -> None:
    assert modules().keys() == RANK.keys()


@pytest.mark.parametrize("module", RANK)
def test_imports_go_down_only(module: str) -> None:
    for name in imported(module, modules()[module]):
        if name in RANK and name != module and not module.startswith(f"{name}.") and (module, name) not in UPWARD:
            assert RANK[name] < RANK[module], f"{module} imports {name}"


@pytest.mark.parametrize("module", RANK)
def test_nothing_imports_torch_or_tensorflow(module: str) -> None:
    roots = {name.split(".")[0] for name in imported(module, modules()[module])}
    assert not roots & {"torch", "tensorflow", "transformers"}


def test_help_does_not_load_jax() -> None:
    code = "import sys; from deqa_jax.arguments import parser; parser().format_help(); sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
