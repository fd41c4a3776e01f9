"""uvicorn's HTTP protocol with a deadline for every step of a client, and a limit on open connections.

uvicorn has no setting for these: ``limit_concurrency`` answers 503 only after a whole header, and the one timeout is
that of idle connections. A subclass of its protocol is what its setting ``http`` takes, but the state that the subclass
reads (``cycle``, ``flow``, ``pipeline``, ``parser``, ``expect_100_continue``) is not documented and may change. So
pyproject.toml ends the range of uvicorn before 0.60; the tests open real connections, with the version that
constraints.txt names.
"""

import asyncio
import json
from http import HTTPStatus
from typing import Any

from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from kdexport.serving.limits import Limits
from kdexport.serving.merged_runs import MergedRuns
from kdexport.serving.metrics import Metrics

#: The application's deadline for a body ends this much earlier, because its response gives the reason.
_BODY_SLACK_SECONDS = 2.0
#: Requests of one connection that may wait for an earlier response; common clients send one at a time.
_MAX_PIPELINED = 8
#: How long the first part of a plain request waits for the rest of it before the parser reads it.
_REST_SECONDS = 0.005
#: When a connection that is busy at the end of its time to live is looked at again.
_BUSY_SECONDS = 1.0
_OK = b"HTTP/1.1 200 OK\r\n"


class ConnectionPool:
    """The open connections of a listener, and the idle ones among them in the order in which they became idle."""

    def __init__(self, limits: Limits, metrics: Metrics | None = None, runs: MergedRuns | None = None) -> None:
        """``runs`` answers plain requests; without it the application answers all of them."""
        self.limits = limits
        self.metrics = metrics
        self.runs = runs
        self.open: set[Connection] = set()
        self.idle: dict[Connection, None] = {}
        self.closing = False
        #: The line of each response with the time.
        self.date_line = b""

    def add(self, connection: "Connection") -> bool:
        """Add a connection, and at the limit close the longest idle one for it; False if none is idle."""
        if len(self.open) >= self.limits.connections:
            longest_idle = next(iter(self.idle), None)
            if longest_idle is None:
                return False
            longest_idle.evict()
            if self.metrics is not None:
                self.metrics.evicted.inc()
        self.open.add(connection)
        self.idle[connection] = None
        self._count()
        return True

    def mark_busy(self, connection: "Connection") -> None:
        """Record that a request of this connection is being read or answered."""
        self.idle.pop(connection, None)

    def mark_idle(self, connection: "Connection") -> None:
        """Record that this connection waits for its next request."""
        self.idle[connection] = None

    def remove(self, connection: "Connection") -> None:
        """Remove a closed connection."""
        self.open.discard(connection)
        self.idle.pop(connection, None)
        self._count()

    def close(self) -> None:
        """Close each connection after its next response."""
        self.closing = True
        for connection in self.open:
            connection.close_after_response()

    def close_idle(self) -> None:
        """Close the connections on which no request is read or answered."""
        for connection in list(self.idle):
            if connection.is_idle:
                connection.transport.close()

    def _count(self) -> None:
        if self.metrics is not None:
            self.metrics.connections.set(len(self.open))


