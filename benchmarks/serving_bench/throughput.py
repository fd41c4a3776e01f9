"""Throughput and latency, each run between two runs of bare onnxruntime on the same machine."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from serving_bench.bare import Bare, bare
from serving_bench.bundles import Model
from serving_bench.neighbours import Neighbours
from serving_bench.process import running
from serving_bench.records import Records
from serving_bench.servers import Arm
from serving_bench.wrk import load


@dataclass(frozen=True, slots=True)
class Cell:
    """What is measured: an arm with a kind of payload, at a number of clients, against a number of bare threads."""

    arm: Arm
    kind: str
    clients: int
    bare_threads: int = 1


@dataclass(frozen=True, slots=True)
class Effort:
    """How long and how often: rounds over all cells, seconds a run, and how much of a core others may use in it."""

    rounds: int
    seconds: float
    max_foreign: float
    attempts: int


def measure(cells: list[Cell], model: Model, bundle: Path, records: Records, effort: Effort, logs: Path) -> None:
    """All cells in turn, round by round, so that a slow minute of the machine meets every cell alike.

    A run that others disturbed is kept in the raw results, marked, and tried again.
    """
    for number in range(effort.rounds):
        # Back and forth: a trend of the machine over the round cancels out.
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
            # A server is fast at refusing: a cell without an answer is a fault of this benchmark.
            raise RuntimeError(f"{cell.arm.name} answers no {payload.kind}; see {server.log}")
        neighbours = Neighbours(server)
        before = bare(path, model.image_size, threads=cell.bare_threads, seconds=seconds / 2)
        result = load(server, payload, clients=cell.clients, seconds=seconds)
        after = bare(path, model.image_size, threads=cell.bare_threads, seconds=seconds / 2)
        foreign, memory = neighbours.share(), server.memory()
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
