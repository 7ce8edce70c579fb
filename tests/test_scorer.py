import dataclasses
import io
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from PIL import Image, ImageSequence
from recipe import recipe_tensors

from deqa_jax import Scorer
from deqa_jax.checkpoint import Checkpoint
from deqa_jax.config import PRESETS, ConfigError
from deqa_jax.convert.to_jax import convert
from deqa_jax.preprocess import ImageError, load_square
from deqa_jax.prompt import LEVEL_WEIGHTS, PROMPTS, split_prompt
from deqa_jax.scoring_program import Prediction

Golden = tuple[dict[str, Any], Mapping[str, np.ndarray]]
GOOD = ("landscape.jpg", "portrait.png", "square.png", "gray.png", "wide.png")


@pytest.fixture(scope="module")
def scorer(converted: Path) -> Scorer:
    return Scorer.from_pretrained(converted, batch_size=3)


@pytest.fixture(scope="module")
def shared_model(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("shared") / "M"
    convert(str(shared / "tiny" / "checkpoint"), out, dtype="float32")
    return out


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("folder", ["tiny", "photos"])
def test_scores_equal_pytorch(shared: Path, shared_model: Path, folder: str, prompt: str) -> None:
    names = json.loads((shared / folder / "forward.json").read_text())["images"]
    expected = np.load(shared / folder / "forward.npz")
    paths = [shared / ("images" if folder == "tiny" else "photos") / name for name in names]
    found = Scorer.from_pretrained(shared_model, prompt=prompt, batch_size=4).predict(paths, open_set=True)
    np.testing.assert_allclose(found.score, expected[f"{prompt}_scores"], atol=3e-5)
    np.testing.assert_allclose(found.std, expected[f"{prompt}_stds"], atol=3e-5)
    np.testing.assert_allclose(found.logits, expected[f"{prompt}_level_logits"], atol=5e-5)
    np.testing.assert_allclose(found.open_probs, expected[f"{prompt}_open_probs"], rtol=1e-4)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_bfloat16_stays_near_pytorch(shared: Path, shared_model: Path, prompt: str) -> None:
    described = json.loads((shared / "tiny" / "forward.json").read_text())
    expected = np.load(shared / "tiny" / "forward.npz")[f"{prompt}_scores"]
    scorer = Scorer.from_pretrained(shared_model, dtype="bfloat16", prompt=prompt)
    error = np.abs(scorer([shared / "images" / name for name in described["images"]]) - expected)
    assert error.max() < 0.12
    assert error.mean() < 0.03


def test_merged_adapter_scores_equal_pytorch(shared: Path, tmp_path: Path) -> None:
    expected = json.loads((shared / "tiny" / "train.json").read_text())["lora_merged"]
    convert(str(shared / "tiny" / "checkpoint-lora"), tmp_path / "M", base=str(shared / "tiny" / "checkpoint"))
    found = Scorer.from_pretrained(tmp_path / "M").predict([shared / "images" / name for name in expected["images"]])
    np.testing.assert_allclose(found.score, expected["scores"], atol=3e-5)
    np.testing.assert_allclose(found.logits, expected["level_logits"], atol=5e-5)


@pytest.mark.parametrize("seed", [1, 2])
def test_another_size_equals_a_float64_implementation(
    seed: int, write_published: Callable[..., Path], images: Path, tmp_path: Path
) -> None:
    """From files to score, against the reference, for a size that is not the golden one."""
    test = PRESETS["test"]
    config = dataclasses.replace(
        test,
        language=dataclasses.replace(test.language, vocab_size=600, num_kv_heads=2, num_layers=1, mlp_dim=96),
        vision=dataclasses.replace(test.vision, patch_size=32, num_layers=1),
    )
    published = write_published(tmp_path / "P", config, seed)
    convert(str(published), tmp_path / "M")
    checkpoint = Checkpoint.open(tmp_path / "M")
    tokenizer, settings_ = checkpoint.tokenizer(), checkpoint.preprocess()
    found = Scorer(checkpoint, prompt="eval").predict([images / "square.png"])
    ids = split_prompt(tokenizer, PROMPTS["eval"])
    square = load_square(images / "square.png", settings_)
    normalised = (square / 255.0 - np.asarray(settings_.mean)) / np.asarray(settings_.std)
    stages = reference.forward(config, recipe_tensors(config, seed), normalised, list(ids.before), list(ids.after))
    logits = stages["logits"][-1][list(tokenizer.level_ids())]
    probs = np.exp(logits) / np.exp(logits).sum()
    np.testing.assert_allclose(found.logits[0], logits, atol=1e-4)
    np.testing.assert_allclose(found.score[0], probs @ LEVEL_WEIGHTS, atol=3e-5)


def test_an_image_gets_the_same_bits_in_any_place_and_company(scorer: Scorer, images: Path) -> None:
    alone = {name: scorer.predict([images / name]) for name in GOOD}
    random = np.random.default_rng(0)
    for _ in range(6):
        names = list(random.choice(GOOD, size=random.integers(2, 8)))
        together = scorer.predict([images / name for name in names])
        for i, name in enumerate(names):
            for field in ("score", "std", "probs", "logits"):
                np.testing.assert_array_equal(getattr(together, field)[i], getattr(alone[name], field)[0])


@pytest.mark.parametrize("batch_size", [2, 5, 8])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_place_in_a_batch_changes_no_bit_whatever_its_size(converted: Path, batch_size: int, dtype: str) -> None:
    scorer = Scorer.from_pretrained(converted, batch_size=batch_size, dtype=dtype)
    pixels = np.random.default_rng(0).integers(0, 255, (batch_size, 448, 448, 3), np.uint8)
    expected = np.asarray(scorer.predict_pixels(jnp.asarray(pixels)).logits)
    for shift in range(1, batch_size):
        found = np.asarray(scorer.predict_pixels(jnp.asarray(np.roll(pixels, shift, axis=0))).logits)
        np.testing.assert_array_equal(np.roll(found, -shift, axis=0), expected)


def test_every_kind_of_input_gives_the_same_score(scorer: Scorer, images: Path) -> None:
    path = images / "square.png"
    with Image.open(path) as opened:
        opened.load()
        kinds = [path, str(path), path.read_bytes(), opened, np.asarray(opened.convert("RGB"))]
        scores = scorer(kinds)
    np.testing.assert_array_equal(scores, np.repeat(scores[:1], len(kinds)))
    assert scores.dtype == np.float32


def encoded(*frames: Image.Image, format: str) -> io.BytesIO:
    file = io.BytesIO()
    frames[0].save(file, format=format, save_all=len(frames) > 1, append_images=frames[1:])
    return file


def test_an_unread_image_may_come_several_times(scorer: Scorer) -> None:
    """Read by two threads at once it would be half of its pixels, or an error."""
    file = encoded(Image.effect_noise((1500, 1000), 50).convert("RGB"), format="PNG")
    (expected,) = scorer([file.getvalue()])
    for _ in range(3):
        with Image.open(file) as opened:
            results = list(scorer.stream([opened] * 4))
        assert [(result.score, result.error) for result in results] == [(expected, None)] * 4


def test_what_is_done_to_an_image_after_it_came_changes_nothing(scorer: Scorer) -> None:
    """The frames of a film are one image, which goes from one to the next."""
    random = np.random.default_rng(0)
    frames = [Image.fromarray(random.integers(0, 256, (60, 40), np.uint8)) for _ in range(8)]
    with Image.open(encoded(*frames, format="GIF")) as film:
        scores = [result.score for result in scorer.stream(ImageSequence.Iterator(film))]
    expected = [scorer([frame])[0] for frame in frames]
    assert scores == expected
    assert len(set(scores)) == len(frames)

    def closed_behind() -> Any:
        for frame in frames:
            with Image.open(encoded(frame, format="PNG")) as opened:
                yield opened
            opened.close()

    assert [result.score for result in scorer.stream(closed_behind())] == expected


def test_an_open_image_that_cannot_be_read_is_named_where_it_stands(scorer: Scorer, images: Path) -> None:
    with Image.open(images / "truncated.jpg") as bad, Image.open(images / "gray.png") as good:
        results = list(scorer.stream([good, bad, Image.new("RGB", (1 << 17, 1)), bad, good]))
    assert [result.error is None for result in results] == [True, False, False, False, True]
    assert results[0].score == results[4].score == scorer([images / "gray.png"])[0]
    assert "truncated.jpg: " in str(results[1].error)
    assert results[2].error == "an image: 131072x1 pixels; a side of more than 65536 is refused"


def test_a_batch_is_compiled_once(scorer: Scorer, images: Path) -> None:
    scorer([images / "gray.png"])
    compiled = scorer._run._cache_size()
    scorer([images / name for name in GOOD])
    scorer([images / name for name in GOOD[:4]])
    assert scorer._run._cache_size() == compiled


def test_hidden_state_and_open_set_come_on_request(scorer: Scorer, images: Path) -> None:
    plain = scorer.predict([images / "gray.png"])
    assert plain.hidden is None
    assert plain.open_probs is None
    asked = scorer.predict([images / "gray.png"], hidden=True, open_set=True)
    assert asked.hidden.shape == (1, PRESETS["test"].language.hidden_size)
    assert asked.open_probs.sum() < 1
    np.testing.assert_allclose(asked.open_probs / asked.open_probs.sum(), asked.probs, rtol=1e-5)
    np.testing.assert_allclose(asked.score, plain.score, atol=1e-6)


def test_stream_keeps_order_and_reports_bad_images_where_they_stand(scorer: Scorer, images: Path) -> None:
    names = [
        "empty.png",
        "gray.png",
        "truncated.jpg",
        "square.png",
        "wide.png",
        "not_an_image.jpg",
        "tall.jpg",
        "none.png",
    ]
    results = list(scorer.stream(str(images / name) for name in names))
    assert [Path(result.image).name for result in results] == names
    bad = {"empty.png", "truncated.jpg", "not_an_image.jpg", "none.png"}
    for name, result in zip(names, results, strict=True):
        if name in bad:
            assert result.score is None
            assert name in result.error
        else:
            assert result.error is None
            assert result.score == scorer([images / name])[0]


def test_a_score_that_is_no_number_is_an_error(scorer: Scorer, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As damaged weights make it; of the others in its batch nothing is lost."""
    names = [images / name for name in ("gray.png", "square.png", "wide.png")]
    batches = scorer._batches

    def damaged(*arguments: Any, **named: Any) -> Iterator[tuple[Any, Any]]:
        for items, prediction in batches(*arguments, **named):
            score = np.where([item is names[1] for item, _ in items], np.nan, prediction.score[: len(items)])
            yield items, prediction._replace(score=score)

    expected = [result.score for result in scorer.stream(names)]
    monkeypatch.setattr(scorer, "_batches", damaged)
    first, second, third = scorer.stream(names)
    assert [first.score, third.score] == [expected[0], expected[2]]
    assert second.error == "the score is nan: the model's weights are damaged"
    assert second[1:-1] == (None,) * 5


def test_stream_says_all_that_predict_says(scorer: Scorer, images: Path) -> None:
    names = ["gray.png", "empty.png", "square.png", "wide.png", "none.png", "tall.jpg", "gray.png"]
    good = [name for name in names if name not in ("empty.png", "none.png")]
    for open_set in (False, True):
        said = scorer.predict([images / name for name in good], open_set=open_set)
        results = list(scorer.stream((images / name for name in names), open_set=open_set))
        assert [result.image for result in results] == [images / name for name in names]
        found = [result for result in results if result.error is None]
        assert len(found) == len(good)
        for field in ("score", "std", "probs", "logits", "open_probs"):
            values = [getattr(result, field) for result in found]
            if field == "open_probs" and not open_set:
                assert values == [None] * len(good)
            else:
                # Float for float, and Python's own: what JSON writes is read back as the same number.
                rows = getattr(said, field).tolist()
                assert values == [tuple(row) if isinstance(row, list) else row for row in rows]
                assert {type(value) for value in values} == {tuple if isinstance(rows[0], list) else float}
        bad = [result[1:-1] for result in results if result.error is not None]
        assert bad == [(None,) * 5] * 2


def test_stream_reads_the_content_of_files(scorer: Scorer, images: Path) -> None:
    names = ["square.png", "truncated.jpg", "wide.png", "not_an_image.jpg", "tall.jpg", "empty.png"]
    contents = [(images / name).read_bytes() for name in names]
    results = list(scorer.stream(contents, open_set=True))
    expected = list(scorer.stream([images / name for name in names], open_set=True))
    assert [result.image for result in results] == contents
    for result, same, name in zip(results, expected, names, strict=True):
        assert result[1:-1] == same[1:-1]
        assert (result.error or "").replace("an image: ", f"{images / name}: ", 1) == (same.error or "")
    assert [result.error is None for result in results] == [True, False] * 3


def test_a_scorer_knows_its_checkpoint_and_prompt(scorer: Scorer, converted: Path) -> None:
    checkpoint = Checkpoint.open(converted)
    assert scorer.identity == checkpoint.identity
    assert (scorer.prompt, scorer.dtype, scorer.batch_size) == ("scorer", "float32", 3)
    other = Scorer(checkpoint, prompt="eval", dtype="bfloat16")
    assert (other.identity, other.prompt, other.dtype, other.batch_size) == (scorer.identity, "eval", "bfloat16", 1)


def test_stream_of_bad_images_alone_or_of_nothing(scorer: Scorer, images: Path) -> None:
    assert all(result.error for result in scorer.stream([images / "empty.png"] * 7))
    assert list(scorer.stream([])) == []


def test_stream_reads_only_a_bounded_number_of_images_ahead(scorer: Scorer, images: Path) -> None:
    asked = 0

    def endless() -> Any:
        nonlocal asked
        while True:
            asked += 1
            yield images / "gray.png"

    stream = scorer.stream(endless())
    for _ in range(4):
        next(stream)
    stream.close()
    assert asked < 60


def test_predict_names_a_bad_image(scorer: Scorer, images: Path) -> None:
    with pytest.raises(ImageError, match=r"truncated\.jpg"):
        scorer([images / "gray.png", images / "truncated.jpg"])


@pytest.mark.parametrize(
    "images",
    ["photo.jpg", b"content", Path("x.png"), [], np.zeros((4, 4, 3), np.uint8), Image.new("RGB", (4, 4))],
    ids=lambda images: type(images).__name__,
)
def test_images_are_a_list_of_at_least_one(scorer: Scorer, images: Any) -> None:
    with pytest.raises(ValueError, match="a list of at least one image"):
        scorer(images)


@pytest.mark.parametrize(
    "options", [{"dtype": "float16"}, {"prompt": "chat"}, {"batch_size": 0}, {"input_size_limit": 0.0}]
)
def test_options_out_of_range_are_named(converted: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        Scorer.from_pretrained(converted, **options)


def broken_copy(converted: Path, out: Path, change: Callable[[dict[str, Any]], None], file: str) -> Path:
    out.mkdir()
    for entry in converted.iterdir():
        (out / entry.name).symlink_to(entry)
    (out / file).unlink()
    content = json.loads((converted / file).read_text())
    change(content)
    (out / file).write_text(json.dumps(content))
    return out


def test_preprocessing_of_another_size_is_refused(converted: Path, tmp_path: Path) -> None:
    model = broken_copy(
        converted, tmp_path / "M", lambda p: p.update(size=224, crop_size=224), "preprocessor_config.json"
    )
    with pytest.raises(ConfigError, match="224 pixels"):
        Scorer.from_pretrained(model)


def test_vocabulary_smaller_than_the_tokenizer_is_refused(write_published: Callable[..., Path], tmp_path: Path) -> None:
    test = PRESETS["test"]
    config = dataclasses.replace(test, language=dataclasses.replace(test.language, vocab_size=20))
    convert(str(write_published(tmp_path / "P", config)), tmp_path / "M")
    with pytest.raises(ConfigError, match="more tokens than its model's vocabulary"):
        Scorer.from_pretrained(tmp_path / "M")


def test_pixels_on_the_device_get_the_score_of_the_file(scorer: Scorer, converted: Path, images: Path) -> None:
    square = load_square(images / "landscape.jpg", Checkpoint.open(converted).preprocess())
    found = scorer.predict_pixels(jnp.asarray(np.stack([square] * scorer.batch_size)))
    assert isinstance(found, Prediction)
    assert isinstance(found.score, jax.Array)
    np.testing.assert_array_equal(found.score[0], scorer([images / "landscape.jpg"])[0])
