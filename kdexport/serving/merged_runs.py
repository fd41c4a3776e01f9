"""The short way of plain requests to a quick model: those that arrive in one turn of the event loop share one run.

It is below the application, its tasks and threads, which together take longer than such a model. Whatever is unusual
about a request or its result is left to the application, which then starts from the bytes of the request.
"""

import asyncio
import functools
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from starlette.responses import Response

from kdexport.backends.pixel_input import Given
from kdexport.data.exif_and_alpha import ImageFacts
from kdexport.errors import RequestError
from kdexport.serving.access_log import AccessLog
from kdexport.serving.endpoints import infer_response, predictions_of, queried_model, read_top
from kdexport.serving.images import decode_small
from kdexport.serving.loading import LoadedModel
from kdexport.serving.metrics import ModelStatistics
from kdexport.serving.plain_jpeg import plain_jpeg
from kdexport.serving.plain_requests import PlainHead, PlainHeads
from kdexport.serving.request_identity import REQUEST_ID, identity_of, log_entry
from kdexport.serving.requests import CLIENT_CLOSED_REQUEST
from kdexport.serving.service import Reservation, Service
from kdexport.serving.wire import (
    HEADER_LENGTH,
    InferRequest,
    all_finite,
    as_images,
    only_binary_logits,
    read_header,
    read_images,
    read_request,
)

#: The longest JSON header that is remembered, and how many are.
_MAX_JSON = 1024
_MAX_KNOWN = 256
_JSON = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))
_OK = 200
_IDENTITY = b"%%s%s: %%s\r\n" % REQUEST_ID.encode()

#: The lines of a response's header, and its body.
Answer = tuple[bytes, bytes]
Write = Callable[[NDArray[np.float32]], Answer]


class Client(Protocol):
    """A connection whose plain request waits for its run."""

    @property
    def host(self) -> str | None:
        """The address of the client."""
        ...

    @property
    def is_gone(self) -> bool:
        """Whether nobody waits for the response."""
        ...

    def answer(self, lines: bytes, body: bytes) -> None:
        """Send a response with status 200 and these lines of its header."""
        ...

    def give_back(self, data: bytes) -> None:
        """Let the application answer the request, whose bytes are ``data``."""
        ...


@dataclass(slots=True, eq=False)
class _Read:
    """What a body holds: images, how their logits are written, and what was seen of an upload."""

    images: Given
    write: Write
    facts: list[ImageFacts]


@dataclass(slots=True, eq=False)
class _Waiting:
    """An admitted request; ``data`` are all its bytes, and times are nanoseconds of the monotonic clock."""

    client: Client
    head: PlainHead
    data: bytes
    model: LoadedModel
    read: _Read
    statistics: ModelStatistics
    reservation: Reservation
    began_ns: int
    queued_ns: int


@dataclass(frozen=True, slots=True)
class _KnownHeader:
    """The JSON of a binary request; if only the logits differ between its responses, also what is the same in them."""

    request: InferRequest
    same: Answer | None = None
    #: The size of a tensor of bytes after the JSON, and its shape; another size is an error or JSON data.
    tensor_bytes: int = -1
    shape: tuple[int, ...] = ()


class _UnusualError(Exception):
    """The request is for the application."""


