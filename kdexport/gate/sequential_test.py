"""The gate's course: a sentinel, then sessions look by look until every number is decided or one fails."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from kdexport.gate.arms import Artifact
from kdexport.stats import sequential as statistics
from kdexport.stats.sequential import Interval, Verdict
from kdexport.timing.measure import MAX_DROPPED
from kdexport.timing.session import Arm, Request, Session, pinned_cpus, run_session

Runner = Callable[[Request], Session]
#: Sessions of the candidate against itself: one where it holds, else three, else five.
_SENTINELS = (1, 3, 5)
#: Seeds of sentinels lie beside those of sessions.
_SENTINEL_SEED = 1_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Number:
    """One gated number: both arms on one clock at one batch size; ``anchor`` is timed beside them where given."""

    reference: Artifact
    candidate: Artifact
    clock: str
    batch: int
    image_size: int
    anchor: Path | None = None

    @property
    def name(self) -> str:
        """As tables name it."""
        return f"{self.clock}, batch {self.batch}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """How numbers are measured. ``slowdown`` lengthens the candidate's runs by a known share, to validate the gate."""

    max_slowdown: float
    threads: int = 1
    pairs: int = 40
    max_sessions: int = statistics.LOOKS[-1]
    seed: int = 0
    tails: bool = False
    sentinel: bool = True
    slowdown: float = 0.0

    @property
    def limit(self) -> float:
        """The allowed log ratio."""
        return math.log1p(self.max_slowdown)


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What became of one number. ``interval`` is None where fewer than two sessions ran; ``reason`` says why not PASS.

    ``sentinels`` are log ratios of the candidate against itself, and ``margin`` is their median where it lies beyond
    the limit, else 0; ``mde`` is the log ratio above the limit that 20 sessions on this machine find with 90 % power.
    """

    number: Number
    verdict: Verdict
    sessions: tuple[Session, ...]
    interval: Interval | None
    sentinels: tuple[float, ...]
    margin: float
    mde: float | None
    reason: str


def run_trial(
    numbers: Sequence[Number],
    plan: Plan,
    *,
    progress: Callable[[str], None] = lambda _: None,
    run: Runner = run_session,
) -> tuple[Outcome, ...]:
    """Measure all numbers; every one has a verdict.

    Where a sentinel stays beyond the limit, the machine is too noisy for a verdict near it: there is one look, and only
    what lies beyond the limit by more than the sentinel's own error is called FAIL or PASS.
    """
    sentinels = [_sentinels(number, plan, progress, run) if plan.sentinel else () for number in numbers]
    margins = [_margin(found, plan) for found in sentinels]
    sessions: list[list[Session]] = [[] for _ in numbers]
    verdicts: list[Verdict] = ["INCONCLUSIVE"] * len(numbers)
    looks = statistics.looks_until(plan.max_sessions)
    for look in looks[:1] if all(margins) else looks:
        for number, found, verdict, margin in zip(numbers, sessions, verdicts, margins, strict=True):
            while verdict == "INCONCLUSIVE" and len(found) < (looks[0] if margin else look):
                progress(f"{number.name}, session {len(found) + 1} of up to {plan.max_sessions}")
                found.append(run(request(number, plan, len(found))))
        if any(_throttled(session) for found in sessions for session in found):
            break
        samples = [[session.log_ratio for session in found] for found in sessions]
        decided = statistics.decide(samples, plan.limit, margins=margins)
        verdicts = [_in_cycles_too(verdict, found) for verdict, found in zip(decided, sessions, strict=True)]
        open_ones = [v == "INCONCLUSIVE" and not margin for v, margin in zip(verdicts, margins, strict=True)]
        if "FAIL" in verdicts or not any(open_ones):
            break
    return tuple(
        _outcome(number, verdict, tuple(found), sentinel, plan)
        for number, verdict, found, sentinel in zip(numbers, verdicts, sessions, sentinels, strict=True)
    )


def request(number: Number, plan: Plan, index: int, *, itself: bool = False) -> Request:
    """The session ``index`` of a number; ``itself`` times the candidate against itself."""
    candidate = Arm(path=number.candidate.path(number.clock), target=number.candidate.target)
    reference = Arm(path=number.reference.path(number.clock), target=number.reference.target)
    return Request(
        reference=candidate if itself else reference,
        candidate=candidate if itself else replace(candidate, slowdown=plan.slowdown),
        clock=number.clock,
        image_size=number.image_size,
        batch=number.batch,
        threads=plan.threads,
        cpus=pinned_cpus(plan.threads),
        pairs=plan.pairs,
        seed=plan.seed * 10_000_019 + index,
        settle=plan.limit / 2,
        tails=plan.tails and not itself,
        anchor="" if number.anchor is None or itself else str(number.anchor),
    )


def _sentinels(number: Number, plan: Plan, progress: Callable[[str], None], run: Runner) -> tuple[float, ...]:
    found: list[float] = []
    for count in _SENTINELS:
        while len(found) < count:
            progress(f"{number.name}, the candidate against itself")
            found.append(run(request(number, plan, _SENTINEL_SEED + len(found), itself=True)).log_ratio)
        if statistics.sentinel_bias(found) <= plan.limit:
            break
    return tuple(found)


def _margin(sentinels: tuple[float, ...], plan: Plan) -> float:
    """By how much the sentinel missed: 0 where it held, else the bias that it saw."""
    bias = statistics.sentinel_bias(sentinels) if sentinels else 0.0
    return bias if bias > plan.limit else 0.0


def _in_cycles_too(verdict: Verdict, sessions: Sequence[Session]) -> Verdict:
    """A FAIL whose sign does not hold in clock cycles is the device's clock, not the candidate, and is none."""
    return "INCONCLUSIVE" if verdict == "FAIL" and _only_the_clock(sessions) else verdict


