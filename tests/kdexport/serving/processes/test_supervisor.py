"""The supervisor with processes that answer as a script says: starts, ends, reloads, sums and the end."""

import asyncio
import json
import os
import signal
import sys
import time
import urllib.request
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from kdexport.core.stopping import Stopped
from kdexport.errors import ForwardedError, ServerError
from kdexport.serving.listening import Address, Ports
from kdexport.serving.processes import supervisor
from kdexport.serving.processes.process_plan import Plan
from kdexport.serving.processes.supervisor import Supervisor
from kdexport.serving.server import Surroundings
from kdexport.serving.service import Settings
from tests.kdexport.serving.running_server import LIMITS

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes share a port on Linux only")

COUNTER = "# HELP n_total n\n# TYPE n_total counter\nn_total {}\n# HELP g g\n# TYPE g gauge\ng {}\n"


@dataclass
class Fake:
    """A running supervisor, and the script that its processes follow."""

    folder: Path
    supervisor: Supervisor
    ports: Ports | None = None

    def write(self, **numbers: dict[str, Any]) -> None:
        script = {number.removeprefix("n"): value for number, value in numbers.items()}
        (self.folder / "script.json").write_text(json.dumps(script))

    def asked(self) -> list[str]:
        path = self.folder / "asked"
        return path.read_text().splitlines() if path.is_file() else []

    def pids(self) -> list[int]:
        return [process.child.pid for process in self.supervisor._processes]

    async def metrics(self) -> dict[str, float]:
        assert self.ports is not None
        url = f"http://127.0.0.1:{self.ports.metrics_port}/metrics"
        text = await asyncio.to_thread(lambda: urllib.request.urlopen(url).read().decode())
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in text.splitlines() if line[0] != "#"}


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    monkeypatch.setattr(supervisor, "_WORKER", "tests.kdexport.serving.processes.fake_worker")
    monkeypatch.setattr(supervisor, "_RETRY_SECONDS", 0.2)
    monkeypatch.setattr(supervisor, "_RELOAD_PAUSE_SECONDS", 0.05)
    monkeypatch.setattr(supervisor, "_ANSWER_SECONDS", 0.5)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    plan = Plan(
        bundles=(f"zoo={tmp_path}",), settings=Settings(instances=2, processes=2, limits=LIMITS),
        surroundings=Surroundings(),
    )  # fmt: skip
    made = Fake(tmp_path, Supervisor(plan, Address(port=0, metrics_port=0)))
    made.write()
    return made


