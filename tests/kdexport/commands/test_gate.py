"""Gates as CI runs them: real bundles, real sessions, exit codes."""

import functools
import hashlib
import json
import math
import shutil
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from typer.testing import CliRunner

from kdexport.bundle.manifest import MANIFEST
from kdexport.gate import calibrate as calibrate_module
from kdexport.gate import compare
from kdexport.gate.calibrate import calibrate, read_calibration
from kdexport.gate.sequential_test import run_sequential_test
from tests.conftest import Built, Command
from tests.kdexport.gate.drawn_sessions import machine
from tests.kdexport.gate.edited_bundles import edited
from tests.kdexport.gate.short_gates import QUICK_PLAN

FILES = ("model.onnx", "targets/onnx-fp32/model.onnx")


@pytest.fixture(scope="module")
def slower(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same student behind a dozen convolutions that change nothing: identical labels, much more time."""
    folder = Path(shutil.copytree(built.bundle, tmp_path_factory.mktemp("slower") / "bundle"))
    data = json.loads((folder / MANIFEST).read_text())
    for name in FILES:
        model = onnx.load(str(folder / name))
        (given,) = (value.name for value in model.graph.input)
        kernel = np.zeros((3, 3, 5, 5), np.float32)
        kernel[range(3), range(3), 2, 2] = 1
        model.graph.initializer.append(numpy_helper.from_array(kernel, "nothing"))
        for node in model.graph.node:
            node.input[:] = ["delayed11" if value == given else value for value in node.input]
        delays = [
            helper.make_node("Conv", [f"delayed{i - 1}" if i else given, "nothing"], [f"delayed{i}"], pads=[2] * 4)
            for i in range(12)
        ]
        for node in reversed(delays):
            model.graph.node.insert(0, node)
        onnx.save(model, str(folder / name))
        data["files"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    (folder / MANIFEST).write_text(json.dumps(data))
    return folder


@pytest.fixture
def invoke(here: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Command:
    """``invoke("gate", ...)`` with short gates in this process; its sessions are processes of their own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compare, "Plan", QUICK_PLAN)
    return here


