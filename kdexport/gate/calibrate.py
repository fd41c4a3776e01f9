"""Calibration of a machine by A/A gates: its noise between sessions, and the smallest slowdown that it can enforce."""

import datetime
import functools
import json
import math
import os
import time
import tomllib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kdexport.core.files import require_writable_file, scratch_folder, write_text
from kdexport.errors import ConfigError, ResolutionError
from kdexport.gate.arms import Artifact, artifact, open_bundle, require_batches
from kdexport.gate.sequential_test import Measurement, Outcome, Plan, run_sequential_test
from kdexport.stats import dependence
from kdexport.stats import sequential as statistics
from kdexport.stats.proportions import upper_bound
from kdexport.targets import DEFAULT_TARGET
from kdexport.timing.anchor import SIZE, write_anchor_network
from kdexport.timing.clocks import parse_clocks, require_timeable
from kdexport.timing.machine import Machine, require_cores, this_machine
from kdexport.timing.session import Request, Session, run_session

SCHEMA = "kdexport.runner/2"

#: Ten blocks of six: with fewer, the upper bound on the dependence of sessions would be far above the estimate.
MIN_SESSIONS = 60

#: A larger widening is refused: sessions that are so much alike would need a gate of hundreds of them.
MAX_WIDENING = 3.0
_RESAMPLED_GATES = 20_000

