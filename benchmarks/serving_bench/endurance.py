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

#: Six times what fits in: a server of two instances takes 2 x 2 running and handed-over requests and 32 waiting.
OVERLOAD_CLIENTS = 216
BACKOFF_MS = 500


def overload(arm: Arm, records: Records, *, rounds: int, seconds: float, logs: Path) -> None:
    """Good answers a second at six times the admitted load, over those at 8 clients just before and after."""
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
    """Binary tensors and JPEGs without a pause; memory and file descriptors over time."""
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
        # Idle again: what stays open now has leaked.
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
    """SIGTERM under load from 8 clients, again and again: requests that were sent and never fully answered."""
    fates: Counter[str] = Counter()
    slowest = 0.0
    for number in range(times):
        with running(arm.command, logs / "sigterm.log") as server:
            seen, seconds = asyncio.run(_terminate(server, arm.payloads["FP32 binary"](), 0.6 + 0.05 * (number % 7)))
        fates += seen
        slowest = max(slowest, seconds)
    records.add("sigterm", arm=arm.name, times=times, clients=8, fates=dict(fates), slowest_stop_s=slowest)


async def _terminate(server: Server, payload: Payload, after_s: float) -> tuple[Counter[str], float]:
    fates: Counter[str] = Counter()
    data = encode(payload)
    over = asyncio.Event()

    async def client() -> None:
        connection = Connection(server.port)
        while not over.is_set():
            answer = await connection.request(data)
            fates[answer.fate if answer.fate != "answered" else f"status {answer.status}"] += 1
            if answer.fate == "refused connection":
                break
        connection.close()

    clients = [asyncio.create_task(client()) for _ in range(8)]
    await asyncio.sleep(after_s)
    seconds = await asyncio.to_thread(stop, server)
    over.set()
    await asyncio.gather(*clients)
    return fates, seconds
