"""``GET /openapi.json``: what the server answers, for clients that generate their own code."""

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from kdexport import __version__


async def openapi(_: Request) -> Response:
    """OpenAPI 3.1."""
    return JSONResponse(document())


def document() -> dict[str, Any]:
    """The whole document."""
    return {"openapi": "3.1.0", "info": {"title": "kdexport", "version": __version__}, "paths": {}}
