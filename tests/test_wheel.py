"""The wheel, and what it can do with nothing but the packages that it asks for."""

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import kdexport
from tests.conftest import Built, Outcome

ROOT = Path(__file__).parent.parent
#: The module onnxruntime comes from either of two packages; whichever is installed here stands for the other.
TWINS = {"onnxruntime": "onnxruntime-gpu", "onnxruntime-gpu": "onnxruntime"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--disable-pip-version-check", "-w"]
    subprocess.run([*command, str(folder), str(ROOT)], check=True, capture_output=True)
    (found,) = folder.glob("*.whl")
    return found


def needed(requirements: list[str], extras: set[str]) -> set[str]:
    """Names of all distributions that ``requirements`` with ``extras`` lead to, of those that are installed here."""
    found: set[str] = set()
    pending = [(Requirement(line), extras) for line in requirements]
    while pending:
        wanted, given = pending.pop()
        if wanted.marker is not None and not any(wanted.marker.evaluate({"extra": extra}) for extra in given | {""}):
            continue
        if wanted.name == "kdexport":
            pending += [(Requirement(line), set(wanted.extras)) for line in requirements]
            continue
        name = installed_name(wanted.name)
        if name not in found or wanted.extras:
            found.add(name)
            pending += [(Requirement(line), set(wanted.extras)) for line in metadata.requires(name) or []]
    return found


def installed_name(name: str) -> str:
    try:
        metadata.distribution(name)
    except metadata.PackageNotFoundError:
        name = TWINS[name]
    return canonicalize_name(name)


def link(names: set[str], site: Path) -> None:
    """Link every file of the distributions ``names`` into the folder ``site``."""
    for name in names:
        for file in metadata.distribution(name).files or []:
            if ".." in file.parts or file.suffix == ".pyc":
                continue
            place = site / file
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(Path(str(file.locate())))


@dataclass(frozen=True)
class Fresh:
    """An environment with the wheel and what some of its extras need, and nothing else."""

    python: Path
    folder: Path

    def run(self, *arguments: str | Path, module: str = "kdexport") -> Outcome:
        environment = {"PATH": os.environ["PATH"], "HOME": str(self.folder), "COLUMNS": "160", "NO_COLOR": "1"}
        done = subprocess.run(
            [self.python, "-m", module, *map(str, arguments)],
            cwd=self.folder, env=environment, capture_output=True, text=True, check=False, timeout=120,
        )  # fmt: skip
        return Outcome(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="module")
def fresh(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Fresh]:
    def make(*extras: str) -> Fresh:
        folder = tmp_path_factory.mktemp("fresh")
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "env")], check=True)
        (site,) = (folder / "env").glob("lib/python*/site-packages")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)
        (described,) = site.glob("kdexport-*.dist-info")
        asked = metadata.Distribution.at(described).requires or []
        link(needed(asked, set(extras)), site)
        # A user's own package of the name of one of ours.
        (folder / "training").mkdir()
        (folder / "training" / "__init__.py").write_text("raise RuntimeError('the package of the user')\n")
        return Fresh(folder / "env" / "bin" / "python", folder)

    return make


@pytest.fixture(scope="module")
def light(fresh: Callable[..., Fresh]) -> Fresh:
    """``pip install 'kdexport[serve]'``."""
    return fresh("serve")


def test_the_wheel_holds_one_package_with_recipes_and_configurations(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {
        "kdexport/cli.py", "kdexport/shipped/training/recipes/digits.toml",
        "kdexport/shipped/training/recipes/parts/imagenet100.toml", "kdexport/shipped/training/recipes/tables.toml",
        "kdexport/export_configs/mobilenetv2.toml", "kdexport/export_configs/quickstart.toml",
    } <= names  # fmt: skip
    # A package of ours at the top could hide a user's own.
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"kdexport"}
    assert not [name for name in names if "__pycache__" in name]
    (described,) = {name.partition("/")[0] for name in names if ".dist-info/" in name}
    assert described == f"kdexport-{kdexport.__version__}.dist-info"
    assert {"kdexport/py.typed", f"{described}/licenses/LICENSE", f"{described}/licenses/NOTICE"} <= names


