"""Operators in LiteRT's files against onnxruntime's run of the same graph, where layouts and paddings differ."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from kdexport.backends import backend
from kdexport.backends.litert import MODEL
from kdexport.backends.litert_files import read_model
from kdexport.backends.litert_graph import lite_model
from kdexport.errors import EngineBuildError
from tests.kdexport.optional_packages import require_litert

require_litert()

Constants = dict[str, NDArray[Any]]
RNG = np.random.default_rng(6)


def graph(nodes: list[onnx.NodeProto], constants: Constants, *, size: int = 9) -> Any:
    """A graph from ``input`` (n,3,S,S) to ``logits`` (n,4)."""
    made = helper.make_graph(
        nodes, "operators", [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 3, size, size])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 4])],
        [numpy_helper.from_array(values, name) for name, values in constants.items()],
    )  # fmt: skip
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def with_head(nodes: list[onnx.NodeProto], channels: int, constants: Constants, size: int = 9) -> Any:
    """A graph whose last node gives a map ``last``, with a mean and a linear layer behind it."""
    head = [
        helper.make_node("ReduceMean", ["last", "axes"], ["mean"], "mean", keepdims=0),
        helper.make_node("Gemm", ["mean", "head.weight", "head.bias"], ["logits"], "head", transB=1),
    ]
    own: Constants = {
        "axes": np.array([-1, -2], np.int64), "head.weight": RNG.normal(size=(4, channels)).astype(np.float32),
        "head.bias": RNG.normal(size=4).astype(np.float32),
    }  # fmt: skip
    return graph([*nodes, *head], {**constants, **own}, size=size)


def node(kind: str, inputs: list[str], output: str | list[str], **attributes: Any) -> onnx.NodeProto:
    outputs = [output] if isinstance(output, str) else output
    return helper.make_node(kind, inputs, outputs, f"{kind}_{outputs[0]}", **attributes)


def conv(outputs: int, inputs: int, kernel: tuple[int, int], **attributes: Any) -> tuple[onnx.NodeProto, Constants]:
    weight = RNG.normal(size=(outputs, inputs, *kernel)).astype(np.float32)
    bias = RNG.normal(size=outputs).astype(np.float32)
    return node("Conv", ["input", "w", "b"], "x", **attributes), {"w": weight, "b": bias}


def check(model: Any, folder: Path, *, size: int = 9) -> tuple[str, ...]:
    """Compare the logits with onnxruntime's; returns the kinds of the operators."""
    (folder / MODEL).write_bytes(lite_model(model))
    runner = backend("litert").open(folder / MODEL, "fp32", threads=1)
    x = RNG.normal(size=(3, 3, size, size)).astype(np.float32)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    expected = session.run(None, {"input": x})[0]
    found = runner.logits(x)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 * float(np.abs(expected).max()) + 1e-6)
    return tuple(operation.kind for operation in read_model((folder / MODEL).read_bytes()).operations)


@pytest.mark.parametrize(
    ("outputs", "inputs", "kernel", "attributes", "padding"),
    [
        (5, 3, (3, 3), {"pads": [1, 1, 1, 1]}, False),
        # A stride of 2 on an odd size is LiteRT's own padding, on an even one it is not.
        (5, 3, (3, 3), {"pads": [1, 1, 1, 1], "strides": [2, 2]}, False),
        (5, 3, (3, 3), {"pads": [0, 1, 2, 0], "strides": [2, 1]}, True),
        (5, 3, (2, 3), {"dilations": [3, 2]}, False),
        (6, 1, (3, 3), {"pads": [1, 1, 1, 1], "group": 3}, False),
        (3, 1, (5, 3), {"pads": [2, 1, 2, 1], "group": 3, "strides": [2, 2]}, False),
    ],
)
def test_convolutions(
    outputs: int, inputs: int, kernel: tuple[int, int], attributes: dict[str, Any], padding: bool, tmp_path: Path
) -> None:
    made, constants = conv(outputs, inputs, kernel, **attributes)
    kinds = check(with_head([made, node("Relu", ["x"], "last")], outputs, constants), tmp_path)
    assert kinds[0] == "PAD" if padding else kinds[0] != "PAD"
    assert "RELU" not in kinds


def test_a_padding_of_one_before_a_stride_of_two_is_written_out_on_an_even_size(tmp_path: Path) -> None:
    made, constants = conv(4, 3, (3, 3), pads=[1, 1, 1, 1], strides=[2, 2])
    kinds = check(with_head([made, node("Clip", ["x", "low", "high"], "last")], 4, {
        **constants, "low": np.array(0, np.float32), "high": np.array(6, np.float32)
    }, size=8), tmp_path, size=8)  # fmt: skip
    assert kinds == ("PAD", "CONV_2D", "MEAN", "FULLY_CONNECTED")


