"""`deqa init`: a model of random weights, to try everything without a download. Its scores mean nothing."""

import functools
import io
import json
import logging
import shlex
import zlib
from collections.abc import Collection
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import sentencepiece
from flax import nnx
from jaxtyping import Float

from deqa_jax import first_weights
from deqa_jax.checkpoint import (
    PREPROCESSOR_FILE,
    TOKENIZER_FILE,
    Checkpoint,
    InMemory,
    Shardings,
    write_checkpoint,
)
from deqa_jax.compilation import use_compilation_cache
from deqa_jax.config import PRESETS, DeqaConfig, Execution
from deqa_jax.files import new_folder, refuse_existing
from deqa_jax.labels import ANSWER, QUESTIONS
from deqa_jax.measured_weights import measured_weights
from deqa_jax.model.deqa import Deqa
from deqa_jax.model.layers import EMBEDDING_STD
from deqa_jax.parameters import Leaves, ParamPath, flatten, parameter_shapes
from deqa_jax.preprocess import PreprocessConfig
from deqa_jax.prompt import LEVELS, PROMPTS, SYSTEM_SENTENCES
from deqa_jax.quantize import KERNEL_SCALE, is_quantized, parameter_dtype, quantize

EMBEDDING = ("language", "embedding")
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


def init(out: Path, *, size: str = "test", seed: int = 0, dtype: str = "float32", pictures: Path | None = None) -> None:
    """Makes a converted checkpoint of random weights, with a small vocabulary of its own.

    Args:
      out: the folder to make.
      size: a key of `config.PRESETS`.
      seed: the same seed gives the same weights.
      dtype: what to store.
      pictures: a folder of pictures such as the model will be trained on, on which some of its weights are measured.

    Raises:
      FileExistsError: `out` is there already.
      NoImagesError: `pictures` has none.
      ImageError: one of them cannot be read.
    """
    refuse_existing(out)
    use_compilation_cache()
    config, side_files = PRESETS[size], random_side_files()
    execution = Execution(param_dtype=dtype)
    state = jax.jit(lambda key: nnx.state(Deqa(config, execution=execution, rngs=nnx.Rngs(key))))(jax.random.key(seed))
    arrays = flatten(nnx.to_pure_dict(state))
    drawn: dict[ParamPath, np.ndarray] = {path: np.asarray(arrays[path], np.float32) for path in first_weights.DRAWN}
    _put(arrays, first_weights.first_weights(config, seed, drawn))
    if pictures is not None:
        preprocess = PreprocessConfig.from_published(json.loads(side_files[PREPROCESSOR_FILE]))
        _put(arrays, measured_weights(config, arrays, pictures, preprocess))
    # An optimizer's steps are of one size: of the published 0.02 the first ones would leave nothing.
    arrays[EMBEDDING] *= jnp.asarray(1 / EMBEDDING_STD, dtype)
    leaves = {path: InMemory(array) for path, array in arrays.items()}
    measured_on = [] if pictures is None else ["--pictures", str(pictures)]
    command = shlex.join(["deqa", "init", "--size", size, "--seed", str(seed), "--dtype", dtype, *measured_on])
    with new_folder(out) as temporary:
        write_checkpoint(
            temporary,
            config=config,
            leaves=leaves,
            side_files=side_files,
            published_config=None,
            provenance={"source": f"{command}: random weights, scores mean nothing"},
        )
    logging.getLogger(__name__).info("%s: random weights; its scores mean nothing", out)


def _put(arrays: dict[ParamPath, jax.Array], values: dict[ParamPath, Float[np.ndarray, "..."]]) -> None:
    """Replaces parameters; of the blocks, which are stacked, the first one's."""
    for path, value in values.items():
        place = arrays[path].at[0] if "layers" in path else arrays[path].at[:]
        arrays[path] = place.set(value.astype(arrays[path].dtype))


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
