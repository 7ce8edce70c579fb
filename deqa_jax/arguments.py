"""What the command line takes: every command, its options, and an example of each.

Nothing heavy is imported here, so that `deqa --help` answers at once.
"""

import argparse
from pathlib import Path
from typing import NoReturn

from deqa_jax.option_values import column, names, number, seed, share, whole_number, whole_numbers
from deqa_jax.shared_options import (
    MOST_IMAGES,
    add_dtype,
    add_int8_activations,
    add_mesh,
    add_model,
    add_quantize,
    add_stored_dtype,
)

USAGE_STATUS = 2
"""What bad usage exits with."""

# Those of `config.PRESETS`, which would take JAX to load.
_SIZES = ("test", "tiny", "small", "mid", "full")


class _Parser(argparse.ArgumentParser):
    """Says where help is to be had."""

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE_STATUS, f"{self.prog}: {message}\nTry `{self.prog} --help`.\n")


# ---- options ----------------------------------------------------------------------------------------------


def _score(score: argparse.ArgumentParser) -> None:
    score.add_argument(
        "paths", nargs="+", metavar="PATH", help="image, folder (searched recursively), glob, or - for a list on stdin"
    )
    add_model(score, prompt="scorer", default="; default: deqa-tiny, which comes with the package")
    score.add_argument(
        "--format", choices=("table", "jsonl", "csv"), default="table", help="of the rows (default: table)"
    )
    score.add_argument("--output", type=Path, metavar="F", help="file to write instead of stdout; must not exist")
    score.add_argument(
        "--report", type=Path, metavar="F", help="page of all pictures and scores to write besides; must not exist"
    )


def _infer(infer: argparse.ArgumentParser) -> None:
    add_model(infer, prompt="eval")
    which = infer.add_mutually_exclusive_group(required=True)
    which.add_argument("--meta", nargs="+", type=Path, metavar="F", help="JSON lists of images")
    which.add_argument(
        "--dataset",
        metavar="NAMES",
        help="test sets with a comma between: koniq, spaq, kadid, pipal, livew, agiqa, tid2013, csiq",
    )
    infer.add_argument("--root", type=Path, metavar="DIR", help="folder that image names start from")
    infer.add_argument(
        "--records", type=Path, metavar="DIR", help="with --dataset: what `deqa prepare` made, in place of --root"
    )
    infer.add_argument(
        "--out",
        required=True,
        type=Path,
        metavar="DIR",
        help="folder of prediction files, each with the name of its metas; goes on with those that are there",
    )


def _evaluate(evaluate: argparse.ArgumentParser) -> None:
    evaluate.add_argument("--pred", required=True, nargs="+", type=Path, metavar="F", help="prediction files")
    evaluate.add_argument(
        "--gt", required=True, nargs="+", type=Path, metavar="F", help="their metas, in the same order"
    )
    evaluate.add_argument(
        "--open-set", action="store_true", help="use the levels' probabilities in the whole vocabulary"
    )
    evaluate.add_argument(
        "--fit",
        choices=("4", "5", "none"),
        default="4",
        help="parameters of the logistic curve between predictions and opinions (default: 4)",
    )
    evaluate.add_argument(
        "--bootstrap",
        type=whole_number(0, 1_000_000),
        default=1000,
        metavar="N",
        help="resamples behind the 95 %% intervals; 0 for none (default: 1000)",
    )
    evaluate.add_argument("--seed", type=seed, default=0, metavar="N", help="of the resamples (default: 0)")
    evaluate.add_argument(
        "--allow-missing", action="store_true", help="leave out images without a prediction, instead of failing"
    )
    formats = evaluate.add_mutually_exclusive_group()
    for format in ("json", "markdown", "latex"):
        formats.add_argument(
            f"--{format}", action="store_const", const=format, dest="format", help=f"print {format}, not a table"
        )
    evaluate.set_defaults(format="table")
    evaluate.add_argument(
        "--report", type=Path, metavar="DIR", help="also write DIR/index.html with plots (needs the extra `plots`)"
    )
    evaluate.add_argument(
        "--root", type=Path, metavar="DIR", help="folder that image names start from, for pictures in the report"
    )


