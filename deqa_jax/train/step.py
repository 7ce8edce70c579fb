"""One training step: forward, loss, gradient of the trained parameters, update; compiled once."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array

from deqa_jax import lora
from deqa_jax.config import DeqaConfig, Execution
from deqa_jax.lora import LoraConfig
from deqa_jax.parameters import Leaves, ParamPath, abstract_model, unflatten
from deqa_jax.preprocess import PreprocessConfig, normalize
from deqa_jax.train.objective import Batch, Objective, batch_loss


class TrainState(NamedTuple):
    """What a step changes.

    Attributes:
      step: batches seen.
      params: the trained parameters, float32.
      optimizer: its state, of the trained parameters alone.
    """

    step: Array
    params: Leaves
    optimizer: Any


@dataclasses.dataclass(frozen=True)
class Task:
    """What the compiled step is made of.

    Attributes:
      config: the model's.
      preprocess: of its pixels.
      before: ids in front of every image.
      level_ids: the level words' tokens.
      objective: the loss.
      execution: compute dtype and remat policy.
      lora: adapters, if there are any.
      seed: of dropout.
    """

    config: DeqaConfig
    preprocess: PreprocessConfig
    before: tuple[int, ...]
    level_ids: tuple[int, ...]
    objective: Objective
    execution: Execution
    lora: LoraConfig | None = None
    seed: int = 0

    def graph(self, *, training: bool) -> nnx.GraphDef[Any]:
        """The network's structure, with adapters if there are any, and with dropout if it is for training."""
        model = abstract_model(self.config, self.execution)
        if self.lora is not None:
            model = lora.wrap(model, self.lora, training=training)
        return nnx.graphdef(model)


TrainStep = Callable[[TrainState, Leaves, Batch], tuple[TrainState, dict[str, Array]]]


def make_step(
    task: Task,
    optimizer: optax.GradientTransformation,
    shapes: Mapping[ParamPath, Any],
    shardings: Mapping[ParamPath, jax.sharding.Sharding] | None = None,
) -> TrainStep:
    """The function `state, frozen, batch -> state, metrics`, to be compiled with its state donated.

    Metrics are the loss and its terms (`objective.batch_loss`) and `grad_norm`, before clipping.

    Args:
      task: model and objective.
      optimizer: of the trained parameters.
      shapes: of every parameter, adapters included.
      shardings: where they lie; gradients are put there too. On one device there is nothing to say.
    """
    graphdef = task.graph(training=True)

    def loss(trained: Leaves, frozen: Leaves, keys: Leaves, batch: Batch) -> tuple[Array, dict[str, Array]]:
        # Cast before they are gathered from other devices, and before the scan over layers collects their gradients.
        used = {path: x.astype(task.execution.dtype) if path[-1] == "kernel" else x for path, x in trained.items()}
        model = nnx.merge(graphdef, unflatten({**frozen, **used, **keys}))
        logits = answer_logits(model, task, batch)
        return batch_loss(logits, batch, jnp.asarray(task.level_ids), task.objective)

    def step(state: TrainState, frozen: Leaves, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        keys: Leaves = {}
        if task.lora is not None:
            keys = lora.dropout_keys(shapes, task.lora, jax.random.fold_in(jax.random.key(task.seed), state.step))
        with jax.default_matmul_precision("highest" if task.execution.dtype == "float32" else None):
            (value, terms), gradient = jax.value_and_grad(loss, has_aux=True)(state.params, frozen, keys, batch)
        if shardings is not None:
            gradient = jax.lax.with_sharding_constraint(gradient, {path: shardings[path] for path in gradient})
        # Inside, optax promotes counts to float32 implicitly.
        with jax.numpy_dtype_promotion("standard"):
            updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        norm = jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in gradient.values()))
        metrics = {"loss": value, "grad_norm": norm, **terms}
        return TrainState(state.step + 1, params, optimizer_state), metrics

    return step


def answer_logits(model: Any, task: Task, batch: Batch) -> Array:
    """Logits `[B, S, A, V]` of every image of a batch, all in one pass."""
    examples, sides = batch.after.shape[:2]

    def joined(x: Array) -> Array:
        return x.reshape(-1, *x.shape[2:])

    images = normalize(joined(batch.images), task.preprocess).astype(task.execution.dtype)
    logits = model.answer_logits(images, jnp.asarray(task.before), joined(batch.after))
    return logits.reshape(examples, sides, *logits.shape[1:])
