"""Low-rank adapters with the semantics of PEFT: y = x·W + (α/r)·dropout(x)·A·B, on stacked layers too.

An adapted dense layer keeps its kernel where it was and has two parameters more:

    language/layers/query/kernel  [L, in, out]        language/layers/query/kernel  [L, in, out]
                                                 →    language/layers/query/lora_a  [L, in, r]
                                                      language/layers/query/lora_b  [L, r, out]
"""

import dataclasses
import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from deqa_jax.config import ConfigError
from deqa_jax.model.deqa import Deqa
from deqa_jax.parameters import Leaves, ParamPath

A, B = "lora_a", "lora_b"
_DROPOUT_KEY = "dropout_key"
# The head's kernel is read without its layer, so an adapter there would do nothing.
_HEAD = "language/head"


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Which layers are adapted, and how; the defaults are those of the published run.

    Attributes:
      rank: r, the inner width of the adapters.
      alpha: α; adapters are scaled by α / r.
      dropout: share of inputs that the adapters do not see in training, 0 to 1.
      targets: patterns of the paths of dense layers; a layer that matches one whole is adapted.
    """

    rank: int = 128
    alpha: float = 256.0
    dropout: float = 0.05
    targets: tuple[str, ...] = ("language/layers/query", "language/layers/value/visual")

    def __post_init__(self) -> None:
        if self.rank < 1 or not self.alpha > 0 or not 0 <= self.dropout < 1:
            raise ConfigError("lora: rank is at least 1, alpha above 0, dropout from 0 to below 1")

    @property
    def scale(self) -> float:
        """α / r."""
        return self.alpha / self.rank


class LoraLinear(nnx.Module):
    """A dense layer and its adapter. Made of an abstract layer: its parameters are shapes."""

    def __init__(self, base: nnx.Linear, config: LoraConfig, dropout: float):
        *stacked, inputs, outputs = base.kernel.shape
        self.kernel, self.bias = base.kernel, base.bias
        self.dtype = base.dtype
        self.scale, self.dropout = config.scale, dropout
        self.lora_a = nnx.Param(jax.ShapeDtypeStruct((*stacked, inputs, config.rank), jnp.float32))
        self.lora_b = nnx.Param(jax.ShapeDtypeStruct((*stacked, config.rank, outputs), jnp.float32))
        if dropout:
            # Not a parameter: the training step puts new keys here, one a layer.
            self.dropout_key = nnx.Variable(jax.ShapeDtypeStruct((*stacked, 2), jnp.uint32))

    def __call__(self, x: Float[Array, "*N I"]) -> Float[Array, "*N O"]:
        x = x.astype(self.dtype)
        y = jnp.matmul(x, self.kernel[...].astype(self.dtype))
        if self.bias is not None:
            y = y + self.bias[...].astype(self.dtype).reshape((1,) * (y.ndim - 1) + (-1,))
        if self.dropout:
            key = jax.random.wrap_key_data(self.dropout_key[...])
            kept = jax.random.bernoulli(key, 1 - self.dropout, x.shape)
            x = jnp.where(kept, x / (1 - self.dropout), jnp.zeros((), x.dtype))
        update = jnp.matmul(jnp.matmul(x, self.lora_a[...].astype(self.dtype)), self.lora_b[...].astype(self.dtype))
        return y + update * jnp.asarray(self.scale, self.dtype)


def wrap(model: Deqa, config: LoraConfig, *, training: bool) -> Deqa:
    """Puts adapters on an abstract model, in place; dropout only where it is for training.

    Raises:
      ConfigError: a target matches no dense layer that can be adapted.
    """
    layers = {
        "/".join(map(str, path)): (path, module)
        for path, module in nnx.iter_modules(model)
        if isinstance(module, nnx.Linear)
    }
    del layers[_HEAD]
    chosen = [name for name in layers if any(re.fullmatch(target, name) for target in config.targets)]
    idle = [target for target in config.targets if not any(re.fullmatch(target, name) for name in layers)]
    if idle:
        raise ConfigError(f"lora: no dense layer is called {', '.join(idle)}; there are {', '.join(sorted(layers))}")
    for name in chosen:
        path, layer = layers[name]
        parent = model
        for part in path[:-1]:
            parent = getattr(parent, str(part))
        setattr(parent, str(path[-1]), LoraLinear(layer, config, config.dropout if training else 0.0))
    return model


def adapter_shapes(shapes: Mapping[ParamPath, tuple[int, ...]], config: LoraConfig) -> dict[ParamPath, tuple[int, ...]]:
    """Shapes of the adapters' matrices, for a model with these parameters."""
    adapters = {}
    for path, shape in shapes.items():
        name = "/".join(path[:-1])
        if path[-1] == "kernel" and name != _HEAD and any(re.fullmatch(target, name) for target in config.targets):
            *stacked, inputs, outputs = shape
            adapters[(*path[:-1], A)] = (*stacked, inputs, config.rank)
            adapters[(*path[:-1], B)] = (*stacked, config.rank, outputs)
    return adapters


def init(shapes: Mapping[ParamPath, tuple[int, ...]], key: jax.Array) -> Leaves:
    """First values as PEFT draws them: A uniform within ±1/√inputs, B zero, so that nothing changes at first.

    Args:
      shapes: what `adapter_shapes` says.
      key: of the draws.
    """
    leaves: Leaves = {}
    for number, (path, shape) in enumerate(sorted(shapes.items())):
        if path[-1] == A:
            bound = shape[-2] ** -0.5
            leaves[path] = jax.random.uniform(jax.random.fold_in(key, number), shape, jnp.float32, -bound, bound)
        else:
            leaves[path] = jnp.zeros(shape, jnp.float32)
    return leaves


def dropout_keys(shapes: Mapping[ParamPath, tuple[int, ...]], config: LoraConfig, key: jax.Array) -> Leaves:
    """New keys for every adapter's dropout, one a layer; none if there is no dropout."""
    if not config.dropout:
        return {}
    paths = sorted(path for path in shapes if path[-1] == A)
    leaves = {}
    for number, path in enumerate(paths):
        one = jax.random.fold_in(key, number)
        stacked = shapes[path][:-2]
        leaves[(*path[:-1], _DROPOUT_KEY)] = jax.random.key_data(jax.random.split(one, stacked) if stacked else one)
    return leaves


def merge(kernel: np.ndarray, a: np.ndarray, b: np.ndarray, scale: float) -> np.ndarray:
    """A kernel with its adapter added, in float32.

    >>> merge(np.eye(2, dtype=np.float32), np.ones((2, 1), np.float32), np.ones((1, 2), np.float32), 2.0).tolist()
    [[3.0, 2.0], [2.0, 3.0]]
    """
    update = np.matmul(np.asarray(a, np.float32), np.asarray(b, np.float32))
    return np.asarray(kernel, np.float32) + np.float32(scale) * update
