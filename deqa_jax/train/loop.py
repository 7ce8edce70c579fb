"""`deqa train`: a run from its configuration to its best checkpoint, through any number of interruptions.

The folder of a run has:

    config.yaml       the configuration, every entry said
    log.jsonl         a line a step, and a line an evaluation
    checkpoints/      what the run is resumed from (Orbax)
    best-<step>/      the checkpoint that evaluated best, or the last one; `deqa score --model` takes it
    tensorboard/      the log again, where tensorboardX is installed
"""

import contextlib
import dataclasses
import logging
import math
import signal
import sys
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from deqa_jax.checkpoint import Checkpoint
from deqa_jax.compilation import use_compilation_cache
from deqa_jax.config import ConfigError
from deqa_jax.data.pipeline import TrainingData, open_sets
from deqa_jax.distributed import check_shared, first_goes_first, is_first
from deqa_jax.files import write_text
from deqa_jax.parameters import Leaves, ParamPath
from deqa_jax.scoring_program import check_fit
from deqa_jax.sharding import batch_shards, check_memory, feed, make_mesh
from deqa_jax.train.evaluation import Evaluator, open_held_out
from deqa_jax.train.log import Log
from deqa_jax.train.objective import Batch, Objective
from deqa_jax.train.program import Program
from deqa_jax.train.saving import Best, Progress, Saver
from deqa_jax.train.settings import CONFIG_FILE, TrainConfig, read_config, write_config
from deqa_jax.train.step import TrainState

LOG_FILE = "log.jsonl"

_logger = logging.getLogger(__name__)


class TrainingError(RuntimeError):
    """A run that cannot go on; the message says why and what to do."""


def train(config: TrainConfig) -> Path:
    """Starts a run, or goes on with one.

    Returns:
      The folder of the best checkpoint: the one of the highest SRCC, or the last one if nothing is evaluated.

    Raises:
      ConfigError: the configuration does not fit the model or the run that its folder has.
      MetaError: training or held-out metas are missing or malformed.
      CheckpointError, ConversionError: the model cannot be opened.
      DistributedError: processes do not share the output's folder.
      TrainingError: the loss is no number any more; or the run was asked to stop, and what was reached is saved; or it
        is finished, and its best checkpoint is gone.
    """
    use_compilation_cache()
    folder = Path(config.output)
    run = _Run(config)
    check_shared(folder)
    with first_goes_first():
        _claim(folder, config)
    saver = Saver(
        folder,
        run.checkpoint,
        config.lora,
        keep=config.checkpoint.keep,
        batch_size=run.program.batch_size,
        data=run.data.identity,
    )
    with Log(folder, LOG_FILE, writes=is_first()) as log, saver:
        return run.train(log, saver)


def _claim(folder: Path, config: TrainConfig) -> None:
    """Writes the configuration into the run's folder, or sees that it is the one that is there.

    Devices may change while a run is interrupted; that its batches stay the same, the checkpoint sees to.
    """
    path = folder / CONFIG_FILE
    if not path.exists():
        write_text(path, write_config(config))
        return
    saved = read_config(path)
    here = dataclasses.replace(config, mesh=saved.mesh, batch_size_per_device=saved.batch_size_per_device)
    before, text = write_config(saved).splitlines(), write_config(here).splitlines()
    if before != text:
        changed = [line.strip() for line in text if line not in before]
        raise ConfigError(
            f"{folder} has a run of another configuration (now {', '.join(changed) or 'less is said'}); "
            "give the same one to go on, or another output"
        )


def needed_fields(objective: Objective, *, pairs: bool) -> list[str]:
    """Fields that metas of the rating task must have for this objective."""
    needed = ["level_probs"] * objective.softkl_loss
    if pairs:
        needed += ["gt_score"] + ["std"] * objective.continuous_rating_loss
    return needed


