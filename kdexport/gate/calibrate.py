"""What equal arms do on this machine: whole A/A gates, and what their sessions say about smaller limits."""

import datetime
import math
import os
import time
from collections.abc import Callable

import numpy as np

from kdexport.gate import statistics
from kdexport.gate.bounds import upper_share
from kdexport.gate.machine import Calibration, this_machine
from kdexport.gate.session import Request, Session
from kdexport.gate.sessions import run_session
from kdexport.gate.trial import Number, Outcome, Plan, run_trial

MIN_SESSIONS = 20
_RESAMPLED_GATES = 20_000


def calibrate(
    number: Number,
    plan: Plan,
    gates: int,
    *,
    progress: Callable[[str], None] = lambda _: None,
    run: Callable[[Request], Session] = run_session,
) -> Calibration:
    """Run ``gates`` A/A gates of ``number``, whose two arms are one artifact, and more until there are 20 sessions."""
    outcomes: list[Outcome] = []
    seconds: list[float] = []
    ratios: list[float] = []
    while len(outcomes) < gates or len(ratios) < MIN_SESSIONS:
        index = len(outcomes)
        started = time.monotonic()
        settings = Plan(max_slowdown=plan.max_slowdown, threads=plan.threads, pairs=plan.pairs, seed=plan.seed + index)
        label = f"gate {index + 1}"
        (outcome,) = run_trial([number], settings, progress=lambda text, at=label: progress(f"{at}: {text}"), run=run)  # type: ignore[misc]
        outcomes.append(outcome)
        seconds.append(time.monotonic() - started)
        # A sentinel is a session of equal arms like any other.
        ratios += [*outcome.sentinels, *(session.log_ratio for session in outcome.sessions)]
    return _summary(number, plan, outcomes, seconds, ratios)


def _summary(
    number: Number, plan: Plan, outcomes: list[Outcome], seconds: list[float], ratios: list[float]
) -> Calibration:
    deviation = float(np.std(ratios, ddof=1))
    verdicts = [outcome.verdict for outcome in outcomes]
    fails = verdicts.count("FAIL")
    return Calibration(
        machine=this_machine(),
        measured=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        model=number.candidate.label,
        clock=number.clock,
        batch=number.batch,
        threads=plan.threads,
        pairs=plan.pairs,
        max_slowdown=plan.max_slowdown,
        sessions=len(ratios),
        session_deviation=deviation,
        mde=statistics.minimum_detectable_effect(deviation),
        gates=len(outcomes),
        false_fails=fails,
        false_fail_high=upper_share(fails, len(outcomes), 0.95),
        inconclusive=verdicts.count("INCONCLUSIVE"),
        resampled_false_fails=resampled_false_fails(ratios, math.log1p(plan.max_slowdown)),
        median_gate_seconds=float(np.median(seconds)),
        load=os.getloadavg()[0],
    )


def resampled_false_fails(ratios: list[float], limit: float) -> float:
    """Share of false FAILs among gates drawn from the sessions (K,) of equal arms.

    Each is drawn with a random sign: which of two equal arms is called the candidate is a coin flip.
    """
    rng = np.random.default_rng(20240208)
    shape = (_RESAMPLED_GATES, statistics.LOOKS[-1])
    draws = rng.choice(np.asarray(ratios), shape) * rng.choice([-1.0, 1.0], shape)
    verdicts, _ = statistics.sequential(draws, limit)
    return float(np.mean(verdicts == "FAIL"))
