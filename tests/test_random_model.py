"""Models of random weights: reproducible, and complete enough to score with."""

import json

import numpy as np
import pytest
from small_runs import TINY

from deqa_jax import random_model
from deqa_jax.checkpoint import Checkpoint
from deqa_jax.compilation import use_compilation_cache
from deqa_jax.config import PRESETS, MeshConfig
from deqa_jax.parameters import parameter_shapes
from deqa_jax.preprocess import PreprocessConfig
from deqa_jax.prompt import IMAGE_ID, LEVELS, PROMPTS, Tokenizer
from deqa_jax.quantize import KERNEL_SCALE, SCHEMES, is_quantized, parameter_dtype, quantize
from deqa_jax.random_model import RandomCheckpoint, init, random_side_files
from deqa_jax.scorer import Scorer
from deqa_jax.sharding import make_mesh, parameter_shardings


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    use_compilation_cache()
    out = tmp_path_factory.mktemp("random") / "M"
    init(out, seed=7, dtype="bfloat16")
    return out


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[path], b[path]) for path in a)


def test_the_same_seed_gives_the_same_bits(model, tmp_path):
    init(tmp_path / "again", seed=7, dtype="bfloat16")
    again, first = Checkpoint.open(tmp_path / "again"), Checkpoint.open(model)
    assert again.config == first.config == PRESETS["test"]
    assert same(again.restore(), first.restore())
    for name in random_side_files():
        assert (tmp_path / "again" / name).read_bytes() == (model / name).read_bytes()


def test_another_seed_gives_other_weights(model, tmp_path):
    init(tmp_path / "other", seed=8, dtype="bfloat16")
    first, other = Checkpoint.open(model).restore(), Checkpoint.open(tmp_path / "other").restore()
    assert first.keys() == other.keys()
    matrices = [path for path in first if path[-1] in ("kernel", "embedding")]
    assert matrices
    assert not any(np.array_equal(first[path], other[path]) for path in matrices)


def test_the_dtype_is_what_is_stored(model):
    assert {str(leaf.dtype) for leaf in Checkpoint.open(model).stored.values()} == {"bfloat16"}


def test_the_provenance_says_the_command_and_that_scores_mean_nothing(model):
    opened = Checkpoint.open(model)
    assert opened.published_config is None
    assert opened.provenance["source"].startswith("deqa init --size test --seed 7 --dtype bfloat16: ")
    assert "scores mean nothing" in opened.provenance["source"]


def test_scores_are_from_one_to_five(model, images):
    scores = Scorer.from_pretrained(model)([images / "square.png", images / "tall.jpg", images / "gray.png"])
    assert scores.dtype == np.float32
    assert np.all((scores >= 1) & (scores <= 5))
    assert len(set(scores.tolist())) == 3


def test_an_existing_folder_is_refused_before_any_work(model, monkeypatch):
    monkeypatch.setattr(random_model, "Deqa", lambda *_, **__: pytest.fail("weights are made for nothing"))
    before = sorted(model.iterdir())
    with pytest.raises(FileExistsError, match="exists already"):
        init(model)
    assert sorted(model.iterdir()) == before


def test_each_level_word_is_one_token(side_files, tmp_path):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(side_files["tokenizer.model"])
    tokenizer = Tokenizer(path)
    assert len(tokenizer) <= PRESETS["test"].language.vocab_size
    assert len(set(tokenizer.level_ids())) == 5
    for level, token in zip(LEVELS, tokenizer.level_ids(), strict=True):
        assert tokenizer.encode(f"The quality of the image is {level}")[-1] == token
    for prompt in PROMPTS.values():
        ids = tokenizer.encode_with_images(prompt)
        assert ids.count(IMAGE_ID) == 1
        assert 0 not in ids  # <unk>


def test_the_preprocessing_is_the_published_one(side_files, shared):
    published = json.loads((shared / "tokenizer" / "preprocessor_config.json").read_text())
    made = json.loads(side_files["preprocessor_config.json"])
    assert PreprocessConfig.from_published(made) == PreprocessConfig.from_published(published)


# ---- weights that are made when they are read -------------------------------------------------------------


@pytest.fixture(scope="module")
def unwritten(tmp_path_factory):
    return RandomCheckpoint.make(TINY, tmp_path_factory.mktemp("unwritten"))


def test_an_unwritten_checkpoint_has_every_parameter(unwritten):
    leaves = unwritten.restore("bfloat16")
    assert {path: leaf.shape for path, leaf in leaves.items()} == parameter_shapes(TINY)
    assert {str(leaf.dtype) for leaf in leaves.values()} == {"bfloat16"}
    for path, leaf in leaves.items():
        if path[-1] in ("scale", "bias"):
            assert (leaf == (path[-1] == "scale")).all()
        else:
            assert 0 < np.std(leaf.astype(np.float32)) < 1
    assert same(unwritten.restore(only=leaves), unwritten.restore())


def test_blocks_of_an_unwritten_checkpoint_lie_apart(unwritten):
    """Weights that are read once do not come from a cache that another block has filled."""
    path = ("language", "layers", "gate", "kernel")
    kernel = unwritten.restore(only=[path])[path]
    assert kernel.flags.c_contiguous
    assert kernel.flags.owndata


@pytest.mark.parametrize("scheme", SCHEMES)
def test_an_unwritten_checkpoint_is_quantised_as_a_written_one(scheme, unwritten, tmp_path):
    checkpoint = RandomCheckpoint.make(TINY, tmp_path, scheme)
    leaves, whole = checkpoint.restore("bfloat16"), unwritten.restore()
    assert {path: leaf.shape for path, leaf in leaves.items()} == parameter_shapes(TINY, scheme)
    assert {path: leaf.dtype for path, leaf in checkpoint.restore().items()} == {
        path: leaf.dtype for path, leaf in checkpoint.stored.items()
    }
    for path, leaf in leaves.items():
        assert leaf.dtype == parameter_dtype(path, scheme, "bfloat16")
        if is_quantized(path):
            kernel, scale = quantize(whole[path][-1], scheme)
            np.testing.assert_array_equal(leaf[-1], kernel)
            np.testing.assert_array_equal(leaves[*path[:-1], KERNEL_SCALE][-1], scale)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    assert same(
        checkpoint.restore(), checkpoint.restore(shardings=parameter_shardings(parameter_shapes(TINY, scheme), mesh))
    )


def test_an_unwritten_checkpoint_is_split_over_devices(unwritten):
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    paths = [("language", "layers", "gate", "kernel"), ("language", "final_norm", "scale")]
    shardings = parameter_shardings(parameter_shapes(TINY), mesh)
    whole, split = unwritten.restore(only=paths), unwritten.restore(shardings=shardings, only=paths)
    assert same(whole, split)
    assert all(split[path].sharding == shardings[path] for path in paths)


def test_an_unwritten_checkpoint_belongs_to_its_image_size(unwritten):
    assert unwritten.preprocess().size == TINY.vision.image_size
    assert sorted(path.name for path in unwritten.folder.iterdir()) == sorted(random_side_files())