def test_a_gate_passes_and_writes_every_report(built: Built, invoke: Command, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    done = invoke(
        "gate", built.bundle, "--baseline", built.bundle, "--max-slowdown", "60%", "--max-flips", "50%",
        "--max-top1-drop", "90%", "--slo-p99", "2000", "--junit", tmp_path / "j.xml", "--markdown", tmp_path / "m.md",
        "--plot", tmp_path / "p.png", "--json",
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    data = done.data
    assert data["verdict"] == "PASS"
    assert [check["name"] for check in data["checks"]] == [
        "flips, stored outputs", "top-1 drop, stored outputs", "host, batch 1", "p99 on host, batch 1",
    ]  # fmt: skip
    (row,) = data["latency"]
    # One file against itself.
    assert 1 / 1.6 < row["ratio"] < 1.6
    assert row["low"] < row["ratio"] < row["high"] < 1.6
    assert row["p99_ms"]["runs"] >= 459
    assert len({session["seed"] for session in row["sessions"]}) == len(row["sessions"]) == 4
    assert ET.parse(tmp_path / "j.xml").getroot().get("tests") == "4"
    assert "PASS" in (tmp_path / "m.md").read_text().splitlines()[0]
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["j.xml", "m.md", "p.png"]


def test_a_slower_candidate_fails_with_exit_1(slower: Path, built: Built, invoke: Command) -> None:
    done = invoke("gate", slower, "--baseline", built.bundle, "--max-slowdown", "20%")
    assert done.exit_code == 1, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].startswith("Verdict: FAIL (exit 1). host, batch 1: slower: at least ")
    assert "Traceback" not in done.stderr


def test_numbers_of_bench_as_a_baseline_only_warn(
    built: Built, kdexport: Command, invoke: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kdexport.cli import app

    done = kdexport("bench", built.bundle, "--arms", "fused", "--sessions", "2", "--json", cwd=tmp_path)
    assert done.exit_code == 0, done.stderr
    data = done.data
    (row,) = data["latency"]
    assert len(row["sessions"]) == 2
    assert 0 < row["p99_ms"]["low"] <= row["p99_ms"]["estimate"]
    assert all(math.isfinite(session["anchored"]) for session in row["sessions"])
    # Ten sessions of a student that was a hundred times faster beside the same anchor.
    row["sessions"] = [{"anchored": math.log(0.02 + 1e-5 * index)} for index in range(10)]
    numbers = tmp_path / "numbers.json"
    # As `bench --json > numbers.json` writes it.
    numbers.write_text(json.dumps({**done.answer, "result": data}))
    monkeypatch.setattr(
        compare, "run_sequential_test", functools.partial(run_sequential_test, run=machine(0.0, 0.002)[0])
    )
    done_ = CliRunner().invoke(app, ["gate", str(built.bundle), "--baseline", str(numbers)])
    assert done_.exit_code == 0, done_.output
    assert "Verdict: WARN (exit 0). host, batch 1 against stored numbers: 9" in done_.output
    refused = invoke("gate", built.bundle, "--baseline", numbers, "--max-flips", "1%")
    assert (refused.exit_code, "need the files of the baseline" in refused.stderr) == (2, True)


def test_a_calibration_is_written_and_then_applied(
    built: Built, invoke: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kdexport.cli import app

    # A machine whose equal arms differ by 8 %.
    monkeypatch.setattr(calibrate_module, "calibrate", functools.partial(calibrate, run=machine(0.0, 0.08)[0]))
    done = CliRunner().invoke(app, ["calibrate-runner", "--out", str(tmp_path / "runner.toml"), "--gates", "2"])
    assert done.exit_code == 0, done.output
    assert "smallest slowdown that a gate can enforce" in done.output
    seen = read_calibration(tmp_path / "runner.toml")
    assert seen.model == "built-in network"
    assert 0.04 < seen.smallest_slowdown < 0.15
    refused = invoke("gate", built.bundle, "--baseline", built.bundle, "--json")
    assert refused.exit_code == 3
    error = refused.error
    assert error["code"] == "KDX350"
    assert f"at least {seen.smallest_slowdown:.1%} is needed" in error["message"]
    assert f"--max-slowdown {seen.smallest_slowdown:.1%}" in error["remedy"]
    other = tmp_path / "other.toml"
    other.write_text((tmp_path / "runner.toml").read_text().replace("cores = ", "cores = 9"))
    limits = compare.Limits(slowdown=0.02)
    request = compare.GateRequest(bundle=built.bundle, baseline=None, limits=limits, runner=other)
    text, widening = compare._resolution(request)
    assert "is for a different machine, clock or number of threads and was not used" in text
    assert widening == 1.0


@pytest.mark.parametrize(
    ("arguments", "exit_code", "words"),
    [
        (("--max-slowdown", "2"), 2, ["KDX100", "must be a percentage"]),
        (("--batch", "1,x"), 2, ["KDX100", "--batch"]),
        (("--clock", "sundial"), 2, ["KDX101", "host"]),
        (("--clock", "gpu"), 4, ["KDX400", "CUDA"]),
        (("--target", "trt-fp16"), 2, ["KDX101", "onnx-fp32"]),
        (("--target", "trt-rtx-fp16"), 4, ["KDX400", "engine"]),
        (("--threads", "4000"), 4, ["KDX403", "4000 threads"]),
        (("--batch", "4000"), 2, ["KDX100", "1 to 64"]),
        (("--baseline", "nowhere"), 2, ["KDX203", "nowhere"]),
        (("--runner", "nowhere.toml"), 2, ["KDX100", "nowhere.toml"]),
        (("--junit", "missing/j.xml"), 2, ["KDX202", "missing"]),
        (("--on-inconclusive", "maybe"), 2, ["KDX101", "warn"]),
        (("--max-flips", "1%", "--data", "nowhere"), 2, ["KDX201", "nowhere"]),
    ],
)
def test_bad_input_gets_a_code_and_a_sentence_before_any_timing(
    arguments: tuple[str, ...], exit_code: int, words: list[str], built: Built, tmp_path: Path, invoke: Command
) -> None:
    baseline = () if "--baseline" in arguments else ("--baseline", str(built.bundle))
    said = invoke("gate", built.bundle, *baseline, *arguments)
    assert said.exit_code == exit_code, said.stderr
    assert said.stdout == ""
    for word in words:
        assert word in said.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_changed_baseline_is_refused(built: Built, bundle_copy: Path, invoke: Command) -> None:
    with (bundle_copy / FILES[1]).open("ab") as stream:
        stream.write(b"\0")
    done = invoke("gate", built.bundle, "--baseline", bundle_copy, "--json")
    assert done.exit_code == 2
    error = done.error
    assert error["code"] == "KDX203"
    assert f"{FILES[1]} changed" in error["message"]


def test_a_candidate_of_other_weights_is_not_timed_whatever_its_bundle_remembers(
    built: Built, bundle_copy: Path, invoke: Command
) -> None:
    """Its digests are consistent, and the stored answers of its images are those of the baseline."""
    rng = np.random.default_rng(5)
    for name in FILES:
        model = onnx.load(str(bundle_copy / name))
        for tensor in model.graph.initializer:
            values = numpy_helper.to_array(tensor)
            if values.ndim > 1 and values.dtype == np.float32:
                noise = rng.normal(0, values.std(), values.shape).astype(np.float32)
                tensor.CopyFrom(numpy_helper.from_array(noise, tensor.name))
        onnx.save(model, str(bundle_copy / name))
    edited(bundle_copy, lambda _: None)
    done = invoke("gate", bundle_copy, "--baseline", built.bundle, "--max-flips", "50%", "--json")
    assert done.exit_code == 1
    assert "is not the network of its bundle: its logits of the golden images are off by" in done.error["message"]
    assert "Nothing was timed." in done.error["remedy"]
