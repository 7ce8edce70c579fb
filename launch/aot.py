"""`deqa plan`: compiles a run for TPUs that are not there, and says what it takes and what would fit.

What is compiled is what runs: the training step of `train.program`, or the scorer's program.
"""

import dataclasses
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from tabulate import tabulate

from deqa_jax.config import PRESETS, ConfigError, DeqaConfig, MeshConfig, from_published
from deqa_jax.files import read_json
from deqa_jax.parameters import unflatten
from deqa_jax.preprocess import PreprocessConfig
from deqa_jax.prompt import SplitPrompt
from deqa_jax.quantize import read_scheme
from deqa_jax.scoring_program import programs, scoring_model, scoring_parameters
from deqa_jax.sharding import (
    BATCH,
    batch_shards,
    bytes_per_device,
    check_batch,
    compile_for,
    make_mesh,
    mesh_shapes,
)
from deqa_jax.train.program import Program
from deqa_jax.train.settings import TrainConfig

from .hlo import Traffic, count_collectives, count_flops
from .topology import PlanError, Topology, first_line, open_topology

_GIB = 2**30
# Of the published tokenizer: the conversation in front of a training image and the longest answer of the rating task
# behind it; the same of the scorer's prompt.
TRAINING_TEXT = (35, 32)
_SCORING_TEXT = (15, 12)
# Values change nothing, only how many there are.
_LEVEL_IDS = (1, 2, 3, 4, 5)

_logger = logging.getLogger(__name__)


def plan_training(config: TrainConfig, topology_name: str, *, search: bool = False, largest: bool = False) -> str:
    """A report of a run's training step on chips.

    Args:
      config: the run's.
      topology_name: such as `v5e:4x4`.
      search: try all meshes, and report of the best.
      largest: look for the largest batch that fits.

    Raises:
      ConfigError: configuration, mesh and chips do not fit together.
      PlanError: there is no such topology, or the program does not fit its memory; the message says what to change.
    """
    topology = open_topology(topology_name)
    return _plan(
        lambda mesh: training_job(dataclasses.replace(config, mesh=mesh), topology),
        config.mesh,
        topology,
        search=search,
        largest=largest,
        training=True,
    )


def plan_scoring(
    model: str,
    topology_name: str,
    *,
    dtype: str = "bfloat16",
    mesh: MeshConfig = MeshConfig(data=-1, fsdp=1),
    batch_size: int = 32,
    quantization: str | None = None,
    search: bool = False,
    largest: bool = False,
) -> str:
    """A report of the scorer's program on chips, like `plan_training`; `batch_size` is of each device.

    With `quantization`, a scheme of `quantize.SCHEMES`, what it would be if the model were converted to that.
    """
    topology = open_topology(topology_name)
    return _plan(
        lambda mesh: scoring_job(model, dtype, mesh, batch_size, topology, quantization),
        mesh,
        topology,
        search=search,
        largest=largest,
        training=False,
    )


def _plan(
    make_job: "Callable[[MeshConfig], Job]",
    mesh: MeshConfig,
    topology: Topology,
    *,
    search: bool,
    largest: bool,
    training: bool,
) -> str:
    before = ""
    if search:
        plans = search_meshes(make_job, topology)
        before = search_report(plans) + "\n\n"
        if not isinstance(plans[0], Plan):
            raise PlanError(f"on {topology.name} no mesh fits:\n{before.rstrip()}")
        found = plans[0]
    else:
        job = make_job(mesh)
        try:
            found = compile_job(job, topology, job.batch_size)
        except OutOfMemoryError as error:
            raise PlanError(advice(job, error, largest_batch(job, topology, None), training=training)) from error
    return before + report(found, topology, largest_batch(found.job, topology, found) if largest else None)


# ---- what is compiled -------------------------------------------------------------------------------------


