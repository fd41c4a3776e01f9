"""``POST /v1/classify``: an image in, its likeliest labels out."""

import numpy as np
from numpy.typing import NDArray
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from kdexport.serving.answering import Body, Exchange, answer
from kdexport.serving.errors import RequestError
from kdexport.serving.images import decode_upload
from kdexport.serving.loading import LoadedModel
from kdexport.serving.service import Service
from kdexport.serving.tensors import ranked

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
