"""`deqa init`: a model of random weights, to try everything without a download. Its scores mean nothing."""

import functools
import io
import json
import logging
import zlib
from collections.abc import Collection
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import sentencepiece
from flax import nnx
from jaxtyping import Float

from deqa_jax.checkpoint import (
    PREPROCESSOR_FILE,
    TOKENIZER_FILE,
    Checkpoint,
    InMemory,
    Shardings,
    write_checkpoint,
)
from deqa_jax.compilation import use_compilation_cache
from deqa_jax.config import PRESETS, DeqaConfig, Execution, VisionConfig
from deqa_jax.files import new_folder, refuse_existing
from deqa_jax.labels import ANSWER, QUESTIONS
from deqa_jax.model.deqa import Deqa
from deqa_jax.model.layers import EMBEDDING_STD
from deqa_jax.parameters import Leaves, ParamPath, flatten, parameter_shapes
from deqa_jax.prompt import LEVELS, PROMPTS, SYSTEM_SENTENCES
from deqa_jax.quantize import KERNEL_SCALE, is_quantized, parameter_dtype, quantize

PATCH_FILTERS = ("vision", "patch_embedding", "kernel")
EMBEDDING = ("language", "embedding")
ABSTRACTOR_QUERY = ("abstractor", "layers", "query", "kernel")
FIRST_UP, FIRST_DOWN = (("vision", "layers", name, "kernel") for name in ("up", "down"))
# OpenAI CLIP's colours, as in every published checkpoint.
_PREPROCESSOR = {
    "crop_size": 448,
    "do_center_crop": True,
    "do_normalize": True,
    "do_resize": True,
    "feature_extractor_type": "CLIPFeatureExtractor",
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "size": 448,
}


def init(out: Path, *, size: str = "test", seed: int = 0, dtype: str = "float32") -> None:
    """Makes a converted checkpoint of random weights, with a small vocabulary of its own.

    Args:
      out: the folder to make.
      size: a key of `config.PRESETS`.
      seed: the same seed gives the same weights.
      dtype: what to store.

    Raises:
      FileExistsError: `out` is there already.
    """
    refuse_existing(out)
    use_compilation_cache()
    config = PRESETS[size]
    execution = Execution(param_dtype=dtype)
    state = jax.jit(lambda key: nnx.state(Deqa(config, execution=execution, rngs=nnx.Rngs(key))))(jax.random.key(seed))
    arrays = flatten(nnx.to_pure_dict(state))
    for path, first in first_vision(config.vision, seed).items():
        # Of the blocks, which are stacked, the first one.
        arrays[path] = (arrays[path].at[0] if "layers" in path else arrays[path].at[:]).set(first.astype(dtype))
    # Queries that look at everything alike have nothing to tell each other apart by.
    arrays[ABSTRACTOR_QUERY] *= jnp.asarray(3, dtype)
    # An optimizer's steps are of one size: of the published 0.02 the first ones would leave nothing.
    arrays[EMBEDDING] *= jnp.asarray(1 / EMBEDDING_STD, dtype)
    leaves = {path: InMemory(array) for path, array in arrays.items()}
    with new_folder(out) as temporary:
        write_checkpoint(
            temporary,
            config=config,
            leaves=leaves,
            side_files=random_side_files(),
            published_config=None,
            provenance={"source": f"deqa init --size {size} --seed {seed}: random weights, scores mean nothing"},
        )
    logging.getLogger(__name__).info("%s: random weights; its scores mean nothing", out)


