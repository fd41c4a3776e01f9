"""``GET /openapi.json``: the OpenAPI document of the server, from which clients can generate code.

Paths come from the routes and schemas from the types of requests and responses, by pydantic. starlette's own
``SchemaGenerator`` is not used: it takes the description of an operation from YAML in the docstring of its function,
and needs a YAML parser for it.
"""

import json
import re
from typing import Any

from pydantic import TypeAdapter
from pydantic.json_schema import JsonSchemaMode
from starlette.requests import Request
from starlette.responses import Response

from kdexport import __version__
from kdexport.serving.wire import Error, InferRequest, InferResponse, Predictions

_BINARY = {"type": "string", "format": "binary"}

_ERRORS = {
    "400": "The request is not valid, or names an input or output that the model does not have",
    "401": "No valid bearer token",
    "404": "No such model, version or path",
    "408": "The header or body did not arrive in time",
    "413": "Body or image too large",
    "415": "Content-Encoding other than gzip or deflate",
    "429": "The server is at capacity; see Retry-After",
    "500": "The model computed NaN or infinity",
    "503": "Starting, draining, or too long in the queue",
    "504": "No response within the deadline",
}
_SUMMARIES = {
    "/v2/health/live": "Liveness",
    "/v2/health/ready": "Readiness",
    "/v2": "Server metadata",
    "/v2/models/stats": "Statistics of all models",
    "/v2/repository/index": "Models and versions",
    "/openapi.json": "This document",
    "/v1/classify": "Labels and probabilities of an image",
}
_SUFFIXES = {"infer": "Inference", "ready": "Model readiness", "config": "Configuration", "stats": "Statistics"}


async def openapi(request: Request) -> Response:
    """An OpenAPI 3.1 document, generated from the routes."""
    state = request.app.state
    if not hasattr(state, "openapi"):
        generated = document([(route.path, sorted(route.methods)) for route in request.app.routes])
        state.openapi = json.dumps(generated, separators=(",", ":")).encode()
    return Response(state.openapi, media_type="application/json")


def document(routes: list[tuple[str, list[str]]]) -> dict[str, Any]:
    """The OpenAPI document for (path, methods) pairs."""
    paths: dict[str, Any] = {}
    for path, methods in routes:
        for method in (name.lower() for name in methods if name != "HEAD"):
            paths.setdefault(path, {})[method] = _operation(path, method)
    return {
        "openapi": "3.1.0",
        "info": {"title": "kdexport", "version": __version__, "description": "Open Inference Protocol v2 and images."},
        "paths": paths,
        "components": {"schemas": _schemas()},
    }


def _schemas() -> dict[str, Any]:
    types = (InferRequest, InferResponse, Predictions, Error)
    adapters: list[tuple[str, JsonSchemaMode, TypeAdapter[Any]]] = [
        (kind.__name__, "validation", TypeAdapter(kind)) for kind in types
    ]
    _, described = TypeAdapter.json_schemas(adapters, ref_template="#/components/schemas/{model}")
    return dict(described["$defs"])


def _operation(path: str, method: str) -> dict[str, Any]:
    summary = _SUMMARIES.get(path) or _SUFFIXES.get(path.rpartition("/")[2], "Model metadata")
    operation: dict[str, Any] = {
        "summary": summary,
        "operationId": re.sub(r"\W+", "_", f"{method}{path}"),
        "parameters": [_parameter(name, "path") for name in re.findall(r"{(\w+)}", path)],
        "responses": {"200": {"description": "OK", "content": {"application/json": {"schema": {}}}}},
    }
    if path.endswith("/infer"):
        length = _parameter("Inference-Header-Content-Length", "header")
        operation["parameters"].append({**length, "description": "Bytes of JSON before the raw tensor"})
        operation["requestBody"] = _content(
            {"application/json": _ref("InferRequest"), "application/octet-stream": _BINARY}
        )
        operation["responses"]["200"]["content"] = _content(
            {"application/json": _ref("InferResponse"), "application/octet-stream": _BINARY}
        )["content"]
    if path == "/v1/classify":
        operation["parameters"] += [_parameter(name, "query") for name in ("model", "version", "top")]
        form = {"type": "object", "properties": {"file": _BINARY}}
        images = {f"image/{kind}": _BINARY for kind in ("jpeg", "png", "webp")}
        operation["requestBody"] = _content({**images, "multipart/form-data": form})
        operation["responses"]["200"]["content"] = _content({"application/json": _ref("Predictions")})["content"]
    for status, description in _ERRORS.items():
        operation["responses"][status] = {"description": description, **_content({"application/json": _ref("Error")})}
        del operation["responses"][status]["required"]
    return operation


def _parameter(name: str, place: str) -> dict[str, Any]:
    return {"name": name, "in": place, "required": place == "path", "schema": {"type": "string"}}


def _ref(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}


def _content(schemas: dict[str, Any]) -> dict[str, Any]:
    return {"required": True, "content": {kind: {"schema": schema} for kind, schema in schemas.items()}}
