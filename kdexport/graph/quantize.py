"""Quantization of float32 graphs to int8 with explicit Q/DQ nodes, in the two forms that runtimes execute as int8.

``int8-u8``: activations uint8 with a zero point, weights int8 per output channel, biases int32. The CPU kernels of
onnxruntime and OpenVINO run this form; a ReLU is absorbed by the zero point.

``int8-s8``: activations and weights int8, symmetric, biases float32, Q/DQ only before convolutions, linear layers and
the residual input of an addition. TensorRT and TensorRT-RTX accept only this form, and fuse the ReLU and the addition
behind a convolution if there is no Q/DQ between them.
"""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import onnx
from onnx import helper, numpy_helper

from kdexport.backends.ort import import_onnxruntime
from kdexport.core.console import quiet
from kdexport.graph.precision import sorted_model
from kdexport.graph.tensor_ranges import read_ranges

Form = Literal["int8-u8", "int8-s8"]
FORMS: tuple[Form, ...] = ("int8-u8", "int8-s8")
_LAYERS = ["Conv", "Gemm"]


def parse_form(name: str) -> Form:
    """``name`` as a ``Form``; ``ValueError`` for any other name."""
    return FORMS[FORMS.index(name)]


def quantize(
    source: Path, ranges: Path, path: Path, *, form: Form, weight_bits: int = 8, keep: Sequence[str] = ()
) -> onnx.ModelProto:
    """Write ``source`` (float32) quantized in ``form``, with activation scales from the ``ranges`` of ``calibrate``.

    Nodes of ``keep`` stay float32, and so do nodes without weights that read only their results. A weight scale maps
    the largest absolute value of an output channel to the largest level. With 7 bits, the sum of two products fits into
    16 bits, in which processors without VNNI add them.
    """
    import_onnxruntime()
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

    symmetric = form == "int8-s8"
    options: dict[str, Any] = {"WeightSymmetric": True}
    if symmetric:
        options |= {
            "ActivationSymmetric": True,
            "QuantizeBias": False,
            "OpTypesToExcludeOutputQuantization": _LAYERS,
        }
    original = onnx.load(str(source))
    with quiet(), TemporaryDirectory() as folder:
        quantize_static(
            str(source),
            str(path),
            None,
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            reduce_range=weight_bits == 7,
            activation_type=QuantType.QInt8 if symmetric else QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            op_types_to_quantize=_LAYERS if symmetric else None,
            nodes_to_exclude=_float_nodes(original, keep),
            calibration_cache_path=_write_cache(ranges, Path(folder) / "ranges.json"),
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
    model = sorted_model(model)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, str(path))
    return model


def _float_nodes(model: onnx.ModelProto, keep: Sequence[str]) -> list[str]:
    """The kept nodes, and those between them: an int8 pooling would round the result of a kept layer."""
    stored = {item.name for item in model.graph.initializer}
    found, exact = list(keep), set[str]()
    for node in model.graph.node:
        read = [name for name in node.input if name and name not in stored]
        if node.name in keep or (node.op_type not in _LAYERS and read and exact.issuperset(read)):
            found.append(node.name)
            exact.update(node.output)
    return found


def _separate_from_levels(model: onnx.ModelProto, keep: Sequence[str]) -> None:
    """Insert a Max of one input, which is the identity, before each kept layer that reads a dequantized tensor.

    Otherwise onnxruntime would quantize the float32 weights of a layer between two Q/DQ pairs.
    """
    graph = model.graph
    levels = {node.output[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    for node in [node for node in graph.node if node.name in keep and node.input[0] in levels]:
        apart = f"{node.name}_float_input"
        graph.node.append(helper.make_node("Max", [node.input[0]], [apart], f"{node.name}_Shield"))
        node.input[0] = apart


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
