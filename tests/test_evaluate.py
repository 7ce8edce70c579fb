"""`deqa evaluate`: the published numbers exactly, and a message instead of a number for everything that has none."""

import dataclasses
import gzip
import json
import math
import os
import random
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from deqa_jax.cli import main
from deqa_jax.data.metas import MetaError
from deqa_jax.evaluate import (
    FITS,
    FORMATS,
    METRICS,
    Evaluation,
    EvaluationError,
    as_json,
    as_table,
    average,
    evaluate,
    read_predictions,
)
from deqa_jax.prompt import LEVELS

GOLDEN = Path(__file__).parent / "golden" / "metrics"
SETS = ("a", "b")
NAMES = ("closed_set", "open_set")
# What each number of the published scripts is called here, and how near it has to be.
FIT_OF = {"4": ("plcc", 1e-9), "5": ("plcc_logistic_5params", 1e-3), "none": ("plcc_without_fit", 1e-9)}
WITHOUT_FIT = ("kl", "js", "wd", "mean_score", "mean_std")

Lines = list[dict[str, Any]]
Deqa = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def golden_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prediction files and metas that the published scripts evaluated."""
    folder = tmp_path_factory.mktemp("metrics")
    for path in GOLDEN.glob("*.gz"):
        (folder / path.stem).write_bytes(gzip.decompress(path.read_bytes()))
    return folder


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    read: dict[str, Any] = json.loads((GOLDEN / "expected.json").read_text())
    return read


@pytest.fixture
def deqa(capsys: pytest.CaptureFixture[str]) -> Deqa:
    """Runs a command line: exit status, standard output, standard error."""

    def run(*arguments: Any) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exit:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        assert isinstance(exit.value.code, int)
        return exit.value.code, captured.out, captured.err

    return run


def strict(text: str) -> Any:
    """JSON as the standard has it: without NaN and Infinity."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def toy(count: int = 12, seed: int = 0) -> tuple[Lines, Lines]:
    """Predictions, and metas that they go with more or less."""
    generator = np.random.default_rng(seed)
    predictions, metas = [], []
    for number in range(count):
        logits = generator.normal(0, 2, len(LEVELS))
        shares = np.exp(logits) / np.exp(logits).sum()
        score = float(shares @ [5, 4, 3, 2, 1] + generator.normal(0, 0.2))
        id, image = f"{number}.png->{score:.3f}", f"X/images/{number}.png"
        of_levels = {"logits": levels(logits), "probs": levels(shares * 0.9)}
        predictions.append({"id": id, "image": image, "gt_score": 20 * score, **of_levels})
        std = float(generator.uniform(0.3, 1))
        scores = {"gt_score": 20 * score, "gt_score_norm": score, "std": 20 * std, "std_norm": std}
        metas.append({"id": id, "image": image, **scores})
    return predictions, metas


def levels(values: Any) -> dict[str, float]:
    return dict(zip(LEVELS, map(float, values), strict=True))


def write(
    folder: Path, predictions: Lines, metas: Lines, pred: str = "pred.jsonl", gt: str = "gt.json"
) -> tuple[Path, Path]:
    (folder / pred).write_text("".join(json.dumps(line) + "\n" for line in predictions))
    (folder / gt).write_text(json.dumps(metas))
    return folder / pred, folder / gt


def evaluated(folder: Path, predictions: Lines, metas: Lines, fit: str = "none", resamples: int = 0) -> Evaluation:
    files = write(folder, predictions, metas)
    return evaluate(read_predictions(*files, open_set=False), fit=fit, resamples=resamples)


def rows_of(table: str) -> list[list[str]]:
    """Cells of a Markdown table."""
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]


# ---- the published numbers --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("kind", NAMES)
def test_every_published_number_is_met(name: str, kind: str, golden_files: Path, expected: dict[str, Any]) -> None:
    numbers = dict(expected[name][kind])
    predictions = read_predictions(
        golden_files / f"{name}_pred.jsonl", golden_files / f"{name}_gt.json", open_set=kind == "open_set"
    )
    found = {fit: evaluate(predictions, fit=fit, resamples=0) for fit in FITS}
    for fit, (number, allowed) in FIT_OF.items():
        assert found[fit].values["plcc"] == pytest.approx(numbers.pop(number), rel=0, abs=allowed)
    assert found["4"].values["srcc"] == pytest.approx(numbers.pop("srcc"), rel=0, abs=1e-9)
    for number in WITHOUT_FIT:
        for evaluation in found.values():
            assert evaluation.fields()[number] == pytest.approx(numbers[number], rel=0, abs=1e-9)
        del numbers[number]
    assert not numbers, "numbers that nothing was compared with"


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("kind", NAMES)
def test_every_published_number_is_printed(
    fit: str, kind: str, deqa: Deqa, golden_files: Path, expected: dict[str, Any]
) -> None:
    preds, gts = ([golden_files / f"{name}_{what}" for name in SETS] for what in ("pred.jsonl", "gt.json"))
    flags = ["--open-set"] if kind == "open_set" else []
    status, out, err = deqa(
        "evaluate", "--pred", *preds, "--gt", *gts, "--fit", fit, "--bootstrap", 0, "--json", *flags
    )
    assert (status, err) == (0, "")
    result = strict(out)
    assert [(found["name"], found["n"]) for found in result["sets"]] == [("a_pred", 300), ("b_pred", 1200)]
    numbers = [expected[name][kind] for name in SETS]
    number, allowed = FIT_OF[fit]
    for found, wanted in zip(result["sets"], numbers, strict=True):
        assert found["plcc"] == pytest.approx(wanted[number], rel=0, abs=allowed)
        if fit == "4":
            assert found["srcc"] == pytest.approx(wanted["srcc"], rel=0, abs=1e-9)
        for name in WITHOUT_FIT:
            assert found[name] == pytest.approx(wanted[name], rel=0, abs=1e-9)
    for name in ("kl", "js", "wd"):
        wanted = statistics.fmean(wanted[name] for wanted in numbers)
        assert result["mean"][name] == pytest.approx(wanted, rel=0, abs=1e-9)


