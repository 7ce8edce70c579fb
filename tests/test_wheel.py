"""What an installed wheel looks like."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from deqa_jax.builtin_model import damaged_files

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel's files as pip would lay them out."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("deqa_jax", "configs", "convert", "launch", "pyproject.toml", "README.md", "LICENSE"):
        (source / name).symlink_to(ROOT / name)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", "--wheel-dir", str(folder), str(source)]
    subprocess.run(command, check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def test_no_generic_name_lands_at_the_top(installed: Path) -> None:
    top = {path.name for path in installed.iterdir()}
    assert {name for name in top if not name.endswith(".dist-info")} == {"deqa_jax"}


def test_every_module_is_installed(installed: Path) -> None:
    expected = {path.relative_to(ROOT / "deqa_jax") for path in (ROOT / "deqa_jax").rglob("*.py")}
    for folder in ("convert", "launch"):
        expected |= {Path(folder) / path.name for path in (ROOT / folder).glob("*.py")}
    assert {path.relative_to(installed / "deqa_jax") for path in (installed / "deqa_jax").rglob("*.py")} == expected
    assert (installed / "deqa_jax" / "py.typed").is_file()
    assert (installed / "deqa_jax" / "gallery_page.html").is_file()


def test_the_model_of_the_package_is_installed(installed: Path) -> None:
    source, target = (folder / "deqa_jax" / "assets" / "deqa-tiny" for folder in (ROOT, installed))
    assert {path.name for path in target.iterdir()} == {path.name for path in source.iterdir()}
    assert damaged_files(target) == []


@pytest.mark.parametrize("name", ["configs", "launch"])
def test_other_files_are_installed(installed: Path, name: str) -> None:
    wanted = {path.name for path in (ROOT / name).iterdir() if path.suffix in (".sh", ".yaml")}
    assert wanted
    assert wanted <= {path.name for path in (installed / "deqa_jax" / name).iterdir()}


def test_the_installed_command_runs(installed: Path, tmp_path: Path) -> None:
    code = f"import sys; sys.path.insert(0, {str(installed)!r}); from deqa_jax.cli import main; main(['init', 'M'])"
    subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, check=True)
    assert (tmp_path / "M" / "config.json").is_file()
