"""The ASGI application: nothing in it knows which server, container or cluster runs it."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from kdexport.errors import RequestError
from kdexport.serving import endpoints as oip
from kdexport.serving.endpoints import classify, infer
from kdexport.serving.metrics import CONTENT_TYPE
from kdexport.serving.openapi import openapi
from kdexport.serving.repository import parse_sources
from kdexport.serving.service import Service, Settings

_OPEN_PATHS = ("/v2/health/live", "/v2/health/ready")


def create_app(
    bundles: Iterable[str] = (), settings: Settings | None = None, *, service: Service | None = None
) -> Starlette:
    """The server's application for ``bundles`` (``FOLDER`` or ``NAME=FOLDER``).

    Models are loaded when the server starts the application, or before, by ``service.load()``. Under Ray Serve:
    ``serve.ingress(lambda: create_app([...]))``.
    """
    own = service or Service(parse_sources(bundles), settings or Settings())

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        await asyncio.to_thread(own.load)
        yield
        await asyncio.to_thread(own.close)

    app = Starlette(
        routes=routes(),
        lifespan=lifespan,
        exception_handlers={RequestError: _refused, HTTPException: _http_error, Exception: _internal_error},
    )
    app.state.service = own
    app.add_middleware(Guard, service=own)
    return app


def routes() -> list[Route]:
    """Every path; what runs most often comes first."""
    model, version = "/v2/models/{model}", "/v2/models/{model}/versions/{version}"

    def route(path: str, endpoint: Callable[[Request], Any], method: str = "GET") -> Route:
        return Route(path, endpoint, methods=[method])

    return [
        route(f"{model}/infer", infer, "POST"),
        route(f"{version}/infer", infer, "POST"),
        route("/v1/classify", classify, "POST"),
        route("/v2/health/live", oip.live),
        route("/v2/health/ready", oip.ready),
        route("/v2", oip.server_metadata),
        route("/v2/models/stats", oip.model_statistics),
        *[
            route(f"{prefix}{suffix}", endpoint)
            for prefix in (model, version)
            for suffix, endpoint in (
                ("/ready", oip.model_ready),
                ("/config", oip.model_config),
                ("/stats", oip.model_statistics),
                ("", oip.model_metadata),
            )
        ],
        route("/v2/repository/index", oip.repository_index, "POST"),
        route("/openapi.json", openapi),
    ]


def create_metrics_app(service: Service) -> Starlette:
    """``GET /metrics``, for a port of its own that no client of the models needs to reach."""

    async def metrics(_: Request) -> Response:
        return Response(service.metrics.text(), headers={"content-type": CONTENT_TYPE})

    return Starlette(routes=[Route("/metrics", metrics)], exception_handlers={HTTPException: _http_error})


class Guard:
    """Asks for the token before anything else happens; health probes carry none."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, or answer 401."""
        if scope["type"] == "http" and scope["path"] not in _OPEN_PATHS:
            request = Request(scope)
            try:
                self._service.authorise(request.headers)
            except RequestError as error:
                await _refused(request, error)(scope, receive, send)
                return
        await self._app(scope, receive, send)


def error_response(status: int, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
    """The protocol's only form of an error."""
    return JSONResponse({"error": message}, status_code=status, headers=headers)


def _refused(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestError)
    headers = {}
    if error.status in (429, 503):
        headers["retry-after"] = str(1)
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    return error_response(error.status, f"{error.message} {error.remedy}".strip(), headers)


def _http_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    return error_response(error.status_code, error.detail, dict(error.headers or {}))


def _internal_error(_: Request, error: Exception) -> JSONResponse:
    return error_response(500, f"Internal error: {type(error).__name__}.")
