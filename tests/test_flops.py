"""Operations counted from the configuration are those of the programs, and the published figure."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from deqa_jax.bench import STAGES, stage_programs
from deqa_jax.config import PRESETS
from deqa_jax.flops import flops
from deqa_jax.launch.hlo import count_flops
from deqa_jax.parameters import abstract_model
from deqa_jax.preprocess import PreprocessConfig
from deqa_jax.prompt import SplitPrompt
from deqa_jax.scoring_program import programs

LEVEL_IDS = (3, 4, 5, 6, 7)
_TINY = PRESETS["tiny"]
# One head where the CPU takes heads one after the other, which XLA counts once; and few enough tokens to compile soon.
SMALL = dataclasses.replace(
    _TINY,
    vision=dataclasses.replace(_TINY.vision, image_size=112, num_layers=2, num_heads=1),
    abstractor=dataclasses.replace(_TINY.abstractor, num_heads=1, num_layers=2),
    language=dataclasses.replace(_TINY.language, num_layers=3, num_heads=4, num_kv_heads=2),
)


def preprocessing(config):
    return PreprocessConfig(size=config.vision.image_size, resample=3, mean=(0.5,) * 3, std=(0.25,) * 3)


def abstract_arguments(config, batch_size=1):
    """Parameters of a stacked model, its graph, and pixels."""
    graphdef, state = nnx.split(abstract_model(config))
    pixels = jax.ShapeDtypeStruct((batch_size, config.vision.image_size, config.vision.image_size, 3), np.uint8)
    return graphdef, nnx.to_pure_dict(state), pixels


def text(before, after):
    return SplitPrompt(tuple(range(before)), tuple(range(after)))


def test_the_published_size_has_the_known_figure():
    """1.96 TFLOP: language 1.19, vision 0.72, abstractor 0.04; 92 tokens."""
    config = PRESETS["full"]
    assert 15 + config.num_visual_tokens + 12 == 92
    counted = flops(config, 15, 12, cached=False)
    assert sum(counted.values()) == pytest.approx(1.96e12, abs=0.005e12)
    assert counted["language"] == pytest.approx(1.19e12, abs=0.01e12)
    assert counted["vision"] == pytest.approx(0.72e12, abs=0.005e12)
    assert counted["abstractor"] == pytest.approx(0.04e12, abs=0.005e12)


def test_what_the_scorer_leaves_out_is_not_counted():
    whole, scored = flops(PRESETS["full"], 15, 12, cached=False), flops(PRESETS["full"], 15, 12)
    assert {stage for stage in STAGES if scored[stage] != whole[stage]} == {"language"}
    assert sum(scored[stage] for stage in STAGES) == pytest.approx(1.74e12, abs=0.005e12)


@pytest.mark.parametrize("config", [PRESETS["full"], SMALL], ids=["full", "small"])
def test_the_scorers_program_has_as_many_products(config):
    graphdef, params, pixels = abstract_arguments(config, batch_size=2)
    prefill, run = programs(graphdef, text(15, 12), LEVEL_IDS, preprocessing(config), "float32", "cpu")
    traced = run.trace(params, jax.eval_shape(prefill, params), pixels, open_set=False)
    counted = flops(config, 15, 12)
    assert count_flops(traced.jaxpr.jaxpr) == 2 * sum(counted[stage] for stage in STAGES)


@pytest.mark.parametrize("config", [PRESETS["full"], SMALL], ids=["full", "small"])
def test_the_whole_network_has_as_many_products(config):
    graphdef, params, _ = abstract_arguments(config)
    size = config.vision.image_size
    images = jax.ShapeDtypeStruct((1, size, size, 3), np.float32)
    before, after = (jax.ShapeDtypeStruct((1, length), np.int32) for length in (15, 12))
    traced = jax.jit(lambda params, *inputs: nnx.merge(graphdef, params)(*inputs)).trace(params, images, before, after)
    counted = flops(config, 15, 12, cached=False)
    assert count_flops(traced.jaxpr.jaxpr) == sum(counted.values()) - counted["readout"]


def test_xla_counts_as_many_operations_of_each_stage():
    """It counts sums, softmax and norms as well: a little more, never less."""
    graphdef, state = nnx.split(abstract_model(SMALL).unrolled())
    params = nnx.to_pure_dict(state)
    stages = stage_programs(graphdef, text(30, 12), LEVEL_IDS, preprocessing(SMALL), "float32")
    pixels = jax.ShapeDtypeStruct((1, 112, 112, 3), np.uint8)
    counted = flops(SMALL, 30, 12)
    inputs = {"prefix": (), "vision": (pixels,)}
    inputs["abstractor"] = (jax.eval_shape(stages["vision"], params, pixels),)
    tokens = jax.eval_shape(stages["abstractor"], params, *inputs["abstractor"])
    inputs["language"] = (tokens, jax.eval_shape(stages["prefix"], params))
    for stage, given in inputs.items():
        analysed = stages[stage].lower(params, *given).compile().cost_analysis()["flops"]
        assert counted[stage] <= analysed <= 1.05 * counted[stage], stage
