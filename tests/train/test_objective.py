"""The loss of a batch: all settings of the PyTorch implementation, and what must not matter to it."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from training import (
    ABSENT,
    GOLDEN_SETTINGS,
    LEVEL_IDS,
    SMALL,
    SMALL_LEVELS,
    batch_name,
    golden_batches,
    golden_leaves,
    golden_objective,
    golden_runs,
    golden_task,
    jit,
    small_batch,
)

from deqa_jax.config import ConfigError
from deqa_jax.parameters import unflatten
from deqa_jax.train.objective import Batch, Objective, batch_loss
from deqa_jax.train.step import answer_logits

# ---- against PyTorch --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def golden_logits() -> dict[str, jax.Array]:
    """Logits of every golden batch, all examples in one pass."""
    task, batches = golden_task(), golden_batches().batches

    def rows(batch: Batch) -> Batch:
        return jax.tree.map(lambda x: x.reshape(-1, 1, *x.shape[2:]) if x.ndim > 1 else x, batch)

    joined = jax.tree.map(lambda *parts: jnp.concatenate(parts), *map(rows, batches.values()))

    @jit
    def run(leaves: Any, batch: Batch) -> jax.Array:
        model = nnx.merge(task.graph(training=True), unflatten(leaves))
        with jax.default_matmul_precision("highest"):
            return answer_logits(model, task, batch)

    logits, start = run(golden_leaves(), joined), 0
    found = {}
    for name, batch in batches.items():
        shape = batch.after.shape
        stop = start + shape[0] * shape[1]
        found[name], start = logits[start:stop].reshape(*shape, -1), stop
    assert start == len(logits)
    return found


@pytest.mark.parametrize("setting", GOLDEN_SETTINGS)
def test_every_setting_equals_pytorch(golden_logits: dict[str, jax.Array], setting: str) -> None:
    batch = golden_batches().batches[batch_name(setting)]
    loss, terms = batch_loss(
        golden_logits[batch_name(setting)], batch, jnp.asarray(LEVEL_IDS), golden_objective(setting)
    )
    expected = golden_runs()[setting]
    np.testing.assert_allclose(loss, expected["loss"], rtol=1e-5)
    compared = {term for term in terms if term in expected}
    assert len(compared) == (0 if setting.startswith("single") else 8)
    for term in compared:
        ours = np.asarray(terms[term])
        if term.startswith(("score", "std")):
            np.testing.assert_allclose(ours[np.asarray(batch.is_score)], expected[term], atol=3e-5, rtol=0)
            # The open set's are small: there, digits are what counts.
            np.testing.assert_allclose(ours[np.asarray(batch.is_score)], expected[term], rtol=1e-4)
        else:
            np.testing.assert_allclose(ours, expected[term], rtol=1e-5)


def test_all_published_settings_are_here() -> None:
    assert len(GOLDEN_SETTINGS) == 14


# ---- what makes up the loss -------------------------------------------------------------------------------

VOCABULARY, SMALL_IDS = SMALL.language.vocab_size, jnp.asarray(SMALL_LEVELS)


def random_logits(batch: Batch, seed: int = 0, scale: float = 3.0) -> jax.Array:
    random = np.random.default_rng(seed)
    return jnp.asarray(random.normal(0, scale, (*batch.after.shape, VOCABULARY)).astype(np.float32))


def loss_and_gradient(logits: jax.Array, batch: Batch, objective: Objective) -> tuple[Any, jax.Array]:
    return jax.value_and_grad(batch_loss, has_aux=True)(logits, batch, SMALL_IDS, objective)


OBJECTIVES = {
    "published": Objective(),
    "everything": Objective(weight_rank=0.3, weight_next_token=0.7, weight_softkl=1.5, weight_in_level=0.4),
    "predicted deviations": Objective(use_fix_std=False, detach_pred_std=False, weight_desp=0.6),
    "binary, open set": Objective(continuous_rating_loss=False, closeset_rating_loss=False, binary_rating_loss="bce"),
    "no soft labels": Objective(softkl_loss=False),
}


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("sides", [1, 2])
def test_loss_is_the_weighted_sum_of_its_terms(name: str, sides: int) -> None:
    objective, batch = OBJECTIVES[name], small_batch(4, sides, descriptions=[1, 3])
    (loss, terms), _ = loss_and_gradient(random_logits(batch), batch, objective)
    expected = objective.weight_desp * terms["description"] + objective.weight_next_token * terms["next_token_A"]
    if sides == 2:
        expected += objective.weight_next_token * terms["next_token_B"] + objective.weight_rank * terms["rank"]
        expected += objective.weight_in_level * (terms["in_level_A"] + terms["in_level_B"])
    else:
        assert not {"rank", "next_token_B", "score_B"} & terms.keys()
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    assert all(np.asarray(term).dtype == np.float32 for term in terms.values())


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Objective)])
def test_every_setting_matters(field: str) -> None:
    batch = small_batch(4, descriptions=[2])
    other = {"binary_rating_loss": "bce"}
    # Where predicted deviations are used and the order alone counts, respectively.
    base = {
        "detach_pred_std": Objective(use_fix_std=False),
        "binary_rating_loss": Objective(continuous_rating_loss=False),
    }.get(field, Objective())
    value = getattr(base, field)
    changed = dataclasses.replace(base, **{field: other.get(field, not value if value in (True, False) else value)})
    if changed == base or isinstance(value, float):
        changed = dataclasses.replace(base, **{field: value + 0.5})
    logits = random_logits(batch)
    before, after = (loss_and_gradient(logits, batch, objective) for objective in (base, changed))
    assert np.abs(before[1] - after[1]).max() > 1e-5
    # A gradient that is stopped leaves the value as it is.
    assert (abs(before[0][0] - after[0][0]) > 1e-5) == (field != "detach_pred_std")


def test_an_unknown_binary_loss_is_refused() -> None:
    with pytest.raises(ConfigError, match="fidelity or bce, not 'hinge'"):
        Objective(binary_rating_loss="hinge")


def test_terms_equal_a_loop_over_examples() -> None:
    """Which positions, labels and rows each term takes, written out one example at a time in float64."""
    batch = small_batch(4, descriptions=[1, 3], seed=3)
    # Answers of several lengths, so that means of positions and means of examples differ.
    labels = np.array(batch.labels)
    labels[1, 0, 5:] = labels[2, 1, :6] = -100
    batch = batch._replace(labels=jnp.asarray(labels))
    logits = random_logits(batch, 3)
    (_, terms), _ = loss_and_gradient(logits, batch, OBJECTIVES["everything"])
    exact = np.asarray(logits, np.float64)
    exact -= np.log(np.sum(np.exp(exact), axis=-1, keepdims=True))
    for side, name in enumerate("AB"):
        entropies, kls, outside, scores = [], [], [], []
        for row in (0, 2):
            k = int(batch.level_position[row, side])
            for i, label in enumerate(labels[row, side]):
                if label != -100 and i != k:
                    entropies.append(-exact[row, side, i, label])
            level = exact[row, side, k, list(SMALL_LEVELS)]
            probs = np.asarray(batch.level_probs[row, side], np.float64)
            kls.append(np.sum(probs * (np.log(probs) - level)))
            outside.append(1 - np.exp(level).sum())
            scores.append(np.exp(level) / np.exp(level).sum() @ np.arange(5, 0, -1))
        np.testing.assert_allclose(terms[f"next_token_{name}"], np.mean(entropies) + 1.5 * np.mean(kls), rtol=1e-5)
        np.testing.assert_allclose(terms[f"in_level_{name}"], np.mean(outside), rtol=1e-5)
        np.testing.assert_allclose(np.asarray(terms[f"score_{name}"])[[0, 2]], scores, rtol=1e-5)
    described = [-exact[row, 0, i, x] for row in (1, 3) for i, x in enumerate(labels[row, 0]) if x != -100]
    np.testing.assert_allclose(terms["description"], np.mean(described), rtol=1e-5)


# ---- what must not matter ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("garbage", [-10000.0, math.nan, math.inf])
@pytest.mark.parametrize("descriptions", [[0, 2], [0, 1, 2, 3]])
def test_absent_fields_of_descriptions_change_nothing(name: str, garbage: float, descriptions: list[int]) -> None:
    batch, off = small_batch(4, descriptions=descriptions), jnp.asarray(descriptions)
    whole = -10000 if garbage == -10000 else 2**31 - 1
    dirty = batch._replace(
        level_probs=batch.level_probs.at[off].set(garbage),
        gt_score=batch.gt_score.at[off].set(garbage),
        gt_std=batch.gt_std.at[off].set(garbage),
        level_position=batch.level_position.at[off].set(whole),
    )
    logits = random_logits(batch)
    clean, found = (loss_and_gradient(logits, one, OBJECTIVES[name]) for one in (batch, dirty))
    assert np.isfinite(found[0][0])
    assert np.isfinite(found[1]).all()
    np.testing.assert_array_equal(clean[0][0], found[0][0])
    np.testing.assert_array_equal(clean[1], found[1])
    for term in ("description", "rank", "next_token_A", "in_level_B"):
        np.testing.assert_array_equal(clean[0][1][term], found[0][1][term])


def test_absent_opinions_matter_only_to_terms_that_use_them() -> None:
    """Without soft labels and deviations a run must not need them."""
    objective = Objective(softkl_loss=False, continuous_rating_loss=False)
    batch = small_batch(4)
    dirty = batch._replace(
        level_probs=jnp.full_like(batch.level_probs, ABSENT), gt_std=jnp.full_like(batch.gt_std, ABSENT)
    )
    logits = random_logits(batch)
    clean, found = (loss_and_gradient(logits, one, objective) for one in (batch, dirty))
    np.testing.assert_array_equal(clean[0][0], found[0][0])
    np.testing.assert_array_equal(clean[1], found[1])


@pytest.mark.parametrize("name", OBJECTIVES)
def test_descriptions_and_ratings_do_not_mix(name: str) -> None:
    """A batch of both has the terms that each part has alone."""
    both, objective = small_batch(4, descriptions=[1, 3]), OBJECTIVES[name]
    logits = random_logits(both)
    (_, terms), gradient = loss_and_gradient(logits, both, objective)
    for rows in ([0, 2], [1, 3]):
        part = jax.tree.map(lambda x, rows=rows: x[jnp.asarray(rows)], both)
        (_, alone), alone_gradient = loss_and_gradient(logits[jnp.asarray(rows)], part, objective)
        used = ["description"] if rows == [1, 3] else [term for term in terms if term != "description"]
        for term in used:
            expected = terms[term] if np.ndim(terms[term]) == 0 else terms[term][jnp.asarray(rows)]
            np.testing.assert_allclose(alone[term], expected, rtol=1e-6)
        np.testing.assert_allclose(gradient[jnp.asarray(rows)], alone_gradient, rtol=1e-5, atol=1e-8)
    # Of a description's second image nothing is asked.
    assert not np.asarray(gradient)[[1, 3], 1].any()
    assert np.asarray(gradient)[[1, 3], 0].any()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_order_of_examples_does_not_matter(name: str) -> None:
    batch, order = small_batch(4, descriptions=[1]), jnp.asarray([3, 1, 0, 2])
    logits = random_logits(batch)
    one = loss_and_gradient(logits, batch, OBJECTIVES[name])
    other = loss_and_gradient(logits[order], jax.tree.map(lambda x: x[order], batch), OBJECTIVES[name])
    np.testing.assert_allclose(one[0][0], other[0][0], rtol=1e-6)
    np.testing.assert_allclose(one[1][order], other[1], rtol=1e-5, atol=1e-8)


def test_sides_change_places_with_their_terms() -> None:
    batch = small_batch(4)
    logits = random_logits(batch)
    (loss, terms), gradient = loss_and_gradient(logits, batch, OBJECTIVES["everything"])
    swapped = jax.tree.map(lambda x: x[:, ::-1] if x.ndim > 1 else x, batch)
    (other, others), other_gradient = loss_and_gradient(logits[:, ::-1], swapped, OBJECTIVES["everything"])
    np.testing.assert_allclose(loss, other, rtol=1e-6)
    for term in ("score", "std", "next_token", "in_level"):
        np.testing.assert_allclose(terms[f"{term}_A"], others[f"{term}_B"], rtol=1e-6)
    np.testing.assert_allclose(gradient, other_gradient[:, ::-1], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_logits_behind_the_answer_change_nothing(name: str) -> None:
    """Padding of any length, with any finite logits, and the question in front of the answer."""
    batch = small_batch(4, descriptions=[3])
    logits = random_logits(batch)
    one = loss_and_gradient(logits, batch, OBJECTIVES[name])
    longer = batch._replace(
        after=jnp.pad(batch.after, ((0, 0), (0, 0), (0, 6))),
        labels=jnp.pad(batch.labels, ((0, 0), (0, 0), (0, 6)), constant_values=-100),
    )
    padded = jnp.pad(logits, ((0, 0), (0, 0), (0, 6), (0, 0)), constant_values=1e4)
    padded = padded.at[:, :, :3].set(-1e4)  # the question, but for its last token
    other = loss_and_gradient(padded, longer, OBJECTIVES[name])
    np.testing.assert_allclose(one[0][0], other[0][0], rtol=1e-6)
    np.testing.assert_allclose(one[1], other[1][:, :, :11], rtol=1e-5, atol=1e-8)
    assert not np.asarray(other[1])[:, :, 11:].any()


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("scale", [0.0, 100.0, 1e6])
def test_gradients_are_finite_whatever_the_logits(name: str, scale: float) -> None:
    batch = small_batch(4, descriptions=[3])
    (loss, terms), gradient = loss_and_gradient(random_logits(batch, scale=scale), batch, OBJECTIVES[name])
    assert all(np.isfinite(term).all() for term in terms.values())
    assert np.isfinite(loss)
    assert np.isfinite(gradient).all()


def test_a_label_of_the_level_word_counts_only_without_soft_labels() -> None:
    batch = small_batch(4)
    position = int(batch.level_position[0, 0])
    logits = random_logits(batch)
    other = batch._replace(labels=batch.labels.at[:, :, position].set(1))
    same = [loss_and_gradient(logits, one, Objective())[0][0] for one in (batch, other)]
    assert same[0] == same[1]
    without = [loss_and_gradient(logits, one, Objective(softkl_loss=False))[0][0] for one in (batch, other)]
    assert abs(without[0] - without[1]) > 1e-3


def test_equal_opinions_count_as_b_being_better() -> None:
    """Quirk of the published code, whose order is `gtA > gtB`."""
    objective = Objective(weight_next_token=0.0, continuous_rating_loss=False)
    batch = small_batch(4)
    tied = batch._replace(gt_score=jnp.full_like(batch.gt_score, 50.0))
    lower = tied._replace(gt_score=tied.gt_score.at[:, 0].set(40.0))
    higher = tied._replace(gt_score=tied.gt_score.at[:, 0].set(60.0))
    logits = random_logits(batch)
    found = [loss_and_gradient(logits, one, objective)[0][0] for one in (tied, lower, higher)]
    assert found[0] == found[1] != found[2]


def test_batches_of_equal_answers_average_to_the_whole() -> None:
    """So that gradients which are accumulated are those of one large batch."""
    batch = small_batch(4)
    logits = random_logits(batch)
    whole = loss_and_gradient(logits, batch, OBJECTIVES["published"])
    halves = [
        loss_and_gradient(logits[rows], jax.tree.map(lambda x, rows=rows: x[rows], batch), OBJECTIVES["published"])
        for rows in (jnp.asarray([0, 1]), jnp.asarray([2, 3]))
    ]
    np.testing.assert_allclose(whole[0][0], (halves[0][0][0] + halves[1][0][0]) / 2, rtol=1e-6)
    gradient = np.concatenate([half[1] for half in halves]) / 2
    np.testing.assert_allclose(whole[1], gradient, rtol=1e-5, atol=1e-8)
