"""The short way of plain requests gives the answers of the application, and shares its limits, metrics and log."""

import asyncio
import contextlib
import dataclasses
import json
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from kdexport.serving.access_log import AccessLog
from kdexport.serving.app import create_app
from kdexport.serving.batching import Pace
from kdexport.serving.connection import Connection
from kdexport.serving.limits import Limits
from kdexport.serving.listening import bind
from kdexport.serving.loading import LoadedModel
from kdexport.serving.merged_runs import MergedRuns
from kdexport.serving.plain_requests import PlainHead
from kdexport.serving.repository import Change, parse_sources
from kdexport.serving.request_identity import RequestIdentity
from kdexport.serving.server import Listener
from kdexport.serving.service import Service, Settings
from tests.kdexport.serving.running_server import binary_request
from tests.kdexport.serving.served_bundles import encoded, photo

INFER, CLASSIFY = "/v2/models/zoo/infer", "/v1/classify"
QUICK = Pace(seconds=0.0001, together=4, inline_images=4)
#: The application answers a request with this field, because no plain head has it.
LEFT_TO_THE_APPLICATION = {"X-Unknown": "1"}
TOKEN = "0123456789abcdef"
KEY = ("zoo", 1)
DEFAULTS = Limits()


def image(seed: int, count: int = 1) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(0, 1, (count, 3, 32, 32)).astype(np.float32)


def raw(path: str, body: bytes, headers: dict[str, str] | None = None) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: a", f"Content-Length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    return "\r\n".join([*lines, "", ""]).encode() + body


def plain(seed: int = 0, count: int = 1, **header: Any) -> bytes:
    return raw(INFER, *binary_request(image(seed, count), **header))


JPEG = encoded(photo(40, 40, 1), "JPEG")


class Recorded(MergedRuns):
    """Remembers which requests were accepted, and of how many each run was."""

    def __init__(self, service: Service, log: AccessLog | None) -> None:
        super().__init__(service, log)
        self.accepted: list[bool] = []
        self.runs: list[int] = []

    def accept(self, client: Any, head: PlainHead, data: bytes) -> bool:
        self.accepted.append(super().accept(client, head, data))
        return self.accepted[-1]

    def _run(self, batch: list[Any]) -> None:
        self.runs.append(len(batch))
        super()._run(batch)


class Computed:
    """In place of an opened graph: logits are ``change`` of those of the graph."""

    takes = None

    def __init__(self, ort: Any, change: Callable[[NDArray[np.float32]], NDArray[np.float32]]) -> None:
        self._ort, self._change = ort, change
        self.threads: list[str] = []

    def logits(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        self.threads.append(threading.current_thread().name)
        return self._change(self._ort.logits(images))


@dataclasses.dataclass
class Started:
    """A listener in the event loop of the test."""

    service: Service
    listener: Listener
    runs: Recorded

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self.listener.port)

    async def ask(self, data: bytes) -> bytes:
        """One response, whole."""
        reader, writer = await self.connect()
        writer.write(data)
        answer = await response(reader)
        writer.close()
        return answer

    async def both(self, path: str, body: bytes, headers: dict[str, str] | None = None) -> list[bytes]:
        """The response by the short way, and that of the application, without what differs in any two."""
        given = headers or {}
        return [
            comparable(await self.ask(raw(path, body, each))) for each in (given, {**given, **LEFT_TO_THE_APPLICATION})
        ]

    @property
    def connections(self) -> list[Connection]:
        return list(self.listener.pool.open)


async def response(reader: asyncio.StreamReader) -> bytes:
    head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 30)
    size = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
    return head + await asyncio.wait_for(reader.readexactly(size), 30)


def comparable(answer: bytes) -> bytes:
    """A response in which the time and an identity that the server made are replaced by the length of their lines."""
    head, _, body = answer.partition(b"\r\n\r\n")
    lines = [
        b"%s %d" % (line[:12], len(line)) if line.startswith((b"date: ", b"x-request-id: ")) else line
        for line in head.split(b"\r\n")
    ]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


