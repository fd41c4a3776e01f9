"""What equal arms do on this machine: whole A/A gates, and what their sessions say about smaller limits."""

import datetime
import math
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kdexport.errors import ConfigError
from kdexport.gate import statistics
from kdexport.gate.artifacts import Artifact, artifact, open_bundle, require_batches
from kdexport.gate.bounds import upper_share
from kdexport.gate.machine import Calibration, require_cores, this_machine, write_calibration
from kdexport.gate.network import SIZE, write_network
from kdexport.gate.options import parse_clocks, require_writable_file
from kdexport.gate.runnable import DEFAULT_TARGET, require_runnable
from kdexport.gate.session import Request, Session
from kdexport.gate.sessions import run_session
from kdexport.gate.trial import Number, Outcome, Plan, run_trial

MIN_SESSIONS = 20
_RESAMPLED_GATES = 20_000


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibrationRequest:
    """What `kdexport calibrate-runner` was asked."""

    bundle: Path | None
    out: Path
    gates: int
    max_slowdown: float
    clock: str
    batch: int
    threads: int
    seed: int


def run_calibration(request: CalibrationRequest, progress: Callable[[str], None]) -> Calibration:
    """Run A/A gates on this machine and write what was seen."""
    require_cores(request.threads)
    require_writable_file(request.out)
    (clock,) = parse_clocks(request.clock) if "," not in request.clock else ("",)
    if not clock:
        raise ConfigError("A machine is calibrated for one clock at a time.", remedy="Pass --clock host, serve or gpu.")
    require_runnable(DEFAULT_TARGET, clock)
    plan = Plan(max_slowdown=request.max_slowdown, threads=request.threads, seed=request.seed)
    with tempfile.TemporaryDirectory(prefix="kdexport-gate-") as folder:
        if request.bundle is None:
            if clock == "serve":
                raise ConfigError(f"The clock {clock} needs a bundle.", remedy="Pass a bundle, or --clock host.")
            model = write_network(Path(folder) / "network.onnx")
            arm = Artifact(label="built-in network", model=model, folder=Path(folder), sha256="")
            size = SIZE
        else:
            bundle = open_bundle(request.bundle)
            require_batches(bundle, [request.batch])
            arm = artifact(bundle, DEFAULT_TARGET, "fused", Path(folder))
            size = bundle.image_size
        number = Number(reference=arm, candidate=arm, clock=clock, batch=request.batch, image_size=size)
        calibration = calibrate(number, plan, request.gates, progress=progress)
    write_calibration(calibration, request.out)
    return calibration


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
