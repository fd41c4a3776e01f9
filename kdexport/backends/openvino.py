"""OpenVINO on the CPU, strictly: each layer must run in the requested precision."""

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

from kdexport.backends import BACKENDS
from kdexport.backends.activation_products import activation_products
from kdexport.backends.base import LOGITS, Backend, Clock, Device, Execution, Finding, Missing, Runner
from kdexport.backends.pixel_input import Given, PixelInput, pixel_input
from kdexport.errors import AuditError, BackendUnavailableError, first_line

_DEVICE = "CPU"
_INSTALL = "Run pip install 'kdexport[openvino]'"
_HINTS = {"fp32": "f32", "fp16": "f16", "bf16": "bf16", "int8": "f32"}
#: The types that a layer that multiplies may report, by precision.
RUNTIME_TYPES = {"fp32": ("f32",), "fp16": ("f16",), "bf16": ("bf16",), "int8": ("u8", "i8")}
#: Layers of a classifier that multiply by weights.
_COMPUTING = ("Convolution", "FullyConnected", "MatMul", "Gemm")


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer as OpenVINO executes it: name, kind, type of its computation, and the ONNX nodes that it replaces."""

    name: str
    kind: str
    runtime_type: str
    nodes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class OpenvinoModel:
    """A compiled model and its layers."""

    request: Any
    layers: tuple[Layer, ...]
    #: The devices that OpenVINO reports.
    device: str = _DEVICE
    #: The pixels that the file takes; None if it takes normalised images.
    takes: PixelInput | None = None
    #: The output that holds the logits; looked up once, because timed runs call ``logits``.
    logits_name: str = LOGITS

    def logits(self, images: Given) -> NDArray[np.float32]:
        """(N,3,S,S) float32, or pixels in the layout of a file that takes them, to logits (N,K)."""
        return self.outputs(images, [self.logits_name])[0]

    def outputs(self, images: Given, names: Sequence[str]) -> list[NDArray[np.float32]]:
        """The named outputs for the same ``images`` as ``logits`` takes."""
        given = images if self.takes is None else self.takes.given(images)
        answer = self.request.infer({0: np.ascontiguousarray(given)})
        return [np.array(answer[name]) for name in names]

    @property
    def computing(self) -> tuple[Layer, ...]:
        """The layers that multiply by weights."""
        return tuple(layer for layer in self.layers if layer.kind in _COMPUTING)

    @property
    def kinds(self) -> dict[str, int]:
        """The number of layers of each kind, without constants, inputs and outputs."""
        counts = Counter(layer.kind for layer in self.layers if layer.kind not in ("Const", "Input", "Output"))
        return dict(sorted(counts.items()))


def import_openvino() -> Any:
    """Import OpenVINO with telemetry off; raises ``BackendUnavailableError`` if it is not installed."""
    try:
        with _no_telemetry():
            import openvino
    except ImportError:
        raise BackendUnavailableError("OpenVINO is not installed.", remedy=f"{_INSTALL}.") from None
    return openvino


@contextlib.contextmanager
def _no_telemetry() -> Iterator[None]:
    """Hide the telemetry package, with which OpenVINO would report its import over the network; it then uses a stub."""
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
    """Compile an ONNX file for ``precision``; with ``threads`` 0 OpenVINO chooses their number.

    Raises ``AuditError`` if the file cannot be compiled. OpenVINO may run another precision than requested: ``layers``
    has the types that it reports.
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
        devices = ", ".join(compiled.get_property("EXECUTION_DEVICES"))
        takes = _pixels_taken(path) if compiled.input(0).element_type == openvino.Type.u8 else None
        names = [name for port in compiled.outputs for name in port.names]
        request = compiled.create_infer_request()
        return OpenvinoModel(request, layers, devices, takes, LOGITS if LOGITS in names else names[0])
    # OpenVINO raises RuntimeError with a stack of its own files in the text.
    except RuntimeError as error:
        raise AuditError(
            f"OpenVINO cannot open {path.name}: {first_line(error)}",
            remedy="The file is damaged or has an operator that OpenVINO does not support; build the bundle again.",
        ) from error


def _pixels_taken(path: Path) -> PixelInput:
    import onnx

    metadata = {entry.key: entry.value for entry in onnx.load(str(path), load_external_data=False).metadata_props}
    found = pixel_input(metadata)
    if found is None:
        raise AuditError(
            f"The input of {path.name} is uint8, and its metadata do not say which pixels it takes.",
            remedy="The file is damaged; build the bundle again.",
        )
    return found


