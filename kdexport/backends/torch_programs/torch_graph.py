"""An ONNX graph of a classifier as a torch module, for runtimes that compile programs of ``torch.export``.

The ONNX file is what the project casts, quantizes and audits, so that a runtime gets its weights, levels and ranges
from it and from nothing else. Levels and ranges become the operators by which PT2E describes a quantized graph.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from kdexport.errors import EngineBuildError

if TYPE_CHECKING:
    import onnx

Attributes = Mapping[str, Any]
Inputs = list[Tensor | None]


class TorchGraph(nn.Module):
    """A float32 or int8-u8 graph; ``forward`` takes (1,3,S,S) float32 and returns logits (1,K).

    Raises ``EngineBuildError`` for an operator that it does not know, with its place in the student.
    """

    def __init__(self, model: "onnx.ModelProto") -> None:
        from onnx import helper, numpy_helper

        super().__init__()
        graph = model.graph
        self._input, self._output = graph.input[0].name, graph.output[0].name
        stored = {item.name: numpy_helper.to_array(item) for item in graph.initializer}
        self._buffer_of = {name: f"value_{number}" for number, name in enumerate(stored)}
        for name, values in stored.items():
            self.register_buffer(self._buffer_of[name], torch.from_numpy(np.array(values)))
        # Numbers that decide shapes and levels are constants of the program, not tensors in it.
        self._numbers = {name: values for name, values in stored.items() if values.size <= 8 and values.ndim <= 1}
        self._stored = stored
        self._nodes: list[tuple[str, list[str], list[str], dict[str, Any]]] = []
        self._dequantizing: dict[str, tuple[list[str], dict[str, Any]]] = {}
        for node in graph.node:
            attributes = {item.name: helper.get_attribute_value(item) for item in node.attribute}
            if node.op_type == "Constant" and "value" in attributes:
                self._numbers[node.output[0]] = numpy_helper.to_array(attributes["value"])
            elif node.op_type == "DequantizeLinear":
                self._dequantizing[node.output[0]] = list(node.input), attributes
                self._hold_scales(node.input)
            elif node.op_type not in (*OPERATORS, "QuantizeLinear"):
                raise EngineBuildError(
                    f"The network has the operator {node.op_type} ({node.name}, which reads {node.input[0]}), and "
                    "kdexport cannot write it as a torch program.",
                    remedy="Replace it in the student, or build another target, for example onnx-fp32.",
                )
            else:
                self._nodes.append((node.op_type, list(node.input), list(node.output), attributes))

    def forward(self, images: Tensor) -> Tensor:
        values: dict[str, Tensor] = {self._input: images}
        for kind, inputs, outputs, attributes in self._nodes:
            given = [self._value(values, name) for name in inputs]
            if kind == "QuantizeLinear":
                assert given[0] is not None
                found: Any = self._quantized(given[0], inputs)
            else:
                numbers = [self._numbers.get(name) for name in inputs]
                found = OPERATORS[kind](given, numbers, attributes)
            values |= dict(zip(outputs, found if isinstance(found, list | tuple) else [found], strict=True))
        result = self._value(values, self._output)
        assert result is not None
        return result

    def _value(self, values: Mapping[str, Tensor], name: str) -> Tensor | None:
        """A tensor of the graph; each reader of a dequantized one computes it again, which a partitioner needs."""
        if name in self._dequantizing:
            return self._dequantized(values, *self._dequantizing[name])
        if name in values:
            return values[name]
        return self.get_buffer(self._buffer_of[name]) if name in self._buffer_of else None

    def _levels(self, inputs: list[str]) -> tuple[float, int]:
        """Scale and zero point of an activation in int8: uint8 moved by 128."""
        scale, zero = float(self._stored[inputs[1]]), self._stored[inputs[2]]
        return scale, int(zero) - (128 if zero.dtype == np.uint8 else 0)

    def _quantized(self, value: Tensor, inputs: list[str]) -> Tensor:
        scale, zero = self._levels(inputs)
        found: Tensor = torch.ops.quantized_decomposed.quantize_per_tensor(value, scale, zero, -128, 127, torch.int8)
        return found

    def _dequantized(self, values: Mapping[str, Tensor], inputs: list[str], attributes: Attributes) -> Tensor:
        known = torch.ops.quantized_decomposed
        found: Tensor
        if inputs[0] not in self._stored:
            levels, (scale, zero) = self._value(values, inputs[0]), self._levels(inputs)
            found = known.dequantize_per_tensor(levels, scale, zero, -128, 127, torch.int8)
            return found
        held = self._buffer_of[inputs[0]]
        if self._stored[inputs[0]].dtype == np.int32:
            return self.get_buffer(f"{held}_float")
        found = known.dequantize_per_channel(
            self.get_buffer(held), self.get_buffer(f"{held}_scales"), self.get_buffer(f"{held}_zeros"),
            attributes.get("axis", 0), -127, 127, torch.int8,
        )  # fmt: skip
        return found

    def _hold_scales(self, inputs: Sequence[str]) -> None:
        """Buffers of a stored tensor in levels: scales and zero points of a weight, and the float32 values of a bias.

        A runtime rounds a bias to the same integers again. Tensors that are computed in the graph are not found by
        partitioners.
        """
        if inputs[0] not in self._stored:
            return
        levels, held = self._stored[inputs[0]], self._buffer_of[inputs[0]]
        scales = np.broadcast_to(self._stored[inputs[1]], levels.shape[:1]).astype(np.float32)
        if levels.dtype == np.int32:
            self.register_buffer(f"{held}_float", torch.from_numpy(levels.astype(np.float32) * scales))
        else:
            self.register_buffer(f"{held}_scales", torch.from_numpy(scales))
            self.register_buffer(f"{held}_zeros", torch.zeros(len(scales), dtype=torch.int64))


def _conv(given: Inputs, _: Any, attributes: Attributes) -> Tensor:
    x, weight, bias = given[0], given[1], given[2] if len(given) > 2 else None
    assert x is not None
    assert weight is not None
    pads = attributes.get("pads", [0, 0, 0, 0])
    if pads[:2] != pads[2:]:
        x, pads = functional.pad(x, (pads[1], pads[3], pads[0], pads[2])), [0, 0, 0, 0]
    return functional.conv2d(
        x, weight, bias, attributes.get("strides", [1, 1]), list(pads[:2]), attributes.get("dilations", [1, 1]),
        attributes.get("group", 1),
    )  # fmt: skip


def _gemm(given: Inputs, _: Any, attributes: Attributes) -> Tensor:
    x, weight, bias = given[0], given[1], given[2] if len(given) > 2 else None
    assert x is not None
    assert weight is not None
    return functional.linear(x, weight if attributes.get("transB", 0) else weight.t(), bias)


def _pool(kind: Any) -> Callable[[Inputs, Any, Attributes], Tensor]:
    def pool(given: Inputs, _: Any, attributes: Attributes) -> Tensor:
        kernel, strides = attributes["kernel_shape"], attributes.get("strides", [1, 1])
        pads = attributes.get("pads", [0, 0, 0, 0])
        if pads[:2] != pads[2:] or attributes.get("ceil_mode", 0):
            raise EngineBuildError("A pooling layer has uneven padding.", remedy="Build onnx-fp32 for this network.")
        counted = {"count_include_pad": bool(attributes.get("count_include_pad", 0))} if kind is _AVERAGE else {}
        return kind(given[0], list(kernel), list(strides), list(pads[:2]), **counted)  # type: ignore[no-any-return]

    return pool


_AVERAGE: Any = functional.avg_pool2d


def _mean(given: Inputs, numbers: Any, attributes: Attributes) -> Tensor:
    axes = attributes.get("axes") or (numbers[1].tolist() if len(numbers) > 1 and numbers[1] is not None else [])
    assert given[0] is not None
    return given[0].mean([int(axis) for axis in axes], keepdim=bool(attributes.get("keepdims", 1)))


def _reshape(given: Inputs, numbers: Any, _: Attributes) -> Tensor:
    assert given[0] is not None
    shape = [int(size) for size in numbers[1]]
    # One image: a batch that the graph leaves open.
    if -1 in shape[1:]:
        shape[0] = 1
    return given[0].reshape([given[0].shape[place] if size == 0 else size for place, size in enumerate(shape)])


def _split(given: Inputs, numbers: Any, attributes: Attributes) -> list[Tensor]:
    assert given[0] is not None
    axis = attributes.get("axis", 0)
    if len(numbers) > 1 and numbers[1] is not None:
        return list(torch.split(given[0], [int(size) for size in numbers[1]], axis))
    return list(given[0].chunk(attributes["num_outputs"], axis))


def _clip(given: Inputs, numbers: Any, _: Attributes) -> Tensor:
    low, high = (None if number is None else float(number) for number in (*numbers[1:3], None, None)[:2])
    assert given[0] is not None
    return given[0].clamp(low, high)


def _hard_sigmoid(given: Inputs, _: Any, attributes: Attributes) -> Tensor:
    alpha, beta = attributes.get("alpha", 0.2), attributes.get("beta", 0.5)
    assert given[0] is not None
    is_usual = np.float32(alpha) == np.float32(1 / 6) and beta == 0.5
    found: Tensor = functional.hardsigmoid(given[0]) if is_usual else (given[0] * alpha + beta).clamp(0, 1)
    return found


def _of_two(operation: Callable[[Any, Any], Any]) -> Callable[[Inputs, Any, Attributes], Tensor]:
    return lambda given, _, __: operation(given[0], given[1])


def _of_one(operation: Callable[[Any], Any]) -> Callable[[Inputs, Any, Attributes], Tensor]:
    return lambda given, _, __: operation(given[0])


#: Operators of ONNX in torch: from the inputs, those of them that are stored numbers, and the attributes.
OPERATORS: dict[str, Callable[[Inputs, Any, Attributes], Any]] = {
    "Conv": _conv,
    "Gemm": _gemm,
    "MatMul": _of_two(torch.matmul),
    "Add": _of_two(torch.add),
    "Sub": _of_two(torch.sub),
    "Mul": _of_two(torch.mul),
    "Div": _of_two(torch.div),
    "Relu": _of_one(functional.relu),
    "Sigmoid": _of_one(torch.sigmoid),
    "HardSwish": _of_one(functional.hardswish),
    "HardSigmoid": _hard_sigmoid,
    "Clip": _clip,
    "Identity": _of_one(lambda x: x),
    # In front of a float32 layer of an int8 graph there is a Max of one input, which is the identity.
    "Max": lambda given, _, __: given[0] if len(given) == 1 else torch.maximum(given[0], given[1]),  # type: ignore[arg-type]
    "AveragePool": _pool(_AVERAGE),
    "MaxPool": _pool(functional.max_pool2d),
    "GlobalAveragePool": _of_one(lambda x: x.mean((2, 3), keepdim=True)),
    "ReduceMean": _mean,
    "Reshape": _reshape,
    "Flatten": lambda given, _, attributes: given[0].flatten(attributes.get("axis", 1)),  # type: ignore[union-attr]
    "Transpose": lambda given, _, attributes: given[0].permute(*attributes["perm"]),  # type: ignore[union-attr]
    "Concat": lambda given, _, attributes: torch.cat(given, attributes["axis"]),  # type: ignore[arg-type]
    "Split": _split,
}
