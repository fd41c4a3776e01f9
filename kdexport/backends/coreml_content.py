"""A package of Core ML against the ONNX file that it was made from: the operators and weights of its program.

The program is a message in ``model.mlmodel``; its large constants are in a file of weights beside it.
"""

import struct
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdexport.backends.base import INPUT, LOGITS, ONNX_FILE, Finding
from kdexport.backends.weighted_nodes import WeightedNode, weighted_nodes
from kdexport.core.console import quiet
from kdexport.errors import AuditError, BackendUnavailableError, first_line

INSTALL = "Run pip install 'kdexport[coreml]'"
WEIGHTS = Path("weights") / "weight.bin"
WEIGHTED = ("conv", "linear")
#: What stands before the values of a constant in the file of weights: a mark, its type, its bytes and their place.
_RECORD = struct.Struct("<IIQQ")
_MARK = 0xDEADBEEF
_TYPES: Mapping[str, Any] = {
    "FLOAT32": np.dtype("<f4"), "FLOAT16": np.dtype("<f2"), "INT32": np.dtype("<i4"), "BOOL": np.dtype("?")
}  # fmt: skip
_FIELDS = {"FLOAT32": "floats", "INT32": "ints", "BOOL": "bools"}
STORED_AS = {"fp32": "FLOAT32", "fp16": "FLOAT16"}


@dataclass(frozen=True, slots=True, eq=False)
class Operator:
    """An operator of a program: its kind, the names it reads by parameter and those it writes, and their types."""

    kind: str
    inputs: Mapping[str, tuple[str, ...]]
    outputs: tuple[str, ...]
    types: tuple[str, ...]

    @property
    def reads(self) -> list[str]:
        """The names that it reads, constants among them."""
        return [name for read in self.inputs.values() for name in read]


@dataclass(frozen=True, slots=True, eq=False)
class Program:
    """The operators of a package but its constants, and the constants by name."""

    operators: tuple[Operator, ...]
    constants: Mapping[str, NDArray[Any]]
    shape: tuple[int, ...]
    results: tuple[str, ...]

    def value(self, operator: Operator, parameter: str) -> NDArray[Any] | None:
        """The constant that an operator reads."""
        return self.constants.get(next(iter(operator.inputs.get(parameter, ())), ""))


def read_program(path: Path) -> Program:
    """The program of ``model.mlmodel`` at ``path``.

    Raises ``AuditError`` for a file that is not one, ``BackendUnavailableError`` without ``coremltools``.
    """
    try:
        with quiet():
            from coremltools.proto import MIL_pb2, Model_pb2
    except ImportError as error:
        raise BackendUnavailableError(
            f"coremltools is not installed, or not whole: {first_line(error)}.", remedy=f"{INSTALL}."
        ) from error
    try:
        spec = Model_pb2.Model.FromString(path.read_bytes())
        function = spec.mlProgram.functions["main"]
        block = function.block_specializations[function.opset]
        kinds = {number: name for name, number in MIL_pb2.DataType.items()}
        weights = (path.parent / WEIGHTS).read_bytes() if (path.parent / WEIGHTS).is_file() else b""
        constants, operators = {}, []
        for operation in block.operations:
            names = tuple(value.name for value in operation.outputs)
            types = tuple(kinds[value.type.tensorType.dataType] for value in operation.outputs)
            if operation.type == "const":
                constants[names[0]] = _constant(operation.attributes["val"], kinds, weights)
            else:
                inputs = {key: tuple(a.name for a in given.arguments) for key, given in operation.inputs.items()}
                operators.append(Operator(operation.type, inputs, names, types))
        (given,) = function.inputs
        shape = tuple(int(dim.constant.size) for dim in given.type.tensorType.dimensions)
        if not operators or given.name != INPUT:
            raise ValueError(f"it has {len(operators)} operators and the input {given.name}")
    # A reader of messages raises whatever its content leads to.
    except Exception as error:
        raise AuditError(
            f"The program cannot be read: {type(error).__name__}: {error}.",
            remedy="The file is damaged; build the bundle again.",
        ) from error
    return Program(tuple(operators), constants, shape, tuple(block.outputs))