def test_the_light_environment_lacks_what_only_builds_need(light: Fresh) -> None:
    (site,) = (light.folder / "env").glob("lib/python*/site-packages")
    assert {"numpy", "onnxruntime", "uvicorn"} <= {path.name for path in site.iterdir()}
    heavy = (
        "torch",
        "torchvision",
        "scipy",
        "onnxscript",
        "accelerate",
        "tensorboard",
        "polygraphy",
        "openvino",
        "ncnn",
    )
    assert not [name for name in heavy if (site / name).exists()]


def test_a_bundle_is_inspected_and_examined_without_torch(light: Fresh, built: Built) -> None:
    assert light.run("inspect", built.bundle).exit_code == 0
    done = light.run("doctor", built.bundle)
    assert done.exit_code == 0, done.stdout + done.stderr
    assert "pixels as in training" in done.stdout
    done = light.run("doctor")
    assert done.exit_code == 0, done.stderr
    assert "not installed. Run pip install 'kdexport[build" in done.stdout


SERVE = """
import json, subprocess, sys, urllib.request
server = subprocess.Popen(
    [sys.executable, "-m", "kdexport", "serve", sys.argv[1], "--port", "0", "--metrics-port", "0", "--json"],
    stdout=subprocess.PIPE, text=True,
)
try:
    address = json.loads(server.stdout.readline())["result"]["url"]
    body = open(sys.argv[2], "rb").read()
    request = urllib.request.Request(address + "/v1/classify?top=3", body)
    print(urllib.request.urlopen(request).read().decode())
finally:
    server.terminate()
    server.wait()
"""


def test_a_bundle_is_served_without_torch(light: Fresh, built: Built) -> None:
    (light.folder / "ask.py").write_text(SERVE)
    done = light.run(built.bundle, built.bundle / "golden" / "000.png", module="ask")
    assert done.exit_code == 0, done.stderr
    predictions = json.loads(done.stdout)["predictions"]
    assert len(predictions) == 3
    assert sum(item["probability"] for item in predictions) <= 1


def test_a_command_without_its_extra_says_which_and_exits_with_4(light: Fresh, built: Built, tmp_path: Path) -> None:
    for extra, arguments in (
        ("build", ("verify", built.bundle)),
        ("stats", ("gate", built.bundle, "--baseline", built.bundle)),
        ("build", ("gate", built.bundle)),
        ("build", ("build", "--student", "mobilenetv2")),
        ("build", ("list", "students")),
        ("build", ("train", "--recipe", "digits", "--out", tmp_path)),
        ("build", ("replay", built.bundle)),
    ):
        done = light.run(*arguments, "--json") if arguments[0] != "train" else light.run(*arguments)
        assert done.exit_code == 4, (arguments, done.stderr)
        if arguments[0] != "train":
            assert done.error["code"] == "KDX400"
        # Where onnxruntime is the one for GPUs, as for the tests, it ends with -gpu.
        assert f"pip install 'kdexport[{extra}" in done.stderr, (arguments, done.stderr)
        assert "KDX400" in done.stderr


def test_without_an_onnxruntime_the_message_offers_both(fresh: Callable[..., Fresh], built: Built) -> None:
    base = fresh("server")
    assert base.run("inspect", built.bundle).exit_code == 0
    for command in ("doctor", "serve"):
        done = base.run(command, built.bundle)
        assert done.exit_code == 4, done.stderr
        assert "pip install 'kdexport[cpu]'" in done.stderr
        assert "'kdexport[gpu]'" in done.stderr


def test_recipes_are_ours_in_a_folder_with_a_package_of_that_name(light: Fresh) -> None:
    done = light.run("list", "recipes", "--json")
    assert done.exit_code == 0, done.stderr
    assert {"name": "digits"} in done.data["recipes"]
    # It is the user's own for everyone else.
    assert "the package of the user" in light.run(module="training").stderr
