"""What is trained and how fast: rules, AdamW by hand, and no state for what is frozen."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deqa_jax import lora
from deqa_jax.config import PRESETS, ConfigError
from deqa_jax.lora import LoraConfig
from deqa_jax.parameters import parameter_shapes
from deqa_jax.train.optimizer import OptimizerConfig, ParameterRule, make_optimizer, multipliers, schedule

FULL = PRESETS["full"]
# Of the published LoRA run.
LORA_RULES = [ParameterRule("lora_|^vision/|^abstractor/", 1.0), ParameterRule("", 0.0)]
KERNEL, BIAS, SCALE = ("tower", "dense", "kernel"), ("tower", "dense", "bias"), ("tower", "norm", "scale")


# ---- rules ------------------------------------------------------------------------------------------------


def test_the_first_rule_found_in_a_path_decides() -> None:
    paths = list(parameter_shapes(FULL))
    rules = [
        ParameterRule("^vision/.*norm", 0.0),
        ParameterRule("^vision/", 0.1),
        ParameterRule("norm", 3.0),
        ParameterRule("", 1.0),
    ]
    found = multipliers(paths, rules)
    assert found.keys() == set(paths)
    assert found["vision", "layers", "input_norm", "scale"] == 0
    assert found["vision", "layers", "up", "kernel"] == 0.1
    assert found["abstractor", "layers", "ffn_norm", "scale"] == 3
    assert found["language", "layers", "input_norm", "visual", "scale"] == 3
    assert found["language", "head", "kernel"] == 1
    # The same rules in another order are other rules, and those that nothing is left for are named.
    with pytest.raises(ConfigError, match="'norm', '' is the first match of no parameter"):
        multipliers([path for path in paths if path[0] == "vision"], rules)
    with pytest.raises(ConfigError, match=r"'norm', '\^vision/', '\^vision/\.\*norm' is the first match of no"):
        multipliers(paths, rules[::-1])


def test_every_parameter_without_a_rule_is_named() -> None:
    with pytest.raises(ConfigError) as caught:
        multipliers([KERNEL, BIAS, SCALE], [ParameterRule("kernel$", 1.0)])
    assert "tower/dense/bias, tower/norm/scale" in str(caught.value)
    assert "tower/dense/kernel" not in str(caught.value)


def test_a_pattern_that_matches_nothing_is_an_error() -> None:
    """A misspelt name would else train, or freeze, something other than was meant."""
    with pytest.raises(ConfigError, match="'visoin' is the first match of no parameter"):
        multipliers([KERNEL], [ParameterRule("visoin", 0.0), ParameterRule("", 1.0)])


@pytest.mark.parametrize("rules", [[ParameterRule("", 0.0)], [ParameterRule("kernel", 0.0), ParameterRule("", 0.0)]])
def test_everything_frozen_is_an_error(rules: list[ParameterRule]) -> None:
    with pytest.raises(ConfigError, match="everything is frozen"):
        multipliers([KERNEL, BIAS], rules)


@pytest.mark.parametrize(
    "values",
    [
        {"learning_rate": 0.0},
        {"learning_rate": math.nan},
        {"warmup_ratio": 1.0},
        {"warmup_ratio": -0.1},
        {"clip_norm": 0.0},
        {"accumulate": 0},
    ],
)
def test_settings_out_of_range_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="optimizer: "):
        OptimizerConfig(**values)


# ---- schedule ---------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(
    st.integers(1, 20000), st.floats(0, 0.99), st.floats(1e-6, 1.0), st.lists(st.floats(0, 1), min_size=1, max_size=5)
)
def test_schedule_is_the_published_one(steps: int, ratio: float, peak: float, where: list[float]) -> None:
    rate = schedule(OptimizerConfig(learning_rate=peak, warmup_ratio=ratio), steps)
    warmup = math.ceil(ratio * steps)
    for step in {0, warmup, *(int(x * (steps - 1)) for x in where)}:
        if step < warmup:
            expected = peak * step / warmup
        else:
            expected = 0.5 * peak * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))
        assert float(rate(step)) == pytest.approx(expected, rel=1e-4, abs=2e-7 * peak)


def test_schedule_starts_at_nothing_peaks_after_warm_up_and_ends_at_nothing() -> None:
    rate = schedule(OptimizerConfig(learning_rate=2e-5), 1000)
    values = np.array([float(rate(step)) for step in range(1001)])
    assert values[0] == 0
    assert values.argmax() == 30
    assert values[30] == pytest.approx(2e-5)
    assert values[-1] == pytest.approx(0, abs=1e-12)
    assert (np.diff(values[:31]) > 0).all()
    assert (np.diff(values[30:]) < 0).all()


def test_without_warm_up_the_first_step_is_the_largest() -> None:
    rate = schedule(OptimizerConfig(learning_rate=1.0, warmup_ratio=0.0), 10)
    assert float(rate(0)) == 1


# ---- AdamW ------------------------------------------------------------------------------------------------


def small_params(seed: int = 0) -> dict[tuple[str, ...], jax.Array]:
    random = np.random.default_rng(seed)
    shapes = {KERNEL: (4, 3), BIAS: (3,), SCALE: (4,)}
    return {path: jnp.asarray(random.normal(0, 1, shape).astype(np.float32)) for path, shape in shapes.items()}


def run(
    config: OptimizerConfig, gradients: list[Mapping[Any, jax.Array]], rates: dict[Any, float], steps: int = 8
) -> list[dict[Any, np.ndarray]]:
    """Parameters after each of the gradients."""
    params = {path: leaf for path, leaf in small_params().items() if path in rates}
    optimizer = make_optimizer(config, steps, rates)
    state, found = optimizer.init(params), []
    for gradient in gradients:
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update({path: gradient[path] for path in params}, state, params)
        params = {path: leaf + updates[path] for path, leaf in params.items()}
        found.append({path: np.asarray(leaf) for path, leaf in params.items()})
    return found


def adamw(config: OptimizerConfig, gradients: list[Any], rates: dict[Any, float], steps: int = 8) -> list[Any]:
    """The same in float64, after PyTorch's documentation, with clipping as `clip_grad_norm_` does it."""
    params = {path: np.asarray(small_params()[path], np.float64) for path in rates}
    first = {path: np.zeros_like(leaf) for path, leaf in params.items()}
    second = {path: np.zeros_like(leaf) for path, leaf in params.items()}
    warmup, found = math.ceil(config.warmup_ratio * steps), []
    for i, gradient in enumerate(gradients):
        exact = {path: np.asarray(gradient[path], np.float64) for path in params}
        norm = math.sqrt(sum(np.sum(leaf**2) for leaf in exact.values()))
        rate = config.learning_rate * (
            i / warmup if i < warmup else 0.5 * (1 + math.cos(math.pi * (i - warmup) / (steps - warmup)))
        )
        for path, leaf in params.items():
            g = exact[path] * min(1.0, config.clip_norm / norm)
            first[path] = config.b1 * first[path] + (1 - config.b1) * g
            second[path] = config.b2 * second[path] + (1 - config.b2) * g**2
            step = first[path] / (1 - config.b1 ** (i + 1))
            step = step / (np.sqrt(second[path] / (1 - config.b2 ** (i + 1))) + config.epsilon)
            if path[-1] == "kernel":
                step = step + config.weight_decay * leaf
            params[path] = leaf - rate * rates[path] * step
        found.append(dict(params))
    return found


