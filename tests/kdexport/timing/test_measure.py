import itertools
import math
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest

from kdexport.stats.sequential import session_statistic
from kdexport.timing import measure as measure_module
from kdexport.timing.measure import Pairing, Reading, measure, must_drop, slowed


class Clock:
    """A clock that advances only while an arm runs, and the order of the runs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, drift: float = 0.0) -> None:
        self.now, self.order, self.drift = 0.0, "", drift
        monkeypatch.setattr(measure_module, "time", SimpleNamespace(perf_counter=lambda: self.now))

    def arm(self, name: str, seconds: float) -> Callable[[], None]:
        def run() -> None:
            self.order += name
            self.now += seconds * (1 + self.drift * len(self.order))

        return run


def test_pairs_alternate_at_random_and_the_seed_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    def order(seed: int) -> list[str]:
        clock = Clock(monkeypatch)
        measure(clock.arm("r", 1e-3), clock.arm("c", 1e-3), Pairing(pairs=60, seed=seed))
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
    measured = measure(clock.arm("r", 2e-3), clock.arm("c", 3e-3), Pairing(pairs=10, seed=3))
    assert session_statistic(measured.pairs_s) == pytest.approx(math.log(1.5))
    np.testing.assert_allclose(measured.pairs_s, [[2e-3, 3e-3]] * 10)


def test_drift_of_the_machine_affects_both_arms_equally(monkeypatch: pytest.MonkeyPatch) -> None:
    # The machine becomes several times slower during the session: one arm after the other would differ by much.
    clock = Clock(monkeypatch, drift=1e-3)
    measured = measure(clock.arm("r", 1e-3), clock.arm("c", 1e-3), Pairing(pairs=100, seed=5))
    assert len(clock.order) > 2000
    assert abs(session_statistic(measured.pairs_s)) < 0.01


def test_the_first_pairs_and_single_slow_runs_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    reference, candidate = clock.arm("r", 1e-3), clock.arm("c", 1e-3)

    def hiccup() -> None:
        candidate()
        # Warming up takes 210 runs, a pair 20: five pairs that are dropped are slow, and three of the ten that count.
        if len(clock.order) <= 370 or len(clock.order) % 29 == 0:
            clock.now += 0.05

    assert session_statistic(measure(reference, hiccup, Pairing(pairs=10, seed=2)).pairs_s) == pytest.approx(
        0, abs=1e-9
    )


def test_fast_functions_are_timed_in_long_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    measure(clock.arm("r", 2.0**-13), clock.arm("c", 2.0**-10), Pairing(pairs=10, seed=0))
    # The faster arm needs 41 runs for 5 ms, and both get as many.
    tail = clock.order[-15 * 82 :]
    assert {tail[start : start + 41] for start in range(0, len(tail), 41)} == {"r" * 41, "c" * 41}


def test_a_slowdown_of_a_third_is_measured_on_real_work() -> None:
    def work(rounds: int) -> Callable[[], int]:
        return lambda: sum(range(rounds))

    measured = measure(work(20_000), work(26_000), Pairing(pairs=25, seed=1))
    assert 1.1 < math.exp(session_statistic(measured.pairs_s)) < 1.6
    assert (measured.pairs_s > 0).all()


def test_every_run_of_the_candidate_is_kept_if_tails_are_requested(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    pairing = Pairing(pairs=10, seed=3, tails=True)
    measured = measure(clock.arm("r", 2e-3), clock.arm("c", 3e-3), pairing)
    assert measured.tails_s.shape == (2, 10 * measured.runs)
    np.testing.assert_allclose(measured.tails_s[0], 2e-3)
    np.testing.assert_allclose(measured.tails_s[1], 3e-3)
    assert measure(clock.arm("r", 2e-3), clock.arm("c", 3e-3), Pairing(pairs=10, seed=3)).tails_s.size == 0


def test_the_order_that_is_recorded_is_the_order_that_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    measured = measure(clock.arm("r", 1e-3), clock.arm("c", 1e-3), Pairing(pairs=30, seed=4))
    tail = clock.order[-30 * 20 :]
    assert [tail[start] == "c" for start in range(0, len(tail), 20)] == list(measured.candidate_first)


def test_a_session_discards_pairs_of_its_warm_up_and_continues(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    candidate = clock.arm("c", 1e-3)

    def warming() -> None:
        candidate()
        # 367 runs of warm-up, 100 in pairs that are dropped, 200 that count: slow during the first half of those.
        clock.now += 0.2e-3 if len(clock.order) < 567 else 0.0

    once = measure(clock.arm("r", 1e-3), warming, Pairing(pairs=10, seed=2, max_drift=0.01))
    assert once.extended
    assert session_statistic(once.pairs_s) == pytest.approx(0, abs=1e-9)
    assert len(once.pairs_s) == len(once.candidate_first) == 15
    steady = measure(clock.arm("r", 1e-3), clock.arm("c", 1.2e-3), Pairing(pairs=10, seed=2, max_drift=0.01))
    assert not steady.extended


@pytest.mark.parametrize("share", [0.05, 0.1, 0.5])
def test_an_injected_slowdown_has_the_stated_size(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)

    def perf_counter() -> float:
        # Waiting takes time too, or it would never end.
        clock.now += 1e-7
        return clock.now

    monkeypatch.setattr(measure_module, "time", SimpleNamespace(perf_counter=perf_counter))
    work = clock.arm("r", 1e-3)
    measured = measure(work, slowed(work, share), Pairing(pairs=10, seed=6))
    assert math.exp(session_statistic(measured.pairs_s)) == pytest.approx(1 + share, abs=2e-3)


@pytest.mark.parametrize(
    ("first", "second", "drops"),
    [
        (Reading(1980, False), Reading(1980, False), False),
        (Reading(1980, False), Reading(1965, False), False),
        (Reading(1980, False), Reading(1935, False), True),
        (Reading(1935, False), Reading(1980, False), True),
        (Reading(1980, True), Reading(1980, False), True),
        (Reading(1980, False), Reading(1980, True), True),
    ],
)
def test_a_pair_is_dropped_whole_where_the_device_changed(first: Reading, second: Reading, drops: bool) -> None:
    assert must_drop(first, second) is drops


def test_the_anchor_is_timed_once_after_each_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    arms = (clock.arm("r", 2e-3), clock.arm("c", 3e-3))
    measured = measure(*arms, Pairing(pairs=10, seed=3), anchor=clock.arm("a", 2.0**-10))
    np.testing.assert_allclose(measured.anchor_s, [2.0**-10] * 10)
    # Ten runs fill a block of the arms, and one of the anchor.
    tail = clock.order[-15 * 30 :]
    assert {tail[start : start + 30] for start in range(0, len(tail), 30)} == {
        "r" * 10 + "c" * 10 + "a" * 10,
        "c" * 10 + "r" * 10 + "a" * 10,
    }
    assert measure(*arms, Pairing(pairs=10, seed=3)).anchor_s.size == 0


def test_clocks_belong_to_the_arm_that_they_were_read_after(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    mhz = {"r": 1000.0, "c": 1008.0}

    def guard() -> Reading:
        return Reading(mhz[clock.order[-1]], False)

    measured = measure(clock.arm("r", 1e-3), clock.arm("c", 1e-3), Pairing(pairs=12, seed=3), guard)
    assert set(measured.candidate_first) == {True, False}
    np.testing.assert_allclose(measured.clocks_mhz, [[1000.0, 1008.0]] * 12)


def test_dropped_pairs_are_counted_and_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    readings = itertools.cycle([Reading(1000, False)] * 6 + [Reading(1000, True)] * 2)
    measured = measure(clock.arm("r", 1e-3), clock.arm("c", 1e-3), Pairing(pairs=39, seed=0), lambda: next(readings))
    # 44 pairs, the first five do not count; every fourth is throttled.
    assert (measured.dropped, len(measured.pairs_s), len(measured.candidate_first)) == (10, 29, 29)
