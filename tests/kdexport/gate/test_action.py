"""The composite action's shell steps, run as the runner runs them."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer.main

from kdexport.cli import app
from tests.conftest import Built

yaml = pytest.importorskip("yaml")
ROOT = Path(__file__).parents[3]
QUICK = Path(__file__).with_name("short_gates.py")
ACTION: dict[str, Any] = yaml.safe_load((ROOT / "action.yml").read_text())
CI = (ROOT / "docs" / "ci.md").read_text()


def gate_options() -> set[str]:
    command = typer.main.get_command(app).commands["gate"]  # type: ignore[attr-defined]
    return {option for parameter in command.params for option in parameter.opts}


class Runner:
    """Evaluates expressions, sets the environment, and runs each step with the shell that GitHub uses for `bash`."""

    def __init__(self, folder: Path, inputs: dict[str, str]) -> None:
        self.folder = folder
        defaults = {name: str(given.get("default", "")) for name, given in ACTION["inputs"].items()}
        assert set(inputs) <= set(defaults)
        self.inputs = {**defaults, **inputs}
        commands = folder / "bin"
        commands.mkdir()
        (commands / "kdexport").write_text(f'#!/bin/sh\nexec "{sys.executable}" "{QUICK}" "$@"\n')
        (commands / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
        for command in commands.iterdir():
            command.chmod(0o755)
        self.summary, self.output = folder / "summary.md", folder / "output.txt"

    def evaluated(self, text: str) -> str:
        names = {f"inputs.{name}": value for name, value in self.inputs.items()} | {"github.action_path": str(ROOT)}
        return re.sub(r"\$\{\{ ([\w.-]+) \}\}", lambda match: names[match[1]], text)

    def run(self) -> subprocess.CompletedProcess[str]:
        for step in ACTION["runs"]["steps"]:
            assert step["shell"] == "bash"
            script = self.folder / "step.sh"
            script.write_text(step["run"])
            environment = {
                **os.environ, "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT),
                "GITHUB_STEP_SUMMARY": str(self.summary), "GITHUB_OUTPUT": str(self.output),
                **{name: self.evaluated(value) for name, value in step["env"].items()},
            }  # fmt: skip
            command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", str(script)]
            done = subprocess.run(
                command, cwd=self.folder, env=environment, capture_output=True, text=True, check=False, timeout=300
            )
            if done.returncode != 0:
                break
        return done


def test_the_action_gates_a_real_bundle(built: Built, tmp_path: Path) -> None:
    # A name with a space and shell characters is one argument, whatever it holds.
    baseline = tmp_path / "base $(touch owned) line"
    baseline.symlink_to(built.bundle)
    runner = Runner(
        tmp_path,
        {"bundle": str(built.bundle), "baseline": str(baseline), "max-slowdown": "60%", "max-flips": "60%"},
    )
    done = runner.run()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "verdict=PASS" in runner.output.read_text()
    assert "PASS" in runner.summary.read_text().splitlines()[0]
    assert {path.name for path in (tmp_path / "gate-reports").iterdir()} == {"gate.json", "gate.xml", "gate.md"}
    assert not (tmp_path / "owned").exists()


def test_the_action_fails_where_the_gate_does(built: Built, tmp_path: Path) -> None:
    runner = Runner(tmp_path, {"bundle": str(built.bundle), "baseline": str(tmp_path / "nowhere")})
    done = runner.run()
    assert done.returncode == 2
    assert "nowhere is not a bundle" in done.stderr
    assert runner.output.read_text() == "verdict=\n"
    assert not runner.summary.exists()


def test_inputs_reach_the_shell_through_the_environment_only() -> None:
    for step in ACTION["runs"]["steps"]:
        assert "${{" not in step["run"]
        for name in re.findall(r"\$\{\{ inputs\.([\w-]+) \}\}", str(step["env"])):
            assert name in ACTION["inputs"]
    used = {name for step in ACTION["runs"]["steps"] for name in re.findall(r"inputs\.([\w-]+)", str(step["env"]))}
    assert used == set(ACTION["inputs"])


def test_options_of_the_action_and_of_the_page_exist() -> None:
    (gate,) = [step for step in ACTION["runs"]["steps"] if step.get("id") == "gate"]
    assert set(re.findall(r"--[a-z][\w-]+", gate["run"])) <= gate_options()
    github, gitlab = (yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", CI, flags=re.DOTALL))
    (step,) = [step for step in github if "kdexport@" in step.get("uses", "")]
    assert set(step["with"]) <= set(ACTION["inputs"])
    (line,) = [line for line in gitlab["gate"]["script"] if line.startswith("kdexport gate")]
    assert set(re.findall(r"--[a-z][\w-]+", line)) <= gate_options()
    assert gitlab["gate"]["artifacts"]["reports"]["junit"] in line
