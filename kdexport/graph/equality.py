"""Whether two ONNX graphs are the same function by construction: node by node, whatever their tensors are called.

The comparison starts at the outputs and walks to the inputs. It looks at what each node really reads, whatever else is
stored under the right name. It is exact: operators, domains, attributes, topology, and every constant bit by bit. No
image takes part in it.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
import onnx
from onnx import AttributeProto, helper, numpy_helper

_DEFAULT_DOMAINS = ("", "ai.onnx")
_SUBGRAPHS = (AttributeProto.GRAPH, AttributeProto.GRAPHS)
_TENSORS = (AttributeProto.TENSOR, AttributeProto.TENSORS)
#: How a constant may be stored in a node.
_CONSTANTS = [["value"], ["value_float"], ["value_floats"], ["value_int"], ["value_ints"]]
#: Attributes of earlier operator sets that newer writers leave out; they change no value.
_WITHOUT_EFFECT = {"Reshape": {"allowzero"}}


def graph_difference(suspect: onnx.ModelProto, expected: onnx.ModelProto) -> str:
    """How ``suspect`` differs from ``expected``, naming the node; empty if both are the same graph."""
    return _of_models(suspect, expected) or _Walk(suspect, expected).difference()


def _of_models(suspect: onnx.ModelProto, expected: onnx.ModelProto) -> str:
    """What is wrong outside of the main graph, or with its ends."""
    if suspect.functions:
        return f"the file defines {len(suspect.functions)} functions of its own, first {suspect.functions[0].name}"
    if suspect.training_info:
        return "the file holds a training graph"
    versions = [_opsets(model) for model in (suspect, expected)]
    if versions[0] != versions[1]:
        return f"the file imports operator sets {versions[0]}, expected {versions[1]}"
    if suspect.graph.sparse_initializer:
        return f"the graph holds {len(suspect.graph.sparse_initializer)} sparse tensors, expected none"
    for what, mine, theirs in (
        ("inputs", _ends(suspect.graph.input, suspect), _ends(expected.graph.input, expected)),
        ("outputs", _ends(suspect.graph.output, suspect), _ends(expected.graph.output, expected)),
    ):
        if mine != theirs:
            return f"the {what} are {mine}, expected {theirs}"
    return next(filter(None, map(_of_node, suspect.graph.node)), "")


def _of_node(node: onnx.NodeProto) -> str:
    """What no exported classifier has in a node: other domains, graphs inside, constants of other kinds."""
    names = [attribute.name for attribute in node.attribute]
    if node.op_type == "Constant" and names not in _CONSTANTS:
        return f"node {_name(node)} is a Constant with {', '.join(names)}"
    if node.domain not in _DEFAULT_DOMAINS:
        return f"node {_name(node)} is a {node.op_type} of the domain {node.domain}"
    if any(attribute.type in _SUBGRAPHS for attribute in node.attribute):
        return f"node {_name(node)}, a {node.op_type}, holds a graph of its own"
    return ""


def _opsets(model: onnx.ModelProto) -> dict[str, int]:
    return {entry.domain if entry.domain != "ai.onnx" else "": entry.version for entry in model.opset_import}


def _ends(values: Iterable[onnx.ValueInfoProto], model: onnx.ModelProto) -> list[tuple[str, str, list[str]]]:
    """(name, type, dimensions) of the inputs or outputs that are not constants; a free dimension is ``?``."""
    constants = {item.name for item in model.graph.initializer}
    found = []
    for value in values:
        if value.name in constants:
            continue
        kind = value.type.tensor_type
        dims = [str(dim.dim_value) if dim.HasField("dim_value") else "?" for dim in kind.shape.dim]
        found.append((value.name, onnx.TensorProto.DataType.Name(kind.elem_type), dims))
    return found


def _name(node: onnx.NodeProto) -> str:
    return node.name or next(iter(node.output), "without a name")


class _Graph:
    """One graph by tensor: who computes it, or what constant it is."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.nodes = [node for node in model.graph.node if node.op_type != "Constant"]
        self.producers = {
            name: (place, index)
            for place, node in enumerate(self.nodes)
            for index, name in enumerate(node.output)
            if name
        }
        self.constants: dict[str, onnx.TensorProto | onnx.AttributeProto] = {
            item.name: item for item in model.graph.initializer
        }
        for node in model.graph.node:
            if node.op_type == "Constant":
                self.constants.update(dict.fromkeys(node.output, node.attribute[0]))
        self.stored = {item.name for item in model.graph.initializer}
        self.opset = _opsets(model).get("", 1)

    def constant(self, name: str) -> "np.ndarray[Any, Any] | None":
        """The value of a constant tensor, None for a computed one."""
        found = self.constants.get(name)
        if found is None:
            return None
        if isinstance(found, onnx.TensorProto):
            return numpy_helper.to_array(found)
        value = helper.get_attribute_value(found)
        if isinstance(value, onnx.TensorProto):
            return numpy_helper.to_array(value)
        kind = np.float32 if found.type in (AttributeProto.FLOAT, AttributeProto.FLOATS) else np.int64
        return np.asarray(value, kind)


