"""The converted-checkpoint folder: `config.json`, `params/` (Orbax), tokenizer and preprocessor files, provenance."""

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from flax import nnx

from deqa_jax.config import ConfigError, DeqaConfig, Execution
from deqa_jax.files import read_json
from deqa_jax.model.deqa import Deqa
from deqa_jax.preprocess import PreprocessConfig
from deqa_jax.prompt import Tokenizer

CONFIG_FILE = "config.json"
PARAMS_FOLDER = "params"
PROVENANCE_FILE = "provenance.json"
TOKENIZER_FILE = "tokenizer.model"
PREPROCESSOR_FILE = "preprocessor_config.json"
SIDE_FILES = (
    TOKENIZER_FILE,
    PREPROCESSOR_FILE,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
)
"""Files that travel with the weights; the first two are required."""

_FORMAT = "deqa-jax"
_VERSION = 1
# Written in pieces of this size: less memory to write, and a sharded restore reads only what it needs.
_CHUNK_BYTES = 64 << 20

ParamPath = tuple[str, ...]
Leaves = dict[ParamPath, Any]
"""Parameters by path: `("language", "layers", "query", "kernel")` -> array."""


class CheckpointError(ValueError):
    """A folder that is no converted checkpoint, or a damaged one; the message says what to do."""


