"""Which extra of kdexport has a package that is missing: one place for what every command says.

Code imports the libraries that it needs, where it needs them. If one is missing, ``ModuleNotFoundError`` goes up to the
command line (or to whoever turns foreign errors into kdexport's own), where ``missing_package`` explains it.
"""

from kdexport.core.digests import tool_versions
from kdexport.errors import BackendUnavailableError

#: The extra of each module that the base installation may lack.
EXTRAS = {
    **dict.fromkeys(
        ("torch", "torchvision", "onnxscript", "onnx_ir", "accelerate", "polygraphy", "tensorboard", "cyclonedx"),
        "build",
    ),
    "scipy": "stats",
    "onnxruntime": "cpu",
    "openvino": "openvino",
    **dict.fromkeys(("ncnn", "pnnx"), "ncnn"),
    **dict.fromkeys(("executorch", "torchao"), "executorch"),
    "ai_edge_litert": "litert",
    "coremltools": "coreml",
    "tensorrt": "trt",
    "tensorrt_rtx": "trt-rtx",
    "timm": "timm",
    **dict.fromkeys(("matplotlib", "jinja2"), "plots"),
    "huggingface_hub": "hub",
    "oras": "hub",
    "opentelemetry": "otel",
    "sklearn": "demo",
    "simplejpeg": "jpeg",
    "model_signing": "sign",
    **dict.fromkeys(("starlette", "uvicorn", "httptools", "prometheus_client", "python_multipart", "uvloop"), "serve"),
    **dict.fromkeys(("tritonclient", "grpc"), "triton"),
}


def missing_package(error: BaseException) -> BackendUnavailableError | None:
    """``error``, or what caused it, as a missing package with the command that installs it; None for another error."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, ModuleNotFoundError):
        cause = cause.__cause__
    name = (cause.name or "").partition(".")[0] if isinstance(cause, ModuleNotFoundError) else ""
    if name not in EXTRAS:
        return None
    found = BackendUnavailableError(f"This needs the package {name}, which is not installed.", remedy=install(name))
    found.__cause__ = error
    return found


def install(module: str) -> str:
    """What to type for a module that is missing."""
    if module == "onnxruntime":
        return (
            "Run pip install 'kdexport[cpu]', or pip install 'kdexport[gpu]' for onnxruntime with CUDA, but not both: "
            "they share one module."
        )
    extra = EXTRAS[module]
    # The extras for a CPU would install a second onnxruntime over the one that is there.
    kind = "-gpu" if extra in ("build", "serve") and _has_onnxruntime_gpu() else ""
    return f"Run pip install 'kdexport[{extra}{kind}]'."


def _has_onnxruntime_gpu() -> bool:
    versions = tool_versions("onnxruntime-gpu", "onnxruntime")
    return versions["onnxruntime-gpu"] != "absent" and versions["onnxruntime"] == "absent"
