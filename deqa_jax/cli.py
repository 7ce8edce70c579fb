"""The command line: what each command runs, and the status it exits with.

Nothing heavy is imported before a command is known, so that it answers at once.
"""

import argparse
import contextlib
import io
import logging
import os
import shlex
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from deqa_jax.arguments import USAGE_STATUS, parser
from deqa_jax.cli_measuring import bench, evaluate, plan
from deqa_jax.failures import FAILED as _FAILED
from deqa_jax.failures import explain
from deqa_jax.failures import fail as _fail

if TYPE_CHECKING:
    from deqa_jax.scorer import Scorer


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs `deqa`. Exits with 0 on complete success, 1 if something failed, 2 on bad usage."""
    whole = parser()
    options, unknown = whole.parse_known_args(arguments)
    options.overrides = unknown
    if unknown and not (options.command == "train" or (options.command == "plan" and options.config_path)):
        whole.error(f"unrecognized arguments: {' '.join(unknown)}")
    if options.version:
        import importlib.metadata

        print(importlib.metadata.version("deqa-jax"))
        sys.exit(0)
    if options.command is None:
        whole.error("name a command")
    # File names need not be text in any encoding: they are read as they are and written with escapes, which JSON
    # understands too.
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("deqa_jax").setLevel(logging.INFO)
    status = _run(options)
    if _several():
        from deqa_jax import distributed

        distributed.fail(status) if status else distributed.leave()
    sys.exit(status)


def _run(options: argparse.Namespace) -> int:
    try:
        status = {
            "score": _score,
            "infer": _infer,
            "evaluate": evaluate,
            "labels": _labels,
            "synth": _synth,
            "train": _train,
            "plan": plan,
            "bench": bench,
            "prepare": _prepare,
            "convert": _convert,
            "export": _export,
            "info": _info,
            "init": _init,
        }[options.command](options)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # The reader of our output went away (`deqa score … | head`); keep Python from complaining about it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _FAILED
    except (Exception, KeyboardInterrupt) as error:
        explained = explain(error)
        if explained is not None:
            return _fail(*explained)
        if not _several():
            raise
        # The other processes of the job wait for this one, and are told by its status.
        traceback.print_exc()
        return _FAILED


def _several() -> bool:
    """Whether this is one of several processes, which nothing is loaded to find out."""
    if "jax" not in sys.modules:
        return False
    from deqa_jax import distributed

    return distributed.several()


def _join() -> None:
    """Becomes one of several processes, if the environment says so. Of their notes, the first one's are enough."""
    from deqa_jax import distributed

    distributed.join()
    if not distributed.is_first():
        logging.getLogger("deqa_jax").setLevel(logging.WARNING)


def _score(options: argparse.Namespace) -> int:
    from deqa_jax.score_files import UsageError, check_new_files, find_images

    try:
        check_new_files(output=options.output, report=options.report)
        paths = find_images(options.paths, sys.stdin)
    except UsageError as error:
        return _fail(str(error), USAGE_STATUS)

    _join()
    from deqa_jax import builtin_model
    from deqa_jax.distributed import several
    from deqa_jax.gallery import new_gallery
    from deqa_jax.score_files import score_files, score_together

    if several() and options.report is not None:
        return _fail("--report is written by one process; run several without it, or one with it", USAGE_STATUS)
    if several() and options.output is None:
        return _fail("several processes need --output FILE, in a folder that all of them share", USAGE_STATUS)
    scorer = _open_scorer(options)
    if isinstance(scorer, str):
        return _fail(scorer, _FAILED)
    if several():
        try:
            failed = score_together(scorer, paths, options.output, format=options.format)
        except UsageError as error:
            return _fail(str(error), USAGE_STATUS)
    else:
        with contextlib.ExitStack() as files:
            also, output = None, sys.stdout
            if options.report is not None:
                also = files.enter_context(new_gallery(options.report, options.model or builtin_model.NAME))
            if options.output is not None:
                output = files.enter_context(options.output.open("x", encoding="utf-8", errors="backslashreplace"))
            failed = score_files(scorer, paths, output, format=options.format, also=also)
    if failed:
        return _fail(f"{failed} of {len(paths)} images could not be scored", _FAILED)
    return 0


