"""Quantization of float32 graphs to int8 with explicit Q/DQ nodes, in the two forms that runtimes execute as int8.

``int8-u8``: activations uint8 with a zero point, weights int8 per output channel, biases int32. The CPU kernels of
onnxruntime and OpenVINO run this form; a ReLU is absorbed by the zero point. A MatMul with a weight reads int8 and
returns float32: what follows it in a transformer (bias, GELU, layer norm, residual sum) loses more by 8 bits than a
convolution's result does, and has no integer kernel.

``int8-s8``: activations and weights int8, symmetric, biases float32, Q/DQ only before convolutions, linear layers and
the residual input of an addition. TensorRT and TensorRT-RTX accept only this form, and fuse the ReLU and the addition
behind a convolution if there is no Q/DQ between them.

In both forms products of two activations stay float32.
"""

from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from onnx import helper, numpy_helper

from kdexport.backends.activation_products import activation_products
from kdexport.backends.ort import import_onnxruntime
from kdexport.core.console import quiet
from kdexport.core.files import scratch_folder
from kdexport.graph.precision import sorted_model
from kdexport.graph.tensor_ranges import read_ranges

Form = Literal["int8-u8", "int8-s8"]
FORMS: tuple[Form, ...] = ("int8-u8", "int8-s8")
_LAYERS = ("Conv", "Gemm", "MatMul")

#: Operators of the quantizer's list that stay float32 in the form for CPUs.
_FLOAT_OPERATORS = {
    "BatchNormalization", "CumSum", "EmbedLayerNormalization", "InstanceNormalization", "LayerNormalization", "Sigmoid",
    "Softmax", "Where",
}  # fmt: skip
#: Operators after which nothing is quantized until a layer with weights reads it.
_FLOAT_SOURCES = {
    "BatchNormalization", "Gelu", "GroupNormalization", "InstanceNormalization", "LayerNormalization", "MatMul",
    "Softmax",
}  # fmt: skip
#: onnxruntime moves Q/DQ pairs across these.
_REARRANGING = {"Expand", "Flatten", "Gather", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze"}
#: Operators that the quantizer would also apply to constants, with one scale for the whole constant.
_WITH_CONSTANTS = {"Add", "Concat", "Div", "Mul", "Sub"}


def parse_form(name: str) -> Form:
    """``name`` as a ``Form``; ``ValueError`` for any other name."""
    return FORMS[FORMS.index(name)]


def quantize(
    source: Path, ranges: Path, path: Path, *, form: Form, weight_bits: int = 8, keep: Sequence[str] = ()
) -> onnx.ModelProto:
    """Write ``source`` (float32) quantized in ``form``, with activation scales from the ``ranges`` of ``calibrate``.

    Nodes of ``keep`` stay float32, and so do nodes without weights that read only float32 results. A weight scale maps
    the largest absolute value of an output channel to the largest level. With 7 bits, the sum of two products fits into
    16 bits, in which processors without VNNI add them.
    """
    import_onnxruntime()
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

    symmetric = form == "int8-s8"
    options: dict[str, Any] = {"WeightSymmetric": True, "OpTypesToExcludeOutputQuantization": ["MatMul"]}
    if symmetric:
        options |= {
            "ActivationSymmetric": True,
            "QuantizeBias": False,
            "OpTypesToExcludeOutputQuantization": list(_LAYERS),
        }
    original = onnx.load(str(source))
    with quiet(), scratch_folder("int8") as folder:
        quantize_static(
            str(source),
            str(path),
            None,
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            reduce_range=weight_bits == 7,
            activation_type=QuantType.QInt8 if symmetric else QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            op_types_to_quantize=list(_LAYERS) if symmetric else None,
            nodes_to_exclude=_float_nodes(original, keep),
            calibration_cache_path=_write_cache(ranges, folder / "ranges.json"),
            extra_options=options,
        )
    model = onnx.load(str(path))
    # The quantizer overwrites the producer and drops the metadata of the exported file.
    model.producer_name, model.producer_version = original.producer_name, original.producer_version
    del model.metadata_props[:]
    model.metadata_props.extend(original.metadata_props)
    if symmetric:
        _quantize_residuals(model, ranges, keep)
    else:
        _separate_from_levels(model, keep)
        _separate_means(model)
    _separate_shared_weights(model)
    model = sorted_model(model)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, str(path))
    return model


