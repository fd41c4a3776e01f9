"""The ASGI application alone, as any other ASGI server, Ray Serve included, would run it."""

import asyncio
import dataclasses
import gzip
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from kdexport.errors import ServerError
from kdexport.serving.app import create_app
from kdexport.serving.batching import UNKNOWN_PACE
from kdexport.serving.limits import MIB, Limits
from kdexport.serving.loading import LoadedModel
from kdexport.serving.repository import Change, parse_sources
from kdexport.serving.service import Service, Settings
from tests.kdexport.serving.running_server import binary_request, call
from tests.kdexport.serving.served_bundles import encoded, photo

BODY, HEADERS = binary_request(np.zeros((1, 3, 32, 32), np.float32))
INFER = "/v2/models/zoo/infer"
SCOPE = {
    "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "path": "/v1/classify",
    "raw_path": b"/v1/classify", "query_string": b"", "root_path": "", "scheme": "http",
    "server": ("127.0.0.1", 80), "client": ("127.0.0.1", 1),
}  # fmt: skip


@pytest.fixture(scope="module")
def models(zoo: Path) -> dict[tuple[str, int], LoadedModel]:
    """The loaded models, shared by all services of this module."""
    service = Service(parse_sources([f"zoo={zoo}"]), Settings())
    service.repository.load_all()
    return service.repository.models


@pytest.fixture
def make(models: dict[tuple[str, int], LoadedModel], monkeypatch: pytest.MonkeyPatch, zoo: Path) -> Iterator[Any]:
    """``make(limits, model=...)``: a loaded service with these limits."""
    services: list[Service] = []

    def build(limits: Limits | None = None, **change: Any) -> Service:
        service = Service(parse_sources([f"zoo={zoo}"]), Settings(limits=limits or Limits(), instances=1))
        # The measured pace of the replaced model does not apply to its replacement.
        pace: dict[str, Any] = {"pace": UNKNOWN_PACE} if "ort" in change else {}
        ready = {key: dataclasses.replace(model, **change, **pace) for key, model in models.items()}
        service.repository._models = ready
        monkeypatch.setattr(service.repository, "load_all", Change)
        service.load()
        services.append(service)
        return service

    yield build
    for service in services:
        service.close()


