"""LiteRT (TensorFlow Lite) on the CPU through its XNNPACK delegate, strictly: what stays outside of it is read back.

The file is written from the ONNX file. It takes one image, channels last: (1,S,S,3) float32.
"""

import importlib.util
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from kdexport.backends import BACKENDS
from kdexport.backends.base import (
    IN_ORDER,
    Backend,
    Clock,
    CompileRequest,
    Device,
    Execution,
    Finding,
    Missing,
    Runner,
)
from kdexport.backends.litert_content import WEIGHTED, content_findings, layers_of
from kdexport.backends.litert_files import INSTALL, import_schema, read_model, table_difference
from kdexport.backends.litert_graph import lite_model
from kdexport.backends.weighted_nodes import float32_graph
from kdexport.core.console import quiet
from kdexport.core.digests import tool_versions
from kdexport.errors import AuditError, BackendUnavailableError, first_line

MODEL = "model.tflite"
_PACKAGE = "ai-edge-litert"
_DELEGATE = "DELEGATE"
_NO_HALF = (
    "LiteRT's interpreter widens float16 weights and multiplies in float32",
    "Run the file in an app with LiteRT's GPU delegate, which computes in float16 (docs/edge.md)",
)


def import_interpreter() -> Any:
    """LiteRT's interpreter; raises ``BackendUnavailableError`` if it is not installed."""
    try:
        with quiet():
            from ai_edge_litert.interpreter import Interpreter
    except ImportError as error:
        raise BackendUnavailableError(
            f"ai-edge-litert is not installed, or not whole: {first_line(error)}.", remedy=f"{INSTALL}."
        ) from error
    return Interpreter


@dataclass(frozen=True, slots=True)
class Delegation:
    """The calls of the delegate that replaced operators, and the kinds of the operators left outside, in order."""

    calls: int
    inside: int
    outside: tuple[str, ...]


def delegation(operations: Sequence[dict[str, Any]]) -> Delegation:
    """What the delegate took over, from the list of operators of an opened file: those between what a call of it reads
    and writes.
    """
    calls = [operation for operation in operations if operation["op_name"] == _DELEGATE]
    plain = [operation for operation in operations if operation["op_name"] != _DELEGATE]
    made = {int(place): operation for operation in plain for place in operation["outputs"]}
    inside: set[int] = set()
    for call in calls:
        ends = {int(place) for place in call["inputs"]}
        waiting = [int(place) for place in call["outputs"]]
        while waiting:
            maker = made.get(waiting.pop())
            if maker is not None and maker["index"] not in inside:
                inside.add(maker["index"])
                waiting += [int(place) for place in maker["inputs"] if int(place) not in ends]
    outside = tuple(operation["op_name"] for operation in plain if operation["index"] not in inside)
    return Delegation(len(calls), len(inside), outside)