def test_the_sets_are_right_next_to_their_opinions(golden_files: Path) -> None:
    """The numbers above would not tell an exchange of two columns that are alike."""
    predictions = read_predictions(golden_files / "a_pred.jsonl", golden_files / "a_gt.json", open_set=False)
    metas = json.loads((golden_files / "a_gt.json").read_text())
    lines = map(json.loads, (golden_files / "a_pred.jsonl").read_text().splitlines())
    by_id = {line["id"]: [line["logits"][level] for level in LEVELS] for line in lines}
    for row, meta in enumerate(metas):
        assert predictions.items[row].id == meta["id"]
        exact = [math.exp(logit) for logit in by_id[meta["id"]]]
        shares = [value / math.fsum(exact) for value in exact]
        mean = math.fsum(share * level for share, level in zip(shares, (5, 4, 3, 2, 1), strict=True))
        spread = math.fsum(share * (level - mean) ** 2 for share, level in zip(shares, (5, 4, 3, 2, 1), strict=True))
        assert list(predictions.probs[row]) == pytest.approx(shares, abs=1e-12)
        assert predictions.mean[row] == pytest.approx(mean, abs=1e-12)
        assert predictions.std[row] == pytest.approx(math.sqrt(spread), abs=1e-12)
    assert predictions.gt_mean is not None
    assert predictions.gt_std is not None
    columns = {"gt_score": predictions.gt_score, "gt_score_norm": predictions.gt_mean, "std_norm": predictions.gt_std}
    for name, column in columns.items():
        assert list(column) == [meta[name] for meta in metas]


def test_intervals_enclose_their_number(deqa: Deqa, golden_files: Path) -> None:
    files = "--pred", golden_files / "a_pred.jsonl", "--gt", golden_files / "a_gt.json"
    result = strict(deqa("evaluate", *files, "--json")[1])
    (found,) = result["sets"]
    assert result["settings"] == {"open_set": False, "fit": "4", "bootstrap": 1000, "seed": 0}
    assert list(found["ci"]) == list(METRICS)
    for name, (low, high) in found["ci"].items():
        assert low < found[name] < high
    # The library has the same defaults.
    by_library = evaluate(read_predictions(files[1], files[3], open_set=False))
    assert found["ci"] == {name: list(bounds) for name, bounds in by_library.intervals.items()}
    # As wide as the central limit theorem has it, within the noise of a thousand resamples.
    predictions = read_predictions(files[1], files[3], open_set=False)
    assert predictions.gt_mean is not None
    assert predictions.gt_std is not None
    distances = np.hypot(predictions.mean - predictions.gt_mean, predictions.std - predictions.gt_std)
    low, high = found["ci"]["wd"]
    assert high - low == pytest.approx(2 * 1.96 * distances.std() / math.sqrt(300), rel=0.1)


# ---- pairing ----------------------------------------------------------------------------------------------


def test_predictions_are_paired_by_id_whatever_their_order(tmp_path: Path, deqa: Deqa) -> None:
    predictions, metas = toy()
    pred, gt = write(tmp_path, predictions, metas)
    wanted = deqa("evaluate", "--pred", pred, "--gt", gt, "--json")
    assert wanted[0] == 0
    for seed in range(3):
        random.Random(seed).shuffle(predictions)
        write(tmp_path, predictions, metas)
        assert deqa("evaluate", "--pred", pred, "--gt", gt, "--json") == wanted


def test_the_opinions_of_the_metas_count_not_those_of_the_predictions(tmp_path: Path) -> None:
    predictions, metas = toy()
    wanted = evaluated(tmp_path, predictions, metas).values
    for line in predictions:
        line["gt_score"] = -line["gt_score"]
        line["image"] = "elsewhere.png"
    assert evaluated(tmp_path, predictions, metas).values == wanted
    for line in predictions:
        del line["gt_score"], line["image"]
    assert evaluated(tmp_path, predictions, metas).values == wanted


def test_ids_may_be_numbers_and_metas_may_have_none(tmp_path: Path) -> None:
    predictions, metas = toy(4)
    wanted = evaluated(tmp_path, predictions, metas).values
    for number, (line, meta) in enumerate(zip(predictions, metas, strict=True)):
        line["id"], meta["id"] = [(number, str(number)), (str(number), number)][number % 2]
    # Without an id, an image has that of its file.
    del metas[3]["id"]
    predictions[3]["id"] = metas[3]["image"]
    assert evaluated(tmp_path, predictions, metas).values == wanted


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_blank_lines_and_line_separators_in_strings_are_no_new_lines(newline: str, tmp_path: Path) -> None:
    predictions, metas = toy(6)
    wanted = evaluated(tmp_path, predictions, metas)
    for line, meta in zip(predictions, metas, strict=True):
        line["id"] = meta["id"] = f"a\u2028b\u2029c\x85d\x0b\x1c{line['id']}"
    lines = [json.dumps(line, ensure_ascii=False) for line in predictions]
    assert "\u2028" in lines[0]
    assert "\x85" in lines[0]
    pred, gt = tmp_path / "pred.jsonl", tmp_path / "gt.json"
    # Blank ones between, at both ends, and no newline at the end of the last.
    pred.write_bytes(newline.join(["", "  ", *lines[:3], "", "\t", *lines[3:]]).encode())
    gt.write_text(json.dumps(metas, ensure_ascii=False), encoding="utf-8")
    found = evaluate(read_predictions(pred, gt, open_set=False), fit="none", resamples=0)
    assert found.values == wanted.values
    assert [item.id for item in found.predictions.items] == [meta["id"] for meta in metas]


def test_a_fault_is_named_by_its_line_in_the_file(tmp_path: Path) -> None:
    predictions, metas = toy(3)
    pred, gt = write(tmp_path, predictions, metas)
    pred.write_text("\n\n" + "\n\n".join(json.dumps(line) for line in predictions) + "\n{\n")
    with pytest.raises(EvaluationError, match=r"pred\.jsonl:8: not JSON"):
        read_predictions(pred, gt, open_set=False)


