"""Dense layers with kernels of eight or four bits (`deqa_jax.quantize`), for scoring.

A quantised dense layer has its kernel where it was, packed, and a parameter more:

    language/layers/down/kernel  [L, in, out]   →   language/layers/down/kernel        int8     [L, rows, out]
                                                    language/layers/down/kernel_scale  float32  [L, groups, out]
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from deqa_jax.model.deqa import Deqa
from deqa_jax.quantize import dequantize, integer_product, is_quantized, packed_shapes

# Layers that may multiply in int8: half of a block's operations, behind a norm, whose outputs few steps can hold. What
# goes into `down` has a few channels far above the others (https://arxiv.org/abs/2405.14428): it alone costs more than
# all the rest. Keys, values and `out` add what int8 kernels themselves cost. benchmarks/README.md has the numbers.
_INTEGER_PRODUCTS = ("query", "gate", "up")


class QuantizedLinear(nnx.Module):
    """A dense layer of few bits. Made of an abstract layer: its parameters are shapes.

    With int8, scales are multiplied in behind the product: the compiler can cast the kernel as it reads it, and what it
    casts is exact. With `int8_activations` the product itself is in int8, each token with a scale of its own. With
    int4, whose scales change along the inputs, the kernel is made whole first.
    """

    def __init__(self, base: nnx.Linear, scheme: str, *, int8_activations: bool):
        kernel_shape, scale_shape = packed_shapes(base.kernel.shape, scheme)
        self.kernel = nnx.Param(jax.ShapeDtypeStruct(kernel_shape, jnp.int8))
        self.kernel_scale = nnx.Param(jax.ShapeDtypeStruct(scale_shape, jnp.float32))
        self.bias = base.bias
        self.dtype = base.dtype
        self.inputs = base.kernel.shape[-2]
        self.scheme = scheme
        self.int8_activations = int8_activations

    def __call__(self, x: Float[Array, "*N I"]) -> Float[Array, "*N O"]:
        kernel, scale = self.kernel[...], self.kernel_scale[...]
        last_axis = (1,) * (x.ndim - 1) + (-1,)
        x = x.astype(self.dtype)
        if self.int8_activations:
            y = integer_product(x, kernel, scale)
        elif self.scheme == "int8":
            y = jnp.matmul(x, kernel.astype(self.dtype), preferred_element_type=jnp.float32) * scale.reshape(last_axis)
        else:
            whole = dequantize(kernel, scale, self.scheme, self.inputs).astype(self.dtype)
            y = jnp.matmul(x, whole, preferred_element_type=jnp.float32)
        if self.bias is not None:
            y = y + self.bias[...].astype(jnp.float32).reshape(last_axis)
        return y.astype(self.dtype)


def wrap(model: Deqa, scheme: str, *, int8_activations: bool = False) -> Deqa:
    """Makes those dense layers of an abstract model quantised ones whose kernels are, in place.

    With `int8_activations` the products of `_INTEGER_PRODUCTS` are in int8.
    """
    layers = [
        (path, module)
        for path, module in nnx.iter_modules(model)
        if isinstance(module, nnx.Linear) and is_quantized((*map(str, path), "kernel"))
    ]
    for path, layer in layers:
        parent = model
        for part in path[:-1]:
            parent = getattr(parent, str(part))
        integer = int8_activations and path[-1] in _INTEGER_PRODUCTS
        setattr(parent, str(path[-1]), QuantizedLinear(layer, scheme, int8_activations=integer))
    return model
