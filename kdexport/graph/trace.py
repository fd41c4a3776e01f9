"""Node-by-node comparison of two graphs with the same tensor names.

Each node of the suspect graph gets its inputs from the trusted graph. Errors of earlier nodes therefore do not reach
later ones, and a node with a large error causes it itself.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from kdexport.backends.ort import import_onnxruntime
from kdexport.errors import AuditError, first_line

Arrays = dict[str, NDArray[Any]]

#: Limit of a node's own RMS error relative to its result, about ten times the error of rounding its operands once
#: (mantissas of 24, 11 and 8 bits; 8 bits of a range that outliers determine).
LIMITS = {"fp32": 5e-6, "fp16": 5e-3, "bf16": 4e-2, "int8": 0.25}
_OWN = "::own"

#: Operators that only convert their input.
_PASSING = {"Cast", "QuantizeLinear", "DequantizeLinear"}


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeError:
    """The error of one node of the suspect graph: its result ``tensor`` from trusted inputs against the trusted result.

    ``error`` is the RMS relative to the trusted result, infinite if the result is not finite; ``worst`` is the index of
    the image that differs most.
    """

    node: str
    operator: str
    tensor: str
    error: float
    worst: int


@dataclass(frozen=True, slots=True, eq=False)
class Trace:
    """Errors of all comparable nodes in graph order.

    ``trusted`` are the float32 values of the trusted graph, ``given`` the same in the types of the suspect, with the
    graph's inputs; ``own`` are the results of the suspect's nodes from ``given``.
    """

    nodes: tuple[NodeError, ...]
    trusted: Arrays
    given: Arrays
    own: Arrays


def trace(suspect: onnx.ModelProto, trusted: onnx.ModelProto, feeds: Arrays) -> Trace:
    """Compare every node whose result is in both graphs. Raises ``AuditError`` if a node cannot run."""
    known = set(results(trusted))
    names = [name for name in results(suspect) if name in known]
    values = run(trusted, feeds, names)
    points = {dequantized(suspect, name): values[name] for name in names if values[name].dtype == np.float32}
    shared = list(points)
    kinds = {name: value.dtype for name, value in run(suspect, feeds, shared).items()}
    with np.errstate(over="ignore"):
        given = {name: value.astype(kinds[name]) for name, value in points.items()}
    own = _run_isolated(suspect, {**feeds, **given}, shared)
    producers = computing_nodes(suspect)
    rows = tuple(_compare(producers[name], name, own[name], points[name]) for name in shared)
    return Trace(rows, points, {**feeds, **given}, own)


def first_faulty(nodes: tuple[NodeError, ...], precision: str) -> NodeError | None:
    """The first node with an error above the limit of ``precision``; None if there is none."""
    return next((node for node in nodes if not node.error <= LIMITS[precision]), None)


def _compare(node: onnx.NodeProto, tensor: str, own: NDArray[Any], trusted: NDArray[Any]) -> NodeError:
    with np.errstate(invalid="ignore", over="ignore"):
        difference = own.astype(np.float64) - trusted.astype(np.float64)
        scale = float(np.sqrt(np.mean(np.square(trusted.astype(np.float64)))))
        error = float(np.sqrt(np.mean(np.square(difference))))
    relative = error / scale if scale else (0.0 if error == 0 else np.inf)
    per_image = np.abs(np.nan_to_num(difference, nan=np.inf)).reshape(len(difference), -1).max(axis=1)
    return NodeError(
        node=node.name or tensor,
        operator=node.op_type,
        tensor=tensor,
        error=float("inf") if not np.isfinite(own).all() else relative,
        worst=int(per_image.argmax()),
    )


def dequantized(model: onnx.ModelProto, name: str) -> str:
    """The dequantized form of a tensor that is only quantized; otherwise the tensor itself.

    The quantization may include an operator: a ReLU can be absorbed by the zero point.
    """
    readers = [node for node in model.graph.node if name in node.input]
    if [node.op_type for node in readers] != ["QuantizeLinear"]:
        return name
    back = [node for node in model.graph.node if readers[0].output[0] in node.input]
    return back[0].output[0] if [node.op_type for node in back] == ["DequantizeLinear"] else name


def computing_nodes(model: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    """The node that computes each tensor, by the name of the tensor; casts and Q/DQ nodes are skipped."""
    producers = {name: node for node in model.graph.node for name in node.output}
    found = {}
    for name, producer in producers.items():
        node = producer
        while node.op_type in _PASSING and node.input[0] in producers:
            node = producers[node.input[0]]
        found[name] = node
    return found


def results(model: onnx.ModelProto) -> list[str]:
    """Names of all tensors that the nodes of a graph compute, in order."""
    return [name for node in model.graph.node for name in node.output if name]


def run(model: onnx.ModelProto, feeds: Arrays, names: list[str]) -> Arrays:
    """Values of the tensors ``names`` of a graph, computed by onnxruntime without optimisation."""
    exposed = onnx.ModelProto()
    exposed.CopyFrom(model)
    del exposed.graph.output[:]
    exposed.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in names)
    return _session_run(exposed, feeds, names)


def extract(model: onnx.ModelProto, tensor: str, given: Mapping[str, NDArray[Any]], *, local: bool) -> onnx.ModelProto:
    """The smallest graph that computes ``tensor`` from tensors of ``given``, with their types and shapes.

    If ``local``, the graph starts at the given tensors nearest to ``tensor``, never at ``tensor`` itself.
    """
    producers = {name: node for node in model.graph.node for name in node.output}
    nodes: list[onnx.NodeProto] = []
    inputs: dict[str, None] = {}
    pending = [tensor]
    while pending:
        node = producers[pending.pop()]
        if node in nodes:
            continue
        nodes.append(node)
        for name in node.input:
            if name in given and (local or name not in producers):
                inputs[name] = None
            elif name in producers:
                pending.append(name)
    order = {id(node): place for place, node in enumerate(model.graph.node)}
    nodes.sort(key=lambda node: order[id(node)])
    read = {name for node in nodes for name in node.input}
    graph = helper.make_graph(
        nodes,
        "blamed",
        [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(given[name].dtype), given[name].shape)
            for name in inputs
        ],
        [helper.make_empty_tensor_value_info(tensor)],
        [item for item in model.graph.initializer if item.name in read],
    )
    small = helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
    return onnx.shape_inference.infer_shapes(small)


def _run_isolated(model: onnx.ModelProto, given: Arrays, shared: list[str]) -> Arrays:
    """Run all nodes in one session where every shared tensor is an input, and its producer writes to a new name."""
    cut = set(shared)
    nodes = []
    for node in model.graph.node:
        isolated = onnx.NodeProto()
        isolated.CopyFrom(node)
        isolated.output[:] = [f"{name}{_OWN}" if name in cut else name for name in node.output]
        nodes.append(isolated)
    read = {name for node in nodes for name in node.input}
    fed = [name for name in given if name in read]
    graph = helper.make_graph(
        nodes,
        "isolated",
        [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(given[name].dtype), given[name].shape)
            for name in fed
        ],
        [helper.make_empty_tensor_value_info(f"{name}{_OWN}") for name in shared],
        model.graph.initializer,
    )
    isolated_model = helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
    found = _session_run(isolated_model, {name: given[name] for name in fed}, [f"{name}{_OWN}" for name in shared])
    return {name.removesuffix(_OWN): value for name, value in found.items()}


def _session_run(model: onnx.ModelProto, feeds: Arrays, names: list[str]) -> Arrays:
    ort = import_onnxruntime()
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    known = {value.name for value in model.graph.input}
    try:
        session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        given = {name: value for name, value in feeds.items() if name in known}
        return dict(zip(names, session.run(names, given), strict=True))
    # onnxruntime raises a dozen exception types of its own without a common base.
    except Exception as error:
        raise AuditError(
            f"onnxruntime cannot run the graph without optimisation: {first_line(error)}",
            remedy="Use a precision that the CPU provider supports; it has no bfloat16 convolution, for example.",
        ) from error
