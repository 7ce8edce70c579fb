"""A tensor that lies in a file and is read when asked for."""

import dataclasses
import math
from collections.abc import Callable, Sequence

import ml_dtypes
import numpy as np

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOAT_DTYPES = {
    "float16": np.dtype(np.float16),
    "bfloat16": BFLOAT16,
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
}
"""What a weight may be stored as, by name."""


class ConversionError(ValueError):
    """A checkpoint that cannot be converted; `problems` holds every violation found, one sentence each."""

    def __init__(self, problems: Sequence[str]):
        self.problems = tuple(dict.fromkeys(problems))
        super().__init__("\n".join(self.problems))


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Shape and dtype are known, the values are not read before `read` is called."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    @property
    def num_bytes(self) -> int:
        """Size of the values."""
        return math.prod(self.shape) * self.dtype.itemsize


def common_dtype(*dtypes: np.dtype) -> np.dtype:
    """The smallest float dtype that holds all of these exactly."""
    if len(set(dtypes)) == 1:
        return dtypes[0]
    return np.dtype(np.float64 if np.dtype(np.float64) in dtypes else np.float32)


def dtype_name(dtype: np.dtype) -> str:
    """A dtype's name in `FLOAT_DTYPES`."""
    return next(name for name, known in FLOAT_DTYPES.items() if known == dtype)


def cast(name: str, array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The array in a dtype. Raises `ConversionError`, which says what it is called, if that cannot hold its values."""
    try:
        with np.errstate(over="raise"):
            return array.astype(dtype, copy=False)
    except FloatingPointError as error:
        raise ConversionError([f"{name}: has values that {dtype_name(dtype)} cannot hold"]) from error
