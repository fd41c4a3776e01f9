"""The audit of an ONNX file: its operators, interface, weights and precision against the folded student.

For an int8 file, every weight must be within half a step of the student's, every layer must read int8 on both sides
unless the precision plan keeps it in float32, and every activation scale must come from the calibrated range.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import ml_dtypes
import numpy as np
import onnx
from numpy.typing import DTypeLike, NDArray
from onnx import TensorProto, numpy_helper

from kdexport.backends.activation_products import activation_products
from kdexport.backends.base import INPUT, Finding
from kdexport.backends.file_interface import PLAIN_INTERFACE, FileInterface
from kdexport.backends.pixel_input import FLOAT32, image_shape
from kdexport.errors import first_line
from kdexport.graph.interface import without_interface
from kdexport.graph.plan import Weights
from kdexport.graph.precision import BF16_OPSET, factors_of_size
from kdexport.graph.tensor_ranges import Range
from kdexport.reparam.expected import Structure

T = TypeVar("T")

#: Operators with weights.
_LAYERS = ("Conv", "Gemm", "MatMul")
_FORBIDDEN = {"BatchNormalization", "InstanceNormalization"}
_TYPES = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
_DTYPES: dict[str, DTypeLike] = {"fp32": np.float32, "fp16": np.float16, "bf16": ml_dtypes.bfloat16}

_INPUT_TYPES = {
    FLOAT32: TensorProto.FLOAT, "uint8-nhwc": TensorProto.UINT8, "uint8-nchw": TensorProto.UINT8
}  # fmt: skip

#: A weight is rounded to the nearest level: at most half a step off, plus the rounding of its float32 scale.
_HALF_STEP = 0.5 * (1 + 1e-4)

#: Largest relative error of an activation scale.
_SCALE_ERROR = 1e-5

#: Steps between the ends of a range.
_STEPS = {"int8-u8": 255, "int8-s8": 127}
_ZERO_TYPES = {"int8-u8": np.dtype(np.uint8), "int8-s8": np.dtype(np.int8)}


def operator_counts(model: onnx.ModelProto) -> dict[str, int]:
    """Number of nodes by operator type."""
    return dict(sorted(Counter(node.op_type for node in model.graph.node).items()))


def audit_graph(
    path: Path,
    weights: Weights,
    *,
    form: str,
    opset: int,
    structure: Structure | None = None,
    ranges: Mapping[str, Range] | None = None,
    kept: Sequence[str] = (),
    interface: FileInterface = PLAIN_INTERFACE,
) -> list[Finding]:
    """All findings on one ONNX file of a folded student, written in one of ``targets.FORMS``.

    ``weights`` are the float32 weights of the student by name; ``structure`` is that of the folded network, by default
    a chain of plain layers with these weights. For an int8 file, ``ranges`` are the calibrated ranges and ``kept``
    names exactly the nodes that must be float32. ``interface`` is what the file must take and give; the graph between
    the normalisation and the softmax that it adds is audited.
    """
    try:
        model = onnx.load(str(path), load_external_data=False)
        outside = [item.name for item in model.graph.initializer if item.data_location == TensorProto.EXTERNAL]
        if outside:
            return [
                Finding("one file", False, f"{len(outside)} tensors are stored in another file, first {outside[0]}")
            ]
        onnx.checker.check_model(model, full_check=True)
    # protobuf, the checker and shape inference each raise their own errors on a damaged file.
    except Exception as error:  # noqa: BLE001
        return [Finding("valid ONNX", False, first_line(error))]
    plain = structure or Structure(sum(v.ndim > 1 for v in weights.values()), 0, True, frozenset(weights))
    written = {entry.domain: entry.version for entry in model.opset_import}
    wanted = max(opset, BF16_OPSET) if form == "bf16" else opset
    layers = {name: values for name, values in weights.items() if name in plain.weights}
    return [
        Finding("valid ONNX", True, f"{len(model.graph.node)} nodes"),
        Finding("opset", written.get("") == wanted, f"opset {written.get('')}, {wanted} required"),
        *_structure(model, plain),
        _interface(model, interface),
        *_content(without_interface(model), layers, form, ranges, kept),
        _portable(path),
    ]


def _structure(model: onnx.ModelProto, plain: Structure) -> list[Finding]:
    counts = operator_counts(model)
    names = _FORBIDDEN if plain.exact else {"BatchNormalization"}
    norms = sum(counts.get(name, 0) for name in names)
    graph = _Graph.of(model)
    found = sum(node.op_type in _LAYERS and (plain.exact or _has_weight(graph, node)) for node in graph.nodes)
    # Whoever exports a graph may drop a layer whose weights alone decide its result.
    holds = found == plain.layers if plain.exact else found <= plain.layers
    fact = f"{found} convolutions and linear layers, the {'plain student' if plain.exact else 'merged network'} has"
    allowed = f", {plain.norms} could not be merged" if plain.norms else ""
    return [
        Finding("no batch norm", norms <= plain.norms, f"{norms} normalisation nodes{allowed}"),
        Finding("no branch", holds, f"{fact} {plain.layers}"),
    ]


def _has_weight(graph: "_Graph", node: onnx.NodeProto) -> bool:
    return any(graph.constant(name) is not None for name in node.input if name)


def _interface(model: onnx.ModelProto, interface: FileInterface) -> Finding:
    takes = interface.takes
    initializers = {item.name for item in model.graph.initializer}
    inputs = [item for item in model.graph.input if item.name not in initializers]
    outputs = list(model.graph.output)
    shapes = [
        [dim.dim_param or dim.dim_value for dim in item.type.tensor_type.shape.dim] for item in (*inputs, *outputs)
    ]
    holds = (
        [item.name for item in inputs] == [INPUT]
        and [item.name for item in outputs] == list(interface.outputs)
        and [item.type.tensor_type.elem_type for item in inputs] == [_INPUT_TYPES[takes]]
        and all(item.type.tensor_type.elem_type == TensorProto.FLOAT for item in outputs)
        and all(shape and isinstance(shape[0], str) for shape in shapes)
        and (takes == FLOAT32 or shapes[0][1:] == list(image_shape(takes, max(shapes[0][1:]))))
    )
    names = [item.name for item in (*inputs, *outputs)]
    fact = ", ".join(f"{name} {shape}" for name, shape in zip(names, shapes, strict=True))
    return Finding(f"dynamic {takes} input and {' and '.join(interface.outputs)}", holds, fact)


def _content(
    model: onnx.ModelProto, weights: Weights, form: str, ranges: Mapping[str, Range] | None, kept: Sequence[str]
) -> list[Finding]:
    if form in _TYPES:
        stored = {item.name: numpy_helper.to_array(item) for item in model.graph.initializer}
        expected = {name: values.astype(_DTYPES[form]) for name, values in weights.items()}
        wrong = _weight_problems(expected, stored, _difference)
        return [
            _weight_finding(wrong, f"{len(weights)} tensors compared bit by bit"),
            _float_precision(model, form),
        ]
    return _quantized_findings(model, weights, form, ranges or {}, kept)


def _weight_problems(
    weights: Mapping[str, NDArray[Any]], stored: Mapping[str, T], difference: Callable[[T, NDArray[Any]], str]
) -> list[str]:
    """Each weight that is not in the file, or differs from it, with the difference."""
    problems = []
    for name, expected in weights.items():
        if name in stored:
            problem = difference(stored[name], expected)
        # The exporter drops a bias of zeros and stores equal tensors once.
        elif expected.any() and not _is_stored(expected, stored, difference):
            problem = "absent"
        else:
            problem = ""
        if problem:
            problems.append(f"{name} ({problem})")
    return problems


def _is_stored(expected: NDArray[Any], stored: Mapping[str, T], difference: Callable[[T, NDArray[Any]], str]) -> bool:
    """Whether the file holds a weight under any name; it stores that of a product with its axes swapped."""
    written = [expected, expected.T] if expected.ndim == 2 else [expected]
    return any(difference(other, values) == "" for other in stored.values() for values in written)


def _weight_finding(problems: list[str], fact: str) -> Finding:
    return Finding("weights", not problems, f"layer {'; '.join(problems[:3])}" if problems else fact)


def _difference(stored: NDArray[np.generic], expected: NDArray[np.generic]) -> str:
    if stored.dtype != expected.dtype or stored.shape != expected.shape:
        return f"{stored.dtype}{list(stored.shape)} instead of {expected.dtype}{list(expected.shape)}"
    unequal = stored != expected
    if not unequal.any():
        return ""
    change = np.abs(stored.astype(np.float64) - expected.astype(np.float64))
    index = tuple(int(i) for i in np.unravel_index(np.argmax(change), change.shape))
    return f"{int(unequal.sum())} of {unequal.size} values differ, most by {change[index]:.3g} at {list(index)}"


def _float_precision(model: onnx.ModelProto, form: str) -> Finding:
    wanted = _TYPES[form]
    floats = {*_TYPES.values(), TensorProto.DOUBLE}
    exempt = factors_of_size(model)
    stored = [item for item in model.graph.initializer if item.name not in exempt and item.data_type in floats]
    leftovers = [item.name for item in stored if item.data_type != wanted]
    casts = sum(node.op_type == "Cast" for node in model.graph.node)
    allowed = 0 if form == "fp32" else 2
    fact = f"{casts} casts, {len(leftovers)} weights in another precision" + (f": {leftovers[0]}" if leftovers else "")
    return Finding(f"precision {form}", not leftovers and casts <= allowed, fact)


def _portable(path: Path) -> Finding:
    content = path.read_bytes()
    marks = [mark for mark in (b"site-packages", b"/home/", b"/root/", b"/Users/") if mark in content]
    fact = f"{len(content):,} bytes, one file" if not marks else f"the file contains {marks[0].decode()}"
    return Finding("no trace of the building machine", not marks, fact)


@dataclass(frozen=True, slots=True, eq=False)
class _Graph:
    """A model with its nodes, the node that computes each tensor, and its stored tensors."""

    nodes: list[onnx.NodeProto]
    producers: dict[str, onnx.NodeProto]
    stored: dict[str, NDArray[Any]]
    #: Names of the products of two activations.
    products: frozenset[str]

    @classmethod
    def of(cls, model: onnx.ModelProto) -> "_Graph":
        nodes = list(model.graph.node)
        producers = {name: node for node in nodes for name in node.output}
        stored = {item.name: numpy_helper.to_array(item) for item in model.graph.initializer}
        return cls(nodes, producers, stored, frozenset(activation_products(model)))

    @property
    def layers(self) -> list[onnx.NodeProto]:
        """The nodes that multiply by weights."""
        return [node for node in self.nodes if node.op_type in _LAYERS and node.name not in self.products]

    def pair(self, name: str) -> onnx.NodeProto | None:
        """The DequantizeLinear node that computes ``name``, if there is one."""
        node = self.producers.get(name)
        return node if node is not None and node.op_type == "DequantizeLinear" else None

    def constant(self, name: str) -> "_Constant | None":
        """The constant ``name``, stored in float or dequantized from int8; None if it is not constant."""
        if name in self.stored:
            return _Constant(name, self.stored[name].astype(np.float64), None)
        node = self.pair(name)
        if node is None or not all(part in self.stored for part in node.input):
            return None
        levels, scale, *zero = (self.stored[part].astype(np.float64) for part in node.input)
        axis = next((item.i for item in node.attribute if item.name == "axis"), 1)
        spread = [-1 if i == axis % max(levels.ndim, 1) else 1 for i in range(levels.ndim)]
        step = scale if scale.ndim == 0 else scale.reshape(spread)
        offset = zero[0].reshape(step.shape) if zero else 0.0
        return _Constant(node.input[0].removesuffix("_quantized"), (levels - offset) * step, step)


@dataclass(frozen=True, slots=True, eq=False)
class _Constant:
    """A weight as the runtime reads it; ``step`` is the distance between its levels, None if it is not int8."""

    name: str
    values: NDArray[np.float64]
    step: NDArray[np.float64] | None


def _quantized_findings(
    model: onnx.ModelProto, weights: Weights, form: str, ranges: Mapping[str, Range], kept: Sequence[str]
) -> list[Finding]:
    """Findings on an int8 file: weights and biases, the precision of every layer, and activation scales."""
    graph = _Graph.of(model)
    # The bias of a product is an operand of the addition after it, in float32.
    beside = {name for node in graph.nodes for name in node.input if name in graph.stored}
    read = {name for node in graph.layers for name in node.input[1:]}
    found = (graph.constant(name) for name in sorted(beside | read))
    constants = {constant.name: constant for constant in found if constant is not None}
    wrong = _weight_problems(weights, constants, _level_difference)
    return [
        _weight_finding(wrong, f"{len(weights)} tensors within half a step of their levels"),
        _layer_precision(graph, form, kept),
        _scales(graph, form, ranges),
    ]


def _level_difference(constant: _Constant, expected: NDArray[np.float32]) -> str:
    if constant.values.shape != expected.shape:
        return f"{list(constant.values.shape)} instead of {list(expected.shape)}"
    change = np.abs(constant.values - expected.astype(np.float64))
    allowed = np.zeros_like(change) if constant.step is None else np.broadcast_to(constant.step, change.shape)
    wrong = ~(change <= _HALF_STEP * allowed)
    if not wrong.any():
        return ""
    index = tuple(int(i) for i in np.unravel_index(np.argmax(np.where(wrong, change, 0)), change.shape))
    count = f"{int(wrong.sum())} of {wrong.size} values"
    return f"{count} are off by more than half a step, most by {change[index]:.3g} at {list(index)}"


def _layer_precision(graph: _Graph, form: str, kept: Sequence[str]) -> Finding:
    """Every layer reads int8 on both sides, except the kept ones, whose weights are float32."""
    layers = graph.layers
    wrong = [f"there is no layer {name} to keep" for name in kept if name not in {node.name for node in layers}]
    for node in layers:
        wrong += _kept_problems(graph, node) if node.name in kept else _quantized_problems(graph, node)
    wrong += [
        f"{node.name} multiplies activations in int8"
        for node in graph.nodes
        if node.name in graph.products and any(graph.pair(name) is not None for name in node.input)
    ]
    wrong += [f"{name} is stored in float16 or bfloat16" for name, values in graph.stored.items() if _is_half(values)]
    fact = f"{len(layers) - len(kept)} layers read int8 inputs and int8 weights"
    if kept:
        fact += f", {len(kept)} are kept in float32 by the plan"
    if graph.products:
        fact += f", {len(graph.products)} products of activations are computed in float32"
    return Finding(f"precision {form}", not wrong, "; ".join(wrong[:3]) or fact)


def _kept_problems(graph: _Graph, node: onnx.NodeProto) -> list[str]:
    # Its input may be quantized, because another layer may read the same tensor in int8.
    if node.input[1] in graph.stored and graph.stored[node.input[1]].dtype == np.float32:
        return []
    return [f"{node.name} has no float32 weight, and the plan keeps it in float32"]


def _quantized_problems(graph: _Graph, node: onnx.NodeProto) -> list[str]:
    wrong = []
    for side, name in zip(("input", "weight"), node.input, strict=False):
        pair = graph.pair(name)
        if pair is None:
            wrong.append(f"{node.name} reads its {side} {name} in float32")
        elif side == "weight" and (levels := graph.stored.get(pair.input[0])) is None:
            wrong.append(f"{node.name} has weights that are computed from {pair.input[0]}")
        elif side == "weight" and levels is not None and levels.dtype != np.int8:
            wrong.append(f"{node.name} has weights in {levels.dtype}")
    return wrong


def _is_half(values: NDArray[Any]) -> bool:
    return values.dtype.name in ("float16", "bfloat16")


def _scales(graph: _Graph, form: str, ranges: Mapping[str, Range]) -> Finding:
    """The scale and zero point of every activation follow from its calibrated range."""
    wrong: dict[str, str] = {}
    checked = set()
    for scale_name, scale, zero in _activation_scales(graph):
        name = scale_name.removesuffix("_scale").removesuffix("_residual")
        problem = _scale_problem(scale, zero, ranges.get(name), form)
        checked.add(scale_name)
        if problem:
            wrong[scale_name] = f"{scale_name} {problem}"
    fact = "; ".join(list(wrong.values())[:3]) or f"{len(checked)} activations have the scale of their calibrated range"
    return Finding("scales", not wrong and bool(checked), fact)


def _activation_scales(graph: _Graph) -> Iterator[tuple[str, NDArray[Any], NDArray[Any]]]:
    for node in graph.nodes:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") and node.input[0] not in graph.stored:
            yield node.input[1], graph.stored[node.input[1]], graph.stored[node.input[2]]


def _scale_problem(scale: NDArray[Any], zero: NDArray[Any], found: Range | None, form: str) -> str:
    if found is None:
        return "belongs to no calibrated tensor"
    if zero.dtype != _ZERO_TYPES[form]:
        return f"has levels in {zero.dtype}"
    low, high = min(found.low, 0.0), max(found.high, 0.0)
    span = high - low if form == "int8-u8" else max(-low, high)
    step, offset = float(scale), int(zero)
    # For a tensor that is always zero, every scale is right.
    if span > 0 and not abs(step * _STEPS[form] - span) <= _SCALE_ERROR * span:
        return f"is {step:.6g} instead of {span / _STEPS[form]:.6g}"
    wanted = round(-low / step) if form == "int8-u8" and span > 0 else (offset if span == 0 else 0)
    if abs(offset - wanted) > int(form == "int8-u8"):
        return f"has zero at {offset} instead of {wanted}"
    return ""