class Job(NamedTuple):
    """Something to compile for a mesh.

    Attributes:
      name: what it is, for the reader.
      mesh: how devices share it.
      unit: what a batch is made of.
      images: in each of these.
      batch_size: of these, a device.
      state: bytes by kind that a device holds from batch to batch.
      trace: the program, traced, for so many a device.
    """

    name: str
    mesh: jax.sharding.Mesh
    unit: str
    images: int
    batch_size: int
    state: dict[str, int]
    trace: Callable[[int], Any]


def training_job(config: TrainConfig, topology: Topology) -> Job:
    """The training step of a configuration. Raises `ConfigError` if it does not fit the chips."""
    model, whence, quantization = _model(config.model)
    if quantization is not None:
        raise ConfigError(f"{config.model}: its weights are quantised ({quantization}), which is for scoring only")
    mesh = make_mesh(config.mesh, topology.devices)
    program = training_program(config, model, mesh)
    _, after = TRAINING_TEXT
    state, frozen = program.state(), program.frozen()

    def trace(batch_size: int) -> Any:
        sides = 2 if config.data.pairs else 1
        return program.step().trace(state, frozen, program.batch(batch_size * mesh.size, sides, after))

    return Job(
        f"{'LoRA' if config.lora else 'full'} training, {whence}, {config.dtype}, remat {config.remat}, "
        f"accumulate {config.optimizer.accumulate}",
        mesh,
        "pair" if config.data.pairs else "image",
        2 if config.data.pairs else 1,
        config.batch_size_per_device,
        {
            "trained parameters": bytes_per_device(state.params),
            "frozen parameters": bytes_per_device(frozen),
            "optimizer": bytes_per_device(state.optimizer),
        },
        trace,
    )


def training_program(config: TrainConfig, model: DeqaConfig, mesh: jax.sharding.Mesh) -> Program:
    """A run's program with as much text as the published tokenizer makes. Raises `ConfigError` if they do not fit."""
    before, _ = TRAINING_TEXT
    # The number of steps is a constant in the schedule.
    return Program(config, model, _preprocess(model), tuple(range(before)), _LEVEL_IDS, steps=1000, mesh=mesh)


def scoring_job(
    model_name: str,
    dtype: str,
    mesh_config: MeshConfig,
    batch_size: int,
    topology: Topology,
    quantization: str | None = None,
) -> Job:
    """The scorer's program. Raises `ConfigError` if it does not fit the chips."""
    model, whence, stored = _model(model_name)
    quantization = quantization or stored
    mesh = make_mesh(mesh_config, topology.devices)
    check_batch("a batch of", batch_size * mesh.size, mesh)
    params = scoring_parameters(model, dtype, mesh, quantization)
    before, after = _SCORING_TEXT
    graphdef = nnx.graphdef(scoring_model(model, dtype, mesh, quantization))
    size = model.vision.image_size
    ids = SplitPrompt(tuple(range(before)), tuple(range(after)))
    prefill, run = programs(graphdef, ids, _LEVEL_IDS, _preprocess(model), dtype, "tpu")
    cache = jax.eval_shape(prefill, unflatten(params))

    def trace(batch_size: int) -> Any:
        pixels = jax.ShapeDtypeStruct(
            (batch_size * mesh.size, size, size, 3), np.uint8, sharding=NamedSharding(mesh, BATCH)
        )
        return run.trace(unflatten(params), cache, pixels, open_set=False)

    state = {"parameters": bytes_per_device(params)}
    kind = f"{dtype}, {quantization} kernels" if quantization else dtype
    return Job(f"scoring, {whence}, {kind}", mesh, "image", 1, batch_size, state, trace)


def _preprocess(model: DeqaConfig) -> PreprocessConfig:
    return PreprocessConfig(size=model.vision.image_size, resample=3, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))


def _model(name: str) -> tuple[DeqaConfig, str, str | None]:
    """A model's configuration, how to call it, and how it is quantised; one that is not here has the published size."""
    if name in PRESETS:
        return PRESETS[name], f"size {name}", None
    folder = Path(name)
    if not folder.is_dir():
        return PRESETS["full"], f"{name} (not here: taken to have the published size)", None
    written = read_json(folder / "config.json")
    if "model" in written and "format" in written:
        return DeqaConfig.from_dict(written["model"]), name, read_scheme(written.get("quantization"))
    return from_published(written), name, None


