import itertools
import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from kdexport.errors import VerificationError
from kdexport.verify import latency
from kdexport.verify.latency import Comparison, LatencyResult, Session, compare_latency, judge, measure_session
from tests.kdexport.exported import SIZE, exported, exported_unfused, small_graph, small_weights

COMPARISON = Comparison(reference="a.onnx", candidate="b.onnx", image_size=32, batch=3, threads=2, pairs=40)


def sessions(ratios: Any, reference_ms: float = 2.0) -> list[Session]:
    return [
        Session(log_ratio=float(r), reference_ms=reference_ms, candidate_ms=reference_ms * math.exp(r)) for r in ratios
    ]


def compare(ratios: NDArray[np.float64], monkeypatch: pytest.MonkeyPatch, max_sessions: int = 20) -> LatencyResult:
    """The whole sequential comparison over sessions that were drawn beforehand."""
    prepared = sessions(ratios)
    monkeypatch.setattr(latency, "_run_session", lambda comparison, seed: prepared[seed])
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
    shares = verdicts(0.0, noise, 0.02, 500, monkeypatch)
    assert shares["slower"] == 0
    assert shares["not slower"] > 0.8


@pytest.mark.parametrize("noise", ["normal", "t3"])
def test_a_slowdown_of_exactly_the_limit_is_misjudged_rarely_in_either_direction(
    noise: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares = verdicts(math.log(1.02), noise, 0.02, 1000, monkeypatch)
    assert shares["slower"] <= 0.02
    assert shares["not slower"] <= 0.02
    # Three looks at 0.5 % each: an error that never occurs would mean that the test cannot say "slower".
    assert shares["slower"] + shares["not slower"] > 0


def test_a_slowdown_of_a_tenth_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    assert verdicts(math.log(1.1), "normal", 0.02, 400, monkeypatch)["slower"] >= 0.99


def test_a_slowdown_of_a_twentieth_is_mostly_found(monkeypatch: pytest.MonkeyPatch) -> None:
    assert verdicts(math.log(1.05), "normal", 0.02, 400, monkeypatch)["slower"] >= 0.95


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

    def run(comparison: Comparison, seed: int) -> Session:
        assert comparison is COMPARISON
        seeds.append(seed)
        return sessions([0.001 * (-1) ** seed])[0]

    monkeypatch.setattr(latency, "_run_session", run)
    compare_latency(COMPARISON, max_slowdown=0.02, max_sessions=20, progress=done.append)
    assert seeds == [0, 1, 2, 3, 4, 5]
    assert done == [1, 2, 3, 4, 5, 6]


class Clock:
    """A clock that only runs when an arm does, and the order of those runs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, drift: float = 0.0) -> None:
        self.now, self.order, self.drift = 0.0, "", drift
        monkeypatch.setattr(latency, "time", SimpleNamespace(perf_counter=lambda: self.now))

    def arm(self, name: str, seconds: float) -> Callable[[], None]:
        def run() -> None:
            self.order += name
            self.now += seconds * (1 + self.drift * len(self.order))

        return run


def test_pairs_alternate_at_random_and_the_seed_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    def order(seed: int) -> list[str]:
        clock = Clock(monkeypatch)
        measure_session(clock.arm("r", 1e-3), clock.arm("c", 1e-3), pairs=60, seed=seed)
        # One millisecond a run: ten runs fill a block, two blocks make a pair.
        tail = clock.order[-65 * 20 :]
        return [tail[start : start + 20] for start in range(0, len(tail), 20)]

    pairs = order(0)
    assert set(pairs) == {"r" * 10 + "c" * 10, "c" * 10 + "r" * 10}
    first = sum(pair.startswith("r") for pair in pairs)
    assert 15 < first < 50
    assert len(set(itertools.pairwise(pairs))) == 4
    assert order(0) == pairs
    assert order(1) != pairs


def test_a_session_measures_the_ratio_and_both_medians(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    session = measure_session(clock.arm("r", 2e-3), clock.arm("c", 3e-3), pairs=10, seed=3)
    assert session.log_ratio == pytest.approx(math.log(1.5))
    assert session.reference_ms == pytest.approx(2.0)
    assert session.candidate_ms == pytest.approx(3.0)


def test_drift_of_the_machine_hits_both_arms_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    # The machine becomes several times slower during the session: one arm after the other would differ by much.
    clock = Clock(monkeypatch, drift=1e-3)
    session = measure_session(clock.arm("r", 1e-3), clock.arm("c", 1e-3), pairs=100, seed=5)
    assert len(clock.order) > 2000
    assert abs(session.log_ratio) < 0.01


def test_the_first_pairs_and_single_slow_runs_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    reference, candidate = clock.arm("r", 1e-3), clock.arm("c", 1e-3)

    def hiccup() -> None:
        candidate()
        # Warming up takes 210 runs, a pair 20: five pairs that are dropped are slow, and three of the ten that count.
        if len(clock.order) <= 370 or len(clock.order) % 29 == 0:
            clock.now += 0.05

    assert measure_session(reference, hiccup, pairs=10, seed=2).log_ratio == pytest.approx(0.0, abs=1e-9)


def test_fast_functions_are_timed_in_long_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    measure_session(clock.arm("r", 2.0**-13), clock.arm("c", 2.0**-10), pairs=10, seed=0)
    # The faster arm needs 41 runs for 5 ms, and both get as many.
    tail = clock.order[-15 * 82 :]
    assert {tail[start : start + 41] for start in range(0, len(tail), 41)} == {"r" * 41, "c" * 41}


def test_a_slowdown_of_a_third_is_measured_on_real_work() -> None:
    def work(rounds: int) -> Callable[[], int]:
        return lambda: sum(range(rounds))

    session = measure_session(work(20_000), work(26_000), pairs=25, seed=1)
    assert 1.1 < math.exp(session.log_ratio) < 1.6
    assert 0 < session.reference_ms < session.candidate_ms


def test_a_session_in_a_process_of_its_own_measures_real_files() -> None:
    comparison = Comparison(
        reference=str(exported_unfused("R1")),
        candidate=str(exported("R1").path),
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


def test_a_session_that_dies_is_an_error_with_its_last_words(tmp_path: Path) -> None:
    good = small_graph(tmp_path / "good.onnx", small_weights())
    bad = tmp_path / "bad.onnx"
    bad.write_bytes(good.read_bytes()[:-30])
    comparison = replace(COMPARISON, reference=str(good), candidate=str(bad), image_size=16)
    with pytest.raises(VerificationError) as caught:
        compare_latency(comparison, max_slowdown=0.02, max_sessions=3)
    assert caught.value.message.startswith("A latency session died with exit code 1: ")
    assert "onnxruntime does not open bad.onnx" in caught.value.message
    assert caught.value.exit_code == 1


def test_a_session_that_hangs_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sleeper = tmp_path / "python"
    sleeper.write_text("#!/bin/sh\nexec sleep 30\n")
    sleeper.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(sleeper))
    monkeypatch.setattr(latency, "_SESSION_TIMEOUT_S", 0.3)
    with pytest.raises(VerificationError, match=r"did not end within 0\.3 s"):
        compare_latency(COMPARISON, max_slowdown=0.02, max_sessions=3)


def test_the_child_reads_exactly_what_a_comparison_holds(tmp_path: Path) -> None:
    path = str(small_graph(tmp_path / "same.onnx", small_weights()))
    comparison = replace(COMPARISON, reference=path, candidate=path, image_size=16, pairs=10)
    command = [sys.executable, "-m", "kdexport.verify.latency", json.dumps({**asdict(comparison), "seed": 5})]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    session = Session(**json.loads(done.stdout))
    # One file against itself.
    assert 0.5 < math.exp(session.log_ratio) < 2
