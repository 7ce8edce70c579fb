"""What the program says of a batch is what the levels' logits mean."""

import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from deqa_jax.prompt import LEVEL_WEIGHTS
from deqa_jax.scoring_program import readout


@given(st.lists(st.floats(-30, 30, width=32), min_size=5, max_size=5))
@settings(max_examples=50, deadline=None)
def test_readout_is_mean_and_deviation_of_the_softmax(logits: list[float]) -> None:
    found = readout(jnp.asarray([logits], jnp.float32))
    probs = np.exp(np.asarray(logits) - max(logits))
    probs /= probs.sum()
    mean = probs @ LEVEL_WEIGHTS
    np.testing.assert_allclose(found.probs[0], probs, atol=1e-6)
    np.testing.assert_allclose(found.score[0], mean, atol=1e-5)
    np.testing.assert_allclose(found.std[0], np.sqrt(probs @ (np.asarray(LEVEL_WEIGHTS) - mean) ** 2), atol=1e-3)