# ---- what it takes ----------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """What a compiled program takes on each device.

    Attributes:
      job: what was compiled.
      batch_size: for so many a device.
      peak: bytes of memory at the most, arguments included.
      temporary: bytes of gradients, activations and other intermediates.
      flops: of all matrix products.
      collectives: by kind.
      seconds: at the least, by what limits.
    """

    job: Job
    batch_size: int
    peak: int
    temporary: int
    flops: float
    collectives: dict[str, Traffic]
    seconds: dict[str, float]

    @property
    def images_per_second(self) -> float:
        """Of all devices, if nothing but the tightest limit takes time."""
        return self.batch_size * self.job.images * self.job.mesh.size / max(self.seconds.values())


class OutOfMemoryError(PlanError):
    """A program that does not fit; the message is the compiler's."""


def compile_job(job: Job, topology: Topology, batch_size: int) -> Plan:
    """Compiles a job for so many a device.

    Raises:
      OutOfMemoryError: it does not fit.
    """
    _logger.info("compiling: %s on %s, mesh %s, %d a device", job.name, topology.name, _shape(job.mesh), batch_size)
    traced = job.trace(batch_size)
    try:
        compiled = compile_for(job.mesh, traced)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise PlanError(f"the compiler failed: {first_line(error)}") from error
        raise OutOfMemoryError(first_line(error)) from error
    memory = compiled.memory_analysis()
    flops = count_flops(traced.jaxpr.jaxpr) / job.mesh.size
    collectives = count_collectives(compiled.as_text())
    received = sum((1 + (kind == "all-reduce")) * traffic.bytes for kind, traffic in collectives.items())
    moved = memory.argument_size_in_bytes + memory.output_size_in_bytes + 2 * memory.temp_size_in_bytes + 2 * received
    chip = topology.chip
    seconds = {
        "compute": flops / chip.flops,
        "memory": moved / chip.memory_bandwidth,
        "network": received / chip.network_bandwidth,
    }
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    peak = memory.peak_memory_in_bytes or held + memory.temp_size_in_bytes
    return Plan(job, batch_size, peak, memory.temp_size_in_bytes, flops, collectives, seconds)


