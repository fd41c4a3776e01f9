"""Throughput and latency, each run between two runs of bare onnxruntime on the same machine."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from serving_bench.bare import Bare, bare
from serving_bench.bundles import Model
from serving_bench.foreign_load import ForeignLoad
from serving_bench.process import running
from serving_bench.records import Records
from serving_bench.servers import Arm
from serving_bench.wrk import load


@dataclass(frozen=True, slots=True)
class Cell:
    """One measurement: an arm, a kind of payload, a number of clients, and the number of bare threads to compare."""

    arm: Arm
    kind: str
    clients: int
    bare_threads: int = 1


@dataclass(frozen=True, slots=True)
class Effort:
    """Rounds over all cells, seconds per run, the CPU share of other processes in a quiet run, and tries per run."""

    rounds: int
    seconds: float
    max_foreign: float
    attempts: int


def measure(cells: list[Cell], model: Model, bundle: Path, records: Records, effort: Effort, logs: Path) -> None:
    """Measure all cells in each round, so that a slow minute of the machine affects all cells equally.

    A run that is not quiet stays in the raw results with a mark, and is repeated.
    """
    for number in range(effort.rounds):
        # Every other round runs in reverse order, so that a trend of the machine cancels out.
        for cell in cells if number % 2 == 0 else cells[::-1]:
            for attempt in range(effort.attempts):
                row = _run(cell, model, bundle, effort.seconds, logs)
                quiet = bool(row["foreign"] <= effort.max_foreign)
                records.add("throughput", round=number, attempt=attempt, quiet=quiet, **row)
                if quiet:
                    break


def _run(cell: Cell, model: Model, bundle: Path, seconds: float, logs: Path) -> dict[str, Any]:
    path = bundle / "model.onnx"
    with running(cell.arm.command, logs / f"{cell.arm.command.name}.log".replace(" ", "-")) as server:
        payload = cell.arm.payloads[cell.kind]()
        if not load(server, payload, clients=cell.clients, seconds=1).ok:
            # Refusals are fast; a cell without one successful response is an error of this benchmark.
            raise RuntimeError(
                f"{cell.arm.name} answered no request of kind {payload.kind} with 2xx; read its log {server.log}"
            )
        foreign_load = ForeignLoad(server)
        before = bare(path, model.image_size, threads=cell.bare_threads, seconds=seconds / 2)
        result = load(server, payload, clients=cell.clients, seconds=seconds)
        after = bare(path, model.image_size, threads=cell.bare_threads, seconds=seconds / 2)
        foreign, memory = foreign_load.share(), server.memory()
    reference = _mean(before, after)
    return {
        "model": model.name, "arm": cell.arm.name, "kind": cell.kind, "sent_as": payload.kind,
        "clients": cell.clients, "bare_threads": cell.bare_threads, "foreign": round(foreign, 3),
        "ratio": result.rate / reference.rate, "p50_ratio": result.p50_ms / reference.p50_ms,
        "p99_ratio": result.p99_ms / reference.p99_ms, "cpu_ratio": result.cpu_ms / reference.cpu_ms,
        "drift": after.rate / before.rate, "rate": result.rate, "result": asdict(result), "bare": asdict(reference),
        "rss_mb": round(memory.rss_mb, 1),
    }  # fmt: skip


def _mean(before: Bare, after: Bare) -> Bare:
    return Bare(
        rate=(before.rate + after.rate) / 2,
        p50_ms=(before.p50_ms + after.p50_ms) / 2,
        p99_ms=(before.p99_ms + after.p99_ms) / 2,
        cpu_ms=(before.cpu_ms + after.cpu_ms) / 2,
    )
