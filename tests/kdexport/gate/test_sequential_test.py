import math

import pytest

from kdexport.gate.sequential_test import Plan, run_sequential_test
from kdexport.stats.sequential import minimum_detectable_effect
from kdexport.timing.session import Request, Session
from tests.kdexport.gate.drawn_sessions import machine, measurement, session

PLAN = Plan(max_slowdown=0.02, seed=3)


@pytest.mark.parametrize(
    ("effect", "verdict", "words"),
    [
        (0.0, "PASS", "not slower: at most 1.00"),
        (-0.3, "PASS", "faster"),
        (0.1, "FAIL", "slower: at least 1.10"),
        (math.log(1.02), "INCONCLUSIVE", "contains the limit 1.020 after 20 sessions"),
    ],
)
def test_a_quiet_machine_decides(effect: float, verdict: str, words: str) -> None:
    run, asked = machine(effect, 0.002)
    (outcome,) = run_sequential_test([measurement()], PLAN, run=run)
    assert outcome.verdict == verdict
    assert words in outcome.reason
    sessions = 20 if verdict == "INCONCLUSIVE" else 6
    assert len(outcome.sessions) == sessions
    assert len(asked) == sessions + 1
    assert outcome.interval is not None
    assert outcome.mde == pytest.approx(minimum_detectable_effect(outcome.interval.deviation))


def test_the_candidate_is_timed_against_itself_first() -> None:
    run, asked = machine(0.0, 0.002)
    run_sequential_test([measurement()], PLAN, run=run)
    assert (asked[0].reference.path, asked[0].candidate.path) == ("new.onnx", "new.onnx")
    assert {(request.reference.path, request.candidate.path) for request in asked[1:]} == {("old.onnx", "new.onnx")}


@pytest.mark.parametrize(
    ("effect", "verdict", "words"),
    [
        (
            0.0,
            "INCONCLUSIVE",
            "the machine is too noisy: the candidate differs from itself by 5.1% (up to 2.0% allowed)",
        ),
        # 1.02 x 1.051 = 1.072: what is further away than the machine's own error is a verdict all the same.
        (math.log(1.06), "INCONCLUSIVE", "too noisy"),
        (math.log(1.09), "FAIL", "slower: at least 1.08"),
        (math.log(0.9), "PASS", "faster"),
    ],
)
def test_a_machine_that_measures_equal_arms_as_different_decides_only_beyond_that_difference(
    effect: float, verdict: str, words: str
) -> None:
    calm, asked = machine(effect, 0.001)

    def run(request: Request) -> Session:
        found = calm(request)
        return session(0.05) if request.reference.path == request.candidate.path else found

    (outcome,) = run_sequential_test([measurement()], PLAN, run=run)
    assert outcome.verdict == verdict
    assert words in outcome.reason
    # Five sentinels and one look: more sessions would not make the machine better.
    assert len(asked) == 5 + 6
    assert len({request.seed for request in asked}) == 11


def test_a_number_of_a_bad_sentinel_does_not_keep_others_from_their_verdicts() -> None:
    unclear, asked = machine(math.log(1.02), 0.005)

    def run(request: Request) -> Session:
        itself = request.reference.path == request.candidate.path
        return session(0.05) if itself and request.batch == 8 else unclear(request)

    outcomes = run_sequential_test([measurement(batch=1), measurement(batch=8)], PLAN, run=run)
    assert [len(outcome.sessions) for outcome in outcomes] == [20, 6]
    assert ["too noisy" in outcome.reason for outcome in outcomes] == [False, True]
    assert asked


@pytest.mark.parametrize("sentinels", [(0.01,), (0.05, 0.01, -0.01), (0.05, 0.04, 0.01, -0.01, 0.0)])
def test_a_minority_of_bad_sentinels_is_tolerated(sentinels: tuple[float, ...]) -> None:
    ratios = iter([*sentinels, *[0.0, 0.001] * 3])
    (outcome,) = run_sequential_test([measurement()], PLAN, run=lambda request: session(next(ratios)))
    assert outcome.verdict == "PASS"
    assert outcome.sentinels == sentinels