def _float_nodes(model: onnx.ModelProto, keep: Sequence[str]) -> list[str]:
    """The kept nodes, those that int8 has no levels for, and those that read only results of such nodes.

    An int8 pooling between two kept layers would round the result of the first.
    """
    fixed, vectors = _fixed(model)
    products = set(activation_products(model))
    found, exact = list[str](), set[str]()
    for node in model.graph.node:
        read = [name for name in node.input if name and name not in fixed]
        follows = node.op_type not in _LAYERS and bool(read) and exact.issuperset(read)
        with_constant = node.op_type in _WITH_CONSTANTS and bool(read) and not vectors.isdisjoint(node.input)
        stays = node.name in keep or node.name in products or follows or with_constant
        if stays or node.op_type in _FLOAT_OPERATORS:
            found.append(node.name)
        if stays or node.op_type in _FLOAT_SOURCES:
            exact.update(node.output)
    return found + _rearranged_for(model, set(found))


def _rearranged_for(model: onnx.ModelProto, nodes: Set[str]) -> list[str]:
    """What only rearranges values for the float32 ``nodes``: levels behind it would be read by nothing in int8."""
    readers: dict[str, set[str]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, set()).add(node.name)
    served, found = set(nodes), list[str]()
    for node in reversed(model.graph.node):
        read = set().union(*(readers.get(name, set()) for name in node.output))
        if node.op_type in _REARRANGING and node.name not in served and read and served.issuperset(read):
            served.add(node.name)
            found.append(node.name)
    return found


def _fixed(model: onnx.ModelProto) -> tuple[set[str], set[str]]:
    """The tensors that no image changes, and those of them with more than one number."""
    sizes = {item.name: int(np.prod(item.dims)) for item in model.graph.initializer}
    fixed, vectors = set(sizes), {name for name, size in sizes.items() if size > 1}
    for node in model.graph.node:
        if node.op_type == "Shape" or all(name in fixed for name in node.input if name):
            fixed.update(node.output)
            vectors.update(node.output if not vectors.isdisjoint(node.input) else ())
    return fixed, vectors


def _separate_from_levels(model: onnx.ModelProto, keep: Sequence[str]) -> None:
    """Insert a Max of one input, which is the identity, where a float32 product reads a dequantized tensor.

    Otherwise onnxruntime would multiply in int8 between two Q/DQ pairs, and quantize float32 weights for it.
    """
    graph = model.graph
    producers = {name: node for node in graph.node for name in node.output}
    products = activation_products(model)
    places = [(node, 0) for node in graph.node if node.name in keep and node.name not in products]
    places += [(node, side) for node in graph.node if node.name in products for side in (0, 1)]
    for node, side in places:
        if _from_levels(producers.get(node.input[side]), producers, through_shapes=node.name in products):
            apart = f"{node.name}_float_input" + ("_1" if side else "")
            shield = f"{node.name}_Shield" + ("_1" if side else "")
            graph.node.append(helper.make_node("Max", [node.input[side]], [apart], shield))
            node.input[side] = apart