@dataclass(frozen=True, slots=True, eq=False)
class LitertRunner(Runner):
    """An opened file."""

    interpreter: Any
    #: The stored types of the weights, read from the file.
    types: tuple[str, ...]

    @property
    def execution(self) -> Execution:
        found = delegation(self.interpreter._get_ops_details())
        device = "XNNPACK" if found.calls else "reference kernels"
        return Execution(runtime="LiteRT", version=tool_versions(_PACKAGE)[_PACKAGE], device=device, types=self.types)

    def logits(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        (given,), (result,) = self.interpreter.get_input_details(), self.interpreter.get_output_details()
        found = []
        for image in images:
            last = np.ascontiguousarray(image.transpose(1, 2, 0)[None], np.float32)
            self.interpreter.set_tensor(given["index"], last)
            self.interpreter.invoke()
            # A copy: the memory of the result is that of the next run.
            found.append(self.interpreter.get_tensor(result["index"]).copy())
        return np.concatenate(found)

    def findings(self) -> list[Finding]:
        found = delegation(self.interpreter._get_ops_details())
        outside = ", ".join(f"{number} {kind}" for kind, number in sorted(Counter(found.outside).items())) or "none"
        wrong = any(kind in WEIGHTED for kind in found.outside)
        fact = f"{found.inside} operators in {found.calls} calls of XNNPACK; outside of it: {outside}"
        return [Finding("layers with weights in XNNPACK", found.calls > 0 and not wrong, fact)]


@BACKENDS.register("litert")
class LiteRT(Backend):
    """LiteRT with XNNPACK: Android, iOS and boards."""

    name = "litert"
    description = "LiteRT (TensorFlow Lite) with XNNPACK on a CPU, for phones and boards"
    title = "LiteRT"
    precisions = ("fp32", "fp16", "int8")
    artifact = MODEL
    packages = (_PACKAGE,)
    one_at_a_time: ClassVar[bool] = True
    repeats_files: ClassVar[bool] = True

    def computes_in(self, precision: str, options: dict[str, Any]) -> str:
        # XNNPACK's float32 kernels: one accumulator for each result, which is the bias at the start.
        return IN_ORDER if precision == "fp32" else self.form(precision)

    def unavailable(self, precision: str) -> Missing | None:
        if importlib.util.find_spec("ai_edge_litert") is None:
            return Missing(f"{_PACKAGE} is not installed", INSTALL)
        return None

    def not_executable(self, precision: str) -> Missing | None:
        return self.unavailable(precision) or (Missing(*_NO_HALF) if precision == "fp16" else None)

    def compile(self, request: CompileRequest) -> None:
        import onnx

        graph = onnx.load(str(request.onnx))
        half = request.precision == "fp16"
        (request.folder / MODEL).write_bytes(lite_model(float32_graph(graph) if half else graph, half=half))

    def difference(self, found: Path, expected: Path) -> str:
        return table_difference(found.read_bytes(), expected.read_bytes())

    def describe(self, folder: Path) -> dict[str, Any]:
        model = read_model((folder / MODEL).read_bytes())
        return {
            "version": tool_versions(_PACKAGE)[_PACKAGE],
            "kernels": sum(operation.kind in WEIGHTED for operation in model.operations),
            "layers": dict(sorted(Counter(operation.kind for operation in model.operations).items())),
        }

    def audit(self, folder: Path, precision: str, kept: Sequence[str]) -> list[Finding]:
        import_schema()
        return content_findings(folder, MODEL, precision, kept)

    def open(
        self,
        path: Path,
        precision: str,
        *,
        device: Device | None = None,
        threads: int = 0,
        kept: Sequence[str] = (),
    ) -> Runner:
        if precision == "fp16":
            raise BackendUnavailableError(f"{_NO_HALF[0]}.", remedy=f"{_NO_HALF[1]}.")
        return _opened(path, threads)

    def stand_in(self, precision: str) -> str | None:
        return "fp32" if precision == "fp16" else None

    def open_stand_in(self, path: Path, precision: str, *, kept: Sequence[str] = ()) -> Runner:
        return _opened(path, 0)

    def not_timed_on(self, precision: str, clock: Clock) -> Missing | None:
        if clock == "gpu":
            return Missing("LiteRT targets run on the CPU", "Pass --clock host")
        return self.not_executable(precision)

    def served_elsewhere(self) -> str:
        return "Load its file in your application with LiteRT (docs/edge.md), or serve onnx-fp32"


def _opened(path: Path, threads: int) -> LitertRunner:
    data = path.read_bytes()
    # LiteRT ends the process on some damaged files, so it is read here first.
    types = tuple(sorted({layer.weight.kind.lower() for layer in layers_of(read_model(data))}))
    interpreter = import_interpreter()
    try:
        with quiet():
            opened = interpreter(model_content=data, num_threads=threads or None)
            opened.allocate_tensors()
    except (RuntimeError, ValueError) as error:
        raise AuditError(
            f"LiteRT cannot open {path.name}: {first_line(error)}.",
            remedy="The file is damaged or of another version; build the bundle again.",
        ) from error
    return LitertRunner(opened, types)
