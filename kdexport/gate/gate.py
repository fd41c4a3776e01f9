"""From a request to a verdict: what is compared, whether it can be, and everything that is measured for it."""

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdexport.errors import ConfigError
from kdexport.gate.accuracy import accuracy_gates
from kdexport.gate.artifacts import (
    Artifact,
    Bundle,
    artifact,
    choose_target,
    open_bundle,
    require_batches,
    require_comparable,
)
from kdexport.gate.calibrate import calibrate
from kdexport.gate.machine import (
    Calibration,
    read_calibration,
    require_cores,
    require_resolution,
    this_machine,
    write_calibration,
)
from kdexport.gate.network import SIZE, write_network
from kdexport.gate.numbers import number_checks, read_numbers
from kdexport.gate.options import parse_clocks, require_writable_file
from kdexport.gate.result import Check, GateResult, Policy, accuracy_check, latency_check, tail_check
from kdexport.gate.runnable import DEFAULT_TARGET, require_runnable
from kdexport.gate.trial import Number, Plan, run_trial

Progress = Callable[[str], None]
RUNNER = Path("runner.toml")


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What is allowed: shares as fractions, p99 in milliseconds; None gates nothing."""

    slowdown: float
    flips: float | None = None
    top1_drop: float | None = None
    p99_ms: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class GateRequest:
    """What `kdexport gate` was asked."""

    bundle: Path
    baseline: Path | None
    limits: Limits
    data: str | None = None
    clocks: tuple[str, ...] = ("host",)
    batches: tuple[int, ...] = (1,)
    target: str | None = None
    against: str | None = None
    threads: int = 1
    runner: Path | None = None
    policy: Policy = "exit"
    seed: int = 0


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


@dataclass(frozen=True, kw_only=True, slots=True)
class _Sides:
    """Both arms with the bundles that they come from; stored numbers where the baseline is nothing more."""

    question: str
    candidate: Artifact
    reference: Artifact
    candidate_bundle: Bundle
    reference_bundle: Bundle
    numbers: dict[str, Any] | None = None


def run_gate(request: GateRequest, progress: Progress) -> GateResult:
    """Check that the comparison makes sense, then measure; raises ``KdexportError`` where it does not."""
    started = time.monotonic()
    require_cores(request.threads)
    said = _resolution(request)
    limits = request.limits
    plan = Plan(
        max_slowdown=limits.slowdown, threads=request.threads, seed=request.seed, tails=limits.p99_ms is not None
    )
    with _sides(request, progress) as sides:
        arms = [(sides.reference, sides.reference_bundle), (sides.candidate, sides.candidate_bundle)]
        if sides.numbers is None:
            progress("accuracy")
            on_gpu = request.clocks == ("gpu",)
            wanted = (limits.flips, limits.top1_drop)
            accuracy = accuracy_gates(arms, wanted, request.data, request.threads, on_gpu=on_gpu)
        else:
            accuracy = []
        size = sides.candidate_bundle.image_size
        numbers = [
            Number(reference=sides.reference, candidate=sides.candidate, clock=clock, batch=batch, image_size=size)
            for clock in request.clocks
            for batch in request.batches
        ]
        outcomes = run_trial(numbers, plan, progress=progress)
    checks: list[Check] = [accuracy_check(result) for result in accuracy]
    if sides.numbers is None:
        checks += [latency_check(outcome, plan) for outcome in outcomes]
    else:
        checks += number_checks(sides.numbers, outcomes, plan)
    if limits.p99_ms is not None:
        checks += [tail_check(outcome, limits.p99_ms) for outcome in outcomes]
    return GateResult(
        question=sides.question,
        candidate=sides.candidate.label,
        reference=sides.reference.label if sides.numbers is None else str(request.baseline),
        plan=plan,
        outcomes=outcomes,
        checks=tuple(checks),
        machine=this_machine(),
        seconds=time.monotonic() - started,
        policy=request.policy,
        calibration=said,
    )


def _resolution(request: GateRequest) -> str:
    """Refuse a limit that the calibrated machine cannot see; what was found as a sentence."""
    path = request.runner or (RUNNER if RUNNER.is_file() else None)
    if path is None:
        return "not calibrated"
    calibration = read_calibration(path)
    fits = calibration.machine == this_machine() and calibration.threads == request.threads
    if not fits or calibration.clock not in request.clocks:
        return f"{path} is of another machine, clock or number of threads and was not used"
    require_resolution(calibration, request.limits.slowdown)
    return f"calibrated {calibration.measured}: {calibration.smallest_slowdown:.1%} or more can be enforced here"


@contextlib.contextmanager
def _sides(request: GateRequest, progress: Progress) -> Iterator[_Sides]:
    progress("files")
    bundle = open_bundle(request.bundle)
    target = choose_target(bundle, request.target)
    _require_timed(bundle, target, request)
    with tempfile.TemporaryDirectory(prefix="kdexport-gate-") as folder:
        candidate = artifact(bundle, target, "fused", Path(folder))
        if request.baseline is None and request.against is None:
            progress("exporting the unfused student")
            yield _Sides(
                question="Is the fused student slower than the unfused one?",
                candidate=candidate,
                reference=artifact(bundle, target, "unfused", Path(folder)),
                candidate_bundle=bundle,
                reference_bundle=bundle,
            )
        elif request.baseline is not None and request.baseline.is_file():
            yield _numbers(request, bundle, candidate, request.baseline)
        else:
            yield _against(request, bundle, candidate)


def _numbers(request: GateRequest, bundle: Bundle, candidate: Artifact, path: Path) -> _Sides:
    if (request.limits.flips, request.limits.top1_drop, request.against) != (None, None, None):
        raise ConfigError(
            f"{path} holds numbers, and accuracy gates and --against need the baseline's files.",
            remedy="Pass the baseline bundle, or leave --max-flips, --max-top1-drop and --against away.",
        )
    return _Sides(
        question="Is the candidate slower than stored numbers?",
        candidate=candidate,
        reference=candidate,
        candidate_bundle=bundle,
        reference_bundle=bundle,
        numbers=read_numbers(path, bundle, candidate.target, this_machine()),
    )


def _against(request: GateRequest, bundle: Bundle, candidate: Artifact) -> _Sides:
    """Another bundle, another target of this one, or both at once."""
    stored, question = bundle, f"Is {candidate.target} slower than {request.against}?"
    if request.baseline is not None:
        stored, question = open_bundle(request.baseline), "Is the candidate slower than the baseline?"
        require_comparable(bundle, stored)
    target = choose_target(stored, request.against or request.target)
    if stored is bundle and target == candidate.target:
        raise ConfigError(
            f"Both arms are {target} of {bundle.folder}.", remedy="Pass --against with another target than --target."
        )
    _require_timed(stored, target, request)
    return _Sides(
        question=question,
        candidate=candidate,
        reference=artifact(stored, target, "fused", stored.folder),
        candidate_bundle=bundle,
        reference_bundle=stored,
    )


def _require_timed(bundle: Bundle, target: str, request: GateRequest) -> None:
    for clock in request.clocks:
        require_runnable(target, clock)
    require_batches(bundle, request.batches)


def run_calibration(request: CalibrationRequest, progress: Progress) -> Calibration:
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
