"""``kdexport bench``: the latency of each arm on this machine, without a verdict."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kdexport.core.files import scratch_folder
from kdexport.errors import ConfigError
from kdexport.gate.arms import (
    Artifact,
    Bundle,
    artifact,
    choose_target,
    open_bundle,
    require_batches,
    require_images_per_run,
)
from kdexport.gate.result import latency_json
from kdexport.gate.sequential_test import Measurement, Outcome, Plan, measure_all
from kdexport.gate.stored_latencies import BENCH_SCHEMA, write_anchor
from kdexport.timing.clocks import require_timeable
from kdexport.timing.machine import require_cores, this_machine, utc_now

_VARIANTS = ("fused", "unfused")


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchRequest:
    """Arguments of `kdexport bench`; ratios are first arm / second arm.

    An arm is ``fused`` or ``unfused``, both for ``target``, or the name of a target.
    """

    bundle: Path
    arms: tuple[str, ...]
    clocks: tuple[str, ...]
    batches: tuple[int, ...]
    target: str | None
    threads: int
    sessions: int
    seed: int


def run_bench(request: BenchRequest, progress: Callable[[str], None]) -> dict[str, Any]:
    """Time every clock and batch size; the result is a JSON object that a gate accepts as a baseline."""
    if not 1 <= len(request.arms) <= 2 or len(set(request.arms)) < len(request.arms):
        raise ConfigError(
            f"--arms must be one or two different arms; got '{','.join(request.arms)}'.",
            remedy="For example: --arms fused,unfused or --arms onnx-int8,onnx-fp32.",
        )
    require_cores(request.threads)
    bundle = open_bundle(request.bundle)
    targets = [choose_target(bundle, request.target if arm in _VARIANTS else arm) for arm in request.arms]
    for clock in request.clocks:
        for target in targets:
            require_timeable(target, clock)
    require_batches(bundle, request.batches)
    require_images_per_run(targets, request.batches)
    plan = Plan(max_slowdown=0.02, threads=request.threads, seed=request.seed, tails=True)
    with scratch_folder("bench") as folder:
        progress("checking the files of the bundle")
        arms = _open_arms(bundle, request.arms, targets, folder)
        anchors = {clock: write_anchor(folder, clock) for clock in request.clocks}
        measurements = [
            Measurement(
                reference=arms[-1],
                candidate=arms[0],
                clock=clock,
                batch=batch,
                image_size=bundle.image_size,
                anchor=anchors[clock],
            )
            for clock in request.clocks
            for batch in request.batches
        ]
        outcomes = [measure_all(measurement, plan, request.sessions, progress) for measurement in measurements]
    return {
        "schema": BENCH_SCHEMA,
        "bundle": str(request.bundle),
        "student": bundle.manifest.spec.student,
        "classes": list(bundle.manifest.spec.classes),
        "target": arms[0].target,
        "variant": arms[0].variant,
        "arms": list(request.arms),
        "latency": [_row(outcome, plan) for outcome in outcomes],
        "machine": asdict(this_machine()),
        "measured": utc_now(),
    }


def _open_arms(bundle: Bundle, names: tuple[str, ...], targets: list[str], scratch: Path) -> list[Artifact]:
    arms = [
        artifact(bundle, target, "unfused" if name == "unfused" else "fused", scratch)
        for name, target in zip(names, targets, strict=True)
    ]
    if len(arms) == 2 and (arms[0].target, arms[0].variant) == (arms[1].target, arms[1].variant):
        raise ConfigError(f"Both arms are {arms[0].label}.", remedy="Pass --arms with two different arms.")
    return arms


def _row(outcome: Outcome, plan: Plan) -> dict[str, Any]:
    """A row of the result, without the keys that only a gate fills."""
    data = latency_json(outcome, plan)
    of_a_gate = ("verdict", "reason", "max_slowdown", "sentinels", "widening", "excludes")
    return {key: value for key, value in data.items() if key not in of_a_gate}
