"""Every test runs with eight fake devices, strict dtype and rank promotion, and warnings as errors."""

import os
import signal
import tempfile

# What a shell runs in the background ignores it, and so would every process that a test starts.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Small models take longer to compile than to run: LLVM's passes over a program would double the time of all tests.
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
)
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUMPY_DTYPE_PROMOTION"] = "strict"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
# Nothing in the tests may reach the network, or the user's caches.
os.environ["HF_HUB_OFFLINE"] = "1"
_CACHE = tempfile.TemporaryDirectory(prefix="deqa-tests-")
os.environ["XDG_CACHE_HOME"] = _CACHE.name

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import safetensors.numpy
from recipe import recipe_tensors

from deqa_jax.config import PRESETS, DeqaConfig, to_published
from deqa_jax.random_model import random_side_files

# What one test has compiled no other compiles again, which is a fifth of the time. Apart from what commands in
# processes of their own keep, as a test may kill one of those while it writes.
jax.config.update("jax_compilation_cache_dir", f"{_CACHE.name}/tests")
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)

GOLDEN = Path(__file__).parent / "golden"
SHARED = Path(__file__).resolve().parents[2] / "shared" / "golden"


@pytest.fixture(scope="session")
def shared() -> Path:
    """What may not be copied into the project: the real tokenizer, photographs, `.bin` files."""
    if not SHARED.is_dir():
        pytest.skip(f"needs the files of the PyTorch implementation, which are not part of the project ({SHARED})")
    return SHARED


@pytest.fixture(scope="session")
def golden() -> tuple[dict[str, Any], Mapping[str, np.ndarray]]:
    """`forward.json` and `forward.npz` of the golden model."""
    return json.loads((GOLDEN / "forward.json").read_text()), dict(np.load(GOLDEN / "forward.npz"))


@pytest.fixture(scope="session")
def images() -> Path:
    """The synthetic images, good and bad."""
    return GOLDEN / "images"


@pytest.fixture(scope="session")
def side_files() -> dict[str, bytes]:
    """A small vocabulary and the published preprocessing."""
    return random_side_files()


WritePublished = Callable[..., Path]


@pytest.fixture(scope="session")
def write_published(side_files: dict[str, bytes]) -> WritePublished:
    """Writes a published checkpoint (one safetensors file) of the golden recipe: `(folder, config, seed, tensors)`."""

    def write(
        folder: Path,
        config: DeqaConfig = PRESETS["test"],
        seed: int = 0,
        tensors: Mapping[str, np.ndarray] | None = None,
    ) -> Path:
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(to_published(config)))
        for name, content in side_files.items():
            (folder / name).write_bytes(content)
        weights = recipe_tensors(config, seed) if tensors is None else tensors
        safetensors.numpy.save_file(dict(weights), folder / "model.safetensors")
        return folder

    return write


@pytest.fixture(scope="session")
def published(write_published: WritePublished, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden model as a published folder; read only."""
    return write_published(tmp_path_factory.mktemp("published") / "P")


@pytest.fixture(scope="session")
def converted(published: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, converted to float32; read only."""
    from deqa_jax.convert.to_jax import convert

    out = tmp_path_factory.mktemp("converted") / "M"
    convert(str(published), out, dtype="float32")
    return out


@pytest.fixture
def deqa(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[Any, str, str]]:
    """Runs a command line: exit status, standard output, standard error."""
    from deqa_jax.cli import main

    def run(*arguments: Any) -> tuple[Any, str, str]:
        with pytest.raises(SystemExit) as exit:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return exit.value.code, captured.out, captured.err

    return run