def _constant(value: Any, kinds: Mapping[int, str], weights: bytes) -> NDArray[Any]:
    tensor = value.type.tensorType
    kind, shape = kinds[tensor.dataType], tuple(int(dim.constant.size) for dim in tensor.dimensions)
    if value.WhichOneof("value") == "blobFileValue":
        start = value.blobFileValue.offset
        mark, _, size, place = _RECORD.unpack_from(weights, start)
        if mark != _MARK or place + size > len(weights):
            raise ValueError(f"there are no values at byte {start} of {WEIGHTS.name}")
        return np.frombuffer(weights[place : place + size], _TYPES[kind]).reshape(shape)
    held = value.immediateValue.tensor
    if kind in _FIELDS:
        return np.asarray(getattr(held, _FIELDS[kind]).values, _TYPES[kind]).reshape(shape)
    if kind == "FLOAT16":
        return np.frombuffer(held.bytes.values, _TYPES[kind]).reshape(shape)
    return np.asarray(held.strings.values, np.str_)


def content_findings(path: Path, folder: Path, precision: str) -> list[Finding]:
    """Checks of the program at ``path`` against the ONNX file in ``folder``."""
    import onnx

    try:
        program = read_program(path)
        nodes = weighted_nodes(onnx.load(str(folder / ONNX_FILE)))
    except AuditError as error:
        return [Finding("readable", False, error.message)]
    layers = [operator for operator in program.operators if operator.kind in WEIGHTED]
    if len(layers) != len(nodes):
        fact = f"{len(layers)} operators with weights, and the graph has {len(nodes)}"
        return [Finding("each layer is one of the graph", False, fact)]
    # Both are in the order of the graph.
    pairs = list(zip(layers, nodes, strict=True))
    return [
        _values("each layer is one of the graph", pairs, _structure(program, pairs)),
        _values("weights", pairs, lambda layer, node: _difference(program.value(layer, "weight"), node.weight)),
        _values("biases", pairs, lambda layer, node: _wrong_bias(program, layer, node)),
        _values(f"every weight in {precision}", pairs, _storage(program, STORED_AS[precision])),
        _results(program, STORED_AS[precision]),
        _interface(program),
    ]


Pairs = Sequence[tuple[Operator, WeightedNode]]


def _values(check: str, pairs: Pairs, problem: Callable[[Operator, WeightedNode], str]) -> Finding:
    wrong = [f"{layer.kind} of {node}: {said}" for layer, node in pairs if (said := problem(layer, node))]
    fact = f"{len(wrong)} of {len(pairs)} differ: {wrong[0]}" if wrong else f"{len(pairs)} as in {ONNX_FILE}"
    return Finding(check, not wrong, fact)


def _structure(program: Program, pairs: Pairs) -> Callable[[Operator, WeightedNode], str]:
    """What differs in kind, geometry, activation or sources."""
    names = {layer.outputs[0]: node.name for layer, node in pairs}
    readers: dict[str, list[str]] = {}
    for operator in program.operators:
        for name in operator.reads:
            readers.setdefault(name, []).append(operator.kind)

    def problem(layer: Operator, node: WeightedNode) -> str:
        if (layer.kind == "conv") is not node.is_convolution:
            return f"is a {layer.kind}"
        if node.is_convolution and (geometry := _geometry(program, layer)) != node.geometry:
            return f"has the geometry {geometry}, expected {node.geometry}"
        after = readers.get(layer.outputs[0], [])
        activation = _ACTIVATIONS.get(after[0], "") if len(after) == 1 else ""
        if activation != node.activation:
            return f"is followed by {activation or 'no activation'}, expected {node.activation or 'none'}"
        if (before := _sources(program, layer, names)) != node.sources:
            return f"reads the result of {', '.join(sorted(before))}, expected {', '.join(sorted(node.sources))}"
        return ""

    return problem


