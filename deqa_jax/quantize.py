"""Kernels in eight or four bits: which they are, how they lie, and what they stand for.

A weight is a whole number times a scale; whole numbers are nearest ones, and as many above zero as below:

    int8   −127 … 127   kernel int8 [I, O]           a scale an output:           kernel_scale float32 [1, O]
    int4     −7 … 7     kernel int8 [⌈I / 2⌉, O]     a scale an output and group: kernel_scale float32 [⌈I / 64⌉, O]

A group is 64 inputs, the last one what is left. A byte of int4 has an input of even number in its low half and the next
one in its high half: JAX's own int4 cannot be saved. Stacks have a layer axis in front of all of this.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int8

from deqa_jax.config import ConfigError

SCHEMES = ("int8", "int4")
KERNEL_SCALE = "kernel_scale"
"""Of a parameter beside its kernel."""
GROUP = 64

_LARGEST = {"int8": 127, "int4": 7}
# Of how the above lies in a checkpoint.
_VERSION = 1

Shape = tuple[int, ...]


# ---- which, and of what shape -----------------------------------------------------------------------------


def is_quantized(path: tuple[str, ...]) -> bool:
    """Whether a parameter has few bits in a quantised model: kernels of the language model's blocks.

    They are 92 % of the published size. The vision tower and the abstractor (5 %) stay whole: all that is known of a
    picture comes through them, a token for a patch, and kernels there can have single weights far above the others of
    their output (`first_weights`), which leave those few of the bits. Of the rest, embeddings are looked up and not
    multiplied, and five columns of the output head are the score itself, whose error nothing behind them averages out
    (3 % together).
    """
    return path[:2] == ("language", "layers") and path[-1] == "kernel"


def packed_shapes(shape: Shape, scheme: str) -> tuple[Shape, Shape]:
    """Shapes of a kernel of few bits and of its scales, of that of a whole one.

    >>> packed_shapes((32, 11008, 4096), "int4")
    ((32, 5504, 4096), (32, 172, 4096))
    """
    *stacked, inputs, outputs = shape
    rows, groups = (inputs, 1) if scheme == "int8" else (-(-inputs // 2), -(-inputs // GROUP))
    return (*stacked, rows, outputs), (*stacked, groups, outputs)


def quantized_shapes(shapes: Mapping[tuple[str, ...], Shape], scheme: str) -> dict[tuple[str, ...], Shape]:
    """Shapes of the parameters of a quantised model, of those of a whole one, by path."""
    quantized = {}
    for path, shape in shapes.items():
        if is_quantized(path):
            quantized[path], quantized[*path[:-1], KERNEL_SCALE] = packed_shapes(shape, scheme)
        else:
            quantized[path] = shape
    return quantized


def parameter_dtype(path: tuple[str, ...], scheme: str | None, dtype: str) -> np.dtype:
    """What a parameter of a model that runs in `dtype` is; of a model without a scheme, that for all."""
    if scheme is None:
        return np.dtype(dtype)
    if path[-1] == KERNEL_SCALE:
        return np.dtype(np.float32)
    return np.dtype(np.int8 if is_quantized(path) else dtype)


# ---- in a checkpoint's configuration ----------------------------------------------------------------------


def write_scheme(scheme: str) -> dict[str, Any]:
    """The entry of a checkpoint's configuration."""
    return {"scheme": scheme, "version": _VERSION}


def read_scheme(written: Any) -> str | None:
    """The scheme of such an entry; None without one.

    Raises:
      ConfigError: this program does not know it.
    """
    if written is None:
        return None
    for scheme in SCHEMES:
        if written == write_scheme(scheme):
            return scheme
    raise ConfigError(f"quantization {written!r} is not known to this program, which may be older than the checkpoint")


# ---- array functions --------------------------------------------------------------------------------------


def quantize(
    kernel: Float[np.ndarray, "I O"], scheme: str
) -> tuple[Int8[np.ndarray, "rows O"], Float[np.ndarray, "G O"]]:
    """A kernel and its scales as above; each weight is off by half a scale at the most.

    Where all weights of a scale are as good as zero (below 2e-36), they and the scale are.

    Raises:
      FloatingPointError: a weight is not finite in float32.
    """
    inputs, outputs = kernel.shape
    size = inputs if scheme == "int8" else GROUP
    whole = np.zeros((inputs, outputs), np.int8)
    scales = np.zeros(packed_shapes(kernel.shape, scheme)[1], np.float32)
    for scale, start in zip(scales, range(0, inputs, size), strict=True):
        with np.errstate(over="raise"):
            block = kernel[start : start + size].astype(np.float32)
        np.divide(np.maximum(block.max(axis=0), -block.min(axis=0)), _LARGEST[scheme], out=scale)
        if not np.isfinite(scale).all():
            raise FloatingPointError("a weight that is not finite")
        # A quotient by a number of few digits could be any.
        scale[scale < np.finfo(np.float32).tiny] = 0
        block /= np.where(scale > 0, scale, np.float32(1))
        whole[start : start + size] = np.rint(block, out=block)
    return (whole if scheme == "int8" else _packed(whole)), scales


def _packed(whole: Int8[np.ndarray, "I O"]) -> Int8[np.ndarray, "rows O"]:
    whole = np.pad(whole, ((0, len(whole) % 2), (0, 0)))
    return (whole[0::2] & 0x0F) | (whole[1::2] << 4)


def _unpacked(kernel: Int8[Array, "*L rows O"]) -> Int8[Array, "*L I O"]:
    # Shifting right keeps the sign.
    both = jnp.stack([(kernel << 4) >> 4, kernel >> 4], axis=-2)
    return both.reshape(*kernel.shape[:-2], 2 * kernel.shape[-2], kernel.shape[-1])


def dequantize(
    kernel: Int8[Array, "*L rows O"], scale: Float[Array, "*L G O"], scheme: str, inputs: int
) -> Float[Array, "*L I O"]:
    """The kernel, float32, that a quantised one of `inputs` inputs stands for."""
    if scheme == "int4":
        kernel = _unpacked(kernel)[..., :inputs, :]
        scale = jnp.repeat(scale, GROUP, axis=-2)[..., :inputs, :]
    return kernel.astype(jnp.float32) * scale


def quantize_tokens(x: Float[Array, "*N I"]) -> tuple[Int8[Array, "*N I"], Float[Array, "*N 1"]]:
    """Each row in int8 with a scale of its own, float32; what is not finite has a scale that is not either."""
    x = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), axis=-1, keepdims=True) / 127
    # `scale > 0` would lose what is no number.
    return jnp.round(x / jnp.where(scale == 0, 1.0, scale)).astype(jnp.int8), scale


def integer_product(
    x: Float[Array, "*N I"], kernel: Int8[Array, "I O"], scale: Float[Array, "1 O"]
) -> Float[Array, "*N O"]:
    """x times an int8 kernel, float32: int8 products, summed in int32 (as in https://arxiv.org/abs/2206.01861)."""
    whole, token_scale = quantize_tokens(x)
    dimensions = (((x.ndim - 1,), (0,)), ((), ()))
    total = jax.lax.dot_general(whole, kernel, dimensions, preferred_element_type=jnp.int32)
    return total.astype(jnp.float32) * token_scale * scale.reshape((1,) * (x.ndim - 1) + (-1,))
