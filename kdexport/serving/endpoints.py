"""The HTTP endpoints: Open Inference Protocol v2 (health, metadata, statistics, inference) and image classification."""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from kdexport import __version__
from kdexport.backends.ort import CPU
from kdexport.backends.pixel_input import Given
from kdexport.errors import RequestError
from kdexport.serving.images import decode_upload
from kdexport.serving.loading import LoadedModel
from kdexport.serving.repository import Repository
from kdexport.serving.requests import INLINE_BYTES, Body, ModelRequest, respond
from kdexport.serving.service import Service
from kdexport.serving.wire import (
    HEADER_LENGTH,
    InferRequest,
    Prediction,
    Predictions,
    body_limit,
    rank,
    read_request,
    write_response,
)
from kdexport.stats.logits import probabilities_of

_EXTENSIONS = ["binary_tensor_data", "classification", "model_configuration", "model_repository", "statistics"]
_PLATFORM = "onnxruntime_onnx"
_DEFAULT_TOP = 5
#: Digits of a number in a header or query that are read at all; longer ones are out of range everywhere.
_MAX_DIGITS = 12


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


def _model(request: Request) -> LoadedModel:
    """The model that the path names."""
    return _service(request).repository.find(request.path_params["model"], request.path_params.get("version"))


async def live(request: Request) -> Response:
    """200 while the event loop runs; ``id`` identifies the process that answers."""
    return JSONResponse({"live": True, "id": _service(request).identity})


async def ready(request: Request) -> Response:
    """200 if load balancers should send new requests to this server, else 503."""
    is_ready = _service(request).ready
    return JSONResponse({"ready": is_ready}, status_code=200 if is_ready else 503)


async def server_metadata(_: Request) -> Response:
    """Name, version and protocol extensions of the server."""
    return JSONResponse({"name": "kdexport", "version": __version__, "extensions": _EXTENSIONS})


async def model_ready(request: Request) -> Response:
    """200 if the model is loaded and the server is ready, else 404 or 503."""
    model, is_ready = _model(request), _service(request).ready
    return JSONResponse({"name": model.name, "ready": is_ready}, status_code=200 if is_ready else 503)


async def model_metadata(request: Request) -> Response:
    """Versions, inputs and outputs of a model; -1 is the batch dimension.

    ``parameters`` has the digest of its bundle and the preprocessing that its input must have had.
    """
    model = _model(request)
    names = _service(request).repository.models
    signature = model.signature
    return JSONResponse(
        {
            "name": model.name,
            "versions": [str(version) for name, version in sorted(names) if name == model.name],
            "platform": _PLATFORM,
            "inputs": [{"name": signature.input_name, "datatype": signature.datatype, "shape": [-1, *signature.shape]}],
            "outputs": [
                {"name": name, "datatype": "FP32", "shape": [-1, len(signature.classes)]} for name in signature.outputs
            ],
            "parameters": {
                "bundle_sha256": model.digest,
                "preprocessing": model.manifest.spec.preprocessing.to_json(),
            },
        }
    )


async def model_config(request: Request) -> Response:
    """The configuration of a model in the form of Triton's."""
    model, service = _model(request), _service(request)
    signature = model.signature
    kind = "KIND_CPU" if model.provider == CPU else "KIND_GPU"
    config: dict[str, Any] = {
        "name": model.name,
        "platform": _PLATFORM,
        "backend": "onnxruntime",
        "version_policy": {"latest": {"num_versions": 1}},
        "max_batch_size": signature.max_batch,
        "input": [
            {
                "name": signature.input_name,
                "data_type": f"TYPE_{signature.datatype}",
                "format": "FORMAT_NONE",
                "dims": signature.shape,
            }
        ],
        "output": [
            {"name": name, "data_type": "TYPE_FP32", "dims": [len(signature.classes)]} for name in signature.outputs
        ],
        "instance_group": [{"name": model.name, "kind": kind, "count": service.total}],
        "parameters": {
            "labels": {"string_value": "\n".join(signature.classes)},
            "bundle_sha256": {"string_value": model.digest},
            "preprocessing": {"string_value": json.dumps(model.manifest.spec.preprocessing.to_json())},
        },
    }
    if model.pace.together > 1:
        preferred = [model.pace.together]
        config["dynamic_batching"] = {"preferred_batch_size": preferred, "max_queue_delay_microseconds": 0}
    return JSONResponse(config)


async def model_statistics(request: Request) -> Response:
    """Counts and durations of one model, of one of its versions, or of all models."""
    service = _service(request)
    models = service.repository.models
    chosen = list(models)
    if "model" in request.path_params:
        found = _model(request)
        versioned = "version" in request.path_params
        chosen = [key for key in chosen if key[0] == found.name and (not versioned or key[1] == found.version)]
    wanted = {(name, str(version)) for name, version in chosen}
    rows = await service.all_statistics()
    return JSONResponse({"model_stats": [row for row in rows if (row["name"], row["version"]) in wanted]})


async def repository_index(request: Request) -> Response:
    """All models and versions, and for each the reason why a newer bundle was refused."""
    repository = _service(request).repository
    rows = {key: {"name": key[0], "version": str(key[1]), "state": "READY", "reason": ""} for key in repository.models}
    for key, reason in repository.refused.items():
        row = rows.setdefault(key, {"name": key[0], "version": str(key[1]), "state": "UNAVAILABLE", "reason": ""})
        row["reason"] = f"A newer bundle was refused: {reason}" if row["state"] == "READY" else reason
    return JSONResponse([row for _, row in sorted(rows.items())])


