"""`deqa bench`: how fast scoring is here, from files to scores and by stage, and how much of the machine it uses."""

import dataclasses
import functools
import importlib.metadata
import itertools
import logging
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.stages import Wrapped
from jaxtyping import Array, Float, UInt8
from PIL import Image

from deqa_jax.checkpoint import Checkpoint, CheckpointError
from deqa_jax.compilation import compilation_cache_in, scoring_jit
from deqa_jax.config import ConfigError, MeshConfig
from deqa_jax.data.scenes import scene
from deqa_jax.failures import explain
from deqa_jax.flops import flops
from deqa_jax.preprocess import PreprocessConfig, load_square, normalize
from deqa_jax.prompt import PromptError, SplitPrompt
from deqa_jax.scorer import Scorer
from deqa_jax.scoring_program import Prediction, check_fit, readout, scoring_dtype, scoring_mesh
from deqa_jax.sharding import check_batch

STAGES = ("vision", "abstractor", "language", "readout")
"""What runs for every batch, in order."""

PHOTOGRAPH = (1024, 768)
"""Width and height of the JPEG files that are scored from end to end."""

Row = dict[str, Any]
"""What was measured of one model at one batch size, or `error`; an object of the JSON output."""

_PROMPT = "scorer"
# Different ones, as decoding takes longer the more there is to see.
_PHOTOGRAPHS = 4
# Rows, inner width and columns of the matrix product that the model's are held against, and how often it is asked for
# before it is waited for. On CPU, of four images in the language model's MLP; elsewhere, of a size that shows such a
# device at its best, and so often that asking takes no time of it.
_MATMUL = {"cpu": (380, 4096, 11008, 1)}
_ACCELERATOR_MATMUL = (8192, 8192, 8192, 16)

_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchSettings:
    """How to measure.

    Attributes:
      dtype, mesh, int8_activations: those of `Scorer`; a dtype of `auto` leaves activations as they are.
      batch_sizes: a row each; without any, the scorer's own choice.
      repeats: runs that each median is of.
      images: files from end to end; without it 64, or four batches if they are more.
    """

    dtype: str = "auto"
    mesh: MeshConfig | None = None
    int8_activations: bool = False
    batch_sizes: tuple[int, ...] = ()
    repeats: int = 7
    images: int | None = None


def measure(models: Mapping[str, Checkpoint], settings: BenchSettings, folder: Path) -> Iterator[Row]:
    """Rows as they come: models in order, and of each the batch sizes in order.

    What does not fit the memory, or the devices, is a row with its `error`, and the next one is tried all the same.

    Args:
      models: what to call them, and what they are.
      settings: how to measure.
      folder: where photographs and compiled programs are written.
    """
    # Nothing is taken that was compiled before, and nothing is compiled twice.
    with compilation_cache_in(folder / "programs"):
        yield from _rows(models, settings, folder)


def _rows(models: Mapping[str, Checkpoint], settings: BenchSettings, folder: Path) -> Iterator[Row]:
    mesh = scoring_mesh(settings.mesh)
    # By its name: with `auto` the scorer would choose int8 activations as well.
    settings = dataclasses.replace(settings, dtype=scoring_dtype(settings.dtype, jax.local_devices()[0].platform))
    products = "int8" if settings.int8_activations else settings.dtype
    _logger.info("a matrix product in %s", products)
    # In front of any model, so that it takes part in no model's peak of memory.
    rate = matmul_rate(products, mesh, settings.repeats)
    photographs = write_photographs(folder)
    for name, checkpoint in models.items():
        about: Row = {
            "model": name,
            "dtype": settings.dtype,
            "quantization": checkpoint.quantization,
            "int8_activations": settings.int8_activations,
            "mesh": dict(mesh.shape),
        }
        _logger.info("%s: loading", name)
        try:
            subject = Subject(checkpoint, settings, rate, photographs)
        except Exception as error:
            reason = _reason(error)
            yield from (about | {"batch_size": n, "error": reason} for n in settings.batch_sizes or (None,))
            continue
        for batch_size in settings.batch_sizes or (subject.scorer.batch_size,):
            row = about | {"batch_size": batch_size, "error": None}
            try:
                row |= subject.row(batch_size)
            except Exception as error:
                row["error"] = _reason(error)
            yield row
        # Before the next one is there: the name alone would keep it.
        del subject


def precision(row: Row) -> str:
    """What a row's products and kernels are in.

    >>> precision({"dtype": "bfloat16", "quantization": "int8", "int8_activations": True})
    'bfloat16, int8 kernels and activations'
    """
    kernels = f", {row['quantization']} kernels" if row["quantization"] else ""
    return row["dtype"] + kernels + (" and activations" if row["int8_activations"] else "")


def check_settings(settings: BenchSettings) -> Mesh:
    """The mesh of all rows. Raises `ConfigError` if these devices make none, or cannot share one of the batches."""
    mesh = scoring_mesh(settings.mesh)
    for batch_size in settings.batch_sizes:
        check_batch("batch size", batch_size, mesh)
    return mesh


