"""Fuzzed protocol requests against a running server."""

import asyncio
import re
from collections import Counter
from pathlib import Path

from kdexport.serving.limits import Limits
from serving_bench.grammar import Grammar
from serving_bench.http_client import Connection
from serving_bench.process import running
from serving_bench.records import Records
from serving_bench.servers import Arm

_WORKERS = 8


def fuzz(arm: Arm, model: str, size: int, records: Records, *, count: int, logs: Path, seed: int = 11) -> None:
    """Send ``count`` requests on 8 connections; no response may be a 5xx, and the server must stay alive and small."""
    with running(arm.command, logs / "fuzz.log") as server:
        outcomes, worst, unanswered = asyncio.run(_fuzz(server.port, model, size, count, seed))
        memory = server.memory()
        alive = server.process.poll() is None and server.answers("/v2/health/ready")
    records.add(
        "fuzz",
        arm=arm.name,
        count=count,
        seed=seed,
        fates=dict(sorted(outcomes.items())),
        alive=alive,
        server_errors=sum(n for outcome, n in outcomes.items() if outcome.isdigit() and outcome.startswith("5")),
        peak_mb=memory.peak_mb,
        unanswered=dict(unanswered.most_common(8)),
        examples=[text.decode("latin-1") for text in worst[:5]],
        descriptors=memory.descriptors,
    )


def _set_own_timeout(body: bytes) -> bool:
    """Whether a refusal is for a wait shorter than the server's limit, which the request itself must have set."""
    waited = re.search(rb"waited ([\d.e-]+) s in the queue", body)
    return waited is not None and float(waited[1]) < Limits().queue_seconds


async def _fuzz(
    port: int, model: str, size: int, count: int, seed: int
) -> tuple[Counter[str], list[bytes], Counter[str]]:
    grammar = Grammar(model, size, seed)
    outcomes: Counter[str] = Counter()
    worst: list[bytes] = []
    unanswered: Counter[str] = Counter()
    left = count

    async def worker() -> None:
        nonlocal left
        connection = Connection(port)
        while left > 0:
            left -= 1
            data = grammar.request()
            # The server waits for the rest of an incomplete request until its own deadline.
            answer = await connection.request(data, timeout_s=15)
            outcomes[str(answer.status) if answer.outcome == "answered" else answer.outcome] += 1
            if answer.status == 503 and _set_own_timeout(answer.body):
                outcomes["503"] -= 1
                outcomes["503 by its own timeout"] += 1
            elif answer.status >= 500:
                worst.append(data[:2000])
            elif answer.outcome != "answered":
                unanswered[data.split(b"\r\n")[0][:80].decode("latin-1")] += 1
            if answer.status in (400, 405, 411, 413, 431) or data.startswith(b"\r"):
                # After a broken request the server cannot know where the next one starts.
                connection.close()
        connection.close()

    await asyncio.gather(*(worker() for _ in range(_WORKERS)))
    return +outcomes, worst, unanswered
