"""`deqa info`: what a checkpoint is."""

import collections
import math
from collections.abc import Iterator
from pathlib import Path

from deqa_jax import builtin_model
from deqa_jax.checkpoint import Checkpoint, is_checkpoint
from deqa_jax.config import DeqaConfig
from deqa_jax.parameters import parameter_shapes
from deqa_jax.quantize import KERNEL_SCALE, is_quantized

from .hf import open_published
from .names import account
from .peft import ADAPTER_CONFIG, is_adapter
from .tensors import ConversionError


def describe(model: str) -> str:
    """A few lines about a converted or published folder, for people.

    Raises:
      CheckpointError, ConversionError: it is neither, or damaged.
    """
    folder = Path(builtin_model.folder_of(model))
    if is_checkpoint(folder):
        lines = _converted(Checkpoint.open(folder))
    elif is_adapter(folder):
        lines = iter([f"{model}: a LoRA adapter ({ADAPTER_CONFIG}); convert it with --base and its base checkpoint"])
    elif folder.is_dir():
        lines = _published(folder)
    else:
        raise ConversionError([f"{model}: no such folder (deqa info looks at local folders only)"])
    return "\n".join(lines)


def _converted(checkpoint: Checkpoint) -> Iterator[str]:
    yield f"{checkpoint.folder}: a converted checkpoint"
    yield from _model(checkpoint.config)
    sizes: collections.Counter[str] = collections.Counter()
    stored = checkpoint.stored
    for path, shape in parameter_shapes(checkpoint.config).items():
        # What is packed counts as what it stands for.
        packed = checkpoint.quantization if is_quantized(path) else None
        sizes[packed or str(stored[path].dtype)] += math.prod(shape)
    yield "stored      " + ", ".join(f"{count / 1e6:.1f} M in {dtype}" for dtype, count in sizes.items())
    if checkpoint.quantization:
        scales = sum(math.prod(leaf.shape) for path, leaf in stored.items() if path[-1] == KERNEL_SCALE)
        size = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in stored.values())
        yield f"quantised   for scoring only: {scales / 1e6:.1f} M scales in float32, {size / 1e6:.1f} MB in all"
    for key in ("source", "base"):
        if checkpoint.provenance.get(key):
            yield f"{key:<12}{checkpoint.provenance[key]}"
    for name, digest in checkpoint.provenance.get("files", {}).items():
        yield f"sha256      {digest}  {name}"


def _published(folder: Path) -> Iterator[str]:
    problems: list[str] = []
    published = open_published(folder, problems)
    if published:
        problems += account(published.config, parameter_shapes(published.config), published.tensors)
    if problems or not published:
        raise ConversionError(problems)
    yield f"{folder}: a published checkpoint, which `deqa convert` can convert"
    yield from _model(published.config)
    sizes: collections.Counter[str] = collections.Counter()
    for tensor in published.tensors.values():
        sizes[str(tensor.dtype)] += tensor.num_bytes
    yield "stored      " + ", ".join(f"{size / 1e6:.1f} MB in {dtype}" for dtype, size in sizes.items())
    for path in published.weight_files:
        yield f"file        {path.name}"


def _model(config: DeqaConfig) -> Iterator[str]:
    counts: collections.Counter[str] = collections.Counter()
    for path, shape in parameter_shapes(config).items():
        counts[path[0]] += math.prod(shape)
    yield f"parameters  {sum(counts.values()) / 1e6:.1f} M"
    vision, abstractor, language = config.vision, config.abstractor, config.language
    yield (
        f"vision      {counts['vision'] / 1e6:.1f} M: {vision.num_layers} layers of {vision.hidden_size}, "
        f"{vision.image_size} pixels in patches of {vision.patch_size}"
    )
    yield (
        f"abstractor  {counts['abstractor'] / 1e6:.1f} M: {abstractor.num_layers} layers of {abstractor.hidden_size}, "
        f"{abstractor.num_queries} queries"
    )
    yield (
        f"language    {counts['language'] / 1e6:.1f} M: {language.num_layers} layers of {language.hidden_size}, "
        f"vocabulary of {language.vocab_size}"
    )
