"""The conversion of an ONNX graph to a package of Core ML, in a process of its own: coremltools imports torch.

Each node of the float32 graph becomes operators of MIL, and coremltools writes the package. Weights in float16 are
those of the target's ONNX file: widened to float32 exactly, and rounded back to the same values.
"""

import json
import sys
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kdexport.backends.base import LOGITS
from kdexport.backends.weighted_nodes import float32_graph
from kdexport.core.console import print_json, quiet
from kdexport.errors import EngineBuildError, KdexportError, first_line

if TYPE_CHECKING:
    import onnx

_MANIFEST, _PROGRAM = "Manifest.json", Path("Data") / "com.apple.CoreML" / "model.mlmodel"
Attributes = Mapping[str, Any]


def build(onnx_file: Path, package: Path, image_size: int, *, half: bool) -> None:
    """Write the ``.mlpackage`` of a float32 or float16 graph for one image.

    Raises ``EngineBuildError`` for an operator that this module does not know, with its place in the student.
    """
    import coremltools as ct
    import onnx
    from coremltools.converters.mil import Builder as mb  # noqa: N813  the name in its documentation
    from coremltools.converters.mil.mil import types

    graph = float32_graph(onnx.load(str(onnx_file))).graph

    # The name of the parameter is that of the input of the package.
    def body(input: Any) -> Any:  # noqa: A002
        return _body(graph, input, mb)

    shape = (1, 3, image_size, image_size)
    program = mb.program(input_specs=[mb.TensorSpec(shape=shape, dtype=types.fp32)], opset_version=ct.target.iOS16)(
        body
    )
    model = ct.convert(
        program,
        convert_to="mlprogram",
        compute_precision=ct.precision.FLOAT16 if half else ct.precision.FLOAT32,
        minimum_deployment_target=ct.target.iOS16,
        skip_model_load=True,
    )
    model.save(str(package))
    _name_by_content(package / _MANIFEST)
    _in_one_order(package / _PROGRAM)


def _name_by_content(manifest: Path) -> None:
    """Replace random identifiers of a package by those that its paths give, so that equal packages are equal files."""
    text = manifest.read_text(encoding="utf-8")
    for identifier, entry in json.loads(text)["itemInfoEntries"].items():
        text = text.replace(identifier, str(uuid.uuid5(uuid.NAMESPACE_URL, entry["path"])).upper())
    manifest.write_text(json.dumps(json.loads(text), indent=4, sort_keys=True) + "\n", encoding="utf-8")


def _in_one_order(program: Path) -> None:
    """Write the message again with its maps in one order, which is another one in each process otherwise."""
    from coremltools.proto import Model_pb2

    message = Model_pb2.Model.FromString(program.read_bytes())
    program.write_bytes(message.SerializeToString(deterministic=True))


def _body(graph: "onnx.GraphProto", images: Any, mb: Any) -> Any:
    """The operators of a graph on its input; returns the logits."""
    from onnx import helper, numpy_helper

    values: dict[str, Any] = {item.name: numpy_helper.to_array(item) for item in graph.initializer}
    values[graph.input[0].name] = images
    for place, node in enumerate(graph.node):
        attributes = {item.name: helper.get_attribute_value(item) for item in node.attribute}
        if node.op_type == "Constant" and "value" in attributes:
            values[node.output[0]] = numpy_helper.to_array(attributes["value"])
            continue
        given = [values.get(name) if name else None for name in node.input]
        if node.op_type not in _WRITERS:
            raise EngineBuildError(
                f"The network has the operator {node.op_type} ({node.name}, which reads {node.input[0]}), and kdexport "
                "cannot write it for Core ML.",
                remedy="Replace it in the student, or build another target, for example onnx-fp32.",
            )
        found = _WRITERS[node.op_type](mb, given, attributes, f"node_{place}")
        made = found if isinstance(found, list | tuple) else [found]
        values |= dict(zip(node.output, made, strict=True))
    return mb.identity(x=values[graph.output[0].name], name=LOGITS)


def _conv(mb: Any, given: list[Any], attributes: Attributes, name: str) -> Any:
    weight = given[1]
    pads = attributes.get("pads", [0, 0, 0, 0])
    bias = given[2] if len(given) > 2 and given[2] is not None else np.zeros(len(weight), np.float32)
    return mb.conv(
        x=given[0], weight=weight, bias=bias, strides=list(attributes.get("strides", [1, 1])), pad_type="custom",
        pad=[pads[0], pads[2], pads[1], pads[3]], dilations=list(attributes.get("dilations", [1, 1])),
        groups=int(attributes.get("group", 1)), name=name,
    )  # fmt: skip


def _gemm(mb: Any, given: list[Any], attributes: Attributes, name: str) -> Any:
    weight = given[1] if attributes.get("transB", 0) else np.ascontiguousarray(given[1].T)
    bias = given[2] if len(given) > 2 and given[2] is not None else np.zeros(len(weight), np.float32)
    return mb.linear(x=given[0], weight=weight, bias=bias, name=name)


def _matmul(mb: Any, given: list[Any], _: Attributes, name: str) -> Any:
    if not isinstance(given[1], np.ndarray) or len(given[0].shape) != 2:
        raise EngineBuildError(
            "The network multiplies two activations or tokens, and kdexport cannot write that for Core ML.",
            remedy="Build another target, for example onnx-fp32.",
        )
    weight = np.ascontiguousarray(given[1].T)
    return mb.linear(x=given[0], weight=weight, bias=np.zeros(len(weight), np.float32), name=name)