def first_vision(config: VisionConfig, seed: int) -> dict[ParamPath, Float[np.ndarray, "..."]]:
    """Patch filters and a first MLP that measure how much of each spatial frequency there is.

    Patches weighted at random come out as little more than their mean, since the amplitudes of natural images fall as
    1/f (Field, Relations between the statistics of natural images and the response properties of cortical cells, JOSA A
    1987). So the filters start as cosines of all frequencies, phases and colours, each scaled to answer such noise with
    a deviation of one, and the first block's MLP as their absolute values: with them a model learns in thousands of
    images what else takes millions.
    """
    rng = np.random.default_rng(seed)
    width, hidden = config.hidden_size, config.mlp_dim
    up = rng.normal(0, width**-0.5, (width, hidden))
    down = rng.normal(0, 0.1 * hidden**-0.5, (hidden, width))
    pairs = min(width, hidden // 2)
    # quick_gelu(4x) + quick_gelu(−4x) is about |4x|.
    up[:, : 2 * pairs] = 4 * np.concatenate([np.eye(width, pairs), -np.eye(width, pairs)], axis=1)
    # What is added is 2|x| − x, so that of a patch's answer x only its size goes on.
    down[: 2 * pairs] = np.concatenate([np.eye(pairs, width), 3 * np.eye(pairs, width)]) / 4
    return {PATCH_FILTERS: _cosines(rng, config.patch_size, width), FIRST_UP: up, FIRST_DOWN: down}


def _cosines(rng: np.random.Generator, side: int, count: int) -> Float[np.ndarray, "PPC D"]:
    # As many filters an octave in either direction.
    frequency = np.exp2(rng.uniform(-1, np.log2(side), (count, 2))) * rng.choice([-1, 1], (count, 2))
    place = (np.arange(side) + 0.5) * np.pi / side
    angle = frequency[:, 0, None, None] * place[:, None] + frequency[:, 1, None, None] * place
    waves = np.cos(angle + rng.uniform(0, 2 * np.pi, (count, 1, 1)))
    # A few see the mean of a patch, the others what varies in it.
    waves[count // 16 :] -= waves[count // 16 :].mean(axis=(1, 2), keepdims=True)
    colour = np.where(rng.random((count, 1)) < 0.7, 1.0, rng.normal(0, 1, (count, 3)))
    filters = np.einsum("dyx,dc->yxcd", waves, colour).reshape(-1, count)
    return filters / (_pink_patches(rng, side) @ filters).std(axis=0)


def _pink_patches(rng: np.random.Generator, side: int, across: int = 16) -> Float[np.ndarray, "N PPC"]:
    """Patches of 1/f noise, as the model's normalised pixels are: mostly grey, with a deviation of one."""
    whole = side * across
    frequency = np.hypot(np.fft.fftfreq(whole)[:, None], np.fft.fftfreq(whole)) * whole
    frequency[0, 0] = 1
    white = np.fft.fft2(rng.normal(size=(4, whole, whole)), axes=(1, 2))
    grey, *colours = np.fft.ifft2(white / frequency, axes=(1, 2)).real
    field = np.stack([grey + colour / 5 for colour in colours], axis=-1)
    field /= field.std()
    return field.reshape(across, side, across, side, 3).swapaxes(1, 2).reshape(across**2, -1)


class RandomCheckpoint(Checkpoint):
    """A checkpoint of random weights that are made where they are to lie, when they are read; for measurements.

    All blocks of a stack have the same values, each in memory of its own: no timing tells, and a model of any size is
    there in seconds.
    """

    @classmethod
    def make(cls, config: DeqaConfig, folder: Path, quantization: str | None = None) -> "RandomCheckpoint":
        """A model's checkpoint, whose side files alone are written to an empty folder.

        With `quantization`, a scheme of `quantize.SCHEMES`, as if the same weights had been converted to that.
        """
        for name, content in random_side_files(config.vision.image_size).items():
            (folder / name).write_bytes(content)
        provenance = {"source": "random weights, scores mean nothing"}
        return cls(folder, config, None, provenance, quantization=quantization)

    @functools.cached_property
    def own(self) -> dict[ParamPath, jax.ShapeDtypeStruct]:
        """Shape and dtype of every parameter."""
        return {
            path: jax.ShapeDtypeStruct(shape, parameter_dtype(path, self.quantization, "float32"))
            for path, shape in parameter_shapes(self.config, self.quantization).items()
        }

    def restore(
        self,
        dtype: str | None = None,
        *,
        shardings: Shardings | None = None,
        only: Collection[ParamPath] | None = None,
    ) -> Leaves:
        """Makes parameters, the same each time; arguments as in `Checkpoint.restore`."""
        leaves: Leaves = {}
        for path in self.own if only is None else only:
            shape = self.own[path].shape
            block = self._block(path).astype(parameter_dtype(path, self.quantization, dtype or "float32"))
            if shardings is None:
                leaves[path] = np.broadcast_to(block, shape).copy()
            else:
                repeat = jax.jit(functools.partial(jnp.broadcast_to, shape=shape), out_shardings=shardings[path])
                # Arrays of one block broadcast to any number of others.
                leaves[path] = repeat(block.reshape((1,) * (len(shape) - block.ndim) + block.shape))
        return leaves

    def _block(self, path: ParamPath) -> np.ndarray:
        """The values of one block, or of what is no stack."""
        whole = (*path[:-1], "kernel") if path[-1] == KERNEL_SCALE else path
        shape = parameter_shapes(self.config)[whole]
        block = _random_block(whole, shape[1:] if "layers" in path else shape)
        if self.quantization is None or not is_quantized(whole):
            return block
        kernel, scale = quantize(block, self.quantization)
        return kernel if path == whole else scale


def _random_block(path: ParamPath, shape: tuple[int, ...]) -> Float[np.ndarray, "..."]:
    """Norms that change nothing, no biases, and matrices that keep the size of what goes through them."""
    if path[-1] in ("scale", "bias"):
        return np.full(shape, path[-1] == "scale", np.float32)
    deviation = shape[-2] ** -0.5 if path[-1] == "kernel" else EMBEDDING_STD
    uniform = np.random.default_rng(zlib.crc32("/".join(path).encode())).random(shape, np.float32)
    return (uniform - np.float32(0.5)) * np.float32(12**0.5 * deviation)


def random_side_files(image_size: int = 448) -> dict[str, bytes]:
    """The tokenizer and preprocessor files of such a model."""
    preprocessor = _PREPROCESSOR | {"crop_size": image_size, "size": image_size}
    return {
        TOKENIZER_FILE: _train_vocabulary(),
        PREPROCESSOR_FILE: (json.dumps(preprocessor, indent=2) + "\n").encode(),
    }


def _train_vocabulary() -> bytes:
    """A sentencepiece model of a few hundred pieces in which each level word is one."""
    text = [
        *PROMPTS.values(),
        *SYSTEM_SENTENCES.values(),
        *QUESTIONS,
        *(ANSWER.format(level) for level in LEVELS),
    ]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(line for entry in text for line in entry.splitlines()),
        model_writer=model,
        model_type="bpe",
        vocab_size=480,
        hard_vocab_limit=False,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=[f"▁{level}" for level in LEVELS],
        minloglevel=2,
    )
    return model.getvalue()
