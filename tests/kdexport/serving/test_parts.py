"""The parts of the server by themselves: queue, places, bodies, control groups, memory, metrics, batch choice."""

import asyncio
import re
import threading
import time
import zlib
from collections.abc import Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from kdexport.backends.ort import CPU, CUDA
from kdexport.data.preprocessing import Preprocessing
from kdexport.errors import RequestError
from kdexport.serving import limits as cgroup
from kdexport.serving.batching import Instances, Pace, choose_batch, measure_pace
from kdexport.serving.images import PixelBudget, decode_upload, normalisation_table, normalise
from kdexport.serving.limits import MIB, Limits, memory_bound
from kdexport.serving.metrics import Metrics, ModelStatistics
from kdexport.serving.requests import ClientGoneError, read_body, unless_gone, unpack
from kdexport.serving.service import Admission
from kdexport.serving.wire import body_limit
from tests.kdexport.serving.running_server import LIMITS, SIGNATURE
from tests.kdexport.serving.served_bundles import encoded, photo

SMALL = Preprocessing(image_size=8, resize=8, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


class Gate:
    """A model that waits for leave, and remembers how many images came together."""

    def __init__(self) -> None:
        self.leave = threading.Event()
        self.entered = threading.Semaphore(0)
        self.batches: list[int] = []

    def logits(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        self.entered.release()
        assert self.leave.wait(30)
        self.batches.append(len(images))
        return images.reshape(len(images), -1)[:, :3] * 2


def inputs(first: float, count: int = 1) -> NDArray[np.float32]:
    return (first + np.arange(count * 12, dtype=np.float32)).reshape(count, 3, 2, 2)


def run(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(work, 60))


def test_each_request_gets_its_own_rows_of_a_batch_that_several_share() -> None:
    async def check() -> list[int]:
        gate, instances = Gate(), Instances(1, capacity=16)
        pace = Pace(seconds=1, together=4)
        sizes = (1, 2, 1, 3, 2)
        first = asyncio.create_task(instances.run(gate, inputs(0), 30, pace))
        await asyncio.to_thread(gate.entered.acquire)
        rest = [asyncio.create_task(instances.run(gate, inputs(100 * n, n), 30, pace)) for n in sizes]
        await asyncio.sleep(0.05)
        gate.leave.set()
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
        one.leave.set()
        two.leave.set()
        for number, task in enumerate(tasks):
            assert (await task).logits[0, 0] == 2 * number
        assert sum(one.batches) == sum(two.batches) == 3
        await asyncio.to_thread(instances.close)

    run(check())


def test_a_quick_model_runs_on_the_loop_while_it_is_alone_and_in_a_thread_beside_others() -> None:
    threads: list[str] = []

    class Quick:
        def logits(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
            threads.append(threading.current_thread().name)
            return images.reshape(len(images), -1)[:, :3] * 2

    async def check() -> None:
        instances, pace = Instances(1, capacity=16), Pace(seconds=0.0004, together=1)
        for number in range(3):
            timed = await instances.run(Quick(), inputs(number), 30, pace)
            assert np.array_equal(timed.logits, inputs(number).reshape(1, -1)[:, :3] * 2)
            assert (timed.together, instances.pending) == (1, 0)
        assert set(threads) == {threading.current_thread().name}
        threads.clear()
        # Three images take longer than the event loop may be held.
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
        with pytest.raises(RequestError, match=r"2 requests wait already \(up to 2 allowed\)") as full:
            await instances.run(gate, inputs(3), 30)
        assert full.value.status == 429
        with pytest.raises(RequestError, match=r"waited 0\.05 s") as late:
            await waiting
        assert late.value.status == 503
        assert instances.pending == 1
        gate.leave.set()
        await running
        # What was given up is not run afterwards.
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
        gate.leave.set()
        await running
        await instances.run(gate, inputs(3), 30)
        assert gate.batches == [1, 1]
        await asyncio.to_thread(instances.close)

    run(check())


def test_an_error_of_the_model_is_that_of_its_requests_alone() -> None:
    class Broken:
        def logits(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
            raise ValueError("bad kernel")

    async def check() -> None:
        gate, instances = Gate(), Instances(1, capacity=4)
        gate.leave.set()
        with pytest.raises(ValueError, match="bad kernel"):
            await instances.run(Broken(), inputs(1), 30)
        assert (await instances.run(gate, inputs(2), 30)).logits[0, 0] == 4
        await asyncio.to_thread(instances.close)

    run(check())


def test_places_and_bytes_are_given_back_whatever_happens() -> None:
    admission = Admission(places=2, bodies=100)
    with admission.enter(60):
        with pytest.raises(RequestError, match="60 bytes are inside, 41 more"), admission.enter(41):
            pass
        with admission.enter(40), pytest.raises(RequestError, match="2 requests are inside"), admission.enter(0):
            pass
    with pytest.raises(KeyError), admission.enter(7):
        raise KeyError
    assert (admission.inside, admission.held) == (0, 0)
    # One body larger than all of the budget is still served, alone.
    with admission.enter(1000):
        pass


def receiver(*messages: dict[str, Any]) -> Any:
    pending = list(messages)

    async def receive() -> dict[str, Any]:
        if not pending:
            await asyncio.sleep(60)
        return pending.pop(0)

    return receive


def part(data: bytes, more: bool = True) -> dict[str, Any]:
    return {"type": "http.request", "body": data, "more_body": more}


def test_a_body_is_read_in_parts_and_bounded_by_bytes_chunks_and_time() -> None:
    limits = Limits(body_seconds=0.05, chunks=3)
    assert run(read_body(receiver(part(b"ab"), part(b""), part(b"c", more=False)), 3, limits)) == b"abc"
    for messages, status in (
        ((part(b"abcd", more=False),), 413),
        ((part(b"ab"), part(b"cd")), 413),
        ((part(b""),) * 5, 413),
        ((part(b"a"),), 408),
    ):
        with pytest.raises(RequestError) as caught:
            run(read_body(receiver(*messages), 3, limits))
        assert caught.value.status == status
    with pytest.raises(ClientGoneError):
        run(read_body(receiver(part(b"a"), {"type": "http.disconnect"}), 3, limits))


def test_work_ends_when_the_client_leaves() -> None:
    ended = []

    async def work() -> int:
        try:
            await asyncio.sleep(30)
        finally:
            ended.append(True)
        return 1

    with pytest.raises(ClientGoneError):
        run(unless_gone(receiver({"type": "http.disconnect"}), work()))
    assert ended == [True]

    async def quick() -> int:
        return 7

    assert run(unless_gone(receiver(), quick())) == 7

    async def from_outside() -> None:
        async def slow() -> None:
            await asyncio.sleep(30)

        task = asyncio.create_task(unless_gone(receiver(), slow()))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        # A deadline around it stays a deadline.
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await unless_gone(receiver(), slow())

    run(from_outside())


def test_unpacking_stops_at_the_limit() -> None:
    packed = zlib.compress(bytes(1000))
    assert unpack(packed, "deflate", 1000) == bytes(1000)
    with pytest.raises(RequestError, match="more than 999 bytes"):
        unpack(packed, "deflate", 999)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "150000 100000\n"}, 2),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/cpu.max": "50000 100000"}, 1),
        ({"proc/self/cgroup": "0::/gone\n", "sys/fs/cgroup/cpu.max": "100000 100000"}, 1),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, 99),
        (
            {
                "proc/self/cgroup": "4:cpu,cpuacct:/x\n7:memory:/x\n",
                "sys/fs/cgroup/cpu/x/cpu.cfs_quota_us": "100000",
                "sys/fs/cgroup/cpu/x/cpu.cfs_period_us": "100000",
            },
            1,
        ),
        ({"proc/self/cgroup": "4:cpu:/x\n", "sys/fs/cgroup/cpu/x/cpu.cfs_quota_us": "-1"}, 99),
        ({}, 99),
    ],
)
def test_processors_are_those_of_the_control_group(
    files: dict[str, str], expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(99)))
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert cgroup.processors(tmp_path) == expected


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("memory.max", "1073741824", 2**30),
        ("memory.max", "max", None),
        ("memory.limit_in_bytes", str(2**63 - 4096), None),
    ],
)
def test_memory_is_that_of_the_control_group(name: str, text: str, expected: int | None, tmp_path: Path) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/\n")
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup" / name).write_text(text)
    assert cgroup.memory(tmp_path) == expected


