"""Open Inference Protocol v2 without inference: health, metadata, configuration, statistics, index."""

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from kdexport import __version__
from kdexport.backends.ort import CPU
from kdexport.serving.loading import LoadedModel
from kdexport.serving.service import Service

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