def _reason(error: Exception) -> str:
    """What a row says that has no figures; what should never happen is raised again."""
    if isinstance(error, CheckpointError | ConfigError | PromptError | MemoryError):
        return str(error) or "not enough memory"
    explained = explain(error) if isinstance(error, jax.errors.JaxRuntimeError) else None
    if explained is None:
        raise error
    return explained[0]


class Subject:
    """A model on the devices, with what does not depend on the batch size."""

    def __init__(
        self, checkpoint: Checkpoint, settings: BenchSettings, matmul_rate: float, photographs: Sequence[Path]
    ):
        """Loads a model. Raises what `Scorer` does."""
        preprocess = checkpoint.preprocess()
        ids, level_ids = check_fit(checkpoint, preprocess, _PROMPT)
        before, visual, after = len(ids.before), checkpoint.config.num_visual_tokens, len(ids.after)
        self.scorer = Scorer(
            checkpoint,
            dtype=settings.dtype,
            prompt=_PROMPT,
            mesh=settings.mesh,
            int8_activations=settings.int8_activations,
        )
        graphdef, state = nnx.split(self.scorer.model)
        self._params = nnx.to_pure_dict(state)
        quantized = checkpoint.quantization is not None
        self._programs = stage_programs(graphdef, ids, level_ids, preprocess, self.scorer.dtype, quantized=quantized)
        self._flops = flops(checkpoint.config, before, after)
        self._settings, self._matmul_rate, self._photographs = settings, matmul_rate, photographs
        self._squares = np.stack([load_square(path, preprocess) for path in photographs])
        self._same = {
            "tokens": {"before": before, "visual": visual, "after": after},
            "flop_per_image": self._flops,
            "flop_per_image_uncached": sum(flops(checkpoint.config, before, after, cached=False).values()),
            "matmul_flop_per_second": matmul_rate,
            "decoding": decoding_rates(photographs, preprocess, settings.repeats),
        }

    def row(self, batch_size: int) -> Row:
        """Everything about one batch size. Raises what compiling and running the program do."""
        _logger.info("  batch %d: compiling", batch_size)
        self.scorer.batch_size = batch_size
        squares = np.resize(self._squares, (batch_size, *self._squares.shape[1:]))
        pixels = jax.device_put(squares, self.scorer.batch_sharding)
        start = time.perf_counter()
        self.scorer.lower(pixels).compile()
        compiling = time.perf_counter() - start
        _logger.info("  the program, %d + 1 times", self._settings.repeats)
        whole, _ = timed(self.scorer.predict_pixels, pixels, repeats=self._settings.repeats)
        _logger.info("  its stages")
        stages = self._stages(pixels)
        rate = batch_size / whole["median"]
        achieved = rate * sum(self._flops[stage] for stage in STAGES)
        images = self._settings.images or max(64, 4 * batch_size)
        _logger.info("  %d files from end to end", images)
        return self._same | {
            "seconds": stages | {"whole": whole},
            "images_per_second": rate,
            "flop_per_second": achieved,
            "fraction_of_matmul_rate": achieved / self._matmul_rate,
            "end_to_end": {"images": images, "images_per_second": self._end_to_end(images)},
            "transfer_bytes_per_second": transfer_rate(squares, self.scorer.batch_sharding, self._settings.repeats),
            "compile_seconds": compiling,
            "peak_memory": peak_memory(self.scorer.batch_sharding.mesh.local_devices),
        }

    def _stages(self, pixels: UInt8[Array, "B H W 3"]) -> dict[str, dict[str, float]]:
        """Seconds of each stage's program, on what the stage before it made."""

        def run(stage: str, *arguments: Any) -> Any:
            program, repeats = self._programs[stage], self._settings.repeats
            found[stage], result = timed(program, self._params, *arguments, repeats=repeats)
            return result

        found: dict[str, dict[str, float]] = {}
        cache = run("prefix")
        visual_tokens = run("abstractor", run("vision", pixels))
        run("readout", run("language", visual_tokens, cache))
        return found

    def _end_to_end(self, images: int) -> float:
        """Images per second from files to scores, decoding included."""
        start = time.perf_counter()
        results = list(self.scorer.stream(itertools.islice(itertools.cycle(self._photographs), images)))
        return len(results) / (time.perf_counter() - start)


# ---- programs ---------------------------------------------------------------------------------------------


def stage_programs(
    graphdef: nnx.GraphDef[Any],
    ids: SplitPrompt,
    level_ids: tuple[int, ...],
    preprocess: PreprocessConfig,
    dtype: str,
    *,
    quantized: bool = False,
) -> dict[str, Wrapped]:
    """The scorer's program in parts, each compiled by itself: `prefix`, and `STAGES`.

    All take the model's parameters first. What the compiler gains where one stage ends and the next begins is lost, so
    their times need not sum up to that of the whole.
    """

    def prefix(params: Any) -> Any:
        return nnx.merge(graphdef, params).prefill(jnp.asarray(ids.before))

    def vision(params: Any, pixels: UInt8[Array, "B H W 3"]) -> Float[Array, "B S D"]:
        return nnx.merge(graphdef, params).vision(normalize(pixels, preprocess).astype(dtype))

    def abstractor(params: Any, features: Float[Array, "B S D"]) -> Float[Array, "B V D"]:
        return nnx.merge(graphdef, params).abstractor(features)

    def language(params: Any, visual_tokens: Float[Array, "B V D"], cache: Any) -> Float[Array, "B D"]:
        return nnx.merge(graphdef, params).last_of_tokens(visual_tokens, cache, jnp.asarray(ids.after))

    def read(params: Any, hidden: Float[Array, "B D"]) -> Prediction:
        return readout(nnx.merge(graphdef, params).language.logits(hidden, level_ids))

    parts: tuple[Callable[..., Any], ...] = (prefix, vision, abstractor, language, read)
    backend = jax.local_devices()[0].platform
    return {
        stage: scoring_jit(part, dtype, backend, quantized=quantized)
        for stage, part in zip(("prefix", *STAGES), parts, strict=True)
    }


