"""A bounded queue in front of N onnxruntime instances, and the batch size with which each model runs fastest.

Instances are threads, because ``session.run`` releases the interpreter's lock. All of them share one session per model:
onnxruntime runs it from several threads at once, and its weights are in memory only once. All counting happens on the
event loop's thread.
"""

import asyncio
import functools
import math
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from kdexport.backends.ort import CPU, OrtModel
from kdexport.backends.pixel_input import Given
from kdexport.errors import RequestError
from kdexport.serving.wire import Signature

Logits = NDArray[np.float32]

#: The longest run of one request on the event loop: two hand-overs between threads take about half of it.
_INLINE_SECONDS = 0.001
#: The longest run of several requests there: until it ends, the event loop answers nobody.
_MERGED_SECONDS = 0.002
#: After a run on the event loop that took longer than this, models run in threads for a while.
_LONG_INLINE_SECONDS = 0.01
_LONG_INLINE_PAUSE_SECONDS = 0.1
#: A larger batch is chosen only if it is at least this much faster per image; a smaller gain only adds waiting.
_MIN_SPEEDUP = 1.05
#: Each size is timed this often, and quick ones until this many seconds have passed. The quickest run counts, because
#: other processes can only make a run slower.
_TIMED_RUNS = 5
_TIMED_SECONDS = 0.04
_MAX_TIMED_BATCH = 64


class Runnable(Protocol):
    """A model that an instance can run."""

    def logits(self, images: Given) -> Logits:
        """n images, each as the signature of the model says, to (n,K) float32."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Pace:
    """How fast a model runs on this machine: ``seconds`` for one image, and the best batch size ``together``.

    ``inline_images`` is the most images that are merged into a run on the event loop; 0 for a slow model.
    """

    seconds: float
    together: int
    inline_images: int = 0

    def quick(self, images: int) -> bool:
        """Whether running ``images`` on the event loop is faster than handing them to a thread and back."""
        return self.seconds * images <= _INLINE_SECONDS


#: For a model that was not timed: each request runs alone, in a thread.
UNKNOWN_PACE = Pace(seconds=math.inf, together=1)


@dataclass(frozen=True, slots=True, eq=False)
class Timed:
    """Logits (n,K), nanoseconds in the queue and in the model, and the size of the batch that they were part of."""

    logits: Logits
    queue_ns: int
    compute_ns: int
    together: int


@dataclass(slots=True, eq=False)
class _Job:
    model: Runnable
    images: Given
    future: "asyncio.Future[Timed]"
    queued_ns: int
    together: int
    lock: threading.Lock = field(default_factory=threading.Lock)
    taken: bool = False

    def take(self) -> bool:
        """Claim the job to run or to cancel it; only the first caller gets True."""
        with self.lock:
            if self.taken:
                return False
            self.taken = True
            return True


class Instances:
    """``count`` threads that run jobs first in, first out, and jobs of one model together if that is faster."""

    def __init__(self, count: int, *, capacity: int) -> None:
        self.count = count
        self._capacity = capacity
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._pending = 0
        self._inline_again = 0.0
        self._threads = [threading.Thread(target=self._work, name=f"instance-{n}", daemon=True) for n in range(count)]
        for thread in self._threads:
            thread.start()

    @property
    def pending(self) -> int:
        """The number of jobs that wait or run."""
        return self._pending

    async def run(self, model: Runnable, images: Given, queue_seconds: float, pace: Pace = UNKNOWN_PACE) -> Timed:
        """Logits of ``images``; raises ``RequestError`` if the queue is full or the wait too long.

        A cancelled call leaves the queue at once; a job that already runs is finished and its result dropped. A quick
        model runs on the event loop if no other request is pending.
        """
        if self._pending >= self._capacity:
            raise RequestError(
                f"The queue is full: {self._pending} requests run or wait (limit {self._capacity}).",
                remedy="Retry later.",
                status=429,
                reason="queue",
            )
        queued_ns = time.monotonic_ns()
        self._pending += 1
        try:
            if self.inline_allowed and pace.quick(len(images)):
                # Let requests that arrived at the same time reach the queue.
                await asyncio.sleep(0)
                if time.monotonic_ns() - queued_ns > queue_seconds * 1e9:
                    raise _queue_timeout(queue_seconds)
                if self._pending == 1:
                    return self.run_inline(model, images, queued_ns)
            return await self._in_thread(model, images, queue_seconds, queued_ns, pace.together)
        finally:
            self._pending -= 1

    @property
    def inline_allowed(self) -> bool:
        """Whether models may run on the event loop now: not for a while after a run that took much too long."""
        return time.monotonic() >= self._inline_again

    def run_inline(self, model: Runnable, images: Given, queued_ns: int) -> Timed:
        """Run a quick model in the thread of the caller, that of the event loop."""
        started = time.monotonic_ns()
        try:
            logits = model.logits(images)
        finally:
            ended = time.monotonic_ns()
            if ended - started > _LONG_INLINE_SECONDS * 1e9:
                # Values near zero, for example, make some processors a hundred times slower.
                self._inline_again = ended / 1e9 + _LONG_INLINE_PAUSE_SECONDS
        return Timed(logits, started - queued_ns, ended - started, len(images))

    async def _in_thread(
        self, model: Runnable, images: Given, queue_seconds: float, queued_ns: int, together: int
    ) -> Timed:
        loop = asyncio.get_running_loop()
        job = _Job(model, images, loop.create_future(), queued_ns, together)
        timer = loop.call_later(queue_seconds, _cancel_job, job, queue_seconds)
        try:
            self._jobs.put(job)
            return await job.future
        finally:
            timer.cancel()
            job.take()

    def close(self) -> None:
        """Finish the jobs in the queue and end the threads."""
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        next_job: _Job | None = None
        while True:
            job = next_job or self._jobs.get()
            next_job = None
            if job is None:
                return
            if not job.take():
                continue
            batch = [job]
            if job.together > 1:
                next_job = self._gather(batch)
            _run(batch)

    def _gather(self, batch: list[_Job]) -> _Job | None:
        """Add waiting jobs of the same model, without waiting for more; returns the first that does not fit."""
        images = len(batch[0].images)
        while images < batch[0].together:
            try:
                job = self._jobs.get_nowait()
            except queue.Empty:
                return None
            if job is None:
                self._jobs.put(None)
                return None
            if job.model is not batch[0].model or images + len(job.images) > batch[0].together:
                return job
            if job.take():
                batch.append(job)
                images += len(job.images)
        return None


def _cancel_job(job: _Job, seconds: float) -> None:
    if job.take() and not job.future.done():
        job.future.set_exception(_queue_timeout(seconds))


def _queue_timeout(seconds: float) -> RequestError:
    return RequestError(
        f"The request waited {seconds:g} s in the queue, the longest wait allowed.",
        remedy="Retry later, or allow a longer wait in the parameter timeout.",
        status=503,
        reason="queue_timeout",
    )


def _run(batch: list[_Job]) -> None:
    started = time.monotonic_ns()
    images = batch[0].images if len(batch) == 1 else np.concatenate([job.images for job in batch])
    try:
        logits = batch[0].model.logits(images)
    # An error of onnxruntime fails the jobs of this batch only; the instance keeps running.
    except Exception as error:  # noqa: BLE001
        for job in batch:
            _resolve(job, functools.partial(job.future.set_exception, error))
        return
    spent, first = time.monotonic_ns() - started, 0
    for job in batch:
        last = first + len(job.images)
        timed = Timed(logits[first:last], started - job.queued_ns, spent, len(images))
        _resolve(job, functools.partial(job.future.set_result, timed))
        first = last


def _resolve(job: _Job, action: Callable[[], None]) -> None:
    """Set the result of the job's future on the event loop."""

    def resolve() -> None:
        if not job.future.done():
            action()

    try:
        job.future.get_loop().call_soon_threadsafe(resolve)
    except RuntimeError:
        # The event loop was closed while the model ran, and its requests with it.
        return