def test_images_without_a_prediction_may_be_left_out(tmp_path: Path, deqa: Deqa) -> None:
    predictions, metas = toy(20)
    kept = [number for number in range(20) if number not in (0, 7, 19)]
    pred, gt = write(tmp_path, [predictions[number] for number in kept], metas)
    arguments = "evaluate", "--pred", pred, "--gt", gt, "--json"
    status, out, err = deqa(*arguments)
    assert (status, out) == (1, "")
    for part in ("3 images", metas[0]["id"], metas[7]["id"], metas[19]["id"], "--allow-missing", "deqa infer"):
        assert part in err
    status, out, err = deqa(*arguments, "--allow-missing")
    assert (status, err) == (0, "")
    write(tmp_path, [predictions[number] for number in kept], [metas[number] for number in kept])
    assert deqa(*arguments) == (0, out, "")
    assert strict(out)["sets"][0]["n"] == 17


def test_left_out_images_need_no_opinion(tmp_path: Path) -> None:
    predictions, metas = toy(6)
    metas[2] = {"id": metas[2]["id"], "image": metas[2]["image"]}
    files = write(tmp_path, predictions[:2] + predictions[3:], metas)
    found = read_predictions(*files, open_set=False, allow_missing=True)
    assert found.gt_std is not None
    assert len(found.items) == len(found.gt_score) == len(found.gt_std) == 5


def test_no_option_allows_unknown_images(tmp_path: Path, deqa: Deqa) -> None:
    predictions, metas = toy(20)
    pred, gt = write(tmp_path, predictions, metas[:8])
    status, out, err = deqa("evaluate", "--pred", pred, "--gt", gt, "--allow-missing")
    assert (status, out) == (1, "")
    assert "12 images" in err
    assert "same set?" in err
    shown = [line["id"] for line in predictions[8:] if f"{line['id']}," in err]
    assert len(shown) == 5
    assert ", …)" in err


# ---- faulty files -----------------------------------------------------------------------------------------


def replaced(**fields: Any) -> Callable[[Lines, Lines], None]:
    """The third prediction with other fields."""
    return lambda predictions, metas: predictions[2].update(fields)


def logits_with(level: str, value: Any) -> Callable[[Lines, Lines], None]:
    return lambda predictions, metas: predictions[2]["logits"].update({level: value})


