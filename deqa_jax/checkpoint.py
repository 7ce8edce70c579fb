"""The converted-checkpoint folder: `config.json`, `params/` (Orbax), tokenizer and preprocessor files, provenance."""

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from deqa_jax import lora
from deqa_jax.config import ConfigError, DeqaConfig, QuantizedError
from deqa_jax.distributed import is_first
from deqa_jax.files import read_json
from deqa_jax.lora import LoraConfig
from deqa_jax.parameters import Leaves, ParamPath, flatten, parameter_shapes, unflatten
from deqa_jax.preprocess import PreprocessConfig
from deqa_jax.prompt import Tokenizer
from deqa_jax.quantize import parameter_dtype, read_scheme, write_scheme
from deqa_jax.sharding import gather

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

Shardings = Mapping[ParamPath, jax.sharding.Sharding]


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


class InMemory:
    """A parameter that is in memory already; that of all processes together, if there are several."""

    def __init__(self, array: jax.Array | np.ndarray):
        self.shape = array.shape
        self.dtype = np.dtype(array.dtype)
        self._array = array

    def read(self) -> np.ndarray:
        """On the host."""
        return gather(self._array)


# ---- writing ----------------------------------------------------------------------------------------------


def write_checkpoint(
    folder: Path,
    *,
    config: DeqaConfig,
    leaves: Mapping[ParamPath, Leaf],
    side_files: Mapping[str, bytes],
    published_config: Mapping[str, Any] | None,
    provenance: Mapping[str, Any],
    adapter: "Adapter | None" = None,
    quantization: str | None = None,
    progress: Callable[[int], object] = lambda done: None,
    alone: bool = False,
) -> None:
    """Fills an empty folder (see `new_folder`) with a checkpoint, one parameter in memory at a time.

    Of several processes all call it, and the first one writes; or any one does for itself, `alone`.

    Args:
      folder: where to write.
      config: the model's.
      leaves: every parameter of the model; of an adapter, those that were trained.
      side_files: contents of the tokenizer and preprocessor files.
      published_config: the `config.json` that the checkpoint came with, kept for `deqa export`.
      provenance: where it comes from.
      adapter: what the parameters belong on, if they are not all of the model's.
      quantization: the scheme of `quantize.SCHEMES` that they are in, if they are.
      progress: called with the bytes of each parameter written.
      alone: whether this process writes, and waits for no other.
    """
    _save_params(folder / PARAMS_FOLDER, leaves, progress, alone=alone)
    if not (alone or is_first()):
        return
    for name, content in side_files.items():
        (folder / name).write_bytes(content)
    written = {
        "format": _FORMAT,
        "version": _VERSION,
        "model": dataclasses.asdict(config),
        "published": published_config,
    }
    if adapter is not None:
        base = {"folder": str(adapter.base.folder.absolute()), "identity": adapter.base.identity}
        written["adapter"] = {"base": base, "lora": adapter.lora and dataclasses.asdict(adapter.lora)}
    if quantization is not None:
        written["quantization"] = write_scheme(quantization)
    (folder / CONFIG_FILE).write_text(json.dumps(written, indent=2) + "\n")
    (folder / PROVENANCE_FILE).write_text(json.dumps(provenance, indent=2) + "\n")


def _save_params(
    path: Path, leaves: Mapping[ParamPath, Leaf], progress: Callable[[int], object], *, alone: bool
) -> None:
    import orbax.checkpoint as ocp
    import tensorstore

    writer = jax.process_index() if alone else 0
    processes = ocp.options.MultiprocessingOptions(primary_host=writer, active_processes={writer} if alone else None)

    class Streamed:
        """Wraps a leaf in a type of its own, which Orbax hands to the handler below."""

        def __init__(self, leaf: Leaf):
            self.leaf = leaf
            self.shape = leaf.shape
            self.dtype = leaf.dtype

    class StreamedHandler(ocp.type_handlers.NumpyHandler):
        """Writes one leaf after the other, so that only one is in memory; Orbax's own writes in process 0 only."""

        async def serialize(self, values: Any, infos: Any, args: Any = None) -> list[Any]:
            for value, info, arg in zip(values, infos, args, strict=True):
                array = value.leaf.read()
                if jax.process_index() == writer:
                    shape, ocdbt = array.shape, info.is_ocdbt_checkpoint
                    spec = ocp.type_handlers.get_json_tspec_write(
                        info, ocdbt, shape, shape, array.dtype, process_index=writer, arg=arg
                    )
                    store = await tensorstore.open(tensorstore.Spec(spec), create=True, context=info.ts_context)
                    await store.write(array, can_reference_source_data_indefinitely=True)
                progress(array.nbytes)
                # Before the next one is made: the name alone would keep it.
                del array
            return []

    class Checkpointer(ocp.Checkpointer):
        def synchronize_next_awaitable_signal_operation_id(self) -> None:
            # All processes count what they save together; what one saves alone is not counted, or they would differ.
            if not alone:
                super().synchronize_next_awaitable_signal_operation_id()

    registry = ocp.type_handlers.create_type_handler_registry(
        (jax.Array, ocp.type_handlers.ArrayHandler()), (Streamed, StreamedHandler())
    )
    tree = unflatten({path: Streamed(leaf) for path, leaf in leaves.items()})
    save_args = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES), tree)
    handler = ocp.PyTreeCheckpointHandler(type_handler_registry=registry, multiprocessing_options=processes)
    with Checkpointer(handler, multiprocessing_options=processes) as checkpointer:
        checkpointer.save(path.absolute(), args=ocp.args.PyTreeSave(tree, save_args=save_args))


