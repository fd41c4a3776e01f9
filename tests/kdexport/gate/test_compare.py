"""A gate between two targets of one bundle, and between targets of two bundles."""

import functools
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from kdexport.bundle.manifest import MODEL
from kdexport.cli import app
from kdexport.errors import BackendUnavailableError, ConfigError
from kdexport.gate import compare
from kdexport.gate.compare import GateRequest, Limits, run_gate
from kdexport.gate.sequential_test import run_sequential_test
from kdexport.gate.slow_sessions import count_slow_sessions
from kdexport.timing.session import Request
from tests.conftest import Built
from tests.kdexport.gate.drawn_sessions import machine
from tests.kdexport.optional_packages import require_openvino


def gated(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> tuple[Any, list[Request]]:
    """The result of the command with drawn sessions, and the sessions that it requested."""
    run, asked = machine(0.0, 0.002)
    monkeypatch.setattr(compare, "run_sequential_test", functools.partial(run_sequential_test, run=run))
    return CliRunner().invoke(app, ["gate", *map(str, arguments)]), asked


def test_a_gate_compares_the_requested_arms(
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
    # The unfused student runs in the same runtime as the fused one.
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
def test_equal_arms_and_engines_without_a_gpu_are_refused(
    target: str | None, against: str | None, error: type[Exception], words: str, built: Built
) -> None:
    request = GateRequest(
        bundle=built.bundle, baseline=None, limits=Limits(slowdown=0.02), target=target, against=against
    )
    with pytest.raises(error, match=words):
        run_gate(request, lambda _: None)


def test_slow_sessions_are_judged_if_they_are_requested(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = (built.bundle, "--baseline", built.bundle)
    run, asked = machine(0.0, 0.002)
    monkeypatch.setattr(compare, "count_slow_sessions", functools.partial(count_slow_sessions, run=run))
    done, _ = gated(monkeypatch, *arguments)
    assert done.exit_code == 0
    assert "at 99% confidence that more than 53.6% of processes are; a rarer slow state is not seen" in done.output
    assert not asked
    done, _ = gated(monkeypatch, *arguments, "--max-slow-sessions", "20%", "--batch", "1,2")
    assert done.exit_code == 0, done.output
    assert [request.batch for request in asked] == [1] * 20 + [2] * 20
    assert "slow sessions on host, batch 2" in done.output
    assert "a rarer slow state" not in done.output
    done, _ = gated(monkeypatch, *arguments, "--max-slow-sessions", "0.1%")
    assert isinstance(done.exception, ConfigError)
    assert "needs up to" in str(done.exception)