class Leaf(Protocol):
    """A parameter that is made when it is written."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Known before the values are."""

    @property
    def dtype(self) -> np.dtype:
        """Likewise."""

    def read(self) -> np.ndarray:
        """The values."""


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder calls itself a converted checkpoint."""
    try:
        return read_json(folder / CONFIG_FILE).get("format") == _FORMAT
    except (ConfigError, OSError):
        return False


def abstract_model(config: DeqaConfig, execution: Execution = Execution()) -> Deqa:
    """The model with shapes in place of arrays."""
    return nnx.eval_shape(lambda: Deqa(config, execution=execution, rngs=nnx.Rngs(0)))


def flatten(tree: Mapping[str, Any]) -> Leaves:
    """Nested dicts to a flat one with paths for keys.

    >>> flatten({"a": {"b": 1}})
    {('a', 'b'): 1}
    """
    flat: Leaves = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= {(key, *path): leaf for path, leaf in flatten(value).items()}
        else:
            flat[(key,)] = value
    return flat


def unflatten(leaves: Mapping[tuple[Any, ...], Any]) -> dict[Any, Any]:
    """The inverse of `flatten`."""
    tree: dict[Any, Any] = {}
    for path, leaf in leaves.items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = leaf
    return tree


@functools.cache
def parameter_shapes(config: DeqaConfig) -> dict[ParamPath, tuple[int, ...]]:
    """Shape of every parameter of a model, by path."""
    state = nnx.to_pure_dict(nnx.state(abstract_model(config)))
    return {path: leaf.shape for path, leaf in flatten(state).items()}


# ---- writing ----------------------------------------------------------------------------------------------


def write_checkpoint(
    folder: Path,
    *,
    config: DeqaConfig,
    leaves: Mapping[ParamPath, Leaf],
    side_files: Mapping[str, bytes],
    published_config: Mapping[str, Any] | None,
    provenance: Mapping[str, Any],
    progress: Callable[[int], object] = lambda done: None,
) -> None:
    """Fills an empty folder (see `new_folder`) with a checkpoint, one parameter in memory at a time.

    Args:
      folder: where to write.
      config: the model's.
      leaves: every parameter of the model.
      side_files: contents of the tokenizer and preprocessor files.
      published_config: the `config.json` that the checkpoint came with, kept for `deqa export`.
      provenance: where it comes from.
      progress: called with the bytes of each parameter written.
    """
    _save_params(folder / PARAMS_FOLDER, leaves, progress)
    for name, content in side_files.items():
        (folder / name).write_bytes(content)
    written = {
        "format": _FORMAT,
        "version": _VERSION,
        "model": dataclasses.asdict(config),
        "published": published_config,
    }
    (folder / CONFIG_FILE).write_text(json.dumps(written, indent=2) + "\n")
    (folder / PROVENANCE_FILE).write_text(json.dumps(provenance, indent=2) + "\n")


def _save_params(path: Path, leaves: Mapping[ParamPath, Leaf], progress: Callable[[int], object]) -> None:
    import orbax.checkpoint as ocp

    class Streamed:
        """Wraps a leaf in a type of its own, which Orbax hands to the handler below."""

        def __init__(self, leaf: Leaf):
            self.leaf = leaf
            self.shape = leaf.shape
            self.dtype = leaf.dtype

    class StreamedHandler(ocp.type_handlers.NumpyHandler):
        """Writes one leaf after the other, so that only one is in memory, in the form of a NumPy array."""

        async def serialize(self, values: Any, infos: Any, args: Any = None) -> list[Any]:
            for value, info, arg in zip(values, infos, args, strict=True):
                array = value.leaf.read()
                for future in await super().serialize([array], [info], [arg]):
                    future.result()
                progress(array.nbytes)
            return []

    registry = ocp.type_handlers.create_type_handler_registry(
        (jax.Array, ocp.type_handlers.ArrayHandler()), (Streamed, StreamedHandler(deepcopy_host_arrays=False))
    )
    tree = unflatten({path: Streamed(leaf) for path, leaf in leaves.items()})
    save_args = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES), tree)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(type_handler_registry=registry)) as checkpointer:
        checkpointer.save(path.absolute(), args=ocp.args.PyTreeSave(tree, save_args=save_args))


# ---- reading ----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A converted checkpoint, opened; parameters are read when asked for.

    Attributes:
      folder: where it lies.
      config: the model's.
      published_config: the `config.json` of the published checkpoint it came from, if it did.
      provenance: what `provenance.json` says.
    """

    folder: Path
    config: DeqaConfig
    published_config: dict[str, Any] | None
    provenance: dict[str, Any]

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> "Checkpoint":
        """Opens a folder that `deqa convert` or `deqa init` made.

        Raises:
          CheckpointError: it is none, or incomplete.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise CheckpointError(f"{folder}: no such folder")
        try:
            written = read_json(folder / CONFIG_FILE)
            if written.get("format") != _FORMAT:
                raise CheckpointError(f"{folder}: not a converted checkpoint; `deqa convert` makes one")
            if written.get("version") != _VERSION:
                raise CheckpointError(
                    f"{folder}: format version {written.get('version')}, this program reads {_VERSION}; "
                    "convert the published checkpoint again"
                )
            config = DeqaConfig.from_dict(written.get("model"))
            provenance = read_json(folder / PROVENANCE_FILE)
        except (ConfigError, OSError) as error:
            raise CheckpointError(f"{folder}: {error}; convert the checkpoint again") from error
        missing = [name for name in (PARAMS_FOLDER, *SIDE_FILES[:2]) if not (folder / name).exists()]
        if missing:
            raise CheckpointError(f"{folder}: {', '.join(missing)} missing; convert the checkpoint again")
        return cls(folder, config, written.get("published"), provenance)

    def tokenizer(self) -> Tokenizer:
        """The checkpoint's tokenizer."""
        return Tokenizer(self.folder / TOKENIZER_FILE)

    def preprocess(self) -> PreprocessConfig:
        """The checkpoint's preprocessing. Raises `CheckpointError` if its file is damaged."""
        try:
            return PreprocessConfig.from_published(read_json(self.folder / PREPROCESSOR_FILE))
        except (ConfigError, OSError) as error:
            raise CheckpointError(f"{self.folder}: {error}; convert the checkpoint again") from error

    @functools.cached_property
    def identity(self) -> str:
        """A short name that two checkpoints share if they were made from the same files in the same way.

        It does not depend on where they lie, on what their source was called or on which versions made them.
        """
        made_of = {key: value for key, value in self.provenance.items() if key != "versions"}
        if made_of.get("files"):
            made_of.pop("source", None)
            made_of.pop("base", None)
        dtypes = {"/".join(path): str(leaf.dtype) for path, leaf in self.stored.items()}
        parts = [dataclasses.asdict(self.config), made_of, dtypes]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    @functools.cached_property
    def stored(self) -> dict[ParamPath, jax.ShapeDtypeStruct]:
        """Shape and dtype of every stored parameter, by path.

        Raises:
          CheckpointError: they cannot be read, or are not the parameters of this model.
        """
        import orbax.checkpoint as ocp

        try:
            with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
                metadata = checkpointer.metadata(self._params).item_metadata
            if metadata is None:
                raise ValueError("its description is missing")
            stored = {
                path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in flatten(metadata.tree).items()
            }
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{self._params}: damaged ({error}); convert the checkpoint again") from error
        shapes = parameter_shapes(self.config)
        wrong = sorted("/".join(path) for path in shapes.keys() ^ stored.keys())
        wrong += ["/".join(path) for path in shapes.keys() & stored.keys() if shapes[path] != stored[path].shape]
        if wrong:
            raise CheckpointError(f"{self.folder}: {', '.join(wrong)} do not fit its {CONFIG_FILE}; convert it again")
        return stored

    def restore(self, dtype: str | None = None, *, device: jax.Device | None = None) -> Leaves:
        """Reads all parameters.

        Args:
          dtype: to cast to while reading; as stored without it.
          device: where to put them; host memory, as NumPy arrays, without it.
        """
        return self._restore(self.stored, dtype, device)

    def read_leaf(self, path: ParamPath) -> np.ndarray:
        """Reads one parameter into host memory."""
        return self._restore({path: self.stored[path]}, None, None)[path]

    @property
    def _params(self) -> Path:
        return (self.folder / PARAMS_FOLDER).absolute()

    def _restore(
        self, wanted: Mapping[ParamPath, jax.ShapeDtypeStruct], dtype: str | None, device: jax.Device | None
    ) -> Leaves:
        import orbax.checkpoint as ocp

        def restore_args(leaf: jax.ShapeDtypeStruct) -> ocp.RestoreArgs:
            target = np.dtype(dtype or leaf.dtype)
            if device is None:
                return ocp.RestoreArgs(restore_type=np.ndarray, dtype=target)
            return ocp.ArrayRestoreArgs(sharding=jax.sharding.SingleDeviceSharding(device), dtype=target)

        item = unflatten(dict(wanted))
        arguments = ocp.args.PyTreeRestore(
            item=item, restore_args=jax.tree.map(restore_args, item), partial_restore=True
        )
        try:
            with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
                return flatten(checkpointer.restore(self._params, args=arguments))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self._params}: damaged ({error}); convert the checkpoint again") from error