@pytest.mark.parametrize("size", [8, 9])
@pytest.mark.parametrize("after_relu", [True, False])
def test_a_maximum_does_not_see_its_padding(size: int, after_relu: bool, tmp_path: Path) -> None:
    made, constants = conv(4, 3, (1, 1))
    constants["b"] = np.full(4, -9, np.float32)
    nodes = [made, node("Relu", ["x"], "y")] if after_relu else [made, node("Identity", ["x"], "y")]
    pool = node("MaxPool", ["y"], "last", kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    kinds = check(with_head([*nodes, pool], 4, constants, size), tmp_path, size=size)
    # Zeros are the least value behind a ReLU, and the delegate has no other padding.
    wanted = {(8, True): "PAD", (8, False): "PADV2"}.get((size, after_relu), "MAX_POOL_2D")
    assert wanted in kinds
    assert sum("PAD" in kind for kind in kinds) == (size == 8)


@pytest.mark.parametrize("counted", [0, 1])
def test_a_mean_counts_its_padding_as_the_graph_says(counted: int, tmp_path: Path) -> None:
    given = {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1], "count_include_pad": counted}
    check(with_head([node("AveragePool", ["input"], "last", **given)], 3, {}), tmp_path)


def test_a_shuffle_of_channels_and_a_split(tmp_path: Path) -> None:
    made, constants = conv(6, 3, (3, 3))
    nodes = [
        made, node("Reshape", ["x", "five"], "r"), node("Transpose", ["r"], "t", perm=[0, 2, 1, 3, 4]),
        node("Reshape", ["t", "four"], "s"), node("Split", ["s", "sizes"], ["left", "right"], axis=1),
        node("Relu", ["left"], "only"), node("Concat", ["right", "only"], "last", axis=1),
    ]  # fmt: skip
    constants |= {
        "five": np.array([0, 2, 3, 7, 7], np.int64), "four": np.array([0, 6, 7, 7], np.int64),
        "sizes": np.array([2, 4], np.int64),
    }  # fmt: skip
    kinds = check(with_head(nodes, 6, constants), tmp_path)
    assert kinds.count("TRANSPOSE") == 1


def test_a_map_is_flattened_in_the_order_of_its_planes(tmp_path: Path) -> None:
    weight = RNG.normal(size=(3 * 81, 4)).astype(np.float32)
    nodes = [
        node("Flatten", ["input"], "flat"), node("MatMul", ["flat", "w"], "logits")
    ]  # fmt: skip
    kinds = check(graph(nodes, {"w": weight}), tmp_path)
    assert kinds == ("TRANSPOSE", "RESHAPE", "FULLY_CONNECTED")


def test_what_a_squeeze_and_excitation_block_is_made_of(tmp_path: Path) -> None:
    made, constants = conv(5, 3, (1, 1))
    nodes = [
        made, node("HardSwish", ["x"], "h"), node("GlobalAveragePool", ["h"], "g"),
        node("HardSigmoid", ["g"], "s", alpha=1 / 6, beta=0.5), node("Mul", ["s", "h"], "m"),
        node("Sigmoid", ["m"], "i"), node("Sub", ["i", "each"], "d"), node("Div", ["d", "scalar"], "q"),
        node("Clip", ["q", "low"], "last"),
    ]  # fmt: skip
    constants |= {
        "each": RNG.normal(size=(1, 5, 1, 1)).astype(np.float32), "scalar": np.array(3, np.float32),
        "low": np.array(-0.2, np.float32),
    }  # fmt: skip
    check(with_head(nodes, 5, constants), tmp_path)


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (node("HardSigmoid", ["input"], "last"), "with 1/6 only"),
        (node("ReduceMean", ["input", "batch"], "last"), "not a mean over the pixels"),
        (node("MaxPool", ["input"], "last", kernel_shape=[2, 2], ceil_mode=1), "rounds its size up"),
        (node("Softplus", ["input"], "last"), "the operator Softplus"),
    ],
)
def test_what_cannot_be_written_is_named(made: onnx.NodeProto, words: str) -> None:
    with pytest.raises(EngineBuildError, match=words) as caught:
        lite_model(with_head([made], 3, {"batch": np.array([0], np.int64)}))
    assert "onnx-fp32" in caught.value.remedy
