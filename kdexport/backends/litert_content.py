"""A file of LiteRT against the ONNX file that it was made from, read without a run.

Each operator with weights is one of the graph, by the name of its weight: its kind, geometry, activation and what it
reads; the bits of its weight and bias; the levels of what it reads and writes. What is widened from levels to float32
on the way is named.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kdexport.backends.base import ONNX_FILE, Finding
from kdexport.backends.litert_files import LiteModel, Operation, Stored, import_schema, read_model
from kdexport.backends.weighted_nodes import WeightedNode, weighted_nodes
from kdexport.errors import AuditError

if TYPE_CHECKING:
    import onnx

WEIGHTED = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED")
#: The type of a stored weight by the precision of its layer.
STORED_AS = {"fp32": "FLOAT32", "fp16": "FLOAT16", "int8": "INT8"}
_FUSED = {"RELU": "Relu", "RELU6": "Clip", "RELU_N1_TO_1": "Clip", "NONE": ""}
_ALONE = {"RELU": "Relu", "MAXIMUM": "Clip", "MINIMUM": "Clip", "RELU6": "Clip", "RELU_N1_TO_1": "Clip"}
#: Parts of a file that move or widen values, between an operator and the layer before it.
_WIDENING = ("DEQUANTIZE", "QUANTIZE")

Pairs = Sequence[tuple["Layer", WeightedNode]]


class Layer:
    """An operator with weights of a file, and the tensors that it reads."""

    def __init__(self, model: LiteModel, operation: Operation) -> None:
        self.operation, self._model = operation, model
        makers = model.makers()
        self.weight = self._stored(operation.inputs[1], makers)
        without = len(operation.inputs) < 3 or operation.inputs[2] < 0
        self.bias = None if without else self._stored(operation.inputs[2], makers)
        self.given = model.tensors[operation.inputs[0]]
        self.result = model.tensors[operation.outputs[0]]
        #: The operator that pads what this one reads.
        before = makers.get(operation.inputs[0])
        self.padding = before if before is not None and before.kind == "PAD" else None

    def _stored(self, place: int, makers: dict[int, Operation]) -> Stored:
        """The values as they are in the file: through the operator that widens float16."""
        maker = makers.get(place)
        widened = maker is not None and maker.kind == "DEQUANTIZE"
        return self._model.tensors[maker.inputs[0] if maker is not None and widened else place]

    @property
    def name(self) -> str:
        return self.weight.name

    def __str__(self) -> str:
        return f"{self.operation.kind} of {self.weight.name}"


def layers_of(model: LiteModel) -> list[Layer]:
    """The operators with weights, in order; raises ``AuditError`` if they read what is not in the file."""
    try:
        return [Layer(model, operation) for operation in model.operations if operation.kind in WEIGHTED]
    except IndexError:
        raise AuditError(
            "An operator reads a tensor that is not in the file.",
            remedy="The file is damaged; build the bundle again.",
        ) from None


def content_findings(folder: Path, artifact: str, precision: str, kept: Sequence[str]) -> list[Finding]:
    """Checks of the file in ``folder`` against the ONNX file there; nodes of ``kept`` are float32."""
    import onnx

    try:
        model = read_model((folder / artifact).read_bytes())
        graph = onnx.load(str(folder / ONNX_FILE))
        nodes = {node.weight_name: node for node in weighted_nodes(graph)}
        layers = layers_of(model)
    except OSError as error:
        return [Finding("readable", False, f"{artifact}: {error.strerror}")]
    except AuditError as error:
        return [Finding("readable", False, error.message)]
    pairs = [(layer, nodes[layer.name]) for layer in layers if layer.name in nodes]
    if len(pairs) != len(layers) or sorted(layer.name for layer in layers) != sorted(nodes):
        lost = next((str(layer) for layer in layers if layer.name not in nodes), "a node has no operator, or two")
        return [Finding("each layer is one of the graph", False, f"{lost}; the graph has {len(nodes)} with weights")]
    try:
        return _compared(model, graph, pairs, precision, kept)
    # The tables of a damaged file do not fit together: an operator with the options of another, or a place too far.
    except (AttributeError, IndexError) as error:
        return [Finding("readable", False, f"the tables of {artifact} do not fit together: {error}")]


def _compared(
    model: LiteModel, graph: "onnx.ModelProto", pairs: Pairs, precision: str, kept: Sequence[str]
) -> list[Finding]:
    found = [
        _values("each layer is one of the graph", pairs, _structure(model, pairs)),
        _values("weights", pairs, _wrong_weight),
        _values("biases", pairs, _wrong_bias),
        _values(f"every weight in {precision}", pairs, _storage(precision, kept), f"{len(kept)} of them in fp32"),
    ]
    if precision == "int8":
        found += [_values("scales", pairs, _levels(graph, kept)), _widened(model, pairs, kept)]
    return [*found, _layout(model)]


def _values(
    check: str, pairs: Pairs, problem: Callable[[Layer, WeightedNode], str], beside: str = "bit for bit"
) -> Finding:
    wrong = [f"{layer} ({node.name}): {said}" for layer, node in pairs if (said := problem(layer, node))]
    fact = f"{len(wrong)} of {len(pairs)} differ: {wrong[0]}" if wrong else f"{len(pairs)} layers as in {ONNX_FILE}"
    return Finding(check, not wrong, fact if wrong or check.startswith("each") else f"{fact}, {beside}")


# Structure


def _structure(model: LiteModel, pairs: Pairs) -> Callable[[Layer, WeightedNode], str]:
    """What differs in kind, geometry, activation or sources."""
    by_result = {layer.operation.outputs[0]: node for layer, node in pairs}
    makers, schema = model.makers(), import_schema()
    activations = {value: name for name, value in vars(schema.ActivationFunctionType).items() if name[0] != "_"}
    readers: dict[int, list[str]] = {}
    for operation in model.operations:
        for place in operation.inputs:
            readers.setdefault(place, []).append(operation.kind)

    def problem(layer: Layer, node: WeightedNode) -> str:
        if node.is_convolution is (layer.operation.kind == "FULLY_CONNECTED"):
            return f"is a {layer.operation.kind}"
        if node.is_convolution and (found := _geometry(layer, schema)) != node.geometry:
            return f"has the geometry {found}, expected {node.geometry}"
        fused = activations[layer.operation.options.fusedActivationFunction]
        after = _FUSED.get(fused, fused)
        alone = readers.get(layer.operation.outputs[0], [])
        after = after or (_ALONE.get(alone[0], "") if len(alone) == 1 else "")
        # Levels that end at zero are a Relu, which the graph then does not have.
        if after != node.activation:
            return f"is followed by {after or 'no activation'}, expected {node.activation or 'none'}"
        sources = _sources(layer.operation.inputs[0], model, makers, by_result)
        if sources != node.sources:
            return f"reads the result of {', '.join(sorted(sources))}, expected {', '.join(sorted(node.sources))}"
        return ""

    return problem


def _sources(
    place: int, model: LiteModel, makers: dict[int, Operation], by_result: dict[int, WeightedNode]
) -> frozenset[str]:
    """The layers with weights, or the input, that are next before a tensor."""
    found, waiting, seen = set(), [place], set[int]()
    while waiting:
        at = waiting.pop()
        if at in seen:
            continue
        seen.add(at)
        if at in by_result:
            found.add(by_result[at].name)
        elif at in makers:
            waiting += makers[at].inputs
        elif at in model.inputs:
            found.add(model.tensors[at].name)
    return frozenset(found)


def _geometry(layer: Layer, schema: Any) -> tuple[int, ...]:
    """Kernel, strides, dilations, pads and groups, as in ``WeightedNode``."""
    options, shape = layer.operation.options, layer.weight.shape
    kernel, strides = shape[1:3], (options.strideH, options.strideW)
    dilations = (options.dilationHFactor, options.dilationWFactor)
    depthwise = layer.operation.kind == "DEPTHWISE_CONV_2D"
    read = layer.given.shape
    if layer.padding is not None:
        amounts = layer._model.tensors[layer.padding.inputs[1]].values
        assert amounts is not None
        pads = (*amounts[1:3, 0].tolist(), *amounts[1:3, 1].tolist())
        if options.padding == schema.Padding.SAME or amounts[[0, 3]].any():
            pads = (-1,) * 4
    elif options.padding == schema.Padding.SAME:
        both = []
        for axis in (0, 1):
            result = -(-read[1 + axis] // strides[axis])
            needed = (result - 1) * strides[axis] + dilations[axis] * (kernel[axis] - 1) + 1 - read[1 + axis]
            both.append((max(needed, 0) // 2, max(needed, 0) - max(needed, 0) // 2))
        pads = (both[0][0], both[1][0], both[0][1], both[1][1])
    else:
        pads = (0,) * 4
    groups = read[3] if depthwise else read[3] // shape[3]
    if depthwise and options.depthMultiplier * read[3] != shape[3]:
        groups = -1
    return (*kernel, *strides, *dilations, *pads, groups)


# Values


def _wrong_weight(layer: Layer, node: WeightedNode) -> str:
    expected: NDArray[Any] = node.weight if node.levels is None else node.levels
    if expected.ndim == 4:
        depthwise = layer.operation.kind == "DEPTHWISE_CONV_2D"
        expected = expected.transpose((1, 2, 3, 0) if depthwise else (0, 2, 3, 1))
    return _difference(layer.weight.values, expected, 3 if layer.weight.shape[:1] == (1,) and expected.ndim == 4 else 0)


def _wrong_bias(layer: Layer, node: WeightedNode) -> str:
    outputs = node.weight.shape[0]
    expected: NDArray[Any] = np.zeros(outputs, np.float32) if node.bias is None else node.bias
    if layer.bias is None:
        return "the bias is missing" if expected.any() else ""
    if layer.bias.kind == "INT32" and node.weight_scales is not None and node.input_scale is not None:
        step = node.weight_scales.astype(np.float64) * node.input_scale
        return _difference(layer.bias.values, np.rint(expected / step).astype(np.int32), 0)
    return _difference(layer.bias.values, expected, 0)


def _difference(found: NDArray[Any] | None, expected: NDArray[Any], axis: int) -> str:
    """How many values differ, and the first output with one; empty if none does."""
    if found is None or found.shape != expected.shape:
        return f"has the shape {None if found is None else found.shape}, expected {expected.shape}"
    same_type = found.dtype == expected.dtype
    given = found if same_type else found.astype(np.float32)
    wanted = expected if same_type else expected.astype(np.float32)
    if given.dtype == np.float32:
        # Bits, so that a NaN equals itself and zeros differ in sign.
        given, wanted = np.ascontiguousarray(given).view(np.uint32), np.ascontiguousarray(wanted).view(np.uint32)
    wrong = given != wanted
    if not wrong.any():
        return ""
    first = int(np.argwhere(np.moveaxis(wrong, axis, 0))[0][0])
    return f"{int(wrong.sum()):,} of {wrong.size:,} values differ, first in output {first}"


def _storage(precision: str, kept: Sequence[str]) -> Callable[[Layer, WeightedNode], str]:
    def problem(layer: Layer, node: WeightedNode) -> str:
        wanted = STORED_AS["fp32" if node.name in kept else precision]
        if layer.weight.kind != wanted:
            return f"is stored in {layer.weight.kind.lower()}, expected {wanted.lower()}"
        return ""

    return problem


# Levels


def _levels(graph: "onnx.ModelProto", kept: Sequence[str]) -> Callable[[Layer, WeightedNode], str]:
    """What differs in the levels of a layer: of its weight, its bias, what it reads and what it returns."""
    given, results = _graph_levels(graph)

    def problem(layer: Layer, node: WeightedNode) -> str:
        if node.name in kept or node.weight_scales is None or node.input_scale is None:
            return ""
        found, wanted = layer.weight.scales, node.weight_scales
        if found.size != wanted.size or (found != wanted).any() or layer.weight.zeros.any():
            return f"weight scales: {int((found != wanted).sum()) if found.size == wanted.size else 'all'} differ"
        if layer.weight.axis != (3 if layer.operation.kind == "DEPTHWISE_CONV_2D" else 0):
            return "its weight scales are those of another axis"
        step = (wanted.astype(np.float64) * node.input_scale).astype(np.float32)
        if layer.bias is not None and not _are(layer.bias.scales, step):
            return "the scales of its bias are not those of its weight and input"
        for what, tensor, expected in (("reads", layer.given, given), ("returns", layer.result, results)):
            if node.name in expected and tensor.levels != expected[node.name]:
                return f"{what} the levels {tensor.levels}, expected {expected[node.name]}"
        return ""

    return problem


def _are(found: NDArray[np.float32], expected: NDArray[np.float32]) -> bool:
    # A product of two scales may be rounded once more or less.
    return found.size == expected.size and np.allclose(found, expected, rtol=1e-6, atol=0)


def _graph_levels(graph: "onnx.ModelProto") -> tuple[dict[str, tuple[float, int]], dict[str, tuple[float, int]]]:
    """Scale and zero point, in int8, of what each node of the graph reads and returns."""
    from onnx import numpy_helper

    stored = {item.name: item for item in graph.graph.initializer}
    producers = {name: node for node in graph.graph.node for name in node.output}
    readers: dict[str, list[Any]] = {}
    for node in graph.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)

    def levels(node: Any) -> tuple[float, int]:
        scale, zero = (numpy_helper.to_array(stored[name]) for name in node.input[1:3])
        return float(np.float32(scale)), int(zero) - (128 if zero.dtype == np.uint8 else 0)

    given, results = {}, {}
    for node in graph.graph.node:
        source = producers.get(node.input[0]) if node.input else None
        if source is not None and source.op_type == "DequantizeLinear" and source.input[0] not in stored:
            given[node.name] = levels(source)
        after = readers.get(node.output[0], [])
        while len(after) == 1 and after[0].op_type in ("Relu", "Clip"):
            after = readers.get(after[0].output[0], [])
        if len(after) == 1 and after[0].op_type == "QuantizeLinear":
            results[node.name] = levels(after[0])
    return given, results


def _widened(model: LiteModel, pairs: Pairs, kept: Sequence[str]) -> Finding:
    """Whether every layer multiplies levels; operators that read float32 between them are named."""
    wrong = [
        f"{layer} ({node.name}) reads {layer.given.kind.lower()} and returns {layer.result.kind.lower()}"
        for layer, node in pairs
        if node.name not in kept and (layer.given.kind, layer.result.kind) != ("INT8", "INT8")
    ]
    makers = model.makers()
    around = Counter(
        operation.kind
        for operation in model.operations
        if operation.kind not in (*_WIDENING, *WEIGHTED)
        and any(model.tensors[place].kind == "FLOAT32" and place in makers for place in operation.inputs)
    )
    count = sum(operation.kind == "DEQUANTIZE" for operation in model.operations)
    named = ", ".join(f"{number} {kind}" for kind, number in sorted(around.items())) or "none"
    fact = f"{count} tensors are widened to float32; operators that read float32: {named}"
    return Finding("layers multiply levels", not wrong, wrong[0] if wrong else fact)


def _layout(model: LiteModel) -> Finding:
    """Whether the file takes one image with its channels last and gives one row of float32 logits."""
    (given, result) = model.tensors[model.inputs[0]], model.tensors[model.outputs[0]]
    one = len(model.inputs) == len(model.outputs) == 1
    square = len(given.shape) == 4 and given.shape[0] == 1 and given.shape[1] == given.shape[2] and given.shape[3] == 3
    moved = sum(operation.kind == "TRANSPOSE" for operation in model.operations)
    holds = one and square and len(result.shape) == 2 and {given.kind, result.kind} == {"FLOAT32"}
    fact = f"takes {given.shape} and gives {result.shape}, float32; {moved} operators that move axes"
    return Finding("one image, channels last", holds, fact)
