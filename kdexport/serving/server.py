"""Run the application under uvicorn's protocol: listeners, signals, reloads, and shutdown without lost requests."""

import asyncio
import contextlib
import gc
import logging
import os
import signal
import socket
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from email.utils import formatdate
from typing import Any

from uvicorn.config import Config
from uvicorn.server import ServerState

from kdexport.errors import KdexportError
from kdexport.serving.access_log import AccessLog
from kdexport.serving.app import create_app, create_metrics_app
from kdexport.serving.connection import Connection, ConnectionPool
from kdexport.serving.cross_origin import allow_origins
from kdexport.serving.limits import Limits
from kdexport.serving.listening import (
    BACKLOG,
    Address,
    Ports,
    bind_all,
    drop_new_connections,
    listen,
    require_own_answers,
)
from kdexport.serving.merged_runs import MergedRuns
from kdexport.serving.metrics import Metrics
from kdexport.serving.request_identity import RequestIdentity
from kdexport.serving.service import Service
from kdexport.serving.tracing import traced

_log = logging.getLogger("kdexport.serving")
_DATE_HEADER_SECONDS = 1.0
_POLL_SECONDS = 0.05
_TLS_SHUTDOWN_SECONDS = 1.0
_INTERRUPTED = 130
#: How long idle connections stay open after the port was closed: a request may be on its way on each of them.
_IDLE_SECONDS_AT_STOP = 5.0
_HANDSHAKE_SECONDS = 0.25


@dataclass(frozen=True, kw_only=True, slots=True)
class Surroundings:
    """What lies around the application: where requests are logged, which pages may call it, and whether it is traced.

    ``access_log`` is a file or ``-``; None logs nothing.
    """

    access_log: str | None = None
    origins: tuple[str, ...] = ()
    tracing: bool = False


