"""The share of sessions in which the candidate is much slower, for a slow state that only some processes get.

The test of the mean says nothing about a candidate that is three times slower in one process of fifty: the sessions
that decide it need not contain one. This check measures as many sessions as an exact test of the share needs.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from kdexport.errors import ConfigError
from kdexport.gate.sequential_test import Measurement, Outcome, Plan, Runner, session_request, throttled
from kdexport.stats.proportions import binomial_p_value, estimate_proportion
from kdexport.stats.rare_events import ERROR, decide_share, share_looks
from kdexport.stats.sequential import Verdict
from kdexport.timing.session import Request, run_session

#: A test may take this many sessions, each a process of one to two seconds.
MAX_SESSIONS = 1000

#: Pairs of a session that only this check needs: a slow session is far from the limit, so a quarter of the pairs do.
_PAIRS = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class SlowLimits:
    """At most ``share`` of the sessions may have a candidate that is slower by more than ``slowdown``, a fraction."""

    share: float
    slowdown: float


@dataclass(frozen=True, kw_only=True, slots=True)
class SlowOutcome:
    """How many of the sessions have a candidate that is slower than the limit, and how many such a reference.

    ``log_ratios`` are those of all sessions, in the order in which they ran.
    """

    verdict: Verdict
    limits: SlowLimits
    log_ratios: tuple[float, ...]
    slow: int
    fast: int
    reason: str


def require_decidable(limits: SlowLimits, max_slowdown: float) -> None:
    """Raise ``ConfigError`` for limits that no practical number of sessions can decide, or that contradict the gate."""
    if limits.slowdown < max_slowdown:
        raise ConfigError(
            f"--slow-session is {limits.slowdown:.1%} and --max-slowdown {max_slowdown:.1%}: a session within "
            "the allowed slowdown is not slow.",
            remedy=f"Pass --slow-session {max_slowdown:.1%} or more.",
        )
    if limits.share < 1 and share_looks(limits.share)[-1] > MAX_SESSIONS:
        smallest = next(tenths / 1000 for tenths in range(1, 1000) if share_looks(tenths / 1000)[-1] <= MAX_SESSIONS)
        raise ConfigError(
            f"--max-slow-sessions {limits.share:.3%} needs up to {share_looks(limits.share)[-1]:,} sessions in fresh "
            f"processes (up to {MAX_SESSIONS:,} allowed).",
            remedy=f"Pass --max-slow-sessions {smallest:.1%} or more.",
        )
    if limits.share >= 1:
        raise ConfigError(
            "--max-slow-sessions must be below 100%: all sessions may be slow otherwise.",
            remedy="For example: --max-slow-sessions 10%",
        )


def count_slow_sessions(
    outcome: Outcome,
    plan: Plan,
    limits: SlowLimits,
    *,
    family: int = 1,
    progress: Callable[[str], None] = lambda _: None,
    run: Runner = run_session,
) -> SlowOutcome:
    """Continue the sessions of ``outcome`` until an exact test of the share of slow ones is decided.

    ``family`` is the number of measurements that are judged. A candidate that is slower in the mean has failed already
    and is not measured again.
    """
    if outcome.verdict == "FAIL":
        return _undecided(limits, (), "not measured, because the candidate is slower in the mean")
    ratios = [session.log_ratio for session in outcome.sessions]
    if any(throttled(session) for session in outcome.sessions):
        return _undecided(limits, (), outcome.reason)
    looks = share_looks(limits.share)
    verdict: Verdict = "INCONCLUSIVE"
    used = 0
    for used in looks:
        while len(ratios) < used:
            progress(f"{outcome.measurement.name}, slow sessions, session {len(ratios) + 1} of up to {looks[-1]}")
            session = run(_short_request(outcome.measurement, plan, len(ratios)))
            if throttled(session):
                reason = "the pairs of a session were dropped: the device throttled or changed"
                return _undecided(limits, ratios, reason)
            ratios.append(session.log_ratio)
        slow, fast = _counts(ratios[:used], limits)
        verdict = decide_share(slow, used, limits.share, family=family)
        if verdict == "FAIL" and _is_noise(slow, fast):
            verdict = "INCONCLUSIVE"
        if verdict != "INCONCLUSIVE":
            break
    slow, fast = _counts(ratios[:used], limits)
    return SlowOutcome(
        verdict=verdict,
        limits=limits,
        log_ratios=tuple(ratios[:used]),
        slow=slow,
        fast=fast,
        reason=_reason(verdict, slow, fast, used, limits),
    )


def _short_request(measurement: Measurement, plan: Plan, index: int) -> Request:
    request = session_request(measurement, replace(plan, pairs=_PAIRS, tails=False), index)
    return replace(request, max_drift=None, anchor="")


def _counts(ratios: Sequence[float], limits: SlowLimits) -> tuple[int, int]:
    """How many sessions are slower than the limit, and in how many the reference is slower by as much."""
    limit = math.log1p(limits.slowdown)
    return sum(ratio > limit for ratio in ratios), sum(ratio < -limit for ratio in ratios)


def _is_noise(slow: int, fast: int) -> bool:
    """Whether the machine makes either arm slow: the sessions with a slow reference explain those with a slow one."""
    return fast > 0 and binomial_p_value(slow, slow + fast) > ERROR


def _undecided(limits: SlowLimits, ratios: Sequence[float], reason: str) -> SlowOutcome:
    slow, fast = _counts(ratios, limits)
    return SlowOutcome(
        verdict="INCONCLUSIVE", limits=limits, log_ratios=tuple(ratios), slow=slow, fast=fast, reason=reason
    )


def _reason(verdict: Verdict, slow: int, fast: int, sessions: int, limits: SlowLimits) -> str:
    bounds = estimate_proportion(slow, sessions, 1 - ERROR)
    text = (
        f"the candidate is slower than {1 + limits.slowdown:.3f}x in {slow} of {sessions} sessions: bounds "
        f"{bounds.low:.2%} to {bounds.high:.2%} of processes (up to {limits.share:.2%} allowed)"
    )
    if verdict == "INCONCLUSIVE" and _is_noise(slow, fast):
        text += f"; the reference is slower by as much in {fast} sessions, so the machine may be the cause"
    elif verdict == "INCONCLUSIVE":
        text += f"; {sessions} sessions, the most that this check takes, do not decide it"
    return text
