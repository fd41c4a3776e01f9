"""Overload, soak and SIGTERM under load."""

import asyncio
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import numpy as np

from serving_bench.http_client import Connection, encode
from serving_bench.payloads import Payload
from serving_bench.process import Server, running, stop
from serving_bench.records import Records
from serving_bench.servers import Arm
from serving_bench.wrk import load

#: Six times the requests that two instances admit: 2 x 2 that run or are handed over, and 32 that wait.
OVERLOAD_CLIENTS = 216
BACKOFF_MS = 500


def overload(arm: Arm, records: Records, *, rounds: int, seconds: float, logs: Path) -> None:
    """Successful responses per second at six times the admitted load, over those with 8 clients before and after."""
    for number in range(rounds):
        with running(arm.command, logs / "overload.log") as server:
            payload = arm.payloads["FP32 binary"]()
            load(server, payload, clients=8, seconds=1)
            for backoff in (None, BACKOFF_MS):
                before = load(server, payload, clients=8, seconds=seconds / 2)
                result = load(server, payload, clients=OVERLOAD_CLIENTS, seconds=seconds, backoff_ms=backoff)
                after = load(server, payload, clients=8, seconds=seconds / 2)
                peak = (before.rate + after.rate) / 2
                records.add(
                    "overload", arm=arm.name, round=number, backoff_ms=backoff, goodput=result.rate / peak, peak=peak,
                    clients=OVERLOAD_CLIENTS, result=asdict(result), memory=asdict(server.memory()),
                )  # fmt: skip


def soak(arm: Arm, records: Records, *, seconds: float, logs: Path) -> None:
    """Memory and file descriptors over time, under binary tensors and JPEGs without a pause."""
    with running(arm.command, logs / "soak.log") as server:
        samples: list[tuple[float, float, int]] = []
        answered, failed, period = 0, 0, max(2.0, min(10.0, seconds / 40))
        started = time.monotonic()
        while (elapsed := time.monotonic() - started) < seconds:
            kind = ("FP32 binary", "JPEG")[len(samples) % 2]
            result = load(server, arm.payloads[kind](), clients=16, seconds=period)
            memory = server.memory()
            answered, failed = answered + result.ok, failed + result.refused + result.broken
            samples.append((elapsed, memory.rss_mb, memory.descriptors))
        # When the server is idle again, any descriptor that is still open has leaked.
        time.sleep(8)
        idle = server.memory()
    times, rss, descriptors = (np.asarray(column) for column in zip(*samples, strict=True))
    later = times >= times[-1] / 3
    slope = float(np.polyfit(times[later], rss[later], 1)[0]) * 3600 if later.sum() > 2 else float("nan")
    records.add(
        "soak", arm=arm.name, seconds=round(seconds), answered=answered, failed=failed, rss_first_mb=float(rss[0]),
        rss_last_mb=float(rss[-1]), rss_peak_mb=float(rss.max()), slope_mb_per_hour=slope,
        later_range_mb=float(np.ptp(rss[later])), descriptors_first=int(descriptors[0]),
        descriptors_last=int(descriptors[-1]), descriptors_idle=idle.descriptors, rss_idle_mb=idle.rss_mb,
    )  # fmt: skip


def terminations(arm: Arm, records: Records, *, times: int, logs: Path) -> None:
    """Repeated SIGTERM under load from 8 clients: count the requests that get no complete response."""
    outcomes: Counter[str] = Counter()
    slowest = 0.0
    for number in range(times):
        with running(arm.command, logs / "sigterm.log") as server:
            seen, seconds = asyncio.run(_terminate(server, arm.payloads["FP32 binary"](), 0.6 + 0.05 * (number % 7)))
        outcomes += seen
        slowest = max(slowest, seconds)
    records.add("sigterm", arm=arm.name, times=times, clients=8, fates=dict(outcomes), slowest_stop_s=slowest)


async def _terminate(server: Server, payload: Payload, after_s: float) -> tuple[Counter[str], float]:
    outcomes: Counter[str] = Counter()
    data = encode(payload)
    over = asyncio.Event()

    async def client() -> None:
        connection = Connection(server.port)
        while not over.is_set():
            answer = await connection.request(data)
            outcomes[answer.outcome if answer.outcome != "answered" else f"status {answer.status}"] += 1
            if answer.outcome == "refused connection":
                break
        connection.close()

    clients = [asyncio.create_task(client()) for _ in range(8)]
    await asyncio.sleep(after_s)
    seconds = await asyncio.to_thread(stop, server)
    over.set()
    await asyncio.gather(*clients)
    return outcomes, seconds
