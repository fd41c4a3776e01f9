"""The composite action's shell steps, run as the runner runs them."""

import json
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


#: `gh api`, with the comments of a pull request in a file, and only the answer to the query that the action asks.
GH = """#!/usr/bin/env python3
import json, os, pathlib, re, sys
place = pathlib.Path(os.environ["COMMENTS"])
kept = json.loads(place.read_text())
words = sys.argv[2:]
if os.environ["GH_TOKEN"] != "a token":
    sys.exit(4)
if "--paginate" in words:
    assert words[words.index("--paginate") + 1] == "repos/them/net/issues/7/comments"
    (marker,) = re.findall('startswith\\("(.*)"\\)', words[words.index("--jq") + 1])
    print("\\n".join(str(number) for number, body in enumerate(kept) if body.startswith(marker)))
else:
    method, url = words[words.index("--method") + 1 :][:2]
    body = pathlib.Path(words[words.index("-F") + 1].removeprefix("body=@")).read_text()
    if method == "POST":
        assert url == "repos/them/net/issues/7/comments"
        kept.append(body)
    else:
        assert method == "PATCH"
        kept[int(url.removeprefix("repos/them/net/issues/comments/"))] = body
    place.write_text(json.dumps(kept))
"""


class Runner:
    """Evaluates expressions, sets the environment, and runs each step with the shell that GitHub uses for `bash`."""

    def __init__(self, folder: Path, inputs: dict[str, str], *, number: str = "7") -> None:
        self.folder, self.number = folder, number
        defaults = {name: str(given.get("default", "")) for name, given in ACTION["inputs"].items()}
        assert set(inputs) <= set(defaults)
        self.inputs = {**defaults, **inputs}
        commands = folder / "bin"
        commands.mkdir()
        (commands / "kdexport").write_text(f'#!/bin/sh\nexec "{sys.executable}" "{QUICK}" "$@"\n')
        (commands / "gh").write_text(GH)
        self.comments = folder / "comments.json"
        self.comments.write_text(json.dumps(["Looks good.", "<!-- kdexport gate other -->"]))
        (commands / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
        for command in commands.iterdir():
            command.chmod(0o755)
        self.summary, self.output = folder / "summary.md", folder / "output.txt"

    def evaluated(self, text: str) -> str:
        names = {f"inputs.{name}": value for name, value in self.inputs.items()} | {"github.action_path": str(ROOT)}
        names |= {"github.repository": "them/net", "github.event.pull_request.number": self.number}
        return re.sub(r"\$\{\{ ([\w.-]+) \}\}", lambda match: names[match[1]], text)

    def run_step(self, step: dict[str, Any]) -> subprocess.CompletedProcess[str]:
        script = self.folder / "step.sh"
        script.write_text(step["run"])
        environment = {
            **os.environ, "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT),
            "COMMENTS": str(self.comments), "GITHUB_STEP_SUMMARY": str(self.summary), "GITHUB_OUTPUT": str(self.output),
            **{name: self.evaluated(value) for name, value in step["env"].items()},
        }  # fmt: skip
        command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", str(script)]
        return subprocess.run(
            command, cwd=self.folder, env=environment, capture_output=True, text=True, check=False, timeout=300
        )

    def run(self) -> subprocess.CompletedProcess[str]:
        done = None
        for step in ACTION["runs"]["steps"]:
            assert step["shell"] == "bash"
            if done is not None and done.returncode != 0 and not step.get("if", "").startswith("always()"):
                continue
            ran = self.run_step(step)
            # The result of the action is that of its first step that failed.
            done = ran if done is None or done.returncode == 0 else done
        assert done is not None
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


COMMENTED = {"comment": "true", "github-token": "a token"}


def test_a_comment_is_written_once_and_then_updated(tmp_path: Path) -> None:
    """The gate itself fails here, so that both texts of a comment are seen without a measurement."""
    runner = Runner(tmp_path, {"bundle": 'no "bundle" $(touch owned)', "target": "onnx-int8", **COMMENTED})
    assert runner.run().returncode == 2
    first, other, mine = json.loads(runner.comments.read_text())
    marker = "<!-- kdexport gate no _bundle_ __touch owned_ onnx-int8 -->"
    assert (first, other) == ("Looks good.", "<!-- kdexport gate other -->")
    assert mine == f"{marker}\nkdexport gate compared nothing; the log of the job has the reason.\n"
    (tmp_path / "gate-reports" / "gate.md").write_text("# PASS\n")
    assert runner.run().returncode == 2
    assert json.loads(runner.comments.read_text()) == [first, other, f"{marker}\n# PASS\n"]
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    ("inputs", "number", "words"),
    [
        ({}, "7", ""),
        ({"comment": "true", "github-token": "a token"}, "", "this run is not of a pull request"),
        ({"comment": "true", "github-token": "of a fork"}, "7", "the comment could not be written"),
    ],
)
def test_without_permission_or_pull_request_there_is_no_comment_and_no_failure(
    inputs: dict[str, str], number: str, words: str, tmp_path: Path
) -> None:
    runner = Runner(tmp_path, {"bundle": "nowhere", **inputs}, number=number)
    (step,) = [step for step in ACTION["runs"]["steps"] if step["name"] == "Comment"]
    done = runner.run_step(step)
    assert done.returncode == 0, done.stderr
    assert words in done.stdout
    assert len(json.loads(runner.comments.read_text())) == 2


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
