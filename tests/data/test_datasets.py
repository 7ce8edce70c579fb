"""The eight published datasets against their tables, written out once more."""

import dataclasses
from pathlib import Path

import pytest

from deqa_jax.arguments import parser
from deqa_jax.data.datasets import DATASETS, Dataset, UnknownDatasetError, named, of_metas

# As printed: PLCC/SRCC.
PAPER = ".957/.944 | .938/.934 | .955/.953 | .495/.496 | .900/.887 | .808/.745 | .852/.820 | .900/.857"
MODEL_CARD = ".956/.944 | .939/.935 | .953/.951 | .481/.481 | .903/.890 | .806/.754 | .851/.821 | .900/.860"
FOLDERS = "KONIQ SPAQ KADID10K PIPAL LIVE-WILD AGIQA3K TID2013 CSIQ"
NAMES = "koniq spaq kadid pipal livew agiqa tid2013 csiq"
TRAIN = {"koniq": "train_koniq_7k.json", "spaq": "train_spaq_9k.json", "kadid": "train_kadid_8k.json"}
TEST = {
    "koniq": "test_koniq_2k.json",
    "spaq": "test_spaq_2k.json",
    "kadid": "test_kadid_2k.json",
    "pipal": "test_pipal_5k.json",
    "livew": "test_livew_1k.json",
    "agiqa": "test_agiqa_3k.json",
    "tid2013": "test_tid2013_3k.json",
    "csiq": "test_csiq_866.json",
}


def test_the_eight_datasets_are_in_the_order_of_the_paper() -> None:
    assert list(DATASETS) == NAMES.split() == [dataset.name for dataset in DATASETS.values()]
    assert [dataset.folder for dataset in DATASETS.values()] == FOLDERS.split()


@pytest.mark.parametrize(("field", "printed"), [("paper", PAPER), ("lora", MODEL_CARD)])
def test_numbers_are_the_printed_ones(field: str, printed: str) -> None:
    found = ["/".join(f"{number:.3f}"[1:] for number in getattr(x, field)) for x in DATASETS.values()]
    assert " | ".join(found) == printed


def test_numbers_are_those_of_the_specification(shared: Path) -> None:
    specification = (shared.parent / "SPEC.md").read_text()
    for row in (PAPER, MODEL_CARD):
        assert f"| {row} |" in specification


def test_metas_are_below_the_folder_of_their_dataset() -> None:
    root = Path("Data-DeQA-Score")
    for dataset in DATASETS.values():
        folder = root / dataset.folder / "metas"
        assert dataset.metas(root, "test") == folder / TEST[dataset.name]
        train = TRAIN.get(dataset.name)
        assert dataset.metas(root, "train") == (None if train is None else folder / train)


def test_only_the_test_metas_are_known_by_their_file_name() -> None:
    for name, file in TEST.items():
        assert of_metas([file]) is DATASETS[name]
        assert of_metas(["other.json", file]) is DATASETS[name]
        assert of_metas([file.removesuffix(".json"), file.upper(), f"my_{file}", f"metas/{file}"]) is None
    assert of_metas(list(TRAIN.values())) is None
    assert of_metas([]) is None


def test_names_are_taken_in_the_order_given_and_once() -> None:
    assert named(",".join(DATASETS)) == list(DATASETS.values())
    assert [dataset.name for dataset in named("csiq,koniq,csiq,agiqa,koniq")] == ["csiq", "koniq", "agiqa"]


@pytest.mark.parametrize("names", ["", "koniq,", ",koniq", "koniq, spaq", "KONIQ", "koniq;spaq", "live,koniq,kadid10k"])
def test_an_unknown_name_is_refused_with_those_there_are(names: str) -> None:
    unknown = [name for name in names.split(",") if name not in DATASETS]
    with pytest.raises(UnknownDatasetError) as caught:
        named(names)
    message = str(caught.value)
    assert message.startswith("no dataset " + ", ".join(map(repr, unknown)) + "; there are ")
    assert message.endswith(", ".join(NAMES.split()))


def test_datasets_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        DATASETS["koniq"].test = "other.json"  # type: ignore[misc]
    assert all(type(dataset) is Dataset for dataset in DATASETS.values())


def test_the_command_line_names_every_dataset(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parser().parse_args(["infer", "--help"])
    words = capsys.readouterr().out.replace(",", " ").split()
    assert set(DATASETS) <= set(words)
