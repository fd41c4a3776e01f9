"""Request bodies: bounded while they arrive, bounded while they unpack, and given up when the client does."""

import asyncio
import zlib
from collections.abc import Awaitable, Callable, Coroutine, MutableMapping
from typing import Any, TypeVar

from kdexport.serving.errors import RequestError
from kdexport.serving.limits import Limits

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Result = TypeVar("Result")

_WATCH_AFTER_SECONDS = 0.005

#: zlib's window bits: with a gzip header, with a zlib header.
_WINDOWS = {"gzip": 16 + zlib.MAX_WBITS, "x-gzip": 16 + zlib.MAX_WBITS, "deflate": zlib.MAX_WBITS}


class ClientGoneError(Exception):
    """The client closed its connection; nobody waits for an answer."""


def declared_length(value: str | None, limit: int) -> int:
    """Bytes that a request may bring: its Content-Length, or ``limit`` where it has none; 413 above the limit."""
    if value is None:
        return limit
    if not (value.isascii() and value.isdigit()) or len(value) > 18:
        raise RequestError("Content-Length is not a number.")
    if int(value) > limit:
        raise too_large(int(value), limit)
    return int(value)


def too_large(size: int, limit: int) -> RequestError:
    """413 with both numbers."""
    return RequestError(f"The body has {size:,} bytes (up to {limit:,} allowed).", status=413, reason="too_large")


async def read_body(receive: Receive, length: int, limits: Limits) -> bytes | bytearray:
    """Up to ``length`` bytes; 413 beyond, 408 where they take too long. Raises ``ClientGoneError``."""
    try:
        async with asyncio.timeout(limits.body_seconds):
            message = await receive()
            if message["type"] == "http.request" and not message.get("more_body"):
                return _require(message.get("body", b""), length)
            body, chunks = bytearray(), 0
            while True:
                if message["type"] != "http.request":
                    raise ClientGoneError
                body += message.get("body", b"")
                chunks += 1
                _require(body, length)
                if chunks > limits.chunks:
                    raise RequestError(
                        f"The body came in more than {limits.chunks:,} chunks.", status=413, reason="too_large"
                    )
                if not message.get("more_body"):
                    return body
                message = await receive()
    except TimeoutError:
        raise RequestError(
            f"The body did not arrive within {limits.body_seconds:g} s.", status=408, reason="body_timeout"
        ) from None


def _require(body: bytes | bytearray, length: int) -> bytes | bytearray:
    if len(body) > length:
        raise too_large(len(body), length)
    return body


def require_encoding(value: str | None) -> str | None:
    """``gzip``, ``deflate`` or None for identity; 415 for anything else, several at once included."""
    name = (value or "identity").strip().lower()
    if name == "identity":
        return None
    if name not in _WINDOWS:
        raise RequestError(f"Content-Encoding {name[:40]!r} is not served.", remedy="gzip and deflate are.", status=415)
    return name


def unpack(body: bytes | bytearray, encoding: str, limit: int) -> bytes:
    """Decompress ``body`` into at most ``limit`` bytes; 413 beyond, 400 for damaged or trailing data."""
    unpacker = zlib.decompressobj(_WINDOWS[encoding])
    try:
        data = unpacker.decompress(body, limit + 1)
    except zlib.error as error:
        raise RequestError(f"The body is not valid {encoding}: {error}.") from None
    if len(data) > limit:
        raise RequestError(f"The body unpacks to more than {limit:,} bytes.", status=413, reason="too_large")
    if not unpacker.eof or unpacker.unused_data or unpacker.unconsumed_tail:
        raise RequestError(f"The body is not one whole {encoding} stream.")
    return data


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """Await ``work``, and cancel it with ``ClientGoneError`` when the client closes its connection.

    Watching costs a task, and most answers are there before it is worth one.
    """
    loop, worker = asyncio.get_running_loop(), asyncio.current_task()
    assert worker is not None
    watch = _Watch(receive, worker)
    timer = loop.call_later(_WATCH_AFTER_SECONDS, watch.begin)
    try:
        return await work
    except asyncio.CancelledError:
        if not watch.left:
            raise
        worker.uncancel()
        raise ClientGoneError from None
    finally:
        timer.cancel()
        watch.end()


class _Watch:
    """Cancels ``worker`` when the client leaves, and never after ``end``."""

    def __init__(self, receive: Receive, worker: "asyncio.Task[Any]") -> None:
        self._receive = receive
        self._worker = worker
        self._task: asyncio.Task[None] | None = None
        self._ended = False
        self.left = False

    def begin(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._watch())

    def end(self) -> None:
        self._ended = True
        if self._task is not None:
            self._task.cancel()

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            continue
        if not self._ended:
            self.left = True
            self._worker.cancel()
