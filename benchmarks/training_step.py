"""How long a training step of a configuration takes on this machine's devices, with random weights and pictures.

    python benchmarks/training_step.py configs/mix3_lora.yaml
    python benchmarks/training_step.py configs/finetune_lora.yaml --size mid --batch_size_per_device 4 --remat none

The configuration's `model` is not read: `--size` is in its place. Other entries can be given as for `deqa train`.
Operations are those of the matrix products in the step as it is with `remat: none`: what is computed a second time
takes time and does not count. They are divided by the rate of one large product of the same dtype, measured first.
One JSON object is printed.
"""

import argparse
import dataclasses
import json
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deqa_jax.bench import machine, matmul_rate, peak_memory
from deqa_jax.compilation import use_compilation_cache
from deqa_jax.config import PRESETS, ConfigError
from deqa_jax.launch.aot import TRAINING_TEXT, training_program
from deqa_jax.launch.hlo import count_flops
from deqa_jax.parameters import Leaves
from deqa_jax.sharding import make_mesh
from deqa_jax.train.program import Program
from deqa_jax.train.settings import TrainConfig, read_config
from deqa_jax.train.step import TrainState

_AFTER = TRAINING_TEXT[1]
# Kernels, embeddings and adapters are small enough for any depth, and no zeros, which run faster than a model's.
_DEVIATION = 0.02


def make_program(config: TrainConfig, size: str) -> Program:
    """The run's program, for a model of this size, on all devices."""
    return training_program(config, PRESETS[size], make_mesh(config.mesh, jax.devices()))


def random_leaves(shapes: Leaves) -> Leaves:
    """Parameters where they are to lie: norms that change nothing, everything else small random numbers."""

    def leaf(number: int, name: str, shape: Any) -> jax.Array:
        def draw(key: jax.Array) -> jax.Array:
            if name == "scale":
                return jnp.ones(shape.shape, shape.dtype)
            return jnp.asarray(_DEVIATION, shape.dtype) * jax.random.normal(key, shape.shape, shape.dtype)

        return jax.jit(draw, out_shardings=shape.sharding)(jax.random.key(number))

    return {path: leaf(number, path[-1], shape) for number, (path, shape) in enumerate(shapes.items())}


def random_batch(program: Program, sides: int) -> Any:
    """A batch such as the pipeline makes: the level word third of the answer, and nothing ignored."""
    random = np.random.default_rng(0)
    shapes = program.batch(program.batch_size, sides, _AFTER)

    def values(shape: Any) -> np.ndarray:
        if shape.dtype == np.bool_:
            return np.ones(shape.shape, bool)
        if np.issubdtype(shape.dtype, np.integer):
            return random.integers(0, 256, shape.shape).astype(shape.dtype)
        return random.random(shape.shape, np.float32)

    batch = jax.tree.map(values, shapes)._replace(level_position=np.full(shapes.level_position.shape, 3, np.int32))
    return jax.tree.map(lambda x, shape: jax.device_put(x, shape.sharding), batch, shapes)


def useful_flops(config: TrainConfig, size: str, sides: int) -> int:
    """Operations of a step, none of them twice, over all devices."""
    program = make_program(dataclasses.replace(config, remat="none"), size)
    batch = program.batch(program.batch_size, sides, _AFTER)
    return count_flops(program.step().trace(program.state(), program.frozen(), batch).jaxpr.jaxpr)


def main() -> None:
    """Runs the script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--size", choices=PRESETS, default="full")
    parser.add_argument("--repeats", type=int, default=7)
    options, overrides = parser.parse_known_args()
    try:
        config = read_config(options.config, overrides)
        program, sides = make_program(config, options.size), 2 if config.data.pairs else 1
    except ConfigError as error:
        parser.error(str(error))
    use_compilation_cache()
    mesh = program.batch_sharding.mesh
    rate = matmul_rate(config.dtype, mesh, options.repeats)
    shapes, batch = program.state(), random_batch(program, sides)
    start = time.perf_counter()
    step = program.compile(batch)
    compiling = time.perf_counter() - start
    params, frozen = random_leaves(shapes.params), random_leaves(program.frozen())
    state = TrainState(jax.device_put(jnp.int32(0), shapes.step.sharding), params, program.first_optimizer(params))
    seconds = []
    for _ in range(1 + options.repeats):
        start = time.perf_counter()
        state, metrics = jax.block_until_ready(step(state, frozen, batch))
        seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds[1:])
    flops = useful_flops(config, options.size, sides)
    row = {
        "config": str(options.config),
        "size": options.size,
        "dtype": config.dtype,
        "remat": config.remat,
        "images": program.batch_size * sides,
        "seconds": {"median": median, "least": min(seconds[1:]), "most": max(seconds[1:])},
        "images_per_second": program.batch_size * sides / median,
        "flop": flops,
        "flop_per_second": flops / median,
        "matmul_flop_per_second": rate,
        "fraction_of_matmul_rate": flops / median / rate,
        "loss": float(metrics["loss"]),
        "compile_seconds": compiling,
        "peak_memory": peak_memory(mesh.local_devices),
    }
    print(json.dumps({"machine": machine(mesh), **row}, indent=2))


if __name__ == "__main__":
    main()
