"""uvicorn's HTTP protocol with a deadline for everything that a client does, and a bound on how many there are."""

import asyncio
import json
from typing import Any

from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.server import ServerState

from kdexport.serving.limits import Limits
from kdexport.serving.metrics import Metrics

#: The application's own deadline for a body comes first, so that the client hears why.
_BODY_SLACK_SECONDS = 2.0
#: Requests of one connection that may wait for the answer before them; clients in use send one at a time.
_PIPELINED = 8


class Crowd:
    """All connections of a listener; the idle ones in the order in which they fell idle."""

    def __init__(self, limits: Limits, metrics: Metrics | None = None) -> None:
        self.limits = limits
        self.metrics = metrics
        self.everyone: set[Connection] = set()
        self.idle: dict[Connection, None] = {}
        self.closing = False

    def admit(self, newcomer: "Connection") -> bool:
        """Count a connection; the longest idle one makes room for it. False where all are at work."""
        if len(self.everyone) >= self.limits.connections:
            longest = next(iter(self.idle), None)
            if longest is None:
                return False
            longest.evict()
            if self.metrics is not None:
                self.metrics.evicted.inc()
        self.everyone.add(newcomer)
        self.idle[newcomer] = None
        self._count()
        return True

    def busy(self, connection: "Connection") -> None:
        """A request of this connection is being read or answered."""
        self.idle.pop(connection, None)

    def at_rest(self, connection: "Connection") -> None:
        """This connection waits for its next request."""
        self.idle[connection] = None

    def leave(self, connection: "Connection") -> None:
        """A connection is gone."""
        self.everyone.discard(connection)
        self.idle.pop(connection, None)
        self._count()

    def close(self) -> None:
        """From now on every answer is the last one of its connection."""
        self.closing = True
        for connection in self.everyone:
            connection.finish_after_answer()

    def _count(self) -> None:
        if self.metrics is not None:
            self.metrics.connections.set(len(self.everyone))


class Connection(HttpToolsProtocol):
    """One connection. At most one deadline runs at a time: for the header, then for the body; writing has its own."""

    def __init__(self, crowd: Crowd, config: Config, server_state: ServerState, app_state: dict[str, Any]) -> None:
        super().__init__(config=config, server_state=server_state, app_state=app_state)
        self._crowd = crowd
        self._limits = crowd.limits
        self._deadline: asyncio.TimerHandle | None = None
        self._write_deadline: asyncio.TimerHandle | None = None
        self._in_header = False
        self._header_bytes = 0
        self._body_open = False
        self._admitted = False
        self._pipelining = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._admitted = self._crowd.admit(self)
        if not self._admitted:
            self._refuse(503, "Too many connections.")
            return
        self._arm(self._limits.header_seconds, 408, "The request header did not arrive in time.")

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        self._stop_write_deadline()
        self._crowd.leave(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        super().data_received(data)
        if self.parser is None or self.transport.is_closing():
            return
        if self._in_header:
            self._header_bytes += len(data)
            if self._header_bytes > self._limits.header:
                self._refuse(431, f"The request header has more than {self._limits.header} bytes.")
        elif self._deadline is None and self._resting:
            # Line ends between requests are legal, and hold the connection no longer than a header may.
            self._arm(self._limits.header_seconds, 408, "The request header did not arrive in time.")

    @property
    def _resting(self) -> bool:
        return not self._body_open and (self.cycle is None or self.cycle.response_complete)

    def on_message_begin(self) -> None:
        if len(self.pipeline) >= _PIPELINED:
            # Each of them is an object in memory, and a few hundred fit into one packet.
            raise ValueError("too many requests at once")
        if self.cycle is not None and not self.cycle.response_complete:
            # Whoever sends the next request before the answer to this one is the first to go when room is short.
            self._pipelining = True
            self._crowd.at_rest(self)
        super().on_message_begin()
        self._in_header, self._header_bytes = True, 0
        if self._deadline is None:
            self._arm(self._limits.header_seconds, 408, "The request header did not arrive in time.")

    def on_url(self, url: bytes) -> None:
        self._count_header(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count_header(len(name) + len(value) + 4)
        super().on_header(name, value)

    def _count_header(self, size: int) -> None:
        # The whole header may come in one piece, which data_received counts only afterwards.
        self._header_bytes += size
        if self._header_bytes > 2 * self._limits.header:
            raise ValueError("the header is too long")

    def on_headers_complete(self) -> None:
        self._in_header, self._body_open = False, True
        if not self._pipelining:
            self._crowd.busy(self)
        self._arm(self._limits.body_seconds + _BODY_SLACK_SECONDS, 408, "The body did not arrive in time.")
        super().on_headers_complete()
        if self._crowd.closing:
            self.cycle.keep_alive = False

    def on_message_complete(self) -> None:
        self._body_open = False
        self._disarm()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():
            # Closing waits for a client that reads; not for one that does not.
            self._start_write_deadline()
        elif self.cycle.waiting_for_100_continue or (self.expect_100_continue and self._body_open):
            # The client was never told to send its body, and may or may not: what follows cannot be told apart.
            self.transport.close()
            self._start_write_deadline()
        elif not self.pipeline:
            self._pipelining = False
            self._crowd.at_rest(self)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._start_write_deadline()

    def resume_writing(self) -> None:
        self._stop_write_deadline()
        super().resume_writing()

    def timeout_keep_alive_handler(self) -> None:
        if self.transport.get_write_buffer_size():
            self.transport.abort()
        else:
            super().timeout_keep_alive_handler()

    def send_400_response(self, msg: str) -> None:
        if self._header_bytes > self._limits.header:
            self._refuse(431, f"The request header has more than {self._limits.header} bytes.")
        else:
            self._refuse(400, msg)

    def finish_after_answer(self) -> None:
        """The answer under way, or the next one, is the last of this connection."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.keep_alive = False

    def evict(self) -> None:
        """Make room: nothing of this connection is under way."""
        self._crowd.leave(self)
        self.transport.abort()

    def _refuse(self, status: int, message: str) -> None:
        """Answer without the application and close; an earlier request that is whole still gets its own answer."""
        self._disarm()
        if self.transport.is_closing():
            return
        if self._answers_earlier():
            # What follows it is never read: nothing after it can be told apart.
            self.cycle.keep_alive = False
            self.flow.pause_reading()
            return
        if self._leave_unfinished():
            body = json.dumps({"error": message}).encode()
            head = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(body)
            self.transport.write(STATUS_LINE[status] + head + body)
        self.transport.close()
        self._start_write_deadline()

    def _answers_earlier(self) -> bool:
        """Whether the newest request is whole and not answered yet, so that what is refused comes after it."""
        return self.cycle is not None and not self.cycle.response_complete and not self._body_open

    def _leave_unfinished(self) -> bool:
        """Take the request under way from the application; False where its answer has begun, or others wait."""
        if self.cycle is None or self.cycle.response_complete:
            return True
        if self.cycle.response_started or self.pipeline:
            return False
        self.cycle.disconnected = True
        self.cycle.message_event.set()
        return True

    def _arm(self, seconds: float, status: int, message: str) -> None:
        self._disarm()
        self._deadline = self.loop.call_later(seconds, self._refuse, status, message)

    def _disarm(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _start_write_deadline(self) -> None:
        if self._write_deadline is None:
            self._write_deadline = self.loop.call_later(self._limits.write_seconds, self.transport.abort)

    def _stop_write_deadline(self) -> None:
        if self._write_deadline is not None:
            self._write_deadline.cancel()
            self._write_deadline = None