def largest_batch(job: Job, topology: Topology, fits: Plan | None) -> Plan | None:
    """The most that fit on a device, to within an eighth; None if not even one does.

    Args:
      job: what to compile.
      topology: for which chips.
      fits: a plan that is known to fit; without it, the job's own batch does not.
    """
    step = max(1, batch_shards(job.mesh) // math.gcd(batch_shards(job.mesh), job.mesh.size))
    low, high = (fits.batch_size, None) if fits else (0, job.batch_size)
    expected = 2 * low
    while high is None or high - low > max(step, high // 8):
        middle = (max(expected, low + low // 8) if high is None else (low + high) // 2) // step * step
        middle = max(middle, low + step)
        try:
            found = compile_job(job, topology, middle)
        except OutOfMemoryError:
            high = middle
            continue
        if fits is not None and found.peak > fits.peak:
            # What is laid out grows about evenly: a little less than would fill the chip is tried next.
            grows = (found.peak - fits.peak) / (middle - low)
            expected = middle + int(15 / 16 * (topology.chip.memory - found.peak) / grows)
        else:
            expected = 2 * middle
        low, fits = middle, found
    return fits


def search_meshes(make_job: Callable[[MeshConfig], Job], topology: Topology) -> list[Plan | tuple[str, str]]:
    """Every sensible mesh, best first; those that do not fit at the end, with the reason."""
    fitting: list[Plan] = []
    failed: list[Plan | tuple[str, str]] = []
    for data, fsdp, tensor in mesh_shapes(len(topology.devices)):
        # Products split over more devices than a host has are never the best.
        if tensor > 8:
            continue
        mesh = MeshConfig(data=data, fsdp=fsdp, tensor=tensor)
        try:
            job = make_job(mesh)
            fitting.append(compile_job(job, topology, job.batch_size))
        except (ConfigError, PlanError) as error:
            failed.append((str(mesh), str(error)))
    return [*sorted(fitting, key=lambda plan: -plan.images_per_second), *failed]


# ---- reports ----------------------------------------------------------------------------------------------


def report(plan: Plan, topology: Topology, largest: Plan | None) -> str:
    """A plan as a table, with what it assumes."""
    job, chip = plan.job, topology.chip
    images = plan.batch_size * job.images
    rows = [
        ("mesh", _shape(job.mesh)),
        (f"{job.unit}s a chip", f"{plan.batch_size}"),
        *((f"{name} a chip", _gib(size)) for name, size in job.state.items()),
        ("gradients, activations and temporaries", _gib(plan.temporary)),
        ("peak", f"{_gib(plan.peak)} of {_gib(chip.memory)}"),
        ("FLOPs an image", f"{plan.flops / images / 1e12:.2f} T"),
        *((kind, f"{traffic.times} × a step, {_gib(traffic.bytes)}") for kind, traffic in plan.collectives.items()),
        *((f"{name}, at the least", f"{1e3 * seconds:.0f} ms") for name, seconds in plan.seconds.items()),
        ("images/s of all chips, at the most", f"{plan.images_per_second:.0f}"),
    ]
    if largest is not None:
        rows.append((f"largest batch that fits, {job.unit}s a chip", str(largest.batch_size)))
    title = f"{job.name}\non {topology.name}, {len(topology.devices)} chip{'s' * (len(topology.devices) > 1)}\n"
    return title + tabulate(rows, tablefmt="plain", disable_numparse=True) + "\n\n" + _assumptions(topology)


def _assumptions(topology: Topology) -> str:
    chip = topology.chip
    return (
        f"The rate is a bound, not a forecast: {chip.flops / 1e12:.0f} TFLOP/s of bfloat16, every argument, result and "
        f"temporary moved once each way at {chip.memory_bandwidth / 1e9:.0f} GB/s, collectives at\n"
        f"{chip.network_bandwidth / 1e9:.0f} GB/s into a chip (all of its links at once), the three overlapping whole; "
        f"reading and decoding images is not in it. Half of it is a good program. Text: {TRAINING_TEXT[0]} tokens\n"
        f"before a training image and {TRAINING_TEXT[1]} behind it; {_SCORING_TEXT[0]} and {_SCORING_TEXT[1]} for "
        "scoring."
    )


def advice(job: Job, error: OutOfMemoryError, largest: Plan | None, *, training: bool) -> str:
    """What to change where a program does not fit."""
    if largest is not None:
        change = f"{largest.batch_size} {job.unit}s a device fit"
        if training:
            change += "; optimizer.accumulate makes up for it"
    elif job.mesh.shape["data"] > 1:
        change = "split the parameters over more devices: fsdp or tensor in place of data"
    else:
        change = "take more chips" + (", remat: full or LoRA" if training else "")
    return (
        f"{job.name} with {job.batch_size} {job.unit}s a device does not fit the memory of these chips on mesh "
        f"{_shape(job.mesh)} ({error}). {_gib(sum(job.state.values()))} a device are there from batch to batch. "
        f"What to change: {change}"
    )


def search_report(plans: Sequence[Plan | tuple[str, str]]) -> str:
    """Meshes, best first."""
    rows = [
        (_shape(one.job.mesh), _gib(one.peak), f"{one.images_per_second:.0f}", "")
        if isinstance(one, Plan)
        else (one[0], "", "", one[1])
        for one in plans
    ]
    return tabulate(rows, headers=("mesh", "peak", "images/s at the most", ""), disable_numparse=True)


def _shape(mesh: jax.sharding.Mesh) -> str:
    return str(MeshConfig(**dict(mesh.shape)))


def _gib(size: float) -> str:
    return f"{size / _GIB:.2f} GiB"
