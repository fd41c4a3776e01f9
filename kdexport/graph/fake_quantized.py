"""The int8 graph of a target as a torch module that can be trained: the cast's own Q/DQ nodes, with gradients.

The module is read from the int8 file that ``quantize`` wrote, node by node. So exactly the tensors that the file
rounds are rounded, and no second list of rules says which these are. What quantize-aware training changes is read from
two other places: the float32 weights of the graph before the cast, and the range of each tensor. Their levels are
computed as the cast computes them, and at the start they must be those of the file, bit by bit.

A rounding passes the gradient as if it were the identity (straight-through; Bengio et al., 2013), inside of its range.
The ends of a range are trained with the weights (Esser et al., 2020; Jain et al., 2020).
"""

from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from torch import Tensor, nn
from torch.nn import functional

from kdexport.backends.torch_programs.torch_graph import OPERATORS
from kdexport.errors import AuditError, ReparamError
from kdexport.graph.tensor_ranges import Range

_LAYERS = ("Conv", "Gemm", "MatMul")
_SCALE, _RESIDUAL, _QUANTIZED = "_scale", "_residual", "_quantized"

#: The logarithm of an end of a range is this many times its parameter, and an end never leaves the calibrated range.
_RANGE_GAIN = 10.0
#: Levels of a weight on each side of zero, by its bits. The cast computes the scale of 7 bits with one level more.
_WEIGHT_LEVELS = {7: 64, 8: 127}
_HALF_STEP = 0.5 * (1 + 1e-4)
#: The cast raises a weight's scale where the levels of the bias would not fit into int32.
_BIAS_LEVELS, _BIAS_MARGIN = 2.0**32 - 2, 1.0001

Attributes = Mapping[str, Any]


