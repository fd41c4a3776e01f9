"""A request that runs a model: admission, reading its body, the queue, the response; each step timed and counted."""

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

from kdexport.backends.pixel_input import Given
from kdexport.errors import RequestError
from kdexport.serving.limits import Limits
from kdexport.serving.loading import LoadedModel
from kdexport.serving.service import Reservation, Service

#: Up to this size, reading a body takes less time than handing it to another thread.
INLINE_BYTES = 64 * 1024
#: A disconnect is watched for only after this: watching costs a task, and most responses are ready earlier.
_WATCH_AFTER_SECONDS = 0.005
#: Decimal digits of a Content-Length that are read at all.
_MAX_DIGITS = 18
#: zlib's window bits by Content-Encoding: with a gzip header, with a zlib header.
_WINDOW_BITS = {"gzip": 16 + zlib.MAX_WBITS, "x-gzip": 16 + zlib.MAX_WBITS, "deflate": zlib.MAX_WBITS}
#: The status of a request whose client closed its connection; nobody receives it.
CLIENT_CLOSED_REQUEST = 499
#: Compressed bodies are read, and decompressed, in parts of this many bytes.
_DECOMPRESSED_PART = 64 * 1024

Body = bytes | bytearray
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Work = Callable[[Body], Coroutine[Any, Any, Response]]
Result = TypeVar("Result")


class ClientDisconnectedError(Exception):
    """The client closed its connection before the response."""


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
        """Nanoseconds since the header of the request."""
        return time.monotonic_ns() - self.started