def test_the_memory_bound_grows_with_every_limit_that_holds_memory() -> None:
    def total(**change: Any) -> int:
        limits = Limits(**change)
        bound = memory_bound(limits, base=MIB, instances=2, decoders=2, image_bytes=600_000, max_elements=10**6)
        assert f"at most {bound.total / MIB:.0f} MiB" in bound.describe()
        return bound.total

    usual = total()
    for change in ({"bodies": 256 * MIB}, {"pixels": 50_000_000}, {"connections": 1024}, {"queue": 64}):
        assert total(**change) > usual
    assert 500 * MIB < usual < 2000 * MIB


def test_a_request_may_be_as_large_as_the_model_needs_and_no_larger() -> None:
    raw = 8 * 12288
    assert raw < body_limit(SIGNATURE, LIMITS, binary=True) < 2 * raw + LIMITS.header
    longest = len(repr(float(np.float32(-1.2345678e-30)))) + 1
    assert body_limit(SIGNATURE, LIMITS, binary=False) >= 8 * 3072 * longest
    assert body_limit(SIGNATURE, Limits(body=5000), binary=True) == 5000


def test_the_documented_limits_are_the_ones_that_hold() -> None:
    text = (Path(__file__).parents[3] / "docs" / "serving.md").read_text()
    limits = Limits()
    for words in (
        f"at most {limits.body // MIB} MiB", f"{limits.bodies // MIB} MiB |", f"{limits.connections} |",
        f"2 x instances + {limits.queue}", f"{limits.queue_seconds:g} s, or the request's", f"{limits.chunks:,}",
        f"{limits.pixels // 10**6} million pixels, short side {limits.min_side}, aspect {limits.aspect}",
        f"{limits.header // 1024} KiB, {limits.header_seconds:g} s", f"{limits.json_slack:,}; {limits.json_depth}",
        f"({limits.drain_seconds + limits.grace_seconds:g} s by default)",
    ):  # fmt: skip
        assert words in text, words