def _labels(labels: argparse.ArgumentParser) -> None:
    source = labels.add_mutually_exclusive_group(required=True)
    source.add_argument("--config", type=Path, metavar="F", help="published JSON configuration; needs nothing else")
    source.add_argument(
        "--csv", type=Path, metavar="F", help="table with columns image, mos and, if known, std, split, reference"
    )
    own = labels.add_argument_group("with --csv")
    own.add_argument("--out", type=Path, metavar="DIR", help="folder for train.json and test.json")
    own.add_argument(
        "--column",
        type=column,
        action="append",
        metavar="COLUMN=NAME",
        help="what a column is called in the file, for example mos=MOS; may be repeated",
    )
    own.add_argument("--image-folder", metavar="DIR", help="written in front of image names")
    own.add_argument(
        "--scale",
        nargs=2,
        type=number,
        metavar=("LOW", "HIGH"),
        help="lowest and highest possible score (default: those that occur)",
    )
    own.add_argument("--invert", action="store_true", help="low scores are good (DMOS)")
    own.add_argument(
        "--density",
        choices=("pdf", "cdf", "none"),
        help="how deviations become levels: pdf as for KonIQ and KADID, cdf as for SPAQ (small deviations), "
        "none for the two neighbouring levels only, as where std is missing (default: pdf)",
    )
    own.add_argument(
        "--test-ratio",
        type=share,
        metavar="R",
        help="without a split column: share of images to test on, all of one reference together (default: 0.2)",
    )
    own.add_argument("--seed", type=seed, metavar="N", help="of that split (default: 0)")


def _synth(synth: argparse.ArgumentParser) -> None:
    synth.add_argument("out", type=Path, metavar="OUT", help="folder to make; must not exist, or be empty")
    for option, default, what in (
        ("--scenes", 100, "different scenes, or pictures to take from --from at most"),
        ("--versions", 10, "pictures of each scene: one as it is, the others degraded"),
    ):
        synth.add_argument(
            option, type=whole_number(1, 1_000_000), default=default, metavar="N", help=f"{what} (default: {default})"
        )
    synth.add_argument(
        "--families",
        metavar="NAMES",
        help="degradations to draw from, such as jpeg,gaussian_blur; any other name lists them all (default: all)",
    )
    synth.add_argument(
        "--from",
        dest="source",
        type=Path,
        metavar="DIR",
        help="degrade the pictures in this folder (searched recursively; good ones) instead of drawing scenes",
    )
    synth.add_argument(
        "--test-ratio", type=share, default=0.2, metavar="R", help="share of scenes to test on (default: 0.2)"
    )
    synth.add_argument("--seed", type=seed, default=0, metavar="N", help="of everything (default: 0)")


def _train(train: argparse.ArgumentParser) -> None:
    train.add_argument("--config_path", required=True, type=Path, metavar="F", help="YAML configuration of the run")
    # The parser of the configuration takes what this one does not know; see `cli.main`.
    train.usage = "deqa train [-h] --config_path F [--ENTRY VALUE ...]"
    train.description = f"{train.description} Any entry can be given here too, with a dot between levels."


