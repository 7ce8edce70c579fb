"""The configuration of a run: what is said is what is meant, and what cannot be meant is refused by name."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deqa_jax.config import ConfigError
from deqa_jax.data.pipeline import DataConfig
from deqa_jax.lora import LoraConfig
from deqa_jax.train.optimizer import OptimizerConfig, ParameterRule
from deqa_jax.train.settings import (
    CheckpointConfig,
    EvaluationConfig,
    TrainConfig,
    read_config,
    write_config,
)

LEAST = TrainConfig(model="m", output="o")


@pytest.fixture
def read(tmp_path):
    """Reads YAML; with `whole` nothing is put in front of it."""
    path = tmp_path / "run.yaml"

    def parse(text, *overrides, whole=False):
        content = text if whole else f"model: m\noutput: o\n{text}\n"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return read_config(path, overrides)

    parse.path = path
    return parse


def refusal(read, *arguments, **options):
    with pytest.raises(ConfigError) as error:
        read(*arguments, **options)
    message = str(error.value)
    assert message.startswith(f"{read.path}: ")
    return message.removeprefix(f"{read.path}: ")


# ---- what is said -----------------------------------------------------------------------------------------


def test_two_entries_are_enough(read):
    assert read("") == LEAST


def test_the_defaults_are_the_published_full_tuning():
    """SPEC 5."""
    optimizer, objective = LEAST.optimizer, LEAST.objective
    assert (optimizer.learning_rate, optimizer.b1, optimizer.b2, optimizer.epsilon) == (2e-5, 0.9, 0.999, 1e-8)
    assert (optimizer.weight_decay, optimizer.warmup_ratio, optimizer.clip_norm) == (0.0, 0.03, 1.0)
    assert optimizer.accumulate == 1
    assert (objective.weight_rank, objective.weight_softkl, objective.weight_next_token) == (1.0, 1.0, 0.05)
    assert objective.weight_in_level == 0.0
    assert objective.closeset_rating_loss
    assert objective.use_fix_std
    assert objective.detach_pred_std
    assert (LEAST.epochs, LEAST.batch_size_per_device, LEAST.dtype) == (3, 16, "bfloat16")
    assert LEAST.lora is None
    assert LEAST.parameters == (ParameterRule("", 1.0),)
    assert (LEAST.data.pairs, LEAST.data.system, LEAST.data.max_length) == (True, "v1", 2048)
    assert LoraConfig() == LoraConfig(128, 256.0, 0.05, ("language/layers/query", "language/layers/value/visual"))


@pytest.mark.parametrize(
    ("text", "changed"),
    [
        ("steps: 7", {"steps": 7}),
        ("epochs: 2.5", {"epochs": 2.5}),
        ("lora: {}", {"lora": LoraConfig()}),
        ("lora: {rank: 4, targets: [a, b]}", {"lora": LoraConfig(rank=4, targets=("a", "b"))}),
        ("lora: null", {}),
        ("data: {metas: [a.json, b.json], weights: [1, 2], pairs: false}",
         {"data": DataConfig(metas=("a.json", "b.json"), weights=(1, 2), pairs=False)}),
        # A lone name is a list of one, not of its letters.
        ("data: {metas: a.json}", {"data": DataConfig(metas=("a.json",))}),
        ("evaluation: {metas: [t.json], every: 3}", {"evaluation": EvaluationConfig(metas=("t.json",), every=3)}),
        ("checkpoint: {keep: 1}", {"checkpoint": CheckpointConfig(keep=1)}),
        ("optimizer: {learning_rate: 1e-4, accumulate: 4}",
         {"optimizer": OptimizerConfig(learning_rate=1e-4, accumulate=4)}),
        ("parameters: [{pattern: lora_, multiplier: 1}, {pattern: '', multiplier: 0}]",
         {"parameters": (ParameterRule("lora_", 1.0), ParameterRule("", 0.0))}),
    ],
)  # fmt: skip
def test_entries_are_read_and_the_rest_is_left(text, changed, read):
    assert read(text) == dataclasses.replace(LEAST, **changed)


@pytest.mark.parametrize(
    ("overrides", "changed"),
    [
        (["--steps", "7", "--seed=3"], {"steps": 7, "seed": 3}),
        (["--output", "another run"], {"output": "another run"}),
        (["--optimizer.learning_rate", "1e-5"], {"optimizer": OptimizerConfig(learning_rate=1e-5, accumulate=2)}),
        (["--data.metas", "[x.json, y.json]"], {"data": DataConfig(metas=("x.json", "y.json"))}),
        (["--data.metas", "x.json"], {"data": DataConfig(metas=("x.json",))}),
        (["--data.pairs", "false"], {"data": DataConfig(metas=("a.json",), pairs=False)}),
        (["--lora.rank", "4"], {"lora": LoraConfig(rank=4)}),
        (["--parameters", "[{pattern: '', multiplier: 2}]"], {"parameters": (ParameterRule("", 2.0),)}),
    ],
)
def test_what_the_command_line_says_comes_after_the_file(overrides, changed, read):
    text = "steps: 5\noptimizer: {accumulate: 2}\ndata: {metas: [a.json]}"
    plain = read(text)
    assert (plain.steps, plain.optimizer.accumulate, plain.data.metas) == (5, 2, ("a.json",))
    assert read(text, *overrides) == dataclasses.replace(plain, **changed)


NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\0", exclude_categories=["Cc"]), max_size=12)


@given(
    model=NAMES,
    metas=st.lists(NAMES, max_size=3),
    rate=st.floats(1e-12, 1e3, allow_subnormal=False),
    multiplier=st.floats(0, 1e6),
    rank=st.none() | st.integers(1, 512),
    seed=st.integers(0, 2**32 - 1),
)
def test_what_is_written_is_read_back(model, metas, rate, multiplier, rank, seed, tmp_path_factory):
    config = TrainConfig(
        model=model,
        output="runs/über: 1 # no comment",
        data=DataConfig(metas=tuple(metas), weights=tuple(range(1, len(metas) + 1)), pairs=False),
        optimizer=OptimizerConfig(learning_rate=rate),
        parameters=(ParameterRule("lora_|^vision/", multiplier), ParameterRule("", 0.0)),
        lora=None if rank is None else LoraConfig(rank=rank, targets=("a", "b/.*")),
        seed=seed,
    )
    path = tmp_path_factory.getbasetemp() / "written.yaml"
    path.write_text(write_config(config), encoding="utf-8")
    assert read_config(path) == config


def test_every_entry_is_written():
    text = write_config(LEAST)
    for name in ("model: m", "learning_rate: 2.0e-05", "weight_next_token: 0.05", "keep: 2", "lora: null", "metas: []"):
        assert name in text


# ---- what is refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("frobnicate: 1", "frobnicate"),
        ("data: {frobnicate: 1}", "frobnicate"),
        ("optimizer: {lr: 1}", "lr"),
        ("lora: {rnk: 4}", "rnk"),
        ("parameters: [{pattern: '', multiplier: 1, x: 2}]", "x"),
        ("parameters: [{pattern: ''}]", "multiplier"),
        ("parameters: {pattern: '', multiplier: 1}", "parameters"),
        ("parameters: all", "parameters"),
        ("steps: many", "steps"),
        ("steps: 1.5", "steps"),
        ("steps: [1]", "steps"),
        ("steps: {a: 1}", "steps"),
        ("steps: null", "steps"),
        ("steps:", "steps"),
        ("model: null", "model"),
        ("data: null", "data"),
        ("data: {root: null}", "data.root"),
        ("data: {metas: [a.json, null]}", "data.metas.1"),
        ("optimizer: {learning_rate: null}", "optimizer.learning_rate"),
        ("epochs: some", "epochs"),
        ("data: 3", "data"),
        ("data: {metas: [1, 2]}", "data.metas"),
        ("data: {metas: 1}", "data.metas"),
        ("data: {weights: 1}", "data.weights"),
        ("data: {weights: [1.5]}", "data.weights"),
        ("data: {pairs: maybe}", "data.pairs"),
        ("data: {pairs: 3}", "data.pairs"),
        ("lora: true", "lora"),
        ("objective: {weight_rank: x}", "objective.weight_rank"),
    ],
)
def test_entries_that_are_unknown_or_of_the_wrong_kind_are_named(text, named, read):
    assert named in refusal(read, text)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("steps: 3\nsteps: 5", "steps is there twice"),
        ("optimizer: {accumulate: 2, accumulate: 3}", "accumulate is there twice"),
        ("steps: -1", "steps is at least 0, not -1"),
        ("epochs: 0", "epochs is above 0, not 0"),
        ("epochs: .nan", "epochs is above 0, not nan"),
        ("epochs: .inf", "epochs is above 0, not inf"),
        ("batch_size_per_device: 0", "batch_size_per_device is at least 1, not 0"),
        ("evaluation: {every: 0}", "evaluation.every is at least 1, not 0"),
        ("evaluation: {batch_size: 0}", "evaluation.batch_size is at least 1, not 0"),
        ("checkpoint: {every: 0}", "checkpoint.every is at least 1, not 0"),
        ("checkpoint: {keep: 0}", "checkpoint.keep is at least 1, not 0"),
        ("data: {max_length: 0}", "data.max_length is at least 1, not 0"),
        ("dtype: float16", "dtype is float32 or bfloat16, not 'float16'"),
        ("remat: some", "remat is none, full or dots, not 'some'"),
        ("seed: -1", "seed is at least 0, not -1"),
        ("seed: 4294967296", "seed is at most 4294967295, not 4294967296"),
        ("objective: {binary_rating_loss: x}", "binary_rating_loss is fidelity or bce, not 'x'"),
        ("optimizer: {learning_rate: 0}", "learning_rate and clip_norm are above 0"),
        ("optimizer: {learning_rate: .nan}", "learning_rate and clip_norm are above 0"),
        ("optimizer: {learning_rate: .inf}", "optimizer.learning_rate is infinite"),
        ("optimizer: {accumulate: 0}", "accumulate is at least 1"),
        ("lora: {rank: 0}", "rank is at least 1"),
        ("lora: {dropout: 1}", "dropout from 0 to below 1"),
        ("lora: {targets: ['(']}", "'(' is no regular expression"),
        ("parameters: [{pattern: '(', multiplier: 1}]", "'(' is no regular expression"),
        ("parameters: [{pattern: a, multiplier: -1}]", "is at least 0, not -1.0"),
        ("parameters: [{pattern: a, multiplier: .nan}]", "is at least 0, not nan"),
    ],
)
def test_values_out_of_range_are_refused(text, complaint, read):
    assert complaint in refusal(read, text)


def test_several_faults_are_said_at_once(read):
    message = refusal(read, "steps: -1\ndtype: x\ncheckpoint: {keep: 0}")
    assert all(name in message for name in ("steps", "dtype", "checkpoint.keep"))


@pytest.mark.parametrize("missing", ["model", "output"])
def test_what_has_no_default_must_be_said(missing, read):
    given = {"model": "output: o", "output": "model: m"}[missing]
    assert missing in refusal(read, given, whole=True)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "3",
        "text",
        "[]",
        "- a\n- b",
        "a: [",
        "model: m\n\toutput: o",
        b"\xff\xfe\x00",
        b"model: \xe9",
        "!!x y",
    ],
    ids=repr,
)
def test_a_file_that_is_no_configuration_is_named(text, read):
    assert refusal(read, text, whole=True)


def test_nothing_in_a_file_is_run(read, tmp_path):
    refusal(read, f'!!python/object/apply:os.mkdir ["{tmp_path}/made"]', whole=True)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("path", ["absent.yaml", "."])
def test_a_file_that_is_not_there_is_named(path, tmp_path):
    with pytest.raises(ConfigError, match="no such file") as error:
        read_config(tmp_path / path)
    assert str(tmp_path / path) in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["--frobnicate", "1"], "--frobnicate"),
        (["--optimizer.lr", "1"], "--optimizer.lr"),
        # No part of a name stands for it.
        (["--step", "5"], "--step"),
        (["surplus"], "surplus"),
        (["--steps"], "--steps"),
        (["--steps", "x"], "steps"),
        (["--dtype", "float16"], "dtype"),
        (["--data.root", "null"], "data.root"),
        # Draccus would open what follows this word.
        (["--output", "include nothing"], "nothing"),
    ],
)
def test_overrides_that_fit_nothing_are_named(overrides, named, read, capsys):
    message = refusal(read, "", *overrides)
    assert named in message
    assert "\n" not in message
    assert capsys.readouterr() == ("", "")