def _open_scorer(options: argparse.Namespace) -> "Scorer | str":
    """The model that the options name, or why there is none."""
    from PIL import Image

    from deqa_jax.checkpoint import CheckpointError
    from deqa_jax.config import ConfigError, MeshConfig
    from deqa_jax.convert.tensors import ConversionError
    from deqa_jax.prompt import PromptError
    from deqa_jax.scorer import Scorer

    # Pillow refuses what is twice as large as what it warns of; the warning itself helps nobody here.
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    try:
        return Scorer.from_pretrained(
            options.model,
            dtype=options.dtype,
            batch_size=options.batch_size,
            prompt=options.prompt,
            mesh=options.mesh and MeshConfig(**options.mesh),
            int8_activations=options.int8_activations,
            input_size_limit=options.input_size_limit,
        )
    except (CheckpointError, ConfigError, ConversionError, PromptError) as error:
        return str(error)


def _infer(options: argparse.Namespace) -> int:
    if options.records is not None and options.dataset is None:
        return _fail("--records goes with --dataset", USAGE_STATUS)
    if (options.records is None) == (options.root is None):
        return _fail("say where the images are: --root DIR, or --records DIR for prepared ones", USAGE_STATUS)
    _join()
    from deqa_jax.data.datasets import UnknownDatasetError, named
    from deqa_jax.data.metas import MetaError
    from deqa_jax.infer import InferenceError, infer, metas_of, sets_of_files, sets_of_records

    try:
        datasets = [] if options.dataset is None else named(options.dataset)
        if options.records is not None:
            sets = sets_of_records(datasets, options.records)
        else:
            sets = sets_of_files(options.meta or metas_of(datasets, options.root), options.root)
        scorer = _open_scorer(options)
        if isinstance(scorer, str):
            return _fail(scorer, _FAILED)
        failed = infer(scorer, sets, options.out)
    except UnknownDatasetError as error:
        return _fail(str(error), USAGE_STATUS)
    except (InferenceError, MetaError) as error:
        return _fail(str(error), _FAILED)
    if failed:
        return _fail(f"images that could not be read: {failed}, listed in {options.out / 'errors.jsonl'}", _FAILED)
    return 0


def _labels(options: argparse.Namespace) -> int:
    def given(*names: str) -> dict[str, Any]:
        values = {name: getattr(options, name) for name in names}
        return {name: value for name, value in values.items() if value is not None and value is not False}

    settings, draw = given("image_folder", "density", "scale", "invert"), given("test_ratio", "seed")
    if options.config is not None and (own := [*settings, *draw, *given("out", "column")]):
        return _fail(f"--{own[0].replace('_', '-')} goes with --csv; a configuration says all of it", USAGE_STATUS)
    if options.csv is not None and options.out is None:
        return _fail("say with --out where train.json and test.json go", USAGE_STATUS)
    if options.scale is not None and not options.scale[0] < options.scale[1]:
        return _fail("--scale takes the lowest possible score first, then the highest", USAGE_STATUS)
    from deqa_jax.config import ConfigError
    from deqa_jax.data.opinions import OpinionError
    from deqa_jax.labels import LabelSettings, label_csv, label_published

    try:
        if options.config is not None:
            print(label_published(options.config))
        else:
            columns = dict(options.column or ())
            print(label_csv(options.csv, options.out, LabelSettings(**settings), columns=columns, **draw))
    except (ConfigError, OpinionError) as error:
        return _fail(str(error), _FAILED)
    return 0


def _synth(options: argparse.Namespace) -> int:
    from deqa_jax.data.degradations import UnknownFamilyError, named_families
    from deqa_jax.data.synthetic import LABELS_FILE, SyntheticError, SyntheticSettings, synthesize
    from deqa_jax.preprocess import ImageError, NoImagesError

    settings = {name: getattr(options, name) for name in ("scenes", "versions", "test_ratio", "seed")}
    try:
        if options.families is not None:
            settings["families"] = named_families(options.families)
        synthesize(options.out, SyntheticSettings(**settings), source=options.source)
    except (SyntheticError, NoImagesError, UnknownFamilyError) as error:
        return _fail(str(error), USAGE_STATUS)
    except ImageError as error:
        return _fail(str(error), _FAILED)
    print(f"next: deqa labels --config {shlex.quote(str(options.out / LABELS_FILE))}", file=sys.stderr)
    return 0


