"""The identity of each request: taken from the client or made, echoed in the response, and in the access log."""

import os
import re
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kdexport.serving.access_log import AccessLog

REQUEST_ID = "x-request-id"
#: Others could end a header line, or make a log unreadable; such an identity is replaced by one of our own.
_ACCEPTED = re.compile(rb"[A-Za-z0-9._:/+=@-]{1,128}")
#: W3C Trace Context, level 1: version, trace, parent and flags.
_TRACEPARENT = re.compile(rb"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(-.*)?")
_USER_AGENT_CHARACTERS = 200
#: Of 16 random bytes each; asking the system for many at once takes a twentieth of the time.
_RANDOM_BYTES = 16
_MADE_AT_ONCE = 256
_made: list[str] = []


class RequestIdentity:
    """An application around the server's own: the outermost, so that every response has an identity and a line."""

    def __init__(self, app: ASGIApp, log: AccessLog | None = None) -> None:
        self._app = app
        self._log = log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on; its response gets the header ``X-Request-ID``."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = dict(scope["headers"])
        identity = identity_of(given)
        began, status, size = time.perf_counter(), 500, 0

        async def answer(message: Message) -> None:
            nonlocal status, size
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[REQUEST_ID] = identity
            elif message["type"] == "http.response.body":
                size += len(message.get("body", b""))
            await send(message)

        try:
            await self._app(scope, receive, answer)
        finally:
            if self._log is not None:
                seconds = time.perf_counter() - began
                client = scope.get("client")
                self._log.write(
                    log_entry(
                        given, identity, client=client[0] if client else None, method=scope["method"],
                        path=scope["path"], status=status, size=size, seconds=seconds,
                    )
                )  # fmt: skip


def identity_of(given: Mapping[bytes, bytes]) -> str:
    """The identity of a request with these headers, whose names are lower-case: the client's, or a new one."""
    own = given.get(b"x-request-id", b"")
    return own.decode("ascii") if own and _ACCEPTED.fullmatch(own) else _new_identity()


def _new_identity() -> str:
    # Taking the last one of a list is atomic: no two threads get the same.
    try:
        return _made.pop()
    except IndexError:
        digits = os.urandom(_RANDOM_BYTES * (_MADE_AT_ONCE + 1)).hex()
        first, *others = (digits[at : at + 2 * _RANDOM_BYTES] for at in range(0, len(digits), 2 * _RANDOM_BYTES))
        _made.extend(others)
        return first


def log_entry(
    given: Mapping[bytes, bytes],
    identity: str,
    *,
    client: str | None,
    method: str,
    path: str,
    status: int,
    size: int,
    seconds: float,
) -> dict[str, Any]:
    """The line of a request. Neither its query nor its body is in it, nor the token."""
    trace = _TRACEPARENT.fullmatch(given.get(b"traceparent", b""))
    return {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "request_id": identity,
        "trace_id": trace[1].decode() if trace else None,
        "client": client,
        "method": method,
        "path": path,
        "status": status,
        "response_bytes": size,
        "ms": round(seconds * 1000, 3),
        "user_agent": given.get(b"user-agent", b"").decode("latin-1")[:_USER_AGENT_CHARACTERS] or None,
    }