@dataclasses.dataclass(frozen=True)
class Constant:
    """In place of an opened graph: returns one value for every logit, after ``seconds``."""

    value: float
    seconds: float = 0.0

    def logits(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        import time

        time.sleep(self.seconds)
        return np.full((len(images), 7), self.value, np.float32)


def test_the_lifespan_of_the_application_loads_and_closes_it(zoo: Path) -> None:
    async def check() -> None:
        app = create_app([f"zoo={zoo}"], Settings(instances=1))
        assert (await call(app, "GET", "/v2/health/live")).status == 200
        assert (await call(app, "GET", "/v2/health/ready")).status == 503
        assert (await call(app, "POST", INFER, BODY, HEADERS)).status == 404
        inbox: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        outbox: asyncio.Queue[MutableMapping[str, Any]] = asyncio.Queue()
        life = asyncio.create_task(app({"type": "lifespan", "asgi": {"version": "3.0"}}, inbox.get, outbox.put))
        await inbox.put({"type": "lifespan.startup"})
        assert (await outbox.get())["type"] == "lifespan.startup.complete"
        assert (await call(app, "GET", "/v2/health/ready")).status == 200
        assert (await call(app, "POST", INFER, BODY, HEADERS)).status == 200
        await inbox.put({"type": "lifespan.shutdown"})
        assert (await outbox.get())["type"] == "lifespan.shutdown.complete"
        await life
        assert (await call(app, "GET", "/v2/health/ready")).status == 503

    asyncio.run(asyncio.wait_for(check(), 120))


def test_no_answer_within_the_deadline_is_504(make: Any) -> None:
    app = create_app(service=make(Limits(total_seconds=0.05), ort=Constant(1.0, seconds=0.5)))
    answer = asyncio.run(call(app, "POST", INFER, BODY, HEADERS))
    assert answer.status == 504
    assert "within 0.05 s" in answer.error


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_answer_that_is_not_finite_is_500_and_counted(make: Any, value: float) -> None:
    service = make(None, ort=Constant(value))
    answer = asyncio.run(call(create_app(service=service), "POST", INFER, BODY, HEADERS))
    assert answer.status == 500
    assert answer.error == (
        "The model computed NaN or infinity for this input. Check that the input is normalised as the bundle's "
        "manifest.json requires."
    )
    assert b'kdexport_not_finite_outputs_total{model="zoo",version="1"} 1.0' in service.metrics.text()


def test_bodies_of_unknown_size_are_charged_as_they_arrive(make: Any) -> None:
    service = make(Limits(bodies=2 * MIB, body=MIB, queue=20))
    upload = encoded(photo(64, 64, 1), "JPEG")
    admitted = []

    async def one(app: Any, encoding: list[tuple[bytes, bytes]], everyone: asyncio.Event) -> int:
        parts = [{"type": "http.request", "body": upload[:9], "more_body": True}]
        if encoding:
            parts = [{"type": "http.request", "body": gzip.compress(upload), "more_body": True}]
        last = {"type": "http.request", "body": b"" if encoding else upload[9:], "more_body": False}
        messages: list[MutableMapping[str, Any]] = []
        finished: list[bool] = []

        async def receive() -> dict[str, Any]:
            if parts:
                return parts.pop()
            admitted.append(True)
            if len(admitted) >= 12:
                everyone.set()
            if finished:
                # The client stays connected and sends nothing more.
                await asyncio.sleep(60)
            finished.append(True)
            await asyncio.wait_for(everyone.wait(), 30)
            return last

        async def send(message: MutableMapping[str, Any]) -> None:
            messages.append(message)

        await app({**SCOPE, "headers": encoding}, receive, send)
        return int(messages[0]["status"])

    async def all_at_once() -> list[int]:
        app, everyone = create_app(service=service), asyncio.Event()
        kinds: list[list[tuple[bytes, bytes]]] = [[], [(b"content-encoding", b"gzip")]]
        return await asyncio.gather(*(one(app, kinds[index % 2], everyone) for index in range(12)))

    assert asyncio.run(all_at_once()) == [200] * 12
    assert service.admission.reserved == 0


def test_draining_is_not_ready_and_still_serves(make: Any) -> None:
    service = make()
    service.draining = True
    app = create_app(service=service)
    assert asyncio.run(call(app, "GET", "/v2/health/ready")).status == 503
    assert asyncio.run(call(app, "GET", "/v2/models/zoo/ready")).status == 503
    assert asyncio.run(call(app, "GET", "/v2/health/live")).status == 200
    assert asyncio.run(call(app, "POST", INFER, BODY, HEADERS)).status == 200


def test_a_server_whose_limits_do_not_fit_its_container_does_not_start(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = make()
    monkeypatch.setattr("kdexport.serving.service.memory_limit", lambda: 256 * MIB)
    with pytest.raises(
        ServerError, match=r"the server takes at most \d+ MiB \(.*\), but its control group allows 256 MiB\. "
    ) as caught:
        service.require_memory(100 * MIB)
    assert caught.value.remedy.startswith("Pass --")
    monkeypatch.setattr("kdexport.serving.service.memory_limit", lambda: 110 * MIB)
    with pytest.raises(ServerError) as caught:
        service.require_memory(100 * MIB)
    assert caught.value.remedy.startswith("Give the container at least ")
    monkeypatch.setattr("kdexport.serving.service.memory_limit", lambda: 512 * MIB)
    with pytest.raises(ServerError, match=r"The largest part is image decoding\.") as caught:
        service.require_memory(100 * MIB)
    words = caught.value.remedy.split(", or ")[0].removeprefix("Pass ").split()
    names = {
        "--max-pixels": "pixels", "--max-bodies": "bodies", "--max-body": "body", "--connections": "connections",
    }  # fmt: skip
    proposed = {names[name]: int(value) for name, value in zip(words[::2], words[1::2], strict=True)}
    assert make(Limits(**proposed)).require_memory(100 * MIB).total <= 512 * MIB
    monkeypatch.setattr("kdexport.serving.service.memory_limit", lambda: 8192 * MIB)
    assert service.require_memory(100 * MIB).total < 8192 * MIB


def test_a_missing_package_is_an_error_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    from kdexport.commands.serve import require_extra
    from kdexport.core.extras import install
    from kdexport.errors import BackendUnavailableError

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "uvicorn" else find(name))
    with pytest.raises(BackendUnavailableError, match="not installed: uvicorn") as caught:
        require_extra()
    assert caught.value.remedy == install("uvicorn")
    assert "kdexport[serve" in caught.value.remedy