def _train(options: argparse.Namespace) -> int:
    from deqa_jax.allocation import keep_freed_memory
    from deqa_jax.checkpoint import CheckpointError
    from deqa_jax.config import ConfigError
    from deqa_jax.convert.tensors import ConversionError
    from deqa_jax.data.metas import MetaError
    from deqa_jax.preprocess import ImageError
    from deqa_jax.prompt import PromptError

    try:
        from deqa_jax.train.loop import TrainingError, train
        from deqa_jax.train.settings import read_config
    except ModuleNotFoundError as error:
        return _fail(f"{error}; training needs an extra: pip install 'deqa-jax[train]'", _FAILED)
    keep_freed_memory()
    _join()
    try:
        best = train(read_config(options.config_path, options.overrides))
    except (CheckpointError, ConfigError, ConversionError, ImageError, MetaError, PromptError, TrainingError) as error:
        return _fail(str(error), _FAILED)
    from deqa_jax.distributed import is_first

    if is_first():
        print(f"best checkpoint: {best}", file=sys.stderr)
        print(best)
    return 0


def _prepare(options: argparse.Namespace) -> int:
    from deqa_jax.data.datasets import UnknownDatasetError, named
    from deqa_jax.data.metas import MetaError

    try:
        from deqa_jax.data.tfds_builders import prepare
    except ModuleNotFoundError as error:
        return _fail(f"{error}; records need an extra: pip install 'deqa-jax[tfds]'", _FAILED)
    try:
        for dataset in named(options.dataset):
            print(prepare(dataset.name, options.root, options.out))
    except UnknownDatasetError as error:
        return _fail(str(error), USAGE_STATUS)
    except MetaError as error:
        return _fail(str(error), _FAILED)
    return 0


def _convert(options: argparse.Namespace) -> int:
    from deqa_jax.checkpoint import CheckpointError
    from deqa_jax.convert.tensors import ConversionError
    from deqa_jax.convert.to_jax import convert

    settings = {"base": options.base, "dtype": options.dtype, "quantization": options.quantize}
    try:
        convert(options.source, options.out, average=options.average, **settings)
    except CheckpointError as error:
        return _fail(str(error), _FAILED)
    except ConversionError as error:
        return _fail(f"{options.source} cannot be converted:\n" + "\n".join(f"  {x}" for x in error.problems), _FAILED)
    return 0


def _export(options: argparse.Namespace) -> int:
    from deqa_jax.checkpoint import CheckpointError
    from deqa_jax.config import ConfigError
    from deqa_jax.convert.tensors import ConversionError
    from deqa_jax.convert.to_peft import export_adapter
    from deqa_jax.convert.to_published import export

    try:
        (export_adapter if options.adapter else export)(options.model, options.out, dtype=options.dtype)
    except (CheckpointError, ConfigError) as error:
        return _fail(str(error), _FAILED)
    except ConversionError as error:
        return _fail(f"{options.model} cannot be exported:\n" + "\n".join(f"  {x}" for x in error.problems), _FAILED)
    return 0


def _info(options: argparse.Namespace) -> int:
    from deqa_jax.checkpoint import CheckpointError
    from deqa_jax.convert.describe import describe
    from deqa_jax.convert.tensors import ConversionError

    try:
        print(describe(options.model))
    except (CheckpointError, ConversionError) as error:
        return _fail(str(error), _FAILED)
    return 0


def _init(options: argparse.Namespace) -> int:
    from deqa_jax.preprocess import ImageError, NoImagesError
    from deqa_jax.random_model import init

    dtype = options.dtype or "float32"
    try:
        init(options.out, size=options.size, seed=options.seed, dtype=dtype, pictures=options.pictures)
    except (NoImagesError, ImageError) as error:
        return _fail(str(error), USAGE_STATUS)
    return 0
