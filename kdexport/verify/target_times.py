"""The latency of every target that runs on the machine of a build: a few sessions each, without a verdict."""

import math
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kdexport.backends.base import ONNX_FILE
from kdexport.bundle.layout import TARGETS
from kdexport.errors import BackendUnavailableError, KdexportError
from kdexport.targets import DEFAULT_TARGET, Target, parse_target
from kdexport.timing.clocks import require_timeable
from kdexport.timing.machine import this_machine, utc_now
from kdexport.timing.session import Arm, Request, pinned_cpus, run_session
from kdexport.verify.latency import LatencyResult

#: Sessions of a target if the budget allows them.
_SESSIONS = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class TargetTime:
    """The median latency of a target over its sessions; ``ratio`` to onnx-fp32, timed in turn with it on one clock."""

    clock: str
    ms: float
    sessions: int
    ratio: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class TimingRequest:
    """Time the targets in ``folder`` that are in ``executed``. ``compared`` is the comparison of the fused student with
    the unfused one, which timed onnx-fp32. ``budget`` is the number of sessions that it might have taken.
    """

    folder: Path
    targets: tuple[str, ...]
    executed: Collection[str]
    compared: LatencyResult
    image_size: int
    pairs: int
    budget: int


def time_targets(request: TimingRequest, progress: Callable[[str], None]) -> dict[str, Any]:
    """What the manifest says about latency by target; a target that was not timed has the reason there."""
    clocks: dict[Target, str] = {}
    reasons: dict[str, str] = {}
    for target in map(parse_target, request.targets):
        found = _clock(target) if str(target) in request.executed else "it did not run on this machine"
        if found in ("host", "gpu"):
            clocks[target] = found
        else:
            reasons[str(target)] = found
    times = {}
    further = [target for target in clocks if str(target) != DEFAULT_TARGET]
    count = _sessions(request, len(further))
    for target in clocks:
        if str(target) == DEFAULT_TARGET:
            compared = request.compared
            times[str(target)] = TargetTime(
                clock="host", ms=compared.candidate_ms, sessions=compared.sessions, ratio=1.0
            )
            continue
        progress(f"latency of {target}")
        try:
            times[str(target)] = _timed(target, clocks[target], count, request)
        except KdexportError as error:
            reasons[str(target)] = error.message.partition("\n")[0]
    return {
        "measured": utc_now(),
        "batch": request.compared.batch,
        "threads": request.compared.threads,
        "machine": asdict(this_machine()),
        "targets": {name: asdict(time) for name, time in times.items()},
        "not_timed": reasons,
    }


def _sessions(request: TimingRequest, targets: int) -> int:
    """Sessions of each target: all targets together take what the comparison left of its budget."""
    left = request.budget - request.compared.sessions
    return max(1, min(_SESSIONS, left // max(targets, 1)))


def _clock(target: Target) -> str:
    """The clock that can time ``target`` here, or why there is none."""
    reason = ""
    for clock in ("host", "gpu"):
        try:
            require_timeable(str(target), clock)
        except BackendUnavailableError as error:
            reason = reason or error.message
        else:
            return clock
    return reason


def _timed(target: Target, clock: str, sessions: int, request: TimingRequest) -> TargetTime:
    arm = Arm(path=str(request.folder / TARGETS / str(target) / target.artifact), target=str(target))
    # On a GPU the reference would be a file that was timed on a CPU.
    reference = Arm(path=str(request.folder / ONNX_FILE)) if clock == "host" else arm
    threads = request.compared.threads
    found = [
        run_session(
            Request(
                reference=reference, candidate=arm, clock=clock, image_size=request.image_size,
                batch=request.compared.batch, threads=threads, cpus=pinned_cpus(threads), pairs=request.pairs,
                seed=seed,
            )
        )
        for seed in range(sessions)
    ]  # fmt: skip
    return TargetTime(
        clock=clock,
        ms=float(np.median([session.candidate_ms for session in found])),
        sessions=sessions,
        ratio=math.exp(float(np.mean([session.log_ratio for session in found]))) if clock == "host" else None,
    )
