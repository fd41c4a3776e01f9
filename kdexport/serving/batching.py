"""A bounded queue in front of N onnxruntime instances.

Threads, because ``session.run`` lets go of the interpreter; one session per model, because onnxruntime runs it from any
number of threads at once and its weights are then in memory once. All counting happens on the event loop's thread.

How a model runs best on this machine, measured when it is loaded.
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
from kdexport.errors import RequestError
from kdexport.serving.wire import Signature

Logits = NDArray[np.float32]

#: As long as this the event loop may be busy with a model: two hand-overs between threads take about half of it.
_QUICK_SECONDS = 0.001


class Runnable(Protocol):
    """What an instance runs."""

    def logits(self, images: NDArray[np.float32]) -> Logits:
        """(n,3,S,S) float32 to (n,K) float32."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Pace:
    """How a model runs best here: ``seconds`` for one image, and how many images are cheaper ``together``."""

    seconds: float
    together: int

    def quick(self, images: int) -> bool:
        """Whether running ``images`` takes no longer than handing them to a thread and back is worth."""
        return self.seconds * images <= _QUICK_SECONDS


#: A model that nobody timed: one request after the other, each in a thread.
UNKNOWN_PACE = Pace(seconds=math.inf, together=1)


@dataclass(frozen=True, slots=True, eq=False)
class Timed:
    """Logits (n,K), nanoseconds in the queue and in the model, and how many images ran together."""

    logits: Logits
    queue_ns: int
    compute_ns: int
    together: int


@dataclass(slots=True, eq=False)
class _Job:
    model: Runnable
    images: NDArray[np.float32]
    future: "asyncio.Future[Timed]"
    queued_ns: int
    together: int
    lock: threading.Lock = field(default_factory=threading.Lock)
    taken: bool = False

    def take(self) -> bool:
        """Claim the job, for running or for giving it up; only the first to ask gets it."""
        with self.lock:
            if self.taken:
                return False
            self.taken = True
            return True


class Instances:
    """``count`` threads that run jobs first in, first out, images of one model together where that is cheaper."""

    def __init__(self, count: int, *, capacity: int) -> None:
        self.count = count
        self._capacity = capacity
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._pending = 0
        self._threads = [threading.Thread(target=self._work, name=f"instance-{n}", daemon=True) for n in range(count)]
        for thread in self._threads:
            thread.start()

    @property
    def pending(self) -> int:
        """Jobs that wait or run."""
        return self._pending

    async def run(
        self, model: Runnable, images: NDArray[np.float32], queue_seconds: float, pace: Pace = UNKNOWN_PACE
    ) -> Timed:
        """Logits of ``images``; raises ``RequestError`` where the queue is full or the wait too long.

        A cancelled call leaves the queue at once; what runs already runs to its end and is dropped. A quick model runs
        on the event loop as long as nobody else is here.
        """
        if self._pending >= self._capacity:
            raise RequestError(
                f"{self._pending} requests wait already (up to {self._capacity} allowed).", status=429, reason="queue"
            )
        queued_ns = time.monotonic_ns()
        self._pending += 1
        try:
            if pace.quick(len(images)):
                # Requests that arrived together are all here after it.
                await asyncio.sleep(0)
                if time.monotonic_ns() - queued_ns > queue_seconds * 1e9:
                    raise _late(queue_seconds)
                if self._pending == 1:
                    return _run_here(model, images, queued_ns)
            return await self._in_thread(model, images, queue_seconds, queued_ns, pace.together)
        finally:
            self._pending -= 1

    async def _in_thread(
        self, model: Runnable, images: NDArray[np.float32], queue_seconds: float, queued_ns: int, together: int
    ) -> Timed:
        loop = asyncio.get_running_loop()
        job = _Job(model, images, loop.create_future(), queued_ns, together)
        timer = loop.call_later(queue_seconds, _give_up, job, queue_seconds)
        try:
            self._jobs.put(job)
            return await job.future
        finally:
            timer.cancel()
            job.take()

    def close(self) -> None:
        """End the threads after the jobs that they have."""
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        held: _Job | None = None
        while True:
            job = held or self._jobs.get()
            held = None
            if job is None:
                return
            if not job.take():
                continue
            batch = [job]
            if job.together > 1:
                held = self._gather(batch)
            _run(batch)

    def _gather(self, batch: list[_Job]) -> _Job | None:
        """Add waiting jobs of the same model without waiting for more; returns one that did not fit."""
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


def _give_up(job: _Job, seconds: float) -> None:
    if job.take() and not job.future.done():
        job.future.set_exception(_late(seconds))


def _late(seconds: float) -> RequestError:
    return RequestError(f"The request waited {seconds:g} s for an instance.", status=503, reason="queue_timeout")


def _run_here(model: Runnable, images: NDArray[np.float32], queued_ns: int) -> Timed:
    started = time.monotonic_ns()
    logits = model.logits(images)
    return Timed(logits, started - queued_ns, time.monotonic_ns() - started, len(images))


def _run(batch: list[_Job]) -> None:
    started = time.monotonic_ns()
    images = batch[0].images if len(batch) == 1 else np.concatenate([job.images for job in batch])
    try:
        logits = batch[0].model.logits(images)
    # Whatever onnxruntime raises is the answer of these jobs alone; the instance goes on.
    except Exception as error:  # noqa: BLE001
        for job in batch:
            _tell(job, functools.partial(job.future.set_exception, error))
        return
    spent, first = time.monotonic_ns() - started, 0
    for job in batch:
        last = first + len(job.images)
        timed = Timed(logits[first:last], started - job.queued_ns, spent, len(images))
        _tell(job, functools.partial(job.future.set_result, timed))
        first = last


def _tell(job: _Job, action: Callable[[], None]) -> None:
    def settle() -> None:
        if not job.future.done():
            action()

    try:
        job.future.get_loop().call_soon_threadsafe(settle)
    except RuntimeError:
        # The event loop ended while the model ran: nobody waits any more.
        return


#: A larger batch must be at least this much faster an image, or it only adds waiting.
_WORTH = 1.1

_RUNS = 5

_MOST = 64


def measure_pace(model: OrtModel, provider: str, signature: Signature) -> Pace:
    """Time single images on a CPU, where a batch costs more an image, and batches of 1, 2, 4, ... elsewhere."""
    if provider == CPU:
        return Pace(seconds=_median_seconds(model, 1, signature.image_size), together=1)
    sizes = [2**power for power in range(_MOST.bit_length()) if 2**power <= min(_MOST, signature.max_batch)]
    times = {batch: _median_seconds(model, batch, signature.image_size) for batch in sizes}
    # Work for a device never runs on the event loop, which would wait for the device.
    return Pace(seconds=UNKNOWN_PACE.seconds, together=choose_batch(times))


def _median_seconds(model: OrtModel, batch: int, image_size: int) -> float:
    images = np.zeros((batch, 3, image_size, image_size), np.float32)
    model.logits(images)
    samples = []
    for _ in range(_RUNS):
        started = time.perf_counter()
        model.logits(images)
        samples.append(time.perf_counter() - started)
    return float(np.median(samples))


def choose_batch(times: dict[int, float]) -> int:
    """The smallest batch after which doubling no longer makes an image at least 10 % cheaper; ``times`` in seconds."""
    best, *larger = sorted(times)
    for batch in larger:
        if times[best] / best < _WORTH * times[batch] / batch:
            break
        best = batch
    return best
