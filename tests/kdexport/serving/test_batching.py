"""The queue of requests: which run together, which wait, which are refused, and the best batch size."""

import asyncio
import threading
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from kdexport.backends.ort import CPU, CUDA
from kdexport.errors import RequestError
from kdexport.serving.batching import Instances, Pace, choose_batch, measure_pace
from tests.kdexport.serving.event_loop import run
from tests.kdexport.serving.running_server import SIGNATURE


class Gate:
    """A model that waits until the gate is opened, and records the size of each batch."""

    def __init__(self) -> None:
        self.opened = threading.Event()
        self.entered = threading.Semaphore(0)
        self.batches: list[int] = []

    def logits(self, images: NDArray[np.float32 | np.uint8]) -> NDArray[np.float32]:
        self.entered.release()
        assert self.opened.wait(30)
        self.batches.append(len(images))
        return (images.reshape(len(images), -1)[:, :3] * 2).astype(np.float32)


def inputs(first: float, count: int = 1) -> NDArray[np.float32]:
    return (first + np.arange(count * 12, dtype=np.float32)).reshape(count, 3, 2, 2)


def test_each_request_gets_its_own_rows_of_a_batch_that_several_share() -> None:
    async def check() -> list[int]:
        gate, instances = Gate(), Instances(1, capacity=16)
        pace = Pace(seconds=1, together=4)
        sizes = (1, 2, 1, 3, 2)
        first = asyncio.create_task(instances.run(gate, inputs(0), 30, pace))
        await asyncio.to_thread(gate.entered.acquire)
        rest = [asyncio.create_task(instances.run(gate, inputs(100 * n, n), 30, pace)) for n in sizes]
        await asyncio.sleep(0.05)
        gate.opened.set()
        assert np.array_equal((await first).logits, inputs(0).reshape(1, -1)[:, :3] * 2)
        for size, task in zip(sizes, rest, strict=True):
            timed = await task
            assert np.array_equal(timed.logits, inputs(100 * size, size).reshape(size, -1)[:, :3] * 2)
            assert size <= timed.together <= 4
        await asyncio.to_thread(instances.close)
        return gate.batches

    batches = run(check())
    assert batches[0] == 1
    assert sum(batches) == 10
    # 1+2+1 fit together; 3+2 do not.
    assert batches == [1, 4, 3, 2]


def test_models_are_never_mixed_in_one_batch() -> None:
    async def check() -> None:
        one, two, instances = Gate(), Gate(), Instances(1, capacity=16)
        pace = Pace(seconds=1, together=8)
        tasks = [asyncio.create_task(instances.run(one if n % 2 else two, inputs(n), 30, pace)) for n in range(6)]
        one.opened.set()
        two.opened.set()
        for number, task in enumerate(tasks):
            assert (await task).logits[0, 0] == 2 * number
        assert sum(one.batches) == sum(two.batches) == 3
        await asyncio.to_thread(instances.close)

    run(check())


def test_a_quick_model_runs_on_the_event_loop_if_no_other_request_is_pending() -> None:
    threads: list[str] = []

    class Quick:
        def logits(self, images: NDArray[np.float32 | np.uint8]) -> NDArray[np.float32]:
            threads.append(threading.current_thread().name)
            return (images.reshape(len(images), -1)[:, :3] * 2).astype(np.float32)

    async def check() -> None:
        instances, pace = Instances(1, capacity=16), Pace(seconds=0.0004, together=1)
        for number in range(3):
            timed = await instances.run(Quick(), inputs(number), 30, pace)
            assert np.array_equal(timed.logits, inputs(number).reshape(1, -1)[:, :3] * 2)
            assert (timed.together, instances.pending) == (1, 0)
        assert set(threads) == {threading.current_thread().name}
        threads.clear()
        # Three images take longer than the event loop may be blocked.
        await instances.run(Quick(), inputs(0, 3), 30, pace)
        await asyncio.gather(*(instances.run(Quick(), inputs(n), 30, pace) for n in range(4)))
        assert set(threads) == {"instance-0"}
        await asyncio.to_thread(instances.close)

    run(check())


def test_a_full_queue_is_429_and_a_long_wait_503() -> None:
    async def check() -> None:
        gate, instances = Gate(), Instances(1, capacity=2)
        running = asyncio.create_task(instances.run(gate, inputs(1), 30))
        await asyncio.to_thread(gate.entered.acquire)
        waiting = asyncio.create_task(instances.run(gate, inputs(2), 0.05))
        await asyncio.sleep(0)
        with pytest.raises(RequestError, match=r"The queue is full: 2 requests run or wait \(limit 2\)\.") as full:
            await instances.run(gate, inputs(3), 30)
        assert full.value.status == 429
        with pytest.raises(
            RequestError, match=r"The request waited 0\.05 s in the queue, the longest wait allowed\."
        ) as late:
            await waiting
        assert late.value.status == 503
        assert instances.pending == 1
        gate.opened.set()
        await running
        # The refused request is not run later.
        assert (await instances.run(gate, inputs(4), 30)).logits[0, 0] == 8
        assert gate.batches == [1, 1]
        await asyncio.to_thread(instances.close)

    run(check())