class MergedRuns:
    """Accepts plain requests, and runs those of one model together at the end of the turn in which they arrived."""

    def __init__(self, service: Service, log: AccessLog | None = None) -> None:
        self.heads = PlainHeads()
        self._service = service
        self._log = log
        self._waiting: list[_Waiting] = []
        self._scheduled = False
        # By the digest of the bundle, not by the model, which would stay in memory after a reload.
        self._headers: dict[tuple[str, int, str, bytes], _KnownHeader] = {}

    def accept(self, client: Client, head: PlainHead, data: bytes) -> bool:
        """Check and admit the request whose bytes are ``data``; False if the application must answer it."""
        began = time.monotonic_ns()
        service = self._service
        try:
            service.authorise(head.authorization)
            model = self._model(head)
            if not service.instances.inline_allowed or not _is_quick(model, 1):
                return False
            reservation = service.admission.open(head.length)
        except RequestError:
            return False
        try:
            read = self._read_image(model, head, data) if head.model is None else self._read_tensor(model, head, data)
        except (RequestError, _UnusualError):
            service.admission.close(reservation)
            return False
        statistics = service.statistics(model)
        statistics.begin()
        queued = time.monotonic_ns()
        self._waiting.append(_Waiting(client, head, data, model, read, statistics, reservation, began, queued))
        self._schedule()
        return True

    def _model(self, head: PlainHead) -> LoadedModel:
        repository = self._service.repository
        return (
            queried_model(repository, head.query) if head.model is None else repository.find(head.model, head.version)
        )

    def _read_tensor(self, model: LoadedModel, head: PlainHead, data: bytes) -> _Read:
        limits, length, signature = self._service.limits, head.header_length, model.signature
        # Plain bodies are shorter than the other bounds on a body, which include that of a header.
        if head.length > limits.body:
            raise _UnusualError
        if length and length <= min(head.length, _MAX_JSON):
            start = head.size + length
            known = self._known_header(model, data[head.size : start])
            if len(data) - start == known.tensor_bytes:
                images = as_images(np.frombuffer(data, signature.dtype, -1, start), known.shape, signature)
            else:
                images = read_images(known.request, memoryview(data)[start:], signature)
        else:
            parsed = read_request(data[head.size :], length, signature, limits)
            known, images = _KnownHeader(parsed.header), parsed.images
        if known.request.parameters.timeout or not _is_quick(model, len(images)):
            raise _UnusualError
        return _Read(images, functools.partial(_write_tensor, known, model), [])

    def _known_header(self, model: LoadedModel, raw: bytes) -> _KnownHeader:
        key = (model.name, model.version, model.digest, raw)
        known = self._headers.get(key)
        if known is None:
            known = _known_header(read_header(raw, model.signature, self._service.limits), model)
            if len(self._headers) >= _MAX_KNOWN:
                self._headers.clear()
            self._headers[key] = known
        return known

    def _read_image(self, model: LoadedModel, head: PlainHead, data: bytes) -> _Read:
        top, upload, limits = read_top(head.query.get("top"), model), data[head.size :], self._service.limits
        size = plain_jpeg(upload)
        if size is None or not (size.one_scan and size.is_small) or len(upload) > limits.body:
            raise _UnusualError
        facts: list[ImageFacts] = []
        pixels = decode_small(upload, size, model.manifest.spec.preprocessing, limits, facts.append)
        return _Read(model.tensor(pixels), functools.partial(_write_labels, top, model), facts)

    def _schedule(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self._run_next)

    def _run_next(self) -> None:
        """One run, so that the event loop serves others before the next one."""
        self._scheduled = False
        batch = [waiting for waiting in self._take_batch() if self._is_wanted(waiting)]
        if batch:
            self._run(batch)
        if self._waiting:
            self._schedule()

    def _take_batch(self) -> list[_Waiting]:
        """The longest waiting request, and those of the same model that fit into its run."""
        first = self._waiting[0]
        allowed = max(first.model.pace.inline_images, len(first.read.images))
        batch, rest, images = [], [], 0
        for waiting in self._waiting:
            more = images + len(waiting.read.images)
            if waiting.model is first.model and more <= allowed:
                batch.append(waiting)
                images = more
            else:
                rest.append(waiting)
        self._waiting = rest
        return batch

    def _is_wanted(self, waiting: _Waiting) -> bool:
        """Whether the request is to be run: its client is there, and it did not wait too long."""
        if waiting.client.is_gone:
            self._release(waiting)
            spent = time.monotonic_ns() - waiting.began_ns
            waiting.statistics.failed("canceled", spent)
            self._write_log(waiting, identity_of(waiting.head.fields), CLIENT_CLOSED_REQUEST, 0)
            return False
        if time.monotonic_ns() - waiting.queued_ns > self._service.limits.queue_seconds * 1e9:
            self._give_back(waiting)
            return False
        return True

    def _run(self, batch: list[_Waiting]) -> None:
        images = [waiting.read.images for waiting in batch]
        model, queued = batch[0].model, batch[0].queued_ns
        try:
            instances = self._service.instances
            timed = instances.run_inline(model, images[0] if len(images) == 1 else np.concatenate(images), queued)
        # The application runs each request alone, and answers and logs what fails.
        except Exception:  # noqa: BLE001
            for waiting in batch:
                self._give_back(waiting)
            return
        finite = all_finite(timed.logits)
        first, answered, times = 0, [], []
        for waiting in batch:
            last = first + len(waiting.read.images)
            if finite or all_finite(timed.logits[first:last]):
                answered.append(len(waiting.read.images))
                times.append(self._answer(waiting, timed.logits[first:last], queued + timed.queue_ns, timed.compute_ns))
            else:
                self._give_back(waiting)
            first = last
        if answered:
            batch[0].statistics.succeeded_together(answered, timed.together, times)

    def _answer(
        self, waiting: _Waiting, logits: NDArray[np.float32], started_ns: int, compute_ns: int
    ) -> dict[str, int]:
        """Send the response; returns the times of the request's parts."""
        lines, body = waiting.read.write(logits)
        identity = identity_of(waiting.head.fields)
        self._release(waiting)
        for facts in waiting.read.facts:
            waiting.statistics.uploaded(facts)
        waiting.client.answer(_IDENTITY % (lines, identity.encode()), body)
        self._write_log(waiting, identity, _OK, len(body))
        ended = time.monotonic_ns()
        return {
            "input": waiting.queued_ns - waiting.began_ns,
            "queue": started_ns - waiting.queued_ns,
            "infer": compute_ns,
            "output": ended - started_ns - compute_ns,
            "total": ended - waiting.began_ns,
        }

    def _give_back(self, waiting: _Waiting) -> None:
        self._release(waiting)
        waiting.client.give_back(waiting.data)

    def _release(self, waiting: _Waiting) -> None:
        self._service.admission.close(waiting.reservation)
        waiting.statistics.end()

    def _write_log(self, waiting: _Waiting, identity: str, status: int, size: int) -> None:
        if self._log is None:
            return
        head, seconds = waiting.head, (time.monotonic_ns() - waiting.began_ns) / 1e9
        self._log.write(
            log_entry(
                head.fields, identity, client=waiting.client.host, method="POST", path=head.path, status=status,
                size=size, seconds=seconds,
            )
        )  # fmt: skip


