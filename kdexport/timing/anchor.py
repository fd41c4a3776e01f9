"""The anchor: a small convolutional network that runs in a fraction of a millisecond.

It calibrates a machine without a bundle, and it is the unit in which latencies of different days are compared.
"""

import itertools
from pathlib import Path

import numpy as np

#: Side of its input images in pixels.
SIZE = 32

_CHANNELS = (3, 24, 48, 64, 96)


def write_anchor_network(path: Path) -> Path:
    """Write an ONNX file of four 3x3 convolutions and global pooling, with random weights; input (N,3,32,32)."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(20240208)
    nodes, weights, last = [], [], "input"
    for index, (inputs, outputs) in enumerate(itertools.pairwise(_CHANNELS)):
        values = rng.normal(0, (2 / (9 * inputs)) ** 0.5, (outputs, inputs, 3, 3)).astype(np.float32)
        weights.append(numpy_helper.from_array(values, f"w{index}"))
        strides = [1, 1] if index == 0 else [2, 2]
        nodes.append(helper.make_node("Conv", [last, f"w{index}"], [f"c{index}"], pads=[1] * 4, strides=strides))
        nodes.append(helper.make_node("Relu", [f"c{index}"], [f"r{index}"]))
        last = f"r{index}"
    nodes.append(helper.make_node("GlobalAveragePool", [last], ["pooled"]))
    nodes.append(helper.make_node("Flatten", ["pooled"], ["logits"]))
    graph = helper.make_graph(
        nodes,
        "calibration",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 3, SIZE, SIZE])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", _CHANNELS[-1]])],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    onnx.save(model, str(path))
    return path
