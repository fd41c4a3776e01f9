"""Any two arms: targets of one bundle, targets of two, and what both bundles remember of the same images."""

import functools
import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from kdexport.backends.runnable import require_runnable
from kdexport.bundle.manifest import MANIFEST, MODEL, TASK
from kdexport.cli import app
from kdexport.errors import BackendUnavailableError, BundleError, ConfigError, MismatchError
from kdexport.gate import compare
from kdexport.gate.accuracy import accuracy_gates, stored_outputs
from kdexport.gate.arms import Artifact, Bundle, artifact, choose_target, open_bundle
from kdexport.gate.compare import GateRequest, Limits, run_gate
from kdexport.gate.sequential_test import run_trial
from kdexport.gate.timings import BenchRequest, run_bench
from kdexport.timing.session import Request
from tests.conftest import Built
from tests.kdexport.gate.drawn_sessions import machine
from tests.kdexport.optional_packages import require_openvino


def edited(bundle: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """The bundle with another manifest, whose hashes are those of its files."""
    data = json.loads((bundle / MANIFEST).read_text())
    change(data)
    for path in bundle.rglob("*"):
        if path.is_file() and path.name != MANIFEST:
            data["files"][str(path.relative_to(bundle))] = hashlib.sha256(path.read_bytes()).hexdigest()
    (bundle / MANIFEST).write_text(json.dumps(data))
    return bundle


@pytest.fixture
def two_targets(bundle_copy: Path) -> Path:
    """A bundle with openvino-fp32 beside onnx-fp32."""
    shutil.copytree(bundle_copy / "targets" / "onnx-fp32", bundle_copy / "targets" / "openvino-fp32")
    return edited(bundle_copy, lambda data: data["targets"].update({"openvino-fp32": data["targets"]["onnx-fp32"]}))


def gated(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> tuple[Any, list[Request]]:
    """What the command says where sessions are drawn, and the sessions that it asked for."""
    run, asked = machine(0.0, 0.002)
    monkeypatch.setattr(compare, "run_trial", functools.partial(run_trial, run=run))
    return CliRunner().invoke(app, ["gate", *map(str, arguments)]), asked


def test_two_targets_of_one_bundle_are_timed_each_in_its_runtime(two_targets: Path) -> None:
    require_openvino()
    request = BenchRequest(
        bundle=two_targets, arms=("openvino-fp32", "onnx-fp32"), clocks=("host",), batches=(1,), target=None, threads=1,
        sessions=2, seed=0,
    )  # fmt: skip
    data = run_bench(request, lambda _: None)
    (row,) = data["latency"]
    assert (data["target"], data["variant"], data["arms"]) == ("openvino-fp32", "fused", ["openvino-fp32", "onnx-fp32"])
    # One graph in two runtimes: neither a hundred times faster nor the same number.
    assert 0.01 < row["ratio"] < 100
    assert row["ratio"] != 1


def test_a_gate_compares_what_it_was_asked_to(
    two_targets: Path, built: Built, twin: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_openvino()
    one = two_targets / "targets" / "openvino-fp32" / MODEL
    other = two_targets / "targets" / "onnx-fp32" / MODEL
    done, asked = gated(monkeypatch, two_targets, "--target", "openvino-fp32", "--against", "onnx-fp32")
    assert done.exit_code == 0, done.output
    assert "Is openvino-fp32 slower than onnx-fp32?" in done.output
    sentinel, first = asked[:2]
    assert (sentinel.reference, sentinel.candidate) == (first.candidate, first.candidate)
    assert (first.candidate.path, first.candidate.target) == (str(one), "openvino-fp32")
    assert (first.reference.path, first.reference.target) == (str(other), "onnx-fp32")
    # Against another bundle, whose target is another one too.
    arguments = ("--target", "openvino-fp32", "--against", "onnx-fp32", "--baseline", built.bundle)
    done, asked = gated(monkeypatch, two_targets, *arguments)
    assert done.exit_code == 0, done.output
    assert asked[1].reference.path == str(built.bundle / "targets" / "onnx-fp32" / MODEL)
    assert asked[1].candidate == first.candidate
    # The unfused student runs where the fused one does.
    monkeypatch.setattr("kdexport.gate.arms._unfused_twin", lambda *_: next(twin.iterdir()))
    done, asked = gated(monkeypatch, two_targets, "--target", "openvino-fp32")
    assert done.exit_code == 0, done.output
    assert asked[1].reference.target == "openvino-fp32"


@pytest.mark.parametrize(
    ("target", "against", "error", "words"),
    [
        (None, "onnx-fp32", ConfigError, "Both arms are onnx-fp32"),
        ("trt-rtx-fp16", None, BackendUnavailableError, "it is an engine"),
        (None, "trt-rtx-fp16", BackendUnavailableError, "it is an engine"),
    ],
)
def test_arms_that_mean_nothing_are_refused(
    target: str | None, against: str | None, error: type[Exception], words: str, built: Built
) -> None:
    request = GateRequest(
        bundle=built.bundle, baseline=None, limits=Limits(slowdown=0.02), target=target, against=against
    )
    with pytest.raises(error, match=words):
        run_gate(request, lambda _: None)


@pytest.mark.parametrize("arms", [("fused", "fused"), ("fused", "onnx-fp32"), ("a", "b", "c")])
def test_a_bench_of_one_thing_against_itself_is_refused(arms: tuple[str, ...], built: Built) -> None:
    request = BenchRequest(
        bundle=built.bundle, arms=arms, clocks=("host",), batches=(1,), target=None, threads=1, sessions=2, seed=0
    )
    with pytest.raises(ConfigError, match="arms"):
        run_bench(request, lambda _: None)


def test_no_target_runs_as_something_else(two_targets: Path, tmp_path: Path) -> None:
    for target, clock, words in (
        ("onnx-fp16", "host", "computes a float16 graph in float32"),
        ("onnx-bf16", "host", "no bfloat16 convolution"),
        ("openvino-fp32", "serve", "runs the onnx-fp32"),
    ):
        with pytest.raises(BackendUnavailableError, match=words) as caught:
            require_runnable(target, clock)
        assert caught.value.exit_code == 4
    bundle = open_bundle(two_targets)
    assert choose_target(bundle, "openvino-fp32") == "openvino-fp32"
    (two_targets / "targets" / "openvino-fp32" / MODEL).unlink()
    with pytest.raises(BundleError, match=r"no model.onnx of openvino-fp32"):
        artifact(bundle, "openvino-fp32", "fused", tmp_path)
    with pytest.raises(ConfigError, match="No engine of the unfused student"):
        artifact(bundle, "trt-fp16", "unfused", tmp_path)


def test_numbers_of_another_target_are_no_baseline(two_targets: Path, tmp_path: Path) -> None:
    from kdexport.gate.stored_latencies import read_numbers
    from kdexport.timing.machine import this_machine

    bundle = open_bundle(two_targets)
    data = {
        "schema": "kdexport.bench/2", "student": "mobilenetv2", "classes": list(bundle.manifest.spec.classes),
        "machine": {}, "variant": "unfused", "target": "onnx-fp32", "latency": [],
    }  # fmt: skip
    (tmp_path / "n.json").write_text(json.dumps(data))
    with pytest.raises(MismatchError, match="numbers of unfused onnx-fp32, and fused onnx-fp32 is gated"):
        read_numbers(tmp_path / "n.json", bundle, "onnx-fp32", this_machine())


def pair(one: Path, other: Path) -> list[tuple[Artifact, Bundle]]:
    bundles = [open_bundle(folder) for folder in (one, other)]
    return [(artifact(bundle, "onnx-fp32", "fused", one), bundle) for bundle in bundles]


def flipped(bundle: Path, count: int) -> Path:
    """The bundle remembers ``count`` other answers of its model."""
    stored = load_file(bundle / TASK)
    stored["model.onnx:predictions"][:count] = (stored["model.onnx:predictions"][:count] + 1) % 10
    save_file(stored, bundle / TASK)
    return edited(bundle, lambda data: None)


def test_stored_outputs_of_the_same_images_are_taken(
    built: Built, bundle_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kdexport.gate.accuracy.predictions", lambda *_, **__: pytest.fail("a model was run"))
    arms = pair(built.bundle, flipped(bundle_copy, 7))
    for data in (None, "digits"):
        (flips,) = accuracy_gates(arms, (0.5, None), data, 1)
        assert (flips.images, flips.source, flips.bound.value) == (360, "stored outputs", 7 / 360)


def test_stored_outputs_are_those_that_the_models_give(built: Built) -> None:
    arms = pair(built.bundle, built.bundle)
    stored = stored_outputs(arms, None)
    assert stored is not None
    from kdexport.gate.accuracy import labelled_images, predictions

    images = labelled_images(arms[0][1], "digits")
    np.testing.assert_array_equal(stored.candidate, predictions(*arms[1], images, 1))
    np.testing.assert_array_equal(stored.labels, images.images.labels)
    unfused = [(replace(arms[0][0], variant="unfused"), arms[0][1]), arms[1]]
    against = stored_outputs(unfused, None)
    assert against is not None
    np.testing.assert_array_equal(against.reference, load_file(built.bundle / TASK)["predictions"])


@pytest.mark.parametrize(
    "change",
    [
        lambda task: task.update(data_sha256="0" * 64),
        lambda task: task.pop("data_sha256"),
        lambda task: task["files"].pop("model.onnx"),
    ],
)
def test_what_one_bundle_does_not_remember_is_run(
    change: Callable[[dict[str, Any]], None], built: Built, bundle_copy: Path
) -> None:
    arms = pair(built.bundle, edited(bundle_copy, lambda data: change(data["task"])))
    assert stored_outputs(arms, None) is None
    (flips,) = accuracy_gates(arms, (0.9, None), None, 1)
    assert (flips.images, flips.source, flips.bound.value) == (9, "golden images", 0)


def test_other_images_than_the_stored_ones_are_run(built: Built, bundle_copy: Path) -> None:
    arms = pair(built.bundle, bundle_copy)
    assert stored_outputs(arms, "0" * 64) is None
    # A part of the split is not the split that was asked for.
    part = edited(bundle_copy, lambda data: data["task"].update(data_images=361))
    fingerprint = open_bundle(part).manifest.data["task"]["data_sha256"]
    assert stored_outputs(pair(part, part), fingerprint) is None
    assert stored_outputs(pair(part, part), None) is not None


def test_outputs_of_a_cpu_say_nothing_about_a_gpu(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "kdexport.gate.accuracy.predictions", lambda *_, on_gpu: np.zeros(9, np.int64) if on_gpu else None
    )
    (flips,) = accuracy_gates(pair(built.bundle, built.bundle), (0.9, None), None, 1, on_gpu=True)
    assert (flips.source, flips.images) == ("golden images", 9)
