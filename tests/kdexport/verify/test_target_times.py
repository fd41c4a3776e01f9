import math
from pathlib import Path
from typing import Any

import pytest

from kdexport.errors import VerificationError
from kdexport.timing.session import Request, Session
from kdexport.verify import target_times
from kdexport.verify.latency import LatencyResult
from kdexport.verify.target_times import TimingRequest, time_targets

COMPARED = LatencyResult(
    clock="host", batch=2, threads=1, sessions=6, ratio=0.5, low=0.4, high=0.6, reference_ms=4.0, candidate_ms=2.0,
    max_slowdown=0.02, mde=0.01, verdict="not slower",
)  # fmt: skip
TARGETS = ("onnx-fp32", "onnx-int8", "openvino-fp32", "trt-rtx-fp16")


def timed(
    monkeypatch: pytest.MonkeyPatch, budget: int, executed: tuple[str, ...] = TARGETS[:3], broken: str = ""
) -> tuple[dict[str, Any], list[Request]]:
    """The result, and the sessions that were run: 1, 2, 3 ms for int8 and ten times that for OpenVINO."""
    ran: list[Request] = []

    def session(request: Request) -> Session:
        if request.candidate.target == broken:
            raise VerificationError("It crashed.\nAt length.", remedy="Again.")
        ran.append(request)
        ms = (1 + request.seed) * (10 if request.candidate.target == "openvino-fp32" else 1)
        return Session(log_ratio=math.log(ms / 2), reference_ms=2, candidate_ms=ms)

    monkeypatch.setattr(target_times, "run_session", session)
    request = TimingRequest(
        folder=Path("bundle"), targets=TARGETS, executed=executed, compared=COMPARED, image_size=32, pairs=11,
        budget=budget,
    )  # fmt: skip
    return time_targets(request, lambda _: None), ran


def test_each_target_that_ran_has_the_median_of_its_sessions(monkeypatch: pytest.MonkeyPatch) -> None:
    found, ran = timed(monkeypatch, budget=20)
    assert found["targets"]["onnx-fp32"] == {"clock": "host", "ms": 2.0, "sessions": 6, "ratio": 1.0}
    assert found["targets"]["onnx-int8"]["ms"] == 2.0
    assert found["targets"]["openvino-fp32"]["ms"] == 20.0
    # The mean of the logarithms of 1/2, 2/2 and 3/2.
    assert found["targets"]["onnx-int8"]["ratio"] == pytest.approx((0.5 * 1 * 1.5) ** (1 / 3))
    assert [request.candidate.path for request in ran[::3]] == [
        "bundle/targets/onnx-int8/model.onnx", "bundle/targets/openvino-fp32/model.onnx",
    ]  # fmt: skip
    assert {request.reference.path for request in ran} == {"bundle/model.onnx"}
    assert {(request.batch, request.threads, request.pairs, request.image_size) for request in ran} == {(2, 1, 11, 32)}
    assert [request.seed for request in ran] == [0, 1, 2, 0, 1, 2]
    assert found["not_timed"] == {"trt-rtx-fp16": "it did not run on this machine"}


@pytest.mark.parametrize(("budget", "sessions"), [(20, 3), (12, 3), (11, 2), (8, 1), (6, 1), (3, 1)])
def test_all_targets_together_take_what_the_comparison_left(
    budget: int, sessions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, ran = timed(monkeypatch, budget)
    assert len(ran) == 2 * sessions
    assert found["targets"]["onnx-int8"]["sessions"] == sessions


def test_a_target_whose_session_fails_has_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    found, ran = timed(monkeypatch, budget=20, broken="onnx-int8")
    assert found["not_timed"]["onnx-int8"] == "It crashed."
    assert "onnx-int8" not in found["targets"]
    assert len(ran) == 3


def test_a_target_that_ran_and_that_no_clock_can_time_has_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    found, _ = timed(monkeypatch, budget=20, executed=TARGETS)
    assert found["not_timed"]["trt-rtx-fp16"].startswith("The clock host cannot time trt-rtx-fp16: ")
