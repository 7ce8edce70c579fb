"""What a run says of itself: JSON lines always, TensorBoard where tensorboardX is installed."""

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from deqa_jax.files import write_text


class Log:
    """Appends a line a step and a line an evaluation; a run that goes on cuts off what it does again.

    One that does not write (of several processes only the first does) takes the same calls.
    """

    def __init__(self, folder: Path, name: str, *, writes: bool = True):
        self._writes = writes
        if not writes:
            return
        self._path = folder / name
        self._board: Any = None
        with contextlib.suppress(ModuleNotFoundError):
            from tensorboardX import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"))
        folder.mkdir(parents=True, exist_ok=True)
        self._file = self._path.open("a", encoding="utf-8")

    def __enter__(self) -> "Log":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not self._writes:
            return
        self._file.close()
        if self._board is not None:
            self._board.close()

    def cut(self, step: int) -> None:
        """Forgets what was said of steps from `step` on, and a torn last line."""
        if not self._writes:
            return
        kept = []
        for line in self._path.read_text(encoding="utf-8").splitlines(keepends=True):
            with contextlib.suppress(ValueError):
                entry = json.loads(line)
                # An evaluation comes after its step.
                if line.endswith("\n") and entry["step"] < step + ("evaluation" in entry):
                    kept.append(line)
        self._file.close()
        write_text(self._path, "".join(kept))
        self._file = self._path.open("a", encoding="utf-8")

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """What a step came to."""
        self._write("train", {"step": step, **values}, values)

    def evaluation(self, step: int, values: Mapping[str, float | None]) -> None:
        """What held-out images came to after `step` steps; None for what does not exist."""
        self._write("evaluation", {"step": step, "evaluation": dict(values)}, values)

    def _write(self, group: str, entry: Mapping[str, Any], values: Mapping[str, float | None]) -> None:
        if not self._writes:
            return
        self._file.write(json.dumps(entry) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                if value is not None:
                    self._board.add_scalar(f"{group}/{name}", value, entry["step"])