def status(answer: bytes) -> int:
    return int(answer.split()[1])


@pytest.fixture(scope="module")
def model(zoo: Path) -> LoadedModel:
    service = Service(parse_sources([f"zoo={zoo}"]), Settings())
    service.repository.load_all()
    return dataclasses.replace(service.repository.models[KEY], pace=QUICK)


@pytest.fixture
def serve(model: LoadedModel, zoo: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """``serve(check, limits=..., model=..., ...)``: runs ``check`` with a started listener."""

    async def start(
        check: Callable[[Started], Awaitable[None]],
        limits: Limits,
        used: LoadedModel,
        token: str | None,
        log: Path | None,
    ) -> None:
        service = Service(parse_sources([f"zoo={zoo}"]), Settings(limits=limits, instances=1, token=token))
        service.repository._models = {KEY: used}
        monkeypatch.setattr(service.repository, "load_all", Change)
        service.load()
        access = None if log is None else AccessLog(str(log))
        runs = Recorded(service, access)
        sock = bind("127.0.0.1", 0)
        sock.listen(64)
        app = RequestIdentity(create_app(service=service), access)
        listener = Listener(app, sock, limits, metrics=service.metrics, runs=runs)
        await listener.start(None)
        try:
            await check(Started(service, listener, runs))
        finally:
            await listener.stop(0)
            service.close()
            if access is not None:
                access.close()
        assert service.admission.in_progress == service.admission.reserved == 0
        assert b'nv_inference_pending_request_count{model="zoo",version="1"} 0.0' in service.metrics.text()

    def run(
        check: Callable[[Started], Awaitable[None]],
        *,
        limits: Limits = DEFAULTS,
        used: LoadedModel = model,
        token: str | None = None,
        log: Path | None = None,
    ) -> None:
        asyncio.run(asyncio.wait_for(start(check, limits, used, token, log), 60))

    # Other processes on the machine of the tests must not make a run look long.
    monkeypatch.setattr("kdexport.serving.batching._LONG_INLINE_SECONDS", 60.0)
    return run


def test_both_ways_give_the_same_bytes(serve: Any) -> None:
    body, headers = binary_request(image(1))
    values = image(2)
    listed = {"name": "input", "shape": [1, 3, 32, 32], "datatype": "FP32", "data": values.ravel().round(3).tolist()}
    length = {"Inference-Header-Content-Length": "0"}
    cases: list[tuple[str, bytes, dict[str, str]]] = [
        (INFER, body, headers),
        ("/v2/models/zoo/versions/1/infer", body, headers),
        (INFER, *binary_request(image(3, 2))),
        (INFER, *binary_request(image(3), id="a \u00e9 \" id", parameters={"binary_data_output": True})),
        (INFER, *binary_request(image(3), outputs=[{"name": "logits", "parameters": {"classification": 3}}])),
        (INFER, *binary_request(image(3), outputs=[{"name": "logits", "parameters": {"binary_data": True}}])),
        (INFER, *binary_request(image(3), outputs=[{"name": "logits", "parameters": {"binary_data": False}}],
                                parameters={"binary_data_output": True})),
        (INFER, *binary_request(image(3), outputs=[], parameters=None)),
        (INFER, image(4, 2).tobytes(), length),
        (INFER, json.dumps({"inputs": [listed]}).encode(), {"Content-Type": "application/json"}),
        (INFER, body, {**headers, "X-Request-ID": "my-7", "traceparent": "x", "Accept-Encoding": "gzip"}),
        (INFER, body, {**headers, "X-Request-ID": "no good"}),
        (CLASSIFY, JPEG, {}),
        (f"{CLASSIFY}?model=zoo&top=2&version=1", JPEG, {"Content-Type": "image/jpeg"}),
        (CLASSIFY, encoded(photo(33, 50, 2).convert("L"), "JPEG"), {}),
    ]  # fmt: skip

    async def check(started: Started) -> None:
        for path, content, given in cases:
            short, general = await started.both(path, content, given)
            assert short == general
            assert status(short) == 200
        assert started.runs.accepted == [True] * len(cases)

    serve(check)


def test_what_is_refused_is_refused_in_the_same_words(serve: Any) -> None:
    body, headers = binary_request(image(1))
    spoiled = image(1)
    spoiled[0, 1, 2, 3] = np.nan
    cases: list[tuple[str, bytes, dict[str, str]]] = [
        (INFER, *binary_request(spoiled)),
        (INFER, *binary_request(image(1)[:, :, :31])),
        (INFER, body[:-4], headers),
        (INFER, body + b"1234", headers),
        (INFER, body, {}),
        (INFER, body, {"Inference-Header-Content-Length": "999999"}),
        (INFER, *binary_request(image(1), outputs=[{"name": "no"}])),
        (INFER, *binary_request(image(1), inputs=[])),
        (INFER, b"{", {}),
        (INFER, b"x" * 777, {"Inference-Header-Content-Length": "0"}),
        ("/v2/models/nobody/infer", body, headers),
        ("/v2/models/zoo/versions/9/infer", body, headers),
        (CLASSIFY, b"no image", {}),
        (CLASSIFY, JPEG[:-200], {}),
        (CLASSIFY, encoded(photo(15, 40, 1), "JPEG"), {}),
        (f"{CLASSIFY}?top=99", JPEG, {}),
        (f"{CLASSIFY}?model=nobody", JPEG, {}),
    ]

    async def check(started: Started) -> None:
        for path, content, given in cases:
            short, general = await started.both(path, content, given)
            assert short == general
            assert status(short) in (400, 404), short
        assert started.runs.accepted == [False] * len(cases)

    serve(check)


def test_metrics_and_statistics_are_those_of_the_application(serve: Any) -> None:
    async def check(started: Started) -> None:
        def counts() -> dict[str, float]:
            lines = [line.rpartition(" ") for line in started.service.metrics.text().decode().splitlines()]
            skipped = ("process_", "#", "kdexport_connections", "kdexport_server")
            return {
                name: float(value)
                for name, _, value in lines
                if not name.startswith(skipped) and "duration_us" not in name and "seconds_" not in name
            }

        grown = []
        for extra in ({}, LEFT_TO_THE_APPLICATION):
            before = counts()
            body, headers = binary_request(image(1, 2))
            assert status(await started.ask(raw(INFER, body, {**headers, **extra}))) == 200
            assert status(await started.ask(raw(CLASSIFY, JPEG, dict(extra)))) == 200
            assert status(await started.ask(raw(INFER, b"{", dict(extra)))) == 400
            after = counts()
            growth = {name: value - before.get(name, 0) for name, value in after.items()}
            grown.append({name: value for name, value in growth.items() if value})
        assert grown[0] == grown[1]
        assert grown[0]['nv_inference_count{model="zoo",version="1"}'] == 3
        stats = started.service.statistics(started.service.repository.models[KEY]).to_json()
        assert (stats["inference_count"], stats["execution_count"]) == (6, 4)
        assert stats["inference_stats"]["success"]["count"] == 4
        parts = ("queue", "compute_input", "compute_infer", "compute_output")
        assert all(stats["inference_stats"][part]["ns"] > 0 for part in parts)
        assert sum(stats["inference_stats"][part]["ns"] for part in parts) <= stats["inference_stats"]["success"]["ns"]

    serve(check)


def test_the_access_log_has_the_same_lines(serve: Any, tmp_path: Path) -> None:
    body, headers = binary_request(image(1))
    trace = "4bf92f3577b34da6a3ce929d0e0e4736"
    given = {
        **headers, "X-Request-ID": "r-1", "traceparent": f"00-{trace}-00f067aa0ba902b7-01", "User-Agent": "me",
        "Authorization": f"Bearer {TOKEN}",
    }  # fmt: skip

    async def check(started: Started) -> None:
        await started.both(f"{CLASSIFY}?top=1", JPEG, given)
        await started.both(INFER, body, given)
        assert started.runs.accepted == [True, True]

    serve(check, token=TOKEN, log=tmp_path / "log")
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    for line in lines:
        assert line.pop("ms") > 0
        line.pop("time")
    assert lines[0] == lines[1]
    assert lines[2] == lines[3]
    assert lines[2]["trace_id"] == trace
    assert (lines[0]["path"], lines[0]["request_id"], lines[0]["user_agent"]) == (CLASSIFY, "r-1", "me")
    assert TOKEN not in (tmp_path / "log").read_text()


def test_the_token_is_checked_with_each_request(serve: Any, tmp_path: Path) -> None:
    body, headers = binary_request(image(1))

    async def check(started: Started) -> None:
        good = {**headers, "Authorization": f"Bearer {TOKEN}"}
        for given in (headers, {**headers, "Authorization": "Bearer wrong"}):
            short, general = await started.both(INFER, body, given)
            assert short == general
            assert status(short) == 401
        assert status(await started.ask(raw(INFER, body, good))) == 200
        # The head is remembered, but not that it was allowed.
        started.service._require_token("another-token-of-16")
        assert status(await started.ask(raw(INFER, body, good))) == 401
        assert started.runs.accepted == [False, False, True, False]

    serve(check, token=TOKEN)


async def _together(started: Started, requests: list[bytes]) -> list[bytes]:
    """Send each on a connection of its own, so that one turn of the event loop reads all of them."""
    streams = [await started.connect() for _ in requests]
    await asyncio.sleep(0.05)
    for (_, writer), data in zip(streams, requests, strict=True):
        writer.write(data)
    answers = [await response(reader) for reader, _ in streams]
    for _, writer in streams:
        writer.close()
    return answers


def test_requests_that_arrive_together_share_runs_and_get_their_own_rows(serve: Any, model: LoadedModel) -> None:
    async def check(started: Started) -> None:
        sizes = (1, 1, 1, 1, 2, 3, 1)
        answers = await _together(started, [plain(seed, count) for seed, count in enumerate(sizes)])
        for seed, (answer, count) in enumerate(zip(answers, sizes, strict=True)):
            data = json.loads(answer.partition(b"\r\n\r\n")[2])["outputs"][0]["data"]
            assert np.array_equal(np.float32(data).reshape(count, -1), model.logits(image(seed, count)))
        assert started.runs.accepted == [True] * 7
        # No run has more than four images.
        assert sum(started.runs.runs) == 7
        assert 3 <= len(started.runs.runs) < 7
        stats = started.service.statistics(model).to_json()
        assert (stats["inference_count"], stats["execution_count"]) == (10, len(started.runs.runs))

    serve(check)


def test_without_batches_each_request_runs_alone(serve: Any, model: LoadedModel) -> None:
    async def check(started: Started) -> None:
        answers = await _together(started, [plain(seed) for seed in range(5)])
        assert [status(answer) for answer in answers] == [200] * 5
        assert started.runs.runs == [1] * 5

    serve(check, used=dataclasses.replace(model, pace=Pace(seconds=0.0001, together=1, inline_images=1)))


def test_slow_models_and_large_requests_are_left_to_threads(serve: Any, model: LoadedModel) -> None:
    async def check(started: Started) -> None:
        assert status(await started.ask(plain())) == 200
        assert started.runs.accepted == [False]

    serve(check, used=dataclasses.replace(model, pace=Pace(seconds=0.002, together=4)))

    async def five(started: Started) -> None:
        assert status(await started.ask(plain(1, 5))) == 200
        assert started.runs.accepted == [False]

    serve(five, used=dataclasses.replace(model, pace=Pace(seconds=0.0004, together=2, inline_images=2)))


def test_a_result_that_is_not_finite_fails_its_own_request_only(serve: Any, model: LoadedModel) -> None:
    def change(logits: NDArray[np.float32]) -> NDArray[np.float32]:
        spoiled = logits.copy()
        spoiled[np.all(logits == own, axis=1), 2] = np.inf
        return spoiled

    own = model.logits(image(1))[0]

    async def check(started: Started) -> None:
        answers = await _together(started, [plain(seed) for seed in range(4)])
        assert [status(answer) for answer in answers] == [200, 500, 200, 200]
        short, general = await started.both(INFER, *binary_request(image(1)))
        assert short == general
        assert b"The model computed NaN or infinity for this input." in short
        assert b'kdexport_not_finite_outputs_total{model="zoo",version="1"} 3.0' in started.service.metrics.text()

    broken: Any = Computed(model.ort, change)
    serve(check, used=dataclasses.replace(model, ort=broken))


def test_a_model_that_raises_is_answered_by_the_application(serve: Any, model: LoadedModel) -> None:
    def change(logits: NDArray[np.float32]) -> NDArray[np.float32]:
        raise ValueError("bad kernel at 0x7f0d98552b10")

    async def check(started: Started) -> None:
        short, general = await started.both(INFER, *binary_request(image(1)))
        assert short == general
        assert status(short) == 500
        assert b"0x7f" not in short

    broken: Any = Computed(model.ort, change)
    serve(check, used=dataclasses.replace(model, ort=broken))


def test_after_a_long_run_the_model_runs_in_threads_for_a_while(
    serve: Any, model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kdexport.serving.batching._LONG_INLINE_SECONDS", 0.5)
    monkeypatch.setattr("kdexport.serving.batching._LONG_INLINE_PAUSE_SECONDS", 1.0)
    seconds = [0.6]

    def change(logits: NDArray[np.float32]) -> NDArray[np.float32]:
        time.sleep(seconds[0])
        return logits

    slow = Computed(model.ort, change)
    used: Any = slow

    async def check(started: Started) -> None:
        for _ in range(2):
            assert status(await started.ask(plain())) == 200
        assert started.runs.accepted == [True, False]
        assert slow.threads == [threading.current_thread().name, "instance-0"]
        seconds[0] = 0.0
        await asyncio.sleep(1.0)
        assert status(await started.ask(plain())) == 200
        assert started.runs.accepted[-1]

    serve(check, used=dataclasses.replace(model, ort=used))


def test_at_capacity_a_plain_request_is_429(serve: Any) -> None:
    body, headers = binary_request(image(1))

    async def check(started: Started) -> None:
        with contextlib.ExitStack() as stack:
            for _ in range(started.service.admission.places):
                stack.enter_context(started.service.admission.enter())
            short, general = await started.both(INFER, body, headers)
        assert short == general
        assert status(short) == 429
        assert b"retry-after: 1\r\n" in short
        assert status(await started.ask(plain())) == 200

    serve(check)

    async def bytes_(started: Started) -> None:
        with started.service.admission.enter(len(body) - 1):
            short, general = await started.both(INFER, body, headers)
        assert short == general
        assert status(short) == 429

    serve(bytes_, limits=Limits(bodies=len(body)))


def test_a_body_above_the_limit_is_413(serve: Any) -> None:
    async def check(started: Started) -> None:
        short, general = await started.both(INFER, *binary_request(image(1)))
        assert short == general
        assert status(short) == 413
        assert started.runs.accepted == [False]

    serve(check, limits=Limits(body=12_000))


def test_a_request_that_waited_too_long_is_left_to_the_application(serve: Any, model: LoadedModel) -> None:
    async def check(started: Started) -> None:
        # Two runs: the second begins after the first has taken longer than a request may wait.
        answers = await _together(started, [plain(seed) for seed in range(2)])
        assert status(answers[0]) == 200
        assert status(answers[1]) in (200, 503)
        assert sum(started.runs.runs) < 2

    def change(logits: NDArray[np.float32]) -> NDArray[np.float32]:
        time.sleep(0.5)
        return logits

    slow: Any = Computed(model.ort, change)
    pace = Pace(seconds=0.0001, together=1, inline_images=1)
    serve(check, limits=Limits(queue_seconds=0.3), used=dataclasses.replace(model, ort=slow, pace=pace))


def test_a_request_with_its_own_timeout_is_left_to_the_application(serve: Any) -> None:
    async def check(started: Started) -> None:
        assert status(await started.ask(plain(parameters={"timeout": 5_000_000}))) == 200
        assert started.runs.accepted == [False]

    serve(check)


@contextlib.asynccontextmanager
async def stream(started: Started) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await started.connect()
    try:
        yield reader, writer
    finally:
        writer.close()


@pytest.mark.parametrize("pause", [0.0, 0.1], ids=["at once", "slowly"])
@pytest.mark.parametrize("cut", ["in the head", "after the head", "in the body", "before the last byte"])
def test_a_request_in_two_parts_is_answered_as_one(
    serve: Any, cut: str, pause: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    # On a busy machine "at once" takes longer than the server waits.
    monkeypatch.setattr("kdexport.serving.connection._REST_SECONDS", 0.005 if pause else 30.0)
    data = plain(3)
    end = data.index(b"\r\n\r\n") + 4
    at = {"in the head": 30, "after the head": end, "in the body": end + 500, "before the last byte": len(data) - 1}[
        cut
    ]

    async def check(started: Started) -> None:
        whole = comparable(await started.ask(data))
        async with stream(started) as (reader, writer):
            for _ in range(2):
                writer.write(data[:at])
                await asyncio.sleep(pause or 0.001)
                writer.write(data[at:])
                assert comparable(await response(reader)) == whole
            writer.write(data)
            assert comparable(await response(reader)) == whole
        # What waits too long for its rest is parsed; the next whole request is plain again.
        accepted = len(started.runs.accepted)
        assert accepted == (2 if pause or cut == "in the head" else 4)
        assert all(started.runs.accepted)

    serve(check)


def test_a_request_byte_by_byte_is_answered(serve: Any) -> None:
    text = json.dumps({"inputs": [{"name": "input", "shape": [1, 3, 32, 32], "datatype": "FP32", "data": [1]}]})
    data = raw(INFER, text.encode(), {"X-Request-ID": "one"})

    async def check(started: Started) -> None:
        expected = comparable(await started.ask(data))
        async with stream(started) as (reader, writer):
            for value in data:
                writer.write(bytes([value]))
                await asyncio.sleep(0.001)
            assert comparable(await response(reader)) == expected
        assert status(expected) == 400

    serve(check)


def test_pipelined_requests_are_answered_in_order(serve: Any, model: LoadedModel) -> None:
    get = b"GET /v2/health/live HTTP/1.1\r\nHost: a\r\n\r\n"

    async def check(started: Started) -> None:
        for parts in ([plain(1) + get + plain(2, id="two") + get], [plain(1), get, plain(2, id="two"), get]):
            async with stream(started) as (reader, writer):
                for part in parts:
                    writer.write(part)
                    await asyncio.sleep(0)
                bodies = [(await response(reader)).partition(b"\r\n\r\n")[2] for _ in range(4)]
            assert [b"live" in body for body in bodies] == [False, True, False, True]
            first = np.float32(json.loads(bodies[0])["outputs"][0]["data"])
            assert np.array_equal(first, model.logits(image(1))[0])
            assert json.loads(bodies[2])["id"] == "two"

    serve(check)


def test_bytes_that_arrive_before_the_response_are_read_after_it(serve: Any) -> None:
    async def check(started: Started) -> None:
        async with stream(started) as (reader, writer):
            writer.write(plain(1))
            await response(reader)
            (connection,) = started.connections
            # Both before the run at the end of this turn.
            connection.data_received(plain(2, id="two"))
            connection.data_received(plain(3, id="three") + b"GET /v2 HTTP/1.1\r\nHost: a\r\n")
            connection.data_received(b"\r\n")
            bodies = [json.loads((await response(reader)).partition(b"\r\n\r\n")[2]) for _ in range(3)]
            assert [body.get("id") for body in bodies] == ["two", "three", None]
            assert bodies[2]["name"] == "kdexport"

    serve(check)


def test_a_drain_answers_what_was_accepted_and_closes(serve: Any) -> None:
    async def check(started: Started) -> None:
        async with stream(started) as (reader, writer):
            writer.write(plain(1))
            await response(reader)
            (connection,) = started.connections
            connection.data_received(plain(2))
            started.listener.pool.close()
            answer = await response(reader)
            assert status(answer) == 200
            assert b"\r\nconnection: close\r\n\r\n" in answer
            assert await asyncio.wait_for(reader.read(), 10) == b""
        # A draining listener leaves all requests to the application.
        accepted = len(started.runs.accepted)
        assert b"\r\nconnection: close\r\n\r\n" in await started.ask(plain(3))
        assert len(started.runs.accepted) == accepted

    serve(check)


def test_a_client_that_leaves_before_the_run_is_counted_and_logged(serve: Any, tmp_path: Path) -> None:
    async def check(started: Started) -> None:
        async with stream(started) as (reader, writer):
            writer.write(plain(1))
            await response(reader)
            (connection,) = started.connections
            connection.data_received(plain(2))
            connection.transport.abort()
            await asyncio.sleep(0.05)
        assert started.runs.runs == [1]
        reason = b'nv_inference_request_failure{model="zoo",reason="canceled",version="1"} 1.0'
        assert reason in started.service.metrics.text()

    serve(check, log=tmp_path / "log")
    assert [json.loads(line)["status"] for line in (tmp_path / "log").read_text().splitlines()] == [200, 499]


def test_a_reload_takes_effect_with_the_next_request(serve: Any, model: LoadedModel) -> None:
    async def check(started: Started) -> None:
        first = await started.ask(plain(1))
        other: Any = Computed(model.ort, lambda logits: logits + 1)
        started.service.repository._models = {KEY: dataclasses.replace(model, ort=other)}
        second = await started.ask(plain(1))
        values = [json.loads(each.partition(b"\r\n\r\n")[2])["outputs"][0]["data"] for each in (first, second)]
        assert np.allclose(np.subtract(values[1], values[0]), 1, atol=1e-4)
        assert started.runs.accepted == [True, True]
        # What is remembered of heads does not keep the model that was replaced in memory.
        assert not any(isinstance(part, LoadedModel) for key in started.runs._headers for part in key)

    serve(check)


def test_an_image_of_several_scans_is_decoded_in_a_thread(serve: Any) -> None:
    async def check(started: Started) -> None:
        for options in ({"progressive": True}, {}):
            short, general = await started.both(CLASSIFY, encoded(photo(40, 40, 1), "JPEG", **options))
            assert short == general
            assert status(short) == 200
        large = encoded(photo(129, 128, 1), "JPEG")
        assert status(await started.ask(raw(CLASSIFY, large))) == 200
        assert started.runs.accepted == [False, True, False]

    serve(check)


def test_each_plain_request_starts_the_time_of_an_idle_connection_again(serve: Any) -> None:
    async def check(started: Started) -> None:
        async with stream(started) as (reader, writer):
            for _ in range(4):
                writer.write(plain(1))
                await response(reader)
                await asyncio.sleep(0.4)
            began = time.monotonic()
            assert await asyncio.wait_for(reader.read(), 10) == b""
            assert time.monotonic() - began < 5

    serve(check, limits=Limits(keep_alive_seconds=1.0))


def test_a_plain_request_in_time_ends_the_deadline_of_a_header(serve: Any) -> None:
    async def check(started: Started) -> None:
        async with stream(started) as (reader, writer):
            writer.write(plain(1))
            await response(reader)
            await asyncio.sleep(0.9)
            writer.write(b"\r\n" + plain(2))
            assert status(await response(reader)) == 200
            writer.write(plain(3)[:30])
            assert status(await response(reader)) == 408

    serve(check, limits=Limits(header_seconds=0.6))


def test_only_a_bounded_number_of_json_headers_is_remembered(serve: Any) -> None:
    async def check(started: Started) -> None:
        async with stream(started) as (reader, writer):
            for number in range(300):
                writer.write(plain(1, id=str(number)))
                assert json.loads((await response(reader)).partition(b"\r\n\r\n")[2])["id"] == str(number)
        assert len(started.runs._headers) <= 256
        assert all(started.runs.accepted)

    serve(check)
