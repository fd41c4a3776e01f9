"""The node behind a graph that makes it give probabilities: a softmax over the classes, in float32.

The logits stay an output, so that every check compares what it compares in any other file.
"""

import json

import onnx
from onnx import TensorProto, helper

from kdexport.backends.base import BATCH, LOGITS
from kdexport.backends.file_interface import OUTPUT_KEY, PROBABILITIES


def give_probabilities(model: onnx.ModelProto) -> onnx.ModelProto:
    """``model`` with a first output of probabilities (N,K) float32 in front of its logits (N,K)."""
    wrapped = onnx.ModelProto()
    wrapped.CopyFrom(model)
    graph = wrapped.graph
    (logits,) = graph.output
    classes = logits.type.tensor_type.shape.dim[1].dim_value
    graph.node.append(helper.make_node("Softmax", [LOGITS], [PROBABILITIES], name=PROBABILITIES, axis=1))
    first = helper.make_tensor_value_info(PROBABILITIES, TensorProto.FLOAT, [BATCH, classes])
    last = onnx.ValueInfoProto()
    last.CopyFrom(logits)
    del graph.output[:]
    graph.output.extend([first, last])
    wrapped.metadata_props.add(key=OUTPUT_KEY, value=json.dumps(PROBABILITIES))
    onnx.checker.check_model(wrapped, full_check=True)
    return wrapped


def without_probabilities(model: onnx.ModelProto) -> onnx.ModelProto:
    """``model`` without the node that ``give_probabilities`` added; any other model as it is."""
    if PROBABILITIES not in [item.name for item in model.graph.output]:
        return model
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    graph = bare.graph
    nodes = [node for node in graph.node if PROBABILITIES not in node.output]
    outputs = [item for item in graph.output if item.name != PROBABILITIES]
    metadata = [entry for entry in bare.metadata_props if entry.key != OUTPUT_KEY]
    del graph.node[:], graph.output[:], bare.metadata_props[:]
    graph.node.extend(nodes)
    graph.output.extend(outputs)
    bare.metadata_props.extend(metadata)
    return bare