def _layer(node: Any) -> Layer:
    facts = node.get_rt_info()
    # Such as `node_linear/WithoutBiases/DequantizationMultiply,logits_QuantizeLinear`.
    nodes = tuple(name.partition("/")[0] for name in facts["originalLayersNames"].astype(str).split(","))
    return Layer(node.get_friendly_name(), facts["layerType"].astype(str), facts["runtimePrecision"].astype(str), nodes)


def _names_of_float_nodes(path: Path, kept: Sequence[str]) -> set[str]:
    """The names that OpenVINO may give to what is float32 in an int8 file: kept layers and products of activations.

    It names a layer by the node or by its result.
    """
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    nodes = {*kept, *activation_products(model)}
    return {name for node in model.graph.node if node.name in nodes for name in (node.name, *node.output)}


def runtime_types(model: OpenvinoModel, precision: str, kept: Set[str]) -> Finding:
    """Whether each layer that multiplies runs in ``precision``, and those of ``kept`` in float32."""
    wanted = RUNTIME_TYPES[precision]
    wrong = [
        layer
        for layer in model.computing
        if layer.runtime_type not in (wanted if kept.isdisjoint(layer.nodes) else RUNTIME_TYPES["fp32"])
    ]
    facts = f"{len(model.computing)} layers in {' or '.join(wanted)}; " + ", ".join(
        f"{count} {kind}" for kind, count in model.kinds.items()
    )
    if wrong:
        first = f"{wrong[0].name} in {wrong[0].runtime_type}"
        facts = f"{len(wrong)} of {len(model.computing)} layers run in another type: {first}"
    return Finding(f"every layer in {precision}", not wrong and bool(model.computing), facts)


@dataclass(frozen=True, slots=True, eq=False)
class OpenvinoRunner(Runner):
    """A target on OpenVINO's CPU device."""

    model: OpenvinoModel
    precision: str
    kept: frozenset[str]

    @property
    def execution(self) -> Execution:
        types = tuple(sorted({layer.runtime_type for layer in self.model.computing}))
        version = str(import_openvino().__version__)
        return Execution(runtime="OpenVINO", version=version, device=self.model.device, types=types)

    @property
    def takes(self) -> PixelInput | None:
        return self.model.takes

    def logits(self, images: Given) -> NDArray[np.float32]:
        return self.model.logits(images)

    def outputs(self, images: Given, names: Sequence[str]) -> list[NDArray[np.float32]]:
        return self.model.outputs(images, names)

    def findings(self) -> list[Finding]:
        return [runtime_types(self.model, self.precision, self.kept)]


@BACKENDS.register("openvino")
class OpenVino(Backend):
    """OpenVINO on the CPU, in precisions that this processor computes in."""

    name = "openvino"
    description = "OpenVINO on a CPU"
    title = "OpenVINO"
    packages = ("openvino",)
    any_interface = True

    def unavailable(self, precision: str) -> Missing | None:
        if importlib.util.find_spec("openvino") is None:
            return Missing("OpenVINO is not installed", _INSTALL)
        if precision == "fp32":
            return None
        here = capabilities()
        if precision.upper() in here:
            return None
        # OpenVINO would accept the request and run float32 without a warning.
        return Missing(
            f"OpenVINO does not compute in {precision} on this CPU, only in {', '.join(name.lower() for name in here)}",
            "Build on a machine whose CPU supports it, or build another precision",
        )

    def open(
        self,
        path: Path,
        precision: str,
        *,
        device: Device | None = None,
        threads: int = 0,
        kept: Sequence[str] = (),
    ) -> Runner:
        if device == "gpu":
            raise BackendUnavailableError("OpenVINO targets run on the CPU.", remedy="Pass --clock host.")
        model = load_openvino(path, precision=precision, threads=threads)
        names = _names_of_float_nodes(path, kept) if precision == "int8" else set()
        return OpenvinoRunner(model, precision, frozenset(names))

    def not_timed_on(self, precision: str, clock: Clock) -> Missing | None:
        if clock == "gpu":
            return Missing("OpenVINO targets run on the CPU", "Pass --clock host")
        return self.unavailable(precision)

    def served_elsewhere(self) -> str:
        return "Serve its file with OpenVINO Model Server"
