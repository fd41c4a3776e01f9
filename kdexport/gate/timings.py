"""``kdexport bench``: how fast each arm is here, without a verdict."""

import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kdexport.errors import ConfigError
from kdexport.gate.arms import Artifact, Bundle, artifact, choose_target, open_bundle, require_batches
from kdexport.gate.result import latency_json
from kdexport.gate.sequential_test import Number, Outcome, Plan, measure_all
from kdexport.gate.stored_latencies import BENCH_SCHEMA, write_anchor
from kdexport.timing.clocks import require_timeable
from kdexport.timing.machine import require_cores, this_machine

_VARIANTS = ("fused", "unfused")


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchRequest:
    """What `kdexport bench` was asked; the ratio is that of the first arm over the second.

    An arm is ``fused`` or ``unfused``, both as ``target``, or the name of another target.
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
    """Time every clock and batch size; one JSON object, which a later gate can read as a baseline of numbers."""
    if not 1 <= len(request.arms) <= 2 or len(set(request.arms)) < len(request.arms):
        raise ConfigError(
            f"--arms {','.join(request.arms)} is not one or two different arms.",
            remedy="For example: --arms fused,unfused, or two targets of the bundle.",
        )
    require_cores(request.threads)
    bundle = open_bundle(request.bundle)
    targets = [choose_target(bundle, request.target if arm in _VARIANTS else arm) for arm in request.arms]
    for clock in request.clocks:
        for target in targets:
            require_timeable(target, clock)
    require_batches(bundle, request.batches)
    plan = Plan(max_slowdown=0.02, threads=request.threads, seed=request.seed, tails=True)
    with tempfile.TemporaryDirectory(prefix="kdexport-bench-") as folder:
        progress("files")
        sides = _sides(bundle, request.arms, targets, Path(folder))
        anchors = {clock: write_anchor(Path(folder), clock) for clock in request.clocks}
        numbers = [
            Number(
                reference=sides[-1],
                candidate=sides[0],
                clock=clock,
                batch=batch,
                image_size=bundle.image_size,
                anchor=anchors[clock],
            )
            for clock in request.clocks
            for batch in request.batches
        ]
        outcomes = [measure_all(number, plan, request.sessions, progress) for number in numbers]
    return {
        "schema": BENCH_SCHEMA,
        "ok": True,
        "exit_code": 0,
        "bundle": str(request.bundle),
        "student": bundle.manifest.spec.student,
        "classes": list(bundle.manifest.spec.classes),
        "target": sides[0].target,
        "variant": sides[0].variant,
        "arms": list(request.arms),
        "latency": [_row(outcome, plan) for outcome in outcomes],
        "machine": asdict(this_machine()),
    }


def _sides(bundle: Bundle, arms: tuple[str, ...], targets: list[str], scratch: Path) -> list[Artifact]:
    sides = [
        artifact(bundle, target, "unfused" if arm == "unfused" else "fused", scratch)
        for arm, target in zip(arms, targets, strict=True)
    ]
    if len(sides) == 2 and (sides[0].target, sides[0].variant) == (sides[1].target, sides[1].variant):
        raise ConfigError(f"Both arms are {sides[0].label}.", remedy="Pass two different arms.")
    return sides


def _row(outcome: Outcome, plan: Plan) -> dict[str, Any]:
    """A row without what only a gate has."""
    data = latency_json(outcome, plan)
    return {key: value for key, value in data.items() if key not in ("verdict", "reason", "max_slowdown", "sentinels")}
