"""Starts the processes of a server, starts those again that end, and is the one whom signals and Prometheus reach.

It holds no model and answers no request but ``GET /metrics``. The processes share the port of the requests: each has a
socket of its own there, and the kernel deals connections out. A reload is loaded by all of them before one serves it.
"""

import asyncio
import contextlib
import logging
import os
import secrets
import signal
import socket
import ssl
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)

from kdexport.core.child import launch
from kdexport.core.stopping import Stopped
from kdexport.errors import KdexportError, ServerError
from kdexport.serving.announcement import Announcement
from kdexport.serving.app import create_metrics_app
from kdexport.serving.listening import (
    BACKLOG,
    METRICS_OPTIONS,
    Address,
    Place,
    Ports,
    bind_all,
    listen,
    listen_together,
    require_all_answer,
    require_own_answer,
)
from kdexport.serving.processes.channel import Channel, ChannelClosedError
from kdexport.serving.processes.process_plan import Plan
from kdexport.serving.repository import Folders, parse_sources
from kdexport.serving.server import Listener, Signals, update_dates, watch
from kdexport.serving.sums import summed_metrics

_log = logging.getLogger("kdexport.serving")
_WORKER = "kdexport.serving.processes.worker"
_INTERRUPTED = 130
#: How long the supervisor waits for what a process counted, and for a process that has nothing left to do.
_ANSWER_SECONDS = 2.0
_END_SECONDS = 10.0
#: After this many ends of processes within this time the server ends too: starting them again does not help.
_MOST_ENDS = 5
_ENDS_SECONDS = 60.0
#: How long after a failed start of a process the next one begins.
_RETRY_SECONDS = 10.0
#: How often a reload is tried in which the processes found different bundles, because they were being replaced.
_RELOADS = 3
_RELOAD_PAUSE_SECONDS = 1.0


@dataclass(slots=True, eq=False)
class _Process:
    """A process that has loaded its models: their digests by name and version, and its metrics as it last told them."""

    number: int
    child: "subprocess.Popen[bytes]"
    channel: Channel
    identity: str
    announcement: Announcement
    models: dict[str, str]
    counted: str = ""


