"""From a request to a verdict: what is compared, whether it can be, and everything that is measured for it."""

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kdexport.errors import ConfigError
from kdexport.gate.accuracy import accuracy_gates
from kdexport.gate.arms import (
    Artifact,
    Bundle,
    artifact,
    choose_target,
    open_bundle,
    require_batches,
    require_comparable,
)
from kdexport.gate.calibrate import read_calibration, require_resolution
from kdexport.gate.result import Check, GateResult, Policy, accuracy_check, latency_check, tail_check
from kdexport.gate.sequential_test import Number, Plan, run_trial
from kdexport.gate.stored_latencies import number_checks, read_numbers, write_anchor
from kdexport.timing.clocks import require_timeable
from kdexport.timing.machine import require_cores, this_machine

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
class _Sides:
    """Both arms with the bundles that they come from.

    Where the baseline is nothing but ``numbers``, ``anchors`` holds what they are in units of, by clock.
    """

    question: str
    candidate: Artifact
    reference: Artifact
    candidate_bundle: Bundle
    reference_bundle: Bundle
    numbers: dict[str, Any] | None = None
    anchors: Mapping[str, Path | None] = field(default_factory=dict)


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
        outcomes = run_trial(_gated(request, sides), plan, progress=progress)
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


def _gated(request: GateRequest, sides: _Sides) -> list[Number]:
    return [
        Number(
            reference=sides.reference,
            candidate=sides.candidate,
            clock=clock,
            batch=batch,
            image_size=sides.candidate_bundle.image_size,
            anchor=sides.anchors.get(clock),
        )
        for clock in request.clocks
        for batch in request.batches
    ]


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
            yield _numbers(request, bundle, candidate, request.baseline, Path(folder))
        else:
            yield _against(request, bundle, candidate)


def _numbers(request: GateRequest, bundle: Bundle, candidate: Artifact, path: Path, scratch: Path) -> _Sides:
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
        anchors={clock: write_anchor(scratch, clock) for clock in request.clocks},
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
        require_timeable(target, clock)
    require_batches(bundle, request.batches)
