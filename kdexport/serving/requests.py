"""The way of every request that runs a model: place, body, tensor, queue, answer; each timed and counted.

Request bodies: bounded while they arrive, bounded while they unpack, and given up when the client does.
"""

import asyncio
import time
import zlib
from collections.abc import Awaitable, Callable, Coroutine, MutableMapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from starlette.requests import Request
from starlette.responses import Response

from kdexport.errors import RequestError
from kdexport.serving.limits import Limits
from kdexport.serving.loading import LoadedModel
from kdexport.serving.service import Service

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


#: Below this, reading a body takes less than handing it to another thread.
INLINE_BYTES = 64 * 1024


@dataclass(slots=True)
class Stopwatch:
    """Nanoseconds of the parts of one request."""

    started: int = field(default_factory=time.monotonic_ns)
    parts: dict[str, int] = field(default_factory=dict)
    _last: int = 0

    def begin(self) -> None:
        """Start a part."""
        self._last = time.monotonic_ns()

    def end(self, part: str) -> None:
        """End the part that was started last."""
        self.parts[part] = time.monotonic_ns() - self._last

    @property
    def total(self) -> int:
        """Since the request's header."""
        return time.monotonic_ns() - self.started


@dataclass(slots=True, eq=False)
class Exchange:
    """One request for one model."""

    service: Service
    request: Request
    model: LoadedModel
    watch: Stopwatch = field(default_factory=Stopwatch)
    queue_seconds: float = 0.0

    def __post_init__(self) -> None:
        self.queue_seconds = self.service.limits.queue_seconds

    async def body(self, length: int, encoding: str | None, limit: int) -> bytes | bytearray:
        """The whole body, unpacked."""
        body = await read_body(self.request.receive, length, self.service.limits)
        self.watch.begin()
        return body if encoding is None else await self.service.off_loop(unpack, body, encoding, limit)

    async def infer(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """Logits of ``images`` through the queue; raises ``RequestError`` for one that is not finite."""
        self.watch.end("input")
        timed = await self.service.instances.run(self.model, images, self.queue_seconds, self.model.pace)
        self.watch.parts.update(
            queue=timed.queue_ns, infer=timed.compute_ns, images=len(images), together=timed.together
        )
        self.watch.begin()
        if not np.isfinite(timed.logits).all():
            self.service.metrics.not_finite.labels(self.model.name, str(self.model.version)).inc()
            raise RequestError("The model answered with NaN or infinity.", status=500, reason="not_finite")
        return timed.logits


Body = bytes | bytearray

Work = Callable[[Body], Coroutine[Any, Any, Response]]


async def answer(exchange: Exchange, limit: int, work: Work) -> Response:
    """Admit the request, read its body, await ``work(body)``, and count what came of it.

    ``limit`` is the most bytes that its body may have, packed and unpacked.
    """
    service, watch = exchange.service, exchange.watch
    statistics = service.statistics(exchange.model)
    pending = service.metrics.pending.labels(exchange.model.name, str(exchange.model.version))
    try:
        service.instances  # noqa: B018, raises before anything is read where there are none
        headers = exchange.request.headers
        encoding = require_encoding(headers.get("content-encoding"))
        length = declared_length(headers.get("content-length"), limit)
        with service.admission.enter(length if encoding is None else length + limit), pending.track_inprogress():
            response = await _within_deadline(exchange, length, encoding, limit, work)
    except RequestError as error:
        if error.status == 429 or "queue" not in watch.parts:
            service.metrics.refused.labels(error.reason).inc()
        statistics.failed(error.reason, watch.total)
        raise
    except ClientGoneError:
        statistics.failed("canceled", watch.total)
        # Nobody reads this; a server that is not told of a response would complain.
        return Response(status_code=499)
    except Exception:
        statistics.failed("internal", watch.total)
        raise
    watch.end("output")
    images, together = watch.parts.pop("images"), watch.parts.pop("together")
    statistics.succeeded(images, together, {**watch.parts, "total": watch.total})
    return response


async def _within_deadline(exchange: Exchange, length: int, encoding: str | None, limit: int, work: Work) -> Response:
    seconds = exchange.service.limits.total_seconds
    body = await exchange.body(length, encoding, limit)
    try:
        async with asyncio.timeout(seconds):
            return await unless_gone(exchange.request.receive, work(body))
    except TimeoutError:
        raise RequestError(f"The answer was not ready within {seconds:g} s.", status=504, reason="timeout") from None