class Listener:
    """A socket, the application behind it, and its open connections."""

    def __init__(
        self,
        app: Any,
        sock: socket.socket,
        limits: Limits,
        *,
        metrics: Metrics | None = None,
        runs: MergedRuns | None = None,
    ) -> None:
        self.pool = ConnectionPool(limits, metrics, runs)
        self._socket = sock
        self._config = Config(
            app,
            http="httptools",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=limits.keep_alive_seconds,  # type: ignore[arg-type]
        )
        self._config.load()
        self._state = ServerState()
        self._server: asyncio.Server | None = None

    @property
    def port(self) -> int:
        """The port that it listens on."""
        return int(self._socket.getsockname()[1])

    async def start(self, context: ssl.SSLContext | None) -> None:
        """Accept connections."""
        self.update_date_header()
        # The event loop closes this duplicate of the socket; connections that wait in the kernel stay with the other.
        self._server = await asyncio.get_running_loop().create_server(
            self._connection,
            sock=self._socket.dup(),
            ssl=context,
            backlog=BACKLOG,
            ssl_handshake_timeout=self.pool.limits.header_seconds if context else None,
            # An idle client does not answer the shutdown message of TLS either.
            ssl_shutdown_timeout=_TLS_SHUTDOWN_SECONDS if context else None,
        )
        self._context = context

    def _connection(self) -> Connection:
        return Connection(self.pool, self._config, self._state, {})

    def update_date_header(self) -> None:
        """Set the Date header of responses to the current time."""
        date = formatdate(time.time(), usegmt=True).encode()
        self._state.default_headers = [(b"date", date)]
        self.pool.date_line = b"date: %s\r\n" % date

    async def stop(self, seconds: float) -> int:
        """Stop accepting and answer all connected clients; returns the number of requests cut off after ``seconds``."""
        assert self._server is not None
        self.pool.close()
        self._server.close()
        await self._accept_last()
        self._socket.close()
        began = time.monotonic()
        while self.pool.open and time.monotonic() < began + seconds:
            await asyncio.sleep(_POLL_SECONDS)
            if time.monotonic() > began + _IDLE_SECONDS_AT_STOP:
                self.pool.close_idle()
        busy = self.pool.open - self.pool.idle.keys()
        for connection in list(self.pool.open):
            connection.transport.abort()
        return len(busy)

    async def _accept_last(self) -> None:
        """Accept every connection that exists in the kernel; those that a client begins now are not established.

        Closing a listening socket resets the connections that wait in it, also one that arrived after the last look.
        """
        closed = drop_new_connections(self._socket)
        await self._accept_waiting()
        if closed:
            # Handshakes in progress end within the time that a packet takes to the client and back.
            await asyncio.sleep(_HANDSHAKE_SECONDS)
            await self._accept_waiting()

    async def _accept_waiting(self) -> None:
        """Accept the connections that wait in the kernel."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                waiting, _ = self._socket.accept()
            except OSError:
                return
            waiting.setblocking(False)
            await loop.connect_accepted_socket(self._connection, waiting, ssl=self._context)


class Front:
    """A service behind the sockets of its process: one for the models, and one for the metrics if it has its own."""

    def __init__(
        self,
        service: Service,
        requests: socket.socket,
        metrics: socket.socket | None = None,
        surroundings: Surroundings = Surroundings(),
    ) -> None:
        limits = service.limits
        self._service = service
        # uvicorn's lifespan is off: models are loaded before, so that an error gives a message and an exit code.
        app = allow_origins(create_app(service=service), surroundings.origins)
        self._end_traces: Callable[[], object] = lambda: None
        if surroundings.tracing:
            app, self._end_traces = traced(app)
        destination, dropped = surroundings.access_log, service.metrics.dropped_lines.inc
        self._log = None if destination is None else AccessLog(destination, dropped)
        # Only the application makes spans.
        runs = None if surroundings.tracing else MergedRuns(service, self._log)
        app = RequestIdentity(app, self._log)
        self._main = Listener(app, requests, limits, metrics=service.metrics, runs=runs)
        self._metrics = None if metrics is None else Listener(create_metrics_app(service.metrics.text), metrics, limits)
        self._dates: asyncio.Task[None] | None = None

    async def open(self, context: ssl.SSLContext | None) -> None:
        """Answer requests; the sockets listen already."""
        # What is loaded lives as long as the server: no search for garbage in the middle of a request looks at it.
        gc.collect()
        gc.freeze()
        await self._main.start(context)
        if self._metrics is not None:
            await self._metrics.start(None)
        listeners = [self._main] if self._metrics is None else [self._main, self._metrics]
        self._dates = asyncio.create_task(update_dates(*listeners))

    async def drain(self) -> int:
        """Report not ready but keep serving until load balancers have noticed; then stop the listeners.

        Returns the number of requests that got no response.
        """
        limits = self._service.limits
        _log.warning("Draining: the port closes in %g s.", limits.drain_seconds)
        self._service.draining = True
        self._main.pool.close()
        await asyncio.sleep(limits.drain_seconds)
        cut = await self._main.stop(limits.grace_seconds)
        if self._metrics is not None:
            await self._metrics.stop(0)
        return cut

    async def close(self) -> None:
        """End the threads of the service, and write what waits for the access log and the traces."""
        if self._dates is not None:
            self._dates.cancel()
            await asyncio.gather(self._dates, return_exceptions=True)
        await asyncio.to_thread(self._service.close)
        await asyncio.to_thread(self._end_traces)
        if self._log is not None:
            self._log.close()


class Signals:
    """SIGTERM and SIGINT set ``stopping``, SIGHUP sets ``reload``; the second of the former calls ``abort``."""

    def __init__(self, abort: Callable[[], object] = lambda: os._exit(_INTERRUPTED)) -> None:
        self.stopping = asyncio.Event()
        self.reload = asyncio.Event()
        #: The number of the signal that stops the server.
        self.number = signal.SIGTERM
        self._abort = abort
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop, number)
        loop.add_signal_handler(signal.SIGHUP, self.reload.set)

    def _stop(self, number: signal.Signals) -> None:
        if self.stopping.is_set():
            self._abort()
        self.number = number
        self.stopping.set()


class Server:
    """A service in one process, with the models on one port and the metrics on another."""

    def __init__(
        self,
        service: Service,
        address: Address,
        *,
        watch_seconds: float = 0.0,
        surroundings: Surroundings = Surroundings(),
    ) -> None:
        self._service = service
        self._watch_seconds = watch_seconds
        self._address = address
        self._sockets = bind_all(address)
        self._front = Front(service, self._sockets.requests, self._sockets.metrics, surroundings)

    async def run(
        self,
        *,
        context: ssl.SSLContext | None = None,
        started: Callable[[Ports], None] = lambda _: None,
        renew: Callable[[], None] = lambda: None,
    ) -> int:
        """Serve until SIGTERM or SIGINT; returns the number of requests that got no response.

        ``started`` is called when requests to both addresses have been answered by this process, ``renew`` before each
        reload. Raises ``ServerError`` if the requests are not answered.
        """
        signals = Signals()
        listen(self._sockets, self._address)
        await self._front.open(context)
        identity = self._service.identity
        await asyncio.to_thread(require_own_answers, self._address, self._sockets, identity, context)
        started(self._sockets.ports)
        jobs = (
            self._reload(signals.reload, renew),
            watch(self._service.repository.changed, self._watch_seconds, signals.reload),
        )
        tasks = [asyncio.create_task(job) for job in jobs]
        await signals.stopping.wait()
        cut = await self._front.drain()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._front.close()
        return cut

    async def _reload(self, wanted: asyncio.Event, renew: Callable[[], None]) -> None:
        while True:
            await wanted.wait()
            wanted.clear()
            for step in (renew, self._service.reload):
                try:
                    await asyncio.to_thread(step)
                except (KdexportError, OSError) as error:
                    _log.error("The reload failed, and what was loaded stays: %s", error)


async def update_dates(*listeners: Listener) -> None:
    """Keep the Date header of responses at the current time."""
    while True:
        await asyncio.sleep(_DATE_HEADER_SECONDS)
        for listener in listeners:
            listener.update_date_header()


async def watch(changed: Callable[[], bool], seconds: float, wanted: asyncio.Event) -> None:
    """Set ``wanted`` when the bundles on disk have changed, looking every ``seconds``; 0 never looks."""
    while seconds:
        await asyncio.sleep(seconds)
        with contextlib.suppress(OSError):
            if await asyncio.to_thread(changed):
                wanted.set()
