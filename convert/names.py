"""The two-way table between published tensor names and our parameters, and the exact accounting over it."""

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

from deqa_jax.config import DeqaConfig
from deqa_jax.model.abstractor import key_positions, query_positions

from .tensors import BFLOAT16, FLOAT_DTYPES, Tensor


@dataclasses.dataclass(frozen=True)
class _Form:
    """How a published tensor lies in ours, and back."""

    to_ours: Callable[[np.ndarray], np.ndarray]
    to_published: Callable[[np.ndarray], np.ndarray]


def _patches_to_published(kernel: np.ndarray) -> np.ndarray:
    side = round((kernel.shape[0] // 3) ** 0.5)
    return kernel.reshape(side, side, 3, -1).transpose(3, 2, 0, 1)


SAME = _Form(lambda x: x, lambda x: x)
# PyTorch's dense layers are [outputs, inputs].
DENSE = _Form(np.transpose, np.transpose)
# A convolution [outputs, colours, rows, columns] to a dense layer over flattened [rows, columns, colours].
PATCHES = _Form(lambda x: x.transpose(2, 3, 1, 0).reshape(-1, x.shape[0]), _patches_to_published)
# Leading axes of size one, which broadcasting does not need.
ROW = _Form(lambda x: x[0], lambda x: x[None])
TOKEN = _Form(lambda x: x[0, 0], lambda x: x[None, None])


@dataclasses.dataclass(frozen=True)
class Rule:
    """One parameter: its published name, with `{}` for the layer number if it is stacked, and its path here."""

    published: str
    path: tuple[str, ...]
    form: _Form

    @property
    def stacked(self) -> bool:
        """Whether the parameter has a leading layer axis."""
        return "{}" in self.published

    def keys(self, shape: tuple[int, ...]) -> list[str]:
        """The published names that fill a parameter of this shape, in layer order."""
        return [self.published.format(i) for i in range(shape[0])] if self.stacked else [self.published]

    def published_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of each of those tensors."""
        layer = shape[1:] if self.stacked else shape
        return self.form.to_published(np.broadcast_to(np.int8(0), layer)).shape


def _rules(prefix: str, path: str, entries: dict[str, tuple[str, _Form]]) -> list[Rule]:
    return [
        Rule(f"{prefix}{published}", tuple(f"{path}/{ours}".split("/")), form)
        for published, (ours, form) in entries.items()
    ]


def _dense(published: str, ours: str) -> dict[str, tuple[str, _Form]]:
    return {f"{published}.weight": (f"{ours}/kernel", DENSE), f"{published}.bias": (f"{ours}/bias", SAME)}


def _norm(published: str, ours: str) -> dict[str, tuple[str, _Form]]:
    return {f"{published}.weight": (f"{ours}/scale", SAME), f"{published}.bias": (f"{ours}/bias", SAME)}


def _branches(published: str, ours: str, leaf: str, form: _Form) -> dict[str, tuple[str, _Form]]:
    return {
        f"{published}.multiway.{number}.weight": (f"{ours}/{branch}/{leaf}", form)
        for number, branch in enumerate(("text", "visual"))
    }


_CROSS = "crossattention."
RULES: tuple[Rule, ...] = (
    *_rules(
        "model.vision_model.",
        "vision",
        {
            "embeddings.cls_token": ("class_token", TOKEN),
            "embeddings.position_embedding": ("position_embedding", ROW),
            "embeddings.patch_embed.weight": ("patch_embedding/kernel", PATCHES),
            **_norm("embeddings.pre_layernorm", "pre_norm"),
            **_norm("post_layernorm", "post_norm"),
        },
    ),
    *_rules(
        "model.vision_model.encoder.layers.{}.",
        "vision/layers",
        {
            **_norm("input_layernorm", "input_norm"),
            **_dense("self_attn.query_key_value", "query_key_value"),
            **_dense("self_attn.dense", "out"),
            **_norm("post_attention_layernorm", "post_attention_norm"),
            **_dense("mlp.fc1", "up"),
            **_dense("mlp.fc2", "down"),
        },
    ),
    *_rules(
        "model.visual_abstractor.",
        "abstractor",
        {
            "query_embeds": ("queries", ROW),
            "vit_eos": ("end_token", TOKEN),
            **_dense("visual_fc", "projection"),
        },
    ),
    *_rules(
        "model.visual_abstractor.encoder.layers.{}." + _CROSS,
        "abstractor/layers",
        {
            **_norm("norm1", "query_norm"),
            **_norm("normk", "key_norm"),
            **_dense("attention.query", "query"),
            **_dense("attention.key", "key"),
            **_dense("attention.value", "value"),
            **_dense("output.out_proj", "out"),
            **_norm("output.norm2", "mlp_norm"),
            **_dense("output.mlp.w1", "gate"),
            **_dense("output.mlp.w3", "up"),
            **_norm("output.mlp.ffn_ln", "ffn_norm"),
            **_dense("output.mlp.w2", "down"),
        },
    ),
    *_rules(
        "",
        "language",
        {
            "model.embed_tokens.weight": ("embedding", SAME),
            "model.norm.weight": ("final_norm/scale", SAME),
            "lm_head.weight": ("head/kernel", DENSE),
        },
    ),
    *_rules(
        "model.layers.{}.",
        "language/layers",
        {
            **_branches("input_layernorm", "input_norm", "scale", SAME),
            "self_attn.q_proj.weight": ("query/kernel", DENSE),
            **_branches("self_attn.k_proj", "key", "kernel", DENSE),
            **_branches("self_attn.v_proj", "value", "kernel", DENSE),
            "self_attn.o_proj.weight": ("out/kernel", DENSE),
            **_branches("post_attention_layernorm", "post_attention_norm", "scale", SAME),
            "mlp.gate_proj.weight": ("gate/kernel", DENSE),
            "mlp.up_proj.weight": ("up/kernel", DENSE),
            "mlp.down_proj.weight": ("down/kernel", DENSE),
        },
    ),
)

# Buffers, which are computed here: the positions are compared, the rotary frequencies ignored.
_ATTENTION = "model.visual_abstractor.encoder.layers.{}.crossattention.attention."
QUERY_POSITIONS = f"{_ATTENTION}q_pos_embed"
KEY_POSITIONS = f"{_ATTENTION}k_pos_embed"
ROTARY_FREQUENCIES = "model.layers.{}.self_attn.rotary_emb.inv_freq"

Shapes = Mapping[tuple[str, ...], tuple[int, ...]]
"""Path of each of our parameters to its shape."""


def rules_for(shapes: Shapes) -> dict[tuple[str, ...], Rule]:
    """The rule of every parameter.

    Raises:
      LookupError: a parameter has no rule, or a rule no parameter: the table does not fit the model.
    """
    rules = {rule.path: rule for rule in RULES}
    if rules.keys() != shapes.keys():
        raise LookupError(f"the table does not fit the model at {sorted(rules.keys() ^ shapes.keys())}")
    return rules


def positions(config: DeqaConfig) -> dict[str, np.ndarray]:
    """The abstractor's position buffers, as this model computes them, by published name."""
    return {
        QUERY_POSITIONS: query_positions(config.abstractor),
        KEY_POSITIONS: key_positions(config.abstractor, config.vision.grid_size),
    }


def account(config: DeqaConfig, shapes: Shapes, tensors: Mapping[str, Tensor]) -> list[str]:
    """Every way in which the tensors are not exactly those that fill the parameters, one sentence each."""
    expected: dict[str, tuple[int, ...]] = {}
    for path, rule in rules_for(shapes).items():
        expected |= dict.fromkeys(rule.keys(shapes[path]), rule.published_shape(shapes[path]))
    ignored = {ROTARY_FREQUENCIES.format(i) for i in range(config.language.num_layers)}
    buffers = _buffers(config)
    problems = [f"{key}: missing" for key in expected if key not in tensors]
    for key, tensor in tensors.items():
        if key not in expected and key not in buffers and key not in ignored:
            problems.append(f"{key}: not a tensor of this model (shape {list(tensor.shape)})")
        elif key in expected and tensor.shape != expected[key]:
            problems.append(f"{key}: shape {list(tensor.shape)}, but config.json makes it {list(expected[key])}")
        elif tensor.dtype not in FLOAT_DTYPES.values():
            problems.append(f"{key}: stored as {tensor.dtype}; only float weights can be converted")
        elif key in buffers:
            problems += _check_position(key, tensor, buffers[key])
    return problems


def _buffers(config: DeqaConfig) -> dict[str, np.ndarray]:
    layers = range(config.abstractor.num_layers)
    return {template.format(i): values for template, values in positions(config).items() for i in layers}


def _check_position(key: str, tensor: Tensor, computed: np.ndarray) -> list[str]:
    """A stored buffer must be what the model computes, up to having once been in half precision."""
    # Before it is read: a file of few bytes can repeat them to a tensor of any size.
    if tensor.shape != computed.shape:
        return [f"{key}: shape {list(tensor.shape)}, but the model's is {list(computed.shape)}"]
    stored = np.asarray(tensor.read(), np.float64)
    # Half a unit in the last place of values just below one, and the float32 angles' own error.
    tolerance = (2.0**-9 if tensor.dtype == BFLOAT16 else 2.0**-12) + 1e-5
    worst = np.abs(stored - computed).max()
    if not worst <= tolerance:
        return [f"{key}: differs by {worst:.2g} from the positions that this model computes"]
    return []
