import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kdexport.core.training_process import training_environment, training_folder
from kdexport.errors import BackendUnavailableError

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of installed packages, as the wheel fills it."""
    site = tmp_path_factory.mktemp("site")
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "kdexport", site / "kdexport", ignore=ignore)
    shutil.copytree(ROOT / "export_configs", site / "kdexport" / "export_configs")
    shutil.copytree(ROOT / "training", site / "kdexport" / "shipped" / "training", ignore=ignore)
    return site


@pytest.fixture
def users(tmp_path: Path) -> Path:
    """A user's folder with a package of the name of ours, which notes that it was imported."""
    (tmp_path / "training").mkdir()
    for name in ("__init__", "__main__"):
        (tmp_path / "training" / f"{name}.py").write_text("open('imported', 'w').close()\n")
    return tmp_path


def run(*arguments: str, folder: Path, site: Path) -> "subprocess.CompletedProcess[str]":
    """``kdexport`` with our installed package, in a folder that Python would import from first."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(["", str(site)])}
    return subprocess.run(
        [sys.executable, "-m", "kdexport", *arguments],
        cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip


@pytest.mark.parametrize(
    "arguments",
    [
        ("list", "recipes"),
        ("evaluate-run", "--recipe", "digitz"),
        ("build", "--student", "mobilenetv2", "--data", "nowhere"),
    ],
)
def test_our_package_runs_in_a_folder_with_a_package_of_the_same_name(
    arguments: tuple[str, ...], installed: Path, users: Path
) -> None:
    done = run(*arguments, folder=users, site=installed)
    assert not (users / "imported").exists()
    assert "No module named" not in done.stderr
    expected = {"list": "cifar100/", "evaluate-run": "Did you mean digits", "build": "There is no folder nowhere"}
    assert expected[arguments[0]] in done.stdout + done.stderr
    assert done.returncode == (0 if arguments[0] == "list" else 2), done.stderr


def test_the_users_own_places_to_import_from_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", f"mine{os.pathsep}yours")
    assert training_environment() == {
        "PYTHONPATH": os.pathsep.join([str(ROOT), "mine", "yours"]), "PYTHONSAFEPATH": "1",
    }  # fmt: skip
    monkeypatch.delenv("PYTHONPATH")
    assert training_environment()["PYTHONPATH"] == str(ROOT)


def test_an_incomplete_installation_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "kdexport").mkdir()
    (tmp_path / "training").mkdir()
    with pytest.raises(BackendUnavailableError, match="The training package is missing from"):
        training_folder(tmp_path / "kdexport")
    (tmp_path / "kdexport" / "shipped" / "training" / "recipes").mkdir(parents=True)
    assert training_folder(tmp_path / "kdexport") == tmp_path / "kdexport" / "shipped"
