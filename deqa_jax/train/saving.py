"""What a run leaves on disk: checkpoints to resume from, and the best model so far."""

import contextlib
import hashlib
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp

from deqa_jax.checkpoint import SIDE_FILES, Adapter, Checkpoint, InMemory, write_checkpoint
from deqa_jax.config import ConfigError
from deqa_jax.distributed import first_goes_first, is_first, wait_for_all
from deqa_jax.files import new_folder
from deqa_jax.lora import LoraConfig
from deqa_jax.parameters import Leaves, flatten, unflatten
from deqa_jax.train.settings import CONFIG_FILE
from deqa_jax.train.step import TrainState

CHECKPOINTS = "checkpoints"
_BEST = "best-"


class Best(NamedTuple):
    """The best evaluation so far: after how many steps, and its SRCC."""

    step: int
    srcc: float


class Progress(NamedTuple):
    """How far a run is: steps done, and its best evaluation."""

    step: int = 0
    best: Best | None = None


class Saver:
    """Writes and reads a run's folder; checkpoints are written while training goes on."""

    def __init__(
        self, folder: Path, base: Checkpoint, lora: LoraConfig | None, *, keep: int, batch_size: int, data: str
    ):
        """Opens a folder.

        Args:
          folder: of the run.
          base: what it started from.
          lora: its adapters.
          keep: how many of the last checkpoints are kept.
          batch_size: examples in a batch, over all devices: the place in the data is counted in batches.
          data: `TrainingData.identity` of what it is trained on.
        """
        self._folder, self._base, self._lora, self._batch_size = folder, base, lora, batch_size
        self._origin = {"model": base.identity, "data": data}
        options = ocp.CheckpointManagerOptions(max_to_keep=keep)
        self._manager = ocp.CheckpointManager((folder / CHECKPOINTS).absolute(), options=options)
        # What a run was writing when it was killed.
        with first_goes_first():
            for torn in folder.glob(f".{_BEST}*.tmp"):
                shutil.rmtree(torn, ignore_errors=True)

    def __enter__(self) -> "Saver":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._manager.close()

    def wait(self) -> None:
        """Until everything is written."""
        self._manager.wait_until_finished()

    def save(self, state: TrainState, progress: Progress, data_state: Any) -> None:
        """Everything that the run needs to go on from here."""
        if progress.step in self._manager.all_steps():
            return
        run = {
            "progress": progress.step,
            "best": progress.best and list(progress.best),
            "data": data_state,
            "batch_size": self._batch_size,
            "origin": self._origin,
        }
        self._manager.save(
            progress.step,
            args=ocp.args.Composite(state=ocp.args.StandardSave(_nested(state)), run=ocp.args.JsonSave(run)),
            force=True,
        )

    def restore(self, like: TrainState) -> tuple[TrainState, Progress, Any] | None:
        """The last complete checkpoint, placed as `like` (arrays, or their shapes) is; None if there is none.

        Raises:
          ConfigError: it is of other batches, of another model or of other data.
        """
        step = self._manager.latest_step()
        if step is None:
            return None
        run = self._manager.restore(step, args=ocp.args.Composite(run=ocp.args.JsonRestore()))["run"]
        if run["batch_size"] != self._batch_size:
            raise ConfigError(
                f"{self._folder}: its batches have {run['batch_size']} examples, these devices make {self._batch_size} "
                f"at once; change batch_size_per_device so that it is {run['batch_size']} again"
            )
        began_with = run.get("origin", self._origin)
        if changed := [name for name, identity in self._origin.items() if began_with[name] != identity]:
            raise ConfigError(
                f"{self._folder}: {' and '.join(changed)} changed since this run was interrupted; put back what it "
                "began with to go on, or give another output"
            )
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, _nested(like))
        saved = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(target)))
        best = run["best"] and Best(*run["best"])
        return _flat(saved["state"], like), Progress(run["progress"], best), run["data"]

    # ---- the best model -----------------------------------------------------------------------------------

    def save_best(self, params: Leaves, found: Mapping[str, float | None], step: int) -> None:
        """Writes a checkpoint that `deqa score` takes, in place of the one before.

        Args:
          params: of the whole model; with adapters, those that were trained.
          found: what it evaluated to.
          step: steps done.
        """
        out = self._folder / f"{_BEST}{step}"
        settings = self._folder / CONFIG_FILE
        # A run that does steps again, after it was killed, finds what it wrote before: the same.
        if not out.exists():
            with _new_folder(out) as temporary:
                write_checkpoint(
                    temporary,
                    config=self._base.config,
                    leaves={path: InMemory(array) for path, array in params.items()},
                    side_files={
                        name: (self._base.folder / name).read_bytes()
                        for name in SIDE_FILES
                        if (self._base.folder / name).is_file()
                    },
                    published_config=self._base.published_config,
                    provenance={
                        "source": f"deqa train: {self._folder.name} after {step} steps",
                        "trained_from": self._base.identity,
                        # Tells runs apart whose folders have one name.
                        "settings": hashlib.sha256(settings.read_bytes()).hexdigest() if settings.exists() else None,
                        "evaluation": dict(found),
                    },
                    adapter=None if self._lora is None else Adapter(self._base, self._lora),
                )
        if is_first():
            for other in self._folder.glob(f"{_BEST}*"):
                if other != out:
                    shutil.rmtree(other)

    def best_folder(self, progress: Progress) -> Path:
        """Where the best checkpoint is."""
        return self._folder / f"{_BEST}{progress.best.step if progress.best else progress.step}"


@contextlib.contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """`files.new_folder` for all processes together."""
    if jax.process_count() == 1:
        with new_folder(out) as temporary:
            yield temporary
        return
    temporary = out.parent / f".{out.name}.tmp"
    with first_goes_first():
        temporary.mkdir(exist_ok=True)
    yield temporary
    wait_for_all()
    with first_goes_first():
        if is_first():
            temporary.rename(out)


def _nested(tree: Any) -> Any:
    """Orbax takes dictionaries by name, not by path."""
    return jax.tree.map(lambda x: unflatten(x) if isinstance(x, dict) else x, tree, is_leaf=_is_dict)


def _flat(tree: Any, like: Any) -> Any:
    """The inverse of `_nested`, in the structure of `like`."""
    flat = jax.tree.map(lambda x: flatten(x) if isinstance(x, dict) else x, tree, is_leaf=_is_dict)
    return jax.tree.unflatten(jax.tree.structure(like), jax.tree.leaves(flat))


def _is_dict(x: Any) -> bool:
    return isinstance(x, dict)
