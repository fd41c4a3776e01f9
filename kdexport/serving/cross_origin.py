"""Cross-origin requests: pages of the origins that were named may call the server from a browser."""

import re
from collections.abc import Sequence

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from kdexport.errors import ConfigError
from kdexport.serving.request_identity import REQUEST_ID
from kdexport.serving.wire import HEADER_LENGTH

_ANY = "*"
_ORIGIN = re.compile(r"https?://[A-Za-z0-9.-]+(:\d{1,5})?|https?://\[[0-9a-fA-F:]+\](:\d{1,5})?")
_REQUEST_HEADERS = ("authorization", "content-encoding", "content-type", HEADER_LENGTH, "traceparent", REQUEST_ID)
_RESPONSE_HEADERS = (HEADER_LENGTH, REQUEST_ID, "retry-after")
#: How long a browser may remember the answer to a preflight request.
_SECONDS = 600


def require_origins(origins: Sequence[str]) -> None:
    """Raise ``ConfigError`` for what no browser sends as an origin, such as a path or a trailing slash."""
    for origin in origins:
        if origin != _ANY and not _ORIGIN.fullmatch(origin):
            raise ConfigError(
                f"--cors {origin!r} is not an origin: scheme, host and port, without a path.",
                remedy="For example --cors https://app.example.com or http://localhost:3000; '*' means any page.",
            )


def allow_origins(app: ASGIApp, origins: Sequence[str]) -> ASGIApp:
    """``app`` for pages of ``origins``. Cookies are never accepted; a token is a header that the page must have."""
    if not origins:
        return app
    return CORSMiddleware(
        app,
        allow_origins=origins,
        allow_methods=("GET", "POST"),
        allow_headers=_REQUEST_HEADERS,
        expose_headers=_RESPONSE_HEADERS,
        max_age=_SECONDS,
    )
