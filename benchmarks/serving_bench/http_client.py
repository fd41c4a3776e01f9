"""A small HTTP/1.1 client on raw sockets that reports the outcome of each request and can send invalid ones."""

import asyncio
import contextlib
from dataclasses import dataclass
from typing import Literal

from serving_bench.payloads import Payload

Outcome = Literal["answered", "refused connection", "broken", "late"]


@dataclass(frozen=True, slots=True)
class Answer:
    """The outcome of one request; ``closing`` if the server announced that it closes the connection."""

    outcome: Outcome
    status: int = 0
    body: bytes = b""
    closing: bool = False


def encode(payload: Payload, *, method: str = "POST", host: str = "localhost") -> bytes:
    """A complete request with its Content-Length."""
    lines = [f"{method} {payload.path} HTTP/1.1", f"Host: {host}", f"Content-Length: {len(payload.body)}"]
    lines += [f"{name}: {value}" for name, value in payload.headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + payload.body


class Connection:
    """One keep-alive connection."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def request(self, data: bytes, timeout_s: float = 30.0) -> Answer:
        """Send ``data`` and read one response; connects first if there is no connection."""
        if self._writer is None or self._reader is None:
            try:
                self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port, limit=2**20)
            except OSError:
                return Answer("refused connection")
        reader, writer = self._reader, self._writer
        # A server may answer before it has read the body, so reading and writing happen at the same time.
        sending = asyncio.ensure_future(_send(writer, data))
        try:
            answer = await asyncio.wait_for(_read(reader, bodiless=data.startswith(b"HEAD ")), timeout_s)
        except TimeoutError:
            answer = Answer("late")
        except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, ValueError):
            answer = Answer("broken")
        sent = sending.done()
        sending.cancel()
        with contextlib.suppress(asyncio.CancelledError, OSError):
            await sending
        if answer.outcome != "answered" or answer.closing or not sent:
            self.close()
        return answer

    def close(self) -> None:
        """Close the connection; the next request opens another."""
        if self._writer is not None:
            self._writer.close()
        self._reader = self._writer = None


async def _send(writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(data)
    with contextlib.suppress(OSError):
        await writer.drain()


async def _read(reader: asyncio.StreamReader, *, bodiless: bool) -> Answer:
    status, fields = await _head(reader)
    while 100 <= status < 200:
        status, fields = await _head(reader)
    if bodiless or status in (204, 304):
        body = b""
    elif fields.get("transfer-encoding", "").lower() == "chunked":
        parts = []
        while size := int(await reader.readuntil(b"\r\n"), 16):
            parts.append((await reader.readexactly(size + 2))[:-2])
        await reader.readuntil(b"\r\n")
        body = b"".join(parts)
    else:
        body = await reader.readexactly(int(fields.get("content-length", "0")))
    return Answer("answered", status, body, fields.get("connection", "").lower() == "close")


async def _head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    first, *rest = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    fields = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in rest if line)}
    return int(first.split()[1]), fields
