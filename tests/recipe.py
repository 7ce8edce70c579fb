"""Models made from the golden recipe: weights as a function of name, shape and seed (see tests/golden/README.md)."""

import zlib
from collections.abc import Mapping

import numpy as np

from deqa_jax.config import DeqaConfig
from deqa_jax.convert.names import positions, rules_for
from deqa_jax.parameters import parameter_shapes

_EMBEDDINGS = ("embed_tokens", "query_embeds", "vit_eos", "cls_token", "position_embedding")
_GAINS = {
    "lm_head": 2.5,
    "o_proj": 1.4,
    "v_proj.multiway.1": 2.0,
    "patch_embed": 3.0,
    "attention.query": 1.5,
    "attention.key": 1.5,
    "visual_fc": 2.0,
}


def recipe_weight(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """One float16 tensor of the golden model with this seed."""
    random = np.random.RandomState(zlib.crc32(name.encode()) + seed).standard_normal(shape)
    if len(shape) == 1:
        weight = (1.0 if name.endswith("weight") else 0.0) + 0.1 * random
    elif any(word in name for word in _EMBEDDINGS):
        weight = 0.7 * random
    else:
        gain = 1.0
        for word, value in _GAINS.items():
            gain = value if word in name else gain
        weight = gain * random / np.sqrt(np.prod(shape[1:]))
    return weight.astype(np.float16)


def published_shapes(config: DeqaConfig) -> dict[str, tuple[int, ...]]:
    """Published name and shape of every tensor of a model, without buffers."""
    shapes = parameter_shapes(config)
    return {
        key: rule.published_shape(shapes[path])
        for path, rule in rules_for(shapes).items()
        for key in rule.keys(shapes[path])
    }


def recipe_tensors(config: DeqaConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """A published checkpoint's tensors, float16, and its position buffers, float32."""
    tensors = {name: recipe_weight(name, shape, seed) for name, shape in published_shapes(config).items()}
    for template, values in positions(config).items():
        tensors |= {template.format(i): values for i in range(config.abstractor.num_layers)}
    return tensors


def to_ours(config: DeqaConfig, tensors: Mapping[str, np.ndarray]) -> dict[tuple[str, ...], np.ndarray]:
    """The same tensors as float32 parameters of our model, by path."""
    shapes = parameter_shapes(config)
    leaves = {}
    for path, rule in rules_for(shapes).items():
        parts = [rule.form.to_ours(tensors[key]).astype(np.float32) for key in rule.keys(shapes[path])]
        leaves[path] = np.stack(parts) if rule.stacked else parts[0]
    return leaves


def assert_same_as_golden(ours: Mapping[str, np.ndarray], golden: Mapping[str, np.ndarray]) -> None:
    """Keys, shapes, dtypes and every bit; but positions are computed, and NumPy's float32 sines and powers end in other
    bits on processors with AVX-512, where the golden ones were made: by 2e-6 at the most."""
    assert ours.keys() == golden.keys()
    for key, array in ours.items():
        assert (array.shape, array.dtype) == (golden[key].shape, golden[key].dtype), key
        if key.endswith("pos_embed"):
            np.testing.assert_allclose(array, golden[key], rtol=0, atol=4e-6, err_msg=key)
        else:
            assert array.tobytes() == golden[key].tobytes(), key
