import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from kdexport.errors import ConfigError, MismatchError
from kdexport.gate.arms import Bundle, open_bundle
from kdexport.gate.sequential_test import Plan, run_sequential_test
from kdexport.gate.stored_latencies import prediction, read_latencies, stored_checks, write_anchor
from kdexport.timing.machine import this_machine
from tests.conftest import Built
from tests.kdexport.gate.drawn_sessions import FUSED, machine, measurement

PLAN = Plan(max_slowdown=0.02)


def numbers(built: Built, anchored: list[float], **changes: Any) -> dict[str, Any]:
    """Stored sessions whose candidate took ``anchored`` times the anchor, and milliseconds without a meaning."""
    manifest = json.loads((built.bundle / "manifest.json").read_text())
    row = {"clock": "host", "batch": 1, "threads": 1, "sessions": []}
    row["sessions"] = [{"candidate_ms": 7.7, "anchored": math.log(value)} for value in anchored]
    return {
        "schema": "kdexport.bench/2", "variant": "fused", "target": "onnx-fp32",
        "student": "mobilenetv2", "classes": manifest["student"]["classes"],
        "machine": asdict(this_machine()), "latency": [row], **changes,
    }  # fmt: skip


@pytest.fixture
def bundle(built: Built) -> Bundle:
    from kdexport.gate.arms import open_bundle

    return open_bundle(built.bundle)


def checks(
    path: Path,
    data: dict[str, Any],
    bundle: Bundle,
    deviation: float = 0.002,
    anchor: Path | None = Path("anchor.onnx"),
) -> list[Any]:
    path.write_text(json.dumps(data))
    run, _ = machine(0.0, deviation)
    outcomes = run_sequential_test([replace(measurement(), reference=FUSED, anchor=anchor)], PLAN, run=run)
    return stored_checks(read_latencies(path, bundle, "onnx-fp32", this_machine()), outcomes, PLAN)


def test_the_prediction_is_the_t_interval_of_one_more_observation() -> None:
    stored = np.random.default_rng(1).normal(0.3, 0.1, 12)
    low, ratio, high = prediction(list(stored), [0.7, 0.6, 3.7])
    centre = 0.7 - stored.mean()
    half = stats.t.ppf(0.995, 11) * stored.std(ddof=1) * math.sqrt(1 + 1 / 12)
    assert (low, ratio, high) == pytest.approx((math.exp(centre - half), math.exp(centre), math.exp(centre + half)))


@pytest.mark.parametrize(
    ("medians", "verdict"),
    # The candidate's sessions take twice as long as the anchor.
    [([2.0, 2.001] * 6, "PASS"), ([1.8, 1.81] * 6, "WARN"), ([1.5, 2.5] * 6, "WARN"), ([2.0] * 9, "WARN")],
)
def test_numbers_pass_or_warn_and_never_fail(
    medians: list[float], verdict: str, built: Built, bundle: Bundle, tmp_path: Path
) -> None:
    (check,) = checks(tmp_path / "n.json", numbers(built, medians), bundle)
    assert check.verdict == verdict
    if len(medians) < 10:
        assert "9 stored sessions for this clock, batch and threads (at least 10 required)" in check.reason


def test_numbers_without_an_anchor_are_not_compared(built: Built, bundle: Bundle, tmp_path: Path) -> None:
    data = numbers(built, [2.0, 2.001] * 6)
    (check,) = checks(tmp_path / "n.json", data, bundle, anchor=None)
    assert (check.verdict, check.measured) == ("WARN", "none")
    assert "cannot run the anchor" in check.reason
    for stored in data["latency"][0]["sessions"][:3]:
        stored["anchored"] = None
    (check,) = checks(tmp_path / "n.json", data, bundle)
    assert (check.verdict, check.measured) == ("WARN", "none")
    assert "9 stored sessions for this clock, batch and threads (at least 10 required)" in check.reason


def test_the_anchor_runs_where_the_clock_is(tmp_path: Path) -> None:
    import onnx

    for clock in ("host", "serve"):
        path = write_anchor(tmp_path, clock)
        assert path is not None
        onnx.checker.check_model(onnx.load(str(path)), full_check=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.cuda.is_available", lambda: False)
        assert write_anchor(tmp_path, "gpu") is None


def test_numbers_are_inconclusive_on_a_noisy_machine(built: Built, bundle: Bundle, tmp_path: Path) -> None:
    (check,) = checks(tmp_path / "n.json", numbers(built, [2.0, 2.001] * 6), bundle, deviation=0.5)
    assert check.verdict == "INCONCLUSIVE"
    assert "too noisy" in check.reason


def test_numbers_of_another_machine_or_student_are_refused(built: Built, bundle: Bundle, tmp_path: Path) -> None:
    elsewhere = {**asdict(this_machine()), "cpu": "another"}
    with pytest.raises(MismatchError, match=r"a different machine \(different cpu\)"):
        checks(tmp_path / "n.json", numbers(built, [2.0] * 12, machine=elsewhere), bundle)
    with pytest.raises(MismatchError, match="is for resnet18 with 10 classes"):
        checks(tmp_path / "n.json", numbers(built, [2.0] * 12, student="resnet18"), bundle)
    with pytest.raises(MismatchError):
        checks(tmp_path / "n.json", numbers(built, [2.0] * 12, classes=["a", "b"]), bundle)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": "kdexport.gate/1"}', "[" * 100_000, "\x00"])
def test_a_file_without_numbers_is_refused(text: str, bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "n.json").write_text(text)
    with pytest.raises(ConfigError, match="neither a bundle nor a result of"):
        read_latencies(tmp_path / "n.json", bundle, "onnx-fp32", this_machine())


def test_numbers_of_another_target_are_no_baseline(two_targets: Path, tmp_path: Path) -> None:
    from kdexport.gate.stored_latencies import read_latencies
    from kdexport.timing.machine import this_machine

    bundle = open_bundle(two_targets)
    data = {
        "schema": "kdexport.bench/2", "student": "mobilenetv2", "classes": list(bundle.manifest.spec.classes),
        "machine": {}, "variant": "unfused", "target": "onnx-fp32", "latency": [],
    }  # fmt: skip
    (tmp_path / "n.json").write_text(json.dumps(data))
    with pytest.raises(
        MismatchError, match="contains latencies of unfused onnx-fp32; latencies of fused onnx-fp32 are needed"
    ):
        read_latencies(tmp_path / "n.json", bundle, "onnx-fp32", this_machine())
