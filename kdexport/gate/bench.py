"""``kdexport bench``: how fast each arm is here, without a verdict."""

import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kdexport.errors import ConfigError
from kdexport.gate.artifacts import Artifact, Bundle, artifact, choose_target, open_bundle, require_batches
from kdexport.gate.machine import require_cores, this_machine
from kdexport.gate.numbers import BENCH_SCHEMA, write_anchor
from kdexport.gate.result import latency_json
from kdexport.gate.runnable import require_runnable
from kdexport.gate.trial import Number, Outcome, Plan, measure_all

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
            require_runnable(target, clock)
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


def show_bench(data: dict[str, Any]) -> None:
    """A table on stdout."""
    from kdexport.screen import _console, _table

    console = _console()
    arms = data["arms"]
    columns = [f"{arm} ms" for arm in arms] + (["ratio", "99 % interval"] if len(arms) == 2 else [])
    table = _table("clock", "batch", *columns, f"p99 of {arms[0]}, ms", "images/s", "sessions")
    for row in data["latency"]:
        p99 = row["p99_ms"]
        high = "unbounded" if p99["high"] is None else f"{p99['high']:.3f}"
        cells = [f"{row['candidate_ms']:.3f}"]
        if len(arms) == 2:
            interval = f"{row['low']:.3f} to {row['high']:.3f}"
            cells += [f"{row['reference_ms']:.3f}", f"{row['ratio']:.3f}", interval]
        cells += [
            f"{p99['estimate']:.3f}, {p99['low']:.3f} to {high}",
            f"{1e3 * row['batch'] / row['candidate_ms']:.0f}",
        ]
        table.add_row(row["clock"], str(row["batch"]), *cells, str(len(row["sessions"])))
    console.print(table)
    machine = data["machine"]
    threads = data["latency"][0]["threads"]
    console.print(f"{data['bundle']}, {data['target']}, {threads} of {machine['cores']} processors, {machine['cpu']}")