def test_a_cancelled_request_leaves_the_queue_and_is_not_run() -> None:
    async def check() -> None:
        gate, instances = Gate(), Instances(1, capacity=4)
        running = asyncio.create_task(instances.run(gate, inputs(1), 30))
        await asyncio.to_thread(gate.entered.acquire)
        waiting = asyncio.create_task(instances.run(gate, inputs(2), 30))
        await asyncio.sleep(0.01)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert instances.pending == 1
        gate.opened.set()
        await running
        await instances.run(gate, inputs(3), 30)
        assert gate.batches == [1, 1]
        await asyncio.to_thread(instances.close)

    run(check())


def test_an_error_of_the_model_fails_only_its_own_requests() -> None:
    class Broken:
        def logits(self, images: NDArray[np.float32 | np.uint8]) -> NDArray[np.float32]:
            raise ValueError("bad kernel")

    async def check() -> None:
        gate, instances = Gate(), Instances(1, capacity=4)
        gate.opened.set()
        with pytest.raises(ValueError, match="bad kernel"):
            await instances.run(Broken(), inputs(1), 30)
        assert (await instances.run(gate, inputs(2), 30)).logits[0, 0] == 4
        await asyncio.to_thread(instances.close)

    run(check())


@pytest.mark.parametrize(
    ("milliseconds", "expected"),
    [
        ({1: 1.0, 2: 1.05, 4: 1.1, 8: 1.2, 16: 2.4, 32: 4.8}, 8),
        ({1: 1.0, 2: 2.0, 4: 4.0}, 1),
        ({1: 1.0, 2: 2.2}, 1),
        ({1: 1.0}, 1),
        ({1: 1.0, 2: 1.0, 4: 2.5, 8: 2.6}, 2),
    ],
)
def test_the_chosen_batch_is_the_last_with_a_gain(milliseconds: dict[int, float], expected: int) -> None:
    assert choose_batch({size: spent / 1000 for size, spent in milliseconds.items()}) == expected


class Paced:
    """Takes ``base_ms`` for a run and ``image_ms`` for each of its images, by a clock of its own."""

    def __init__(self, base_ms: float, image_ms: float) -> None:
        self.base_ms, self.image_ms = base_ms, image_ms
        self.now = 0.0
        self.sizes: set[int] = set()

    def logits(self, images: NDArray[np.float32 | np.uint8]) -> NDArray[np.float32]:
        self.now += (self.base_ms + self.image_ms * len(images)) / 1000
        self.sizes.add(len(images))
        return np.zeros((len(images), 3), np.float32)


def paced(model: Paced, provider: str, monkeypatch: pytest.MonkeyPatch, max_batch: int = 24) -> Pace:
    monkeypatch.setattr("kdexport.serving.batching.time.perf_counter", lambda: model.now)
    typed: Any = model
    return measure_pace(typed, provider, replace(SIGNATURE, image_size=8, max_batch=max_batch))


@pytest.mark.parametrize("provider", [CPU, CUDA])
def test_the_best_batch_is_measured_on_every_device(provider: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Paced(4, 0.1)
    pace = paced(model, provider, monkeypatch)
    # From 8 to 16 images the time per image falls by more than 5%: from 0.6 to 0.35 ms. 32 are not allowed.
    assert pace.together == 16
    assert model.sizes == {1, 2, 4, 8, 16}
    assert not pace.quick(1)
    assert pace.inline_images == 0


def test_no_larger_batch_is_timed_when_one_gains_too_little(monkeypatch: pytest.MonkeyPatch) -> None:
    # Twice the images take 1.96 times as long.
    model = Paced(0.3, 7)
    pace = paced(model, CPU, monkeypatch)
    assert (pace.together, model.sizes) == (1, {1, 2})
    assert pace.seconds == pytest.approx(0.0073)


@pytest.mark.parametrize(
    ("base_ms", "image_ms", "together", "inline"),
    [
        # 8 images take 0.48 ms.
        (0.08, 0.05, 8, 8),
        # 4 images take 1.8 ms, 8 images 3.2 ms.
        (0.4, 0.35, 8, 4),
        # One image takes 1.1 ms, which is too long, however little more images add.
        (1.05, 0.05, 16, 0),
    ],
)
def test_runs_on_the_event_loop_end_within_two_milliseconds(
    base_ms: float, image_ms: float, together: int, inline: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pace = paced(Paced(base_ms, image_ms), CPU, monkeypatch, max_batch=together)
    assert (pace.together, pace.inline_images) == (together, inline)
    assert pace.quick(1) == (inline > 0)


def test_a_model_on_a_device_never_runs_on_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    pace = paced(Paced(0.01, 0.001), CUDA, monkeypatch)
    assert (pace.quick(1), pace.inline_images) == (False, 0)