def nothing(_: int) -> None:
    """Charge nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpectedBody:
    """What the header of a request says of its body; ``limit`` bounds it compressed and decompressed."""

    #: The most bytes that may arrive: the Content-Length, or the limit without one.
    length: int
    declared: bool
    encoding: str | None
    limit: int


@dataclass(slots=True, eq=False)
class ModelRequest:
    """A request for one model, and the times that its parts took."""

    service: Service
    request: Request
    model: LoadedModel
    watch: Stopwatch = field(default_factory=Stopwatch)
    queue_seconds: float = 0.0

    def __post_init__(self) -> None:
        self.queue_seconds = self.service.limits.queue_seconds

    async def body(self, expected: "ExpectedBody", reservation: Reservation) -> Body:
        """The whole body, decompressed; bytes that were not declared are charged to ``reservation`` as they arrive."""
        arrived = nothing if expected.declared else reservation.charge
        body = await read_body(self.request.receive, expected.length, self.service.limits, arrived)
        self.watch.begin()
        if expected.encoding is None:
            return body
        return await self.service.off_loop(decompress, body, expected.encoding, expected.limit, reservation.charge)

    async def infer(self, images: Given) -> NDArray[np.float32]:
        """Logits of ``images`` through the queue; raises ``RequestError`` if a logit is not finite."""
        self.watch.end("input")
        timed = await self.service.instances.run(self.model, images, self.queue_seconds, self.model.pace)
        self.watch.parts.update(
            queue=timed.queue_ns, infer=timed.compute_ns, images=len(images), together=timed.together
        )
        self.watch.begin()
        if not np.isfinite(timed.logits).all():
            self.service.metrics.not_finite.labels(self.model.name, str(self.model.version)).inc()
            raise RequestError(
                "The model computed NaN or infinity for this input.",
                remedy="Check that the input is normalised as the bundle's manifest.json requires.",
                status=500,
                reason="not_finite",
            )
        return timed.logits


async def respond(run: ModelRequest, limit: int, work: Work) -> Response:
    """Admit the request, read its body, await ``work(body)``, and count the outcome.

    ``limit`` is the most bytes that its body may have, compressed and decompressed.
    """
    service, watch = run.service, run.watch
    statistics = service.statistics(run.model)
    try:
        service.instances  # noqa: B018, raises before anything is read if the server has not started
        headers = run.request.headers
        expected = ExpectedBody(
            length=declared_length(headers.get("content-length"), limit),
            declared="content-length" in headers,
            encoding=require_encoding(headers.get("content-encoding")),
            limit=limit,
        )
        reserved = expected.length if expected.declared else 0
        with service.admission.enter(reserved) as reservation, statistics.in_progress():
            response = await _within_deadline(run, expected, reservation, work)
    except RequestError as error:
        if error.status == 429 or "queue" not in watch.parts:
            service.metrics.refused.labels(error.reason).inc()
        statistics.failed(error.reason, watch.total)
        raise
    except ClientDisconnectedError:
        statistics.failed("canceled", watch.total)
        # No client receives this; without a response the ASGI server would log an error.
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    except Exception:
        statistics.failed("internal", watch.total)
        raise
    watch.end("output")
    images, together = watch.parts.pop("images"), watch.parts.pop("together")
    statistics.succeeded(images, together, {**watch.parts, "total": watch.total})
    return response


async def _within_deadline(run: ModelRequest, expected: ExpectedBody, reservation: Reservation, work: Work) -> Response:
    seconds = run.service.limits.total_seconds
    body = await run.body(expected, reservation)
    try:
        async with asyncio.timeout(seconds):
            return await cancel_on_disconnect(run.request.receive, work(body))
    except TimeoutError:
        raise RequestError(
            f"The response was not ready within {seconds:g} s.",
            remedy="Send fewer images in one request, or retry later.",
            status=504,
            reason="timeout",
        ) from None


def declared_length(value: str | None, limit: int) -> int:
    """Bytes that the body may have: its Content-Length, or ``limit`` if it has none; 413 above the limit."""
    if value is None:
        return limit
    if not (value.isascii() and value.isdigit()) or len(value) > _MAX_DIGITS:
        raise RequestError(f"Content-Length is {value[:40]!r}, not a number of bytes.")
    if int(value) > limit:
        raise too_large(int(value), limit)
    return int(value)


def too_large(size: int, limit: int) -> RequestError:
    """413 with both numbers."""
    return RequestError(
        f"The body has {size:,} bytes (up to {limit:,} allowed).",
        remedy="Send less in one request.",
        status=413,
        reason="too_large",
    )


async def read_body(receive: Receive, length: int, limits: Limits, arrived: Callable[[int], None] = nothing) -> Body:
    """Up to ``length`` bytes; 413 beyond, 408 if they take too long. Raises ``ClientDisconnectedError``.

    ``arrived`` is called with the size of each part before it is stored, and may refuse it.
    """
    try:
        async with asyncio.timeout(limits.body_seconds):
            message = await receive()
            if message["type"] == "http.request" and not message.get("more_body"):
                whole = _require(message.get("body", b""), length)
                arrived(len(whole))
                return whole
            body, chunks = bytearray(), 0
            while True:
                if message["type"] != "http.request":
                    raise ClientDisconnectedError
                part = message.get("body", b"")
                if len(body) + len(part) > length:
                    raise too_large(len(body) + len(part), length)
                arrived(len(part))
                body += part
                chunks += 1
                if chunks > limits.chunks:
                    raise RequestError(
                        f"The body arrived in more than {limits.chunks:,} chunks.",
                        remedy="Send larger chunks, or a Content-Length.",
                        status=413,
                        reason="too_large",
                    )
                if not message.get("more_body"):
                    return body
                message = await receive()
    except TimeoutError:
        raise RequestError(
            f"The body did not arrive within {limits.body_seconds:g} s.",
            remedy="Send it again, over a faster connection or smaller.",
            status=408,
            reason="body_timeout",
        ) from None


def _require(body: Body, length: int) -> Body:
    if len(body) > length:
        raise too_large(len(body), length)
    return body


def require_encoding(value: str | None) -> str | None:
    """``gzip``, ``deflate`` or None for identity; 415 for anything else, several encodings included."""
    name = (value or "identity").strip().lower()
    if name == "identity":
        return None
    if name not in _WINDOW_BITS:
        raise RequestError(
            f"Content-Encoding {name[:40]!r} is not supported.", remedy="Use gzip, deflate or none.", status=415
        )
    return name


def decompress(body: Body, encoding: str, limit: int, charge: Callable[[int], None] = nothing) -> Body:
    """Decompress ``body`` into at most ``limit`` bytes; 413 beyond, 400 for damaged or trailing data.

    ``charge`` is called with the size of each part before it is stored, and may refuse it.
    """
    decompressor = zlib.decompressobj(_WINDOW_BITS[encoding])
    data, view = bytearray(), memoryview(body)
    try:
        for start in range(0, len(view), _DECOMPRESSED_PART):
            compressed: bytes | memoryview = view[start : start + _DECOMPRESSED_PART]
            while part := decompressor.decompress(compressed, _DECOMPRESSED_PART):
                if len(data) + len(part) > limit:
                    raise RequestError(
                        f"The body decompresses to more than {limit:,} bytes.",
                        remedy="Send less in one request.",
                        status=413,
                        reason="too_large",
                    )
                charge(len(part))
                data += part
                compressed = decompressor.unconsumed_tail
            if decompressor.eof:
                break
    except zlib.error:
        raise RequestError(
            f"The body is not valid {encoding}.", remedy="Compress it again, or omit Content-Encoding."
        ) from None
    # Nothing of the body may follow the stream, neither in the part where it ended nor after that part.
    if not decompressor.eof or decompressor.unused_data or start + _DECOMPRESSED_PART < len(view):
        raise RequestError(
            f"The body is not exactly one complete {encoding} stream.", remedy="Send one stream and nothing after it."
        )
    return data


async def cancel_on_disconnect(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """Await ``work``; cancel it and raise ``ClientDisconnectedError`` if the client closes its connection."""
    loop, worker = asyncio.get_running_loop(), asyncio.current_task()
    assert worker is not None
    watch = _DisconnectWatch(receive, worker)
    timer = loop.call_later(_WATCH_AFTER_SECONDS, watch.begin)
    try:
        return await work
    except asyncio.CancelledError:
        if not watch.disconnected:
            raise
        worker.uncancel()
        raise ClientDisconnectedError from None
    finally:
        timer.cancel()
        watch.end()


class _DisconnectWatch:
    """Cancels ``worker`` when the client disconnects, and never after ``end``."""

    def __init__(self, receive: Receive, worker: "asyncio.Task[Any]") -> None:
        self._receive = receive
        self._worker = worker
        self._task: asyncio.Task[None] | None = None
        self._ended = False
        self.disconnected = False

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
            self.disconnected = True
            self._worker.cancel()