class FakeQuantized(nn.Module):
    """A trainable copy of an int8 graph; ``forward`` takes (N,3,S,S) float32 and returns logits (N,K).

    Its parameters are changes relative to the weights of each output channel, to a bias and to the ends of a range, all
    0 at the start: the size of a step does not depend on the size of the weights, which differs by orders of magnitude
    between channels into which a batch norm was folded.
    """

    def __init__(
        self,
        quantized: onnx.ModelProto,
        float32: onnx.ModelProto,
        ranges: Mapping[str, Range],
        *,
        weight_bits: int,
        checks: bool = True,
    ) -> None:
        """``quantized`` was cast from ``float32`` with these ``ranges`` and ``weight_bits``.

        Raises ``ReparamError`` for an operator without a gradient here, and with ``checks`` ``AuditError`` if the
        levels are not those of the file.
        """
        super().__init__()
        graph = quantized.graph
        self._input, self._output = graph.input[0].name, graph.output[0].name
        self._stored = {item.name: numpy_helper.to_array(item) for item in graph.initializer}
        exact = {item.name: numpy_helper.to_array(item) for item in float32.graph.initializer}
        self._levels = _WEIGHT_LEVELS[weight_bits]
        self._nodes = [_Node(node) for node in graph.node]
        for node in self._nodes:
            if node.kind == "Constant" and "value" in node.attributes:
                self._stored[node.outputs[0]] = numpy_helper.to_array(node.attributes["value"])
        self._nodes = [node for node in self._nodes if node.kind != "Constant"]
        _require_known(self._nodes)
        self._last_reader = {name: place for place, node in enumerate(self._nodes) for name in node.inputs}
        self._constants = {name: f"constant_{number}" for number, name in enumerate(self._stored)}
        for name, values in self._stored.items():
            self.register_buffer(self._constants[name], torch.from_numpy(np.array(values)), persistent=False)
        self.weights = nn.ModuleDict()
        self.biases = nn.ModuleDict()
        self.ranges = nn.ModuleDict()
        self._add_ranges(ranges)
        self._add_weights(exact)
        if checks:
            self._require_levels()

    def _add_ranges(self, ranges: Mapping[str, Range]) -> None:
        """A trainable range for each scale that an activation is rounded with."""
        for node in self._nodes:
            scale = node.inputs[1] if node.kind == "QuantizeLinear" else ""
            if not scale or _key(scale) in self.ranges:
                continue
            tensor = scale.removesuffix(_SCALE).removesuffix(_RESIDUAL)
            tensor = tensor if tensor in ranges else scale.removesuffix(_SCALE)
            if tensor not in ranges:
                raise AuditError(
                    f"The int8 graph rounds a tensor with the scale {scale}, which has no calibrated range.",
                    remedy="Build with --fresh, which calibrates again.",
                )
            symmetric = self._stored[node.inputs[2]].dtype == np.int8
            self.ranges[_key(scale)] = _TrainedRange(tensor, ranges[tensor], symmetric=symmetric)

    def _add_weights(self, exact: Mapping[str, NDArray[Any]]) -> None:
        """A trainable weight and bias for each layer that multiplies in int8; others stay as they are."""
        producers = {name: node for node in self._nodes for name in node.outputs}
        for layer in self._nodes:
            if layer.kind not in _LAYERS:
                continue
            weight = producers.get(layer.inputs[1])
            if weight is None or weight.kind != "DequantizeLinear" or weight.inputs[0] not in self._stored:
                continue
            name = weight.inputs[0].removesuffix(_QUANTIZED)
            axis = weight.attributes.get("axis", 1) if self._stored[weight.inputs[1]].size > 1 else None
            bias = layer.inputs[2] if len(layer.inputs) > 2 else ""
            made = producers.get(bias)
            rounded = made is not None and made.kind == "DequantizeLinear"
            source = made.inputs[0].removesuffix(_QUANTIZED) if made is not None and rounded else bias
            given = producers.get(layer.inputs[0])
            held = _TrainedWeight(name, exact[name], axis, self._levels)
            self.weights[_key(weight.inputs[0])] = held
            if not bias:
                continue
            kept = _TrainedBias(source, exact[source])
            if rounded and made is not None and given is not None:
                kept.rounds_with(given.inputs[1], weight.inputs[0])
                held.widened_for(source, given.inputs[1])
                self.biases[_key(made.inputs[0])] = kept
            else:
                self.biases[_key(source)] = kept

    def forward(self, images: Tensor) -> Tensor:
        scales = {name: cast(_TrainedRange, module).ends() for name, module in self.ranges.items()}
        steps, weights = self._rounded_weights(scales)
        biases = {name: cast(_TrainedBias, module).rounded(scales, steps) for name, module in self.biases.items()}
        values: dict[str, Tensor] = {self._input: images}
        for place, node in enumerate(self._nodes):
            found = self._result(node, values, {**weights, **biases}, scales)
            values |= dict(zip(node.outputs, found if isinstance(found, list | tuple) else [found], strict=True))
            # A graph has hundreds of tensors; without a gradient most of them are not needed again.
            for name in node.inputs:
                if self._last_reader[name] == place and name != self._output:
                    values.pop(name, None)
        return values[self._output]

    def _rounded_weights(self, scales: Mapping[str, "_Ends"]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        steps, rounded = {}, {}
        for name, module in self.weights.items():
            held = cast(_TrainedWeight, module)
            bias = self._bias_of(held)
            steps[name], rounded[name] = held.rounded(bias, scales)
        return steps, rounded

    def _bias_of(self, weight: "_TrainedWeight") -> Tensor | None:
        found = (cast(_TrainedBias, module) for module in self.biases.values())
        return next((bias.exact().detach() for bias in found if bias.name == weight.bias), None)

    def _result(
        self, node: "_Node", values: Mapping[str, Tensor], trained: Mapping[str, Tensor], scales: Mapping[str, "_Ends"]
    ) -> Any:
        if node.kind == "QuantizeLinear":
            ends = scales[_key(node.inputs[1])]
            return _round(values[node.inputs[0]], ends)
        if node.kind == "DequantizeLinear":
            key = _key(node.inputs[0])
            # A rounded activation is held in its own unit, so that nothing is left to do.
            return trained[key] if key in trained else self._value(values, node.inputs[0])
        given = [trained.get(_key(name), self._value(values, name)) for name in node.inputs]
        numbers = [self._numbers(values, name) for name in node.inputs]
        return _ALL[node.kind](given, numbers, node.attributes)

    def _value(self, values: Mapping[str, Tensor], name: str) -> Tensor | None:
        if name in values:
            return values[name]
        return self.get_buffer(self._constants[name]) if name in self._constants else None

    def _numbers(self, values: Mapping[str, Tensor], name: str) -> NDArray[Any] | None:
        """The value of an input that decides shapes: stored, or computed from the shape of the batch."""
        if name in self._stored:
            return self._stored[name]
        given = values.get(name)
        if given is None or given.is_floating_point():
            return None
        return given.cpu().numpy()

    def _require_levels(self) -> None:
        """Raise ``AuditError`` unless scales, zero points and rounded weights are those of the file, bit by bit."""
        with torch.no_grad():
            scales = {name: cast(_TrainedRange, module).ends() for name, module in self.ranges.items()}
            _, weights = self._rounded_weights(scales)
        wrong = []
        for node in self._nodes:
            if node.kind == "QuantizeLinear":
                ends, stored = scales[_key(node.inputs[1])], [self._stored[name] for name in node.inputs[1:3]]
                if ends.scale.item() != float(stored[0]) or (int(ends.zero) != int(stored[1])):
                    wrong.append(f"{node.inputs[1]} is {float(stored[0]):.9g}, expected {ends.scale.item():.9g}")
            elif node.kind == "DequantizeLinear" and _key(node.inputs[0]) in self.weights:
                levels, scale, axis = self._stored[node.inputs[0]], self._stored[node.inputs[1]], node.attributes
                shape = [1] * levels.ndim
                if scale.size > 1:
                    shape[axis.get("axis", 1)] = scale.size
                stored_weight = levels.astype(np.float32) * scale.reshape(shape)
                if not np.array_equal(weights[_key(node.inputs[0])].numpy(), stored_weight):
                    wrong.append(f"the levels of {node.inputs[0].removesuffix(_QUANTIZED)} differ")
        if wrong:
            raise AuditError(
                f"The int8 graph was not cast with these weights and ranges: {wrong[0]} ({len(wrong)} differences).",
                remedy="Build with --fresh. If it fails again, open an issue in kdexport's repository with this "
                "message and the output of kdexport doctor.",
            )

    def trained_weights(self) -> dict[str, NDArray[np.float32]]:
        """The float32 weights and biases of all int8 layers, by their names in the float32 graph."""
        held = [*self.weights.values(), *self.biases.values()]
        with torch.no_grad():
            return {str(module.name): _array(cast(Any, module).exact()) for module in held}

    def trained_ranges(self) -> dict[str, Range]:
        """The range of each rounded tensor, by its name in the graph."""
        found = {}
        with torch.no_grad():
            for module in self.ranges.values():
                trained = cast(_TrainedRange, module)
                low, high = trained.low_high()
                found[trained.tensor] = Range(float(low), float(high))
        return found


class _Node:
    """One node of the graph, read once."""

    def __init__(self, node: onnx.NodeProto) -> None:
        self.kind, self.name = node.op_type, node.name
        self.inputs, self.outputs = list(node.input), list(node.output)
        self.attributes = {item.name: helper.get_attribute_value(item) for item in node.attribute}


class _Ends:
    """A range on the device: its ends (scalars), and the scale and zero point that they give."""

    def __init__(self, low: Tensor, high: Tensor, *, symmetric: bool) -> None:
        self.low, self.high, self.symmetric = low, high, symmetric
        # As the cast: in float64, then rounded to float32 once.
        wide_low, wide_high = low.detach().double().clamp(max=0), high.detach().double().clamp(min=0)
        if symmetric:
            reach = torch.maximum(-wide_low, wide_high)
            scale = 2 * reach / 254
            self.first, self.last = -127.0, 127.0
        else:
            scale = (wide_high - wide_low) / 255
            self.first, self.last = 0.0, 255.0
        dead = scale < torch.finfo(torch.float32).tiny
        zero = torch.zeros_like(scale) if symmetric else (-wide_low / scale).round()
        self.scale = torch.where(dead, torch.ones_like(scale), scale).float()
        self.zero = torch.where(dead, torch.zeros_like(zero), zero).float()


class _TrainedRange(nn.Module):
    """The range of one tensor; its ends can only move towards zero, so an end at zero stays there.

    A ReLU that the cast absorbed into a zero point would act no longer if the lower end moved below zero.
    """

    start: Tensor

    def __init__(self, tensor: str, given: Range, *, symmetric: bool) -> None:
        super().__init__()
        self.tensor, self._symmetric = tensor, symmetric
        self.register_buffer("start", torch.tensor([given.low, given.high], dtype=torch.float32), persistent=False)
        self.change = nn.Parameter(torch.zeros(2))

    def low_high(self) -> tuple[Tensor, Tensor]:
        """The ends, scalars."""
        ends = self.start * torch.exp(_RANGE_GAIN * _up_to_zero(self.change))
        return ends[0], ends[1]

    def ends(self) -> _Ends:
        return _Ends(*self.low_high(), symmetric=self._symmetric)


def _up_to_zero(values: Tensor) -> Tensor:
    """Values clamped to at most 0, with the gradient of the identity: a parameter beyond its end can come back."""
    return values + (values.clamp(max=0) - values).detach()


class _TrainedWeight(nn.Module):
    """The weight of a layer, and its levels: one scale for each output channel, or one for all without an ``axis``."""

    start: Tensor
    unit: Tensor

    def __init__(self, name: str, values: NDArray[np.float32], axis: int | None, levels: int) -> None:
        super().__init__()
        self.name, self.bias, self._input_scale, self._levels = name, "", "", levels
        start = torch.from_numpy(np.array(values))
        self._dimensions = [place for place in range(start.dim()) if place != axis]
        unit = start.abs().amax(self._dimensions, keepdim=True)
        self.register_buffer("start", start, persistent=False)
        self.register_buffer("unit", torch.where(unit > 0, unit, torch.ones_like(unit)), persistent=False)
        self.change = nn.Parameter(torch.zeros_like(start))

    def widened_for(self, bias: str, input_scale: str) -> None:
        """Name the bias whose int32 levels must hold, and the scale of the input."""
        self.bias, self._input_scale = bias, _key(input_scale)

    def exact(self) -> Tensor:
        """The float32 weight."""
        return self.start + self.unit * self.change

    def rounded(self, bias: Tensor | None, scales: Mapping[str, _Ends]) -> tuple[Tensor, Tensor]:
        """The scale of each output channel, with all dimensions, and the rounded weight."""
        exact = self.exact()
        reach = exact.detach().abs().amax(self._dimensions, keepdim=True).double()
        scale = 2 * reach / (2 * self._levels)
        scale = torch.where(scale < torch.finfo(torch.float32).tiny, torch.ones_like(scale), scale).float()
        if bias is not None and self._input_scale in scales and scale.numel() == bias.numel():
            own = scale.double() * scales[self._input_scale].scale.double()
            least = (_BIAS_MARGIN * 2 * bias.double().abs() / _BIAS_LEVELS).reshape(own.shape)
            scale = torch.where((own < least) & (own > 0), scale.double() * (least / own), scale.double()).float()
        return scale, _through(exact, (exact / scale).round().clamp(-self._levels, self._levels) * scale)


class _TrainedBias(nn.Module):
    """The bias of a layer; in the form for CPUs in int32, in units of the product of the scales of its factors."""

    start: Tensor

    def __init__(self, name: str, values: NDArray[np.float32]) -> None:
        super().__init__()
        self.name, self._scales = name, ("", "")
        start = torch.from_numpy(np.array(values))
        self._unit = float(start.abs().max()) or 1.0
        self.register_buffer("start", start, persistent=False)
        self.change = nn.Parameter(torch.zeros_like(start))

    def rounds_with(self, input_scale: str, weight: str) -> None:
        """Name the scale of the input and the weight."""
        self._scales = _key(input_scale), _key(weight)

    def exact(self) -> Tensor:
        """The float32 bias."""
        return self.start + self._unit * self.change

    def rounded(self, scales: Mapping[str, _Ends], steps: Mapping[str, Tensor]) -> Tensor:
        """The bias that the file adds."""
        exact = self.exact()
        if self._scales[0] not in scales:
            return exact
        step = (scales[self._scales[0]].scale * steps[self._scales[1]]).reshape(-1)
        return _through(exact, ((exact.double() / step.double()).round() * step.double()).float())


def _through(exact: Tensor, rounded: Tensor) -> Tensor:
    """``rounded``, with the gradient of ``exact``."""
    return cast(Tensor, _StraightThrough.apply(exact, rounded))


class _StraightThrough(torch.autograd.Function):
    """The second value, bit by bit, with the gradient of the first."""

    @staticmethod
    def forward(_context: Any, _exact: Tensor, rounded: Tensor) -> Tensor:
        return rounded.detach()

    @staticmethod
    def backward(_context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def _round(values: Tensor, ends: _Ends) -> Tensor:
    """``values`` rounded to the levels of a range."""
    return cast(Tensor, _Rounding.apply(values, ends.low, ends.high, ends))


class _Rounding(torch.autograd.Function):
    """Rounding to levels; a value beyond an end becomes that end, and its gradient moves the end."""

    @staticmethod
    def forward(context: Any, values: Tensor, _low: Tensor, _high: Tensor, ends: _Ends) -> Tensor:
        rounded = (values / ends.scale).round_().add_(ends.zero).clamp_(ends.first, ends.last)
        rounded = rounded.sub_(ends.zero).mul_(ends.scale)
        context.save_for_backward(values, rounded)
        context.ends = ends
        return rounded

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        values, rounded = context.saved_tensors
        ends, gradient = context.ends, gradients[0]
        error = rounded - values
        # Inside of the range a value moves by at most half a step.
        passed = gradient * (error.abs() <= _HALF_STEP * ends.scale)
        beyond = gradient - passed
        # Inside, a longer step moves a rounded value by its own rounding error.
        per_step = (passed * error).sum() / (ends.scale * (ends.last - ends.first))
        above = (beyond * (error < 0)).sum()
        up, down = above + per_step, beyond.sum() - above - per_step
        if ends.symmetric:
            # Only the end farther from zero decides the scale, for both sides.
            reach, upper = up - down, ends.high.abs() >= ends.low.abs()
            none = torch.zeros_like(reach)
            return passed, torch.where(upper, none, -reach), torch.where(upper, reach, none), None
        return passed, down, up, None


def _key(name: str) -> str:
    """A name that a module's child may have."""
    return name.replace(".", "/")


def _array(values: Tensor) -> NDArray[np.float32]:
    return cast("NDArray[np.float32]", values.detach().cpu().float().numpy())


def _require_known(nodes: list[_Node]) -> None:
    for node in nodes:
        if node.kind not in (*_ALL, "QuantizeLinear", "DequantizeLinear"):
            raise ReparamError(
                f"The student cannot be trained for int8: its graph has the operator {node.kind} ({node.name}), which "
                "has no gradient in kdexport.",
                remedy="Set enabled = false under [quantize_aware], or keep sensitive layers in float32 with "
                "--precision-search.",
            )


def _reshape(given: list[Tensor], numbers: list[NDArray[Any]], _: Attributes) -> Tensor:
    shape = [int(size) for size in numbers[1]]
    return given[0].reshape([given[0].shape[place] if size == 0 else size for place, size in enumerate(shape)])


def _unsqueeze(given: list[Tensor], numbers: list[NDArray[Any]], _: Attributes) -> Tensor:
    result = given[0]
    for axis in sorted(int(number) for number in numbers[1]):
        result = result.unsqueeze(axis)
    return result


def _squeeze(given: list[Tensor], numbers: list[NDArray[Any]], _: Attributes) -> Tensor:
    axes = [int(number) for number in numbers[1]] if len(numbers) > 1 else None
    return given[0].squeeze() if axes is None else given[0].squeeze(tuple(axes))


def _slice(given: list[Tensor], numbers: list[NDArray[Any]], _: Attributes) -> Tensor:
    starts, ends = numbers[1], numbers[2]
    axes = numbers[3] if len(numbers) > 3 else np.arange(len(starts))
    strides = numbers[4] if len(numbers) > 4 else np.ones(len(starts), np.int64)
    place: list[slice] = [slice(None)] * given[0].dim()
    for start, end, axis, stride in zip(starts, ends, axes, strides, strict=True):
        place[int(axis)] = slice(int(start), min(int(end), given[0].shape[int(axis)]), int(stride))
    return given[0][tuple(place)]


def _gather(given: list[Tensor], numbers: list[NDArray[Any]], attributes: Attributes) -> Tensor:
    axis, index = attributes.get("axis", 0), np.array(numbers[1])
    rows = given[0].index_select(axis, torch.from_numpy(index.reshape(-1)).to(given[0].device))
    return rows.reshape(*given[0].shape[:axis], *index.shape, *given[0].shape[axis:][1:])


def _layer_norm(given: list[Tensor], _: Any, attributes: Attributes) -> Tensor:
    axis = attributes.get("axis", -1) % given[0].dim()
    bias = given[2] if len(given) > 2 else None
    return functional.layer_norm(given[0], given[0].shape[axis:], given[1], bias, attributes.get("epsilon", 1e-5))


def _gelu(given: list[Tensor], _: Any, attributes: Attributes) -> Tensor:
    way = attributes.get("approximate", b"none")
    return functional.gelu(given[0], approximate=way.decode() if isinstance(way, bytes) else way)


def _pad(given: list[Tensor], numbers: list[NDArray[Any]], _: Attributes) -> Tensor:
    ends = [int(number) for number in numbers[1]]
    half = len(ends) // 2
    widths = [width for place in reversed(range(half)) for width in (ends[place], ends[half + place])]
    filled = float(numbers[2]) if len(numbers) > 2 and numbers[2] is not None else 0.0
    return functional.pad(given[0], widths, value=filled)


#: Those of the programs for other runtimes take one image; here a batch is of any size, and more operators are known.
_ALL: dict[str, Any] = {
    **OPERATORS,
    "Reshape": _reshape,
    "Shape": lambda given, _, attributes: torch.tensor(
        given[0].shape[attributes.get("start", 0) : attributes.get("end")]
    ),
    "Gather": _gather,
    "Slice": _slice,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Pad": _pad,
    "Softmax": lambda given, _, attributes: given[0].softmax(attributes.get("axis", -1)),
    "LayerNormalization": _layer_norm,
    "Gelu": _gelu,
    "Erf": lambda given, _, __: torch.erf(given[0]),
    "Tanh": lambda given, _, __: given[0].tanh(),
    "Sqrt": lambda given, _, __: given[0].sqrt(),
    "LeakyRelu": lambda given, _, attributes: functional.leaky_relu(given[0], attributes.get("alpha", 0.01)),
    "Elu": lambda given, _, attributes: functional.elu(given[0], attributes.get("alpha", 1.0)),
}
