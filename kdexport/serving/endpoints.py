"""Open Inference Protocol v2 without inference: health, metadata, configuration, statistics, index.

``POST /v1/classify``: an image in, its likeliest labels out.

``POST /v2/models/{model}/infer``.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from kdexport import __version__
from kdexport.backends.ort import CPU
from kdexport.errors import RequestError
from kdexport.serving.images import decode_upload
from kdexport.serving.loading import LoadedModel
from kdexport.serving.requests import INLINE_BYTES, Body, Exchange, answer
from kdexport.serving.service import Service
from kdexport.serving.wire import HEADER_LENGTH, body_limit, ranked, read_request, write_response

_EXTENSIONS = ["binary_tensor_data", "classification", "model_configuration", "model_repository", "statistics"]

_PLATFORM = "onnxruntime_onnx"


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


def _model(request: Request) -> LoadedModel:
    return _service(request).repository.find(request.path_params["model"], request.path_params.get("version"))


async def live(_: Request) -> Response:
    """200 while the event loop turns."""
    return JSONResponse({"live": True})


async def ready(request: Request) -> Response:
    """200 while new requests should come here, else 503."""
    is_ready = _service(request).ready
    return JSONResponse({"ready": is_ready}, status_code=200 if is_ready else 503)


async def model_ready(request: Request) -> Response:
    """200 for a model that is loaded, while the server is ready."""
    model, is_ready = _model(request), _service(request).ready
    return JSONResponse({"name": model.name, "ready": is_ready}, status_code=200 if is_ready else 503)


async def server_metadata(_: Request) -> Response:
    """Name, version, extensions."""
    return JSONResponse({"name": "kdexport", "version": __version__, "extensions": _EXTENSIONS})


async def model_metadata(request: Request) -> Response:
    """Inputs and outputs with shapes; -1 is the batch."""
    model = _model(request)
    names = _service(request).repository.models
    signature = model.signature
    size = signature.image_size
    return JSONResponse(
        {
            "name": model.name,
            "versions": [str(version) for name, version in sorted(names) if name == model.name],
            "platform": _PLATFORM,
            "inputs": [{"name": signature.input_name, "datatype": "FP32", "shape": [-1, 3, size, size]}],
            "outputs": [{"name": signature.output_name, "datatype": "FP32", "shape": [-1, len(signature.classes)]}],
        }
    )


async def model_config(request: Request) -> Response:
    """The configuration as Triton would print it."""
    model, service = _model(request), _service(request)
    signature = model.signature
    size = signature.image_size
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
                "data_type": "TYPE_FP32",
                "format": "FORMAT_NONE",
                "dims": [3, size, size],
            }
        ],
        "output": [{"name": signature.output_name, "data_type": "TYPE_FP32", "dims": [len(signature.classes)]}],
        "instance_group": [{"name": model.name, "kind": kind, "count": service.count}],
        "parameters": {"labels": {"string_value": "\n".join(signature.classes)}},
    }
    if model.pace.together > 1:
        preferred = [model.pace.together]
        config["dynamic_batching"] = {"preferred_batch_size": preferred, "max_queue_delay_microseconds": 0}
    return JSONResponse(config)


async def model_statistics(request: Request) -> Response:
    """Counts and durations of one model, of one version of it, or of all."""
    service = _service(request)
    models = service.repository.models
    if "model" in request.path_params:
        one = _model(request)
        versioned = "version" in request.path_params
        chosen = [m for (name, _), m in sorted(models.items()) if name == one.name and (not versioned or m is one)]
    else:
        chosen = [model for _, model in sorted(models.items())]
    return JSONResponse({"model_stats": [service.statistics(model).to_json() for model in chosen]})


async def repository_index(request: Request) -> Response:
    """Every model and version, and why a newer bundle of it was refused."""
    repository = _service(request).repository
    rows = {key: {"name": key[0], "version": str(key[1]), "state": "READY", "reason": ""} for key in repository.models}
    for key, why in repository.refused.items():
        row = rows.setdefault(key, {"name": key[0], "version": str(key[1]), "state": "UNAVAILABLE", "reason": ""})
        row["reason"] = f"a newer bundle was refused: {why}" if row["state"] == "READY" else why
    return JSONResponse([row for _, row in sorted(rows.items())])


_DEFAULT_TOP = 5


async def classify(request: Request) -> Response:
    """A raw body or the one file of a multipart form: JPEG, PNG or WebP."""
    service: Service = request.app.state.service
    model = _wanted(service, request)
    top = _top(request.query_params.get("top"), model)
    exchange = Exchange(service, request, model)
    content_type = request.headers.get("content-type", "")

    def decode(body: Body) -> NDArray[np.float32]:
        data = bytes(body)
        if content_type.lower().startswith("multipart/"):
            data = one_file(data, content_type, service.limits.parts)
        pixels = decode_upload(data, model.manifest.spec.preprocessing, service.limits, service.budget)
        return model.tensor(pixels)

    async def work(body: Body) -> Response:
        if not body:
            raise RequestError("The body is empty; send an image.")
        (logits,) = await exchange.infer(await service.off_loop(decode, body))
        chances = softmax(logits)
        predictions = [
            {"label": model.signature.classes[index], "index": index, "probability": float(chances[index])}
            for index in ranked(logits, top)
        ]
        return JSONResponse({"model_name": model.name, "model_version": str(model.version), "predictions": predictions})

    return await answer(exchange, service.limits.body, work)


def softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """(K,) logits to (K,) probabilities, in float64 and without overflow."""
    exponentials = np.exp(logits.astype(np.float64) - float(logits.max()))
    return np.asarray(exponentials / exponentials.sum())


def _wanted(service: Service, request: Request) -> LoadedModel:
    name = request.query_params.get("model")
    if name is None:
        names = sorted({key for key, _ in service.repository.models})
        if len(names) != 1:
            raise RequestError(f"Several models are served: add ?model=NAME, one of {', '.join(names)}.")
        name = names[0]
    return service.repository.find(name, request.query_params.get("version"))


def _top(value: str | None, model: LoadedModel) -> int:
    classes = len(model.signature.classes)
    if value is None:
        return min(_DEFAULT_TOP, classes)
    if not (value.isascii() and value.isdigit()) or len(value) > 9 or not 1 <= int(value) <= classes:
        raise RequestError(f"top is {value[:20]!r}; the model has {classes} classes.")
    return int(value)


def one_file(body: bytes, content_type: str, max_parts: int) -> bytes:
    """The content of the only part of a multipart body; raises ``RequestError`` for none, several or damaged ones."""
    boundary = parse_options_header(content_type)[1].get(b"boundary")
    if not boundary:
        raise RequestError("The multipart body has no boundary.")
    parts: list[list[memoryview]] = []
    finished: list[bool] = []
    view = memoryview(body)

    def begin() -> None:
        if len(parts) >= max_parts:
            raise RequestError(f"The form has more than {max_parts} parts.")
        parts.append([])

    def data(_: bytes, start: int, end: int) -> None:
        parts[-1].append(view[start:end])

    try:
        parser = MultipartParser(
            boundary, {"on_part_begin": begin, "on_part_data": data, "on_end": lambda: finished.append(True)}
        )
        parser.write(body)
        parser.finalize()
    except (FormParserError, ValueError) as error:
        raise RequestError(f"The multipart body is damaged: {str(error)[:200]}.") from None
    if not finished:
        raise RequestError("The multipart body ends early.")
    if len(parts) != 1:
        raise RequestError(f"The form has {len(parts)} parts (1 allowed): the image.")
    return b"".join(parts[0])


async def infer(request: Request) -> Response:
    """Open Inference Protocol v2, JSON or binary."""
    service: Service = request.app.state.service
    model = service.repository.find(request.path_params["model"], request.path_params.get("version"))
    exchange = Exchange(service, request, model)
    header_length = _header_length(request.headers.get(HEADER_LENGTH))
    limit = body_limit(model.signature, service.limits, binary=header_length is not None)

    async def work(body: Body) -> Response:
        arguments = (body, header_length, model.signature, service.limits)
        heavy = header_length is None and len(body) > INLINE_BYTES
        asked = await service.off_loop(read_request, *arguments) if heavy else read_request(*arguments)
        if asked.request.parameters.timeout:
            exchange.queue_seconds = min(exchange.queue_seconds, asked.request.parameters.timeout / 1e6)
        logits = await exchange.infer(asked.images)
        content, length = write_response(
            asked.request, logits, model.signature, model=model.name, version=str(model.version)
        )
        if length is None:
            return Response(content, media_type="application/json")
        headers = {HEADER_LENGTH: str(length)}
        return Response(content, media_type="application/octet-stream", headers=headers)

    return await answer(exchange, limit, work)


def _header_length(value: str | None) -> int | None:
    if value is None:
        return None
    if not (value.isascii() and value.isdigit()) or len(value) > 12:
        raise RequestError(f"{HEADER_LENGTH} is {value[:40]!r}, not a number of bytes.")
    return int(value)