def test_normalisation_by_table_has_the_bits_of_the_arithmetic() -> None:
    preprocessing = Preprocessing(image_size=16, resize=16, mean=(0.41, 0.47, 0.39), std=(0.21, 0.27, 0.24))
    values = np.arange(256, dtype=np.uint8).reshape(16, 16)
    pixels = np.stack([values, values[::-1], values.T], -1)
    ours = normalise(pixels, normalisation_table(preprocessing))
    assert ours.tobytes() == preprocessing.normalise(pixels[None]).tobytes()


def test_pixels_that_are_open_together_are_bounded() -> None:
    budget, peak, open_now, lock = PixelBudget(100), [0], [0], threading.Lock()

    def decode(pixels: int) -> None:
        with budget.spend() as spending:
            spending.take(pixels)
            with lock:
                open_now[0] += pixels
                peak[0] = max(peak[0], open_now[0])
            time.sleep(0.002)
            with lock:
                open_now[0] -= pixels

    threads = [threading.Thread(target=decode, args=(size,)) for size in (100, 60, 50, 1, 40, 99) * 4]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert 60 <= peak[0] <= 100
    assert open_now == [0]


def test_metrics_carry_the_names_of_triton_without_a_suffix() -> None:
    metrics = Metrics()
    statistics = ModelStatistics(metrics, "m", 3)
    times = {"total": 5_000_000, "queue": 1_000_000, "input": 500_000, "infer": 3_000_000, "output": 250_000}
    statistics.succeeded(2, 4, times)
    statistics.failed("queue", 1000)
    text = metrics.text().decode()
    for name, value in (
        ("nv_inference_request_success", 1), ("nv_inference_count", 2), ("nv_inference_exec_count", 0.5),
        ("nv_inference_request_duration_us", 5000), ("nv_inference_queue_duration_us", 1000),
        ("nv_inference_compute_input_duration_us", 500), ("nv_inference_compute_infer_duration_us", 3000),
        ("nv_inference_compute_output_duration_us", 250),
    ):  # fmt: skip
        assert f"# TYPE {name} counter\n" in text
        assert f'\n{name}{{model="m",version="3"}} {value:.1f}\n' in text
    assert 'nv_inference_request_failure{model="m",reason="queue",version="3"} 1.0' in text
    assert "process_resident_memory_bytes" in text
    assert not re.search(r"nv_\w+_total", text)


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
def test_the_batch_is_the_last_that_was_worth_it(milliseconds: dict[int, float], expected: int) -> None:
    assert choose_batch({size: spent / 1000 for size, spent in milliseconds.items()}) == expected


