"""TensorRT 10 and 11 and TensorRT-RTX through their one builder API; the graph carries the precision.

Each engine is built, and run, in a process of its own (``trt_build``).
"""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdexport.backends.trt_build import MODULES, EngineRequest
from kdexport.backends.trt_layers import Engine, EngineLayer, parse_layer_table, require_precision
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
    command = [sys.executable, "-m", "kdexport.backends.trt_build", json.dumps(asdict(request))]
    done = _run_child(command, f"{MODULES[request.backend]} did not build {Path(request.onnx).name}")
    last = done.stdout.strip().rpartition("\n")[2]
    try:
        answer: dict[str, Any] = json.loads(last)
    except json.JSONDecodeError:
        answer = {"error": f"the builder died with exit code {done.returncode}: {done.stderr.strip()[-500:]}"}
    if "error" in answer:
        raise EngineBuildError(
            f"{MODULES[request.backend]} did not build {Path(request.onnx).name}: {answer['error']}",
            remedy="The ONNX file is kept in the workspace; its own tools open it as it is.",
        )
    layers = tuple(EngineLayer.from_json(row) for row in answer["layers"])
    return Engine(plan=Path(request.plan), layers=layers, version=str(answer["version"]))


def _run_child(
    command: list[str], failure: str, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False, env=environment)
    except subprocess.TimeoutExpired as error:
        raise EngineBuildError(
            f"{failure} within {error.timeout:g} s.",
            remedy="Ask for fewer compute capabilities, or use a faster machine.",
        ) from None


def run_engine(
    plan: Path, target: Target, images: NDArray[np.float32], batches: tuple[int, ...]
) -> NDArray[np.float32]:
    """Logits (N,K) of an engine on this machine's GPU, in a child process, in batches of the given sizes in turn."""
    with tempfile.TemporaryDirectory() as folder:
        exchange = Path(folder)
        np.save(exchange / "images.npy", images)
        command = [sys.executable, "-m", "kdexport.backends.trt", str(plan), folder, json.dumps(batches)]
        # Polygraphy chooses between TensorRT and TensorRT-RTX when it is imported.
        environment = {**os.environ, "POLYGRAPHY_USE_TENSORRT_RTX": "1" if target.backend == "trt-rtx" else "0"}
        done = _run_child(command, f"The engine of {target} did not answer", environment)
        if done.returncode != 0:
            raise EngineBuildError(
                f"The engine of {target} does not run: {done.stderr.strip()[-500:]}",
                remedy="An engine runs only on the GPU generation and TensorRT version that it was built for.",
            )
        logits: NDArray[np.float32] = np.load(exchange / "logits.npy")
    return logits


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


if __name__ == "__main__":
    _run(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))
