"""A small residual network for int8: its weights, its file, and its tensors computed layer by layer in float64."""

from pathlib import Path

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor
from torch.nn import functional

from kdexport.graph.quantize import FORMS, Form
from tests.kdexport.exported_students import images

SIZE, CHANNELS, CLASSES = 12, 6, 5
CALIBRATION = images(24, 11, size=SIZE)


def block_weights() -> dict[str, NDArray[np.float32]]:
    """Weights whose output channels differ in size, so that a single scale for all of them would be detected."""
    rng = np.random.default_rng(4)
    gain = np.logspace(-2, 0, CHANNELS)
    shapes = {"stem": (CHANNELS, 3, 3, 3), "inner": (CHANNELS, CHANNELS, 1, 1), "linear": (CLASSES, CHANNELS)}
    weights = {}
    for name, shape in shapes.items():
        scale = gain[:, None, None, None] if len(shape) == 4 else 1.0
        weights[f"{name}.weight"] = (rng.normal(0.1, 0.5, shape) * scale).astype(np.float32)
        weights[f"{name}.bias"] = rng.normal(0, 0.3, shape[0]).astype(np.float32)
    return weights


def block_graph(path: Path) -> Path:
    """Stem, ReLU, a residual 1x1 convolution, ReLU, pooling, linear layer."""
    nodes = [
        helper.make_node("Conv", ["input", "stem.weight", "stem.bias"], ["stem"], "stem", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["stem"], ["x"], "relu"),
        helper.make_node("Conv", ["x", "inner.weight", "inner.bias"], ["inner"], "inner"),
        helper.make_node("Add", ["inner", "x"], ["sum"], "add"),
        helper.make_node("Relu", ["sum"], ["y"], "relu_1"),
        helper.make_node("GlobalAveragePool", ["y"], ["pooled"], "pool"),
        helper.make_node("Flatten", ["pooled"], ["flat"], "flatten"),
        helper.make_node("Gemm", ["flat", "linear.weight", "linear.bias"], ["logits"], "linear", transB=1),
    ]
    ends = [
        helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 3, SIZE, SIZE]),
        helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", CLASSES]),
    ]
    constants = [numpy_helper.from_array(values, name) for name, values in block_weights().items()]
    graph = helper.make_graph(nodes, "block", ends[:1], ends[1:], constants)
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10, producer_name="pytorch"
    )
    helper.set_model_props(model, {"kdexport.classes": '["a"]'})
    onnx.save(model, str(path))
    return path


def rounded_weight(weight: NDArray[np.float32]) -> Tensor:
    """``weight`` rounded to int8 with one symmetric scale for each output channel, in float64."""
    flat = torch.from_numpy(weight).double().flatten(1)
    scale = (flat.abs().amax(1, keepdim=True) / 127).float().double()
    return ((flat / scale).round().clamp(-127, 127) * scale).reshape(weight.shape)


def rounded(x: Tensor, calibrated: Tensor, form: Form) -> Tensor:
    """``x`` rounded to int8 with the range of ``calibrated``, in float64."""
    low, high = min(calibrated.min().item(), 0.0), max(calibrated.max().item(), 0.0)
    if form == "int8-s8":
        scale = max(-low, high) / 127
        return (x / scale).round().clamp(-128, 127) * scale
    scale = (high - low) / 255
    zero = round(-low / scale)
    return ((x / scale).round() + zero).clamp(0, 255).sub(zero) * scale


def block_tensors(x: NDArray[np.float32], form: Form | None) -> dict[str, Tensor]:
    """All tensors of the block in float64; with ``form``, rounded wherever that form rounds, with calibrated ranges."""
    exact = block_tensors(CALIBRATION, None) if form else {}
    w = block_weights()

    def keep(name: str, value: Tensor, forms: tuple[str, ...] = FORMS) -> Tensor:
        return rounded(value, exact[name], form) if form in forms else value

    def weight(name: str) -> Tensor:
        return rounded_weight(w[f"{name}.weight"]) if form else torch.from_numpy(w[f"{name}.weight"]).double()

    def bias(name: str) -> Tensor:
        return torch.from_numpy(w[f"{name}.bias"]).double()

    only_u8 = ("int8-u8",)
    found = {"input": torch.from_numpy(x).double()}
    found["stem"] = functional.conv2d(keep("input", found["input"]), weight("stem"), bias("stem"), padding=1)
    found["x"] = found["stem"].relu()
    x_q = keep("x", found["x"])
    found["inner"] = functional.conv2d(x_q, weight("inner"), bias("inner"))
    found["sum"] = keep("inner", found["inner"], only_u8) + x_q
    found["y"] = found["sum"].relu()
    found["flat"] = keep("y", found["y"], only_u8).mean((2, 3))
    found["logits"] = functional.linear(keep("flat", found["flat"]), weight("linear"), bias("linear"))
    found["logits"] = keep("logits", found["logits"], only_u8)
    return found