def _separate_means(model: onnx.ModelProto) -> None:
    """Compute a mean of float32 values before a linear layer with all dimensions, and flatten it afterwards.

    OpenVINO merges the rounding into a mean over tokens (N,T,C) that drops a dimension, and then rounds wrongly.
    """
    graph = model.graph
    producers = {name: node for node in graph.node for name in node.output}
    rounded = {node.input[0]: node.output[0] for node in graph.node if node.op_type == "QuantizeLinear"}
    back = {node.input[0]: node.output[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    linear = {node.input[0] for node in graph.node if node.op_type == "Gemm"}
    for node in [node for node in graph.node if node.op_type == "ReduceMean"]:
        name = node.output[0]
        drops = any(item.name == "keepdims" and item.i == 0 for item in node.attribute)
        read = back.get(rounded.get(name, ""), "") in linear
        if drops and read and not _from_levels(producers.get(node.input[0]), producers, through_shapes=False):
            whole = f"{name}_with_dimensions"
            node.output[0] = whole
            next(item for item in node.attribute if item.name == "keepdims").i = 1
            graph.node.append(helper.make_node("Flatten", [whole], [name], f"{node.name}_Flatten", axis=1))


def _separate_shared_weights(model: onnx.ModelProto) -> None:
    """Give each layer int8 weights of its own where layers share them.

    On processors without VNNI onnxruntime converts the weights of each such layer to uint8 under a name made from
    theirs, and cannot open a file in which two layers read the same ones.
    """
    graph = model.graph
    stored = {item.name: item for item in graph.initializer}
    readers: dict[str, list[tuple[onnx.NodeProto, int]]] = {}
    for node in graph.node:
        for place, name in enumerate(node.input):
            readers.setdefault(name, []).append((node, place))
    for dequantize in [node for node in graph.node if node.op_type == "DequantizeLinear" and node.input[0] in stored]:
        read_by = [(node, place) for node, place in readers.get(dequantize.output[0], []) if node.op_type in _LAYERS]
        for number, (node, place) in enumerate(read_by[1:], 2):
            copy = onnx.NodeProto()
            copy.CopyFrom(dequantize)
            copy.name, copy.output[0] = (f"{name}_{number}" for name in (dequantize.name, dequantize.output[0]))
            for index, name in enumerate(dequantize.input):
                twin = onnx.TensorProto()
                twin.CopyFrom(stored[name])
                twin.name = copy.input[index] = f"{name}_{number}"
                graph.initializer.append(twin)
            graph.node.append(copy)
            node.input[place] = copy.output[0]


def _from_levels(node: onnx.NodeProto | None, producers: Mapping[str, onnx.NodeProto], *, through_shapes: bool) -> bool:
    """Whether ``node`` returns levels times a scale, itself or, ``through_shapes``, from what it only rearranges."""
    while node is not None and through_shapes and node.op_type in _REARRANGING:
        node = producers.get(node.input[0])
    return node is not None and node.op_type == "DequantizeLinear"


def _write_cache(ranges: Path, path: Path) -> Path:
    """Write the ranges in the format of onnxruntime's quantizer, as minimum and maximum for every method."""
    import_onnxruntime()
    from onnxruntime.quantization import CalibrationMethod, TensorsData, save_tensors_data

    ends = {name: (np.float32(r.low), np.float32(r.high)) for name, r in read_ranges(ranges).items()}
    save_tensors_data(TensorsData(CalibrationMethod.MinMax, ends), path)
    return path


def _quantize_residuals(model: onnx.ModelProto, ranges: Path, keep: Sequence[str]) -> None:
    """Quantize the residual input of each addition, so that TensorRT fuses the sum into the other side's convolution.

    An addition with an input from a kept layer cannot be fused and stays unchanged.
    """
    graph = model.graph
    producers = {name: node for node in graph.node for name in node.output}
    found = read_ranges(ranges)
    # One Q/DQ pair serves all additions that read the same tensor.
    quantized: dict[str, str] = {}
    for node in [node for node in graph.node if node.op_type == "Add"]:
        if any(producers[name].name in keep for name in node.input if name in producers):
            continue
        side = _residual_side(node, producers)
        if side is None:
            continue
        name = node.input[side]
        if name not in quantized:
            quantized[name] = _insert_pair(graph, name, max(abs(found[name].low), abs(found[name].high)) / 127)
        node.input[side] = quantized[name]


def _residual_side(node: onnx.NodeProto, producers: dict[str, onnx.NodeProto]) -> int | None:
    """The input of an addition to quantize: the one that is not from a convolution, the second if both are."""
    kinds = [producers[name].op_type if name in producers else "" for name in node.input]
    if "Conv" not in kinds or "DequantizeLinear" in kinds:
        return None
    return 0 if kinds[0] != "Conv" else 1


def _insert_pair(graph: onnx.GraphProto, name: str, scale: float) -> str:
    zero, step, levels, back = (
        f"{name}_{part}" for part in ("residual_zero", "residual_scale", "residual_int8", "residual")
    )
    graph.initializer.append(numpy_helper.from_array(np.asarray(scale, np.float32), step))
    graph.initializer.append(numpy_helper.from_array(np.asarray(0, np.int8), zero))
    graph.node.append(helper.make_node("QuantizeLinear", [name, step, zero], [levels], f"{name}_QuantizeResidual"))
    graph.node.append(helper.make_node("DequantizeLinear", [levels, step, zero], [back], f"{name}_DequantizeResidual"))
    return back
