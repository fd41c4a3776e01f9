"""The README's commands are run as they stand, and its promises about itself are checked."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import Built
from tests.kdexport.serving.running_server import running

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
TRAINING = "kdexport train "


def commands() -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", README, flags=re.DOTALL)
    lines = [line.split("#")[0].strip() for block in blocks for line in block.splitlines()]
    indented = [line.strip() for line in README.splitlines() if line.startswith(f"    {TRAINING}")]
    return [line for line in [*lines, *indented] if line]


def test_it_is_short_and_begins_with_a_command() -> None:
    assert len(README.splitlines()) < 150
    assert commands()[0] == "make quickstart"
    assert "make test" in commands()


def test_its_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target
    for path in re.findall(r"`((?:kdexport|training|export_configs)/[\w/.]+)`", README):
        assert (ROOT / path).exists(), path


def test_its_error_codes_and_targets_exist() -> None:
    from kdexport.errors import error_codes
    from kdexport.targets import target_names

    assert set(re.findall(r"KDX\d+", README)) <= set(error_codes())
    assert set(re.findall(r"`((?:onnx|trt|trt-rtx)-(?:fp|bf|int)\d+)`", README)) <= set(target_names())


@pytest.mark.parametrize(
    "line", [line for line in commands() if line.startswith("kdexport ") and not line.startswith(TRAINING)]
)
def test_its_kdexport_commands_run(line: str, built: Built, tmp_path: Path) -> None:
    """With the quickstart's bundle replaced by a smaller one, and the data by digits where CIFAR-100 is named."""
    shutil.copytree(built.bundle, tmp_path / "dist" / "quickstart")
    words = shlex.split(line)[1:]
    if words[0] == "build":
        words = _shortened_build(words, built, tmp_path)
        _share_stages(built, tmp_path)
    if words[0] == "serve":
        with running(*words[1:], cwd=tmp_path) as server:
            assert server.ask("GET", "/v2/models/quickstart/ready").status == 200
        return
    done = subprocess.run(
        [sys.executable, "-m", "kdexport", *words], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    if words[0] == "build":
        made = tmp_path / "dist" / "mobilenetv2"
        assert (made / "unfused.safetensors").read_bytes() == (built.bundle / "unfused.safetensors").read_bytes()
        assert "train " in done.stderr
        assert "verify " in done.stderr


def _share_stages(built: Built, folder: Path) -> None:
    """The student is trained and the bundle verified anew; exports and engines of the very same weights are found."""
    workspace = folder / ".kdexport"
    shutil.copytree(built.workspace, workspace, ignore=shutil.ignore_patterns(".partial-*", "running-*"))
    for stage in ("train", "teacher", "bundle"):
        shutil.rmtree(workspace / stage)


def _shortened_build(words: list[str], built: Built, folder: Path) -> list[str]:
    """Every other option of the README stays; the configuration of that name is one that trains in seconds."""
    (folder / "export_configs").mkdir()
    shutil.copyfile(built.config, folder / "export_configs" / "mobilenetv2.toml")
    teacher = next((built.workspace / "teacher").glob("[!.]*/model.safetensors"))
    # Digits lie inside a package: the place of CIFAR-100 is the one thing that has no counterpart.
    place = words.index("--data")
    del words[place : place + 2]
    return [str(teacher) if word == "resnet56.pt" else word for word in words]


@pytest.mark.parametrize("line", [line for line in commands() if line.startswith(TRAINING)])
def test_its_training_commands_have_these_options(line: str) -> None:
    words = shlex.split(line)[1:]
    done = subprocess.run(
        [sys.executable, "-m", "kdexport", words[0], "--help"],
        capture_output=True, text=True, check=True, env={**os.environ, "COLUMNS": "200"},
    )  # fmt: skip
    for option in (word for word in words if word.startswith("--")):
        assert option in done.stdout


def test_make_quickstart_ends_with_a_verified_bundle_and_both_networks_know_the_digits() -> None:
    environment = {key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    done = subprocess.run(
        ["make", "quickstart", f"VENV={sys.prefix}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    accuracies = {who: float(value) for who, value in re.findall(r"(teacher|student) top-1\s+([\d.]+)%", done.stdout)}
    assert accuracies["teacher"] >= 97
    assert accuracies["student"] >= 97
    assert "checks hold" in done.stdout
    assert (ROOT / "dist" / "quickstart" / "manifest.json").is_file()
    for line in re.findall(r"(?:Next:|^)\s+kdexport (verify|inspect) (\S+)", done.stdout, flags=re.MULTILINE):
        assert Path(ROOT, line[1]).is_dir()
