"""What an ONNX file says of its layers with weights, and the float32 graph that converters of other formats read.

Converters know float32 graphs. The precision is decided by the cast that the project checks, so its float16 values and
int8 levels are widened to float32 exactly, given to the converter, and narrowed back to the same bits afterwards.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from kdexport.errors import AuditError

if TYPE_CHECKING:
    import onnx
    from google.protobuf.message import Message

#: Operators that multiply by a stored weight.
_WITH_WEIGHT = ("Conv", "Gemm", "MatMul")
#: Operators that only change a type or round to levels.
_TYPE_CHANGES = ("Cast", "QuantizeLinear", "DequantizeLinear")
M = TypeVar("M", bound="Message")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class WeightedNode:
    """A convolution or linear layer of an ONNX graph, its values widened to float32.

    ``weight`` is (O,I/groups,kh,kw) or (O,I). ``levels`` (the same shape), ``weight_scales`` (O) and ``input_scale``
    are those of an int8 layer, else None. ``sources`` are the nodes with weights, or the input of the graph, that are
    next before it.
    """

    name: str
    weight_name: str
    weight: NDArray[np.float32]
    bias: NDArray[np.float32] | None
    is_convolution: bool
    #: kernel, strides, dilations, pads (top, left, bottom, right), groups; empty for a linear layer.
    geometry: tuple[int, ...]
    sources: frozenset[str]
    #: The only operator that reads the result if it is Relu or Clip, else empty.
    activation: str
    levels: NDArray[np.int8] | None = None
    weight_scales: NDArray[np.float32] | None = None
    input_scale: float | None = None

    def __str__(self) -> str:
        return f"{self.name} ({self.weight_name})"


def float32_graph(model: "onnx.ModelProto") -> "onnx.ModelProto":
    """A copy of a float32, float16 or int8 graph in which every value is float32: no cast, no rounding to levels."""
    import onnx
    from onnx import numpy_helper

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    graph = copy.graph
    stored = {item.name: item for item in graph.initializer}
    fresh: dict[str, str] = {}
    nodes, values = [], dict(stored)
    for node in graph.node:
        node.input[:] = [fresh.get(name, name) for name in node.input]
        if node.op_type == "DequantizeLinear" and node.input[0] in stored:
            values[node.output[0]] = numpy_helper.from_array(_dequantized(*_levels(node, stored)), node.output[0])
        elif node.op_type in _TYPE_CHANGES:
            fresh[node.output[0]] = node.input[0]
        else:
            nodes.append(node)
    # The output of the graph keeps its name.
    ends = {fresh[value.name]: value.name for value in graph.output if value.name in fresh}
    for node in nodes:
        node.input[:] = [ends.get(name, name) for name in node.input]
        node.output[:] = [ends.get(name, name) for name in node.output]
        for attribute in node.attribute:
            if attribute.name == "value":
                attribute.t.CopyFrom(_widened(attribute.t))
    read = {name for node in nodes for name in node.input}
    kept = [_widened(item) for name, item in values.items() if name in read]
    nodes = [_copied(node) for node in nodes]
    del graph.node[:], graph.initializer[:], graph.value_info[:]
    graph.node.extend(nodes)
    graph.initializer.extend(kept)
    return copy


def _widened(item: "onnx.TensorProto") -> "onnx.TensorProto":
    from onnx import TensorProto, numpy_helper

    if item.data_type != TensorProto.FLOAT16:
        return _copied(item)
    return numpy_helper.from_array(numpy_helper.to_array(item).astype(np.float32), item.name)


def _copied(item: M) -> M:
    """A message that outlives the list that it was in."""
    copy: M = type(item)()
    copy.CopyFrom(item)
    return copy


def weighted_nodes(model: "onnx.ModelProto") -> tuple[WeightedNode, ...]:
    """The layers with weights of a float32, float16 or int8 graph, in their order.

    Raises ``AuditError`` for a layer whose values this module cannot read.
    """

    graph = model.graph
    stored = {item.name: item for item in graph.initializer}
    producers = {name: node for node in graph.node for name in node.output}
    readers: dict[str, list[str]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node.op_type)
    found = []
    sources: dict[str, frozenset[str]] = {value.name: frozenset({value.name}) for value in graph.input}
    for node in graph.node:
        weight = _weight(node, stored, producers) if node.op_type in _WITH_WEIGHT else None
        before = _union(sources.get(name, frozenset()) for name in node.input)
        for name in node.output:
            sources[name] = before if weight is None else frozenset({node.name})
        if weight is None:
            continue
        name, values, levels, scales = weight
        attributes = {item.name: item for item in node.attribute}
        # A matrix is stored as (I,O) unless Gemm says otherwise.
        swapped = node.op_type == "MatMul" or (node.op_type == "Gemm" and not _number(attributes, "transB", 0))
        found.append(
            WeightedNode(
                name=node.name,
                weight_name=name.removesuffix("_quantized"),
                weight=values.T if swapped else values,
                bias=_bias(node, stored, producers),
                is_convolution=node.op_type == "Conv",
                geometry=_geometry(values.shape, attributes) if node.op_type == "Conv" else (),
                sources=before,
                activation=_activation(readers.get(node.output[0], [])),
                levels=levels.T if levels is not None and swapped else levels,
                weight_scales=scales,
                input_scale=None if levels is None else _input_scale(node, stored, producers),
            )
        )
    return tuple(found)


def _weight(
    node: "onnx.NodeProto", stored: Mapping[str, "onnx.TensorProto"], producers: Mapping[str, "onnx.NodeProto"]
) -> tuple[str, NDArray[np.float32], NDArray[np.int8] | None, NDArray[np.float32] | None] | None:
    """Name, float32 values, and levels and scales of the weight of a node; None if it multiplies two activations."""
    from onnx import numpy_helper

    name = _through_casts(node.input[1], producers)
    if name in stored:
        return name, numpy_helper.to_array(stored[name]).astype(np.float32), None, None
    source = producers.get(name)
    if source is None or source.op_type != "DequantizeLinear" or source.input[0] not in stored:
        return None
    levels, scales, axis = _levels(source, stored)
    values = _dequantized(levels, scales, axis)
    outputs = levels.shape[axis] if scales.size == 1 else scales.size
    return source.input[0], values, levels, np.broadcast_to(scales, (outputs,)).astype(np.float32)


def _bias(
    node: "onnx.NodeProto", stored: Mapping[str, "onnx.TensorProto"], producers: Mapping[str, "onnx.NodeProto"]
) -> NDArray[np.float32] | None:
    """The bias of a node in float32, also if it is stored in levels of int32; None without one."""
    from onnx import numpy_helper

    if len(node.input) < 3 or not node.input[2]:
        return None
    name = _through_casts(node.input[2], producers)
    source = producers.get(name)
    if source is not None and source.op_type == "DequantizeLinear":
        levels, scales = (numpy_helper.to_array(stored[given]) for given in source.input[:2])
        return levels.astype(np.float32) * scales.astype(np.float32)
    return numpy_helper.to_array(stored[name]).astype(np.float32) if name in stored else None


def _levels(
    node: "onnx.NodeProto", stored: Mapping[str, "onnx.TensorProto"]
) -> tuple[NDArray[np.int8], NDArray[np.float32], int]:
    from onnx import numpy_helper

    levels, scales = (numpy_helper.to_array(stored[name]) for name in node.input[:2])
    zero = numpy_helper.to_array(stored[node.input[2]]) if len(node.input) > 2 else np.zeros(1, np.int8)
    if levels.dtype != np.int8 or zero.any():
        raise AuditError(
            f"{node.input[0]} is not stored in symmetric int8 levels.",
            remedy="Build the bundle again, or build another target.",
        )
    axis = next((item.i for item in node.attribute if item.name == "axis"), 1)
    return levels, np.atleast_1d(scales).astype(np.float32), axis if scales.size > 1 else 0


def _dequantized(levels: NDArray[np.int8], scales: NDArray[np.float32], axis: int) -> NDArray[np.float32]:
    shape = [1] * levels.ndim
    shape[axis] = scales.size
    return levels.astype(np.float32) * scales.reshape(shape)


def _input_scale(
    node: "onnx.NodeProto", stored: Mapping[str, "onnx.TensorProto"], producers: Mapping[str, "onnx.NodeProto"]
) -> float:
    from onnx import numpy_helper

    source = producers.get(node.input[0])
    if source is None or source.op_type != "DequantizeLinear" or source.input[1] not in stored:
        raise AuditError(
            f"{node.name} has int8 weights, and its input is not rounded to levels.",
            remedy="Build the bundle again, or build another target.",
        )
    return float(numpy_helper.to_array(stored[source.input[1]]))


def _through_casts(name: str, producers: Mapping[str, "onnx.NodeProto"]) -> str:
    while name in producers and producers[name].op_type == "Cast":
        name = producers[name].input[0]
    return name


def _activation(kinds: list[str]) -> str:
    return kinds[0] if len(kinds) == 1 and kinds[0] in ("Relu", "Clip") else ""


def _geometry(shape: tuple[int, ...], attributes: Mapping[str, Any]) -> tuple[int, ...]:
    if len(shape) != 4:
        raise AuditError(
            f"A convolution with weights of shape {shape} is not one of images.",
            remedy="Build another target for this network, for example onnx-fp32.",
        )
    values = {name: list(item.ints) for name, item in attributes.items() if item.ints}
    pads = values.get("pads", [0, 0, 0, 0])
    return (
        *shape[2:], *values.get("strides", [1, 1]), *values.get("dilations", [1, 1]), *pads,
        _number(attributes, "group", 1),
    )  # fmt: skip


def _number(attributes: Mapping[str, Any], name: str, default: int) -> int:
    return int(attributes[name].i) if name in attributes else default


def _union(sets: Iterable[frozenset[str]]) -> frozenset[str]:
    return frozenset().union(*sets)