class _Run:
    """Everything that does not change while a run goes on."""

    def __init__(self, config: TrainConfig):
        # Where a model needs converting first, as for the scorer.
        from deqa_jax.convert.to_jax import resolve

        self.config = config
        mesh = make_mesh(config.mesh)
        with first_goes_first():
            self.checkpoint = Checkpoint.open(resolve(config.model))
        self.checkpoint.require_exact("training")
        preprocess = self.checkpoint.preprocess()
        _, level_ids = check_fit(self.checkpoint, preprocess, "eval")
        self.data = TrainingData(
            open_sets(config.data),
            config.data,
            self.checkpoint.tokenizer(),
            preprocess,
            needed=needed_fields(config.objective, pairs=config.data.pairs),
            seed=config.seed,
        )
        held_out = open_held_out(config.evaluation.metas, config.data.root)
        batch_size = config.batch_size_per_device * mesh.size
        updates = (config.steps or config.epochs * self.data.epoch / batch_size) / config.optimizer.accumulate
        # The last group of batches is a whole one too: nothing would come of the gradients of a part of it.
        self.steps = math.ceil(updates) * config.optimizer.accumulate
        if updates <= 1 and config.optimizer.warmup_ratio:
            _logger.warning("the one update of this run has a learning rate of 0: nothing is learnt in so few steps")
        self.program = Program(
            config, self.checkpoint.config, preprocess, self.data.before, level_ids, steps=self.steps, mesh=mesh
        )
        check_memory("the run's parameters and optimizer", self.program.bytes_per_device(), mesh)
        self.feed = feed(mesh)
        self.evaluate = Evaluator(
            self.checkpoint,
            self.program.task.graph(training=False),
            held_out,
            dtype=config.dtype,
            batch_size=-(-config.evaluation.batch_size // batch_shards(mesh)) * batch_shards(mesh),
            mesh=mesh,
        )
        self.evaluates = bool(held_out)

    # ---- parameters and batches ---------------------------------------------------------------------------

    def first_state(self) -> TrainState:
        """The state before the first step."""
        params = self._restore("float32", self.program.trained.keys() - self.program.adapters.keys())
        params |= self.program.first_adapters()
        return TrainState(self._everywhere(jnp.int32(0)), params, self.program.first_optimizer(params))

    def frozen(self) -> Leaves:
        """Parameters that are not trained, in the dtype that they are used in."""
        return self._restore(self.config.dtype, self.program.frozen_paths)

    def _restore(self, dtype: str, paths: Collection[ParamPath]) -> Leaves:
        return self.checkpoint.restore(dtype, shardings=self.program.shardings, only=paths)

    def _everywhere(self, value: Any) -> Any:
        return jax.device_put(value, self.program.state().step.sharding)

    def batch(self, rows: dict[str, np.ndarray]) -> Batch:
        """This process's rows of a batch, as its part of the whole on the devices."""
        size = self.program.batch_size
        return Batch(
            **{
                name: jax.make_array_from_process_local_data(self.program.batch_sharding, x, (size, *x.shape[1:]))
                for name, x in rows.items()
            }
        )

    # ---- the loop -----------------------------------------------------------------------------------------

    def train(self, log: Log, saver: Saver) -> Path:
        """Runs what is left of the steps."""
        part, parts = self.feed
        rows = self.data.batches(self.program.batch_size, process=part, processes=parts)
        if saved := saver.restore(self.program.state()):
            state, progress, data_state = saved
            rows.set_state(data_state)
            _logger.info("going on after step %d of %d", progress.step, self.steps)
        else:
            state, progress = self.first_state(), Progress()
        frozen = self.frozen()
        log.cut(progress.step)
        if progress.step < self.steps:
            with _until_told_to_stop() as told, self._bar(progress.step) as bar:
                steps = self._steps(state, frozen, rows, progress.step)
                for step, state, metrics, data_state, failure in steps:
                    self._report(log, bar, step, metrics)
                    progress = progress._replace(step=step + 1)
                    if self._is_due(step, self.config.evaluation.every) and self.evaluates:
                        progress = self._evaluated(log, saver, state, frozen, progress)
                    stop = told(step) or failure is not None
                    if self._is_due(step, self.config.checkpoint.every) or stop:
                        saver.save(state, progress, data_state)
                    if stop and step + 1 < self.steps:
                        saver.wait()
                        if failure is not None:
                            _logger.info("saved after step %d of %d; the same command goes on", step + 1, self.steps)
                            raise failure
                        raise TrainingError(
                            f"asked to stop after step {step + 1} of {self.steps}; saved. The same command goes on"
                        )
            saver.wait()
        if progress.best is None:
            saver.save_best(self._to_keep(state, frozen), {}, progress.step)
        best = saver.best_folder(progress)
        if not best.is_dir():
            raise TrainingError(f"{best}, the best checkpoint of this run, is gone; give another output to train again")
        return best

    def _steps(
        self, state: TrainState, frozen: Leaves, rows: Any, start: int
    ) -> Iterator[tuple[int, TrainState, dict[str, Any], Any, Exception | None]]:
        """Steps with their state, metrics, what the data go on from, and why there is no next one.

        The next batch is read as a step runs. Where it cannot be, that step is done nevertheless, and is to be saved;
        one of several processes cannot save alone.
        """
        batch, data_state = self.batch(next(rows)), rows.get_state()
        run = self.program.compile(batch)
        for step in range(start, self.steps):
            state, metrics = run(state, frozen, batch)
            resume_at, failure = data_state, None
            if step + 1 < self.steps:
                try:
                    batch, data_state = self.batch(next(rows)), rows.get_state()
                except Exception as error:
                    if jax.process_count() > 1:
                        raise
                    failure = error
            yield step, state, metrics, resume_at, failure

    def _is_due(self, step: int, every: int) -> bool:
        return (step + 1) % every == 0 or step + 1 == self.steps

    def _bar(self, start: int) -> "tqdm[Any]":
        images = self.program.batch_size * (2 if self.config.data.pairs else 1)
        return tqdm(
            total=self.steps * images,
            initial=start * images,
            unit="image",
            unit_scale=True,
            file=sys.stderr,
            disable=None if is_first() else True,
        )

    def _to_keep(self, state: TrainState, frozen: Leaves) -> Leaves:
        """What a checkpoint of the model has: with adapters, what was trained alone."""
        return state.params if self.config.lora else {**frozen, **state.params}

    def _report(self, log: Log, bar: "tqdm[Any]", step: int, metrics: dict[str, Any]) -> None:
        values = {name: float(value) for name, value in metrics.items() if value.ndim == 0}
        if not all(map(math.isfinite, values.values())):
            wrong = ", ".join(f"{name} {value}" for name, value in values.items() if not math.isfinite(value))
            raise TrainingError(
                f"step {step}: {wrong}; try a lower optimizer.learning_rate, with another output: "
                f"{self.config.output} has the checkpoints before"
            )
        rate = float(self.program.rate(step // self.config.optimizer.accumulate))
        log.step(step, {**values, "learning_rate": rate})
        bar.set_postfix(loss=f"{values['loss']:.4f}", refresh=False)
        bar.update(self.program.batch_size * (2 if self.config.data.pairs else 1))

    def _evaluated(self, log: Log, saver: Saver, state: TrainState, frozen: Leaves, progress: Progress) -> Progress:
        found = self.evaluate({**frozen, **state.params})
        # JSON has no NaN.
        said = {name: value if math.isfinite(value) else None for name, value in found.items()}
        log.evaluation(progress.step, said)
        _logger.info(
            "step %d: held-out loss %.4f, SRCC %.4f, PLCC %.4f, JS %.4f",
            progress.step, found["loss"], found["srcc"], found["plcc"], found["js"],
        )  # fmt: skip
        best = progress.best
        # A correlation that does not exist is worse than any; while there is none, the last model is the best one.
        score = found["srcc"] if math.isfinite(found["srcc"]) else -math.inf
        if best is not None and score <= best.srcc and best.srcc > -math.inf:
            return progress
        saver.save_best(self._to_keep(state, frozen), said, progress.step)
        return progress._replace(best=Best(progress.step, score))


@contextlib.contextmanager
def _until_told_to_stop() -> Iterator[Callable[[int], bool]]:
    """Says after each step whether SIGTERM has come, as it does before a machine is taken away, or Ctrl-C."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        # JAX watches for the signal, and has all processes stop after the same step.
        yield multihost_utils.reached_preemption_sync_point
        return
    told: list[int] = []

    def tell(number: int, frame: Any) -> None:
        told.append(number)
        _logger.info("stopping after this step; Ctrl-C once more stops at once, without saving it")
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {number: signal.signal(number, tell) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda step: bool(told)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
