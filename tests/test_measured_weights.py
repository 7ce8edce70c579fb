"""What a model starts from that is measured on pictures: of those, everything it reads is alike."""

import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deqa_jax.checkpoint import Checkpoint
from deqa_jax.cli import main
from deqa_jax.config import PRESETS
from deqa_jax.measured_weights import OUT, VALUE, VALUE_BIAS, _contexts, measured_weights
from deqa_jax.random_model import init

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
PATHS = sorted(EXAMPLES.glob("*.jpg"))


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    out = tmp_path_factory.mktemp("measured") / "M"
    init(out, seed=3, pictures=EXAMPLES)
    return Checkpoint.open(out)


def test_the_provenance_names_the_command(measured):
    command = f"deqa init --size test --seed 3 --dtype float32 --pictures {shlex.quote(str(EXAMPLES))}"
    assert f"{command}: random" in measured.provenance["source"]


@pytest.mark.parametrize("size", ["test", "tiny"])
def test_what_queries_read_is_standardised_and_then_whitened(size, tmp_path):
    init(tmp_path / "M", size=size, pictures=EXAMPLES)
    measured = Checkpoint.open(tmp_path / "M")
    arrays = measured.restore("float32")
    contexts = np.concatenate(list(_contexts(measured.config, arrays, PATHS, measured.preprocess())))
    assert contexts.shape == (12, measured.config.abstractor.num_queries, measured.config.abstractor.hidden_size)
    flat = contexts.reshape(-1, contexts.shape[-1]).astype(np.float64)
    np.testing.assert_allclose(flat.mean(axis=0), 0, atol=2e-3)
    np.testing.assert_allclose(flat.std(axis=0), 1, atol=2e-3)
    covariance = np.cov((flat @ arrays[OUT][0]).T, bias=True)
    variances = np.linalg.eigvalsh(np.cov(flat.T, bias=True))
    np.testing.assert_allclose(np.diag(covariance), variances / (variances + 1e-3), atol=0.02)
    np.testing.assert_allclose(covariance - np.diag(np.diag(covariance)), 0, atol=0.02)


def test_only_that_depends_on_pictures_and_the_same_ones_give_the_same_bits(measured, tmp_path):
    init(tmp_path / "without", seed=3)
    init(tmp_path / "again", seed=3, pictures=EXAMPLES)
    with_pictures, without = measured.restore("float32"), Checkpoint.open(tmp_path / "without").restore("float32")
    changed = {path for path in without if not np.array_equal(without[path], with_pictures[path])}
    assert changed == {VALUE, VALUE_BIAS, OUT}
    # Of a stack of blocks the first one.
    assert all(np.array_equal(without[path][1:], with_pictures[path][1:]) for path in changed)
    again = Checkpoint.open(tmp_path / "again").restore("float32")
    assert all(np.array_equal(again[path], with_pictures[path]) for path in again)


def test_pictures_that_are_all_the_same_do_no_harm(measured, tmp_path):
    for name in "ab":
        Image.new("RGB", (20, 20), "grey").save(tmp_path / f"{name}.png")
    found = measured_weights(PRESETS["test"], measured.restore("float32"), tmp_path, measured.preprocess())
    assert all(np.isfinite(array).all() for array in found.values())


@pytest.mark.parametrize("content", [None, b"no picture"])
def test_a_folder_without_good_pictures_is_named_and_nothing_written(tmp_path, capsys, content):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    if content is not None:
        (pictures / "bad.png").write_bytes(content)
    with pytest.raises(SystemExit, match="2"):
        main(["init", str(tmp_path / "M"), "--pictures", str(pictures)])
    assert ("no images in this folder" if content is None else "bad.png") in capsys.readouterr().err
    assert not (tmp_path / "M").exists()
