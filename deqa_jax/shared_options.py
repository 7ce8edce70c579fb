"""Options that several commands of the command line have."""

import argparse

from deqa_jax.option_values import megapixels, mesh, whole_number

MOST_IMAGES = 1 << 16
"""That any batch may have."""


def add_model(command: argparse.ArgumentParser, prompt: str, default: str = "") -> None:
    """A model to score with, and how; `prompt` is the default of that option, `default` ends the help of `--model`."""
    command.add_argument(
        "--model",
        required=not default,
        help=f"converted folder, published folder, or hub id (converted once into a cache){default}",
    )
    command.add_argument(
        "--batch-size",
        type=whole_number(1, MOST_IMAGES),
        metavar="N",
        help="images at once, over all devices (default: 1 on CPU, 32 for each device elsewhere)",
    )
    add_dtype(command)
    command.add_argument(
        "--prompt",
        choices=("scorer", "eval"),
        default=prompt,
        help=f"which published entry point to follow; their scores differ slightly (default: {prompt})",
    )
    add_int8_activations(command, default="on CPU with --dtype auto")
    command.add_argument(
        "--input-size-limit",
        type=megapixels,
        metavar="MEGAPIXELS",
        help="images that have more are not decoded, and get an error in place of a score (default: 179)",
    )
    add_mesh(command)


def add_dtype(command: argparse.ArgumentParser) -> None:
    """What scoring runs in."""
    command.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="of matrix products (default: auto, float32 on CPU and bfloat16 elsewhere)",
    )


def add_int8_activations(command: argparse.ArgumentParser, default: str) -> None:
    """Whether half of the products of int8 kernels are in int8; `default` says where they are without it."""
    command.add_argument(
        "--int8-activations",
        action="store_true",
        help=f"of int8 kernels: multiply in int8, activations rounded, where that costs little (default: {default})",
    )


def add_mesh(command: argparse._ActionsContainer) -> None:
    """How devices share a model."""
    command.add_argument(
        "--mesh",
        type=mesh,
        metavar="AXIS=N,…",
        help="how devices share the model: fsdp, tensor (default: each has all of it, and scores its part of a batch)",
    )


def add_stored_dtype(command: argparse.ArgumentParser, default: str) -> None:
    """What is written; `default` says what that is without the option."""
    command.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help=f"what to store (default: {default})"
    )


def add_quantize(command: argparse._ActionsContainer, what: str) -> None:
    """How kernels of a model are stored; `what` says of which."""
    command.add_argument("--quantize", choices=("int8", "int4"), help=what)