class Supervisor:
    """The processes of one server; the addresses are bound at once, the processes are started by ``run``."""

    def __init__(self, plan: Plan, address: Address, *, watch_seconds: float = 0.0) -> None:
        self._plan = plan
        self._address = address
        self._watch_seconds = watch_seconds
        self._sockets = bind_all(address)
        self._ports = self._sockets.ports
        self._place = Place.of(self._sockets.requests)
        self._folders = Folders(parse_sources(plan.bundles), plan.settings.trusted)
        self._processes: list[_Process] = []
        self._children: list[subprocess.Popen[bytes]] = []
        self._channels: list[asyncio.Task[None]] = []
        self._ends: list[float] = []
        self._past = ""
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self._identity = secrets.token_hex(8)
        Gauge("kdexport_server", "1, with the identity of the process", ("id",), registry=self._registry).labels(
            self._identity
        ).set(1)
        self._serving = Gauge("kdexport_processes", "Processes that answer requests", registry=self._registry)
        self._restarts = Counter("kdexport_process_restarts", "Processes started again", registry=self._registry)
        self._changing: asyncio.Lock
        self._failed: asyncio.Future[None]

    async def run(
        self, *, context: ssl.SSLContext | None = None, started: Callable[[Ports, Announcement], None]
    ) -> int:
        """Serve until SIGTERM or SIGINT; returns the number of requests that got no response.

        ``started`` is called when each process has answered a request to the address. Raises ``KdexportError`` if the
        start fails, or if processes end again and again.
        """
        self._changing, self._failed = asyncio.Lock(), asyncio.get_running_loop().create_future()
        signals = Signals(abort=self._abort)
        stopping = asyncio.ensure_future(signals.stopping.wait())
        opening = asyncio.ensure_future(self._open(context))
        first: list[asyncio.Future[Any]] = [stopping, opening]
        tasks: list[asyncio.Task[None]] = []
        try:
            await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
            if not opening.done():
                raise Stopped(signals.number)
            metrics = await opening
            started(self._ports, self._processes[0].announcement)
            tasks = [asyncio.create_task(self._look_after(process)) for process in self._processes]
            tasks += [
                asyncio.create_task(self._reload(signals.reload)),
                asyncio.create_task(watch(self._folders.changed, self._watch_seconds, signals.reload)),
                asyncio.create_task(update_dates(metrics)),
            ]
            ends: list[asyncio.Future[Any]] = [stopping, self._failed]
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            for task in tasks:
                task.cancel()
            cut = await self._drain()
            await metrics.stop(0)
            if self._failed.done():
                self._failed.result()
            return cut
        finally:
            for task in tasks:
                task.cancel()
            for future in first:
                future.cancel()
            self._kill()
            self._sockets.metrics.close()
            await asyncio.gather(*tasks, *first, *self._channels, return_exceptions=True)

    async def _open(self, context: ssl.SSLContext | None) -> Listener:
        """Start all processes, let them listen, and see that each of them answers."""
        count = self._plan.settings.processes
        requests = [self._sockets.requests, *(self._place.bind(shared=False) for _ in range(count - 1))]
        self._folders.note()
        starts = [asyncio.create_task(self._start(number, sock)) for number, sock in enumerate(requests, 1)]
        try:
            self._processes = await asyncio.gather(*starts)
            _require_same(self._processes)
            listen(self._sockets, self._address)
            listen_together(requests[0], requests[1:])
            await asyncio.gather(*(process.channel.ask("serve") for process in self._processes))
        except ChannelClosedError:
            raise ServerError(
                "A process of the server ended before it answered a request.",
                remedy="The lines above have its last words; start the server again, or with --instances 1.",
            ) from None
        finally:
            for start in starts:
                start.cancel()
            # From here on only the processes hold them: that of a process that ends is closed by the system.
            for sock in requests:
                sock.close()
        self._serving.set(count)
        metrics = Listener(create_metrics_app(self._metrics), self._sockets.metrics, self._plan.settings.limits)
        await metrics.start(None)
        port, metrics_port = self._ports.port, self._ports.metrics_port
        identities = [process.identity for process in self._processes]
        await asyncio.to_thread(require_all_answer, self._address, port, identities, context)
        await asyncio.to_thread(
            require_own_answer, self._address.metrics_host, metrics_port, "/metrics", self._identity,
            options=METRICS_OPTIONS,
        )  # fmt: skip
        return metrics

    async def _start(self, number: int, sock: socket.socket) -> _Process:
        """Start a process with a bound socket, and wait until it has loaded the models; raises ``KdexportError``."""
        ours, theirs = socket.socketpair()
        with theirs:
            arguments = [self._plan.to_text(), str(number), str(theirs.fileno()), str(sock.fileno())]
            child = launch(_WORKER, arguments, descriptors=(theirs.fileno(), sock.fileno()))
        self._children.append(child)
        channel = await Channel.open(ours, self._answer)
        self._channels.append(channel.closed)
        try:
            described = await channel.ask("describe")
        except ChannelClosedError:
            self._children.remove(child)
            raise ServerError(
                f"Process {number} of the server {await _end_of(child)} while it loaded the models.",
                remedy="The lines above have its last words; see kdexport doctor for the bundles.",
            ) from None
        except BaseException:
            self._end(child)
            raise
        told = Announcement.from_json(described["announcement"])
        return _Process(number, child, channel, described["identity"], told, described["models"])

    async def _look_after(self, process: _Process) -> None:
        """Start a process that ends again, unless that happens again and again."""
        while True:
            await asyncio.wait({process.channel.closed})
            self._processes.remove(process)
            self._past = summed_metrics([self._past, process.counted], growing=True)
            how = await _end_of(process.child)
            # Not before: a process that is killed loses its channel a moment before its socket, which still gets
            # connections.
            self._serving.set(len(self._processes))
            self._children.remove(process.child)
            _log.error("Process %d %s; it is started again.", process.number, how)
            now = time.monotonic()
            self._ends = [end for end in (*self._ends, now) if end > now - _ENDS_SECONDS]
            if len(self._ends) > _MOST_ENDS:
                self._fail(
                    ServerError(
                        f"Processes of the server ended {len(self._ends)} times within {_ENDS_SECONDS:g} s; the last "
                        f"one {how}.",
                        remedy="The lines above have their last words; see kdexport doctor for the bundles.",
                    )
                )
                return
            found = await self._start_again(process.number)
            if found is None:
                return
            process = found

    async def _start_again(self, number: int) -> _Process | None:
        """A new process in place of one that ended, however long it takes; None if none is left and this one fails."""
        while True:
            try:
                async with self._changing:
                    process = await self._join(number)
            except (KdexportError, ChannelClosedError, OSError) as error:
                words = str(error) or type(error).__name__
                if not self._processes:
                    self._fail(
                        error
                        if isinstance(error, KdexportError)
                        else ServerError(f"No process of the server is left: {words}.", remedy="Start it again.")
                    )
                    return None
                _log.error("Process %d could not be started, and the others serve on: %s", number, words)
                await asyncio.sleep(_RETRY_SECONDS)
                continue
            self._restarts.inc()
            return process

    async def _join(self, number: int) -> _Process:
        """Start a process whose socket joins those of the others."""
        with self._place.bind(shared=True) as sock:
            process = await self._start(number, sock)
            try:
                # Bundles replaced since the last reload, or refused by it, are not served by one process only.
                _require_same([*self._processes, process])
                sock.listen(BACKLOG)
                await process.channel.ask("serve")
            except BaseException:
                self._end(process.child)
                raise
        self._processes.append(process)
        self._serving.set(len(self._processes))
        return process

    async def _reload(self, wanted: asyncio.Event) -> None:
        while True:
            await wanted.wait()
            wanted.clear()
            async with self._changing:
                for attempt in range(_RELOADS):
                    if attempt:
                        await asyncio.sleep(_RELOAD_PAUSE_SECONDS)
                    if await self._reload_once():
                        break
                else:
                    _log.error(
                        "The reload failed, and what was loaded stays: the processes of the server found different "
                        "bundles. Send SIGHUP again when they are in place."
                    )

    async def _reload_once(self) -> bool:
        """Let all processes load what changed, and serve it if all have found the same; returns whether they did."""
        self._folders.note()
        processes = list(self._processes)
        answers = await asyncio.gather(*(each.channel.ask("prepare") for each in processes), return_exceptions=True)
        ready, found = [], []
        for process, answer in zip(processes, answers, strict=True):
            if isinstance(answer, dict):
                ready.append(process)
                found.append(answer)
            elif not isinstance(answer, ChannelClosedError):
                _log.error("The reload of process %d failed, and what was loaded stays: %s", process.number, answer)
                return True
        for error in dict.fromkeys(error for answer in found for error in answer["errors"]):
            _log.error("The reload failed, and what was loaded stays: %s", error)
        same = all(answer["models"] == found[0]["models"] for answer in found)
        question = "adopt" if same else "discard"
        await asyncio.gather(*(each.channel.ask(question) for each in ready), return_exceptions=True)
        for process, answer in zip(ready, found, strict=True):
            if same:
                process.models = answer["models"]
        return same

    async def _answer(self, question: str, argument: Any) -> Any:
        """Answer a question of a process: the statistics of all."""
        if question != "statistics":
            raise ValueError(question, argument)
        asked = (asyncio.wait_for(each.channel.ask("statistics"), _ANSWER_SECONDS) for each in self._processes)
        answers = await asyncio.gather(*asked, return_exceptions=True)
        if any(isinstance(answer, TimeoutError) for answer in answers):
            raise ServerError("A process of the server did not answer.", remedy="Retry later.")
        return [answer for answer in answers if isinstance(answer, list)]

    async def _metrics(self) -> bytes:
        """The metrics of all processes, those of ended ones and of this one."""
        await asyncio.gather(*(_count(process) for process in self._processes))
        own = generate_latest(self._registry).decode()
        return summed_metrics([*(process.counted for process in self._processes), self._past, own]).encode()

    async def _drain(self) -> int:
        """Let all processes drain and end; returns the number of requests that got no response."""
        processes = list(self._processes)
        cuts = await asyncio.gather(*(each.channel.ask("drain") for each in processes), return_exceptions=True)
        for process, cut in zip(processes, cuts, strict=True):
            if not isinstance(cut, int):
                _log.error("Process %d ended while it drained; its last requests got no response.", process.number)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(
                asyncio.gather(*(asyncio.to_thread(child.wait) for child in self._children)), _END_SECONDS
            )
        return sum(cut for cut in cuts if isinstance(cut, int))

    def _fail(self, error: KdexportError) -> None:
        if not self._failed.done():
            self._failed.set_exception(error)

    def _end(self, child: "subprocess.Popen[bytes]") -> None:
        """End a process that answers no request."""
        child.kill()
        child.wait()
        self._children.remove(child)

    def _kill(self) -> None:
        for child in self._children:
            child.kill()

    def _abort(self) -> None:
        self._kill()
        os._exit(_INTERRUPTED)


async def _count(process: _Process) -> None:
    """Read the metrics of a process; what it told last stays if it ends or does not answer in time."""
    with contextlib.suppress(TimeoutError, ChannelClosedError, KdexportError):
        process.counted = await asyncio.wait_for(process.channel.ask("metrics"), _ANSWER_SECONDS)


async def _end_of(child: "subprocess.Popen[bytes]") -> str:
    """How a process ended, after a verb in a sentence."""
    code = await asyncio.to_thread(child.wait)
    return f"ended with exit code {code}" if code >= 0 else f"was ended by {signal.Signals(-code).name}"


def _require_same(processes: Sequence[_Process]) -> None:
    """Raise ``ServerError`` if the processes have loaded different bundles, because some were replaced meanwhile."""
    first = processes[0]
    for process in processes:
        different = sorted(key for key, _ in first.models.items() ^ process.models.items())
        if different:
            raise ServerError(
                f"Processes {first.number} and {process.number} of the server loaded different bundles of "
                f"{', '.join(dict.fromkeys(different))}: they were replaced meanwhile.",
                remedy="Send SIGHUP to the server, or start it again, when all of them are in place.",
            )
