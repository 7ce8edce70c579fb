"""The compiled half of a run: what follows from its configuration, the model's and the mesh, before any array is there.

`deqa train` runs it, `deqa plan` compiles it for devices that are not there.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from deqa_jax import lora
from deqa_jax.config import ConfigError, DeqaConfig, Execution
from deqa_jax.distributed import wait_for_all
from deqa_jax.parameters import Leaves, ParamPath, parameter_shapes
from deqa_jax.preprocess import PreprocessConfig
from deqa_jax.sharding import BATCH, abstract, bytes_per_device, compile_for, following, parameter_shardings
from deqa_jax.train.objective import Batch
from deqa_jax.train.optimizer import make_optimizer, multipliers, schedule
from deqa_jax.train.settings import TrainConfig
from deqa_jax.train.step import Task, TrainState, make_step


class Program:
    """A training step and the shapes and places of all that goes through it.

    Attributes:
      batch_size: examples in a batch, over all devices.
      trained: learning-rate multiplier of every parameter that is trained, by path.
      frozen_paths: of the others.
      adapters: shapes of the low-rank adapters, by path.
      shardings: of every parameter, adapters included, by path.
      batch_sharding: of everything with a batch.
      optimizer: of the trained parameters.
      rate: the learning rate by step of the optimizer.
      task: model and objective.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: DeqaConfig,
        preprocess: PreprocessConfig,
        before: tuple[int, ...],
        level_ids: tuple[int, ...],
        *,
        steps: int,
        mesh: Mesh,
    ):
        """Checks that configuration, model and mesh fit.

        Args:
          config: the run's.
          model: the model's.
          preprocess: of its pixels.
          before: ids in front of every image.
          level_ids: the level words' tokens.
          steps: batches in the whole run.
          mesh: of devices, there or not.

        Raises:
          ConfigError: they do not.
        """
        self._mesh = mesh
        self.batch_size = config.batch_size_per_device * mesh.size
        shapes = parameter_shapes(model)
        self.adapters = {} if config.lora is None else lora.adapter_shapes(shapes, config.lora)
        self._shapes = {**shapes, **self.adapters}
        rates = multipliers(self._shapes, config.parameters)
        self.trained = {path: rate for path, rate in rates.items() if rate}
        if idle := ["/".join(path) for path in self.adapters if path not in self.trained]:
            raise ConfigError(f"parameters: {', '.join(idle)} are frozen; adapters are there to be trained")
        self.frozen_paths = self._shapes.keys() - self.trained.keys()
        self.shardings = parameter_shardings(self._shapes, mesh)
        self.batch_sharding = NamedSharding(mesh, BATCH)
        updates = math.ceil(steps / config.optimizer.accumulate)
        self.rate = schedule(config.optimizer, updates)
        self.optimizer = make_optimizer(config.optimizer, updates, self.trained)
        self.task = Task(
            model,
            preprocess,
            before,
            level_ids,
            config.objective,
            Execution(
                dtype=config.dtype, remat=config.remat, activations=self.batch_sharding if mesh.size > 1 else None
            ),
            config.lora,
            config.seed,
        )

    # ---- shapes and places --------------------------------------------------------------------------------

    def state(self) -> TrainState:
        """The state of the run, as shapes."""
        params = {path: self._leaf(path, "float32") for path in self.trained}
        step: Any = jax.ShapeDtypeStruct((), jnp.int32)
        state = TrainState(step, params, jax.eval_shape(self.optimizer.init, params))
        return abstract(state, following(state, self.shardings, self._mesh))

    def frozen(self) -> Leaves:
        """Parameters that are not trained, in the dtype that they are used in, as shapes."""
        return {path: self._leaf(path, self.task.execution.dtype) for path in self.frozen_paths}

    def batch(self, size: int, sides: int, length: int) -> Batch:
        """A batch of `length` tokens behind its images, as shapes."""
        pixels = self.task.config.vision.image_size

        def leaf(*shape: int, dtype: Any = np.float32) -> Any:
            return jax.ShapeDtypeStruct((size, *shape), dtype, sharding=self.batch_sharding)

        return Batch(
            images=leaf(sides, pixels, pixels, 3, dtype=np.uint8),
            after=leaf(sides, length, dtype=np.int32),
            labels=leaf(sides, length, dtype=np.int32),
            level_position=leaf(sides, dtype=np.int32),
            level_probs=leaf(sides, 5),
            gt_score=leaf(sides),
            gt_std=leaf(sides),
            is_score=leaf(dtype=np.bool_),
        )

    def bytes_per_device(self) -> int:
        """What a device holds from step to step: parameters and the optimizer's state."""
        return bytes_per_device((self.state(), self.frozen()))

    def _leaf(self, path: ParamPath, dtype: str) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(self._shapes[path], np.dtype(dtype), sharding=self.shardings[path])

    # ---- programs -----------------------------------------------------------------------------------------

    def step(self) -> Any:
        """The step, jitted: `state, frozen, batch -> state, metrics`, its state donated."""
        places = jax.tree.map(lambda x: x.sharding, self.state())
        step = make_step(self.task, self.optimizer, self._shapes, self.shardings)
        everywhere = NamedSharding(self._mesh, PartitionSpec())
        return jax.jit(step, donate_argnums=0, out_shardings=(places, everywhere))

    def compile(self, batch: Batch) -> Any:
        """The step, compiled for batches like this one, on the devices of the mesh; by all processes."""
        compiled = compile_for(self._mesh, self.step().trace(self.state(), self.frozen(), batch))
        wait_for_all()
        return compiled

    def first_adapters(self) -> Leaves:
        """Adapters before the first step, in their places."""
        if not self.adapters:
            return {}
        places = {path: self.shardings[path] for path in self.adapters}
        return jax.jit(lambda key: lora.init(self.adapters, key), out_shardings=places)(jax.random.key(self.task.seed))

    def first_optimizer(self, params: Leaves) -> Any:
        """The optimizer's state before the first step, in its place."""
        places = jax.tree.map(lambda x: x.sharding, self.state().optimizer)
        return jax.jit(self.optimizer.init, out_shardings=places)(params)