CONFIGS = {
    "published": OptimizerConfig(learning_rate=0.1),
    "clipping": OptimizerConfig(learning_rate=0.1, clip_norm=0.01),
    "no clipping": OptimizerConfig(learning_rate=0.1, clip_norm=1e9),
    "decay": OptimizerConfig(learning_rate=0.1, weight_decay=0.3, b1=0.5, b2=0.8, epsilon=1e-2, warmup_ratio=0.4),
}


@pytest.mark.parametrize("rates", [(1.0, 1.0, 1.0), (0.1, 1.0, 2.5)])
@pytest.mark.parametrize("name", CONFIGS)
def test_updates_are_those_of_adamw(name: str, rates: tuple[float, ...]) -> None:
    """With multipliers of the learning rate, which the decay is a part of."""
    gradients = [{path: leaf * 10.0**-i for path, leaf in small_params(seed=i + 1).items()} for i in (0, 1, 2, 0, 1, 2)]
    multiplied = dict(zip((KERNEL, BIAS, SCALE), rates, strict=True))
    ours, exact = (how(CONFIGS[name], gradients, multiplied) for how in (run, adamw))
    # 1 − 0.999ᵗ in float32 makes a step of 0.1 good to 3e-6.
    for one, other in zip(ours, exact, strict=True):
        for path in multiplied:
            np.testing.assert_allclose(one[path], other[path], rtol=0, atol=1e-5)


