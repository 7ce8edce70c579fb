import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deqa_jax.config import Execution
from deqa_jax.model.layers import linear
from deqa_jax.model.llama import Branched, Layout, Rotation, rotary_frequencies


@pytest.mark.parametrize(
    "layout", [Layout(2, 3, 4), Layout(0, 3, 2), Layout(3, 2, 0), Layout(0, 4, 0), Layout(5, 0, 0)]
)
def test_each_branch_reads_only_its_own_tokens(layout: Layout) -> None:
    text, visual = (linear(4, 6, bias=False, execution=Execution(), rngs=nnx.Rngs(seed)) for seed in range(2))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, sum(layout), 4), np.float32))
    is_visual = np.zeros(sum(layout), bool)
    is_visual[layout.before : layout.before + layout.visual] = True
    expected = np.where(is_visual[None, :, None], visual(x), text(x))
    np.testing.assert_allclose(Branched(text, visual)(x, layout), expected, atol=1e-6)


def test_rotation_turns_pairs_by_position() -> None:
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 3, 2, 8), np.float32))
    turned = Rotation.at(5, 3, 8, 10000.0)(x)
    for i, frequency in enumerate(10000.0 ** (-np.arange(0, 8, 2) / 8)):
        pairs = np.asarray(x[..., i], np.float64) + 1j * np.asarray(x[..., i + 4], np.float64)
        pairs = pairs * np.exp(1j * (5 + np.arange(3)) * frequency)[None, :, None]
        np.testing.assert_allclose(turned[..., i], pairs.real, atol=1e-5)
        np.testing.assert_allclose(turned[..., i + 4], pairs.imag, atol=1e-5)


def test_last_rotation_is_that_of_the_last_position() -> None:
    whole, last = Rotation.at(2, 6, 4, 10000.0), Rotation.at(7, 1, 4, 10000.0)
    np.testing.assert_array_equal(whole.last().cos, last.cos)
    np.testing.assert_array_equal(whole.last().sin, last.sin)


def test_rotary_frequencies_fall_from_one() -> None:
    frequencies = rotary_frequencies(128, 10000.0)
    assert frequencies.dtype == np.float32
    np.testing.assert_allclose(frequencies, 10000.0 ** (-np.arange(64) / 64), rtol=1e-6)
