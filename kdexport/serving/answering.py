"""The way of every request that runs a model: place, body, tensor, queue, answer; each timed and counted."""

import asyncio
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from starlette.requests import Request
from starlette.responses import Response

from kdexport.serving.body import ClientGoneError, declared_length, read_body, require_encoding, unless_gone, unpack
from kdexport.serving.errors import RequestError
from kdexport.serving.loading import LoadedModel
from kdexport.serving.service import Service

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