class Connection(HttpToolsProtocol):
    """One connection, with one deadline for reading (first the header, then the body) and one for writing."""

    def __init__(
        self, pool: ConnectionPool, config: Config, server_state: ServerState, app_state: dict[str, Any]
    ) -> None:
        super().__init__(config=config, server_state=server_state, app_state=app_state)
        self._pool = pool
        self._limits = pool.limits
        self._deadline: asyncio.TimerHandle | None = None
        self._write_deadline: asyncio.TimerHandle | None = None
        self._in_header = False
        self._header_bytes = 0
        self._body_open = False
        self._admitted = False
        self._pipelining = False
        # Whether the next byte is the first of a request.
        self._between_requests = True
        self._is_plain_pending = False
        self._first_part = b""
        self._rest_timer: asyncio.TimerHandle | None = None
        self._unread: list[bytes] = []
        self._quiet_since = 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._admitted = self._pool.add(self)
        if not self._admitted:
            limit = self._limits.connections
            self._refuse(503, f"The server is at capacity: {limit} busy connections (limit {limit}). Retry later.")
            return
        self._start_header_deadline()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_deadline()
        self._stop_write_deadline()
        self._take_first_part()
        self._pool.remove(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        if self._is_plain_pending:
            # The response to the request before these bytes comes first.
            self._unread.append(data)
            self.flow.pause_reading()
        elif not self._take_plain(data):
            self._parse(self._take_first_part() + data)

    def _take_plain(self, data: bytes) -> bool:
        """Whether ``data``, after the first part of the request, is a plain request or a part of one, and was taken."""
        runs = self._pool.runs
        if runs is None or not self._between_requests or not self._is_served or self._pool.closing:
            return False
        data = self._first_part + data
        head = None if self.flow.write_paused else runs.heads.read(data)
        if head is None or len(data) > head.size + head.length:
            return False
        if len(data) < head.size + head.length:
            self._first_part = data
            if self._rest_timer is None:
                self._rest_timer = self.loop.call_later(_REST_SECONDS, self._parse_first_part)
            return True
        if not runs.accept(self, head, data):
            return False
        self._take_first_part()
        self._is_plain_pending = True
        self._stop_deadline()
        self._pool.mark_busy(self)
        return True

    def _take_first_part(self) -> bytes:
        if self._rest_timer is not None:
            self._rest_timer.cancel()
            self._rest_timer = None
        first, self._first_part = self._first_part, b""
        return first

    def _parse_first_part(self) -> None:
        if not self.transport.is_closing():
            self._parse(self._take_first_part())

    @property
    def host(self) -> str | None:
        """The address of the client."""
        return self.client[0] if self.client else None

    @property
    def is_gone(self) -> bool:
        """Whether the connection is closed, or being closed."""
        return self.transport.is_closing()

    def answer(self, lines: bytes, body: bytes) -> None:
        """Answer the plain request with status 200; ``lines`` are those of its header that the application would send.

        They stand where the cycle of the parser puts them.
        """
        closing = self._pool.closing
        end = b"connection: close\r\n\r\n" if closing else b"\r\n"
        self.transport.write(b"".join((_OK, self._pool.date_line, lines, end, body)))
        self._is_plain_pending = False
        if closing:
            self.transport.close()
            self._start_write_deadline()
            return
        self._pool.mark_idle(self)
        self._quiet_since = self.loop.time()
        if self.timeout_keep_alive_task is None:
            self._wait_for_next(self.timeout_keep_alive)
        self._read_on(b"")

    def give_back(self, data: bytes) -> None:
        """Let the application answer the plain request, whose bytes are ``data``."""
        self._is_plain_pending = False
        self._read_on(data)

    def _read_on(self, data: bytes) -> None:
        """Parse ``data``, and read what arrived while a plain request was pending."""
        unread, self._unread = b"".join(self._unread), []
        if unread:
            self.flow.resume_reading()
        if self.transport.is_closing():
            return
        if data:
            self._parse(data + unread)
        elif unread:
            self.data_received(unread)

    def _wait_for_next(self, seconds: float) -> None:
        self.timeout_keep_alive_task = self.loop.call_later(seconds, self.timeout_keep_alive_handler)

    def _parse(self, data: bytes) -> None:
        super().data_received(data)
        if self.parser is None or self.transport.is_closing():
            return
        if self._in_header:
            self._header_bytes += len(data)
            if self._header_bytes > self._limits.header:
                self._refuse_header()
        elif self._deadline is None and self.is_idle:
            # Line ends between requests are legal, but may not keep the connection open longer than a header.
            self._start_header_deadline()

    @property
    def is_idle(self) -> bool:
        """Whether the connection has no open body and no request without a response."""
        return self._is_served and not self._is_plain_pending and not self._first_part

    @property
    def _is_served(self) -> bool:
        """Whether all that the parser has read is a number of whole requests, each with its response."""
        return not self._body_open and (self.cycle is None or self.cycle.response_complete) and not self.pipeline

    def on_message_begin(self) -> None:
        if len(self.pipeline) >= _MAX_PIPELINED:
            # Each of them is an object in memory, and a few hundred fit into one packet.
            raise ValueError("too many pipelined requests")
        if self.cycle is not None and not self.cycle.response_complete:
            # A client that pipelines counts as idle: it is closed first when the connection limit is reached.
            self._pipelining = True
            self._pool.mark_idle(self)
        super().on_message_begin()
        self._between_requests = False
        self._in_header, self._header_bytes = True, 0
        if self._deadline is None:
            self._start_header_deadline()

    def on_url(self, url: bytes) -> None:
        self._count_header(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count_header(len(name) + len(value) + 4)
        super().on_header(name, value)

    def _count_header(self, size: int) -> None:
        # A whole header can arrive at once, which data_received counts only after parsing it.
        self._header_bytes += size
        if self._header_bytes > 2 * self._limits.header:
            raise ValueError("the request header is too long")

    def on_headers_complete(self) -> None:
        self._in_header, self._body_open = False, True
        if not self._pipelining:
            self._pool.mark_busy(self)
        seconds = self._limits.body_seconds
        self._start_deadline(seconds + _BODY_SLACK_SECONDS, f"The body did not arrive within {seconds:g} s.")
        super().on_headers_complete()
        if self._pool.closing:
            self.cycle.keep_alive = False

    def on_message_complete(self) -> None:
        self._body_open = False
        # After a request for another protocol nothing is plain.
        self._between_requests = not self.parser.should_upgrade()
        self._stop_deadline()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():
            # Closing waits until the client has read the response, but no longer than the write deadline.
            self._start_write_deadline()
        elif self.cycle.waiting_for_100_continue or (self.expect_100_continue and self._body_open):
            # The client was not told to send its body and may send it or not, so the next request has no known start.
            self.transport.close()
            self._start_write_deadline()
        elif not self.pipeline:
            self._pipelining = False
            self._pool.mark_idle(self)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._start_write_deadline()

    def resume_writing(self) -> None:
        self._stop_write_deadline()
        super().resume_writing()

    def timeout_keep_alive_handler(self) -> None:
        # One timer serves many plain requests, each of which starts the time again.
        left = self._quiet_since + self.timeout_keep_alive - self.loop.time()
        if left > 0 or not self.is_idle:
            self._wait_for_next(left if left > 0 else _BUSY_SECONDS)
        elif self.transport.get_write_buffer_size():
            self.transport.abort()
        else:
            super().timeout_keep_alive_handler()

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002, the text is the library's
        if self._header_bytes > self._limits.header:
            self._refuse_header()
        else:
            self._refuse(400, "The request is not valid HTTP/1.1, or has too many pipelined requests.")

    def close_after_response(self) -> None:
        """Close the connection after the current or next response."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.keep_alive = False

    def evict(self) -> None:
        """Close this idle connection at once."""
        self._pool.remove(self)
        self.transport.abort()

    def _refuse_header(self) -> None:
        self._refuse(431, f"The request header has more than {self._limits.header} bytes. Send fewer headers.")

    def _refuse(self, status: int, message: str) -> None:
        """Answer without the application and close; a complete earlier request still gets its own response."""
        self._stop_deadline()
        if self.transport.is_closing():
            return
        if self._earlier_request_pending():
            # Nothing after it is read: the start of the next request is not known.
            self.cycle.keep_alive = False
            self.flow.pause_reading()
            return
        if self._abandon_request():
            body = json.dumps({"error": message}).encode()
            head = (
                f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\ncontent-type: application/json\r\n"
                f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
            )
            self.transport.write(head.encode() + body)
        self.transport.close()
        self._start_write_deadline()

    def _earlier_request_pending(self) -> bool:
        """Whether a complete request, which came before the refused bytes, has no response yet."""
        return self.cycle is not None and not self.cycle.response_complete and not self._body_open

    def _abandon_request(self) -> bool:
        """Disconnect the application from the current request; False if its response has begun or others wait."""
        if self.cycle is None or self.cycle.response_complete:
            return True
        if self.cycle.response_started or self.pipeline:
            return False
        self.cycle.disconnected = True
        self.cycle.message_event.set()
        return True

    def _start_header_deadline(self) -> None:
        seconds = self._limits.header_seconds
        self._start_deadline(seconds, f"The request header did not arrive within {seconds:g} s.")

    def _start_deadline(self, seconds: float, message: str) -> None:
        self._stop_deadline()
        self._deadline = self.loop.call_later(seconds, self._refuse, 408, message)

    def _stop_deadline(self) -> None:
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
