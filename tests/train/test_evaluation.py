"""Held-out images: the numbers are those of the scorer and of the metrics, whatever the batches are."""

import json

import numpy as np
import pytest
import scipy.special
from flax import nnx
from small_runs import rating, write_metas, write_tiny

from deqa_jax import metrics
from deqa_jax.checkpoint import Checkpoint
from deqa_jax.config import Execution, MeshConfig
from deqa_jax.data.metas import MetaError
from deqa_jax.data.soft_labels import soft_labels
from deqa_jax.parameters import abstract_model, parameter_shapes
from deqa_jax.scorer import Scorer
from deqa_jax.sharding import make_mesh, parameter_shardings
from deqa_jax.train.evaluation import Evaluator, open_held_out


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Two sets with pictures, and a model."""
    root = tmp_path_factory.mktemp("held-out")
    write_tiny(root / "M")
    write_metas(root, "a.json", [rating(index) for index in range(11)])
    write_metas(root, "b.json", [rating(index) for index in range(20, 27)])
    return root


@pytest.fixture(scope="module")
def evaluator(root):
    """An evaluator of some sets, over all devices."""
    checkpoint = Checkpoint.open(root / "M")
    mesh = make_mesh(MeshConfig())

    def make(names, batch_size=8):
        return Evaluator(
            checkpoint,
            nnx.graphdef(abstract_model(checkpoint.config, Execution())),
            open_held_out([str(root / name) for name in names], str(root)),
            dtype="float32",
            batch_size=batch_size,
            mesh=mesh,
        )

    return make


@pytest.fixture(scope="module")
def params(root):
    checkpoint = Checkpoint.open(root / "M")
    shardings = parameter_shardings(parameter_shapes(checkpoint.config), make_mesh(MeshConfig()))
    return checkpoint.restore("float32", shardings=shardings)


@pytest.fixture(scope="module")
def found(evaluator, params):
    """What sets come to, alone and together."""
    return {names: evaluator(names.split())(params) for names in ("a.json", "b.json", "a.json b.json")}


def by_the_scorer(root, name):
    """The same numbers from the scorer, written out."""
    entries = json.loads((root / name).read_text())
    prediction = Scorer.from_pretrained(root / "M", dtype="float32", prompt="eval").predict(
        [root / entry["image"] for entry in entries]
    )
    probs = scipy.special.softmax(prediction.logits.astype(np.float64), axis=1)
    truth, mean, std = (np.array([e[key] for e in entries]) for key in ("gt_score", "gt_score_norm", "std_norm"))
    labels = soft_labels(mean, std, density="pdf", min_std=0.2, max_error=0.1).probs
    safe = np.where(labels > 0, labels, 1)
    return {
        "loss": np.sum(labels * np.log(safe / probs), axis=1).mean(),
        "srcc": metrics.srcc(prediction.score.astype(np.float64), truth),
        "plcc": metrics.plcc(prediction.score.astype(np.float64), truth),
        "js": metrics.js_divergence(
            mean, std, prediction.score.astype(np.float64), prediction.std.astype(np.float64)
        ).mean(),
    }


@pytest.mark.parametrize("name", ["a.json", "b.json"])
def test_numbers_are_those_of_the_scorer_and_the_metrics(name, found, root):
    expected = by_the_scorer(root, name)
    assert found[name].keys() == expected.keys()
    assert found[name]["srcc"] == pytest.approx(expected["srcc"], abs=1e-12)
    for key in ("loss", "plcc", "js"):
        assert found[name][key] == pytest.approx(expected[key], rel=3e-5)


def test_several_sets_are_averaged(found):
    for key, value in found["a.json b.json"].items():
        assert value == pytest.approx((found["a.json"][key] + found["b.json"][key]) / 2, rel=1e-6)
        assert found["a.json"][key] != found["b.json"][key]


def test_a_batch_larger_than_the_set_is_padded_and_the_padding_not_counted(evaluator, params, found):
    """Eleven images: a full batch of eight and three; here one of sixteen."""
    wide = evaluator(["a.json"], batch_size=16)(params)
    assert wide == pytest.approx(found["a.json"], rel=1e-5)


def test_other_parameters_give_other_numbers(evaluator, params, found):
    path = ("language", "head", "kernel")
    changed = evaluator(["a.json"])({**params, path: -params[path]})
    assert abs(changed["loss"] - found["a.json"]["loss"]) > 0.01


def test_numbers_are_plain(found):
    assert {type(value) for value in found["a.json"].values()} == {float}
    assert list(found["a.json"]) == ["loss", "srcc", "plcc", "js"]


def test_the_model_prefers_nothing_where_all_opinions_are_one(evaluator, params, root):
    """A correlation that does not exist is no number, and no failure."""
    write_metas(root, "flat.json", [{**rating(index), "gt_score": 3.0} for index in range(3)])
    flat = evaluator(["flat.json"])(params)
    assert np.isnan(flat["srcc"])
    assert np.isfinite(flat["loss"])


def test_nothing_to_evaluate_on_is_nothing():
    assert open_held_out([], "anywhere") == []


@pytest.mark.parametrize("name", ["gt_score", "gt_score_norm", "std_norm"])
def test_metas_without_opinions_are_named(name, root, tmp_path):
    entries = [rating(0), {key: value for key, value in rating(1).items() if key != name}]
    (tmp_path / "m.json").write_text(json.dumps(entries))
    with pytest.raises(MetaError) as error:
        open_held_out([str(tmp_path / "m.json")], str(root))
    assert str(error.value).startswith(f"{tmp_path / 'm.json'}: 1->")
    assert name in str(error.value)


def test_a_missing_picture_is_named(root, tmp_path):
    (tmp_path / "m.json").write_text(json.dumps([rating(0)]))
    with pytest.raises(MetaError, match="there is no image"):
        open_held_out([str(tmp_path / "m.json")], str(tmp_path))


def test_missing_metas_are_named(root):
    with pytest.raises(MetaError, match=r"absent\.json"):
        open_held_out([str(root / "absent.json")], str(root))