def test_a_model_on_a_cpu_is_timed_alone_and_one_on_a_device_in_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    now, batches = [0.0], []

    class Timed:
        """Four milliseconds a run and a tenth of one an image."""

        def logits(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
            now[0] += 0.004 + 0.0001 * len(images)
            batches.append(images.shape)
            return np.zeros((len(images), 3), np.float32)

    monkeypatch.setattr("kdexport.serving.batching.time.perf_counter", lambda: now[0])
    model: Any = Timed()
    pace = measure_pace(model, CPU, replace(SIGNATURE, image_size=8, max_batch=16))
    assert pace.seconds == pytest.approx(0.0041)
    assert pace.together == 1
    assert set(batches) == {(1, 3, 8, 8)}
    assert not pace.quick(1)
    pace = measure_pace(model, CUDA, replace(SIGNATURE, image_size=8, max_batch=24))
    # 1/16 of four milliseconds an image is still worth more than a tenth of one.
    assert pace.together == 16
    assert not pace.quick(1)
    assert {shape[0] for shape in batches} == {1, 2, 4, 8, 16}


class Watched(PixelBudget):
    """A budget that remembers what was taken from it and given back."""

    def __init__(self, pixels: int) -> None:
        super().__init__(pixels)
        self.moves: list[int] = []

    def move(self, pixels: int) -> None:
        self.moves.append(pixels)
        super().move(pixels)


@pytest.mark.parametrize(("kind", "side", "cost"), [("PNG", 80, 1), ("WEBP", 56, 2)])
def test_a_webp_image_spends_twice_its_pixels(kind: str, side: int, cost: int) -> None:
    budget = Watched(80 * 80)
    pixels = decode_upload(encoded(photo(side, side, 3), kind), SMALL, Limits(pixels=80 * 80), budget)
    assert pixels.shape == (8, 8, 3)
    assert budget.moves == [-cost * side * side, cost * side * side]


@pytest.mark.parametrize(("kind", "side", "allowed"), [("PNG", 84, "6,400"), ("WEBP", 60, "3,200")])
def test_a_webp_image_may_have_half_as_many_pixels(kind: str, side: int, allowed: str) -> None:
    data = encoded(photo(side, side, 3), kind)
    with pytest.raises(RequestError, match=f"up to {allowed} allowed") as refused:
        decode_upload(data, SMALL, Limits(pixels=80 * 80), PixelBudget(80 * 80))
    assert refused.value.status == 413
