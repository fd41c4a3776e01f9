"""The ASGI application: routes, the token check and error responses, the same under any server."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from kdexport.errors import RequestError
from kdexport.serving import endpoints
from kdexport.serving.metrics import CONTENT_TYPE
from kdexport.serving.openapi import openapi
from kdexport.serving.repository import parse_sources
from kdexport.serving.service import Service, Settings
from kdexport.serving.wire import Error

_PATHS_WITHOUT_TOKEN = ("/v2/health/live", "/v2/health/ready")


def create_app(
    bundles: Iterable[str] = (), settings: Settings | None = None, *, service: Service | None = None
) -> Starlette:
    """The server's application for ``bundles`` (``FOLDER`` or ``NAME=FOLDER``).

    Models are loaded when the server starts the application, or before, by ``service.load()``. Under Ray Serve:
    ``serve.ingress(lambda: create_app([...]))``.
    """
    used = service or Service(parse_sources(bundles), settings or Settings())

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        await asyncio.to_thread(used.load)
        yield
        await asyncio.to_thread(used.close)

    app = Starlette(
        routes=routes(),
        lifespan=lifespan,
        exception_handlers={
            RequestError: _answer_request_error,
            HTTPException: _answer_http_error,
            Exception: _answer_internal_error,
        },
    )
    app.state.service = used
    app.add_middleware(TokenCheck, service=used)
    return app


def routes() -> list[Route]:
    """All routes, those that are requested most often first."""
    model, version = "/v2/models/{model}", "/v2/models/{model}/versions/{version}"

    def route(path: str, endpoint: Callable[[Request], Any], method: str = "GET") -> Route:
        return Route(path, endpoint, methods=[method])

    return [
        route(f"{model}/infer", endpoints.infer, "POST"),
        route(f"{version}/infer", endpoints.infer, "POST"),
        route("/v1/classify", endpoints.classify, "POST"),
        route("/v2/health/live", endpoints.live),
        route("/v2/health/ready", endpoints.ready),
        route("/v2", endpoints.server_metadata),
        route("/v2/models/stats", endpoints.model_statistics),
        *[
            route(f"{prefix}{suffix}", endpoint)
            for prefix in (model, version)
            for suffix, endpoint in (
                ("/ready", endpoints.model_ready),
                ("/config", endpoints.model_config),
                ("/stats", endpoints.model_statistics),
                ("", endpoints.model_metadata),
            )
        ],
        route("/v2/repository/index", endpoints.repository_index, "POST"),
        route("/openapi.json", openapi),
    ]


def create_metrics_app(text: Callable[[], bytes | Awaitable[bytes]]) -> Starlette:
    """An application with ``GET /metrics`` only, for a port that clients of the models cannot reach."""

    async def metrics(_: Request) -> Response:
        found = text()
        content = found if isinstance(found, bytes) else await found
        return Response(content, headers={"content-type": CONTENT_TYPE})

    return Starlette(routes=[Route("/metrics", metrics)], exception_handlers={HTTPException: _answer_http_error})


class TokenCheck:
    """Middleware that checks the bearer token of every request except health probes."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer 401."""
        if scope["type"] == "http" and scope["path"] not in _PATHS_WITHOUT_TOKEN:
            request = Request(scope)
            try:
                self._service.authorise(request.headers.get("authorization", ""))
            except RequestError as error:
                await _answer_request_error(request, error)(scope, receive, send)
                return
        await self._app(scope, receive, send)


def error_response(status: int, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
    """An error in the form of the protocol. ``message`` is kdexport's own: no text of a library's exception."""
    return JSONResponse(Error(error=message), status_code=status, headers=headers)


def _answer_request_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestError)
    headers = {}
    if error.status in (429, 503):
        headers["retry-after"] = str(request.app.state.service.limits.retry_after_seconds)
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    return error_response(error.status, f"{error.message} {error.remedy}".strip(), headers)


def _answer_http_error(request: Request, error: Exception) -> JSONResponse:
    """Errors of the router: 404 and 405."""
    assert isinstance(error, HTTPException)
    headers = dict(error.headers or {})
    if error.status_code == 404:
        message = "The server has no endpoint with this path. GET /openapi.json lists all of them."
    elif error.status_code == 405:
        allowed = headers.get("Allow", "another method")
        message = f"This endpoint does not support the method {request.method[:20]} (supported: {allowed})."
    else:
        message = f"The request was refused with HTTP status {error.status_code}."
    return error_response(error.status_code, message, headers)


def _answer_internal_error(_: Request, error: Exception) -> JSONResponse:
    return error_response(500, f"Internal error: {type(error).__name__}. The server's log has the details.")