FAULTS: dict[str, tuple[Callable[[Lines, Lines], Any], str]] = {
    "no id": (
        lambda predictions, metas: predictions[2].pop("id"),
        "pred.jsonl:3: no id with logits of excellent, good",
    ),
    "no logits": (lambda predictions, metas: predictions[2].pop("logits"), "pred.jsonl:3: no id with logits"),
    "a level less": (lambda predictions, metas: predictions[2]["logits"].pop("fair"), "pred.jsonl:3: no id with"),
    "another level": (replaced(logits=dict.fromkeys("abcde", 1.0)), "pred.jsonl:3: no id with logits"),
    "a list of logits": (replaced(logits=[1, 2, 3, 4, 5]), "pred.jsonl:3: no id with logits"),
    "no list": (replaced(logits=None), "pred.jsonl:3: no id with logits"),
    "NaN": (logits_with("bad", math.nan), "pred.jsonl:3: no id with logits"),
    "infinite": (logits_with("excellent", math.inf), "pred.jsonl:3: no id with logits"),
    "text": (logits_with("bad", "1.5"), "pred.jsonl:3: no id with logits"),
    "true": (logits_with("bad", True), "pred.jsonl:3: no id with logits"),
    "null": (logits_with("good", None), "pred.jsonl:3: no id with logits"),
    "an endless number": (logits_with("good", 10**400), "pred.jsonl:3: no id with logits"),
    "twice": (lambda predictions, metas: predictions.append(predictions[0]), "pred.jsonl:9: the id '0.png"),
    "twice as number and text": (
        lambda predictions, metas: predictions.extend([{**predictions[0], "id": 7}, {**predictions[0], "id": "7"}]),
        "pred.jsonl:10: the id '7' is there twice",
    ),
    "twice as text and number": (
        lambda predictions, metas: predictions.extend([{**predictions[0], "id": "7"}, {**predictions[0], "id": 7}]),
        "pred.jsonl:10: the id 7 is there twice",
    ),
    "unknown": (replaced(id="z"), "pred.jsonl: 1 images (z) are not in "),
    "no predictions": (lambda predictions, metas: predictions.clear(), "pred.jsonl: has no predictions"),
    "no metas": (lambda predictions, metas: metas.clear(), "gt.json: lists no images"),
    "metas twice": (lambda predictions, metas: metas.append(metas[1]), "gt.json: entry 8: the id '1.png"),
    "metas without image": (lambda predictions, metas: metas[3].pop("image"), "gt.json: entry 3: no 'image'"),
    "no gt_score": (lambda predictions, metas: metas[3].pop("gt_score"), "gt.json: has no gt_score for every image"),
    "gt_score null": (lambda predictions, metas: metas[3].update(gt_score=None), "gt.json: has no gt_score for every"),
    "gt_score NaN": (lambda predictions, metas: metas[3].update(gt_score=math.nan), "gt.json: entry 3: gt_score"),
    "negative std": (lambda predictions, metas: metas[3].update(std_norm=-0.5), "gt.json: 3.png"),
    "equal predictions": (
        lambda predictions, metas: [line.update(logits=levels([1, 2, 3, 2, 1])) for line in predictions],
        "pred: a curve of 4 parameters cannot be fitted to 8 points",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_file_is_a_message_and_no_report(fault: str, tmp_path: Path, deqa: Deqa) -> None:
    spoil, complaint = FAULTS[fault]
    predictions, metas = toy(8)
    spoil(predictions, metas)
    pred, gt = write(tmp_path, predictions, metas)
    status, out, err = deqa("evaluate", "--pred", pred, "--gt", gt, "--report", tmp_path / "report", "--json")
    assert (status, out) == (1, "")
    assert complaint in err
    assert err.startswith("deqa: ")
    assert err.count("\n") == 1
    assert not (tmp_path / "report").exists()


NO_PREDICTIONS = {
    "empty": (b"", ": has no predictions"),
    "blank": (b"\n \n", ": has no predictions"),
    "torn": (b"{", ":1: not JSON"),
    "more": (b'{"id": 1}\n{"id": 2}garbage', ":2: not JSON"),
    "list": (b"[1, 2]", ":1: no id with logits"),
    "number": (b"3", ":1: no id with logits"),
    "null": (b"null", ":1: no id with logits"),
    "text": (b'"id"', ":1: no id with logits"),
    "deep": (b"[" * 100_000, ":1: not JSON"),
    "long": (b"\n" + b"9" * 5000, ":2: not JSON"),
    "UTF-16": (b"\xff\xfe", ": not text in UTF-8"),
    "PNG": (b"\x89PNG\r\n\x1a\n\0", ": not text in UTF-8"),
    "NUL": (b"\0", ":1: not JSON"),
    "metas": (b'[{"id": 1},\n {"id": 2}]', ":1: not JSON"),
}


@pytest.mark.parametrize("kind", NO_PREDICTIONS)
def test_what_is_no_prediction_file_is_a_message(kind: str, tmp_path: Path, deqa: Deqa) -> None:
    content, complaint = NO_PREDICTIONS[kind]
    pred, gt = write(tmp_path, *toy(4))
    pred.write_bytes(content)
    status, out, err = deqa("evaluate", "--pred", pred, "--gt", gt)
    assert (status, out) == (1, "")
    assert err.startswith(f"deqa: {pred}{complaint}")
    assert "Traceback" not in err


@pytest.mark.parametrize("which", ["pred.jsonl", "gt.json"])
def test_a_missing_file_and_a_folder_are_messages(which: str, tmp_path: Path, deqa: Deqa) -> None:
    pred, gt = write(tmp_path, *toy(4))
    (tmp_path / which).unlink()
    status, out, err = deqa("evaluate", "--pred", pred, "--gt", gt)
    assert (status, out, err) == (1, "", f"deqa: {tmp_path / which}: no such file\n")
    (tmp_path / which).mkdir()
    status, out, err = deqa("evaluate", "--pred", pred, "--gt", gt)
    assert (status, out) == (1, "")
    assert "irectory" in err
    assert which in err


def test_metas_in_the_place_of_predictions_are_a_message(tmp_path: Path, deqa: Deqa) -> None:
    pred, gt = write(tmp_path, *toy(4))
    for arguments in ((gt, gt), (gt, pred), (pred, pred)):
        status, out, err = deqa("evaluate", "--pred", arguments[0], "--gt", arguments[1])
        assert (status, out) == (1, "")
        assert err.startswith(f"deqa: {tmp_path}")


@pytest.mark.parametrize("faulty", [0, 1])
def test_one_faulty_set_of_several_prints_nothing(faulty: int, tmp_path: Path, deqa: Deqa) -> None:
    """Not the half of a table, which is easily taken for the whole."""
    files = [write(tmp_path, *toy(8, seed), f"{seed}.jsonl", f"{seed}.json") for seed in range(2)]
    files[faulty][0].write_text("{}")
    preds, gts = zip(*files, strict=True)
    status, out, err = deqa("evaluate", "--pred", *preds, "--gt", *gts, "--report", tmp_path / "report")
    assert (status, out) == (1, "")
    assert f"{faulty}.jsonl:1" in err
    assert not (tmp_path / "report").exists()


def outcome(work: Callable[[], Evaluation]) -> Evaluation | str:
    """What comes out, or the message of why nothing does."""
    try:
        return work()
    except EvaluationError as error:
        return str(error)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | st.sampled_from(LEVELS), inner),
    max_leaves=6,
)
NUMBERS = st.floats() | st.integers() | JSON
ENTRIES = st.fixed_dictionaries(
    {},
    optional={
        "id": st.sampled_from(["0", "1", 1, "2"]) | JSON,
        "logits": st.fixed_dictionaries(dict.fromkeys(LEVELS, NUMBERS)) | JSON,
        "probs": st.fixed_dictionaries(dict.fromkeys(LEVELS, NUMBERS)) | JSON,
    },
)


