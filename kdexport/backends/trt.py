"""TensorRT 10 and 11 and TensorRT-RTX through their one builder API; the graph carries the precision.

Each engine is built in a process of its own: a crash of the native builder then is an error message, and builds of one
process influence each other's bytes.
"""

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdexport.errors import AuditError, EngineBuildError
from kdexport.targets import Target, unavailable

_MODULES = {"trt": "tensorrt", "trt-rtx": "tensorrt_rtx"}
#: What kernels may read and write; those that multiply must have the first.
_DATATYPES = {"fp32": ("Float",), "fp16": ("Half",), "bf16": ("BFloat16",), "int8": ("Int8", "Float")}
_MULTIPLYING = {"correlation", "gemm", "runtime_fusion"}
_BOOKKEEPING = {"shape_call", "signal", "wait"}
_UNREADABLE = "unreadable"
_TIMEOUT_S = 1800


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineRequest:
    """What is built: an ONNX file, its input shapes (min, opt, max batch) and the GPU generations it must run on."""

    backend: str
    onnx: str
    plan: str
    shape: tuple[int, int, int]
    batches: tuple[int, int, int]
    compute_capabilities: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineLayer:
    """One kernel of the engine: its name, kind, and the data types it reads and writes, scalars left out."""

    name: str
    kind: str
    datatypes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Engine:
    """A serialized engine on disk, untouched, with the layer table of its own build."""

    plan: Path
    layers: tuple[EngineLayer, ...]
    version: str


def build_engine(request: EngineRequest) -> Engine:
    """Build in a child process. Raises ``EngineBuildError`` with the builder's own words."""
    command = [sys.executable, "-m", "kdexport.backends.trt", json.dumps(asdict(request))]
    done = _run_child(command, f"{_MODULES[request.backend]} did not build {Path(request.onnx).name}")
    last = done.stdout.strip().rpartition("\n")[2]
    try:
        answer: dict[str, Any] = json.loads(last)
    except json.JSONDecodeError:
        answer = {"error": f"the builder died with exit code {done.returncode}: {done.stderr.strip()[-500:]}"}
    if "error" in answer:
        raise EngineBuildError(
            f"{_MODULES[request.backend]} did not build {Path(request.onnx).name}: {answer['error']}",
            remedy="The ONNX file is kept in the workspace; its own tools open it as it is.",
        )
    layers = tuple(
        EngineLayer(name=row["name"], kind=row["kind"], datatypes=tuple(row["datatypes"])) for row in answer["layers"]
    )
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


def require_precision(engine: Engine, target: Target) -> None:
    """Raise ``AuditError`` unless every kernel computes in the target's precision, by the build's own layer table.

    int8 means that every convolution and linear layer reads int8; what is between them runs in float32.
    """
    allowed = _DATATYPES[target.precision]
    kernels = [layer for layer in engine.layers if layer.kind not in _BOOKKEEPING]
    wrong = [layer for layer in kernels if not _runs_in(layer, allowed)]
    if wrong or not any(layer.datatypes for layer in kernels):
        first = f"{wrong[0].name} reads or writes {', '.join(wrong[0].datatypes)}" if wrong else "no kernel listed"
        raise AuditError(
            f"{len(wrong)} of {len(kernels)} kernels of {target} do not run in {allowed[0]}: {first}.",
            remedy="The engine is not what was asked for and is not packaged. Report the layer table.",
        )


def _runs_in(layer: EngineLayer, allowed: tuple[str, ...]) -> bool:
    multiplies = layer.kind in _MULTIPLYING and bool(layer.datatypes)
    return set(layer.datatypes) <= set(allowed) and (allowed[0] in layer.datatypes or not multiplies)


def parse_layer_table(messages: list[str], interface: set[str]) -> list[EngineLayer]:
    """Layers of a detailed build log. Tensors of ``interface`` stay float32 by contract and are left out."""
    table = next((text for text in messages if text.startswith("Layers:")), "")
    rows = []
    layers = []
    outside = set(interface)
    for row in table.splitlines()[1:]:
        head = re.match(r"\s*Name: (.*?), LayerType: (\w+)", row)
        if head is None:
            if "LayerType" in row:
                layers.append(EngineLayer(name=row.strip()[:80], kind=_UNREADABLE, datatypes=(_UNREADABLE,)))
            continue
        tensors = re.findall(r"\{ Name: ([^{}]+?), Dimensions: \[([^\]]*)\][^{}]*?Datatype: (\w+)", row)
        rows.append((head[1], head[2], tensors))
        # A kernel that does nothing but hand the logits over, such as cutting off padding, reads a copy of them.
        sources = set(re.findall(r"\[ONNX Layer: ([^\]]*)\]", row))
        if sources and all(re.fullmatch(r"graph_output_cast\d+", source) for source in sources):
            outside |= {tensor for tensor, _, _ in tensors}
    for name, kind, tensors in rows:
        # Constants of one element are scaling factors of the kernel, kept in float32 at any precision.
        types = {datatype for tensor, dims, datatype in tensors if tensor not in outside and dims not in ("1", "")}
        if not tensors and kind not in _BOOKKEEPING:
            # A kernel without a tensor is a log in another format, and no proof of anything.
            types = {_UNREADABLE}
        layers.append(EngineLayer(name=name, kind=kind, datatypes=tuple(sorted(types))))
    return layers