# ---- reading ----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Adapter:
    """What a checkpoint of trained parameters alone belongs on.

    Attributes:
      base: has every parameter that was not trained.
      lora: the adapters' settings; None if none were trained.
    """

    base: "Checkpoint"
    lora: LoraConfig | None


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A converted checkpoint, opened; parameters are read when asked for.

    One of trained parameters alone reads like a whole one: what is not in it comes from its base, and low-rank adapters
    are added to their kernels.

    Attributes:
      folder: where it lies.
      config: the model's.
      published_config: the `config.json` of the published checkpoint it came from, if it did.
      provenance: what `provenance.json` says.
      adapter: what it belongs on, if it has trained parameters alone.
      quantization: the scheme of `quantize.SCHEMES` that its kernels are in, if they are.
    """

    folder: Path
    config: DeqaConfig
    published_config: dict[str, Any] | None
    provenance: dict[str, Any]
    adapter: Adapter | None = None
    quantization: str | None = None

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
            quantization = read_scheme(written.get("quantization"))
            provenance = read_json(folder / PROVENANCE_FILE)
        except (ConfigError, OSError) as error:
            raise CheckpointError(f"{folder}: {error}; convert the checkpoint again") from error
        missing = [name for name in (PARAMS_FOLDER, *SIDE_FILES[:2]) if not (folder / name).exists()]
        if missing:
            raise CheckpointError(f"{folder}: {', '.join(missing)} missing; convert the checkpoint again")
        adapter = _open_adapter(folder, written["adapter"]) if written.get("adapter") else None
        if adapter is not None and adapter.base.config != config:
            raise CheckpointError(f"{folder}: its base {adapter.base.folder} is another model")
        return cls(folder, config, written.get("published"), provenance, adapter, quantization)

    def require_exact(self, purpose: str) -> None:
        """Raises `QuantizedError` if kernels are quantised: what is made of them would not show what it has lost."""
        if self.quantization is not None:
            raise QuantizedError(
                f"{self.folder}: its weights are quantised ({self.quantization}), which is for scoring only; {purpose} "
                "starts from the checkpoint that it was made from"
            )

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
        dtypes = {"/".join(path): str(leaf.dtype) for path, leaf in self.stored.items()}
        files = [(self.folder / name).read_bytes() for name in (TOKENIZER_FILE, PREPROCESSOR_FILE)]
        digests = [hashlib.sha256(content).hexdigest() for content in files]
        parts = [dataclasses.asdict(self.config), _made_of(self.provenance), dtypes, digests]
        parts += [] if self.quantization is None else [self.quantization]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    @functools.cached_property
    def stored(self) -> dict[ParamPath, jax.ShapeDtypeStruct]:
        """Shape and dtype of every parameter of the model, by path.

        Raises:
          CheckpointError: they cannot be read, or are not the parameters of this model.
        """
        stored = {path: leaf for path, leaf in self.own.items() if path[-1] not in (lora.A, lora.B)}
        if self.adapter is not None:
            stored = {**self.adapter.base.stored, **stored}
            for path in self._adapted:
                stored[path] = jax.ShapeDtypeStruct(stored[path].shape, np.float32)
        return stored

    @functools.cached_property
    def own(self) -> dict[ParamPath, jax.ShapeDtypeStruct]:
        """The same of what lies in this folder, adapters included."""
        import orbax.checkpoint as ocp

        try:
            with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
                metadata = checkpointer.metadata(self._params).item_metadata
            if metadata is None:
                raise ValueError("its description is missing")
            own = {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in flatten(metadata.tree).items()}
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{self._params}: damaged ({error}); {self._remedy}") from error
        shapes = parameter_shapes(self.config, self.quantization)
        required = shapes.keys()
        if self.adapter is not None:
            adapters = lora.adapter_shapes(shapes, self.adapter.lora) if self.adapter.lora else {}
            shapes, required = {**shapes, **adapters}, adapters.keys()
        wrong = {"/".join(path) for path in (own.keys() - shapes.keys()) | (required - own.keys())}
        wrong |= {"/".join(path) for path in shapes.keys() & own.keys() if shapes[path] != own[path].shape}
        if wrong:
            raise CheckpointError(
                f"{self.folder}: {', '.join(sorted(wrong))} do not fit its {CONFIG_FILE}; {self._remedy}"
            )
        return own

    def restore(
        self,
        dtype: str | None = None,
        *,
        shardings: Shardings | None = None,
        only: Collection[ParamPath] | None = None,
    ) -> Leaves:
        """Reads parameters.

        Args:
          dtype: to cast to while reading, but for what is quantised; as stored without it.
          shardings: where to put them, by path: each device's part is read for it alone. Without it, host memory, as
            NumPy arrays.
          only: paths of those to read; all without it.
        """
        wanted = {path: leaf for path, leaf in self.stored.items() if only is None or path in only}
        if self.adapter is None:
            return self._restore(wanted, dtype, shardings)
        adapted = [path for path in self._adapted if path in wanted]
        here = {path: leaf for path, leaf in wanted.items() if path in self.own and path not in adapted}
        leaves = self._restore(here, dtype, shardings)
        leaves |= self.adapter.base.restore(dtype, shardings=shardings, only=wanted.keys() - here.keys() - set(adapted))
        for path in adapted:
            merged = self.read_leaf(path).astype(dtype or np.float32)
            leaves[path] = merged if shardings is None else jax.device_put(merged, shardings[path])
        return leaves

    def read_leaf(self, path: ParamPath) -> np.ndarray:
        """Reads one parameter into host memory."""
        if self.adapter is None or (path in self.own and path not in self._adapted):
            return self._restore({path: self.own[path]}, None, None)[path]
        # A kernel may have been trained beside its adapter.
        base = self.read_own(path) if path in self.own else self.adapter.base.read_leaf(path)
        if path not in self._adapted or self.adapter.lora is None:
            return base
        a, b = (self.read_own((*path[:-1], name)) for name in (lora.A, lora.B))
        return lora.merge(base, a, b, self.adapter.lora.scale)

    def read_own(self, path: ParamPath) -> np.ndarray:
        """Reads one parameter of this folder, adapters included, into host memory."""
        return self._restore({path: self.own[path]}, None, None)[path]

    @property
    def _adapted(self) -> list[ParamPath]:
        """Kernels that low-rank adapters are added to."""
        return [(*path[:-1], "kernel") for path in self.own if path[-1] == lora.A]

    @property
    def _remedy(self) -> str:
        return "convert the checkpoint again" if self.adapter is None else "take another checkpoint of the run"

    @property
    def _params(self) -> Path:
        return (self.folder / PARAMS_FOLDER).absolute()

    def _restore(
        self, wanted: Mapping[ParamPath, jax.ShapeDtypeStruct], dtype: str | None, shardings: Shardings | None
    ) -> Leaves:
        import orbax.checkpoint as ocp

        if not wanted:
            return {}

        def restore_args(path: ParamPath, leaf: jax.ShapeDtypeStruct) -> ocp.RestoreArgs:
            target = parameter_dtype(path, self.quantization, dtype) if dtype else np.dtype(leaf.dtype)
            if shardings is None:
                return ocp.RestoreArgs(restore_type=np.ndarray, dtype=target)
            return ocp.ArrayRestoreArgs(sharding=shardings[path], dtype=target)

        arguments = ocp.args.PyTreeRestore(
            item=unflatten(dict(wanted)),
            restore_args=unflatten({path: restore_args(path, leaf) for path, leaf in wanted.items()}),
            partial_restore=True,
        )
        try:
            with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
                return flatten(checkpointer.restore(self._params, args=arguments))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self._params}: damaged ({error}); {self._remedy}") from error


def _made_of(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """What of a provenance is in an identity; likewise of the models that a mean is of besides the first."""
    called = {"versions", "model", *(("source", "base") if provenance.get("files") else ())}
    made_of = {key: value for key, value in provenance.items() if key not in called}
    if others := made_of.get("averaged_with"):
        made_of["averaged_with"] = [_made_of(other) for other in others]
    return made_of


def _open_adapter(folder: Path, written: Any) -> Adapter:
    try:
        base_folder, identity = written["base"]["folder"], written["base"]["identity"]
        settings = written["lora"]
        config = settings and LoraConfig(**{**settings, "targets": tuple(settings["targets"])})
    except (KeyError, TypeError, ConfigError) as error:
        raise CheckpointError(f"{folder}: its {CONFIG_FILE} does not say what it belongs on ({error!r})") from error
    try:
        base = Checkpoint.open(base_folder)
    except CheckpointError as error:
        raise CheckpointError(
            f"{folder}: was trained on {base_folder}, which cannot be opened ({error}); "
            f"if it has moved, correct its {CONFIG_FILE}"
        ) from error
    if base.identity != identity:
        raise CheckpointError(f"{folder}: was trained on another checkpoint than {base_folder} is now")
    return Adapter(base, config)
