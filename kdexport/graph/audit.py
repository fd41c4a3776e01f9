"""What is in a graph, compared with what must be in it."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
from numpy.typing import DTypeLike, NDArray
from onnx import TensorProto, numpy_helper

from kdexport.errors import first_line
from kdexport.graph.audit_int8 import quantized_findings
from kdexport.graph.calibration import Range
from kdexport.graph.export import INPUT, LOGITS
from kdexport.graph.findings import Finding, Weights
from kdexport.graph.precision import BF16_OPSET

__all__ = ["Finding", "Weights", "audit_graph", "operator_counts"]

_FORBIDDEN = {"BatchNormalization", "InstanceNormalization"}
_TYPES = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
_DTYPES: dict[str, DTypeLike] = {"fp32": np.float32, "fp16": np.float16, "bf16": ml_dtypes.bfloat16}


def operator_counts(model: onnx.ModelProto) -> dict[str, int]:
    """Operators of the graph by type."""
    return dict(sorted(Counter(node.op_type for node in model.graph.node).items()))


def audit_graph(
    path: Path,
    weights: Weights,
    *,
    form: str,
    opset: int,
    ranges: Mapping[str, Range] | None = None,
    kept: Sequence[str] = (),
) -> list[Finding]:
    """All findings on one ONNX file, in one of ``targets.FORMS``, of a folded student.

    ``weights`` are its float32 weights by name; ``ranges`` what the scales of an int8 file must come from; ``kept`` the
    nodes that an int8 file must have in float32, and no others.
    """
    try:
        model = onnx.load(str(path), load_external_data=False)
        outside = [item.name for item in model.graph.initializer if item.data_location == TensorProto.EXTERNAL]
        if outside:
            return [Finding("one file", False, f"{len(outside)} tensors lie in another file, first {outside[0]}")]
        onnx.checker.check_model(model, full_check=True)
    # protobuf, the checker and shape inference each raise their own errors on a damaged file.
    except Exception as error:  # noqa: BLE001
        return [Finding("valid ONNX", False, first_line(error))]
    counts = operator_counts(model)
    layers = sum(values.ndim > 1 for values in weights.values())
    found = counts.get("Conv", 0) + counts.get("Gemm", 0) + counts.get("MatMul", 0)
    written = {entry.domain: entry.version for entry in model.opset_import}
    wanted = max(opset, BF16_OPSET) if form == "bf16" else opset
    normalisation = sum(counts.get(name, 0) for name in _FORBIDDEN)
    return [
        Finding("valid ONNX", True, f"{len(model.graph.node)} nodes"),
        Finding("opset", written.get("") == wanted, f"opset {written.get('')}, asked {wanted}"),
        Finding("no batch norm", normalisation == 0, f"{normalisation} normalisation nodes"),
        Finding(
            "no branch", found == layers, f"{found} convolutions and linear layers, the plain student has {layers}"
        ),
        _interface(model),
        *_content(model, weights, form, ranges, kept),
        _portable(path),
    ]


def _content(
    model: onnx.ModelProto, weights: Weights, form: str, ranges: Mapping[str, Range] | None, kept: Sequence[str]
) -> list[Finding]:
    if form in _TYPES:
        return [*_weight_findings(model, weights, form), _precision(model, form)]
    return quantized_findings(model, weights, form=form, ranges=ranges or {}, kept=kept)


def _interface(model: onnx.ModelProto) -> Finding:
    initializers = {item.name for item in model.graph.initializer}
    inputs = [item for item in model.graph.input if item.name not in initializers]
    outputs = list(model.graph.output)
    shapes = [
        [dim.dim_param or dim.dim_value for dim in item.type.tensor_type.shape.dim] for item in (*inputs, *outputs)
    ]
    holds = (
        [item.name for item in inputs] == [INPUT]
        and [item.name for item in outputs] == [LOGITS]
        and all(item.type.tensor_type.elem_type == TensorProto.FLOAT for item in (*inputs, *outputs))
        and all(shape and isinstance(shape[0], str) for shape in shapes)
    )
    names = [item.name for item in (*inputs, *outputs)]
    fact = ", ".join(f"{name} {shape}" for name, shape in zip(names, shapes, strict=True))
    return Finding("dynamic float32 input and logits", holds, fact)


def _weight_findings(model: onnx.ModelProto, weights: Weights, form: str) -> list[Finding]:
    dtype = _DTYPES[form]
    stored = {item.name: numpy_helper.to_array(item) for item in model.graph.initializer}
    wrong: list[str] = []
    for name, values in weights.items():
        expected = values.astype(dtype)
        if name in stored:
            problem = _difference(stored[name], expected)
            if problem:
                wrong.append(f"{name} ({problem})")
        # The exporter drops a bias of zeros and shares equal tensors.
        elif expected.any() and not any(_difference(other, expected) == "" for other in stored.values()):
            wrong.append(f"{name} (absent)")
    fact = f"{len(weights)} tensors compared bit by bit" if not wrong else f"layer {'; '.join(wrong[:3])}"
    return [Finding("weights", not wrong, fact)]


def _difference(stored: NDArray[np.generic], expected: NDArray[np.generic]) -> str:
    if stored.dtype != expected.dtype or stored.shape != expected.shape:
        return f"{stored.dtype}{list(stored.shape)} instead of {expected.dtype}{list(expected.shape)}"
    unequal = stored != expected
    if not unequal.any():
        return ""
    change = np.abs(stored.astype(np.float64) - expected.astype(np.float64))
    index = tuple(int(i) for i in np.unravel_index(np.argmax(change), change.shape))
    return f"{int(unequal.sum())} of {unequal.size} values differ, most by {change[index]:.3g} at {list(index)}"


def _precision(model: onnx.ModelProto, form: str) -> Finding:
    wanted = _TYPES[form]
    floats = {*_TYPES.values(), TensorProto.DOUBLE}
    leftovers = [i.name for i in model.graph.initializer if i.data_type in floats and i.data_type != wanted]
    casts = sum(node.op_type == "Cast" for node in model.graph.node)
    allowed = 0 if form == "fp32" else 2
    fact = f"{casts} casts, {len(leftovers)} weights in another precision" + (f": {leftovers[0]}" if leftovers else "")
    return Finding(f"precision {form}", not leftovers and casts <= allowed, fact)


def _portable(path: Path) -> Finding:
    content = path.read_bytes()
    marks = [mark for mark in (b"site-packages", b"/home/", b"/root/", b"/Users/") if mark in content]
    fact = f"{len(content):,} bytes, one file" if not marks else f"the bytes hold {marks[0].decode()}"
    return Finding("no trace of the building machine", not marks, fact)
