"""Slow headers, slow bodies and slow readers on many connections, with health probes from a separate process."""

import asyncio
import contextlib
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

from serving_bench.http_client import encode
from serving_bench.payloads import Payload
from serving_bench.process import running
from serving_bench.records import Records
from serving_bench.servers import Arm

MODES = ("header", "body", "reader")
_LONG_ANSWER = b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n"
_PROBE = Path(__file__).with_name("probe.py")


def slow(arm: Arm, records: Records, *, connections: int, seconds: float, logs: Path) -> None:
    """Run each mode against a server with 1024 file descriptors; record the share of probes answered within 2 s."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, connections + 512), hard))
    for mode in MODES:
        with running(arm.command, logs / "slow.log", descriptors=1024) as server:
            payload = arm.payloads["FP32 binary"]()
            probe = subprocess.Popen(
                [sys.executable, str(_PROBE), str(server.port), str(seconds)], stdout=subprocess.PIPE, text=True
            )
            opened = asyncio.run(_attack(mode, server.port, payload, connections, seconds))
            out, _ = probe.communicate(timeout=seconds + 60)
            memory = server.memory()
            after = server.answers("/v2/health/live", timeout_s=5)
        answered = json.loads(out)
        records.add(
            "slow", arm=arm.name, mode=mode, connections=connections, opened=opened, probes=answered["probes"],
            answered=answered["answered"], share=answered["answered"] / answered["probes"], alive_after=after,
            peak_mb=memory.peak_mb, descriptors=memory.descriptors,
        )  # fmt: skip


async def _attack(mode: str, port: int, payload: Payload, connections: int, seconds: float) -> int:
    """Run ``connections`` slow clients that reconnect when they are closed; returns the number of connections."""
    data = encode(payload)
    deadline = time.monotonic() + seconds
    opened = 0

    async def client(index: int) -> None:
        nonlocal opened
        await asyncio.sleep(index / connections)
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError, TimeoutError):
                reader, writer = await asyncio.wait_for(asyncio.open_connection("127.0.0.1", port, limit=1024), 5)
                opened += 1
                try:
                    await _trickle(mode, data, reader, writer, deadline)
                finally:
                    writer.close()
            await asyncio.sleep(0.2)

    await asyncio.gather(*(client(index) for index in range(connections)))
    return opened


async def _trickle(
    mode: str, data: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, deadline: float
) -> None:
    head = data.index(b"\r\n\r\n") + 4
    position = 1 if mode == "header" else head
    if mode == "reader":
        # Small requests with long responses, ten at a time, without reading the responses.
        while time.monotonic() < deadline and not writer.is_closing():
            writer.write(_LONG_ANSWER * 10)
            await asyncio.wait_for(writer.drain(), max(0.1, deadline - time.monotonic()))
            await asyncio.sleep(1)
        return
    writer.write(data[:position])
    while time.monotonic() < deadline and not writer.is_closing() and not reader.at_eof():
        writer.write(data[position : position + 1])
        position += 1
        await asyncio.sleep(1)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(reader.read(1024), 0.01)
