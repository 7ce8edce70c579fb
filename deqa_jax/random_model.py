"""`deqa init`: a model of random weights, to try everything without a download. Its scores mean nothing."""

import io
import json
import logging
from pathlib import Path

import jax
import sentencepiece
from flax import nnx

from deqa_jax.checkpoint import PREPROCESSOR_FILE, TOKENIZER_FILE, InMemory, write_checkpoint
from deqa_jax.config import PRESETS, Execution
from deqa_jax.files import new_folder, refuse_existing
from deqa_jax.model.deqa import Deqa
from deqa_jax.parameters import flatten
from deqa_jax.prompt import LEVELS, PROMPTS, SYSTEM_SENTENCES
from deqa_jax.scorer import use_compilation_cache

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
    leaves = {path: InMemory(array) for path, array in flatten(nnx.to_pure_dict(state)).items()}
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


def random_side_files() -> dict[str, bytes]:
    """The tokenizer and preprocessor files of such a model."""
    return {
        TOKENIZER_FILE: _train_vocabulary(),
        PREPROCESSOR_FILE: (json.dumps(_PREPROCESSOR, indent=2) + "\n").encode(),
    }


def _train_vocabulary() -> bytes:
    """A sentencepiece model of a few hundred pieces in which each level word is one."""
    text = [
        *PROMPTS.values(),
        *SYSTEM_SENTENCES.values(),
        *(f"The quality of the image is {level}." for level in LEVELS),
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