def _only_the_clock(sessions: Sequence[Session]) -> bool:
    cycles = [session.cycles_log_ratio for session in sessions if session.cycles_log_ratio is not None]
    times = [session.log_ratio for session in sessions]
    return len(cycles) == len(times) > 0 and sum(times) > 0 >= sum(cycles)


def _throttled(session: Session) -> bool:
    return session.dropped > MAX_DROPPED * (session.dropped + len(session.pairs_ms))


def _outcome(
    number: Number, verdict: Verdict, sessions: tuple[Session, ...], sentinels: tuple[float, ...], plan: Plan
) -> Outcome:
    interval = mde = None
    if len(sessions) > 1 and not any(_throttled(session) for session in sessions):
        interval = statistics.t_interval([session.log_ratio for session in sessions])
        mde = statistics.minimum_detectable_effect(interval.deviation)
    margin = _margin(sentinels, plan)
    noise = (
        f"the machine is too noisy: the candidate differs from itself by {math.expm1(margin):.1%} "
        f"(up to {plan.max_slowdown:.1%} allowed)"
    )
    undecided = verdict == "INCONCLUSIVE"
    if undecided and margin > 0:
        reason = noise
    elif undecided and interval is not None and _only_the_clock(sessions):
        reason = "slower in time, not in clock cycles: the device's clock differed between the arms; lock it"
    else:
        reason = _reason(verdict, interval, mde, plan)
    return Outcome(
        number=number,
        verdict=verdict,
        sessions=sessions,
        interval=interval,
        sentinels=sentinels,
        margin=margin,
        mde=mde,
        reason=reason,
    )


def _reason(verdict: Verdict, interval: Interval | None, mde: float | None, plan: Plan) -> str:
    if interval is None or mde is None:
        return "more than a fifth of a session's pairs were throttled or changed their clock"
    low, high, limit = math.exp(interval.low), math.exp(interval.high), 1 + plan.max_slowdown
    if verdict == "FAIL":
        return f"slower: at least {low:.3f}x (up to {limit:.3f}x allowed)"
    if verdict == "PASS":
        faster = "; faster" if high < 1 else ""
        return f"not slower: at most {high:.3f}x (up to {limit:.3f}x allowed){faster}"
    undecided = f"the interval {low:.3f} to {high:.3f} holds the limit {limit:.3f} after {interval.sessions} sessions"
    if mde <= plan.limit:
        return undecided
    return f"{undecided}; this runner cannot enforce {plan.max_slowdown:.1%}, it can enforce {math.expm1(mde):.1%}"


def measure_all(number: Number, plan: Plan, count: int, progress: Callable[[str], None]) -> Outcome:
    """``count`` sessions of one number, without looks and without a verdict."""
    sessions = []
    for index in range(count):
        progress(f"{number.name}, session {index + 1} of {count}")
        sessions.append(run_session(request(number, plan, index)))
    return _outcome(number, "INCONCLUSIVE", tuple(sessions), (), plan)
