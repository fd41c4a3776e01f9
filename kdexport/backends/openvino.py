"""OpenVINO on the CPU, strictly: the precision that was asked for is the one that each layer runs in."""

import contextlib
import importlib.util
import sys
from collections import Counter
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdexport.backends.base import Finding
from kdexport.errors import AuditError, BackendUnavailableError, first_line
from kdexport.targets import Target

_DEVICE = "CPU"

_HINTS = {"fp32": "f32", "fp16": "f16", "bf16": "bf16", "int8": "f32"}

#: What a layer that computes may report for a precision.
RUNTIME_TYPES = {"fp32": ("f32",), "fp16": ("f16",), "bf16": ("bf16",), "int8": ("u8", "i8")}

#: Layers of a classifier that multiply by weights.
_COMPUTING = ("Convolution", "FullyConnected", "MatMul", "Gemm")


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer as OpenVINO executes it: name, kind, the type it computes in, and the nodes that it was made of."""

    name: str
    kind: str
    runtime_type: str
    nodes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class OpenvinoModel:
    """A compiled model and the layers that it consists of."""

    request: Any
    layers: tuple[Layer, ...]

    def logits(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """(N,3,S,S) float32 to logits (N,K)."""
        answer = self.request.infer({0: np.ascontiguousarray(images)})
        return np.array(next(iter(answer.values())))

    @property
    def computing(self) -> tuple[Layer, ...]:
        """The layers that multiply by weights."""
        return tuple(layer for layer in self.layers if layer.kind in _COMPUTING)

    @property
    def kinds(self) -> dict[str, int]:
        """How many layers of each kind there are, constants and ends left out."""
        counts = Counter(layer.kind for layer in self.layers if layer.kind not in ("Const", "Input", "Output"))
        return dict(sorted(counts.items()))


def import_openvino() -> Any:
    """Import OpenVINO with telemetry off; raises ``BackendUnavailableError`` where it is not installed."""
    try:
        with _no_telemetry():
            import openvino
    except ImportError:
        raise BackendUnavailableError("OpenVINO is not installed.", remedy="pip install 'kdexport[openvino]'") from None
    return openvino


@contextlib.contextmanager
def _no_telemetry() -> Iterator[None]:
    """Importing OpenVINO reports the import over the network; without the package for it, it takes a stub instead."""
    name = "openvino_telemetry"
    before = sys.modules.get(name)
    sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[name]
        if before is not None:
            sys.modules[name] = before


def capabilities() -> tuple[str, ...]:
    """The precisions that OpenVINO computes in on this CPU, such as FP32, BF16 and INT8."""
    found = import_openvino().Core().get_property(_DEVICE, "OPTIMIZATION_CAPABILITIES")
    return tuple(name for name in found if name in ("FP32", "FP16", "BF16", "INT8"))


def load_openvino(path: Path, *, precision: str, threads: int = 0) -> OpenvinoModel:
    """Compile an ONNX file for ``precision``. ``threads`` 0 leaves their number to OpenVINO.

    Raises ``AuditError`` where the file cannot be compiled. What really runs is in ``layers``, not in the request.
    """
    openvino = import_openvino()
    # Without a hint a CPU with AMX computes float32 graphs in bfloat16.
    options: dict[str, Any] = {"INFERENCE_PRECISION_HINT": _HINTS[precision], "PERFORMANCE_HINT": "LATENCY"}
    if threads:
        options["INFERENCE_NUM_THREADS"] = threads
    try:
        core = openvino.Core()
        compiled = core.compile_model(core.read_model(str(path)), _DEVICE, options)
        layers = tuple(_layer(node) for node in compiled.get_runtime_model().get_ops())
        return OpenvinoModel(compiled.create_infer_request(), layers)
    # OpenVINO raises RuntimeError with a stack of its own files in the text.
    except RuntimeError as error:
        raise AuditError(
            f"OpenVINO does not open {path.name}: {first_line(error)}",
            remedy="The file is damaged or has an operator that OpenVINO lacks; build it again.",
        ) from error


def _layer(node: Any) -> Layer:
    facts = node.get_rt_info()
    # Such as `node_linear/WithoutBiases/DequantizationMultiply,logits_QuantizeLinear`.
    nodes = tuple(name.partition("/")[0] for name in facts["originalLayersNames"].astype(str).split(","))
    return Layer(node.get_friendly_name(), facts["layerType"].astype(str), facts["runtimePrecision"].astype(str), nodes)


def _openvino_lacks(target: Target) -> tuple[str, str] | None:
    if importlib.util.find_spec("openvino") is None:
        return "OpenVINO is not installed", "pip install 'kdexport[openvino]'"
    if target.precision == "fp32":
        return None

    here = capabilities()
    if target.precision.upper() in here:
        return None
    # Asked all the same, OpenVINO would run float32 and not say so.
    return (
        f"OpenVINO has no {target.precision} on this CPU, only {', '.join(name.lower() for name in here)}",
        "Build on a machine whose CPU has it, or for another precision",
    )


def names_of_nodes(path: Path, nodes: Sequence[str]) -> set[str]:
    """What OpenVINO may call some nodes: by their own names, or by those of what they compute."""
    import onnx

    graph = onnx.load(str(path), load_external_data=False).graph
    return {name for node in graph.node if node.name in nodes for name in (node.name, *node.output)}


def runtime_types_finding(model: OpenvinoModel, target: Target, kept: Set[str]) -> Finding:
    """Whether each layer that multiplies runs in the precision of ``target``, those of ``kept`` in float32."""
    wanted = RUNTIME_TYPES[target.precision]
    wrong = [
        layer
        for layer in model.computing
        if layer.runtime_type not in (wanted if kept.isdisjoint(layer.nodes) else RUNTIME_TYPES["fp32"])
    ]
    facts = f"{len(model.computing)} layers in {' or '.join(wanted)}; " + ", ".join(
        f"{count} {kind}" for kind, count in model.kinds.items()
    )
    if wrong:
        facts = (
            f"{len(wrong)} of {len(model.computing)} layers run otherwise: {wrong[0].name} in {wrong[0].runtime_type}"
        )
    return Finding(f"every layer in {target.precision}", not wrong and bool(model.computing), facts)