def _build(request: EngineRequest) -> dict[str, Any]:
    trt = importlib.import_module(_MODULES[request.backend])
    messages: list[tuple[str, str]] = []

    class Log(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()

        def log(self, severity: Any, text: str) -> None:
            messages.append((severity.name, text))

    builder = trt.Builder(Log())
    # Required on TensorRT 10, ignored by 11 and RTX, where every network is strongly typed.
    typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if typed is None else 1 << int(typed))
    parser = trt.OnnxParser(network, trt.Logger(trt.Logger.ERROR))
    if not parser.parse_from_file(request.onnx):
        faults = [parser.get_error(i) for i in range(parser.num_errors)]
        return {"error": "; ".join(f"{fault.node_name()}: {fault.desc()}" for fault in faults)}
    if (network.num_inputs, network.num_outputs) != (1, 1):
        return {"error": f"a graph of {network.num_inputs} inputs and {network.num_outputs} outputs, not one of each"}
    interface = {network.get_input(0).name, network.get_output(0).name}
    plan = builder.build_serialized_network(network, _configure(trt, builder, network, request))
    if plan is None:
        return {"error": "; ".join(text for kind, text in messages if kind in ("ERROR", "INTERNAL_ERROR"))}
    Path(request.plan).write_bytes(bytes(plan))
    layers = parse_layer_table([text for _, text in messages], interface)
    return {"version": trt.__version__, "layers": [asdict(layer) for layer in layers]}


def _configure(trt: Any, builder: Any, network: Any, request: EngineRequest) -> Any:
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.clear_flag(trt.BuilderFlag.TF32)
    profile = builder.create_optimization_profile()
    profile.set_shape(network.get_input(0).name, *[(batch, *request.shape) for batch in request.batches])
    config.add_optimization_profile(profile)
    if request.compute_capabilities:
        config.num_compute_capabilities = len(request.compute_capabilities)
        for index, name in enumerate(request.compute_capabilities):
            config.set_compute_capability(getattr(trt.ComputeCapability, name), index)
    return config


def can_execute(target: Target) -> bool:
    """Whether an engine of ``target`` can run on this machine."""
    from kdexport.targets import gpu_fingerprint

    return unavailable(target) is None and bool(gpu_fingerprint())


def run_engine(
    plan: Path, target: Target, images: NDArray[np.float32], batches: tuple[int, ...]
) -> NDArray[np.float32]:
    """Logits (N,K) of an engine on this machine's GPU, in a child process, in batches of the given sizes in turn."""
    with tempfile.TemporaryDirectory() as folder:
        exchange = Path(folder)
        np.save(exchange / "images.npy", images)
        command = [sys.executable, "-m", "kdexport.backends.trt", "run", str(plan), folder, json.dumps(batches)]
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

    from kdexport.verify.parity import run_in_batches

    images = np.load(Path(folder) / "images.npy")
    with TrtRunner(EngineFromBytes(BytesFromPath(plan))) as runner:
        logits = run_in_batches(
            lambda chunk: np.array(runner.infer({"input": chunk})["logits"]), images, tuple(batches)
        )
    np.save(Path(folder) / "logits.npy", logits)


def _main() -> None:
    if sys.argv[1] == "run":
        return _run(sys.argv[2], sys.argv[3], json.loads(sys.argv[4]))
    data = json.loads(sys.argv[1])
    data = {key: tuple(value) if isinstance(value, list) else value for key, value in data.items()}
    try:
        answer = _build(EngineRequest(**data))
    # Native bindings raise RuntimeError, AttributeError and their own; the parent names the builder and quotes this.
    except Exception as error:  # noqa: BLE001
        answer = {"error": f"{type(error).__name__}: {error}"}
    sys.stdout.write(json.dumps(answer) + "\n")
    return None


if __name__ == "__main__":
    _main()
