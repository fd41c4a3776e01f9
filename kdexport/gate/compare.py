"""``kdexport gate``: open both arms, check that they can be compared, measure them, and judge every check."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from kdexport.core.files import scratch_folder
from kdexport.errors import ConfigError
from kdexport.gate.accuracy import accuracy_gates, require_golden_logits
from kdexport.gate.arms import (
    Artifact,
    Bundle,
    artifact,
    choose_target,
    open_bundle,
    require_batches,
    require_comparable,
    require_images_per_run,
)
from kdexport.gate.calibrate import read_calibration, require_resolution
from kdexport.gate.result import Check, GateResult, Policy, accuracy_check, latency_check, slow_check, tail_check
from kdexport.gate.sequential_test import Measurement, Outcome, Plan, run_sequential_test
from kdexport.gate.slow_sessions import SlowLimits, SlowOutcome, count_slow_sessions, require_decidable
from kdexport.gate.stored_latencies import StoredLatencies, read_latencies, stored_checks, write_anchor
from kdexport.timing.clocks import require_timeable
from kdexport.timing.machine import require_cores, this_machine

Progress = Callable[[str], None]
RUNNER = Path("runner.toml")


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """The limits of a gate: fractions (0.02 is 2 %), and p99 in milliseconds; None means not checked.

    At most ``slow_sessions`` of the sessions may have a candidate that is slower by more than ``slow_session``.
    """

    slowdown: float
    flips: float | None = None
    top1_drop: float | None = None
    p99_ms: float | None = None
    slow_sessions: float | None = None
    slow_session: float = 0.10

    @property
    def slow(self) -> SlowLimits | None:
        """The limits of the check of slow sessions."""
        if self.slow_sessions is None:
            return None
        return SlowLimits(share=self.slow_sessions, slowdown=self.slow_session)


@dataclass(frozen=True, kw_only=True, slots=True)
class GateRequest:
    """Arguments of `kdexport gate`."""

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
class _Arms:
    """Both arms with their bundles.

    If the baseline is a file of stored latencies, ``stored`` holds them, and ``anchors`` maps each clock to the network
    in units of which they are compared.
    """

    question: str
    candidate: Artifact
    reference: Artifact
    candidate_bundle: Bundle
    reference_bundle: Bundle
    stored: StoredLatencies | None = None
    anchors: Mapping[str, Path | None] = field(default_factory=dict)


def run_gate(request: GateRequest, progress: Progress, report: Progress = lambda _: None) -> GateResult:
    """Measure and judge both arms; raises ``KdexportError`` if they cannot be compared.

    ``progress`` gets the step that runs, ``report`` one line on the images of ``request.data``.
    """
    started = time.monotonic()
    require_cores(request.threads)
    calibration, widening = _resolution(request)
    limits = request.limits
    if limits.slow is not None:
        require_decidable(limits.slow, limits.slowdown)
    plan = Plan(
        max_slowdown=limits.slowdown,
        threads=request.threads,
        seed=request.seed,
        tails=limits.p99_ms is not None,
        widening=widening,
    )
    on_gpu = request.clocks == ("gpu",)
    with _open_arms(request, progress) as arms:
        progress("golden images")
        require_golden_logits(arms.candidate, arms.candidate_bundle, request.threads, on_gpu=on_gpu)
        if arms.reference is not arms.candidate:
            require_golden_logits(arms.reference, arms.reference_bundle, request.threads, on_gpu=on_gpu)
        if arms.stored is None:
            progress("accuracy")
            wanted = (limits.flips, limits.top1_drop)
            pair = ((arms.reference, arms.reference_bundle), (arms.candidate, arms.candidate_bundle))
            accuracy = accuracy_gates(pair, wanted, request.data, request.threads, on_gpu=on_gpu, report=report)
        else:
            accuracy = []
        outcomes = run_sequential_test(_measurements(request, arms), plan, progress=progress)
        slow = _slow_sessions(outcomes, plan, limits.slow, progress)
    checks: list[Check] = [accuracy_check(result) for result in accuracy]
    if arms.stored is None:
        checks += [latency_check(outcome, plan, counted=bool(slow)) for outcome in outcomes]
    else:
        checks += stored_checks(arms.stored, outcomes, plan)
    checks += [slow_check(outcome, found) for outcome, found in zip(outcomes, slow, strict=False)]
    if limits.p99_ms is not None:
        checks += [tail_check(outcome, limits.p99_ms) for outcome in outcomes]
    return GateResult(
        question=arms.question,
        candidate=arms.candidate.label,
        reference=arms.reference.label if arms.stored is None else str(request.baseline),
        plan=plan,
        outcomes=outcomes,
        slow=slow,
        checks=tuple(checks),
        machine=this_machine(),
        seconds=time.monotonic() - started,
        policy=request.policy,
        calibration=calibration,
    )


def _slow_sessions(
    outcomes: tuple[Outcome, ...], plan: Plan, limits: SlowLimits | None, progress: Progress
) -> tuple[SlowOutcome, ...]:
    """One result per outcome; none if the check was not requested."""
    if limits is None:
        return ()
    return tuple(
        count_slow_sessions(outcome, plan, limits, family=len(outcomes), progress=progress) for outcome in outcomes
    )


def _measurements(request: GateRequest, arms: _Arms) -> list[Measurement]:
    return [
        Measurement(
            reference=arms.reference,
            candidate=arms.candidate,
            clock=clock,
            batch=batch,
            image_size=arms.candidate_bundle.image_size,
            anchor=arms.anchors.get(clock),
        )
        for clock in request.clocks
        for batch in request.batches
    ]


def _resolution(request: GateRequest) -> tuple[str, float]:
    """A description of the calibration, and its widening; ``ResolutionError`` for a limit that cannot be enforced."""
    path = request.runner or (RUNNER if RUNNER.is_file() else None)
    if path is None:
        return "not calibrated: sessions are taken to be independent", 1.0
    calibration = read_calibration(path)
    fits = calibration.machine == this_machine() and calibration.threads == request.threads
    if not fits or calibration.clock not in request.clocks:
        return f"{path} is for a different machine, clock or number of threads and was not used", 1.0
    require_resolution(calibration, request.limits.slowdown)
    text = f"calibrated on {calibration.measured}: this machine can enforce {calibration.smallest_slowdown:.1%} or more"
    if calibration.widening > 1:
        text += f"; intervals are {calibration.widening:.2f} times as wide, because sessions may depend on each other"
    return text, calibration.widening


@contextlib.contextmanager
def _open_arms(request: GateRequest, progress: Progress) -> Iterator[_Arms]:
    progress("checking the files of the bundles")
    bundle = open_bundle(request.bundle)
    target = choose_target(bundle, request.target)
    _require_timed(bundle, target, request)
    with scratch_folder("gate") as folder:
        candidate = artifact(bundle, target, "fused", folder)
        if request.baseline is None and request.against is None:
            progress("exporting the unfused student")
            yield _Arms(
                question="Is the fused student slower than the unfused one?",
                candidate=candidate,
                reference=artifact(bundle, target, "unfused", folder),
                candidate_bundle=bundle,
                reference_bundle=bundle,
            )
        elif request.baseline is not None and request.baseline.is_file():
            yield _against_stored(request, bundle, candidate, request.baseline, folder)
        else:
            yield _against_bundle(request, bundle, candidate)


def _against_stored(request: GateRequest, bundle: Bundle, candidate: Artifact, path: Path, scratch: Path) -> _Arms:
    limits = request.limits
    if any(given is not None for given in (limits.flips, limits.top1_drop, limits.slow_sessions, request.against)):
        raise ConfigError(
            f"{path} contains only latencies, but accuracy gates, --max-slow-sessions and --against need the files of "
            "the baseline.",
            remedy="Pass --baseline with the bundle folder, or omit --max-flips, --max-top1-drop, --max-slow-sessions "
            "and --against.",
        )
    return _Arms(
        question="Is the candidate slower than stored numbers?",
        candidate=candidate,
        reference=candidate,
        candidate_bundle=bundle,
        reference_bundle=bundle,
        stored=read_latencies(path, bundle, candidate.target, this_machine()),
        anchors={clock: write_anchor(scratch, clock) for clock in request.clocks},
    )


def _against_bundle(request: GateRequest, bundle: Bundle, candidate: Artifact) -> _Arms:
    """The reference is another bundle, another target of the same bundle, or both."""
    baseline, question = bundle, f"Is {candidate.target} slower than {request.against}?"
    if request.baseline is not None:
        baseline, question = open_bundle(request.baseline), "Is the candidate slower than the baseline?"
        require_comparable(bundle, baseline)
    target = choose_target(baseline, request.against or request.target)
    if baseline is bundle and target == candidate.target:
        raise ConfigError(
            f"Both arms are {target} of {bundle.folder}.", remedy="Pass --against with a target other than --target."
        )
    _require_timed(baseline, target, request)
    return _Arms(
        question=question,
        candidate=candidate,
        reference=artifact(baseline, target, "fused", baseline.folder),
        candidate_bundle=bundle,
        reference_bundle=baseline,
    )


def _require_timed(bundle: Bundle, target: str, request: GateRequest) -> None:
    for clock in request.clocks:
        require_timeable(target, clock)
    require_batches(bundle, request.batches)
    require_images_per_run([target], request.batches)