@asynccontextmanager
async def started(fake: Fake) -> AsyncIterator["asyncio.Task[int]"]:
    ready = asyncio.Event()

    def note(ports: Ports, _: object) -> None:
        fake.ports = ports
        ready.set()

    running = asyncio.create_task(fake.supervisor.run(started=note))
    waiting = asyncio.create_task(ready.wait())
    await asyncio.wait({running, waiting}, return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    if running.done():
        running.result()
    try:
        yield running
    finally:
        if not running.done():
            os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.wait({running})


async def until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(test)


def test_counters_of_all_processes_are_summed_and_survive_the_end_of_one(fake: Fake) -> None:
    async def test() -> None:
        fake.write(n1={"metrics": COUNTER.format(3, 10)}, n2={"metrics": COUNTER.format(4, 20), "cut": 2})
        async with started(fake) as running:
            found = await fake.metrics()
            assert (found["n_total"], found["g"], found["kdexport_processes"]) == (7, 30, 2)
            first = fake.pids()[0]
            fake.write(n1={"metrics": COUNTER.format(1, 5)}, n2={"metrics": COUNTER.format(4, 20), "cut": 2})
            os.kill(first, signal.SIGKILL)
            await until(lambda: len(fake.pids()) == 1)
            found = await fake.metrics()
            assert (found["n_total"], found["g"], found["kdexport_processes"]) == (7, 20, 1)
            await until(lambda: len(fake.pids()) == 2)
            found = await fake.metrics()
            assert (found["n_total"], found["g"]) == (3 + 4 + 1, 25)
            assert found["kdexport_process_restarts_total"] == 1
            assert first not in fake.pids()
            os.kill(os.getpid(), signal.SIGTERM)
            assert await running == 2

    run(test())


def test_a_process_that_does_not_answer_keeps_the_counts_that_it_told_last(fake: Fake) -> None:
    async def test() -> None:
        fake.write(n1={"metrics": COUNTER.format(3, 10)}, n2={"metrics": COUNTER.format(4, 20)})
        async with started(fake):
            await fake.metrics()
            fake.write(n1={"metrics": COUNTER.format(5, 10)}, n2={"sleeps_at": "metrics"})
            assert (await fake.metrics())["n_total"] == 5 + 4

    run(test())


def test_a_process_that_ends_again_and_again_ends_the_server(
    fake: Fake, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(supervisor, "_MOST_ENDS", 2)

    async def test() -> None:
        async with started(fake) as running:
            for _ in range(3):
                before = fake.pids()
                os.kill(before[-1], signal.SIGSEGV)
                await until(lambda before=before: fake.pids() != before and (running.done() or len(fake.pids()) == 2))  # type: ignore[misc]
            with pytest.raises(
                ServerError, match="Processes of the server ended 3 times within 60 s; the last one was"
            ):
                await running

    run(test())
    assert "was ended by SIGSEGV; it is started again." in caplog.text


def test_a_process_that_cannot_start_again_is_retried_and_the_others_serve(
    fake: Fake, caplog: pytest.LogCaptureFixture
) -> None:
    async def test() -> None:
        async with started(fake):
            fake.write(n1={"fails": True})
            first, second = fake.pids()
            os.kill(first, signal.SIGKILL)
            await until(
                lambda: caplog.text.count("Process 1 could not be started, and the others serve on: The bundle") > 1
            )
            assert fake.pids() == [second]
            # Bundles that the other process has not loaded are not served by this one alone.
            fake.write(n1={"models": {"zoo version 1": "b"}})
            await until(
                lambda: "Processes 2 and 1 of the server loaded different bundles of zoo version 1" in caplog.text
            )
            assert fake.pids() == [second]
            fake.write()
            await until(lambda: len(fake.pids()) == 2)

    run(test())


def test_the_error_of_the_last_process_ends_the_server(fake: Fake) -> None:
    async def test() -> None:
        async with started(fake) as running:
            fake.write(n1={"fails": True}, n2={"fails": True})
            for pid in fake.pids():
                os.kill(pid, signal.SIGKILL)
            with pytest.raises(ForwardedError, match=r"The bundle is broken\."):
                await running

    run(test())


@pytest.mark.parametrize(
    ("script", "error", "words"),
    [
        ({"fails": True}, ForwardedError, r"The bundle is broken\."),
        (
            {"dies_at": "describe"},
            ServerError,
            "Process 2 of the server ended with exit code 7 while it loaded the models",
        ),
        ({"dies_at": "serve"}, ServerError, "A process of the server ended before it answered a request"),
        ({"models": {"zoo version 1": "b"}}, ServerError, "Processes 1 and 2 of the server loaded different bundles"),
    ],
)
def test_a_start_that_fails_in_one_process_ends_all(
    fake: Fake, script: dict[str, Any], error: type[Exception], words: str
) -> None:
    async def test() -> None:
        fake.write(n2=script)
        with pytest.raises(error, match=words):
            async with started(fake):
                pass

    run(test())
    assert fake.ports is None
    assert all(child.wait(5) is not None for child in fake.supervisor._children)


def test_a_signal_during_the_start_ends_all(fake: Fake) -> None:
    async def test() -> None:
        fake.write(n2={"sleeps_at": "describe"})
        starting = asyncio.create_task(fake.supervisor.run(started=lambda *_: None))
        await until(lambda: "2 describe" in fake.asked())
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(Stopped) as stop:
            await starting
        assert stop.value.exit_code == 130

    run(test())
    assert all(child.wait(5) is not None for child in fake.supervisor._children)


def test_a_reload_is_served_when_all_processes_have_loaded_the_same(
    fake: Fake, caplog: pytest.LogCaptureFixture
) -> None:
    async def test() -> None:
        async with started(fake):
            new = {"zoo version 1": "new"}
            fake.write(n1={"prepared": new}, n2={"prepared": {"zoo version 1": "newer"}})
            os.kill(os.getpid(), signal.SIGHUP)
            await until(lambda: "the processes of the server found different bundles" in caplog.text)
            assert fake.asked().count("1 discard") == fake.asked().count("2 discard") == 3
            assert not any("adopt" in line for line in fake.asked())
            fake.write(n1={"prepared": new}, n2={"prepared": new})
            os.kill(os.getpid(), signal.SIGHUP)
            await until(lambda: {"1 adopt", "2 adopt"} <= {*fake.asked()})
            # A process that starts later must have loaded what the others serve now.
            fake.write(n1={"models": new}, n2={"prepared": new})
            os.kill(fake.pids()[0], signal.SIGKILL)
            await until(lambda: len(fake.pids()) == 2 and fake.asked().count("1 serve") == 2)

    run(test())


def test_a_process_that_dies_while_it_drains_is_named(fake: Fake, caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        fake.write(n1={"cut": 3}, n2={"dies_at": "drain"})
        async with started(fake) as running:
            os.kill(os.getpid(), signal.SIGTERM)
            assert await running == 3

    run(test())
    assert "Process 2 ended while it drained; its last requests got no response." in caplog.text
