"""A candidate that is slow in some processes only."""

import math
from collections.abc import Callable

import numpy as np
import pytest

from kdexport.errors import ConfigError
from kdexport.gate.sequential_test import Plan, run_sequential_test
from kdexport.gate.slow_sessions import SlowLimits, SlowOutcome, count_slow_sessions, require_decidable
from kdexport.stats.rare_events import share_looks
from kdexport.timing.session import Request, Session
from tests.kdexport.gate.drawn_sessions import measurement, session

TENTH = SlowLimits(share=0.05, slowdown=0.1)


def sometimes(
    slowdown: float, share: float, *, reference: float = 0.0
) -> tuple[Callable[[Request], Session], list[Request]]:
    """A quiet machine on which ``share`` of the processes have a slow candidate, and ``reference`` a slow reference."""
    asked: list[Request] = []

    def run(request: Request) -> Session:
        asked.append(request)
        rng = np.random.default_rng([request.seed, 7])
        drawn = rng.random()
        slow = drawn < share if request.reference.path != request.candidate.path else False
        effect = math.log(slowdown) if slow else -math.log(slowdown) if drawn > 1 - reference else 0.0
        return session(effect + 0.003 * float(rng.standard_normal()), request.seed)

    return run, asked


def judged(
    slowdown: float, share: float, limits: SlowLimits, seed: int, reference: float = 0.0
) -> tuple[str, SlowOutcome]:
    plan = Plan(max_slowdown=0.02, seed=seed)
    run, _ = sometimes(slowdown, share, reference=reference)
    (outcome,) = run_sequential_test([measurement()], plan, run=run)
    return outcome.verdict, count_slow_sessions(outcome, plan, limits, run=run)


@pytest.mark.parametrize(("slowdown", "share", "limit"), [(1.5, 0.1, 0.05), (3.0, 0.1, 0.1), (3.0, 0.02, 0.02)])
def test_a_slow_state_that_the_mean_does_not_see_does_not_pass(slowdown: float, share: float, limit: float) -> None:
    found = [judged(slowdown, share, SlowLimits(share=limit, slowdown=0.1), seed) for seed in range(30)]
    # The check of the mean passes most of them: that is the reason for this check.
    assert sum(mean == "PASS" for mean, _ in found) > 5
    assert [slow.verdict for _, slow in found].count("PASS") <= 1


def test_a_candidate_without_a_slow_state_passes_after_the_sessions_that_prove_it() -> None:
    mean, slow = judged(1.5, 0.0, TENTH, 3)
    assert (mean, slow.verdict, slow.slow, len(slow.log_ratios)) == ("PASS", "PASS", 0, share_looks(0.05)[1])
    assert slow.reason == (
        "the candidate is slower than 1.100x in 0 of 112 sessions: bounds 0.00% to 4.03% of processes "
        "(up to 5.00% allowed)"
    )


def test_sessions_of_the_mean_count_and_the_others_are_short_and_have_their_own_seeds() -> None:
    plan = Plan(max_slowdown=0.02, seed=1, tails=True)
    run, asked = sometimes(1.5, 0.0)
    (outcome,) = run_sequential_test([measurement()], plan, run=run)
    before = len(asked)
    count_slow_sessions(outcome, plan, SlowLimits(share=0.3, slowdown=0.1), run=run)
    more = asked[before:]
    assert len(more) == share_looks(0.3)[1] - 6
    assert {(request.pairs, request.tails, request.max_drift, request.anchor) for request in more} == {
        (10, False, None, "")
    }
    assert len({request.seed for request in asked}) == len(asked)


def test_a_frequent_slow_state_fails_early() -> None:
    # A third of the processes: the mean is undecided, because its deviation is that of the slow state.
    mean, slow = judged(1.5, 0.33, TENTH, 3)
    assert mean == "INCONCLUSIVE"
    assert slow.verdict == "FAIL"
    assert len(slow.log_ratios) in share_looks(0.05)[:2]


def test_a_machine_that_slows_either_arm_does_not_fail_the_candidate() -> None:
    found = [judged(1.5, 0.15, TENTH, seed, reference=0.15)[1] for seed in range(8)]
    assert {slow.verdict for slow in found} == {"INCONCLUSIVE"}
    assert any(
        "the reference is slower by as much in" in slow.reason and "the machine may be the cause" in slow.reason
        for slow in found
    )


def test_a_candidate_that_failed_or_throttled_is_not_measured_again() -> None:
    plan = Plan(max_slowdown=0.02, seed=1)

    def slower(request: Request) -> Session:
        itself = request.reference.path == request.candidate.path
        return session(0.0 if itself else 0.5 + 1e-4 * (request.seed % 3))

    (failed,) = run_sequential_test([measurement()], plan, run=slower)
    assert failed.verdict == "FAIL"

    def refused(request: Request) -> Session:
        raise AssertionError(request)

    slow = count_slow_sessions(failed, plan, TENTH, run=refused)
    assert (slow.verdict, slow.log_ratios) == ("INCONCLUSIVE", ())
    assert "slower in the mean" in slow.reason
    calm, _ = sometimes(1.5, 0.0)
    (outcome,) = run_sequential_test([measurement()], plan, run=calm)
    slow = count_slow_sessions(outcome, plan, TENTH, run=lambda r: session(0.0, dropped=5))
    assert (slow.verdict, len(slow.log_ratios)) == ("INCONCLUSIVE", 6)
    assert "throttled" in slow.reason


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        (
            SlowLimits(share=0.001, slowdown=0.1),
            r"--max-slow-sessions 0.100% needs up to 9,7\d\d sessions .* \(up to 1,000 allowed\)",
        ),
        (SlowLimits(share=1.0, slowdown=0.1), "must be below 100%"),
        (SlowLimits(share=0.1, slowdown=0.01), "--slow-session is 1.0% and --max-slowdown 2.0%"),
    ],
)
def test_limits_that_cannot_be_decided_are_refused_before_anything_is_timed(limits: SlowLimits, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        require_decidable(limits, 0.02)
    assert caught.value.exit_code == 2
    if "1,000" in words:
        assert caught.value.remedy == "Pass --max-slow-sessions 1.0% or more."
    require_decidable(SlowLimits(share=0.01, slowdown=0.02), 0.02)