def _plan(plan: argparse.ArgumentParser) -> None:
    plan.add_argument("--topology", required=True, metavar="T", help="chips, such as v5e:4x4, v5p:2x2x1 or v6e:2x4")
    plan.add_argument(
        "--config_path", type=Path, metavar="F", help="YAML configuration of a training run; without it, scoring"
    )
    plan.add_argument(
        "--model",
        metavar="M",
        help="a size of `deqa init`, a converted or published folder (default: what the configuration names, or full)",
    )
    plan.add_argument("--search", action="store_true", help="try all meshes and take the best; a compilation for each")
    plan.add_argument(
        "--largest-batch", action="store_true", help="look for the largest batch that fits; several compilations"
    )
    scoring = plan.add_argument_group("for scoring")
    scoring.add_argument(
        "--batch-size", type=whole_number(1, MOST_IMAGES), metavar="N", help="images a device at once (default: 32)"
    )
    scoring.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="of parameters and products (default: bfloat16)"
    )
    add_quantize(scoring, "as if the model were converted so")
    add_mesh(scoring)
    plan.usage = "deqa plan [-h] --topology T [--config_path F [--ENTRY VALUE ...]] [OPTION ...]"
    plan.description = f"{plan.description} With a configuration, any of its entries can be given too, as for training."


def _bench(bench: argparse.ArgumentParser) -> None:
    what = bench.add_mutually_exclusive_group()
    what.add_argument(
        "--size",
        type=names(_SIZES),
        action="extend",
        metavar="NAMES",
        help=f"sizes of `deqa init`, with random weights: {', '.join(_SIZES)} (default: small)",
    )
    what.add_argument("--model", metavar="M", help="converted folder, published folder, or hub id, in their place")
    bench.add_argument(
        "--batch-size",
        type=whole_numbers(1, MOST_IMAGES),
        action="extend",
        metavar="N,…",
        help="images at once, over all devices; a table each (default: 1 on CPU, 32 for each device elsewhere)",
    )
    add_dtype(bench)
    add_quantize(bench, "store the kernels of random weights in 8 or 4 bits")
    add_int8_activations(bench, default="off")
    add_mesh(bench)
    bench.add_argument(
        "--repeats",
        type=whole_number(1, 10_000),
        default=7,
        metavar="N",
        help="runs that each median is of (default: 7)",
    )
    bench.add_argument(
        "--images",
        type=whole_number(1, 1_000_000),
        metavar="N",
        help="JPEG files to score from end to end, best a multiple of the batch (default: 64, or four batches if more)",
    )
    bench.add_argument("--json", action="store_true", help="print one JSON object at the end, not tables")
    bench.description = (
        f"{bench.description} Stages are programs of their own, so their times need not sum up to that of the whole. "
        "Sizes and commas can be repeated: options add up. What does not fit the memory is said in its place, and the "
        "rest is measured all the same."
    )


def _prepare(prepare: argparse.ArgumentParser) -> None:
    prepare.add_argument("--dataset", required=True, metavar="NAMES", help="names with a comma between")
    prepare.add_argument(
        "--root", required=True, type=Path, metavar="DIR", help="folder with the datasets' folders (KONIQ, SPAQ, …)"
    )
    prepare.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder of records")


def _convert(convert: argparse.ArgumentParser) -> None:
    convert.add_argument("source", metavar="SRC", help="folder or hub id")
    convert.add_argument("out", type=Path, metavar="OUT", help="folder to make; must not exist")
    convert.add_argument("--base", metavar="DIR", help="for a LoRA adapter: the full checkpoint it was trained on")
    convert.add_argument(
        "--average",
        action="append",
        default=[],
        metavar="MODEL",
        help="take the mean of the weights with those of this model, of the same sizes; can be repeated",
    )
    add_stored_dtype(convert, "what the source stores; weights merged with an adapter, and means, are float32")
    add_quantize(convert, "store kernels in 8 or 4 bits, for scoring only")


def _export(export: argparse.ArgumentParser) -> None:
    export.add_argument("model", metavar="MODEL", type=Path, help="converted folder")
    export.add_argument("out", type=Path, metavar="OUT", help="folder to make; must not exist")
    export.add_argument(
        "--adapter", action="store_true", help="of a LoRA run: write the adapters for PEFT; without it they are merged"
    )
    add_stored_dtype(export, "what each tensor came with; float32 for what was trained")


