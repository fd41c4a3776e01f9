"""A bfloat16 file on a machine that has no bfloat16: its own weights and operators, rounded where it rounds."""

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def emulate_bf16(path: Path) -> bytes:
    """The model of ``path`` in float32, stored values widened and every bfloat16 result rounded to it and back.

    To be run without graph optimisation, which may take two casts for none.
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
        node.output[:] = [_exact(name) if name in rounds else name for name in node.output]
        nodes.append(node)
        for name in names:
            nodes.append(helper.make_node("Cast", [_exact(name)], [f"{name} rounded"], to=TensorProto.BFLOAT16))
            nodes.append(helper.make_node("Cast", [f"{name} rounded"], [name], to=TensorProto.FLOAT))
    del model.graph.node[:], model.graph.value_info[:]
    model.graph.node.extend(nodes)
    return bytes(model.SerializeToString())


def _exact(name: str) -> str:
    return f"{name} exact"


def _widen_attributes(node: onnx.NodeProto) -> None:
    for attribute in node.attribute:
        if node.op_type == "Cast" and attribute.name == "to" and attribute.i == TensorProto.BFLOAT16:
            attribute.i = TensorProto.FLOAT
        if attribute.name == "value" and attribute.t.data_type == TensorProto.BFLOAT16:
            values = numpy_helper.to_array(attribute.t).view(ml_dtypes.bfloat16).astype(np.float32)
            attribute.t.CopyFrom(numpy_helper.from_array(values, attribute.t.name))
