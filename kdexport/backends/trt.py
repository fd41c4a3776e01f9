"""TensorRT 10 and 11 and TensorRT-RTX through their one builder API; the graph carries the precision.

Each engine is built, and run, in a process of its own (``trt_build``).
"""

import importlib.util
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdexport.backends.trt_build import MODULES, EngineRequest
from kdexport.backends.trt_layers import Engine, EngineLayer, parse_layer_table, require_precision
from kdexport.core.child import ChildDiedError, ChildTimeoutError, call
from kdexport.core.console import print_json
from kdexport.errors import EngineBuildError
from kdexport.targets import Target, gpu_fingerprint


def _rtx_lacks(_target: Target) -> tuple[str, str] | None:
    if importlib.util.find_spec("tensorrt_rtx") is None:
        return "TensorRT-RTX is not installed", "pip install 'kdexport[trt-rtx]'"
    return None


def _trt_lacks(_target: Target) -> tuple[str, str] | None:
    if importlib.util.find_spec("tensorrt") is None:
        return (
            "TensorRT is not installed",
            "Install it from NVIDIA's package index (the packages tensorrt-cu13 or tensorrt, 10.13 to 11), or "
            "build for trt-rtx instead, which needs no GPU at build time",
        )
    if not gpu_fingerprint():
        return "TensorRT builds engines on a GPU, and this machine has none", "Run on a machine with an NVIDIA GPU"
    return None


__all__ = [
    "Engine", "EngineLayer", "EngineRequest", "build_engine", "parse_layer_table", "require_precision",
    "run_engine",
]  # fmt: skip

_TIMEOUT_S = 1800


def build_engine(request: EngineRequest) -> Engine:
    """Build in a child process. Raises ``EngineBuildError`` with the builder's own words."""
    failure = f"{MODULES[request.backend]} did not build {Path(request.onnx).name}"
    kept = "The ONNX file is kept in the workspace; its own tools open it as it is."
    try:
        answer = _call("kdexport.backends.trt_build", [json.dumps(asdict(request))], failure)
    except ChildDiedError as error:
        raise EngineBuildError(
            f"{failure}: the builder died with exit code {error.exit_code}: {error.said}", remedy=kept
        ) from None
    if "refused" in answer:
        raise EngineBuildError(f"{failure}: {answer['refused']}", remedy=kept)
    layers = tuple(EngineLayer.from_json(row) for row in answer["layers"])
    return Engine(plan=Path(request.plan), layers=layers, version=str(answer["version"]))


def run_engine(
    plan: Path, target: Target, images: NDArray[np.float32], batches: tuple[int, ...]
) -> NDArray[np.float32]:
    """Logits (N,K) of an engine on this machine's GPU, in a child process, in batches of the given sizes in turn."""
    with tempfile.TemporaryDirectory() as folder:
        exchange = Path(folder)
        np.save(exchange / "images.npy", images)
        # Polygraphy chooses between TensorRT and TensorRT-RTX when it is imported.
        environment = {"POLYGRAPHY_USE_TENSORRT_RTX": "1" if target.backend == "trt-rtx" else "0"}
        arguments = [str(plan), folder, json.dumps(batches)]
        try:
            _call("kdexport.backends.trt", arguments, f"The engine of {target} did not answer", environment)
        except ChildDiedError as error:
            raise EngineBuildError(
                f"The engine of {target} does not run: {error.said}",
                remedy="An engine runs only on the GPU generation and TensorRT version that it was built for.",
            ) from None
        logits: NDArray[np.float32] = np.load(exchange / "logits.npy")
    return logits


def _call(module: str, arguments: list[str], failure: str, environment: dict[str, str] | None = None) -> Any:
    try:
        return call(module, arguments, timeout_s=_TIMEOUT_S, environment=environment)
    except ChildTimeoutError as error:
        raise EngineBuildError(
            f"{failure} within {error.seconds:g} s.",
            remedy="Ask for fewer compute capabilities, or use a faster machine.",
        ) from None


def _run(plan: str, folder: str, batches: list[int]) -> None:
    from polygraphy.backend.common import BytesFromPath
    from polygraphy.backend.trt import EngineFromBytes, TrtRunner

    from kdexport.backends.base import run_in_batches

    images = np.load(Path(folder) / "images.npy")
    with TrtRunner(EngineFromBytes(BytesFromPath(plan))) as runner:
        logits = run_in_batches(
            lambda chunk: np.array(runner.infer({"input": chunk})["logits"]), images, tuple(batches)
        )
    np.save(Path(folder) / "logits.npy", logits)
    print_json({"images": len(logits)})


if __name__ == "__main__":
    _run(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))
