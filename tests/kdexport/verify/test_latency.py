import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from kdexport.build.stages import UNFUSED_MODEL
from kdexport.errors import ForwardedError
from kdexport.timing.session import Arm, Request, Session
from kdexport.verify import latency
from kdexport.verify.latency import Comparison, LatencyResult, compare_latency, judge
from tests.conftest import Built
from tests.kdexport.exported_students import SIZE, small_graph, small_weights

COMPARISON = Comparison(reference="a.onnx", candidate="b.onnx", image_size=32, batch=3, threads=2, pairs=40)


def sessions(ratios: Any, reference_ms: float = 2.0) -> list[Session]:
    return [
        Session(log_ratio=float(r), reference_ms=reference_ms, candidate_ms=reference_ms * math.exp(r)) for r in ratios
    ]


def compare(ratios: NDArray[np.float64], monkeypatch: pytest.MonkeyPatch, max_sessions: int = 20) -> LatencyResult:
    """The whole sequential comparison over sessions that were drawn beforehand."""
    prepared = sessions(ratios)
    monkeypatch.setattr(latency, "run_session", lambda request: prepared[request.seed])
    return compare_latency(COMPARISON, max_slowdown=0.02, max_sessions=max_sessions)


def verdicts(effect: float, noise: str, sd: float, count: int, monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Shares of the verdicts over ``count`` replicates at a true log ratio of ``effect``."""
    rng = np.random.default_rng(20240208)
    shape = (count, 20)
    # Student's t with 3 degrees of freedom has a variance of 3.
    draws = rng.standard_normal(shape) if noise == "normal" else rng.standard_t(3, shape) / math.sqrt(3)
    found = [compare(effect + sd * row, monkeypatch).verdict for row in draws]
    return {name: found.count(name) / count for name in ("slower", "not slower", "inconclusive")}


@pytest.mark.parametrize("count", [2, 3, 6, 20])
def test_the_interval_is_the_t_interval_of_the_sessions(count: int) -> None:
    ratios = np.random.default_rng(count).normal(0.03, 0.02, count)
    result = judge(sessions(ratios), COMPARISON, 0.05)
    low, high = stats.t.interval(0.99, count - 1, loc=ratios.mean(), scale=stats.sem(ratios))
    assert math.log(result.low) == pytest.approx(low)
    assert math.log(result.high) == pytest.approx(high)
    assert math.log(result.ratio) == pytest.approx(ratios.mean())
    assert result.sessions == count
    assert (result.batch, result.threads, result.max_slowdown) == (3, 2, 0.05)


def test_the_smallest_slowdown_that_would_be_found_is_found_with_the_power_it_states() -> None:
    sd = 0.02
    ratios = np.asarray([-1, 1, -1, 1, 0, 0]) * sd * math.sqrt(5 / 4)
    mde = judge(sessions(ratios), COMPARISON, 0.02).mde
    # Power of a one-sided test at 0.5 % over 20 sessions, against an effect above the limit, by the noncentral t.
    centre = math.log1p(mde) / (sd / math.sqrt(20))
    power = stats.nct.sf(stats.t.ppf(0.995, 19), 19, centre)
    assert power == pytest.approx(0.9, abs=0.02)


@pytest.mark.parametrize(
    ("centre", "spread", "verdict"),
    [
        (0.10, 0.01, "slower"),
        (0.0, 0.01, "not slower"),
        (-0.4, 0.05, "not slower"),
        (0.0198, 0.01, "inconclusive"),
        (0.05, 0.2, "inconclusive"),
        (0.0, 0.2, "inconclusive"),
    ],
)
def test_the_three_verdicts(centre: float, spread: float, verdict: str) -> None:
    result = judge(sessions(centre + spread * np.asarray([-1, 1, -0.5, 0.5, 0.2, -0.2])), COMPARISON, 0.02)
    assert result.verdict == verdict
    assert {
        "slower": result.low > 1.02,
        "not slower": result.high < 1.02,
        "inconclusive": result.low <= 1.02 <= result.high,
    }[verdict]


def test_medians_are_of_the_sessions_and_an_outlier_does_not_move_them() -> None:
    given = sessions(np.zeros(5))
    given[2] = replace(given[2], reference_ms=900.0, candidate_ms=1e4)
    result = judge(given, COMPARISON, 0.02)
    assert (result.reference_ms, result.candidate_ms) == (2.0, 2.0)


def test_a_result_is_json_and_names_its_clock() -> None:
    data = judge(sessions([0.0, 0.01, -0.01]), COMPARISON, 0.02).to_json()
    assert json.loads(json.dumps(data, allow_nan=False)) == data
    assert data["clock"] == "host: onnxruntime session.run on the CPU"


@pytest.mark.parametrize("noise", ["normal", "t3"])
def test_equal_arms_are_never_called_slower(noise: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shares = verdicts(0.0, noise, 0.02, 150, monkeypatch)
    assert shares["slower"] == 0
    assert shares["not slower"] > 0.8


def test_a_slowdown_of_a_tenth_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    assert verdicts(math.log(1.1), "normal", 0.02, 150, monkeypatch)["slower"] >= 0.99


def test_a_slowdown_of_a_twentieth_is_mostly_found(monkeypatch: pytest.MonkeyPatch) -> None:
    assert verdicts(math.log(1.05), "normal", 0.02, 150, monkeypatch)["slower"] >= 0.95


def test_sessions_stop_at_the_first_clear_look(monkeypatch: pytest.MonkeyPatch) -> None:
    calm = np.tile([0.001, -0.001], 20)
    assert compare(calm, monkeypatch).sessions == 6
    unclear = np.tile([math.log(1.02) + 0.01, math.log(1.02) - 0.01], 20)
    assert compare(unclear, monkeypatch).sessions == 20
    # Six unclear sessions, then clear ones.
    late = np.concatenate([[0.025, -0.025] * 3, np.zeros(14)])
    assert compare(late, monkeypatch).sessions == 12
    assert compare(unclear, monkeypatch, 8).sessions == 8
    assert compare(calm, monkeypatch, 3).sessions == 3
    assert compare(unclear, monkeypatch, 30).sessions == 30


def test_every_session_has_a_seed_of_its_own_and_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []
    done: list[int] = []

    def run(request: Request) -> Session:
        assert (request.reference, request.candidate) == (Arm(path="a.onnx"), Arm(path="b.onnx"))
        assert (request.clock, request.batch, request.threads, request.pairs) == ("host", 3, 2, 40)
        seeds.append(request.seed)
        return sessions([0.001 * (-1) ** request.seed])[0]

    monkeypatch.setattr(latency, "run_session", run)
    compare_latency(COMPARISON, max_slowdown=0.02, max_sessions=20, progress=done.append)
    assert seeds == [0, 1, 2, 3, 4, 5]
    assert done == [1, 2, 3, 4, 5, 6]


def test_a_session_in_a_process_of_its_own_measures_real_files(built: Built) -> None:
    (exports,) = (built.workspace / "export").glob("[!.]*")
    comparison = Comparison(
        reference=str(exports / UNFUSED_MODEL),
        candidate=str(built.bundle / "model.onnx"),
        image_size=SIZE,
        batch=2,
        threads=1,
        pairs=10,
    )
    done: list[int] = []
    result = compare_latency(comparison, max_slowdown=0.5, max_sessions=2, progress=done.append)
    assert done == [1, 2]
    for value in (result.ratio, result.reference_ms, result.candidate_ms):
        assert math.isfinite(value)
        assert value > 0
    assert 0.2 < result.ratio < 5
    assert result.low <= result.ratio <= result.high


def test_a_file_that_does_not_open_is_its_own_error(tmp_path: Path) -> None:
    good = small_graph(tmp_path / "good.onnx", small_weights())
    bad = tmp_path / "bad.onnx"
    bad.write_bytes(good.read_bytes()[:-30])
    comparison = replace(COMPARISON, reference=str(good), candidate=str(bad), image_size=16)
    with pytest.raises(ForwardedError) as caught:
        compare_latency(comparison, max_slowdown=0.02, max_sessions=3)
    assert caught.value.message.startswith("In a latency session: onnxruntime cannot open bad.onnx")
    assert (caught.value.code, caught.value.exit_code) == ("KDX311", 1)
