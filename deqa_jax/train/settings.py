"""A training run's configuration: one tree of dataclasses, read from YAML with overrides from the command line."""

import contextlib
import dataclasses
import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import draccus
import yaml

from deqa_jax.config import ConfigError, MeshConfig
from deqa_jax.data.pipeline import DataConfig
from deqa_jax.lora import LoraConfig
from deqa_jax.train.objective import Objective
from deqa_jax.train.optimizer import OptimizerConfig, ParameterRule

# What NumPy and Grain take for a seed.
_MAX_SEED = 2**32 - 1


CONFIG_FILE = "config.yaml"
"""Where a run keeps its configuration, every entry said."""


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """Held-out images that the model is scored on as it trains.

    Attributes:
      metas: files of metas, below the same root as the training images; none for no evaluation.
      every: steps between evaluations; there is one after the last step too.
      batch_size: images at once, over all devices.
    """

    metas: tuple[str, ...] = ()
    every: int = 500
    batch_size: int = 32


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """What a run can be resumed from.

    Attributes:
      every: steps between them; there is one after the last step, on SIGTERM and on Ctrl-C, too.
      keep: how many of the last ones are kept.
    """

    every: int = 500
    keep: int = 2


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A run. The defaults are those of the published full tuning.

    Attributes:
      model: what to start from: a converted folder, a published one, or a hub id.
      output: folder of the run; if it holds this run already, that goes on.
      data: what to train on.
      evaluation: what to evaluate on.
      objective: the loss.
      optimizer: AdamW and its schedule.
      parameters: what is trained, and how fast: for each parameter the first rule found in its path.
      lora: adapters; none without it.
      checkpoint: what the run can be resumed from.
      mesh: how devices share the work; a run can go on with another mesh of as many devices.
      epochs: times that every image is seen.
      steps: batches to train on, in place of `epochs`; 0 to go by these. Either is rounded up to whole groups of
        `optimizer.accumulate`.
      batch_size_per_device: pairs, or single images, on each device at once.
      dtype: of matrix products; parameters that are trained are float32.
      remat: what is computed again in the backward pass: none, full or dots (see `config.Execution`).
      seed: of shuffling, pairing, adapters and dropout.
    """

    model: str
    output: str
    data: DataConfig = DataConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    objective: Objective = Objective()
    optimizer: OptimizerConfig = OptimizerConfig()
    parameters: tuple[ParameterRule, ...] = (ParameterRule("", 1.0),)
    lora: LoraConfig | None = None
    checkpoint: CheckpointConfig = CheckpointConfig()
    mesh: MeshConfig = MeshConfig()
    epochs: float = 3.0
    steps: int = 0
    batch_size_per_device: int = 16
    dtype: str = "bfloat16"
    remat: str = "full"
    seed: int = 0

    def __post_init__(self) -> None:
        _refuse_empty(dataclasses.asdict(self))
        problems = [
            f"{name} is at least {least}, not {value}"
            for name, value, least in (
                ("steps", self.steps, 0),
                ("batch_size_per_device", self.batch_size_per_device, 1),
                ("evaluation.every", self.evaluation.every, 1),
                ("evaluation.batch_size", self.evaluation.batch_size, 1),
                ("checkpoint.every", self.checkpoint.every, 1),
                ("checkpoint.keep", self.checkpoint.keep, 1),
                ("data.max_length", self.data.max_length, 1),
                ("seed", self.seed, 0),
            )
            if value < least
        ]
        if self.seed > _MAX_SEED:
            problems.append(f"seed is at most {_MAX_SEED}, not {self.seed}")
        if not 0 < self.epochs < math.inf:
            problems.append(f"epochs is above 0, not {self.epochs}")
        if not self.optimizer.learning_rate < math.inf:
            problems.append("optimizer.learning_rate is infinite")
        problems += [
            f"parameters: the multiplier of {rule.pattern!r} is at least 0, not {rule.multiplier}"
            for rule in self.parameters
            if not 0 <= rule.multiplier < math.inf
        ]
        patterns = {"parameters": [rule.pattern for rule in self.parameters]}
        if self.lora is not None:
            patterns["lora.targets"] = list(self.lora.targets)
        for name, entries in patterns.items():
            for pattern in entries:
                try:
                    re.compile(pattern)
                except re.error as error:
                    problems.append(f"{name}: {pattern!r} is no regular expression ({error})")
        if self.dtype not in ("float32", "bfloat16"):
            problems.append(f"dtype is float32 or bfloat16, not {self.dtype!r}")
        if self.remat not in ("none", "full", "dots"):
            problems.append(f"remat is none, full or dots, not {self.remat!r}")
        if problems:
            raise ConfigError("; ".join(problems))


class _EachOnce(yaml.SafeLoader):
    """Refuses an entry that is there twice, of which YAML's reader would take the last without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [self.construct_object(key, deep=True) for key, _ in node.value]
        if repeated := [name for number, name in enumerate(names) if name in names[:number]]:
            raise ConfigError(f"{repeated[0]} is there twice")
        return super().construct_mapping(node, deep)


def read_config(path: Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Reads a YAML file, with overrides such as `--optimizer.learning_rate 1e-5` after it.

    Raises:
      ConfigError: the file is missing, or an entry is unknown, missing or of the wrong kind; the message names it.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: no such file")
    usage = io.StringIO()
    try:
        written = yaml.load(path.read_text(encoding="utf-8"), _EachOnce)
        if not isinstance(written, dict):
            raise ConfigError("not a mapping of entries to values")
        _refuse_empty(written)
        with contextlib.redirect_stderr(usage):
            return draccus.parse(TrainConfig, config_path=path, args=list(overrides))
    except SystemExit as error:
        reason = usage.getvalue().strip().rpartition("error: ")[2]
        raise ConfigError(f"{path}: {reason}") from error
    except (draccus.utils.DraccusException, yaml.YAMLError, AttributeError, OSError, TypeError, ValueError) as error:
        causes = [str(error)]
        while (cause := error.__cause__) is not None:
            error = cause
            causes.append(str(cause))
        raise ConfigError(f"{path}: {'; '.join(cause.strip() for cause in causes)}") from error


def _refuse_empty(tree: Any) -> None:
    if empty := [name for name in _empty(tree) if name != "lora"]:
        raise ConfigError(f"{', '.join(empty)}: no value")


def _empty(tree: Any, *path: str) -> Iterator[str]:
    """Names of the entries that say nothing."""
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _empty(value, *path, str(key))
    elif isinstance(tree, list | tuple):
        for number, value in enumerate(tree):
            yield from _empty(value, *path, str(number))
    elif tree is None:
        yield ".".join(path)


def _names(value: Any, path: Sequence[str]) -> tuple[str, ...]:
    """A list of names; draccus would take a lone one apart into its letters."""
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise draccus.utils.DecodingError(path, f"{value!r} is not a list of names")
    return tuple(names)


# Its registry goes by the names of `typing`.
draccus.decode.register(draccus.utils.canonicalize_union(tuple[str, ...]), _names)


def write_config(config: TrainConfig) -> str:
    """The configuration as YAML, every entry said."""
    text = io.StringIO()
    draccus.dump(config, text)
    return text.getvalue()
