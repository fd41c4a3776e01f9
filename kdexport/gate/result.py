"""The result of a gate: its checks, their overall verdict, the exit code, and the JSON object."""

import itertools
import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from kdexport.gate.accuracy import AccuracyResult
from kdexport.gate.sequential_test import Outcome, Plan
from kdexport.gate.slow_sessions import SlowOutcome
from kdexport.stats.proportions import (
    TAIL_CONFIDENCE,
    estimate_proportion,
    quantile_bounds,
    trials_needed,
    upper_bound,
)
from kdexport.timing.machine import Machine

SCHEMA = "kdexport.gate/1"
CheckVerdict = Literal["PASS", "FAIL", "INCONCLUSIVE", "WARN"]
Policy = Literal["exit", "warn", "fail"]
_EXIT: dict[CheckVerdict, int] = {"PASS": 0, "WARN": 0, "FAIL": 1, "INCONCLUSIVE": 3}
_TAIL = 0.99


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One line of a gate's report."""

    name: str
    verdict: CheckVerdict
    measured: str
    allowed: str
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class GateResult:
    """A finished gate. ``policy`` sets the exit code of an undecided gate: 3, 0 with a warning, or 1."""

    question: str
    candidate: str
    reference: str
    plan: Plan
    outcomes: tuple[Outcome, ...]
    checks: tuple[Check, ...]
    machine: Machine
    seconds: float
    slow: tuple[SlowOutcome, ...] = ()
    policy: Policy = "exit"
    calibration: str = "not calibrated"

    @property
    def verdict(self) -> CheckVerdict:
        """The worst verdict of all checks."""
        found = {check.verdict for check in self.checks}
        worst_first: tuple[CheckVerdict, ...] = ("FAIL", "INCONCLUSIVE", "WARN")
        return next((verdict for verdict in worst_first if verdict in found), "PASS")

    @property
    def exit_code(self) -> int:
        """0 pass, 1 fail, 3 inconclusive; the policy may turn the last into 0 or 1."""
        if self.verdict == "INCONCLUSIVE" and self.policy != "exit":
            return 0 if self.policy == "warn" else 1
        return _EXIT[self.verdict]

    def to_json(self) -> dict[str, Any]:
        """One JSON object; numbers that are not finite become null."""
        return {
            "schema": SCHEMA,
            "verdict": self.verdict,
            "question": self.question,
            "candidate": self.candidate,
            "reference": self.reference,
            "checks": [asdict(check) for check in self.checks],
            "latency": [
                {**latency_json(outcome, self.plan), "slow_sessions": slow and slow_json(slow)}
                for outcome, slow in itertools.zip_longest(self.outcomes, self.slow)
            ],
            "machine": asdict(self.machine),
            "calibration": self.calibration,
            "on_inconclusive": self.policy,
            "seconds": round(self.seconds, 2),
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Exclusion:
    """What the sessions of a gate exclude about single processes, whatever the mean is.

    ``slow`` of ``sessions`` had a candidate slower than ``ratio``. At ``confidence``, for this number of sessions, the
    share of processes with such a candidate is at most ``share``: 54 % if none of 6 sessions had one.
    """

    ratio: float
    sessions: int
    slow: int
    share: float
    confidence: float

    def __str__(self) -> str:
        return (
            f"{self.slow} of {self.sessions} sessions were slower than {self.ratio:.3f}x, which excludes at "
            f"{self.confidence:.0%} confidence that more than {self.share:.1%} of processes are"
        )


def exclusion(outcome: Outcome, plan: Plan) -> Exclusion | None:
    """The exclusion of one latency ratio; None if nothing was measured."""
    if outcome.interval is None:
        return None
    sessions = len(outcome.sessions)
    slow = sum(session.log_ratio > plan.limit for session in outcome.sessions)
    share = upper_bound(slow, sessions, TAIL_CONFIDENCE)
    return Exclusion(ratio=1 + plan.max_slowdown, sessions=sessions, slow=slow, share=share, confidence=TAIL_CONFIDENCE)


def latency_check(outcome: Outcome, plan: Plan, *, counted: bool = False) -> Check:
    """The check of one latency ratio; ``counted`` if a check of the slow sessions follows."""
    interval = outcome.interval
    measured = "not measured"
    if interval is not None:
        measured = f"{math.exp(interval.mean):.3f}x, {math.exp(interval.low):.3f} to {math.exp(interval.high):.3f}"
    return Check(
        name=outcome.measurement.name,
        verdict=outcome.verdict,
        measured=measured,
        allowed=f"{1 + plan.max_slowdown:.3f}x",
        reason=outcome.reason + _excluded(outcome, plan, counted=counted),
    )


def _excluded(outcome: Outcome, plan: Plan, *, counted: bool) -> str:
    """What the sessions exclude and what they do not, as the end of a reason."""
    found = exclusion(outcome, plan)
    if found is None:
        return ""
    unseen = "" if counted else "; a rarer slow state is not seen here, --max-slow-sessions checks for one"
    return f"; {found}{unseen}"


def slow_check(outcome: Outcome, slow: SlowOutcome) -> Check:
    """The check of the share of slow sessions."""
    sessions = len(slow.log_ratios)
    return Check(
        name=f"slow sessions on {outcome.measurement.name}",
        verdict=slow.verdict,
        measured=f"{slow.slow} of {sessions}" if sessions else "not measured",
        allowed=f"{slow.limits.share:.2%} above {1 + slow.limits.slowdown:.3f}x",
        reason=slow.reason,
    )


def slow_json(slow: SlowOutcome) -> dict[str, Any]:
    """The check of the share of slow sessions, with the log ratio of every session."""
    return {
        "verdict": slow.verdict,
        "reason": slow.reason,
        "max_share": slow.limits.share,
        "slower_than": 1 + slow.limits.slowdown,
        "sessions": len(slow.log_ratios),
        "slow": slow.slow,
        "fast": slow.fast,
        "log_ratios": [round(ratio, 6) for ratio in slow.log_ratios],
    }


def accuracy_check(result: AccuracyResult) -> Check:
    """The check of one accuracy gate."""
    estimate = result.estimate
    return Check(
        name=f"{result.name}, {result.source}",
        verdict=result.verdict,
        measured=f"{estimate.value:.2%}, {estimate.low:.2%} to {estimate.high:.2%}",
        allowed=f"{result.limit:.2%}",
        reason=result.reason,
    )


def tail_check(outcome: Outcome, limit_ms: float) -> Check:
    """The check that the candidate's p99 is at most ``limit_ms``, by a binomial bound on the runs above it."""
    name = f"p99 on {outcome.measurement.name}"
    times = tails_ms(outcome)
    if not times.size:
        return Check(
            name=name,
            verdict="INCONCLUSIVE",
            measured="not measured",
            allowed=f"{limit_ms:g} ms",
            reason="no run was measured",
        )
    above = int((times > limit_ms).sum())
    estimate = estimate_proportion(above, len(times), TAIL_CONFIDENCE)
    p99, low, high = quantile_bounds(times, _TAIL)
    upper = "unbounded" if high is None else f"{high:.3f}"
    reason = f"{above} of {len(times)} runs above {limit_ms:g} ms: bounds {estimate.low:.2%} to {estimate.high:.2%}"
    reason += " (up to 1 % allowed)"
    if len(times) < trials_needed(1 - _TAIL, TAIL_CONFIDENCE):
        reason += f"; a proof needs at least {trials_needed(1 - _TAIL, TAIL_CONFIDENCE)} runs"
    return Check(
        name=name,
        verdict=estimate.verdict(1 - _TAIL),
        measured=f"{p99:.3f} ms, {low:.3f} to {upper}",
        allowed=f"{limit_ms:g} ms",
        reason=reason,
    )


def tails_ms(outcome: Outcome) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Every run (N,) of the candidate that was not dropped, in milliseconds."""
    return np.asarray([value for session in outcome.sessions for value in session.tails_ms], np.float64)


def latency_json(outcome: Outcome, plan: Plan) -> dict[str, Any]:
    """One latency ratio with its measurements, including the paired ratios of each session."""
    interval, sessions = outcome.interval, outcome.sessions
    excluded = exclusion(outcome, plan)
    times = tails_ms(outcome)
    p99 = quantile_bounds(times, _TAIL) if times.size else (None, None, None)
    return {
        "clock": outcome.measurement.clock,
        "batch": outcome.measurement.batch,
        "threads": plan.threads,
        "verdict": outcome.verdict,
        "reason": outcome.reason,
        "max_slowdown": plan.max_slowdown,
        "ratio": math.exp(interval.mean) if interval is not None else None,
        "low": math.exp(interval.low) if interval is not None else None,
        "high": math.exp(interval.high) if interval is not None else None,
        "session_deviation": interval.deviation if interval is not None else None,
        "mde": None if outcome.mde is None else math.expm1(outcome.mde),
        "widening": plan.widening,
        "excludes": None if excluded is None else asdict(excluded),
        "reference_ms": _median([session.reference_ms for session in sessions]),
        "candidate_ms": _median([session.candidate_ms for session in sessions]),
        "p99_ms": {"estimate": p99[0], "low": p99[1], "high": p99[2], "runs": int(times.size)},
        "sentinels": list(outcome.sentinels),
        "sessions": [
            {
                "log_ratio": session.log_ratio if math.isfinite(session.log_ratio) else None,
                "reference_ms": session.reference_ms if math.isfinite(session.reference_ms) else None,
                "candidate_ms": session.candidate_ms if math.isfinite(session.candidate_ms) else None,
                "seed": session.seed,
                "cpus": list(session.cpus),
                "load": list(session.load),
                "created_first": session.created_first,
                "dropped_pairs": session.dropped,
                "extended": session.extended,
                "runs_per_block": session.runs,
                "ratios": [round(b / a, 5) for a, b in session.pairs_ms],
                "gpu": session.gpu,
                "anchored": session.anchored,
                "cycles_log_ratio": session.cycles_log_ratio,
            }
            for session in sessions
        ],
    }


def _median(values: list[float]) -> float | None:
    finite = [value for value in values if math.isfinite(value)]
    return float(np.median(finite)) if finite else None
