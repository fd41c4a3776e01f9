"""The ASGI application alone, as any other ASGI server, Ray Serve included, would run it."""

import asyncio
import dataclasses
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
from kdexport.serving.repository import parse_sources
from kdexport.serving.service import Service, Settings
from tests.kdexport.serving.running_server import binary_request, call

BODY, HEADERS = binary_request(np.zeros((1, 3, 32, 32), np.float32))
INFER = "/v2/models/zoo/infer"


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
        monkeypatch.setattr(service.repository, "load_all", lambda: None)
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
        ServerError, match=r"the server takes at most \d+ MiB \(.*\), but its control group allows 256 MiB\."
    ):
        service.require_memory(100 * MIB)
    monkeypatch.setattr("kdexport.serving.service.memory_limit", lambda: 8192 * MIB)
    assert service.require_memory(100 * MIB).total < 8192 * MIB


def test_a_missing_package_is_an_error_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    from kdexport.commands.serve import require_extra
    from kdexport.errors import BackendUnavailableError

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "uvicorn" else find(name))
    with pytest.raises(BackendUnavailableError, match="not installed: uvicorn") as caught:
        require_extra()
    assert caught.value.remedy == "pip install 'kdexport[serve]'"
