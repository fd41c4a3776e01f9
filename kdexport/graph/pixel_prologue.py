"""The nodes in front of a graph that make it take pixels: / 255, less the mean, / the standard deviation, in float32.

They are the last step of a cast. All that was measured or planned on the float32 graph names its tensors, and these
keep their names: only the input gets another producer.
"""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from kdexport.backends.base import BATCH, INPUT
from kdexport.backends.pixel_input import INPUT_KEY, InputKind, image_shape

#: How the names of all nodes and tensors of the prologue begin.
_PREFIX = "pixels_"
_NORMALISED = f"{_PREFIX}normalised"


def take_pixels(
    model: onnx.ModelProto, kind: InputKind, *, image_size: int, mean: Sequence[float], std: Sequence[float]
) -> onnx.ModelProto:
    """``model`` with an input of RGB pixels of ``kind``; ``mean`` and ``std`` are those of the 3 channels.

    It computes the same float32 operations in the same order as ``normalise_pixels``.
    """
    wrapped = onnx.ModelProto()
    wrapped.CopyFrom(model)
    graph = wrapped.graph
    _rename(graph, INPUT, _NORMALISED)
    nodes, constants = _prologue(kind, mean, std)
    rest = list(graph.node)
    del graph.node[:], graph.input[:]
    graph.node.extend([*nodes, *rest])
    graph.initializer.extend(constants)
    graph.input.append(helper.make_tensor_value_info(INPUT, TensorProto.UINT8, [BATCH, *image_shape(kind, image_size)]))
    wrapped.metadata_props.add(key=INPUT_KEY, value=json.dumps(kind))
    onnx.checker.check_model(wrapped, full_check=True)
    return wrapped


def without_prologue(model: onnx.ModelProto) -> onnx.ModelProto:
    """``model`` without the nodes that ``take_pixels`` added, with a float32 input; any other model as it is."""
    if [item.type.tensor_type.elem_type for item in model.graph.input] != [TensorProto.UINT8]:
        return model
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    graph = bare.graph
    nodes = [node for node in graph.node if not node.name.startswith(_PREFIX)]
    constants = [item for item in graph.initializer if not item.name.startswith(_PREFIX)]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(nodes)
    graph.initializer.extend(constants)
    # No image is as small as its three channels.
    size = max(dim.dim_value for dim in graph.input[0].type.tensor_type.shape.dim)
    del graph.input[:]
    graph.input.append(helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, [BATCH, 3, size, size]))
    _rename(graph, _NORMALISED, INPUT)
    metadata = [entry for entry in bare.metadata_props if entry.key != INPUT_KEY]
    del bare.metadata_props[:]
    bare.metadata_props.extend(metadata)
    return bare


def _prologue(
    kind: InputKind, mean: Sequence[float], std: Sequence[float]
) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    values = {
        "largest": np.float32(255),
        "mean": np.asarray(mean, np.float32).reshape(1, 3, 1, 1),
        "std": np.asarray(std, np.float32).reshape(1, 3, 1, 1),
    }
    constants = [numpy_helper.from_array(np.asarray(value), _PREFIX + name) for name, value in values.items()]
    planes = f"{_PREFIX}planes" if kind == "uint8-nhwc" else INPUT
    turned = [_node("Transpose", [INPUT], "planes", perm=[0, 3, 1, 2])] if kind == "uint8-nhwc" else []
    nodes = [
        *turned,
        _node("Cast", [planes], "float", to=TensorProto.FLOAT),
        _node("Div", [f"{_PREFIX}float", f"{_PREFIX}largest"], "scaled"),
        _node("Sub", [f"{_PREFIX}scaled", f"{_PREFIX}mean"], "centred"),
        _node("Div", [f"{_PREFIX}centred", f"{_PREFIX}std"], "normalised"),
    ]
    return nodes, constants


def _node(kind: str, inputs: Sequence[str], output: str, **attributes: Any) -> onnx.NodeProto:
    name = f"{_PREFIX}{output}"
    return helper.make_node(kind, inputs, [name], name=name, **attributes)


def _rename(graph: onnx.GraphProto, old: str, new: str) -> None:
    for node in graph.node:
        node.input[:] = [new if name == old else name for name in node.input]