async def infer(request: Request) -> Response:
    """Inference by the Open Inference Protocol v2, JSON or binary."""
    service, model = _service(request), _model(request)
    run = ModelRequest(service, request, model)
    header_length = read_header_length(request.headers.get(HEADER_LENGTH))
    limit = body_limit(model.signature, service.limits, binary=header_length is not None)

    async def work(body: Body) -> Response:
        arguments = (body, header_length, model.signature, service.limits)
        in_thread = header_length is None and len(body) > INLINE_BYTES
        parsed = await service.off_loop(read_request, *arguments) if in_thread else read_request(*arguments)
        if parsed.header.parameters.timeout:
            run.queue_seconds = min(run.queue_seconds, parsed.header.parameters.timeout / 1e6)
        logits = await run.infer(parsed.images)
        return infer_response(parsed.header, logits, model)

    return await respond(run, limit, work)


def infer_response(header: InferRequest, logits: NDArray[np.float32], model: LoadedModel) -> Response:
    """The response to a request with this header, for the logits (n,K) of its images."""
    content, length = write_response(header, logits, model.signature, model=model.name, version=str(model.version))
    if length is None:
        return Response(content, media_type="application/json")
    return Response(content, media_type="application/octet-stream", headers={HEADER_LENGTH: str(length)})


def read_header_length(value: str | None) -> int | None:
    """The value of Inference-Header-Content-Length, None without one; raises ``RequestError``."""
    if value is None:
        return None
    if not (value.isascii() and value.isdigit()) or len(value) > _MAX_DIGITS:
        raise RequestError(
            f"Inference-Header-Content-Length is {value[:40]!r}, not a number of bytes.",
            remedy="Set it to the number of bytes of the JSON header, or to 0 for a raw tensor.",
        )
    return int(value)


async def classify(request: Request) -> Response:
    """The most probable labels of a JPEG, PNG or WebP image: the body, or the only file of a multipart form."""
    service = _service(request)
    query = request.query_params
    model = queried_model(service.repository, query)
    top = read_top(query.get("top"), model)
    run = ModelRequest(service, request, model)
    content_type = request.headers.get("content-type", "")
    uploaded = service.statistics(model).uploaded

    def decode(body: Body) -> Given:
        data = bytes(body)
        if content_type.lower().startswith("multipart/"):
            data = read_form_file(data, content_type, service.limits.parts)
        pixels = decode_upload(data, model.manifest.spec.preprocessing, service.limits, service.budget, uploaded)
        return model.tensor(pixels)

    async def work(body: Body) -> Response:
        if not body:
            raise RequestError("The body is empty.", remedy="Send a JPEG, PNG or WebP image.")
        (logits,) = await run.infer(await service.off_loop(decode, body))
        return JSONResponse(predictions_of(logits, top, model))

    return await respond(run, service.limits.body, work)


def predictions_of(logits: NDArray[np.float32], top: int, model: LoadedModel) -> Predictions:
    """The ``top`` most probable labels of an image with logits (K,)."""
    probabilities = probabilities_of(logits)
    predictions: list[Prediction] = [
        {"label": model.signature.classes[index], "index": index, "probability": float(probabilities[index])}
        for index in rank(logits, top)
    ]
    return {"model_name": model.name, "model_version": str(model.version), "predictions": predictions}


def queried_model(repository: Repository, query: Mapping[str, str]) -> LoadedModel:
    """The model that the query names, or the only one; raises ``RequestError``."""
    name = query.get("model")
    if name is None:
        names = sorted({key for key, _ in repository.models})
        if len(names) != 1:
            raise RequestError(
                f"The request names no model, and the server has {len(names)}.",
                remedy=f"Add ?model=NAME with one of {', '.join(names)}.",
            )
        name = names[0]
    return repository.find(name, query.get("version"))


def read_top(value: str | None, model: LoadedModel) -> int:
    """The number of labels that a query asks for; raises ``RequestError``."""
    classes = len(model.signature.classes)
    if value is None:
        return min(_DEFAULT_TOP, classes)
    if not (value.isascii() and value.isdigit()) or len(value) > _MAX_DIGITS or not 1 <= int(value) <= classes:
        raise RequestError(f"top must be a number from 1 to {classes}, the classes of the model; got {value[:20]!r}.")
    return int(value)


def read_form_file(body: bytes, content_type: str, max_parts: int) -> bytes:
    """The content of the only part of a multipart body; raises ``RequestError`` for none, several or damaged ones."""
    boundary = parse_options_header(content_type)[1].get(b"boundary")
    if not boundary:
        raise RequestError(
            "The Content-Type of the multipart body has no boundary.",
            remedy="Let the HTTP client set the header, or send the image as the body.",
        )
    parts: list[list[memoryview]] = []
    finished: list[bool] = []
    view = memoryview(body)

    def begin() -> None:
        if len(parts) >= max_parts:
            raise RequestError(f"The form has more than {max_parts} parts.", remedy="Send one part: the image.")
        parts.append([])

    def data(_: bytes, start: int, end: int) -> None:
        parts[-1].append(view[start:end])

    try:
        parser = MultipartParser(
            boundary, {"on_part_begin": begin, "on_part_data": data, "on_end": lambda: finished.append(True)}
        )
        parser.write(body)
        parser.finalize()
    except (FormParserError, ValueError):
        raise RequestError(
            "The multipart body is damaged, or its boundary is not the one in the Content-Type.",
            remedy="Send the image as the body instead.",
        ) from None
    if not finished:
        raise RequestError("The multipart body ends before its closing boundary.", remedy="Send the whole body.")
    if len(parts) != 1:
        raise RequestError(f"The form has {len(parts)} parts (1 allowed).", remedy="Send one part: the image.")
    return b"".join(parts[0])