def _init(init: argparse.ArgumentParser) -> None:
    init.add_argument("out", type=Path, metavar="OUT", help="folder to make; must not exist")
    init.add_argument(
        "--size",
        choices=_SIZES,
        default="test",
        help="1.2 M (tiny) to 8.2 B parameters (default: test)",
    )
    init.add_argument("--seed", type=seed, default=0, metavar="N", help="of the weights (default: 0)")
    init.add_argument(
        "--pictures",
        type=Path,
        metavar="DIR",
        help="pictures to train on: measured, so that training finds its way sooner",
    )
    add_stored_dtype(init, "float32")


def _info(info: argparse.ArgumentParser) -> None:
    info.add_argument("model", metavar="MODEL", help="converted or published folder")


# ---- all of them ------------------------------------------------------------------------------------------

_COMMANDS = (
    ("score", "score images from 1 (bad) to 5 (excellent)", "deqa score photos/ --model M --format jsonl", _score),
    (
        "infer",
        "predict whole datasets into files that `deqa evaluate` reads; a stopped run goes on where it was",
        "deqa infer --model M --dataset koniq,spaq --root Data-DeQA-Score --out results",
        _infer,
    ),
    (
        "evaluate",
        "compare predictions with human opinion: SRCC and PLCC, KL, JS and Wasserstein",
        "deqa evaluate --pred results/test_koniq_2k.json --gt Data-DeQA-Score/KONIQ/metas/test_koniq_2k.json",
        _evaluate,
    ),
    (
        "labels",
        "make training and test metas with soft labels from opinion scores",
        "deqa labels --csv scores.csv --scale 0 100 --out metas",
        _labels,
    ),
    (
        "synth",
        "make a dataset of degraded pictures with simulated opinions, to try everything with",
        "deqa synth DATA --scenes 200 --seed 1",
        _synth,
    ),
    (
        "train",
        "train on metas, full or LoRA, from a YAML configuration; a stopped run goes on where it was",
        "deqa train --config_path configs/finetune_lora.yaml --model M --optimizer.learning_rate 5e-5",
        _train,
    ),
    (
        "plan",
        "compile a training run, or scoring, for TPUs that are not there: memory, speed at most (extra `plan`)",
        "deqa plan --config_path configs/mix3_full.yaml --topology v5p:2x2x1",
        _plan,
    ),
    (
        "bench",
        "measure scoring on this machine: images/s from files and by stage, FLOP/s, memory, time to compile",
        "deqa bench --size small,mid --batch-size 1,4",
        _bench,
    ),
    (
        "prepare",
        "put published datasets into TFDS records (needs the extra `tfds`)",
        "deqa prepare --dataset koniq,spaq --root Data-DeQA-Score --out records",
        _prepare,
    ),
    (
        "convert",
        "convert a published PyTorch checkpoint, full or LoRA",
        "deqa convert zhiyuanyou/DeQA-Score-Mix3 M --dtype bfloat16",
        _convert,
    ),
    ("export", "write a converted checkpoint in the published PyTorch format", "deqa export M H", _export),
    ("info", "say what a checkpoint is", "deqa info M", _info),
    (
        "init",
        "make a model of random weights, whose scores mean nothing, to try the rest with",
        "deqa init M --size test",
        _init,
    ),
)
"""Name, what it does, an example, and what adds its options."""


def parser() -> argparse.ArgumentParser:
    """The parser of `deqa`; the command is in `command`, None if none was given."""
    whole = _Parser(
        prog="deqa",
        description="Image quality as a distribution over five words: DeQA-Score in JAX.",
        epilog="`deqa COMMAND --help` has the options of a command and an example.",
    )
    whole.add_argument("--version", action="store_true", help="print the version and exit")
    commands = whole.add_subparsers(dest="command", metavar="COMMAND")
    for name, summary, example, add_options in _COMMANDS:
        command = commands.add_parser(
            name,
            help=summary,
            description=summary[0].upper() + summary[1:] + ".",
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        add_options(command)
    return whole
