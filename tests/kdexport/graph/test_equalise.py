"""Channels of the last convolution are balanced with the linear layer behind the pooling before training for int8."""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from kdexport.graph.equalise import equalise
from kdexport.graph.trace import run
from tests.kdexport.exported_students import images

SIZE, CHANNELS, CLASSES, LOUD = 8, 6, 5, 2


def network(pixels_read: int = 1) -> onnx.ModelProto:
    """Conv, ReLU, pooling, linear layer; one channel is 2**9 times as large as the others, and read as much less.

    With ``pixels_read`` 4 the pooling leaves four pixels, so that the linear layer has four inputs for each channel.
    """
    rng = np.random.default_rng(8)
    weights = {
        "c.weight": rng.normal(0, 0.4, (CHANNELS, 3, 3, 3)),
        "c.bias": rng.normal(0.2, 0.2, CHANNELS),
        "l.weight": rng.normal(0, 1, (CLASSES, CHANNELS * pixels_read)),
        "l.bias": rng.normal(0, 0.3, CLASSES),
    }
    weights["c.weight"][LOUD] *= 2**9
    weights["c.bias"][LOUD] *= 2**9
    weights["l.weight"].reshape(CLASSES, CHANNELS, pixels_read)[:, LOUD] /= 2**9
    side = SIZE if pixels_read == 1 else SIZE // 2
    nodes = [
        helper.make_node("Conv", ["input", "c.weight", "c.bias"], ["c"], "conv", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["r"], "relu"),
        helper.make_node("AveragePool", ["r"], ["p"], "pool", kernel_shape=[side, side], strides=[side, side])
        if pixels_read > 1
        else helper.make_node("GlobalAveragePool", ["r"], ["p"], "pool"),
        helper.make_node("Flatten", ["p"], ["f"], "flatten"),
        helper.make_node("Gemm", ["f", "l.weight", "l.bias"], ["logits"], "linear", transB=1),
    ]
    ends = [
        helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 3, SIZE, SIZE]),
        helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", CLASSES]),
    ]
    stored = [numpy_helper.from_array(values.astype(np.float32), name) for name, values in weights.items()]
    graph = helper.make_graph(nodes, "pooled", ends[:1], ends[1:], stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def test_the_last_convolution_is_balanced_through_the_pooling_and_computes_the_same_bits(tmp_path: Path) -> None:
    model, feeds = network(), {"input": images(12, 5, size=SIZE)}
    assert equalise(model, feeds).scalings == ()
    found = equalise(model, feeds, through_pooling=True)
    (scaling,) = found.scalings
    assert (scaling.first, scaling.second) == (("c.weight", "c.bias"), "l.weight")
    before, after = (run(each, feeds, ["r", "logits"]) for each in (model, found.model))
    assert np.array_equal(before["logits"], after["logits"])
    reach = [np.abs(values["r"]).max((0, 2, 3)) for values in (before, after)]
    unlike = [peaks.max() / np.median(peaks) for peaks in reach]
    assert unlike[0] > 100
    assert unlike[1] < 30


def test_a_linear_layer_with_several_inputs_for_a_channel_is_left_alone() -> None:
    feeds = {"input": images(12, 5, size=SIZE)}
    assert equalise(network(4), feeds, through_pooling=True).scalings == ()