def _pool(kind: str) -> Callable[..., Any]:
    def pool(mb: Any, given: list[Any], attributes: Attributes, name: str) -> Any:
        pads = attributes.get("pads", [0, 0, 0, 0])
        if attributes.get("ceil_mode", 0) or any(d != 1 for d in attributes.get("dilations", [1, 1])):
            raise EngineBuildError(
                "A pooling layer rounds its size up or is dilated.", remedy="Build onnx-fp32 for this network."
            )
        excluded = {"exclude_padding_from_average": not attributes.get("count_include_pad", 0)}
        return getattr(mb, kind)(
            x=given[0], kernel_sizes=list(attributes["kernel_shape"]), strides=list(attributes.get("strides", [1, 1])),
            pad_type="custom", pad=[pads[0], pads[2], pads[1], pads[3]], name=name,
            **(excluded if kind == "avg_pool" else {}),
        )  # fmt: skip

    return pool


def _mean(mb: Any, given: list[Any], attributes: Attributes, name: str) -> Any:
    axes = attributes.get("axes") or (given[1].tolist() if len(given) > 1 and given[1] is not None else [2, 3])
    return mb.reduce_mean(x=given[0], axes=list(axes), keep_dims=bool(attributes.get("keepdims", 1)), name=name)


def _reshape(mb: Any, given: list[Any], _: Attributes, name: str) -> Any:
    shape = [int(size) if size else given[0].shape[place] for place, size in enumerate(given[1].tolist())]
    if -1 in shape[1:]:
        # One image: a batch that the graph leaves open.
        shape[0] = 1
    return mb.reshape(x=given[0], shape=shape, name=name)


def _flatten(mb: Any, given: list[Any], attributes: Attributes, name: str) -> Any:
    axis = int(attributes.get("axis", 1))
    return mb.reshape(x=given[0], shape=[int(np.prod(given[0].shape[:axis])), -1], name=name)


def _split(mb: Any, given: list[Any], attributes: Attributes, name: str) -> Any:
    axis = int(attributes.get("axis", 0))
    if len(given) > 1 and given[1] is not None:
        return mb.split(x=given[0], split_sizes=given[1].tolist(), axis=axis, name=name)
    return mb.split(x=given[0], num_splits=int(attributes["num_outputs"]), axis=axis, name=name)


def _clip(mb: Any, given: list[Any], _: Attributes, name: str) -> Any:
    limits = [None if len(given) <= place or given[place] is None else float(given[place]) for place in (1, 2)]
    ends = np.finfo(np.float32)
    low, high = limits[0] if limits[0] is not None else ends.min, limits[1] if limits[1] is not None else ends.max
    return mb.clip(x=given[0], alpha=np.float32(low), beta=np.float32(high), name=name)


def _hard_sigmoid(mb: Any, given: list[Any], attributes: Attributes, name: str) -> Any:
    alpha, beta = attributes.get("alpha", 0.2), attributes.get("beta", 0.5)
    return mb.sigmoid_hard(x=given[0], alpha=np.float32(alpha), beta=np.float32(beta), name=name)


def _hard_swish(mb: Any, given: list[Any], _: Attributes, name: str) -> Any:
    gate = mb.sigmoid_hard(x=given[0], alpha=np.float32(1 / 6), beta=np.float32(0.5), name=f"{name}_gate")
    return mb.mul(x=given[0], y=gate, name=name)


def _of_two(kind: str) -> Callable[..., Any]:
    return lambda mb, given, _, name: getattr(mb, kind)(x=given[0], y=given[1], name=name)


_WRITERS: dict[str, Callable[[Any, list[Any], Attributes, str], Any]] = {
    "Conv": _conv,
    "Gemm": _gemm,
    "MatMul": _matmul,
    "Add": _of_two("add"),
    "Sub": _of_two("sub"),
    "Mul": _of_two("mul"),
    "Div": _of_two("real_div"),
    "Relu": lambda mb, given, _, name: mb.relu(x=given[0], name=name),
    "Sigmoid": lambda mb, given, _, name: mb.sigmoid(x=given[0], name=name),
    "HardSwish": _hard_swish,
    "HardSigmoid": _hard_sigmoid,
    "Clip": _clip,
    "Identity": lambda _mb, given, _, _name: given[0],
    "AveragePool": _pool("avg_pool"),
    "MaxPool": _pool("max_pool"),
    "GlobalAveragePool": _mean,
    "ReduceMean": _mean,
    "Reshape": _reshape,
    "Flatten": _flatten,
    "Transpose": lambda mb, given, attributes, name: mb.transpose(x=given[0], perm=list(attributes["perm"]), name=name),
    "Concat": lambda mb, given, attributes, name: mb.concat(values=given, axis=int(attributes["axis"]), name=name),
    "Split": _split,
}


def _main() -> None:
    onnx_file, package, size, precision = sys.argv[1:]
    answer: dict[str, Any] = {}
    try:
        with quiet():
            build(Path(onnx_file), Path(package), int(size), half=precision == "fp16")
    except KdexportError as error:
        answer = {"refused": error.message, "remedy": error.remedy}
    # Builders and passes raise dozens of types; the parent quotes the message.
    except Exception as error:  # noqa: BLE001
        answer = {"refused": f"coremltools refused the graph: {type(error).__name__}: {first_line(error)}"}
    print_json(answer)


if __name__ == "__main__":
    _main()
