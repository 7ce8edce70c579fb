"""The command line: parsing of arguments, and what each failure exits with.

Nothing heavy is imported before a command is known, so that `deqa --help` answers at once.
"""

import argparse
import io
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

_FAILED, _USAGE, _INTERRUPTED = 1, 2, 130


class _Parser(argparse.ArgumentParser):
    """Says where help is to be had."""

    def error(self, message: str) -> NoReturn:
        self.exit(_USAGE, f"{self.prog}: {message}\nTry `{self.prog} --help`.\n")


def _whole_number(least: int, most: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isdecimal() or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} to {most}")
        return int(text)

    return parse


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="deqa",
        description="Image quality as a distribution over five words: DeQA-Score in JAX.",
        epilog="`deqa COMMAND --help` has the options of a command and an example.",
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    def command(name: str, summary: str, example: str) -> argparse.ArgumentParser:
        return commands.add_parser(
            name,
            help=summary,
            description=summary[0].upper() + summary[1:] + ".",
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    score = command(
        "score", "score images from 1 (bad) to 5 (excellent)", "deqa score photos/ --model M --format jsonl"
    )
    score.add_argument(
        "paths", nargs="+", metavar="PATH", help="image, folder (searched recursively), glob, or - for a list on stdin"
    )
    score.add_argument(
        "--model", required=True, help="converted folder, published folder, or hub id (converted once into a cache)"
    )
    score.add_argument(
        "--batch-size",
        type=_whole_number(1, 1 << 16),
        metavar="N",
        help="images at once (default: 1 on CPU, 32 elsewhere)",
    )
    score.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="of matrix products (default: auto, float32 on CPU and bfloat16 elsewhere)",
    )
    score.add_argument(
        "--prompt",
        choices=("scorer", "eval"),
        default="scorer",
        help="which published entry point to follow; their scores differ slightly (default: scorer)",
    )
    score.add_argument(
        "--format", choices=("table", "jsonl", "csv"), default="table", help="of the rows (default: table)"
    )
    score.add_argument("--output", type=Path, metavar="F", help="file to write instead of stdout; must not exist")

    convert = command(
        "convert",
        "convert a published PyTorch checkpoint, full or LoRA",
        "deqa convert zhiyuanyou/DeQA-Score-Mix3 M --dtype bfloat16",
    )
    convert.add_argument("source", metavar="SRC", help="folder or hub id")
    convert.add_argument("out", type=Path, metavar="OUT", help="folder to make; must not exist")
    convert.add_argument("--base", metavar="DIR", help="for a LoRA adapter: the full checkpoint it was trained on")
    _add_dtype(convert, "what the source stores; weights merged with an adapter are float32")

    export = command("export", "write a converted checkpoint in the published PyTorch format", "deqa export M H")
    export.add_argument("model", metavar="MODEL", type=Path, help="converted folder")
    export.add_argument("out", type=Path, metavar="OUT", help="folder to make; must not exist")
    _add_dtype(export, "what each tensor came with")

    info = command("info", "say what a checkpoint is", "deqa info M")
    info.add_argument("model", metavar="MODEL", help="converted or published folder")

    init = command(
        "init",
        "make a model of random weights, whose scores mean nothing, to try the rest with",
        "deqa init M --size test",
    )
    init.add_argument("out", type=Path, metavar="OUT", help="folder to make; must not exist")
    init.add_argument(
        "--size",
        choices=("test", "small", "mid", "full"),
        default="test",
        help="4.4 M to 8.2 B parameters (default: test)",
    )
    init.add_argument(
        "--seed", type=_whole_number(0, (1 << 32) - 1), default=0, metavar="N", help="of the weights (default: 0)"
    )
    _add_dtype(init, "float32")
    return parser


def _add_dtype(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help=f"what to store (default: {default})"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs `deqa`. Exits with 0 on complete success, 1 if something failed, 2 on bad usage."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.version:
        import importlib.metadata

        print(importlib.metadata.version("deqa-jax"))
        sys.exit(0)
    if options.command is None:
        parser.error("name a command")
    # File names need not be text in any encoding: they are read as they are and written with escapes, which JSON
    # understands too.
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("deqa_jax").setLevel(logging.INFO)
    try:
        status = {
            "score": _score,
            "convert": _convert,
            "export": _export,
            "info": _info,
            "init": _init,
        }[options.command](options)
        sys.stdout.flush()
    except KeyboardInterrupt:
        status = _fail("interrupted; what was finished is written", _INTERRUPTED)
    except (FileExistsError, NotADirectoryError) as error:
        status = _fail(_reason(error), _USAGE)
    except BrokenPipeError:
        # The reader of our output went away (`deqa score … | head`); keep Python from complaining about it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = _FAILED
    except OSError as error:
        status = _fail(_reason(error), _FAILED)
    sys.exit(status)


def _reason(error: OSError) -> str:
    return f"{error.filename}: {error.strerror}" if error.filename else str(error)


def _fail(message: str, status: int) -> int:
    print(f"deqa: {message}", file=sys.stderr)
    return status


def _score(options: argparse.Namespace) -> int:
    if options.output is not None and os.path.lexists(options.output):
        return _fail(f"{options.output} exists already; remove it or choose another name", _USAGE)
    if options.output is not None and not options.output.absolute().parent.is_dir():
        return _fail(f"{options.output}: no such folder to write in; make it first", _USAGE)
    from deqa_jax.score_files import UsageError, find_images

    try:
        paths = find_images(options.paths, sys.stdin)
    except UsageError as error:
        return _fail(str(error), _USAGE)

    from PIL import Image

    from deqa_jax.checkpoint import CheckpointError
    from deqa_jax.config import ConfigError
    from deqa_jax.convert.tensors import ConversionError
    from deqa_jax.prompt import PromptError
    from deqa_jax.score_files import score_files
    from deqa_jax.scorer import Scorer

    # Pillow refuses what is twice as large as what it warns of; the warning itself helps nobody here.
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    try:
        scorer = Scorer.from_pretrained(
            options.model, dtype=options.dtype, batch_size=options.batch_size, prompt=options.prompt
        )
    except (CheckpointError, ConfigError, ConversionError, PromptError) as error:
        return _fail(str(error), _FAILED)
    if options.output is None:
        failed = score_files(scorer, paths, sys.stdout, format=options.format)
    else:
        with options.output.open("x", encoding="utf-8", errors="backslashreplace") as output:
            failed = score_files(scorer, paths, output, format=options.format)
    if failed:
        return _fail(f"{failed} of {len(paths)} images could not be scored", _FAILED)
    return 0


def _convert(options: argparse.Namespace) -> int:
    from deqa_jax.convert.tensors import ConversionError
    from deqa_jax.convert.to_jax import convert

    try:
        convert(options.source, options.out, base=options.base, dtype=options.dtype)
    except ConversionError as error:
        return _fail(f"{options.source} cannot be converted:\n" + "\n".join(f"  {x}" for x in error.problems), _FAILED)
    return 0


def _export(options: argparse.Namespace) -> int:
    from deqa_jax.checkpoint import CheckpointError
    from deqa_jax.config import ConfigError
    from deqa_jax.convert.to_published import export

    try:
        export(options.model, options.out, dtype=options.dtype)
    except (CheckpointError, ConfigError) as error:
        return _fail(str(error), _FAILED)
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
    from deqa_jax.random_model import init

    init(options.out, size=options.size, seed=options.seed, dtype=options.dtype or "float32")
    return 0
