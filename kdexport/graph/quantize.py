"""float32 to int8 with explicit Q/DQ, in the two forms that runtimes really execute as int8.

``int8-u8``: activations uint8 with a zero point, weights int8 per output channel, biases int32. onnxruntime's and
OpenVINO's CPU kernels take it; a ReLU disappears in the zero point.

``int8-s8``: activations and weights int8 around zero, biases float32, Q/DQ in front of convolutions, linear layers and
the residual side of an addition only. TensorRT and TensorRT-RTX take nothing else, and fuse the ReLU and the addition
behind a convolution themselves as long as no Q/DQ lies between.
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
_COMPUTING = ["Conv", "Gemm"]


def parse_form(name: str) -> Form:
    """``name`` as a ``Form``; anything else is a fault of the caller."""
    return next(form for form in FORMS if form == name)


def quantize(
    source: Path, ranges: Path, path: Path, *, form: Form, weight_bits: int = 8, keep: Sequence[str] = ()
) -> onnx.ModelProto:
    """Write ``source`` (float32) quantized in ``form``, with activation scales from ``ranges`` (``calibrate``).

    Nodes of ``keep`` stay float32, and so does what computes from nothing but their results. Weight scales come from
    the weights alone: the largest value of an output channel is the largest level. With 7 bits the sum of two products
    stays within 16 bits, where processors without VNNI add them.
    """
    import_onnxruntime()
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

    symmetric = form == "int8-s8"
    options: dict[str, Any] = {"WeightSymmetric": True}
    if symmetric:
        options |= {
            "ActivationSymmetric": True,
            "QuantizeBias": False,
            "OpTypesToExcludeOutputQuantization": _COMPUTING,
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
            op_types_to_quantize=_COMPUTING if symmetric else None,
            nodes_to_exclude=_floating(original, keep),
            calibration_cache_path=_write_cache(ranges, Path(folder) / "ranges.json"),
            extra_options=options,
        )
    model = onnx.load(str(path))
    # The quantizer signs the file; it stays what it says about itself, by who exported it.
    model.producer_name, model.producer_version = original.producer_name, original.producer_version
    del model.metadata_props[:]
    model.metadata_props.extend(original.metadata_props)
    if symmetric:
        _quantize_residuals(model, ranges, keep)
    else:
        _shield(model, keep)
    model = sorted_model(model)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, str(path))
    return model


def _floating(model: onnx.ModelProto, keep: Sequence[str]) -> list[str]:
    """The kept nodes, and those between them: a pooling in int8 would take from one what it was kept for."""
    stored = {item.name for item in model.graph.initializer}
    found, exact = list(keep), set[str]()
    for node in model.graph.node:
        read = [name for name in node.input if name and name not in stored]
        if node.name in keep or (node.op_type not in _COMPUTING and read and exact.issuperset(read)):
            found.append(node.name)
            exact.update(node.output)
    return found


def _shield(model: onnx.ModelProto, keep: Sequence[str]) -> None:
    """Put the maximum of one tensor, which is that tensor, between a kept layer and the levels that it reads.

    Between levels on both sides onnxruntime would quantize the weights itself, though the file says float32.
    """
    graph = model.graph
    levels = {node.output[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    for node in [node for node in graph.node if node.name in keep and node.input[0] in levels]:
        apart = f"{node.name}_float_input"
        graph.node.append(helper.make_node("Max", [node.input[0]], [apart], f"{node.name}_Shield"))
        node.input[0] = apart


def _write_cache(ranges: Path, path: Path) -> Path:
    """The ranges as the file that onnxruntime's quantizer reads; to it they are extremes, however they were found."""
    import_onnxruntime()
    from onnxruntime.quantization import CalibrationMethod, TensorsData, save_tensors_data

    ends = {name: (np.float32(r.low), np.float32(r.high)) for name, r in read_ranges(ranges).items()}
    save_tensors_data(TensorsData(CalibrationMethod.MinMax, ends), path)
    return path


def _quantize_residuals(model: onnx.ModelProto, ranges: Path, keep: Sequence[str]) -> None:
    """Let the residual side of each addition arrive in int8, so that the other side's convolution absorbs the sum.

    Where a kept layer makes one of the sides there is nothing to gain.
    """
    graph = model.graph
    producers = {name: node for node in graph.node for name in node.output}
    found = read_ranges(ranges)
    # A tensor that also feeds a convolution arrives quantized already.
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
    """Which input of an addition stays to be quantized: the one that no convolution makes, the second where both do."""
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
