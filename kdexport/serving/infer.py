"""``POST /v2/models/{model}/infer``."""

from starlette.requests import Request
from starlette.responses import Response

from kdexport.serving.answering import INLINE_BYTES, Body, Exchange, answer
from kdexport.serving.errors import RequestError
from kdexport.serving.service import Service
from kdexport.serving.tensors import HEADER_LENGTH, body_limit, read_request, write_response


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