def test_a_noisy_machine_is_inconclusive_and_reports_its_resolution() -> None:
    run, _ = machine(0.0, 0.06)
    (outcome,) = run_sequential_test([measurement()], Plan(max_slowdown=0.02, seed=3, sentinel=False), run=run)
    assert outcome.verdict == "INCONCLUSIVE"
    assert outcome.mde is not None
    assert f"this machine can enforce {math.expm1(outcome.mde):.1%} or more, not 2.0%" in outcome.reason


def test_one_slow_batch_size_fails_and_ends_the_gate() -> None:
    def run(request: Request) -> Session:
        itself = request.reference.path == request.candidate.path
        ratio = 0.1 if request.batch == 8 and not itself else 0.001 * (request.seed % 3)
        return session(ratio + 1e-4 * (request.seed % 5))

    outcomes = run_sequential_test([measurement(batch=1), measurement(batch=8)], PLAN, run=run)
    assert [outcome.verdict for outcome in outcomes] == ["PASS", "FAIL"]
    assert [len(outcome.sessions) for outcome in outcomes] == [6, 6]


def test_a_number_that_passed_is_not_timed_again_while_another_is_undecided() -> None:
    calm, _ = machine(0.0, 0.001)
    unclear, _ = machine(math.log(1.02), 0.005)
    outcomes = run_sequential_test(
        [measurement(batch=1), measurement(batch=8)], PLAN, run=lambda r: calm(r) if r.batch == 1 else unclear(r)
    )
    assert [outcome.verdict for outcome in outcomes] == ["PASS", "INCONCLUSIVE"]
    assert [len(outcome.sessions) for outcome in outcomes] == [6, 20]


def test_throttled_sessions_end_without_a_verdict() -> None:
    run, _ = machine(0.2, 0.001, dropped=3)
    (outcome,) = run_sequential_test([measurement()], PLAN, run=run)
    assert (outcome.verdict, outcome.interval) == ("INCONCLUSIVE", None)
    assert "throttled" in outcome.reason
    run, _ = machine(0.2, 0.001, dropped=2)
    assert run_sequential_test([measurement()], PLAN, run=run)[0].verdict == "FAIL"


def test_every_session_has_its_own_seed_and_the_requested_settings() -> None:
    run, asked = machine(math.log(1.02), 0.002)
    plan = Plan(max_slowdown=0.04, threads=1, pairs=17, seed=5, tails=True, slowdown=0.1)
    run_sequential_test([measurement("serve", 4)], plan, run=run)
    assert len({request.seed for request in asked}) == len(asked)
    assert {(r.clock, r.batch, r.threads, r.pairs, r.image_size) for r in asked} == {("serve", 4, 1, 17, 32)}
    assert {len(r.cpus) for r in asked} == {1}
    assert [r.max_drift for r in asked] == pytest.approx([math.log(1.04) / 2] * len(asked))
    # The server is given folders; a known slowdown is never part of the sentinel.
    assert (asked[0].candidate.path, asked[0].candidate.slowdown, asked[0].tails) == ("new", 0.0, False)
    assert (asked[1].reference.path, asked[1].candidate.slowdown, asked[1].tails) == ("old", 0.1, True)
    again, repeated = machine(math.log(1.02), 0.002)
    run_sequential_test([measurement("serve", 4)], plan, run=again)
    assert repeated == asked


@pytest.mark.parametrize(("cycles", "verdict"), [(None, "FAIL"), (0.004, "FAIL"), (-0.001, "INCONCLUSIVE")])
def test_a_slowdown_in_time_but_not_in_cycles_is_attributed_to_the_clock(cycles: float | None, verdict: str) -> None:
    def run(request: Request) -> Session:
        itself = request.reference.path == request.candidate.path
        noise = 1e-4 * (request.seed % 7)
        return session(0.0 if itself else 0.009 + noise, request.seed, cycles_log_ratio=0.0 if itself else cycles)

    (outcome,) = run_sequential_test([measurement()], Plan(max_slowdown=0.005, seed=3), run=run)
    assert outcome.verdict == verdict
    assert ("not in clock cycles" in outcome.reason) is (verdict == "INCONCLUSIVE")
