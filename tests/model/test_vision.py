import jax.numpy as jnp
import numpy as np

from deqa_jax.model.vision import patches, quick_gelu


def test_patches_are_row_major_and_hold_their_window() -> None:
    image = np.arange(2 * 6 * 6 * 3, dtype=np.float32).reshape(2, 6, 6, 3)
    found = patches(jnp.asarray(image), 2)
    assert found.shape == (2, 9, 12)
    np.testing.assert_array_equal(found[1, 5], image[1, 2:4, 4:6].reshape(-1))


def test_quick_gelu() -> None:
    x = np.linspace(-4, 4, 9)
    np.testing.assert_allclose(quick_gelu(jnp.asarray(x, jnp.float32)), x / (1 + np.exp(-1.702 * x)), atol=1e-6)
