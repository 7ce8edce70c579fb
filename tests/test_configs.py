"""The configurations that come with the package: they parse, and the published runs are the published ones."""

import math
import re
from pathlib import Path

import pytest

from deqa_jax.config import PRESETS
from deqa_jax.data.datasets import DATASETS
from deqa_jax.lora import LoraConfig, adapter_shapes, wrap
from deqa_jax.parameters import abstract_model, parameter_shapes
from deqa_jax.train.optimizer import OptimizerConfig, ParameterRule, multipliers
from deqa_jax.train.settings import read_config, write_config

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
NAMES = sorted(path.name for path in CONFIGS.glob("*.yaml"))
PUBLISHED = ["mix3_full.yaml", "mix3_lora.yaml"]


def test_they_are_where_the_package_has_them():
    assert NAMES == [
        "finetune_lora.yaml",
        "koniq_full.yaml",
        "mix3_full.yaml",
        "mix3_lora.yaml",
        "tiny_cpu.yaml",
        "tiny_stored.yaml",
        "tiny_synthetic.yaml",
    ]


@pytest.mark.parametrize("name", NAMES)
def test_each_parses_and_says_what_it_is(name, tmp_path):
    config = read_config(CONFIGS / name)
    assert config.output == f"runs/{Path(name).stem}"
    assert (CONFIGS / name).read_text().startswith("# ")
    written = tmp_path / name
    written.write_text(write_config(config))
    assert read_config(written) == config


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", ["full", "test"])
def test_its_rules_fit_the_model(name, size):
    config = read_config(CONFIGS / name)
    shapes = parameter_shapes(PRESETS[size])
    adapters = {} if config.lora is None else adapter_shapes(shapes, config.lora)
    rates = multipliers({**shapes, **adapters}, config.parameters)
    trained = {path for path, rate in rates.items() if rate}
    assert trained >= adapters.keys()
    if config.lora is not None:
        wrap(abstract_model(PRESETS["test"]), config.lora, training=True)
        assert len(adapters) == 4


@pytest.mark.parametrize("name", [*PUBLISHED, "koniq_full.yaml"])
def test_the_published_numbers(name):
    """SPEC 5; DeQA-Score, section 4.1."""
    config = read_config(CONFIGS / name)
    objective = config.objective
    assert objective.weight_rank == 1
    assert objective.weight_softkl == 1
    assert objective.weight_next_token == 0.05
    assert objective.weight_in_level == 0
    assert objective.weight_desp == 1
    assert objective.softkl_loss is True
    assert objective.continuous_rating_loss is True
    assert objective.closeset_rating_loss is True
    assert objective.use_fix_std is True
    assert objective.detach_pred_std is True
    assert config.optimizer == OptimizerConfig(
        learning_rate=2e-5,
        b1=0.9,
        b2=0.999,
        epsilon=1e-8,
        weight_decay=0.0,
        warmup_ratio=0.03,
        clip_norm=1.0,
        accumulate=1,
    )
    assert config.epochs == 3
    assert config.steps == 0
    assert config.batch_size_per_device == 16
    assert config.dtype == "bfloat16"
    assert config.model == "MAGAer13/mplug-owl2-llama2-7b"
    assert (config.data.pairs, config.data.system, config.data.max_length) == (True, "v1", 2048)
    assert config.data.records == ""


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_sets(name):
    data = read_config(CONFIGS / name).data
    assert data.root == "Data-DeQA-Score"
    assert data.weights == (1, 1, 1)
    wanted = [DATASETS[key].metas(Path(data.root), "train") for key in ("koniq", "spaq", "kadid")]
    assert [Path(path) for path in data.metas] == wanted


def test_koniq_alone_is_evaluated_on_its_test_set():
    config = read_config(CONFIGS / "koniq_full.yaml")
    root = Path(config.data.root)
    assert [Path(path) for path in config.data.metas] == [DATASETS["koniq"].metas(root, "train")]
    assert [Path(path) for path in config.evaluation.metas] == [DATASETS["koniq"].metas(root, "test")]
    assert config.data.weights == (1,)


@pytest.mark.parametrize("name", ["mix3_full.yaml", "koniq_full.yaml"])
def test_full_tuning_trains_everything(name):
    config = read_config(CONFIGS / name)
    assert config.lora is None
    assert config.parameters == (ParameterRule("", 1.0),)


def test_the_published_adapters():
    """Rank 128, α 256 on queries and visual values; vision tower and abstractor whole; the rest frozen."""
    config = read_config(CONFIGS / "mix3_lora.yaml")
    assert config.lora == LoraConfig(128, 256.0, 0.05, ("language/layers/query", "language/layers/value/visual"))
    shapes = parameter_shapes(PRESETS["full"])
    rates = multipliers({**shapes, **adapter_shapes(shapes, config.lora)}, config.parameters)
    for path, rate in rates.items():
        assert rate == (1.0 if path[0] in ("vision", "abstractor") or path[-1] in ("lora_a", "lora_b") else 0.0), path
    adapted = {"/".join(path[:-1]) for path in rates if path[-1] == "lora_a"}
    assert adapted == {"language/layers/query", "language/layers/value/visual"}
    # 128 · (4096 + 4096) for each of two matrices of 32 layers.
    count = sum(math.prod(s) for s in adapter_shapes(shapes, config.lora).values())
    assert count == 2 * 32 * 128 * (4096 + 4096)


def test_fine_tuning_freezes_everything_but_adapters():
    config = read_config(CONFIGS / "finetune_lora.yaml")
    shapes = parameter_shapes(PRESETS["test"])
    rates = multipliers({**shapes, **adapter_shapes(shapes, config.lora)}, config.parameters)
    assert {path[-1] for path, rate in rates.items() if rate} == {"lora_a", "lora_b"}


@pytest.mark.parametrize("name", NAMES)
def test_commands_in_comments_name_the_file(name):
    comments = "\n".join(line for line in (CONFIGS / name).read_text().splitlines() if line.startswith("#"))
    for path in re.findall(r"--config_path (\S+)", comments):
        assert path == f"configs/{name}"
