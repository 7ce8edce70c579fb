"""What runs are made of in tests: a model whose steps cost milliseconds, pictures, and metas of them."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image
from recipe import recipe_tensors, to_ours

from deqa_jax.checkpoint import InMemory, write_checkpoint
from deqa_jax.config import PRESETS, DeqaConfig
from deqa_jax.files import new_folder
from deqa_jax.prompt import LEVELS
from deqa_jax.random_model import random_side_files

_TEST = PRESETS["test"]
TINY = dataclasses.replace(
    _TEST,
    vision=dataclasses.replace(_TEST.vision, image_size=28, num_layers=1),
    abstractor=dataclasses.replace(_TEST.abstractor, num_queries=4, num_layers=1),
    language=dataclasses.replace(_TEST.language, vocab_size=480, num_layers=2),
)
# What is run once need not be fast: programs compile in a third to a fifth of the time.
QUICK_COMPILATION = {"xla_backend_optimization_level": 0, "xla_cpu_parallel_codegen_split_count": 1}
# Later releases have no others.
if jax.__version_info__ < (0, 11):
    QUICK_COMPILATION["xla_cpu_use_fusion_emitters"] = False
QUICK_FLAGS = " ".join(f"--{name}={int(value)}" for name, value in QUICK_COMPILATION.items())
"""The same for commands, as their environment's `XLA_FLAGS`."""
QUESTIONS = (
    "Rate the quality of this image.\n<|image|>",
    "What do you think about the quality of this picture?\n<|image|>",
)


def write_tiny(out: Path, *, seed: int = 0, poison: bool = False, config: DeqaConfig = TINY) -> Path:
    """A converted checkpoint of the golden recipe's weights, float32; poisoned, one of them is no number."""
    leaves = to_ours(config, recipe_tensors(config, seed))
    if poison:
        leaves["language", "final_norm", "scale"][3] = np.nan
    side_files = random_side_files(config.vision.image_size)
    with new_folder(out) as temporary:
        write_checkpoint(
            temporary,
            config=config,
            leaves={path: InMemory(array) for path, array in leaves.items()},
            side_files=side_files,
            published_config=None,
            provenance={"source": f"a test, seed {seed}"},
        )
    return out


def rating(index: int) -> dict[str, Any]:
    """A meta of the rating task, with every field."""
    random = np.random.default_rng(index)
    return {
        "id": f"{index}->{index / 7}",
        "image": f"pictures/{index}.png",
        "gt_score": 100 * float(random.random()),
        "gt_score_norm": 1 + 4 * float(random.random()),
        "std": 5 + 10 * float(random.random()),
        "std_norm": 0.3 + 0.5 * float(random.random()),
        "level_probs": random.dirichlet(np.ones(5)).tolist(),
        "conversations": [
            {"from": "human", "value": QUESTIONS[index % 2]},
            {"from": "gpt", "value": f"The quality of the image is {LEVELS[index % 5]}."},
        ],
    }


def description(index: int, answer: str = "It is noisy and a little dark.") -> dict[str, Any]:
    """A meta of the description task, with what it must have."""
    return {
        "id": f"d{index}",
        "image": f"pictures/{index}.png",
        "task_type": "description",
        "conversations": [
            {"from": "human", "value": "<|image|>Describe the distortion."},
            {"from": "gpt", "value": answer},
        ],
    }


def write_metas(root: Path, name: str, entries: Sequence[dict[str, Any]]) -> Path:
    """Metas, and a picture of 40 to 120 pixels for each of them, below `root`."""
    for entry in entries:
        path = root / entry["image"]
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            random = np.random.default_rng(int(path.stem))
            height, width = random.integers(40, 121, 2)
            Image.fromarray(random.integers(0, 256, (height, width, 3), np.uint8)).save(path)
    (root / name).write_text(json.dumps(entries))
    return root / name
