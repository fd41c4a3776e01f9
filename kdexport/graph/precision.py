"""Casts of float32 graphs to float16 and bfloat16, and emulation of bfloat16 graphs in float32.

The precision is written into the graph, so that every backend runs the same one.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from kdexport.backends.ort import import_onnxruntime
from kdexport.core.console import quiet
from kdexport.errors import AuditError

FLOAT16_MAX = 65504.0

BFLOAT16_MAX = (2 - 2**-7) * 2.0**127

#: The first opset whose convolution supports bfloat16.
BF16_OPSET = 22


def cast_to_fp16(source: Path, path: Path, *, keep: Sequence[str] = ()) -> onnx.ModelProto:
    """Write ``source`` (float32) with float16 weights and arithmetic; input and logits stay float32.

    Nodes of ``keep`` stay float32, with casts around them. Every other weight is rounded to the nearest float16.
    Raises ``AuditError`` for a weight outside of the range of float16.
    """
    import_onnxruntime()
    from onnxruntime.transformers.float16 import convert_float_to_float16

    exact = onnx.load(str(source))
    reduced = {name for node in exact.graph.node if node.name not in keep for name in node.input}
    stored = {item.name: numpy_helper.to_array(item) for item in exact.graph.initializer}
    weights = {name: values for name, values in stored.items() if name in reduced}
    _require_range(weights, "float16", FLOAT16_MAX)
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        model = convert_float_to_float16(exact, keep_io_types=True, node_block_list=list(keep) or None)
    finally:
        logging.disable(level)
    _read_uncast_factors(model)
    model = sorted_model(model)
    exempt = factors_of_size(model)
    for item in model.graph.initializer:
        if item.name in exempt:
            item.CopyFrom(numpy_helper.from_array(stored[item.name], item.name))
        elif item.data_type == onnx.TensorProto.FLOAT16 and item.name in weights:
            # The converter replaces small values by its own minimum, so the nearest float16 is stored here.
            item.CopyFrom(numpy_helper.from_array(weights[item.name].astype(np.float16), item.name))
    # The factors had another type when these were inferred.
    if exempt:
        del model.graph.value_info[:]
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, str(path))
    return model


def cast_to_bf16(source: Path, path: Path) -> onnx.ModelProto:
    """Write ``source`` (float32) with bfloat16 weights and arithmetic; input and logits stay float32.

    Every weight is rounded to the nearest bfloat16, ties to even. A lower opset is raised to 22, the first whose
    convolution supports bfloat16. Raises ``AuditError`` for a weight outside of the range of bfloat16.
    """
    exact = onnx.load(str(source))
    weights = {item.name: numpy_helper.to_array(item) for item in exact.graph.initializer}
    _require_range(weights, "bfloat16", BFLOAT16_MAX)
    model = _raise_opset(exact, BF16_OPSET)
    # The inferred types of intermediate values are float32.
    del model.graph.value_info[:]
    exempt = factors_of_size(model)
    for item in model.graph.initializer:
        if item.data_type == TensorProto.FLOAT and item.name not in exempt:
            item.CopyFrom(_as_bf16(item))
    for node in model.graph.node:
        _retype(node)
    _keep_interface(model.graph)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, str(path))
    return model


def factors_of_size(model: onnx.ModelProto) -> frozenset[str]:
    """Names of the stored factors by which images are resized; ONNX has them in float32 in every precision."""
    return frozenset(name for node in model.graph.node if node.op_type == "Resize" for name in node.input[1:3] if name)


def _read_uncast_factors(model: onnx.ModelProto) -> None:
    """Let each Resize read its stored factors; the converter casts them to float16 and back."""
    graph = model.graph
    casts = {node.output[0]: node for node in graph.node if node.op_type == "Cast"}
    stored = {item.name for item in graph.initializer}
    for node in graph.node:
        for place, name in enumerate(node.input):
            if node.op_type == "Resize" and place > 0 and name in casts and casts[name].input[0] in stored:
                node.input[place] = casts[name].input[0]
    read = {name for node in graph.node for name in node.input} | {value.name for value in graph.output}
    for cast in casts.values():
        if cast.output[0] not in read:
            graph.node.remove(cast)


def _require_range(weights: dict[str, NDArray[Any]], kind: str, largest: float) -> None:
    for name, values in weights.items():
        peak = np.abs(values).max(initial=0) if values.dtype == np.float32 else 0.0
        if not peak <= largest:
            raise AuditError(
                f"Weight {name} reaches {peak:.3g}; the largest {kind} is {largest:.6g}.",
                remedy="Use an fp32 target, or train again: a batch norm with almost no variance causes such weights.",
            )


def _raise_opset(model: onnx.ModelProto, opset: int) -> onnx.ModelProto:
    """``model`` in ``opset`` or later, with the same node names."""
    if next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")) >= opset:
        return model
    with quiet():
        raised = onnx.version_converter.convert_version(model, opset)
    names = {node.output[0]: node.name for node in model.graph.node}
    for node in raised.graph.node:
        # The converter renames all nodes; errors of a backend must name the nodes of the student.
        node.name = names.get(node.output[0], node.name)
    return raised


def _as_bf16(item: TensorProto) -> TensorProto:
    values = numpy_helper.to_array(item).astype(ml_dtypes.bfloat16)
    # numpy_helper cannot write bfloat16; the bytes of ml_dtypes are those of the ONNX standard.
    return helper.make_tensor(item.name, TensorProto.BFLOAT16, list(values.shape), values.tobytes(), raw=True)


def _retype(node: onnx.NodeProto) -> None:
    """Change float32 constants and casts of a node to bfloat16."""
    for attribute in node.attribute:
        if attribute.name == "value" and attribute.t.data_type == TensorProto.FLOAT:
            attribute.t.CopyFrom(_as_bf16(attribute.t))
        if node.op_type == "Cast" and attribute.name == "to" and attribute.i == TensorProto.FLOAT:
            attribute.i = TensorProto.BFLOAT16


def _keep_interface(graph: onnx.GraphProto) -> None:
    """Cast the input to bfloat16 once, and the logits back to float32."""
    stored = {item.name for item in graph.initializer}
    ends = [value.name for value in graph.input if value.name not in stored]
    inside = {name: f"{name}_bf16" for name in (*ends, *(value.name for value in graph.output))}
    for node in graph.node:
        node.input[:] = [inside.get(name, name) for name in node.input]
        node.output[:] = [inside.get(name, name) for name in node.output]
    entering = [
        helper.make_node("Cast", [name], [inside[name]], f"graph_input_cast{i}", to=TensorProto.BFLOAT16)
        for i, name in enumerate(ends)
    ]
    leaving = [
        helper.make_node("Cast", [inside[value.name]], [value.name], f"graph_output_cast{i}", to=TensorProto.FLOAT)
        for i, value in enumerate(graph.output)
    ]
    nodes = [*entering, *graph.node, *leaving]
    del graph.node[:]
    graph.node.extend(nodes)


def sorted_model(model: onnx.ModelProto) -> onnx.ModelProto:
    """``model`` in topological order, which ONNX requires; converters append nodes at the end."""
    import onnx_ir
    import onnx_ir.passes.common as passes

    graph = onnx_ir.serde.deserialize_model(model)
    passes.TopologicalSortPass()(graph)
    return onnx_ir.serde.serialize_model(graph)


def emulate_bf16(path: Path) -> bytes:
    """The bfloat16 model of ``path`` as a serialized float32 model that rounds every bfloat16 result to bfloat16.

    It runs on machines without bfloat16. Run it without graph optimisation, which may remove a cast to bfloat16 and
    back.
    """
    model = onnx.load(str(path))
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    rounds = {v.name for v in inferred.graph.value_info if v.type.tensor_type.elem_type == TensorProto.BFLOAT16}
    for item in model.graph.initializer:
        if item.data_type == TensorProto.BFLOAT16:
            values = numpy_helper.to_array(item).view(ml_dtypes.bfloat16).astype(np.float32)
            item.CopyFrom(numpy_helper.from_array(values, item.name))
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        _widen_attributes(node)
        names = [name for name in node.output if name in rounds]
        node.output[:] = [_unrounded(name) if name in rounds else name for name in node.output]
        nodes.append(node)
        for name in names:
            nodes.append(helper.make_node("Cast", [_unrounded(name)], [f"{name} rounded"], to=TensorProto.BFLOAT16))
            nodes.append(helper.make_node("Cast", [f"{name} rounded"], [name], to=TensorProto.FLOAT))
    del model.graph.node[:], model.graph.value_info[:]
    model.graph.node.extend(nodes)
    return bytes(model.SerializeToString())


def _unrounded(name: str) -> str:
    return f"{name} exact"


def _widen_attributes(node: onnx.NodeProto) -> None:
    for attribute in node.attribute:
        if node.op_type == "Cast" and attribute.name == "to" and attribute.i == TensorProto.BFLOAT16:
            attribute.i = TensorProto.FLOAT
        if attribute.name == "value" and attribute.t.data_type == TensorProto.BFLOAT16:
            values = numpy_helper.to_array(attribute.t).view(ml_dtypes.bfloat16).astype(np.float32)
            attribute.t.CopyFrom(numpy_helper.from_array(values, attribute.t.name))
