"""What a machine can enforce: measured, written to runner.toml, and read again."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kdexport.errors import ConfigError, ResolutionError
from kdexport.gate.calibrate import (
    MAX_WIDENING,
    MIN_SESSIONS,
    Calibration,
    calibrate,
    read_calibration,
    require_resolution,
    resampled_false_fails,
    write_calibration,
)
from kdexport.gate.sequential_test import Outcome, Plan, run_sequential_test
from kdexport.stats.sequential import minimum_detectable_effect
from kdexport.timing.machine import this_machine
from kdexport.timing.session import Request, Session
from tests.kdexport.gate.drawn_sessions import FUSED, machine, measurement, session

PLAN = Plan(max_slowdown=0.02, seed=2)
SAME = replace(measurement(), reference=FUSED)


@pytest.fixture(scope="module")
def calm() -> Calibration:
    return calibrate(SAME, PLAN, 4, run=machine(0.0, 0.004)[0])


def test_a_quiet_machine_is_calibrated_from_its_sessions(calm: Calibration) -> None:
    # Gates of one sentinel and six sessions: four were requested, and ten blocks of six sessions are needed.
    assert (calm.gates, calm.false_fails, calm.inconclusive) == (9, 0, 0)
    assert calm.sessions == 63 >= MIN_SESSIONS
    assert calm.session_deviation == pytest.approx(0.004, rel=0.3)
    assert abs(calm.lag_correlation) < 0.4
    assert 1 <= calm.widening < 2
    assert calm.mde == pytest.approx(minimum_detectable_effect(calm.widening * calm.session_deviation))
    # 0 of 9: the exact bound is 1 - 0.05^(1/9).
    assert calm.false_fail_high == pytest.approx(1 - 0.05 ** (1 / 9))
    assert calm.resampled_false_fails == 0
    assert calm.machine == this_machine()


def test_a_machine_without_a_verdict_is_measured_until_there_are_enough_sessions() -> None:
    found = calibrate(SAME, PLAN, 1, run=machine(0.0, 0.5)[0])
    assert found.sessions >= MIN_SESSIONS
    assert found.inconclusive == found.gates > 1
    assert found.mde > 0.3


def test_sessions_that_depend_on_those_before_widen_the_intervals_or_are_refused() -> None:
    drift = {"at": 0.0}

    def run(request: Request) -> Session:
        rng = np.random.default_rng([request.seed, 5])
        drift["at"] = 0.8 * drift["at"] + 0.6 * 0.02 * float(rng.standard_normal())
        return session(drift["at"], request.seed)

    found = calibrate(SAME, PLAN, 30, run=run)
    assert found.lag_correlation == pytest.approx(0.8, abs=0.2)
    assert found.widening > MAX_WIDENING
    with pytest.raises(ResolutionError) as caught:
        require_resolution(found, 0.5)
    assert caught.value.exit_code == 3
    assert "Consecutive sessions on this runner are alike" in caught.value.message
    assert "calibrate-runner" in caught.value.remedy
    # A weaker dependence lengthens: the intervals are wider, and more sessions are needed to decide.
    require_resolution(replace(found, widening=2.5), 0.5)
    deciding = [len(decided(widening).sessions) for widening in (1.0, 2.5)]
    assert deciding == [6, 20]


def decided(widening: float) -> Outcome:
    plan = Plan(max_slowdown=0.02, seed=2, sentinel=False, widening=widening)
    (outcome,) = run_sequential_test([SAME], plan, run=machine(0.0, 0.006)[0])
    assert outcome.verdict == "PASS"
    return outcome


def test_false_fails_drawn_from_sessions_depend_on_the_sessions() -> None:
    assert resampled_false_fails([0.001, -0.002, 0.003], math.log(1.02)) == 0
    # Far above the limit every time: the half of the gates that takes this arm for the candidate fails.
    assert resampled_false_fails([0.3, 0.31, 0.29], math.log(1.02)) == pytest.approx(0.5, abs=0.02)
    # A drift that turns round: no session is on the wrong side more often than not, but whole gates are.
    slow = [0.05 + 0.001 * (index % 3) for index in range(30)]
    drifting = [*slow, *(-ratio for ratio in slow)]
    assert resampled_false_fails(drifting, math.log(1.02)) > 0.2
    assert resampled_false_fails(drifting, math.log(1.02), widening=100.0) == 0


def test_runner_toml_is_read_back_equal_and_written_whole(calm: Calibration, tmp_path: Path) -> None:
    odd = replace(calm, model='a "quoted" \\ name\n\u00e9', machine=replace(calm.machine, cpu="CPU # 1 = fast"))
    write_calibration(odd, tmp_path / "runner.toml")
    assert read_calibration(tmp_path / "runner.toml") == odd
    assert [path.name for path in tmp_path.iterdir()] == ["runner.toml"]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("kdexport.runner/2", "kdexport.runner/1"),
        ("\nwidening = ", "\nwidening = 0.5 #"),
        ("\nwidening = ", "\nwidening = inf #"),
        ("\nlag_correlation = ", "\nlag_correlation = nan #"),
        ("\nmde = ", "\nmde = nan\nx_mde = "),
        ("\nmde = ", "\nmde = '2%'\n#"),
        ("\nmde = ", "\n#"),
        ("\nmde = ", "\nmde = -1.0 #"),
        ("[machine]", "[machin]"),
        ("schema = ", "schema = = "),
    ],
)
def test_a_foreign_or_damaged_runner_toml_is_refused(calm: Calibration, tmp_path: Path, old: str, new: str) -> None:
    path = tmp_path / "runner.toml"
    write_calibration(calm, path)
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(ConfigError):
        read_calibration(path)


def test_a_limit_below_the_resolution_of_the_machine_is_refused_with_that_resolution(calm: Calibration) -> None:
    noisy = replace(calm, session_deviation=0.03, mde=0.0286)
    with pytest.raises(ResolutionError) as caught:
        require_resolution(noisy, 0.02)
    assert caught.value.exit_code == 3
    assert caught.value.message == (
        "This runner cannot enforce 2.0%: equal arms differ by 3.00% between sessions, so at least 3.0% is needed."
    )
    # The value that the message suggests must be accepted.
    require_resolution(noisy, noisy.smallest_slowdown)
    assert noisy.smallest_slowdown == 0.03
    require_resolution(calm, 0.02)
