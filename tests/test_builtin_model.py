"""The model that comes with the package: whole, small, what its card says, with the scores it was shipped with."""

import hashlib
import json
import logging
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from deqa_jax import Scorer, builtin_model
from deqa_jax.checkpoint import Checkpoint, CheckpointError
from deqa_jax.config import PRESETS
from deqa_jax.convert.describe import describe
from deqa_jax.convert.to_jax import resolve
from deqa_jax.data.degradations import encoded

ROOT = Path(__file__).resolve().parents[1]
FOLDER = builtin_model.FOLDER
CARD = (FOLDER / "README.md").read_text()
STORED = json.loads((ROOT / "tests" / "golden" / "deqa_tiny.json").read_text())


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = shutil.copytree(FOLDER, tmp_path / "copy")
    monkeypatch.setattr(builtin_model, "FOLDER", folder)
    return folder


def test_it_is_small_and_has_every_file_in_its_list() -> None:
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 8 << 20
    listed = {line.split(maxsplit=1)[1] for line in (FOLDER / builtin_model.HASHES_FILE).read_text().splitlines()}
    assert listed == {str(path.relative_to(FOLDER)) for path in files} - {"README.md", builtin_model.HASHES_FILE}
    assert builtin_model.damaged_files(FOLDER) == []


def test_the_card_names_what_is_shipped() -> None:
    digest = hashlib.sha256((FOLDER / builtin_model.HASHES_FILE).read_bytes()).hexdigest()
    assert digest in CARD


def test_it_is_the_preset() -> None:
    checkpoint = Checkpoint.open(resolve(builtin_model.NAME))
    assert checkpoint.config == PRESETS["tiny"]
    assert {str(leaf.dtype) for leaf in checkpoint.stored.values()} == {"float16"}


def test_no_path_of_any_machine_is_in_it() -> None:
    for name in ("config.json", "README.md"):
        assert not re.search(r"/(home|root|tmp|work)/", (FOLDER / name).read_text()), name


def test_scores_are_those_it_was_shipped_with() -> None:
    """Stored ones are of another machine, whose sums end in other bits."""
    scorer = Scorer.from_pretrained(dtype="float32", batch_size=4)
    images = [ROOT / "examples" / name for name in STORED]
    prediction = scorer.predict(images)
    np.testing.assert_allclose(prediction.score, [entry["score"] for entry in STORED.values()], atol=2e-4)
    np.testing.assert_allclose(prediction.std, [entry["std"] for entry in STORED.values()], atol=2e-4)


def test_examples_get_worse_and_their_scores_fall() -> None:
    assert len(STORED) == 12
    for kind in ("blur", "noise", "jpeg"):
        scores = [STORED[f"{kind}_{strength}.jpg"]["score"] for strength in range(4)]
        assert scores == sorted(scores, reverse=True)
        assert scores[0] > 3.5
        assert scores[3] < 2.5


def test_a_blurred_picture_is_bad_however_it_is_stored() -> None:
    """What was blurred last is free of noise to the last bit only until it is stored as pictures are."""
    scorer = Scorer.from_pretrained(dtype="float32", batch_size=4)
    rng = np.random.default_rng(0)
    scores = []
    for kind in ("blur", "noise", "jpeg"):
        with Image.open(ROOT / "examples" / f"{kind}_0.jpg") as picture:
            blurred = picture.filter(ImageFilter.GaussianBlur(8))
        pixels = np.asarray(blurred)
        noisy = np.clip(pixels + rng.standard_normal(pixels.shape) + 0.5, 0, 255).astype(np.uint8)
        scores.append(scorer([pixels, noisy, *(encoded(pixels, "JPEG", quality) for quality in (95, 85))]))
    assert np.max(scores) < 2.5
    assert np.ptp(scores, axis=1).max() < 0.5


def test_it_is_announced_once(caplog: pytest.LogCaptureFixture) -> None:
    builtin_model.announce.cache_clear()
    with caplog.at_level(logging.WARNING, logger="deqa_jax"):
        for _ in range(2):
            Scorer.from_pretrained(dtype="float32", batch_size=1)
    assert [record.message for record in caplog.records].count(caplog.records[0].message) == 1
    assert "deqa-tiny" in caplog.records[0].message


def test_a_folder_of_its_name_goes_first_where_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    assert builtin_model.folder_of("deqa-tiny") == FOLDER
    (tmp_path / "deqa-tiny").mkdir()
    with caplog.at_level(logging.WARNING, logger="deqa_jax"):
        assert builtin_model.folder_of("deqa-tiny") == "deqa-tiny"
    assert "not the model that comes with the package" in caplog.text
    # Where none is named it is the package's.
    assert Scorer.from_pretrained(dtype="float32", batch_size=1).identity


def test_info_knows_it() -> None:
    assert "vocabulary of 512" in describe("deqa-tiny")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.model", "SHA256SUMS"])
@pytest.mark.parametrize("damage", ["removed", "changed"])
def test_a_damaged_file_asks_for_a_new_installation(copy: Path, name: str, damage: str) -> None:
    if damage == "removed":
        (copy / name).unlink()
    else:
        (copy / name).write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match=rf"{re.escape(name)} missing or damaged; install the package again"):
        builtin_model.folder_of("deqa-tiny")


def test_damaged_weights_are_found(copy: Path) -> None:
    (weights,) = copy.glob("*.safetensors")
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    with pytest.raises(CheckpointError, match="install the package again"):
        Scorer.from_pretrained()