# ---- single measurements ----------------------------------------------------------------------------------


def timed(function: Callable[..., Any], *arguments: Any, repeats: int) -> tuple[dict[str, float], Any]:
    """Seconds from a call until its result is there, median, least and most; and the result.

    The first call, which compiles, is not counted.
    """
    result = jax.block_until_ready(function(*arguments))
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        seconds.append(time.perf_counter() - start)
    return {"median": statistics.median(seconds), "least": min(seconds), "most": max(seconds)}, result


def matmul_rate(dtype: str, mesh: Mesh, repeats: int) -> float:
    """Operations per second of a large matrix product on each device, all devices together; int8 sums up in int32."""
    backend = mesh.devices.flat[0].platform
    rows, inner, columns, times = _MATMUL.get(backend, _ACCELERATOR_MATMUL)
    random = np.random.default_rng(0)

    def matrix(shape: tuple[int, int], split: PartitionSpec) -> jax.Array:
        # Around zero, as a model's are: the power that a product takes, and so its clock, depend on the values.
        values = random.random(shape, np.float32) - np.float32(0.5)
        values = (255 * values if dtype == "int8" else values).astype(dtype)
        return jax.device_put(values, NamedSharding(mesh, split))

    left = matrix((rows * mesh.size, inner), PartitionSpec(mesh.axis_names))
    right = matrix((inner, columns), PartitionSpec())
    matmul = functools.partial(jnp.matmul, preferred_element_type=jnp.int32 if dtype == "int8" else None)
    product = scoring_jit(matmul, dtype, backend)

    def several(left: jax.Array, right: jax.Array) -> list[jax.Array]:
        return [product(left, right) for _ in range(times)]

    seconds, _ = timed(several, left, right, repeats=repeats)
    return times * 2 * rows * mesh.size * inner * columns / seconds["median"]


def write_photographs(folder: Path) -> list[Path]:
    """JPEG files of the size and detail of photographs."""
    paths = [folder / f"{i}.jpg" for i in range(_PHOTOGRAPHS)]
    for i, path in enumerate(paths):
        Image.fromarray(scene(np.random.default_rng(i), PHOTOGRAPH)).save(path, quality=90)
    return paths


def decoding_rates(paths: Sequence[Path], preprocess: PreprocessConfig, repeats: int) -> dict[str, float]:
    """Images per second from file to square, in one thread and in as many as the scorer has."""

    def load(path: Path) -> UInt8[np.ndarray, "H H 3"]:
        return load_square(path, preprocess)

    threads = os.cpu_count() or 1
    one, _ = timed(lambda: [load(path) for path in paths], repeats=repeats)
    with ThreadPoolExecutor(threads) as pool:
        many = [*paths] * threads
        together, _ = timed(lambda: list(pool.map(load, many)), repeats=repeats)
    return {
        "images_per_second_of_one_thread": len(paths) / one["median"],
        "images_per_second_of_all_threads": len(many) / together["median"],
        "threads": threads,
    }


def transfer_rate(batch: UInt8[np.ndarray, "B H W 3"], sharding: NamedSharding, repeats: int) -> float | None:
    """Bytes per second from the host's memory to the devices'; None on CPU, where they are the same."""
    if sharding.mesh.devices.flat[0].platform == "cpu":
        return None
    seconds, _ = timed(jax.device_put, batch, sharding, repeats=repeats)
    return batch.nbytes / seconds["median"]


def peak_memory(devices: Sequence[jax.Device]) -> dict[str, Any]:
    """The most bytes in use so far, of the device that had the most; of the process where devices do not say."""
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in devices]
    if known := [peak for peak in peaks if peak]:
        return {"bytes": max(known), "of": "device"}
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # On macOS alone these are bytes.
    return {"bytes": kilobytes * (1 if sys.platform == "darwin" else 1024), "of": "process"}


def machine(mesh: Mesh) -> dict[str, Any]:
    """What was measured on."""
    devices = mesh.local_devices
    return {
        "platform": devices[0].platform,
        "device": devices[0].device_kind,
        "devices": len(devices),
        "cores": os.cpu_count(),
        "processor": platform.machine(),
        "python": platform.python_version(),
        "jax": importlib.metadata.version("jax"),
        "jaxlib": importlib.metadata.version("jaxlib"),
    }
