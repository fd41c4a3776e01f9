"""The sequential test of a gate: a sentinel, then sessions look by look until all are decided or one fails."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from kdexport.gate.arms import Artifact
from kdexport.stats import sequential as statistics
from kdexport.stats.sequential import MeanInterval, Verdict
from kdexport.timing.measure import MAX_DROPPED
from kdexport.timing.session import Arm, Request, Session, pinned_cpus, run_session

Runner = Callable[[Request], Session]

#: Total sessions of the candidate against itself: one, or three or five while their bias exceeds the limit.
_SENTINELS = (1, 3, 5)

#: Offset of the seeds of sentinels, so that no session has the same seed.
_SENTINEL_SEED = 1_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """Both arms on one clock at one batch size. If ``anchor`` is given, that network is timed beside them."""

    reference: Artifact
    candidate: Artifact
    clock: str
    batch: int
    image_size: int
    anchor: Path | None = None

    @property
    def name(self) -> str:
        """Its name in tables and reports."""
        return f"{self.clock}, batch {self.batch}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """How to measure. ``slowdown`` makes the candidate slower by a known fraction, to validate the gate itself.

    ``widening`` is that of a calibration, for consecutive sessions that are alike; 1 takes sessions to be independent.
    """

    max_slowdown: float
    threads: int = 1
    pairs: int = 40
    max_sessions: int = statistics.LOOKS[-1]
    seed: int = 0
    tails: bool = False
    sentinel: bool = True
    slowdown: float = 0.0
    widening: float = 1.0

    @property
    def limit(self) -> float:
        """The allowed log ratio."""
        return math.log1p(self.max_slowdown)


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """The result of one measurement. ``interval`` is None if fewer than two sessions are valid.

    ``sentinels`` are log ratios of the candidate against itself; ``margin`` is the absolute value of their median if it
    exceeds the limit, otherwise 0. ``mde`` is the log ratio above the limit that 20 sessions on this machine detect
    with 90 % power.
    """

    measurement: Measurement
    verdict: Verdict
    sessions: tuple[Session, ...]
    interval: MeanInterval | None
    sentinels: tuple[float, ...]
    margin: float
    mde: float | None
    reason: str


def run_sequential_test(
    measurements: Sequence[Measurement],
    plan: Plan,
    *,
    progress: Callable[[str], None] = lambda _: None,
    run: Runner = run_session,
) -> tuple[Outcome, ...]:
    """One outcome with a verdict for each measurement.

    If the bias of a sentinel exceeds the limit after five sessions, the machine is too noisy for a verdict near the
    limit: the test then looks once, and FAIL or PASS must be beyond the limit by more than that bias.
    """
    sentinels = [_sentinels(measurement, plan, progress, run) if plan.sentinel else () for measurement in measurements]
    margins = [_margin(found, plan) for found in sentinels]
    sessions: list[list[Session]] = [[] for _ in measurements]
    verdicts: list[Verdict] = ["INCONCLUSIVE"] * len(measurements)
    looks = statistics.looks_until(plan.max_sessions)
    for look in looks[:1] if all(margins) else looks:
        for measurement, found, verdict, margin in zip(measurements, sessions, verdicts, margins, strict=True):
            while verdict == "INCONCLUSIVE" and len(found) < (looks[0] if margin else look):
                progress(f"{measurement.name}, session {len(found) + 1} of up to {plan.max_sessions}")
                found.append(run(session_request(measurement, plan, len(found))))
        if any(throttled(session) for found in sessions for session in found):
            break
        samples = [[session.log_ratio for session in found] for found in sessions]
        decided = statistics.decide(samples, plan.limit, margins=margins, widening=plan.widening)
        verdicts = [_confirmed_in_cycles(verdict, found) for verdict, found in zip(decided, sessions, strict=True)]
        undecided = [v == "INCONCLUSIVE" and not margin for v, margin in zip(verdicts, margins, strict=True)]
        if "FAIL" in verdicts or not any(undecided):
            break
    return tuple(
        _outcome(measurement, verdict, tuple(found), sentinel, plan)
        for measurement, verdict, found, sentinel in zip(measurements, verdicts, sessions, sentinels, strict=True)
    )


def measure_all(measurement: Measurement, plan: Plan, count: int, progress: Callable[[str], None]) -> Outcome:
    """The outcome of ``count`` sessions of one measurement, without looks and without a verdict."""
    sessions = []
    for index in range(count):
        progress(f"{measurement.name}, session {index + 1} of {count}")
        sessions.append(run_session(session_request(measurement, plan, index)))
    return _outcome(measurement, "INCONCLUSIVE", tuple(sessions), (), plan)


def session_request(measurement: Measurement, plan: Plan, index: int, *, itself: bool = False) -> Request:
    """The request for session ``index`` of a measurement; ``itself`` times the candidate against itself."""
    candidate = Arm(path=measurement.candidate.path(measurement.clock), target=measurement.candidate.target)
    reference = Arm(path=measurement.reference.path(measurement.clock), target=measurement.reference.target)
    return Request(
        reference=candidate if itself else reference,
        candidate=candidate if itself else replace(candidate, slowdown=plan.slowdown),
        clock=measurement.clock,
        image_size=measurement.image_size,
        batch=measurement.batch,
        threads=plan.threads,
        cpus=pinned_cpus(plan.threads),
        pairs=plan.pairs,
        seed=plan.seed * 10_000_019 + index,
        max_drift=plan.limit / 2,
        tails=plan.tails and not itself,
        anchor="" if measurement.anchor is None or itself else str(measurement.anchor),
    )


def _sentinels(measurement: Measurement, plan: Plan, progress: Callable[[str], None], run: Runner) -> tuple[float, ...]:
    found: list[float] = []
    for count in _SENTINELS:
        while len(found) < count:
            progress(f"{measurement.name}, the candidate against itself")
            found.append(run(session_request(measurement, plan, _SENTINEL_SEED + len(found), itself=True)).log_ratio)
        if statistics.sentinel_bias(found) <= plan.limit:
            break
    return tuple(found)


def _margin(sentinels: tuple[float, ...], plan: Plan) -> float:
    """The bias of the sentinels if it exceeds the limit, otherwise 0."""
    bias = statistics.sentinel_bias(sentinels) if sentinels else 0.0
    return bias if bias > plan.limit else 0.0


def throttled(session: Session) -> bool:
    """Whether too many pairs of a session were dropped for it to count."""
    return session.dropped > MAX_DROPPED * (session.dropped + len(session.pairs_ms))


def _confirmed_in_cycles(verdict: Verdict, sessions: Sequence[Session]) -> Verdict:
    """``verdict``, but INCONCLUSIVE for a FAIL that clock cycles contradict: the device's clock caused it."""
    return "INCONCLUSIVE" if verdict == "FAIL" and _clock_differs(sessions) else verdict