@settings(deadline=None, max_examples=60)
@given(entries=st.lists(ENTRIES | JSON, min_size=1, max_size=3), open_set=st.booleans())
def test_any_lines_are_evaluated_or_an_evaluation_error(
    entries: list[Any], open_set: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    metas = [{"id": str(i), "image": "x.png", "gt_score": i, "gt_score_norm": i, "std_norm": i / 2} for i in range(3)]
    files = write(tmp_path_factory.getbasetemp(), entries, metas, "any.jsonl", "any.json")
    found = outcome(
        lambda: evaluate(read_predictions(*files, open_set=open_set, allow_missing=True), fit="none", resamples=20)
    )
    if isinstance(found, str):
        assert "any.jsonl" in found
    else:
        strict(as_json([found], {}))


VALUES = st.sampled_from([0.0, 1.0, -1.0, 30.0, 1e-300, 1e300, -1e308, 1e308, 800.0])


@settings(deadline=None, max_examples=60)
@given(
    rows=st.lists(st.tuples(*[VALUES] * 5, st.sampled_from([1.0, 2.0, 5.0])), min_size=1, max_size=7),
    fit=st.sampled_from(list(FITS)),
    std=st.sampled_from([0.0, 0.5, None]),
)
@example(rows=[(1e308, -1e308, 0.0, 0.0, 0.0, 1.0)], fit="none", std=0.0)
@example(rows=[(800.0, 0.0, 0.0, 0.0, 0.0, 1.0), (0.0, 0.0, 0.0, 0.0, 800.0, 5.0)], fit="none", std=0.5)
def test_any_logits_are_evaluated_or_have_no_curve(
    rows: list[tuple[float, ...]], fit: str, std: float | None, tmp_path_factory: pytest.TempPathFactory
) -> None:
    predictions = [{"id": i, "logits": levels(logits)} for i, (*logits, _) in enumerate(rows)]
    scores = [{"gt_score": score, "gt_score_norm": score, "std_norm": std} for *_, score in rows]
    metas = [{"id": i, "image": "x.png", **score} for i, score in enumerate(scores)]
    found = outcome(lambda: evaluated(tmp_path_factory.getbasetemp(), predictions, metas, fit, resamples=20))
    if isinstance(found, str):
        assert fit != "none"
        assert "--fit none" in found
        return
    fields = strict(as_json([found], {}))["sets"][0]
    for name in ("srcc", "plcc"):
        assert fields[name] is None or -1 <= fields[name] <= 1
    for format in FORMATS:
        assert "nan" not in as_table([found], format)


# ---- open set ---------------------------------------------------------------------------------------------


def test_the_open_set_needs_probabilities_and_says_so(tmp_path: Path, deqa: Deqa) -> None:
    predictions, metas = toy(8)
    del predictions[4]["probs"]
    pred, gt = write(tmp_path, predictions, metas)
    status, out, err = deqa("evaluate", "--pred", pred, "--gt", gt, "--open-set")
    assert (status, out) == (1, "")
    assert f"{pred}:5: no id with probs of {', '.join(LEVELS)}; it was made without open-set probabilities" in err
    assert deqa("evaluate", "--pred", pred, "--gt", gt)[0] == 0
    # Where there are no logits either, something else is wrong.
    del predictions[4]["logits"]
    write(tmp_path, predictions, metas)
    for flags in (["--open-set"], []):
        status, _, err = deqa("evaluate", "--pred", pred, "--gt", gt, *flags)
        assert status == 1
        assert "without open-set" not in err


@pytest.mark.parametrize(("open_set", "unused"), [(True, "logits"), (False, "probs")])
@pytest.mark.parametrize("value", [None, "x", {"bad": math.nan}])
def test_what_is_not_used_may_be_anything(open_set: bool, unused: str, value: Any, tmp_path: Path) -> None:
    predictions, metas = toy(4)
    for line in predictions:
        line[unused] = value
    assert read_predictions(*write(tmp_path, predictions, metas), open_set=open_set).probs.shape == (4, 5)


def test_probabilities_of_the_open_set_are_not_made_to_sum_to_one(tmp_path: Path) -> None:
    predictions, metas = toy(1)
    predictions[0]["probs"] = levels([0.1, 0.2, 0.3, 0.0, 0.2])
    found = read_predictions(*write(tmp_path, predictions, metas), open_set=True)
    assert found.probs.tolist() == [[0.1, 0.2, 0.3, 0.0, 0.2]]
    # 0.5 + 0.8 + 0.9 + 0.2, and Σ p (level − mean)² of it.
    assert found.mean == pytest.approx([2.4], abs=1e-12)
    assert found.std**2 == pytest.approx([0.1 * 2.6**2 + 0.2 * 1.6**2 + 0.3 * 0.6**2 + 0.2 * 1.4**2], abs=1e-12)


@pytest.mark.parametrize("wrong", [-0.1, -1e-9, 1.1, 1e300])
def test_probabilities_are_from_0_to_1(wrong: float, tmp_path: Path) -> None:
    predictions, metas = toy(4)
    predictions[1]["probs"]["fair"] = wrong
    files = write(tmp_path, predictions, metas)
    with pytest.raises(EvaluationError, match=r"pred\.jsonl:2: its probs are not probabilities"):
        read_predictions(*files, open_set=True)
    assert len(read_predictions(*files, open_set=False).items) == 4


def test_a_probability_may_be_one_as_float32_rounds_it(tmp_path: Path) -> None:
    predictions, metas = toy(1)
    predictions[0]["probs"] = levels([np.nextafter(np.float32(1), np.float32(2)), 0, 0, 0, 0])
    assert read_predictions(*write(tmp_path, predictions, metas), open_set=True).mean == pytest.approx([5], abs=1e-6)


# ---- numbers that do not exist ----------------------------------------------------------------------------


@pytest.mark.parametrize("gone", ["std_norm", "gt_score_norm"])
@pytest.mark.parametrize("everywhere", [True, False], ids=["of all", "of one"])
def test_without_deviations_there_are_no_divergences(gone: str, everywhere: bool, tmp_path: Path, deqa: Deqa) -> None:
    predictions, metas = toy(8)
    for meta in metas if everywhere else metas[5:6]:
        del meta[gone]
    files = write(tmp_path, predictions, metas)
    arguments = "evaluate", "--pred", files[0], "--gt", files[1]
    status, out, err = deqa(*arguments, "--json")
    assert (status, err) == (0, "")
    result = strict(out)
    for numbers in (result["sets"][0], result["mean"]):
        assert [numbers[name] for name in ("kl", "js", "wd")] == [None] * 3
        assert all(isinstance(numbers[name], float) for name in ("srcc", "plcc"))
    assert list(result["sets"][0]["ci"]) == ["srcc", "plcc"]
    _, out, _ = deqa(*arguments, "--markdown")
    for row in rows_of(out)[2:]:
        assert row[4:] == ["-"] * 3
    assert "nan" not in out


def test_what_a_set_lacks_is_left_out_of_the_mean(tmp_path: Path, deqa: Deqa) -> None:
    files = []
    for seed in range(3):
        predictions, metas = toy(10, seed)
        if seed == 1:
            for meta in metas:
                del meta["std_norm"]
        files.append(write(tmp_path, predictions, metas, f"{seed}.jsonl", f"{seed}.json"))
    preds, gts = zip(*files, strict=True)
    result = strict(deqa("evaluate", "--pred", *preds, "--gt", *gts, "--json")[1])
    assert [found["kl"] is None for found in result["sets"]] == [False, True, False]
    for name in METRICS:
        there = [found[name] for found in result["sets"] if found[name] is not None]
        assert len(there) == (2 if name in ("kl", "js", "wd") else 3)
        assert result["mean"][name] == pytest.approx(sum(there) / len(there), abs=1e-12)


def test_equal_opinions_have_no_correlation(tmp_path: Path, deqa: Deqa) -> None:
    predictions, metas = toy(8)
    for meta in metas:
        meta["gt_score"] = 0.1
    pred, gt = write(tmp_path, predictions, metas)
    for fit in ("4", "none"):
        status, out, err = deqa("evaluate", "--pred", pred, "--gt", gt, "--fit", fit, "--json")
        assert (status, err) == (0, "")
        result = strict(out)
        found = result["sets"][0]
        assert (found["srcc"], found["plcc"], result["mean"]["srcc"]) == (None, None, None)
        assert found["ci"]["srcc"] == found["ci"]["plcc"] == [None, None]
        assert found["kl"] > 0
        _, out, _ = deqa("evaluate", "--pred", pred, "--gt", gt, "--fit", fit)
        assert out.splitlines()[2].split()[:4] == ["pred", "8", "-", "-"]


def test_one_image_has_divergences_only(tmp_path: Path, deqa: Deqa) -> None:
    pred, gt = write(tmp_path, *toy(1))
    status, out, err = deqa("evaluate", "--pred", pred, "--gt", gt, "--fit", "none", "--json")
    assert (status, err) == (0, "")
    found = strict(out)["sets"][0]
    assert (found["n"], found["srcc"], found["plcc"]) == (1, None, None)
    assert found["ci"]["wd"] == [found["wd"]] * 2


def test_a_correlation_without_an_interval_is_shown_without_one(tmp_path: Path, deqa: Deqa) -> None:
    """Both draws of the one resample are the same image."""
    seed = next(seed for seed in range(99) if len(set(np.random.default_rng(seed).integers(2, size=2))) == 1)
    predictions, metas = toy(2)
    pred, gt = write(tmp_path, predictions, metas)
    options = "--pred", pred, "--gt", gt, "--fit", "none", "--bootstrap", 1, "--seed", seed
    found = strict(deqa("evaluate", *options, "--json")[1])["sets"][0]
    assert abs(found["srcc"]) == pytest.approx(1, abs=1e-12)
    assert found["ci"]["srcc"] == [None, None]
    _, out, _ = deqa("evaluate", *options, "--markdown")
    assert "nan" not in out
    assert rows_of(out)[2][2] == f"{found['srcc']:.4f}"


def test_a_certain_prediction_is_null_not_infinite(tmp_path: Path, deqa: Deqa) -> None:
    """With a deviation of 0, whose logarithm the published formula takes."""
    predictions, metas = toy(8)
    predictions[3]["logits"] = levels([900, 0, 0, 0, 0])
    pred, gt = write(tmp_path, predictions, metas)
    status, out, err = deqa("evaluate", "--pred", pred, "--gt", gt, "--json")
    assert (status, err) == (0, "")
    found = strict(out)["sets"][0]
    assert found["kl"] is None
    assert found["ci"]["kl"] == [None, None]
    assert found["wd"] > 0
    assert found["js"] > 0


# ---- fit --------------------------------------------------------------------------------------------------


def test_the_fit_turns_the_rank_correlation_of_falling_predictions(tmp_path: Path) -> None:
    """As the published evaluation does."""
    predictions, metas = toy(30)
    rising = {fit: evaluated(tmp_path, predictions, metas, fit).values for fit in FITS}
    for meta in metas:
        meta["gt_score"] = 100 - meta["gt_score"]
    falling = {fit: evaluated(tmp_path, predictions, metas, fit).values for fit in FITS}
    for name in ("srcc", "plcc"):
        assert rising["none"][name] > 0.9
        assert falling["none"][name] == pytest.approx(-rising["none"][name], abs=1e-9)
        assert falling["4"][name] > 0.9
        assert falling["5"][name] > 0.9


def test_the_default_fit_has_four_parameters(tmp_path: Path, deqa: Deqa) -> None:
    pred, gt = write(tmp_path, *toy(30))
    found = {
        fit: strict(deqa("evaluate", "--pred", pred, "--gt", gt, "--json", *flags)[1])
        for fit, flags in {None: [], **{fit: ["--fit", fit] for fit in FITS}}.items()
    }
    assert found[None] == found["4"]
    # The five-parameter curve ends as a line here, as it often does.
    assert found["4"]["sets"][0]["plcc"] > found["none"]["sets"][0]["plcc"] + 1e-3
    assert [found[fit]["settings"]["fit"] for fit in FITS] == list(FITS)


@pytest.mark.parametrize("fit", ["4", "5"])
def test_too_few_images_for_a_fit_are_a_message_that_says_what_does_without(
    fit: str, tmp_path: Path, deqa: Deqa
) -> None:
    pred, gt = write(tmp_path, *toy(3))
    arguments = "evaluate", "--pred", pred, "--gt", gt, "--fit"
    status, out, err = deqa(*arguments, fit)
    assert (status, out) == (1, "")
    expected = f"pred: a curve of {fit} parameters cannot be fitted to 3 points like these; --fit none does without"
    assert err == f"deqa: {expected}\n"
    assert deqa(*arguments, "none")[0] == 0


def test_a_fit_that_does_not_converge_is_a_message(tmp_path: Path, deqa: Deqa) -> None:
    predictions, metas = toy(5)
    for line, (level, score) in zip(predictions, [(2, 1), (1, 1), (2, 1), (1, 1), (3, 5)], strict=True):
        line["logits"] = levels([30.0 * (5 - i == level) for i in range(5)])
        metas[len([meta for meta in metas if "done" in meta])].update(gt_score=score, done=1)
    pred, gt = write(tmp_path, predictions, metas)
    status, out, err = deqa("evaluate", "--pred", pred, "--gt", gt)
    assert (status, out, err) == (1, "", "deqa: pred: the 4-parameter fit does not converge; --fit none does without\n")


# ---- bootstrap --------------------------------------------------------------------------------------------


def test_without_resamples_there_are_no_intervals(tmp_path: Path, deqa: Deqa) -> None:
    pred, gt = write(tmp_path, *toy(20))
    arguments = "evaluate", "--pred", pred, "--gt", gt
    with_intervals, without = (strict(deqa(*arguments, "--json", "--bootstrap", n)[1]) for n in (10, 0))
    assert without["sets"][0].pop("ci") == {}
    assert list(with_intervals["sets"][0].pop("ci")) == list(METRICS)
    assert without["sets"] == with_intervals["sets"]
    assert without["mean"] == with_intervals["mean"]
    _, out, _ = deqa(*arguments, "--bootstrap", 0)
    assert "[" not in out
    _, out, _ = deqa(*arguments, "--bootstrap", 10)
    assert out.count("[") == len(METRICS)


def test_the_same_seed_gives_the_same_output(tmp_path: Path, deqa: Deqa) -> None:
    pred, gt = write(tmp_path, *toy(20))
    arguments = "evaluate", "--pred", pred, "--gt", gt, "--bootstrap", 50
    for format in ("--json", "--markdown"):
        first, again, other, default = (
            deqa(*arguments, format, *flags) for flags in (["--seed", 0], ["--seed", 0], ["--seed", 1], [])
        )
        assert first == again == default
        assert first[1] != other[1]
    seeds = [strict(deqa(*arguments, "--json", "--seed", seed)[1]) for seed in (0, 1)]
    for name in METRICS:
        assert seeds[0]["sets"][0][name] == seeds[1]["sets"][0][name]
        assert seeds[0]["sets"][0]["ci"][name] != seeds[1]["sets"][0]["ci"][name]


def test_sets_have_the_intervals_they_have_alone(tmp_path: Path, deqa: Deqa) -> None:
    files = [write(tmp_path, *toy(12 + seed, seed), f"{seed}.jsonl", f"{seed}.json") for seed in range(2)]
    preds, gts = zip(*files, strict=True)
    together = strict(deqa("evaluate", "--pred", *preds, "--gt", *gts, "--json")[1])["sets"]
    alone = [strict(deqa("evaluate", "--pred", p, "--gt", g, "--json")[1])["sets"][0] for p, g in files]
    assert together == alone


# ---- output -----------------------------------------------------------------------------------------------


def test_the_json_has_its_shape(tmp_path: Path, deqa: Deqa) -> None:
    predictions, metas = toy(12)
    files = [
        write(tmp_path, predictions, metas, "mine.jsonl", "mine.json"),
        write(tmp_path, predictions, metas, "koniq.jsonl", "test_koniq_2k.json"),
    ]
    preds, gts = zip(*files, strict=True)
    status, out, err = deqa("evaluate", "--pred", *preds, "--gt", *gts, "--json", "--seed", 3, "--bootstrap", 20)
    assert (status, err) == (0, "")
    result = strict(out)
    assert list(result) == ["sets", "mean", "settings"]
    assert list(result["mean"]) == list(METRICS) == ["srcc", "plcc", "kl", "js", "wd"]
    assert result["settings"] == {"open_set": False, "fit": "4", "bootstrap": 20, "seed": 3}
    mine, koniq = result["sets"]
    assert list(mine) == ["name", "n", *METRICS, "mean_score", "mean_std", "ci"]
    assert list(koniq) == [*mine, "published"]
    assert (mine["name"], mine["n"], koniq["name"]) == ("mine", 12, "koniq")
    for found in (mine, koniq):
        assert all(isinstance(found[name], float) for name in (*METRICS, "mean_score", "mean_std"))
        assert list(found["ci"]) == list(METRICS)
        for low, high in found["ci"].values():
            assert low <= high
    assert koniq["published"] == {"full": {"plcc": 0.957, "srcc": 0.944}, "lora": {"plcc": 0.956, "srcc": 0.944}}
    assert {name: mine[name] for name in METRICS} == {name: koniq[name] for name in METRICS}


@pytest.mark.parametrize(
    ("pred", "gt", "name"),
    [
        ("mine.jsonl", "test_spaq_2k.json", "spaq"),
        ("test_spaq_2k.json", "mine.json", "spaq"),
        ("test_agiqa_3k.json", "test_agiqa_3k.json", "agiqa"),
        ("mine.jsonl", "gt.json", "mine"),
        ("test_spaq_2k.jsonl", "test_spaq.json", "test_spaq_2k"),
        (".hidden", "gt.json", ".hidden"),
    ],
)
def test_a_set_is_called_as_the_paper_or_as_its_predictions(pred: str, gt: str, name: str, tmp_path: Path) -> None:
    (tmp_path / "metas").mkdir()
    files = write(tmp_path, *toy(5), pred, f"metas/{gt}")
    found = read_predictions(*files, open_set=False)
    assert found.name == name
    assert (found.dataset is not None) == (name in ("spaq", "agiqa"))


def test_published_numbers_stand_beside_known_sets_only(tmp_path: Path, deqa: Deqa) -> None:
    predictions, metas = toy(12)
    known = write(tmp_path, predictions, metas, "test_pipal_5k.json", "gt.json")
    mine = write(tmp_path, predictions, metas, "mine.jsonl", "mine.json")
    preds, gts = zip(known, mine, strict=True)
    _, out, _ = deqa("evaluate", "--pred", *preds, "--gt", *gts, "--markdown", "--bootstrap", 0)
    header, _, pipal, own, mean = rows_of(out)
    assert header[-2:] == ["paper PLCC/SRCC", "LoRA PLCC/SRCC"]
    assert pipal[-2:] == ["0.495/0.496", "0.481/0.481"]
    assert own[-2:] == mean[-2:] == ["", ""]
    _, out, _ = deqa("evaluate", "--pred", mine[0], "--gt", mine[1])
    assert "paper" not in out
    assert "LoRA" not in out


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_has_every_number(format: str, tmp_path: Path) -> None:
    files = write(tmp_path, *toy(12))
    found = evaluate(read_predictions(*files, open_set=False), resamples=20)
    table = as_table([found], format)
    for heading in ("set", "n", "SRCC", "PLCC", "KL", "JS", "WD"):
        assert heading in table
    for name in METRICS:
        low, high = found.intervals[name]
        assert table.count(f"{found.values[name]:.4f} [{low:.4f}, {high:.4f}]") == 1
        # Of one set, the mean is the same.
        assert table.count(f"{found.values[name]:.4f}") >= 2


def test_the_default_table_is_for_people(tmp_path: Path, deqa: Deqa) -> None:
    pred, gt = write(tmp_path, *toy(12))
    _, out, _ = deqa("evaluate", "--pred", pred, "--gt", gt, "--bootstrap", 0)
    header, rule, row, mean = out.splitlines()
    assert header.split() == ["set", "n", "SRCC", "PLCC", "KL", "JS", "WD"]
    assert set(rule) == {"-", " "}
    assert row.split()[:2] == ["pred", "12"]
    assert mean.split() == ["mean", *row.split()[2:]]


def test_latex_is_a_tabular_of_booktabs_with_names_escaped(tmp_path: Path, deqa: Deqa) -> None:
    name = "a_b&c%d#e$f{g}h~i^j\\k<l>"
    pred, gt = write(tmp_path, *toy(12), f"{name}.jsonl")
    status, out, err = deqa("evaluate", "--pred", pred, "--gt", gt, "--latex", "--bootstrap", 0)
    assert (status, err) == (0, "")
    begin, top, header, middle, row, mean, bottom, end = out.splitlines()
    assert (begin, end) == ("\\begin{tabular}{lllllll}", "\\end{tabular}")
    assert (top, middle, bottom) == ("\\toprule", "\\midrule", "\\bottomrule")
    for line in (header, row, mean):
        assert line.endswith("\\\\")
        assert len(line.replace("\\&", "").split("&")) == 7
    escaped = "a\\_b\\&c\\%d\\#e\\$f\\{g\\}h\\textasciitilde{}i\\^{}j\\textbackslash{}k\\ensuremath{<}l\\ensuremath{>}"
    assert row.split(" & ")[0].strip() == escaped


def test_markdown_has_a_row_per_set_whatever_its_name(tmp_path: Path, deqa: Deqa) -> None:
    pred, gt = write(tmp_path, *toy(12), "a|b\nc|.jsonl")
    status, out, err = deqa("evaluate", "--pred", pred, "--gt", gt, "--markdown", "--bootstrap", 0)
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert len(lines) == 4
    assert lines[2].startswith("| a\\|b\\nc\\| ")
    for line in lines:
        assert line.replace("\\|", "").count("|") == 8
        assert line[0] == line[-1] == "|"
    assert set(lines[1]) == {"|", "-"}


@pytest.mark.parametrize("format", ["table", "latex"])
def test_a_name_with_a_new_line_stays_in_its_row(format: str, tmp_path: Path, deqa: Deqa) -> None:
    files = [write(tmp_path, *toy(12), f"{name}.jsonl") for name in ("ab", "a\nb")]
    flags = [] if format == "table" else [f"--{format}"]
    tables = [deqa("evaluate", "--pred", pred, "--gt", gt, *flags)[1] for pred, gt in files]
    assert tables[0].count("\n") == tables[1].count("\n")


def test_names_that_are_not_unicode_are_printed_with_escapes(tmp_path: Path, deqa: Deqa) -> None:
    pred, gt = write(tmp_path, *toy(12))
    named = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.jsonl"))
    pred.rename(named)
    for flags in ([], ["--json"], ["--markdown"], ["--latex"]):
        status, out, err = deqa("evaluate", "--pred", named, "--gt", gt, *flags)
        assert (status, err) == (0, "")
        assert "caf\\" in out.replace("\\textbackslash{}", "\\")
        assert "udce9" in out


def test_digits_in_a_name_stay_as_they_are(tmp_path: Path, deqa: Deqa) -> None:
    pred, gt = write(tmp_path, *toy(12), "1e5.jsonl")
    for flags in ([], ["--markdown"], ["--latex"]):
        assert "1e5" in deqa("evaluate", "--pred", pred, "--gt", gt, *flags)[1]


def test_the_mean_of_nothing_is_nan(tmp_path: Path) -> None:
    found = evaluated(tmp_path, *toy(8))
    empty = dataclasses.replace(found, values=dict.fromkeys(METRICS, math.nan))
    assert all(math.isnan(value) for value in average([empty, empty]).values())
    assert average([empty, found]) == found.values
    assert strict(as_json([empty], {}))["mean"] == dict.fromkeys(METRICS)


# ---- exit statuses ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--pred", "P", "--gt", "G", "H"], "1 prediction files and 2 metas"),
        (["--pred", "P", "--gt", "G", "--root", "R"], "--report DIR"),
        (["--pred", "P", "--gt", "G", "--json", "--markdown"], "not allowed with"),
        (["--pred", "P", "--gt", "G", "--fit", "3"], "'3'"),
        (["--pred", "P", "--gt", "G", "--bootstrap", "1.5"], "'1.5'"),
        (["--pred", "P", "--gt", "G", "--seed", "-1"], "'-1'"),
        (["--gt", "G"], "--pred"),
    ],
    ids=" ".join,
)
def test_bad_usage_exits_with_2(arguments: list[str], complaint: str, deqa: Deqa) -> None:
    status, out, err = deqa("evaluate", *arguments)
    assert (status, out) == (2, "")
    assert complaint in err
    assert "Traceback" not in err


@pytest.mark.parametrize("kind", ["file", "folder", "dangling link"])
def test_a_report_that_exists_is_refused_before_anything_is_read(kind: str, tmp_path: Path, deqa: Deqa) -> None:
    page = tmp_path / "report" / "index.html"
    page.parent.mkdir()
    {"file": page.touch, "folder": page.mkdir, "dangling link": lambda: page.symlink_to("absent")}[kind]()
    status, out, err = deqa("evaluate", "--pred", "absent", "--gt", "absent", "--report", page.parent)
    assert (status, out) == (2, "")
    assert err == f"deqa: {page} exists already; remove it or choose another name\n"
    assert [path.name for path in page.parent.iterdir()] == ["index.html"]


def test_metas_that_cannot_be_read_are_their_own_error(tmp_path: Path) -> None:
    pred, gt = write(tmp_path, *toy(4))
    gt.write_text("{}")
    with pytest.raises(MetaError, match="not a JSON list"):
        read_predictions(pred, gt, open_set=False)
