"""The parameters of a quantised checkpoint, each made of a whole one when it is written."""

from collections.abc import Mapping

import numpy as np

from deqa_jax.checkpoint import Leaf
from deqa_jax.parameters import ParamPath
from deqa_jax.quantize import KERNEL_SCALE, is_quantized, packed_shapes, quantize

from .tensors import ConversionError, Tensor


def quantized(leaves: Mapping[ParamPath, Tensor], scheme: str) -> dict[ParamPath, Tensor]:
    """Parameters as they are stored in a scheme of `quantize.SCHEMES`, of those of a whole model."""
    made = {}
    for path, leaf in leaves.items():
        if not is_quantized(path):
            made[path] = leaf
            continue
        kernel = _Kernel(path, leaf, scheme)
        made[path] = Tensor(kernel.shape, np.dtype(np.int8), kernel.read)
        made[*path[:-1], KERNEL_SCALE] = Tensor(kernel.scale_shape, np.dtype(np.float32), kernel.read_scale)
    return made


class _Kernel:
    """A stacked kernel that is read once for itself and its scales, which are written next."""

    def __init__(self, path: ParamPath, leaf: Leaf, scheme: str):
        self._path, self._leaf, self._scheme = path, leaf, scheme
        self.shape, self.scale_shape = packed_shapes(leaf.shape, scheme)
        self._scale: np.ndarray | None = None

    def read(self) -> np.ndarray:
        # A layer at a time: the float32 of a whole stack would be as large as anything gets.
        layers = self._leaf.read()
        kernel, self._scale = np.empty(self.shape, np.int8), np.empty(self.scale_shape, np.float32)
        for i, layer in enumerate(layers):
            try:
                kernel[i], self._scale[i] = quantize(layer, self._scheme)
            except FloatingPointError as error:
                raise ConversionError([f"{'/'.join(self._path)}: layer {i} has values that are not finite"]) from error
        return kernel

    def read_scale(self) -> np.ndarray:
        if self._scale is None:
            self.read()
        # Not kept: those of all kernels together are half a gigabyte.
        scale, self._scale = self._scale, None
        assert scale is not None
        return scale