def test_weight_decay_spares_norms_and_biases() -> None:
    """Without a gradient, decay alone moves what it is meant for."""
    names = list(parameter_shapes(FULL))
    adapters = lora.adapter_shapes(parameter_shapes(FULL), LoraConfig())
    params = {path: jnp.ones((2,)) for path in [*names, *adapters]}
    config = OptimizerConfig(learning_rate=1.0, weight_decay=0.1, warmup_ratio=0.0)
    optimizer = make_optimizer(config, 10, dict.fromkeys(params, 1.0))
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    moved = {path for path, update in updates.items() if np.asarray(update).any()}
    spared = set(params) - moved
    assert all(path[-1] in ("scale", "bias") for path in spared)
    assert all(path[-1] not in ("scale", "bias") for path in moved)
    # Every norm and every bias is among them, whatever it is called.
    shapes = parameter_shapes(FULL)
    vectors = {path for path in shapes if len(shapes[path]) == (2 if "layers" in path else 1)}
    assert vectors - spared <= {("vision", "class_token"), ("abstractor", "end_token")}
    assert ("language", "embedding") in moved
    assert ("language", "layers", "query", "lora_b") in moved


def test_the_clipped_norm_is_of_the_trained_parameters_alone() -> None:
    """A gradient of something frozen is not there, so it takes no part in the norm."""
    gradient = small_params(5)
    config = OptimizerConfig(learning_rate=0.1, clip_norm=0.5, warmup_ratio=0.0)
    some = {KERNEL: 1.0, BIAS: 1.0}
    np.testing.assert_allclose(
        run(config, [gradient] * 2, some)[-1][KERNEL], adamw(config, [gradient] * 2, some)[-1][KERNEL], atol=1e-5
    )


# ---- accumulation -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("multiplied", [1.0, 0.3])
def test_accumulated_batches_make_the_step_of_their_mean(multiplied: float) -> None:
    rates = {KERNEL: multiplied, BIAS: 1.0, SCALE: 1.0}
    parts = [small_params(seed) for seed in range(1, 7)]
    means = [jax.tree.map(lambda *x: sum(x) / 3, *parts[start : start + 3]) for start in (0, 3)]
    config = OptimizerConfig(learning_rate=0.1, weight_decay=0.1, clip_norm=0.5, warmup_ratio=0.25)
    accumulating = OptimizerConfig(learning_rate=0.1, weight_decay=0.1, clip_norm=0.5, warmup_ratio=0.25, accumulate=3)
    small, large = run(accumulating, parts, rates), run(config, means, rates)
    start = {path: np.asarray(leaf) for path, leaf in small_params().items()}
    for path in rates:
        # Nothing moves in between, and the schedule counts steps, not batches.
        for i, expected in enumerate([start, start, large[0], large[0], large[0], large[1]]):
            np.testing.assert_allclose(small[i][path], expected[path], rtol=1e-5, atol=1e-7)
    assert not np.array_equal(large[1][KERNEL], start[KERNEL])


# ---- state ------------------------------------------------------------------------------------------------


def state_shapes(trained: Mapping[Any, tuple[int, ...]], **values: Any) -> list[tuple[int, ...]]:
    """Shapes of all of the optimiser's state that is not a scalar, without making any of it."""
    params = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in trained.items()}
    optimizer = make_optimizer(OptimizerConfig(**values), 100, dict.fromkeys(trained, 1.0))
    state = jax.eval_shape(optimizer.init, params)
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} <= {
        jnp.dtype("float32"),
        jnp.dtype("int32"),
        jnp.dtype(bool),
    }
    return [leaf.shape for leaf in jax.tree.leaves(state) if leaf.shape]


def test_frozen_parameters_have_no_optimizer_state_at_the_published_size() -> None:
    shapes = parameter_shapes(FULL)
    shapes = {**shapes, **lora.adapter_shapes(shapes, LoraConfig())}
    rates = multipliers(shapes, LORA_RULES)
    trained = {path: shapes[path] for path, rate in rates.items() if rate}
    # Vision tower, abstractor, and 32 layers of two adapters of rank 128 on 4096 x 4096.
    count = 303_966_208 + 81_473_536 + 32 * 2 * 2 * 128 * 4096
    assert sum(map(math.prod, trained.values())) == count
    assert not any(path[0] == "language" and "lora" not in path[-1] for path in trained)
    found = state_shapes(trained)
    assert sum(map(math.prod, found)) == 2 * count
    assert sorted(found) == sorted([*trained.values()] * 2)


def test_the_state_of_full_tuning_is_two_moments() -> None:
    shapes = parameter_shapes(FULL)
    assert sum(map(math.prod, state_shapes(shapes))) == 2 * sum(map(math.prod, shapes.values()))
    # And one more to accumulate in.
    assert sum(map(math.prod, state_shapes(shapes, accumulate=4))) == 3 * sum(map(math.prod, shapes.values()))
