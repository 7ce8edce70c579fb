"""The program that scores: the model it is of, where its parameters lie, and what it says of a batch."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.stages import Wrapped
from jaxtyping import Array, Float, UInt8

from deqa_jax.checkpoint import Checkpoint
from deqa_jax.compilation import scoring_jit
from deqa_jax.config import ConfigError, DeqaConfig, Execution, MeshConfig
from deqa_jax.model.deqa import Deqa
from deqa_jax.model.quantized import wrap
from deqa_jax.parameters import Leaves, abstract_model, parameter_shapes
from deqa_jax.preprocess import PreprocessConfig, normalize
from deqa_jax.prompt import LEVEL_WEIGHTS, PROMPTS, SplitPrompt, split_prompt
from deqa_jax.quantize import parameter_dtype
from deqa_jax.sharding import BATCH, make_mesh, parameter_shardings


class Prediction(NamedTuple):
    """What the model says of images: arrays in float32, one row per image.

    Attributes:
      score: `[B]`, the mean of the five levels' weights, 1 (bad) to 5 (excellent).
      std: `[B]`, their standard deviation, 0 to 2.
      probs: `[B, 5]`, probability of excellent, good, fair, poor, bad; sums to 1.
      logits: `[B, 5]`, the level words' logits.
      open_probs: `[B, 5]`, the level words' probability in the whole vocabulary, if it was asked for.
      hidden: `[B, D]`, the language model's last hidden state, if it was asked for.
    """

    score: Any
    std: Any
    probs: Any
    logits: Any
    open_probs: Any = None
    hidden: Any = None


def check_fit(checkpoint: Checkpoint, preprocess: PreprocessConfig, prompt: str) -> tuple[SplitPrompt, tuple[int, ...]]:
    """Ids of the prompt and of the level words, once tokenizer, preprocessing and model are seen to belong together.

    Raises:
      ConfigError: they do not.
    """
    config = checkpoint.config
    if preprocess.size != config.vision.image_size:
        raise ConfigError(
            f"{checkpoint.folder}: its preprocessing makes images of {preprocess.size} pixels, "
            f"its model reads {config.vision.image_size}"
        )
    tokenizer = checkpoint.tokenizer()
    ids, level_ids = split_prompt(tokenizer, PROMPTS[prompt]), tokenizer.level_ids()
    if max(*ids.before, *ids.after, *level_ids) >= config.language.vocab_size:
        raise ConfigError(f"{checkpoint.folder}: its tokenizer has more tokens than its model's vocabulary")
    return ids, level_ids


def scoring_dtype(dtype: str, platform: str) -> str:
    """Fills in `auto`: float32 on CPU, bfloat16 elsewhere."""
    return dtype if dtype != "auto" else "float32" if platform == "cpu" else "bfloat16"


def int8_activations_by_default(dtype: str, platform: str, quantization: str | None) -> bool:
    """Whether `auto` means int8 activations as well: of int8 kernels on CPU.

    There they are faster, with scores within 0.02 of float32 (benchmarks/README.md); elsewhere neither is known.
    """
    return dtype == "auto" and platform == "cpu" and quantization == "int8"


def scoring_mesh(mesh: MeshConfig | None) -> Mesh:
    """This process's devices, without `mesh` each by itself. Raises what `make_mesh` does."""
    devices = jax.local_devices()
    if mesh is not None:
        return make_mesh(mesh, devices)
    return make_mesh(MeshConfig(data=-1, fsdp=1), devices[:1] if devices[0].platform == "cpu" else devices)


def scoring_model(
    config: DeqaConfig, dtype: str, mesh: Mesh, quantization: str | None = None, *, int8_activations: bool = False
) -> Deqa:
    """The model with shapes in place of arrays, stored (but for what is quantised) and run in `dtype`, on a mesh."""
    activations = NamedSharding(mesh, BATCH) if mesh.size > 1 else None
    model = abstract_model(config, Execution(dtype=dtype, param_dtype=dtype, activations=activations))
    return wrap(model, quantization, int8_activations=int8_activations) if quantization else model


def scoring_parameters(config: DeqaConfig, dtype: str, mesh: Mesh, quantization: str | None = None) -> Leaves:
    """Shapes, dtypes and places of that model's parameters, by path. Raises what `parameter_shardings` does."""
    shapes = parameter_shapes(config, quantization)
    return {
        path: jax.ShapeDtypeStruct(shapes[path], parameter_dtype(path, quantization, dtype), sharding=sharding)
        for path, sharding in parameter_shardings(shapes, mesh).items()
    }


def programs(
    graphdef: nnx.GraphDef[Any],
    ids: SplitPrompt,
    level_ids: tuple[int, ...],
    preprocess: PreprocessConfig,
    dtype: str,
    platform: str,
    *,
    quantized: bool = False,
) -> tuple[Wrapped, Wrapped]:
    """The two compiled functions: `prefill(params)` and `run(params, cache, pixels, open_set=…)`."""

    def prefill(params: Any) -> Any:
        return nnx.merge(graphdef, params).prefill(jnp.asarray(ids.before))

    def run(params: Any, cache: Any, pixels: UInt8[Array, "B H W 3"], *, open_set: bool) -> Prediction:
        model = nnx.merge(graphdef, params)
        hidden = model.last_hidden(normalize(pixels, preprocess).astype(dtype), cache, jnp.asarray(ids.after))
        if not open_set:
            prediction = readout(model.language.logits(hidden, level_ids))
        else:
            everything = model.language.logits(hidden)
            prediction = readout(everything[:, jnp.asarray(level_ids)])
            total = jax.nn.logsumexp(everything, axis=-1, keepdims=True)
            prediction = prediction._replace(open_probs=jnp.exp(prediction.logits - total))
        return prediction._replace(hidden=hidden.astype(jnp.float32))

    compiled = functools.partial(scoring_jit, dtype=dtype, platform=platform, quantized=quantized)
    return compiled(prefill), compiled(run, static_argnames="open_set")


def readout(logits: Float[Array, "B 5"]) -> Prediction:
    """Score and spread of level logits, in float32 (SPEC 3; DeQA-Score, section 3.3).

    >>> readout(jnp.asarray([[0.0, 0.0, 0.0, 0.0, 0.0]])).score.round(5)
    Array([3.], dtype=float32)
    """
    weights = jnp.asarray(LEVEL_WEIGHTS, jnp.float32)[None]
    probs = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    score = jnp.sum(probs * weights, axis=-1)
    std = jnp.sqrt(jnp.sum(probs * jnp.square(weights - score[:, None]), axis=-1))
    return Prediction(score, std, probs, logits.astype(jnp.float32))