class _Walk:
    """Pairs of tensors that must be the same, from the outputs to the inputs."""

    def __init__(self, suspect: onnx.ModelProto, expected: onnx.ModelProto) -> None:
        self._mine, self._theirs = _Graph(suspect), _Graph(expected)
        self._pending = [
            (out.name, wanted.name) for out, wanted in zip(suspect.graph.output, expected.graph.output, strict=True)
        ]
        self._partner: dict[int, int] = {}
        self._taken: dict[int, int] = {}
        self._read: set[str] = set()

    def difference(self) -> str:
        """The first difference in the order of the walk; empty if there is none and nothing is left over."""
        while self._pending:
            text = self._compare(*self._pending.pop())
            if text:
                return text
        unread = [node for place, node in enumerate(self._mine.nodes) if place not in self._partner]
        if unread:
            return f"{len(unread)} nodes reach no output, first {_name(unread[0])}, a {unread[0].op_type}"
        left = sorted(self._mine.stored - self._read)
        if left:
            return f"{len(left)} stored tensors are read by no node, first {left[0]}"
        return ""

    def _compare(self, mine: str, theirs: str) -> str:
        if not mine or not theirs:
            return "" if mine == theirs else f"an optional input is {mine or 'absent'}, expected {theirs or 'absent'}"
        if mine in self._mine.constants or theirs in self._theirs.constants:
            return self._compare_constants(mine, theirs)
        producer, wanted = self._mine.producers.get(mine), self._theirs.producers.get(theirs)
        if producer is None or wanted is None:
            # An input of the graph: inputs have the same names on both sides.
            return "" if producer is wanted is None and mine == theirs else f"{mine} is read in the place of {theirs}"
        if producer[1] != wanted[1]:
            return f"output {producer[1]} of node {_name(self._mine.nodes[producer[0]])} is read, expected {wanted[1]}"
        return self._compare_nodes(producer[0], wanted[0])

    def _compare_constants(self, mine: str, theirs: str) -> str:
        value, wanted = self._mine.constant(mine), self._theirs.constant(theirs)
        self._read.add(mine)
        if value is None or wanted is None:
            return f"{mine} is {'computed' if value is None else 'constant'}, expected the opposite ({theirs})"
        if value.dtype != wanted.dtype or value.shape != wanted.shape:
            return f"{mine} is {value.dtype} {list(value.shape)}, expected {wanted.dtype} {list(wanted.shape)}"
        if value.tobytes() == wanted.tobytes():
            return ""
        same = np.asarray(value == wanted)
        return f"{int((~same).sum())} of {same.size} values of {mine} differ"

    def _compare_nodes(self, place: int, wanted: int) -> str:
        if self._partner.get(place) == wanted:
            return ""
        node, model = self._mine.nodes[place], self._theirs.nodes[wanted]
        if place in self._partner or wanted in self._taken:
            return f"node {_name(node)} is connected to other nodes than {_name(model)}"
        self._partner[place], self._taken[wanted] = wanted, place
        if node.op_type != model.op_type:
            return f"node {_name(node)} is a {node.op_type}, expected a {model.op_type} ({_name(model)})"
        text = _attributes(node, model, self._theirs.opset)
        if text:
            return text
        inputs, wanted_inputs = _trimmed(node.input), _trimmed(model.input)
        counts = [(len(inputs), len(node.output)), (len(wanted_inputs), len(model.output))]
        if counts[0] != counts[1]:
            return f"node {_name(node)} has {counts[0]} inputs and outputs, expected {counts[1]}"
        self._pending.extend(reversed(list(zip(inputs, wanted_inputs, strict=True))))
        return ""


def _trimmed(names: Iterable[str]) -> list[str]:
    """Inputs without absent ones at the end."""
    kept = list(names)
    while kept and not kept[-1]:
        kept.pop()
    return kept


def _attributes(node: onnx.NodeProto, expected: onnx.NodeProto, opset: int) -> str:
    mine, theirs = _values(node, opset), _values(expected, opset)
    ignored = _WITHOUT_EFFECT.get(node.op_type, set())
    wrong = [
        key for key in sorted(mine.keys() | theirs.keys()) if key not in ignored and mine.get(key) != theirs.get(key)
    ]
    if not wrong:
        return ""
    key = wrong[0]
    return f"{key} of node {_name(node)} is {mine.get(key)}, expected {theirs.get(key)}"


def _values(node: onnx.NodeProto, opset: int) -> dict[str, Any]:
    """Attributes by name, defaults of the operator set filled in; tensors as type, shape and bytes."""
    found = {}
    if onnx.defs.has(node.op_type):
        schema = onnx.defs.get_schema(node.op_type, opset)
        found = {
            name: _value(attribute.default_value)
            for name, attribute in schema.attributes.items()
            if attribute.default_value.type != AttributeProto.UNDEFINED
        }
    found.update({attribute.name: _value(attribute) for attribute in node.attribute})
    return found


def _value(attribute: onnx.AttributeProto) -> Any:
    value = helper.get_attribute_value(attribute)
    if attribute.type in _TENSORS:
        arrays = [numpy_helper.to_array(tensor) for tensor in (value if isinstance(value, list) else [value])]
        return [(str(array.dtype), array.shape, array.tobytes()) for array in arrays]
    return list(value) if isinstance(value, (list, tuple)) else value