def _clock_differs(sessions: Sequence[Session]) -> bool:
    """Whether the candidate is slower in time but not in clock cycles."""
    cycles = [session.cycles_log_ratio for session in sessions if session.cycles_log_ratio is not None]
    times = [session.log_ratio for session in sessions]
    return len(cycles) == len(times) > 0 and sum(times) > 0 >= sum(cycles)


def _outcome(
    measurement: Measurement, verdict: Verdict, sessions: tuple[Session, ...], sentinels: tuple[float, ...], plan: Plan
) -> Outcome:
    interval = mde = None
    if len(sessions) > 1 and not any(throttled(session) for session in sessions):
        interval = statistics.t_interval([session.log_ratio for session in sessions], widening=plan.widening)
        mde = statistics.minimum_detectable_effect(plan.widening * interval.deviation)
    margin = _margin(sentinels, plan)
    undecided = verdict == "INCONCLUSIVE"
    if undecided and margin > 0:
        reason = (
            f"the machine is too noisy: the candidate differs from itself by {math.expm1(margin):.1%} "
            f"(up to {plan.max_slowdown:.1%} allowed); use a quieter machine or a higher --max-slowdown"
        )
    elif undecided and interval is not None and _clock_differs(sessions):
        reason = (
            "slower in time but not in clock cycles: the clock of the device differed between the arms; "
            "lock it (nvidia-smi -lgc)"
        )
    else:
        reason = _reason(verdict, interval, mde, plan)
    return Outcome(
        measurement=measurement,
        verdict=verdict,
        sessions=sessions,
        interval=interval,
        sentinels=sentinels,
        margin=margin,
        mde=mde,
        reason=reason,
    )


def _reason(verdict: Verdict, interval: MeanInterval | None, mde: float | None, plan: Plan) -> str:
    if interval is None or mde is None:
        return f"more than {MAX_DROPPED:.0%} of the pairs of a session were dropped: the device throttled or changed"
    low, high, limit = math.exp(interval.low), math.exp(interval.high), 1 + plan.max_slowdown
    if verdict == "FAIL":
        return f"slower: at least {low:.3f}x (up to {limit:.3f}x allowed)"
    if verdict == "PASS":
        faster = "; faster" if high < 1 else ""
        return f"not slower: at most {high:.3f}x (up to {limit:.3f}x allowed){faster}"
    undecided = (
        f"the interval {low:.3f} to {high:.3f} contains the limit {limit:.3f} after {interval.sessions} sessions"
    )
    if mde <= plan.limit:
        return undecided
    return f"{undecided}; this machine can enforce {math.expm1(mde):.1%} or more, not {plan.max_slowdown:.1%}"
