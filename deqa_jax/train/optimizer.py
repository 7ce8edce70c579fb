"""What is trained and how fast: first-match rules over parameter paths, AdamW, warm-up and cosine (SPEC 5)."""

import dataclasses
import math
import re
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import optax

from deqa_jax.config import ConfigError
from deqa_jax.parameters import ParamPath


@dataclasses.dataclass(frozen=True)
class ParameterRule:
    """How parameters are trained whose path this pattern is found in.

    Attributes:
      pattern: a regular expression, searched in paths such as `vision/layers/up/kernel`.
      multiplier: of the learning rate; 0 freezes.
    """

    pattern: str
    multiplier: float


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its schedule; the defaults are those of the published runs.

    Attributes:
      learning_rate: at its peak.
      b1: decay of the first moment.
      b2: decay of the second.
      epsilon: added to the root of the second moment.
      weight_decay: of kernels and embeddings; never of norms and biases.
      warmup_ratio: share of the steps before the peak.
      clip_norm: bound on the global norm of the trained parameters' gradient.
      accumulate: batches whose gradients are averaged into one step.
    """

    learning_rate: float = 2e-5
    b1: float = 0.9
    b2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    warmup_ratio: float = 0.03
    clip_norm: float = 1.0
    accumulate: int = 1

    def __post_init__(self) -> None:
        if not self.learning_rate > 0 or not 0 <= self.warmup_ratio < 1 or not self.clip_norm > 0:
            raise ConfigError("optimizer: learning_rate and clip_norm are above 0, warmup_ratio from 0 to below 1")
        if self.accumulate < 1:
            raise ConfigError("optimizer: accumulate is at least 1")


def multipliers(paths: Iterable[ParamPath], rules: Sequence[ParameterRule]) -> dict[ParamPath, float]:
    """The learning-rate multiplier of every parameter, by the first rule found in its path.

    Raises:
      ConfigError: a parameter has no rule, or a rule no parameter.

    >>> rules = [ParameterRule("norm", 0.0), ParameterRule("", 1.0)]
    >>> multipliers([("vision", "pre_norm", "scale"), ("language", "head", "kernel")], rules)
    {('vision', 'pre_norm', 'scale'): 0.0, ('language', 'head', 'kernel'): 1.0}
    """
    found: dict[ParamPath, float] = {}
    used: set[int] = set()
    uncovered = []
    for path in paths:
        name = "/".join(path)
        for number, rule in enumerate(rules):
            if re.search(rule.pattern, name):
                found[path] = rule.multiplier
                used.add(number)
                break
        else:
            uncovered.append(name)
    if uncovered:
        raise ConfigError(f"parameters: no rule covers {', '.join(uncovered)}; end with a rule for ''")
    idle = [rule.pattern for number, rule in enumerate(rules) if number not in used]
    if idle:
        raise ConfigError(f"parameters: {', '.join(map(repr, idle))} is the first match of no parameter")
    if not any(found.values()):
        raise ConfigError("parameters: everything is frozen")
    return found


def schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate by step: from 0 to the peak in ⌈ratio · steps⌉ steps, then half a cosine down to 0.

    >>> rate = schedule(OptimizerConfig(learning_rate=1.0, warmup_ratio=0.25), 8)
    >>> [round(float(rate(step)), 3) for step in (0, 1, 2, 5, 8)]
    [0.0, 0.5, 1.0, 0.5, 0.0]
    """
    warmup = math.ceil(config.warmup_ratio * steps)

    def rate(step: jax.typing.ArrayLike) -> jax.Array:
        now = jnp.asarray(step, jnp.float32)
        rising = now / max(warmup, 1)
        falling = 0.5 * (1 + jnp.cos(jnp.pi * (now - warmup) / max(steps - warmup, 1)))
        return config.learning_rate * jnp.where(now < warmup, rising, falling)

    return rate


def make_optimizer(
    config: OptimizerConfig, steps: int, trained: dict[ParamPath, float]
) -> optax.GradientTransformation:
    """Clipping, AdamW and the schedule over the trained parameters, a flat dict from path to array.

    Args:
      config: its settings.
      steps: optimiser steps of the whole run.
      trained: multiplier of every trained parameter.
    """
    decayed = {path: path[-1] not in ("scale", "bias") for path in trained}
    chain = [
        optax.clip_by_global_norm(config.clip_norm),
        optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.epsilon),
    ]
    if config.weight_decay:
        chain.append(optax.add_decayed_weights(config.weight_decay, mask=decayed))
    if any(multiplier != 1.0 for multiplier in trained.values()):
        chain.append(
            optax.stateless(lambda updates, _: {path: trained[path] * update for path, update in updates.items()})
        )
    chain.append(optax.scale_by_learning_rate(schedule(config, steps)))
    optimizer = optax.chain(*chain)
    if config.accumulate > 1:
        return optax.MultiSteps(optimizer, every_k_schedule=config.accumulate).gradient_transformation()
    return optimizer