def measure_pace(model: OrtModel, provider: str, signature: Signature) -> Pace:
    """Time runs of 1, 2, 4, ... images, until doubling the batch gains too little."""
    largest = min(_MAX_TIMED_BATCH, signature.max_batch)
    times = {1: _quickest_seconds(model, 1, signature)}
    while (size := 2 * max(times)) <= largest and choose_batch(times) == max(times):
        times[size] = _quickest_seconds(model, size, signature)
    together = choose_batch(times)
    if provider != CPU:
        # A model on a GPU never runs on the event loop, which would block until the GPU has finished.
        return Pace(seconds=UNKNOWN_PACE.seconds, together=together)
    inline = [size for size in times if size <= together and times[size] <= _MERGED_SECONDS]
    return Pace(
        seconds=times[1], together=together, inline_images=max(inline) if times[1] <= _INLINE_SECONDS else 0
    )  # fmt: skip


def _quickest_seconds(model: OrtModel, batch: int, signature: Signature) -> float:
    images = np.zeros((batch, *signature.shape), signature.dtype)
    model.logits(images)
    samples: list[float] = []
    while len(samples) < _TIMED_RUNS or sum(samples) < _TIMED_SECONDS:
        started = time.perf_counter()
        model.logits(images)
        samples.append(time.perf_counter() - started)
    return min(samples)


def choose_batch(times: dict[int, float]) -> int:
    """The smallest batch whose double is less than 5% faster per image; ``times`` maps batch size to seconds."""
    best, *larger = sorted(times)
    for batch in larger:
        if times[best] / best < _MIN_SPEEDUP * times[batch] / batch:
            break
        best = batch
    return best
