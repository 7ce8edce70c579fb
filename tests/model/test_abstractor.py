import numpy as np

from deqa_jax.config import PRESETS
from deqa_jax.model.abstractor import key_positions, query_positions

ABSTRACTOR = PRESETS["full"].abstractor


def test_query_positions_are_sines_then_cosines() -> None:
    table = query_positions(ABSTRACTOR)
    assert table.shape == (64, 1024)
    assert table.dtype == np.float32
    np.testing.assert_allclose(table[5, 7], np.sin(5 * 10000 ** (-7 / 512)), atol=3e-6)
    np.testing.assert_allclose(table[5, 512 + 7], np.cos(5 * 10000 ** (-7 / 512)), atol=3e-6)


def test_key_positions_encode_the_column_first_and_leave_the_class_token_out() -> None:
    table = key_positions(ABSTRACTOR, 32)
    assert table.shape == (1025, 1024)
    np.testing.assert_array_equal(table[0], 0)
    patch = table[1 + 3 * 32 + 20]  # row 3, column 20
    np.testing.assert_allclose(patch[2], np.sin(20 * 10000 ** (-2 / 256)), atol=3e-6)
    np.testing.assert_allclose(patch[512 + 256 + 2], np.cos(3 * 10000 ** (-2 / 256)), atol=3e-6)
