"""An ONNX graph of a classifier as a model of LiteRT, with the weights, levels and ranges of the ONNX file.

No converter takes the levels of a quantized ONNX graph: those that are kept up quantize again by ranges of their own.
So the graph is written here, operator by operator, and ``litert_content`` reads the file back against the ONNX file.

Activations of four dimensions have their channels last, from the input on. A tensor in levels stays in levels where
LiteRT computes the operator in int8; around other operators it is widened, as the ONNX graph says.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kdexport.backends.litert_files import ModelWriter
from kdexport.errors import EngineBuildError

if TYPE_CHECKING:
    import onnx

#: Logical dimensions, as in ONNX, in the order in which they lie in memory.
_LAST: dict[int, tuple[int, ...]] = {4: (0, 2, 3, 1), 5: (0, 3, 4, 1, 2)}
#: Operators whose results have the levels of what they read.
_SAME_LEVELS = ("MaxPool", "AveragePool", "Reshape", "Flatten", "Transpose", "Split", "Concat")
#: Operators that LiteRT computes in int8, if all they read and their result has levels.
_INTEGER = ("Conv", "Gemm", "Add", "Mul", "GlobalAveragePool", "ReduceMean", *_SAME_LEVELS)
_RESHAPES = ("Reshape", "Flatten", "Transpose", "Identity")
#: What a kernel computes on its own result: from the kind and the limits of an activation.
_FUSED = {("Relu", None): "RELU", ("Clip", (0.0, 6.0)): "RELU6", ("Clip", (-1.0, 1.0)): "RELU_N1_TO_1"}
_OTHER_TARGET = "Replace it in the student, or build another target, for example onnx-fp32."

Levels = tuple[float, int]
#: The results of a node that is computed in int8 and their levels, None for float32.
After = list[tuple[str, Levels]] | None


@dataclass(frozen=True, slots=True)
class _Node:
    """A node of the graph; ``numbers`` are the constants among its inputs, by their position."""

    kind: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]

    def number(self, name: str, default: int) -> int:
        return int(self.attributes.get(name, default))

    def ints(self, name: str, default: Sequence[int]) -> list[int]:
        return [int(value) for value in self.attributes.get(name, default)]


def lite_model(model: "onnx.ModelProto", *, half: bool = False) -> bytes:
    """The file of a float32 or int8-u8 graph for one image (1,S,S,3); with ``half`` weights are stored in float16.

    The float16 values must be those of the graph: they are exact then. Raises ``EngineBuildError`` for an operator that
    this module does not know, with its place in the student.
    """
    return _Conversion(model, half).run()


class _Conversion:
    """One graph on its way into a ``ModelWriter``."""

    def __init__(self, model: "onnx.ModelProto", half: bool) -> None:
        import onnx
        from onnx import helper, numpy_helper, shape_inference

        copy = onnx.ModelProto()
        copy.CopyFrom(model)
        copy.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
        for value in copy.graph.output:
            value.type.tensor_type.shape.dim[0].dim_value = 1
        graph = shape_inference.infer_shapes(copy, strict_mode=True, data_prop=True).graph
        self._half = half
        self._input, self._output = graph.input[0].name, graph.output[0].name
        self._stored: dict[str, NDArray[Any]] = {item.name: numpy_helper.to_array(item) for item in graph.initializer}
        self._shapes = {
            value.name: tuple(int(dim.dim_value) for dim in value.type.tensor_type.shape.dim)
            for value in (*graph.input, *graph.value_info, *graph.output)
        }
        self._nodes: list[_Node] = []
        #: What each result of a DequantizeLinear widens.
        self._widens: dict[str, tuple[str, ...]] = {}
        for node in graph.node:
            made = _Node(
                node.op_type, node.name, tuple(node.input), tuple(node.output),
                {item.name: helper.get_attribute_value(item) for item in node.attribute},
            )  # fmt: skip
            if node.op_type == "Constant" and "value" in made.attributes:
                self._stored[made.outputs[0]] = numpy_helper.to_array(made.attributes["value"])
            elif node.op_type == "DequantizeLinear":
                self._widens[made.outputs[0]] = made.inputs
            else:
                self._nodes.append(made)
        self._readers: dict[str, list[_Node]] = {}
        for made in self._nodes:
            for name in made.inputs:
                self._readers.setdefault(name, []).append(made)
        self._writer = ModelWriter()
        #: Places of tensors in float32 and in levels, by the names of the graph.
        self._floats: dict[str, int] = {}
        self._integers: dict[str, tuple[int, Levels]] = {}
        self._done: set[str] = set()

    # The order of the graph

    def run(self) -> bytes:
        given = self._writer.tensor(self._input, self._physical(self._shapes[self._input]), "FLOAT32")
        self._floats[self._input] = given
        for node in self._nodes:
            if node.outputs[0] not in self._done:
                self._convert(node)
        logits = self._float(self._output)
        return self._writer.packed([given], [logits], "kdexport")

    def _convert(self, node: _Node) -> None:
        if node.kind == "QuantizeLinear":
            self._quantize(node)
        elif node.kind == "Identity" or (node.kind in ("Max", "Min") and len(node.inputs) == 1):
            self._floats[node.outputs[0]] = self._float(node.inputs[0])
        elif node.kind not in _WRITERS:
            raise EngineBuildError(
                f"The network has the operator {node.kind} ({node.name}, which reads {node.inputs[0]}), and kdexport "
                "cannot write it for LiteRT.",
                remedy=_OTHER_TARGET,
            )
        else:
            end, fused = (
                self._activation(node) if node.kind in ("Conv", "Gemm", "Add", "Mul") else (node.outputs[0], "NONE")
            )
            after = self._levels_after(node, end)
            if after is None:
                _WRITERS[node.kind](self, node, end, fused, None)
            else:
                _WRITERS[node.kind](self, node, end, fused, after)

    def _quantize(self, node: _Node) -> None:
        source, wanted = node.inputs[0], self._levels(node.inputs)
        if source in self._widens or source in self._integers:
            place, levels = self._integer(source)
            self._integers[node.outputs[0]] = self._requantized(place, levels, wanted, source), wanted
            return
        made = self._levelled(node.outputs[0], self._shapes[source], wanted)
        self._writer.operation("QUANTIZE", [self._float(source)], [made], "QuantizeOptions")
        self._integers[node.outputs[0]] = made, wanted

    def _activation(self, node: _Node) -> tuple[str, str]:
        """Where the result of ``node`` ends: behind its only reader if that is an activation which kernels compute."""
        readers = self._readers.get(node.outputs[0], [])
        if len(readers) == 1 and node.outputs[0] != self._output:
            fused = _FUSED.get((readers[0].kind, self._limits(readers[0]) if readers[0].kind == "Clip" else None))
            if fused is not None:
                self._done.add(readers[0].outputs[0])
                return readers[0].outputs[0], fused
        return node.outputs[0], "NONE"

    def _limits(self, node: _Node) -> tuple[float, float]:
        ends = (-math.inf, math.inf)
        found = [
            float(self._stored[node.inputs[place]])
            if len(node.inputs) > place and node.inputs[place]
            else ends[place - 1]
            for place in (1, 2)
        ]
        return found[0], found[1]

    # Levels

    def _levels(self, inputs: Sequence[str]) -> Levels:
        """Scale and zero point in int8: uint8 moved by 128."""
        zero = self._stored[inputs[2]]
        return float(self._stored[inputs[1]]), int(zero) - (128 if zero.dtype == np.uint8 else 0)

    def _levels_after(self, node: _Node, end: str) -> After:
        """The names and levels of the results of ``node`` if it is computed in int8, else None."""
        if node.kind not in _INTEGER or not all(self._has_levels(name) for name in self._activations(node)):
            return None
        if node.kind in ("Conv", "Gemm") and self._stored_levels(node.inputs[1]) is None:
            return None
        ends = [end] if len(node.outputs) == 1 else list(node.outputs)
        found = [self._next_levels(name) for name in ends]
        return None if any(levels is None for levels in found) else [f for f in found if f is not None]

    def _activations(self, node: _Node) -> list[str]:
        held = {"Conv": 1, "Gemm": 1, "ReduceMean": 1, "Reshape": 1, "Split": 1}.get(node.kind, len(node.inputs))
        return list(node.inputs[:held])

    def _has_levels(self, name: str) -> bool:
        return name in self._integers or (name in self._widens and self._widens[name][0] not in self._stored)

    def _next_levels(self, name: str) -> tuple[str, Levels] | None:
        """The levels that the result ``name`` is rounded to, itself or behind operators that only rearrange it."""
        readers = self._readers.get(name, [])
        if len(readers) != 1 or name == self._output:
            return None
        if readers[0].kind == "QuantizeLinear":
            return name, self._levels(readers[0].inputs)
        if readers[0].kind in ("Reshape", "Flatten"):
            behind = self._next_levels(readers[0].outputs[0])
            return None if behind is None else (name, behind[1])
        return None

    def _integer(self, name: str) -> tuple[int, Levels]:
        """Place and levels of a tensor in levels, given by its own name or that of its widened values."""
        return self._integers[name] if name in self._integers else self._integers[self._widens[name][0]]

    def _levelled(self, name: str, shape: Sequence[int], levels: Levels) -> int:
        return self._writer.tensor(name, self._physical(shape), "INT8", scales=[levels[0]], zeros=[levels[1]])

    def _requantized(self, place: int, levels: Levels, wanted: Levels, name: str) -> int:
        """``place`` in other levels."""
        if levels == wanted:
            return place
        made = self._levelled(f"{name}_levels", self._shapes[name], wanted)
        self._writer.operation("QUANTIZE", [place], [made], "QuantizeOptions", version=2)
        return made

    def _stored_levels(self, name: str) -> tuple[str, ...] | None:
        """The inputs of the DequantizeLinear of a stored tensor."""
        inputs = self._widens.get(name)
        return inputs if inputs is not None and inputs[0] in self._stored else None

    # Tensors

    def _physical(self, shape: Sequence[int]) -> list[int]:
        return [shape[place] for place in _LAST.get(len(shape), range(len(shape)))]

    def _float(self, name: str) -> int:
        """The place of a tensor in float32, widened or stored if need be."""
        if name in self._floats:
            return self._floats[name]
        if name in self._stored:
            self._floats[name] = self._constant(name, self._stored[name])
        elif self._stored_levels(name) is not None:
            levels, scales = (self._stored[given] for given in self._widens[name][:2])
            shape = [-1] + [1] * (levels.ndim - 1) if scales.size > 1 else [1] * levels.ndim
            self._floats[name] = self._constant(name, levels.astype(np.float32) * scales.reshape(shape))
        else:
            place, _ = self._integer(name)
            made = self._writer.tensor(name, self._physical(self._shape_of(name)), "FLOAT32")
            self._writer.operation("DEQUANTIZE", [place], [made], "DequantizeOptions", version=2)
            self._floats[name] = made
        return self._floats[name]

    def _shape_of(self, name: str) -> tuple[int, ...]:
        return self._shapes[name] if name in self._shapes else self._stored[name].shape

    def _constant(self, name: str, values: NDArray[Any]) -> int:
        """A stored tensor that an operator of two activations reads, channels last."""
        order = _LAST.get(values.ndim, tuple(range(values.ndim)))
        if values.ndim == 3:
            values, order = values[None], _LAST[4]
        return self._writer.tensor(name, [values.shape[p] for p in order], "FLOAT32", values=values.transpose(order))

    def _numbers(self, name: str, values: Sequence[Any]) -> int:
        given = np.asarray(values, np.int32)
        return self._writer.tensor(name, given.shape, "INT32", values=given)

    def _made(self, name: str, after: After, place: int = 0) -> int:
        """A new tensor for a result, in levels if ``after`` has them."""
        if after is None:
            made = self._writer.tensor(name, self._physical(self._shapes[name]), "FLOAT32")
            self._floats[name] = made
            return made
        levels = after[place][1]
        made = self._levelled(name, self._shapes[name], levels)
        self._integers[name] = made, levels
        return made

    def _finish(self, after: After) -> None:
        """Give results in levels the names that their QuantizeLinear gives them."""
        for name, levels in after or []:
            for reader in self._readers[name]:
                if reader.kind == "QuantizeLinear":
                    self._integers[reader.outputs[0]] = self._integers[name][0], levels
                    self._done.add(reader.outputs[0])

    def _read(self, name: str, after: object) -> int:
        return self._float(name) if after is None else self._integer(name)[0]

    # Weights

    def _weight(self, name: str, arrange: Callable[[NDArray[Any]], NDArray[Any]], axis: int) -> int:
        """A weight as it is stored: float32, float16 with the operator that widens it, or levels."""
        inputs = self._stored_levels(name)
        if inputs is not None:
            levels, scales = self._stored[inputs[0]], np.atleast_1d(self._stored[inputs[1]])
            outputs = levels.shape[0]
            per_output = np.broadcast_to(scales, (outputs,)).astype(np.float32)
            values = arrange(levels)
            title = inputs[0].removesuffix("_quantized")
            return self._writer.tensor(title, values.shape, "INT8", values=values, scales=per_output, axis=axis)
        return self._stored_float(name, arrange(self._stored[name]))

    def _stored_float(self, name: str, values: NDArray[Any]) -> int:
        if not self._half:
            return self._writer.tensor(name, values.shape, "FLOAT32", values=values)
        stored = self._writer.tensor(name, values.shape, "FLOAT16", values=values)
        made = self._writer.tensor(f"{name}_widened", values.shape, "FLOAT32")
        self._writer.operation("DEQUANTIZE", [stored], [made], "DequantizeOptions", version=3)
        return made

    def _bias(self, node: _Node, weight: str, outputs: int) -> int:
        """The bias; zeros if the node has none."""
        name = node.inputs[2] if len(node.inputs) > 2 else ""
        held = self._stored_levels(weight) if self._levels_used(node, weight) else None
        if held is None:
            if not name:
                return self._stored_float(f"{weight}_no_bias", np.zeros(outputs, np.float32))
            inputs = self._stored_levels(name)
            if inputs is None:
                return self._stored_float(name, self._stored[name])
            values = self._stored[inputs[0]].astype(np.float32) * self._stored[inputs[1]].astype(np.float32)
            return self._stored_float(name, values)
        _, (step, _) = self._integer(node.inputs[0])
        scales = np.broadcast_to(self._stored[held[1]], (outputs,)).astype(np.float64) * step
        inputs = self._stored_levels(name) if name else None
        if inputs is not None and self._stored[inputs[0]].dtype == np.int32:
            levels = self._stored[inputs[0]]
        else:
            given = self._stored[name].astype(np.float64) if name else np.zeros(outputs)
            levels = np.rint(given / scales).astype(np.int32)
        title = name or f"{weight}_no_bias"
        return self._writer.tensor(title, (outputs,), "INT32", values=levels, scales=scales.astype(np.float32))

    def _levels_used(self, node: _Node, weight: str) -> bool:
        return self._stored_levels(weight) is not None and self._has_levels(node.inputs[0])

    # Operators

    def _conv(self, node: _Node, end: str, fused: str, after: After) -> None:
        name = node.inputs[1]
        held = self._stored_levels(name)
        shape = self._stored[held[0] if held else name].shape
        groups, inputs = (
            node.number("group", 1),
            self._shapes[node.inputs[0]][1] if node.inputs[0] in self._shapes else 0,
        )
        if len(shape) != 4:
            raise EngineBuildError(f"{node.name} is not a convolution of images.", remedy=_OTHER_TARGET)
        strides, dilations = node.ints("strides", [1, 1]), node.ints("dilations", [1, 1])
        x, padding = self._padded(node, shape[2:], strides, dilations, after)
        depthwise = groups == inputs and groups > 1
        arrange = (lambda w: w.transpose(1, 2, 3, 0)) if depthwise else (lambda w: w.transpose(0, 2, 3, 1))
        weight = self._weight(name, arrange, 3 if depthwise else 0)
        bias = self._bias(node, name, shape[0])
        made = self._made(end, after)
        kind, options = ("DEPTHWISE_CONV_2D", "DepthwiseConv2DOptions") if depthwise else ("CONV_2D", "Conv2DOptions")
        extra = {"depthMultiplier": shape[0] // groups} if depthwise else {}
        self._writer.operation(
            kind, [x, weight, bias], [made], options, version=1 if after is None else 3,
            padding=self._code("Padding", padding), strideH=strides[0], strideW=strides[1],
            dilationHFactor=dilations[0], dilationWFactor=dilations[1],
            fusedActivationFunction=self._code("ActivationFunctionType", fused), **extra,
        )  # fmt: skip
        self._finish(after)

    def _code(self, table: str, name: str) -> int:
        return int(getattr(getattr(self._writer.schema, table), name))

    def _padded(
        self, node: _Node, kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int], after: object,
        *, lowest: bool = False,
    ) -> tuple[int, str]:  # fmt: skip
        """What a kernel reads and how it pads: by its own rule if that is the padding of the graph, else beforehand."""
        name = node.inputs[0]
        shape = self._shapes[name]
        pads = node.ints("pads", [0, 0, 0, 0])
        x = self._read(name, after)
        if not any(pads):
            return x, "VALID"
        same = [_same(shape[2 + a], kernel[a], strides[a], dilations[a]) for a in (0, 1)]
        if [same[0][0], same[1][0], same[0][1], same[1][1]] == pads:
            return x, "SAME"
        return self._pad(node, x, pads, after, lowest=lowest), "VALID"

    def _pad(self, node: _Node, x: int, pads: Sequence[int], after: object, *, lowest: bool) -> int:
        name = node.inputs[0]
        shape = self._shapes[name]
        wide = (*shape[:2], shape[2] + pads[0] + pads[2], shape[3] + pads[1] + pads[3])
        title = f"{node.outputs[0]}_padded"
        if after is None:
            made = self._writer.tensor(title, self._physical(wide), "FLOAT32")
        else:
            made = self._levelled(title, wide, self._integer(name)[1])
        amounts = self._numbers(f"{title}_by", [[0, 0], [pads[0], pads[2]], [pads[1], pads[3]], [0, 0]])
        if not lowest:
            self._writer.operation("PAD", [x, amounts], [made], "PadOptions", version=1 if after is None else 2)
            return made
        if after is None:
            value = self._writer.tensor(f"{title}_with", (), "FLOAT32", values=float(np.finfo(np.float32).min))
        else:
            levels = self._integer(name)[1]
            value = self._writer.tensor(
                f"{title}_with",
                (),
                "INT8",
                values=-128,
                scales=[levels[0]],
                zeros=[levels[1]],
            )
        self._writer.operation("PADV2", [x, amounts, value], [made], "PadV2Options", version=1 if after is None else 2)
        return made

    def _linear(self, node: _Node, end: str, fused: str, after: After) -> None:
        name, swapped = node.inputs[1], node.kind == "MatMul" or not node.number("transB", 0)
        held = self._stored_levels(name)
        if (held is None and name not in self._stored) or len(self._shapes[node.inputs[0]]) != 2:
            raise EngineBuildError(
                f"{node.name} multiplies two activations or tokens, and kdexport cannot write it for LiteRT.",
                remedy=_OTHER_TARGET,
            )
        shape = self._stored[held[0] if held else name].shape
        outputs = shape[1] if swapped else shape[0]
        x = self._read(node.inputs[0], after)
        weight = self._weight(name, lambda w: w.T if swapped else w, 0)
        bias = self._bias(node, name, outputs)
        made = self._made(end, after)
        self._writer.operation(
            "FULLY_CONNECTED", [x, weight, bias], [made], "FullyConnectedOptions", version=1 if after is None else 12,
            fusedActivationFunction=self._code("ActivationFunctionType", fused),
        )  # fmt: skip
        self._finish(after)

    def _of_two(self, node: _Node, end: str, fused: str, after: After) -> None:
        read = [self._read(name, after) for name in node.inputs]
        made = self._made(end, after)
        self._writer.operation(
            node.kind.upper(), read, [made], f"{node.kind}Options", version=1 if after is None else 2,
            fusedActivationFunction=self._code("ActivationFunctionType", fused),
        )  # fmt: skip
        self._finish(after)

    def _of_one(self, node: _Node, end: str, _fused: str, _after: object) -> None:
        kind, options = {
            "Relu": ("RELU", ""), "Sigmoid": ("LOGISTIC", ""), "HardSwish": ("HARD_SWISH", "HardSwishOptions")
        }[node.kind]  # fmt: skip
        self._writer.operation(kind, [self._float(node.inputs[0])], [self._made(end, None)], options)

    def _clip(self, node: _Node, end: str, _fused: str, _after: object) -> None:
        x, limits = self._float(node.inputs[0]), self._limits(node)
        fused = _FUSED.get(("Clip", limits))
        if fused is not None:
            self._writer.operation(fused, [x], [self._made(end, None)])
            return
        for kind, limit, place in (("MAXIMUM", limits[0], 1), ("MINIMUM", limits[1], 2)):
            if math.isfinite(limit):
                last = kind == "MINIMUM" or not math.isfinite(limits[1])
                shape = self._physical(self._shapes[end])
                made = self._made(end, None) if last else self._writer.tensor(f"{end}_lower", shape, "FLOAT32")
                value = self._writer.tensor(f"{node.inputs[place]}_{kind}", (), "FLOAT32", values=limit)
                self._writer.operation(kind, [x, value], [made], "MaximumMinimumOptions")
                x = made
        self._floats[end] = x

    def _hard_sigmoid(self, node: _Node, end: str, _fused: str, _after: object) -> None:
        """clip(alpha x + beta, 0, 1) as min(max(x + 6 beta, 0), 6) / 6 with the usual alpha of 1/6."""
        alpha, beta = float(node.attributes.get("alpha", 0.2)), float(node.attributes.get("beta", 0.5))
        if np.float32(alpha) != np.float32(1 / 6):
            raise EngineBuildError(
                f"{node.name} has alpha {alpha:g}, and kdexport writes HardSigmoid for LiteRT with 1/6 only.",
                remedy=_OTHER_TARGET,
            )
        shape = self._physical(self._shapes[end])
        moved = self._writer.tensor(f"{end}_moved", shape, "FLOAT32")
        moves = self._writer.tensor(f"{end}_three", (), "FLOAT32", values=6 * beta)
        sixth = self._writer.tensor(f"{end}_sixth", (), "FLOAT32", values=alpha)
        self._writer.operation(
            "ADD", [self._float(node.inputs[0]), moves], [moved], "AddOptions",
            fusedActivationFunction=self._code("ActivationFunctionType", "RELU6"),
        )  # fmt: skip
        self._writer.operation("MUL", [moved, sixth], [self._made(end, None)], "MulOptions")

    def _mean(self, node: _Node, end: str, _fused: str, after: After) -> None:
        keeps = True
        if node.kind == "ReduceMean":
            axes = node.ints("axes", self._stored[node.inputs[1]].tolist() if len(node.inputs) > 1 else [])
            keeps = bool(node.number("keepdims", 1))
            if sorted(axis % 4 for axis in axes) != [2, 3] or len(self._shapes[node.inputs[0]]) != 4:
                raise EngineBuildError(
                    f"{node.name} is not a mean over the pixels, and kdexport cannot write it for LiteRT.",
                    remedy=_OTHER_TARGET,
                )
        x, made = self._read(node.inputs[0], after), self._made(end, after)
        over = self._numbers(f"{end}_axes", [1, 2])
        self._writer.operation(
            "MEAN", [x, over], [made], "ReducerOptions", version=1 if after is None else 2, keepDims=keeps
        )
        self._finish(after)

    def _pool(self, node: _Node, end: str, _fused: str, after: After) -> None:
        kernel, strides = node.ints("kernel_shape", []), node.ints("strides", [1, 1])
        largest = node.kind == "MaxPool"
        pads = node.ints("pads", [0, 0, 0, 0])
        if node.number("ceil_mode", 0) or any(d != 1 for d in node.ints("dilations", [1, 1])):
            raise EngineBuildError(f"{node.name} rounds its size up or is dilated.", remedy=_OTHER_TARGET)
        lowest = largest and not self._is_positive(node.inputs[0])
        x, padding = self._padded(node, kernel, strides, [1, 1], after, lowest=lowest)
        counted = bool(node.number("count_include_pad", 0))
        if not largest and any(pads) and (padding == "SAME") is counted:
            # LiteRT's own padding is not counted in a mean, and what was added beforehand is.
            if not counted:
                raise EngineBuildError(f"{node.name} has a padding that LiteRT does not have.", remedy=_OTHER_TARGET)
            x, padding = self._pad(node, self._read(node.inputs[0], after), pads, after, lowest=False), "VALID"
        levels = None if after is None else self._integer(node.inputs[0])[1]
        made = self._same_levels(end, after, levels)
        self._writer.operation(
            "MAX_POOL_2D" if largest else "AVERAGE_POOL_2D", [x], [made[0]], "Pool2DOptions",
            version=1 if after is None else 2, padding=self._code("Padding", padding), strideH=strides[0],
            strideW=strides[1], filterHeight=kernel[0], filterWidth=kernel[1],
        )  # fmt: skip
        self._requantize_results(made, [end], after, levels)

    def _is_positive(self, name: str) -> bool:
        """Whether no value of a tensor is below zero, so that zeros beside it do not change a maximum."""
        if self._has_levels(name):
            return self._integer(name)[1][1] == -128
        maker = next((node for node in self._nodes if name in node.outputs), None)
        if maker is None or maker.kind not in ("Relu", "Clip"):
            return False
        return maker.kind == "Relu" or self._limits(maker)[0] >= 0

    def _same_levels(self, name: str, after: After, levels: Levels | None, place: int = 0) -> list[int]:
        """A new tensor for a result that has the levels of the input."""
        if after is None or levels is None:
            return [self._made(name, None)]
        made = self._levelled(name, self._shapes[name], levels)
        self._integers[name] = made, levels
        return [made]

    def _requantize_results(
        self,
        places: Sequence[int],
        names: Sequence[str],
        after: After,
        levels: Levels | None,
    ) -> None:
        """Bring results, which have the levels of what was read, to the levels that the graph gives them."""
        if after is None or levels is None:
            return
        for place, name, (_, wanted) in zip(places, names, after, strict=True):
            self._integers[name] = self._requantized(place, levels, wanted, name), wanted
        self._finish(after)

    def _rearrange(self, node: _Node, end: str, _fused: str, after: After) -> None:
        source, old, new = node.inputs[0], self._shapes[node.inputs[0]], self._shapes[end]
        levels = None if after is None else self._integer(source)[1]
        x = self._read(source, after)
        if node.kind == "Transpose":
            (made,) = self._same_levels(end, after, levels)
            self._transpose(x, made, node.ints("perm", range(len(old))[::-1]), len(old), end, after)
        else:
            x = self._planes_first(x, source, old, new, node, after)
            (made,) = self._same_levels(end, after, levels)
            shape = self._numbers(f"{end}_shape", self._physical(new))
            self._writer.operation(
                "RESHAPE", [x, shape], [made], "ReshapeOptions", newShape=np.asarray(self._physical(new), np.int32)
            )
        self._requantize_results([made], [end], after, levels)

    def _transpose(self, x: int, made: int, perm: Sequence[int], rank: int, end: str, after: object) -> None:
        order = _LAST.get(rank, tuple(range(rank)))
        physical = [order.index(perm[place]) for place in order]
        by = self._numbers(f"{end}_order", physical)
        self._writer.operation("TRANSPOSE", [x, by], [made], "TransposeOptions", version=1 if after is None else 2)

    def _planes_first(
        self, x: int, source: str, old: tuple[int, ...], new: tuple[int, ...], node: _Node, after: object
    ) -> int:
        """``x`` in an order of its values that is that of the reshaped tensor."""
        splits = len(old) == 4 and len(new) == 5 and old[0] == new[0] and old[2:] == new[3:]
        merges = len(old) == 5 and len(new) == 4 and old[0] == new[0] and old[3:] == new[2:]
        if splits or merges or math.prod(old) == max(old) or (len(old) not in _LAST and len(new) not in _LAST):
            return x
        if len(old) != 4 or len(new) in _LAST:
            raise EngineBuildError(
                f"{node.name} reshapes {old} to {new}, and kdexport cannot write that for LiteRT.", remedy=_OTHER_TARGET
            )
        title = f"{source}_planes"
        shape = [old[place] for place in (0, 1, 2, 3)]
        if after is None:
            made = self._writer.tensor(title, shape, "FLOAT32")
        else:
            scale, zero = self._integer(source)[1]
            made = self._writer.tensor(title, shape, "INT8", scales=[scale], zeros=[zero])
        by = self._numbers(f"{title}_order", [0, 3, 1, 2])
        self._writer.operation("TRANSPOSE", [x, by], [made], "TransposeOptions", version=1 if after is None else 2)
        return made

    def _concat(self, node: _Node, end: str, _fused: str, after: After) -> None:
        axis = self._axis(node, len(self._shapes[end]))
        if after is None:
            read = [self._float(name) for name in node.inputs]
        else:
            wanted = after[0][1]
            read = [self._requantized(*self._integer(name), wanted, name) for name in node.inputs]
        made = self._made(end, after)
        self._writer.operation(
            "CONCATENATION", read, [made], "ConcatenationOptions", version=1 if after is None else 2, axis=axis
        )
        self._finish(after)

    def _axis(self, node: _Node, rank: int) -> int:
        axis = node.number("axis", 0) % rank
        return _LAST[rank].index(axis) if rank in _LAST else axis

    def _split(self, node: _Node, _end: str, _fused: str, after: After) -> None:
        source, names = node.inputs[0], node.outputs
        axis = self._axis(node, len(self._shapes[source]))
        levels = None if after is None else self._integer(source)[1]
        x = self._read(source, after)
        made = [self._same_levels(name, after, levels)[0] for name in names]
        along = self._writer.tensor(f"{names[0]}_axis", (), "INT32", values=axis)
        sizes = [self._physical(self._shapes[name])[axis] for name in names]
        if len(set(sizes)) == 1:
            self._writer.operation("SPLIT", [along, x], made, "SplitOptions", numSplits=len(names))
        else:
            held = self._numbers(f"{names[0]}_sizes", sizes)
            self._writer.operation("SPLIT_V", [x, held, along], made, "SplitVOptions", numSplits=len(names))
        self._requantize_results(made, names, after, levels)


def _same(size: int, kernel: int, stride: int, dilation: int) -> tuple[int, int]:
    """The padding before and after an axis that LiteRT calls SAME."""
    total = max((math.ceil(size / stride) - 1) * stride + (kernel - 1) * dilation + 1 - size, 0)
    return total // 2, total - total // 2


_WRITERS: dict[str, Callable[[_Conversion, _Node, str, str, Any], None]] = {
    "Conv": _Conversion._conv,
    "Gemm": _Conversion._linear,
    "MatMul": _Conversion._linear,
    **dict.fromkeys(("Add", "Sub", "Mul", "Div"), _Conversion._of_two),
    **dict.fromkeys(("Relu", "Sigmoid", "HardSwish"), _Conversion._of_one),
    "Clip": _Conversion._clip,
    "HardSigmoid": _Conversion._hard_sigmoid,
    **dict.fromkeys(("GlobalAveragePool", "ReduceMean"), _Conversion._mean),
    **dict.fromkeys(("MaxPool", "AveragePool"), _Conversion._pool),
    **dict.fromkeys(("Reshape", "Flatten", "Transpose"), _Conversion._rearrange),
    "Concat": _Conversion._concat,
    "Split": _Conversion._split,
}
