"""Runs the app under uvicorn's protocol: two listeners, signals, and an end that loses nothing."""

import asyncio
import contextlib
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

from kdexport.errors import KdexportError, ServerError
from kdexport.serving.app import create_app, create_metrics_app
from kdexport.serving.connection import Connection, Crowd
from kdexport.serving.limits import Limits
from kdexport.serving.metrics import Metrics
from kdexport.serving.service import Service

_log = logging.getLogger("kdexport.serving")
_BACKLOG = 2048
_TICK_SECONDS = 1.0
_POLL_SECONDS = 0.05
_FAREWELL_SECONDS = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Address:
    """Where to listen; port 0 lets the system choose."""

    host: str = "127.0.0.1"
    port: int = 8000
    metrics_port: int = 8002


@dataclass(frozen=True, kw_only=True, slots=True)
class Running:
    """Where a server listens."""

    port: int
    metrics_port: int


def bind(host: str, port: int) -> socket.socket:
    """A bound socket; raises ``ServerError`` with the reason where it cannot be had."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        bound = socket.socket(family, socket.SOCK_STREAM)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        raise ServerError(
            f"Cannot listen on {host}:{port}: {error.strerror or error}.", remedy="Choose another --host or --port."
        ) from error
    bound.setblocking(False)
    return bound


class Listener:
    """One socket, one app, and the connections between them."""

    def __init__(self, app: Any, sock: socket.socket, limits: Limits, *, metrics: Metrics | None = None) -> None:
        self.crowd = Crowd(limits, metrics)
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
        """The port that the system gave."""
        return int(self._socket.getsockname()[1])

    async def start(self, context: ssl.SSLContext | None) -> None:
        """Accept connections."""
        self.tick()
        # A duplicate is what the event loop closes: connections that still wait in the kernel are not lost with it.
        self._server = await asyncio.get_running_loop().create_server(
            self._connection,
            sock=self._socket.dup(),
            ssl=context,
            backlog=_BACKLOG,
            ssl_handshake_timeout=self.crowd.limits.header_seconds if context else None,
            # A client that is idle does not answer the farewell of TLS either.
            ssl_shutdown_timeout=_FAREWELL_SECONDS if context else None,
        )
        self._context = context

    def _connection(self) -> Connection:
        return Connection(self.crowd, self._config, self._state, {})

    def tick(self) -> None:
        """Write the Date header anew."""
        self._state.default_headers = [(b"date", formatdate(time.time(), usegmt=True).encode())]

    async def stop(self, seconds: float) -> int:
        """Stop accepting, answer everyone who is connected; how many requests were cut off after ``seconds``."""
        assert self._server is not None
        self.crowd.close()
        self._server.close()
        await self._accept_the_waiting()
        self._socket.close()
        deadline = time.monotonic() + seconds
        while self.crowd.everyone and time.monotonic() < deadline:
            await asyncio.sleep(_POLL_SECONDS)
        at_work = self.crowd.everyone - self.crowd.idle.keys()
        for connection in list(self.crowd.everyone):
            connection.transport.abort()
        return len(at_work)

    async def _accept_the_waiting(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                waiting, _ = self._socket.accept()
            except OSError:
                return
            waiting.setblocking(False)
            await loop.connect_accepted_socket(self._connection, waiting, ssl=self._context)


class Server:
    """A service behind two listeners, from its first request to its last."""

    def __init__(self, service: Service, address: Address, *, watch_seconds: float = 0.0) -> None:
        limits = service.limits
        self._service = service
        self._watch_seconds = watch_seconds
        # uvicorn's "off" lifespan: models are loaded before, so that an error is a sentence and an exit code.
        app = create_app(service=service)
        self._main = Listener(app, bind(address.host, address.port), limits, metrics=service.metrics)
        self._metrics = Listener(create_metrics_app(service), bind(address.host, address.metrics_port), limits)
        self._reload_wanted: asyncio.Event
        self._signals = 0

    async def run(
        self, *, context: ssl.SSLContext | None = None, started: Callable[[Running], None] = lambda _: None
    ) -> int:
        """Serve until SIGTERM or SIGINT; returns the number of requests that were cut off."""
        loop = asyncio.get_running_loop()
        stopping = asyncio.Event()
        self._reload_wanted = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop, stopping)
        loop.add_signal_handler(signal.SIGHUP, self._reload_wanted.set)
        await self._main.start(context)
        await self._metrics.start(None)
        started(Running(port=self._main.port, metrics_port=self._metrics.port))
        chores = [asyncio.create_task(chore) for chore in (self._tick(), self._reload(), self._watch())]
        await stopping.wait()
        cut = await self._drain()
        for chore in chores:
            chore.cancel()
        await asyncio.gather(*chores, return_exceptions=True)
        await asyncio.to_thread(self._service.close)
        return cut

    def _stop(self, stopping: asyncio.Event) -> None:
        self._signals += 1
        if self._signals > 1:
            os._exit(130)
        stopping.set()

    async def _drain(self) -> int:
        """Not ready at once, but serving on: whoever balances the load needs a moment to notice."""
        limits = self._service.limits
        _log.warning("Draining: %g s until the port closes.", limits.drain_seconds)
        self._service.draining = True
        self._main.crowd.close()
        await asyncio.sleep(limits.drain_seconds)
        cut = await self._main.stop(limits.grace_seconds)
        await self._metrics.stop(0)
        return cut

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(_TICK_SECONDS)
            self._main.tick()
            self._metrics.tick()

    async def _watch(self) -> None:
        while self._watch_seconds:
            await asyncio.sleep(self._watch_seconds)
            with contextlib.suppress(OSError):
                if await asyncio.to_thread(self._service.repository.changed):
                    self._reload_wanted.set()

    async def _reload(self) -> None:
        while True:
            await self._reload_wanted.wait()
            self._reload_wanted.clear()
            try:
                await asyncio.to_thread(self._service.reload)
            except (KdexportError, OSError) as error:
                _log.error("Reload failed: %s", error)
