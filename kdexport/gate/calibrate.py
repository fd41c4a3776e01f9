"""What equal arms do on this machine: whole A/A gates, and what their sessions say about smaller limits."""

import datetime
import json
import math
import os
import tempfile
import time
import tomllib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kdexport.core.files import require_writable_file, write_text
from kdexport.errors import ConfigError, ResolutionError
from kdexport.gate.arms import Artifact, artifact, open_bundle, require_batches
from kdexport.gate.sequential_test import Number, Outcome, Plan, run_trial
from kdexport.stats import sequential as statistics
from kdexport.stats.proportions import upper_share
from kdexport.targets import DEFAULT_TARGET
from kdexport.timing.anchor import SIZE, write_network
from kdexport.timing.clocks import parse_clocks, require_timeable
from kdexport.timing.machine import Machine, require_cores, this_machine
from kdexport.timing.session import Request, Session, run_session

SCHEMA = "kdexport.runner/1"


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """What equal arms did on one machine: ``gates`` whole A/A gates, and the sessions of all of them together.

    ``session_deviation`` and ``mde`` are log ratios; ``mde`` is what a limit must not lie below. ``false_fail_high`` is
    the exact 95 % upper bound of the share of false FAILs; ``resampled_false_fails`` the same share over gates drawn
    from the measured sessions.
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
        """The smallest --max-slowdown that this machine can enforce, rounded up to a tenth of a percent."""
        return math.ceil(math.expm1(self.mde) * 1000 - 1e-9) / 1000


def require_resolution(calibration: Calibration, max_slowdown: float) -> None:
    """Raise ``ResolutionError`` for a threshold that the calibrated machine cannot see."""
    if math.log1p(max_slowdown) < calibration.mde:
        raise ResolutionError(
            f"This runner cannot enforce {max_slowdown:.1%}: equal arms differ by {calibration.session_deviation:.2%} "
            f"between sessions, so that it can enforce {calibration.smallest_slowdown:.1%}.",
            remedy=f"Pass --max-slowdown {calibration.smallest_slowdown:.1%}, or calibrate a quieter machine.",
        )


def write_calibration(calibration: Calibration, path: Path) -> None:
    """Write runner.toml, whole or not at all."""
    data = asdict(calibration)
    machine = data.pop("machine")
    lines = [
        "# Written by `kdexport calibrate-runner`; `kdexport gate` refuses thresholds below what was seen here.",
        f"schema = {json.dumps(SCHEMA)}",
        *(f"{key} = {_toml(value)}" for key, value in data.items()),
        "",
        "[machine]",
        *(f"{key} = {_toml(value)}" for key, value in machine.items()),
    ]
    write_text(path, "\n".join(lines) + "\n")


def read_calibration(path: Path) -> Calibration:
    """Read runner.toml; raises ``ConfigError`` where it is not one."""
    from kdexport.core.toml import read_toml

    data = read_toml(path)
    try:
        if data.pop("schema") != SCHEMA:
            raise ValueError(f"its schema is not {SCHEMA}")
        return _checked(data)
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{path} was not written by `kdexport calibrate-runner` of this version: {error}.",
            remedy="Run `kdexport calibrate-runner` again.",
        ) from None


def _checked(data: dict[str, Any]) -> Calibration:
    calibration = Calibration(**{**data, "machine": Machine(**data["machine"])})
    for name in ("mde", "session_deviation", "max_slowdown"):
        value = getattr(calibration, name)
        if not isinstance(value, float) or not 0 <= value < 10:
            raise ValueError(f"{name} is {value!r}")
    return calibration


def _toml(value: object) -> str:
    text = json.dumps(value, ensure_ascii=True) if isinstance(value, str) else repr(value)
    # What is written must be read back as it is: TOML knows floats that repr does not, and the other way round.
    if tomllib.loads(f"x = {text}")["x"] != value:
        raise ValueError(f"{value!r} has no form in TOML")
    return text


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
    require_timeable(DEFAULT_TARGET, clock)
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
