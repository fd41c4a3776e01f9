"""Which target can be timed on which clock of this machine, and what runs it there.

Which targets of a bundle the server runs, and the providers on which each is what it says.
"""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdexport.backends.discovery import unavailable
from kdexport.backends.ort import CPU, CUDA, TENSORRT
from kdexport.errors import BackendUnavailableError
from kdexport.targets import Target, parse_target

DEFAULT_TARGET = "onnx-fp32"

_Lack = tuple[str, str] | None


def require_runnable(target: str, clock: str) -> None:
    """Raise ``BackendUnavailableError`` where this machine cannot run ``target`` on ``clock`` as what it says."""
    lack = {"host": _host_lacks, "serve": _serve_lacks, "gpu": _gpu_lacks}[clock](parse_target(target))
    if lack is not None:
        raise BackendUnavailableError(f"The clock {clock} cannot time {target}: {lack[0]}.", remedy=f"{lack[1]}.")


def open_on_host(path: Path, target: str, *, threads: int) -> Callable[[NDArray[np.float32]], NDArray[np.float32]]:
    """An ONNX file on the CPU, in the runtime of its target: (n,3,S,S) float32 to logits (n,K)."""
    wanted = parse_target(target)
    if wanted.backend == "openvino":
        from kdexport.backends.openvino import load_openvino

        return load_openvino(path, precision=wanted.precision, threads=threads).logits
    from kdexport.backends.ort import load_model

    return load_model(path, threads=threads).logits


def _host_lacks(target: Target) -> _Lack:
    if target.needs_engine:
        return "it is an engine, and this clock times the CPU", "Pass --clock gpu on a machine with an NVIDIA GPU"
    if target == Target("onnx", "fp16"):
        return "onnxruntime computes a float16 graph in float32 on a CPU", "Pass --clock gpu, or another --target"
    return unavailable(target)


def _serve_lacks(target: Target) -> _Lack:
    from kdexport.backends.ort import CPU

    names = servable_on(CPU)
    if str(target) in names:
        return None
    return f"`kdexport serve` runs the {' or '.join(names)} of a bundle", "Pass --clock host, or such a --target"


def _gpu_lacks(target: Target) -> _Lack:
    torch: Any = importlib.import_module("torch")
    if not torch.cuda.is_available():
        return "no CUDA device was found that events could be recorded on", "Use --clock host or --clock serve here"
    return {"onnx": _cuda_lacks, "trt": _trt_lacks}.get(target.backend, _elsewhere)(target)


def _cuda_lacks(target: Target) -> _Lack:
    from kdexport.backends.ort import CUDA, import_onnxruntime

    if CUDA not in import_onnxruntime().get_available_providers():
        return f"onnxruntime has no {CUDA} here", "Install onnxruntime-gpu with its CUDA libraries"
    if target.precision in ("int8", "bf16"):
        return f"{CUDA} has no {target.precision} convolution", "Pass onnx-fp32, onnx-fp16, or a trt target"
    return None


def _trt_lacks(_target: Target) -> _Lack:
    if importlib.util.find_spec("tensorrt") is None:
        return "TensorRT is not installed", "Install the TensorRT version that the engine was built with"
    return None


def _elsewhere(target: Target) -> _Lack:
    if target.backend == "openvino":
        return "OpenVINO runs it on the CPU", "Pass --clock host"
    # It compiles kernels while it runs: a captured graph may hold for good the slow ones that come first.
    return "TensorRT-RTX compiles while it runs, so that a captured graph says little", "Pass a trt or onnx target"


#: A float16 graph on a CPU would be computed in float32, and an int8 one on CUDA in float32 between casts.
_PROVIDERS = {DEFAULT_TARGET: (CPU, CUDA, TENSORRT), "onnx-fp16": (CUDA,), "onnx-int8": (CPU,)}


def require_servable(target: str, provider: str) -> None:
    """Raise ``BackendUnavailableError`` where ``target`` would run as something else, or not at all."""
    wanted = parse_target(target)
    providers = _PROVIDERS.get(target, ())
    if provider in providers:
        return
    if providers:
        raise BackendUnavailableError(
            f"{provider} does not run {target} as what it says.", remedy=f"Serve it on {' or '.join(providers)}."
        )
    elsewhere = (
        "`kdexport triton` writes a model repository with an engine"
        if wanted.needs_engine
        else "OpenVINO's own model server takes its file"
        if wanted.backend == "openvino"
        else "Serve another target"
    )
    raise BackendUnavailableError(
        f"The server runs {', '.join(_PROVIDERS)} by onnxruntime, not {target}.", remedy=f"{elsewhere}."
    )


def servable_on(provider: str) -> tuple[str, ...]:
    """Targets that the server runs on ``provider``."""
    return tuple(target for target, providers in _PROVIDERS.items() if provider in providers)
