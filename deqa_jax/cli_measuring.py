"""The command line's measuring commands: `deqa evaluate`, `deqa plan` and `deqa bench`.

Nothing heavy is imported before one of them runs, as in `cli.py`.
"""

import argparse
import contextlib
import json
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deqa_jax.arguments import USAGE_STATUS
from deqa_jax.failures import FAILED, fail

if TYPE_CHECKING:
    from deqa_jax.checkpoint import Checkpoint


def evaluate(options: argparse.Namespace) -> int:
    """Runs `deqa evaluate`; returns the status to exit with."""
    if len(options.pred) != len(options.gt):
        return fail(f"{len(options.pred)} prediction files and {len(options.gt)} metas: give one each", USAGE_STATUS)
    if options.root is not None and options.report is None:
        return fail("--root is for pictures in the report; give --report DIR too", USAGE_STATUS)
    from deqa_jax.data.metas import MetaError
    from deqa_jax.evaluate import EvaluationError, as_json, as_table, evaluate, read_predictions
    from deqa_jax.files import refuse_existing, write_text

    page = None if options.report is None else options.report / "index.html"
    if page is not None:
        try:
            from deqa_jax.report import report_page
        except ModuleNotFoundError as error:
            return fail(f"{error}; reports need an extra: pip install 'deqa-jax[plots]'", FAILED)
        if options.report.exists() and not options.report.is_dir():
            raise NotADirectoryError(f"{options.report} is no folder")
        refuse_existing(page)
    try:
        evaluations = [
            evaluate(
                read_predictions(pred, gt, open_set=options.open_set, allow_missing=options.allow_missing),
                fit=options.fit,
                resamples=options.bootstrap,
                seed=options.seed,
            )
            for pred, gt in zip(options.pred, options.gt, strict=True)
        ]
    except (EvaluationError, MetaError) as error:
        return fail(str(error), FAILED)
    settings = {name: getattr(options, name) for name in ("open_set", "fit", "bootstrap", "seed")}
    if options.format == "json":
        print(as_json(evaluations, settings))
    else:
        print(as_table(evaluations, options.format))
    if page is not None:
        notes = [f"{name}: {value}" for name, value in settings.items()]
        write_text(page, report_page(evaluations, notes=notes, root=options.root))
        print(page, file=sys.stderr)
    return 0


def plan(options: argparse.Namespace) -> int:
    """Runs `deqa plan`; returns the status to exit with."""
    if options.config_path and options.batch_size is not None:
        return fail("--batch-size is for scoring; a configuration has --batch_size_per_device", USAGE_STATUS)
    if options.config_path and options.mesh is not None:
        return fail("--mesh is for scoring; a configuration has --mesh.data, --mesh.fsdp, --mesh.tensor", USAGE_STATUS)
    if options.config_path and options.quantize is not None:
        return fail("--quantize is for scoring; what is quantised cannot be trained", USAGE_STATUS)
    import importlib.util

    if importlib.util.find_spec("libtpu") is None:
        return fail("no compiler for TPUs is installed; planning needs an extra: pip install 'deqa-jax[plan]'", FAILED)
    try:
        from deqa_jax.launch.aot import PlanError, plan_scoring, plan_training
        from deqa_jax.train.settings import read_config
    except ModuleNotFoundError as error:
        return fail(f"{error}; planning needs an extra: pip install 'deqa-jax[plan]'", FAILED)
    from deqa_jax.config import ConfigError, MeshConfig

    wanted = {"search": options.search, "largest": options.largest_batch}
    try:
        if options.config_path:
            named = [("--model", options.model), ("--dtype", options.dtype)]
            overrides = [*options.overrides, *(word for pair in named if pair[1] for word in pair)]
            print(plan_training(read_config(options.config_path, overrides), options.topology, **wanted))
        else:
            given = {"batch_size": options.batch_size, "dtype": options.dtype, "quantization": options.quantize}
            settings = {name: value for name, value in given.items() if value is not None}
            mesh = MeshConfig(**(options.mesh or {"data": -1, "fsdp": 1}))
            print(plan_scoring(options.model or "full", options.topology, mesh=mesh, **settings, **wanted))
    except PlanError as error:
        return fail(str(error), FAILED)
    except ConfigError as error:
        return fail(str(error), USAGE_STATUS)
    return 0


def bench(options: argparse.Namespace) -> int:
    """Runs `deqa bench`; returns the status to exit with."""
    if options.quantize is not None and options.model is not None:
        return fail("--quantize is for random weights; `deqa convert --quantize` makes such a model", USAGE_STATUS)
    from deqa_jax.bench import BenchSettings, check_settings, machine, measure
    from deqa_jax.bench_table import as_table
    from deqa_jax.checkpoint import CheckpointError
    from deqa_jax.config import ConfigError, MeshConfig
    from deqa_jax.convert.tensors import ConversionError

    settings = BenchSettings(
        dtype=options.dtype,
        mesh=options.mesh and MeshConfig(**options.mesh),
        int8_activations=options.int8_activations,
        batch_sizes=tuple(dict.fromkeys(options.batch_size or ())),
        repeats=options.repeats,
        images=options.images,
    )
    try:
        about = machine(check_settings(settings))
    except ConfigError as error:
        return fail(str(error), USAGE_STATUS)
    rows: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="deqa-bench-")))
        try:
            models = _models_to_measure(options, folder)
        except (CheckpointError, ConversionError) as error:
            return fail(str(error), FAILED)
        if options.int8_activations and any(model.quantization != "int8" for model in models.values()):
            return fail("--int8-activations needs int8 kernels: --quantize int8, or a --model of such", USAGE_STATUS)
        if options.json:
            # However this ends, what was measured is said.
            stack.callback(lambda: print(json.dumps({"machine": about, "repeats": options.repeats, "rows": rows})))
        else:
            print(", ".join(f"{name} {value}" for name, value in about.items()), flush=True)
        for row in measure(models, settings, folder):
            rows.append(row)
            if row["error"]:
                fail(f"{row['model']}: {row['error']}", FAILED)
            print(f"\n{as_table(row)}", file=sys.stderr if options.json else sys.stdout, flush=True)
    return FAILED if any(row["error"] for row in rows) else 0


def _models_to_measure(options: argparse.Namespace, folder: Path) -> "dict[str, Checkpoint]":
    """What to call them, and what they are; their side files lie in `folder`."""
    from deqa_jax.checkpoint import Checkpoint
    from deqa_jax.config import PRESETS
    from deqa_jax.convert.to_jax import resolve
    from deqa_jax.random_model import RandomCheckpoint

    if options.model is not None:
        return {options.model: Checkpoint.open(resolve(options.model))}
    print("random weights: they change no timing, and scores mean nothing", file=sys.stderr)
    models: dict[str, Checkpoint] = {}
    for size in options.size or ["small"]:
        (folder / size).mkdir(exist_ok=True)
        models[size] = RandomCheckpoint.make(PRESETS[size], folder / size, options.quantize)
    return models