#: Numbers that a gate computes with, and their ranges.
_RANGES = (
    ("mde", 0.0, 600.0),
    ("session_deviation", 0.0, 10.0),
    ("max_slowdown", 0.0, 10.0),
    ("lag_correlation", -1.0, 1.0),
    ("widening", 1.0, dependence.MOST),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """The result of ``gates`` A/A gates on one machine, and of the sessions of all of them together.

    ``session_deviation`` and ``mde`` are log ratios; a limit must not be below ``mde``. ``lag_correlation`` is the
    correlation of consecutive sessions, and ``widening`` how much wider than for independent sessions the intervals of
    a gate must be; ``mde`` includes it. ``false_fail_high`` is the exact 95 % upper bound of the proportion of false
    FAILs; ``resampled_false_fails`` is that proportion over gates simulated by resampling the measured sessions.
    """

    machine: Machine
    measured: str
    model: str
    clock: str
    batch: int
    threads: int
    pairs: int
    max_slowdown: float
    sessions: int
    session_deviation: float
    lag_correlation: float
    widening: float
    mde: float
    gates: int
    false_fails: int
    false_fail_high: float
    inconclusive: int
    resampled_false_fails: float
    median_gate_seconds: float
    load: float

    @property
    def smallest_slowdown(self) -> float:
        """The smallest --max-slowdown that this machine can enforce, rounded up to 0.1 %."""
        return math.ceil(math.expm1(self.mde) * 1000 - 1e-9) / 1000


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibrationRequest:
    """Arguments of `kdexport calibrate-runner`."""

    bundle: Path | None
    out: Path
    gates: int
    max_slowdown: float
    clock: str
    batch: int
    threads: int
    seed: int


def run_calibration(request: CalibrationRequest, progress: Callable[[str], None]) -> Calibration:
    """Run A/A gates on this machine and write the calibration to ``request.out``."""
    require_cores(request.threads)
    require_writable_file(request.out)
    (clock,) = parse_clocks(request.clock) if "," not in request.clock else ("",)
    if not clock:
        raise ConfigError(
            f"A calibration is for one clock; got {request.clock!r}.", remedy="Pass --clock host, serve or gpu."
        )
    require_timeable(DEFAULT_TARGET, clock)
    plan = Plan(max_slowdown=request.max_slowdown, threads=request.threads, seed=request.seed)
    with scratch_folder("gate") as folder:
        if request.bundle is None:
            if clock == "serve":
                raise ConfigError(
                    "The clock serve needs a bundle to serve, and none was given.",
                    remedy="Pass a bundle folder, or --clock host.",
                )
            model = write_anchor_network(folder / "network.onnx")
            arm = Artifact(label="built-in network", model=model, folder=folder, sha256="")
            size = SIZE
        else:
            bundle = open_bundle(request.bundle)
            require_batches(bundle, [request.batch])
            arm = artifact(bundle, DEFAULT_TARGET, "fused", folder)
            size = bundle.image_size
        measurement = Measurement(reference=arm, candidate=arm, clock=clock, batch=request.batch, image_size=size)
        calibration = calibrate(measurement, plan, request.gates, progress=progress)
    write_calibration(calibration, request.out)
    return calibration


def calibrate(
    measurement: Measurement,
    plan: Plan,
    gates: int,
    *,
    progress: Callable[[str], None] = lambda _: None,
    run: Callable[[Request], Session] = run_session,
) -> Calibration:
    """Run ``gates`` A/A gates of ``measurement``, whose arms are equal, and more until there are 60 sessions."""
    outcomes: list[Outcome] = []
    seconds: list[float] = []
    ratios: list[float] = []
    while len(outcomes) < gates or len(ratios) < MIN_SESSIONS:
        index = len(outcomes)
        started = time.monotonic()
        settings = Plan(max_slowdown=plan.max_slowdown, threads=plan.threads, pairs=plan.pairs, seed=plan.seed + index)
        labelled = functools.partial(_labelled, progress, f"A/A gate {index + 1}")
        (outcome,) = run_sequential_test([measurement], settings, progress=labelled, run=run)
        outcomes.append(outcome)
        seconds.append(time.monotonic() - started)
        # In an A/A gate, a sentinel is a session like any other.
        ratios += [*outcome.sentinels, *(session.log_ratio for session in outcome.sessions)]
    return _summary(measurement, plan, outcomes, seconds, ratios)


def _labelled(progress: Callable[[str], None], label: str, text: str) -> None:
    progress(f"{label}: {text}")


def _summary(
    measurement: Measurement, plan: Plan, outcomes: list[Outcome], seconds: list[float], ratios: list[float]
) -> Calibration:
    deviation = float(np.std(ratios, ddof=1))
    widening = dependence.widening(ratios)
    verdicts = [outcome.verdict for outcome in outcomes]
    fails = verdicts.count("FAIL")
    return Calibration(
        machine=this_machine(),
        measured=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        model=measurement.candidate.label,
        clock=measurement.clock,
        batch=measurement.batch,
        threads=plan.threads,
        pairs=plan.pairs,
        max_slowdown=plan.max_slowdown,
        sessions=len(ratios),
        session_deviation=deviation,
        lag_correlation=dependence.lag_correlation(ratios),
        widening=widening,
        mde=statistics.minimum_detectable_effect(widening * deviation),
        gates=len(outcomes),
        false_fails=fails,
        false_fail_high=upper_bound(fails, len(outcomes), 0.95),
        inconclusive=verdicts.count("INCONCLUSIVE"),
        resampled_false_fails=resampled_false_fails(ratios, math.log1p(plan.max_slowdown), widening),
        median_gate_seconds=float(np.median(seconds)),
        load=os.getloadavg()[0],
    )


def resampled_false_fails(ratios: list[float], limit: float, widening: float = 1.0) -> float:
    """Proportion of false FAILs among gates resampled from the sessions (K,) of equal arms, in the order they ran.

    A gate gets as many consecutive sessions as it takes at most, so that sessions that are alike stay together, and one
    random sign, because either of two equal arms could be called the candidate.
    """
    rng = np.random.default_rng(20240208)
    most = statistics.LOOKS[-1]
    starts = rng.integers(0, len(ratios), (_RESAMPLED_GATES, 1))
    draws = np.asarray(ratios)[(starts + np.arange(most)) % len(ratios)]
    verdicts, _ = statistics.sequential(draws * rng.choice([-1.0, 1.0], starts.shape), limit, widening=widening)
    return float(np.mean(verdicts == "FAIL"))


def require_resolution(calibration: Calibration, max_slowdown: float) -> None:
    """Raise ``ResolutionError`` for a limit below the smallest slowdown that the calibrated machine can enforce.

    If its consecutive sessions are too much alike, it can enforce none.
    """
    if calibration.widening > MAX_WIDENING:
        raise ResolutionError(
            f"Consecutive sessions on this runner are alike (correlation {calibration.lag_correlation:.2f}): intervals "
            f"would have to be {calibration.widening:.1f} times as wide as for independent sessions (up to "
            f"{MAX_WIDENING:g} allowed), and the error rate of the gate would not hold.",
            remedy="Stop what else runs on this machine, or let it cool, and run `kdexport calibrate-runner` again, "
            "with more --gates for a sharper estimate.",
        )
    if math.log1p(max_slowdown) < calibration.mde:
        raise ResolutionError(
            f"This runner cannot enforce {max_slowdown:.1%}: equal arms differ by {calibration.session_deviation:.2%} "
            f"between sessions, so at least {calibration.smallest_slowdown:.1%} is needed.",
            remedy=f"Pass --max-slowdown {calibration.smallest_slowdown:.1%}, or calibrate a quieter machine.",
        )


def write_calibration(calibration: Calibration, path: Path) -> None:
    """Write runner.toml atomically."""
    data = asdict(calibration)
    machine = data.pop("machine")
    lines = [
        "# Written by `kdexport calibrate-runner`; `kdexport gate` refuses limits that this machine cannot enforce.",
        f"schema = {json.dumps(SCHEMA)}",
        *(f"{key} = {_toml(value)}" for key, value in data.items()),
        "",
        "[machine]",
        *(f"{key} = {_toml(value)}" for key, value in machine.items()),
    ]
    write_text(path, "\n".join(lines) + "\n")


def read_calibration(path: Path) -> Calibration:
    """Read runner.toml; raises ``ConfigError`` if it is not valid."""
    from kdexport.core.toml import read_toml

    data = read_toml(path)
    try:
        if data.pop("schema") != SCHEMA:
            raise ValueError(f"the schema must be {SCHEMA}")
        return _checked(data)
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{path} is not a calibration of this version of kdexport: {_described(error)}.",
            remedy=f"Run `kdexport calibrate-runner --out {path}` again.",
        ) from None


def _described(error: Exception) -> str:
    return f"{error} is missing" if isinstance(error, KeyError) else str(error)


def _checked(data: dict[str, Any]) -> Calibration:
    calibration = Calibration(**{**data, "machine": Machine(**data["machine"])})
    for name, least, most in _RANGES:
        value = getattr(calibration, name)
        if not isinstance(value, float) or not least <= value <= most:
            raise ValueError(f"{name} must be a number from {least:g} to {most:g}; got {value!r}")
    return calibration


def _toml(value: object) -> str:
    text = json.dumps(value, ensure_ascii=True) if isinstance(value, str) else repr(value)
    # The value must be read back unchanged: repr and TOML do not write all floats in the same way.
    if tomllib.loads(f"x = {text}")["x"] != value:
        raise ValueError(f"{value!r} cannot be written in TOML.")
    return text