def _is_quick(model: LoadedModel, images: int) -> bool:
    return images <= model.pace.inline_images or model.pace.quick(images)


def _known_header(header: InferRequest, model: LoadedModel) -> _KnownHeader:
    tensor, same = header.inputs[0], None
    size = model.signature.dtype.itemsize * math.prod(tensor.shape)
    follows = tensor.data is None and tensor.parameters.binary_data_size == size
    if only_binary_logits(header, model.signature):
        logits = np.zeros((tensor.shape[0], len(model.signature.classes)), np.float32)
        response = infer_response(header, logits, model)
        lines, body = _answer_of(response)
        same = lines, body[: int(response.headers[HEADER_LENGTH])]
    return _KnownHeader(header, same, size if follows else -1, tuple(tensor.shape))


def _write_tensor(known: _KnownHeader, model: LoadedModel, logits: NDArray[np.float32]) -> Answer:
    if known.same is None:
        return _answer_of(infer_response(known.request, logits, model))
    lines, text = known.same
    return lines, text + logits.astype("<f4", copy=False).tobytes()


def _write_labels(top: int, model: LoadedModel, logits: NDArray[np.float32]) -> Answer:
    # As JSONResponse writes it, in half of the time.
    body = _JSON.encode(predictions_of(logits[0], top, model)).encode()
    return b"content-length: %d\r\ncontent-type: application/json\r\n" % len(body), body


def _answer_of(response: Response) -> Answer:
    return b"".join(b"%s: %s\r\n" % pair for pair in response.raw_headers), bytes(response.body)