_ACTIVATIONS = {"relu": "Relu", "relu6": "Clip", "clip": "Clip"}


def _sources(program: Program, layer: Operator, names: Mapping[str, str]) -> frozenset[str]:
    """The layers with weights, or the input, that are next before an operator."""
    makers = {name: operator for operator in program.operators for name in operator.outputs}
    found, waiting, seen = set(), list(layer.inputs["x"]), set[str]()
    while waiting:
        name = waiting.pop()
        if name in seen or name in program.constants:
            continue
        seen.add(name)
        if name in names:
            found.add(names[name])
        elif name in makers:
            waiting += makers[name].reads
        else:
            found.add(name)
    return frozenset(found)


def _geometry(program: Program, layer: Operator) -> tuple[int, ...]:
    def numbers(name: str) -> list[int]:
        value = program.value(layer, name)
        return [] if value is None else [int(item) for item in value.reshape(-1)]

    weight, pads = program.value(layer, "weight"), numbers("pad")
    kind = program.value(layer, "pad_type")
    if weight is None or len(pads) != 4 or kind is None or str(kind.reshape(-1)[0]) != "custom":
        # coremltools writes a padding of zeros by its name.
        pads = [0] * 4 if kind is not None and str(kind.reshape(-1)[0]) == "valid" else [-1] * 4
    top, bottom, left, right = pads
    kernel = () if weight is None else weight.shape[2:]
    return (*kernel, *numbers("strides"), *numbers("dilations"), top, left, bottom, right, *numbers("groups"))


def _wrong_bias(program: Program, layer: Operator, node: WeightedNode) -> str:
    expected = np.zeros(len(node.weight), np.float32) if node.bias is None else node.bias
    return _difference(program.value(layer, "bias"), expected)


def _difference(found: NDArray[Any] | None, expected: NDArray[np.float32]) -> str:
    if found is None or found.shape != expected.shape:
        return f"has the shape {None if found is None else found.shape}, expected {expected.shape}"
    # Bits, so that a NaN equals itself and zeros differ in sign; float16 is widened exactly.
    wrong = found.astype("<f4").view("<u4") != np.ascontiguousarray(expected).view("<u4")
    if not wrong.any():
        return ""
    return f"{int(wrong.sum()):,} of {wrong.size:,} values differ, first in output {int(np.argwhere(wrong)[0][0])}"


def _storage(program: Program, wanted: str) -> Callable[[Operator, WeightedNode], str]:
    def problem(layer: Operator, _node: WeightedNode) -> str:
        weight = program.value(layer, "weight")
        if weight is None or weight.dtype != _TYPES[wanted]:
            return f"is stored in {None if weight is None else weight.dtype}, expected {wanted.lower()}"
        return ""

    return problem


def _results(program: Program, wanted: str) -> Finding:
    """Whether every result but the logits has the type of the precision."""
    wrong = [
        f"{operator.kind} returns {kind.lower()}"
        for operator in program.operators
        for name, kind in zip(operator.outputs, operator.types, strict=True)
        if kind in ("FLOAT16", "FLOAT32") and kind != wanted and name not in program.results
    ]
    kinds = Counter(operator.kind for operator in program.operators)
    fact = ", ".join(f"{number} {kind}" for kind, number in sorted(kinds.items()))
    return Finding(f"results in {wanted.lower()}", not wrong, wrong[0] if wrong else fact)


def _interface(program: Program) -> Finding:
    holds = len(program.shape) == 4 and program.shape[:2] == (1, 3) and program.results == (LOGITS,)
    return Finding("one image", holds, f"takes {program.shape} and gives {', '.join(program.results)}")
