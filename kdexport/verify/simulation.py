"""The error of a low precision itself: the folded student in torch, rounded where hardware of that precision rounds.

The simulation reads no exported file, so a wrong scale or a lost weight in a file shows as a difference from it.
"""

import copy
import math
from collections.abc import Callable, Container, Iterable, Iterator, Set
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from kdexport.backends.base import IN_ORDER
from kdexport.graph.plan import PLAIN, LayerPlan
from kdexport.graph.tensor_ranges import Method, range_of
from kdexport.graph.value_histograms import EMPTY, with_values
from kdexport.reparam.expected import multiplied_weights

_ATEN = torch.ops.aten
_MULTIPLYING = {_ATEN.convolution.default, _ATEN.addmm.default, _ATEN.mm.default}
#: Other operators whose inputs are int8 in CPU kernels.
_COMBINING = {
    _ATEN.add.Tensor, _ATEN.add_.Tensor, _ATEN.mul.Tensor, _ATEN.mul_.Tensor, _ATEN.cat.default, _ATEN.mean.dim,
}  # fmt: skip
#: Products of two activations, which have no weight and stay float32.
_PRODUCTS = {
    _ATEN.bmm.default, _ATEN.baddbmm.default, _ATEN._scaled_dot_product_flash_attention_for_cpu.default,
    _ATEN._scaled_dot_product_efficient_attention.default, _ATEN._scaled_dot_product_attention_math.default,
}  # fmt: skip
#: Operators that return float32, from inputs with levels if a convolution computes them.
_FLOAT = {
    _ATEN.gelu.default, _ATEN.native_layer_norm.default, _ATEN.native_group_norm.default, _ATEN._softmax.default,
    _ATEN.native_batch_norm.default, _ATEN._native_batch_norm_legit_no_training.default,
}  # fmt: skip
#: Functions that read a rounded input; a ReLU is part of the layer before it.
_BENDING = {
    _ATEN.hardswish.default, _ATEN.hardsigmoid.default, _ATEN.sigmoid.default, _ATEN.tanh.default, _ATEN.elu.default,
    _ATEN.leaky_relu.default, _ATEN.mish.default,
}  # fmt: skip
#: The ranges of a calibration by ``minmax``.
EXTREMES: tuple[Method, float] = ("minmax", 100.0)
_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
#: Not a form of an ONNX file: a GPU reads the factors of a float32 graph with 10 bits of mantissa.
TF32 = "tf32"
#: float32 keeps 23 bits of the mantissa, TF32 the upper 10 of them.
_TF32_DROPPED = 13


class Simulation(nn.Module):
    """A float32 module in ``form``, one of ``targets.FORMS`` but fp32, TF32, or IN_ORDER.

    fp32-in-order: each result of a convolution or linear layer is its bias, to which the products are added one after
    another, each sum rounded to float32 (once, if the CPU has a fused multiply-add).
    tf32: the inputs of convolutions and linear layers are rounded; biases and sums are not.
    fp16 and bf16: weights and every intermediate result are rounded; sums are float32.
    int8-u8: the inputs of convolutions, linear layers, sums and concatenations have 256 levels between their extremes
    in the batch, and so do the logits. int8-s8: the inputs of convolutions and linear layers have 127 levels on each
    side of zero. In both, weights have ``weight_bits`` around zero and one scale for each output channel, and products
    of two activations, norms and what reads only their results are float32. With ``ranges`` of another method than
    ``minmax``, with the percentage of ``percentile``, levels reach from end to end of the range that this method finds
    in the batch, and values beyond it become its ends.
    ``plan`` scales layers before that, and keeps some in float32.
    """

    def __init__(
        self,
        module: nn.Module,
        form: str,
        *,
        weight_bits: int = 8,
        plan: LayerPlan = PLAIN,
        ranges: tuple[Method, float] = EXTREMES,
    ) -> None:
        super().__init__()
        self._module = copy.deepcopy(module).float()
        parameters = dict(self._module.named_parameters())
        multiplied: Container[str] = parameters
        if isinstance(self._module, fx.GraphModule):
            multiplied = multiplied_weights(self._module)
            _name_products(self._module)
        _scale(parameters, plan)
        self._form, self._ranges = form, ranges
        self._mode: _Rounding | _Quantizing | _Tf32 | _InOrder
        if form == TF32:
            self._mode = _Tf32()  # type: ignore[no-untyped-call]
        elif form == IN_ORDER:
            self._mode = _InOrder()  # type: ignore[no-untyped-call]
        elif form in _DTYPES:
            self._mode = _Rounding(_DTYPES[form])
            _replace(self._module.parameters(), lambda weight: weight.to(_DTYPES[form]).float())
        else:
            kept = {parameters[name].untyped_storage().data_ptr() for name in plan.weights}
            stored = {value.untyped_storage().data_ptr() for value in self._module.state_dict().values()}
            self._mode = _Quantizing(symmetric=form == "int8-s8", kept=kept, stored=stored, ranges=ranges)
            quantized = (name for name in parameters if name in multiplied and name not in plan.weights)
            weights = (parameters[name] for name in quantized if parameters[name].dim() > 1)
            _replace(weights, lambda weight: _per_channel(weight, 2 ** (weight_bits - 1) - 1))

    @property
    def peak(self) -> float:
        """Largest absolute activation so far, before rounding."""
        return self._mode.peak

    def forward(self, images: Tensor) -> Tensor:
        """(N,3,S,S) to logits (N,K)."""
        if self._form in _DTYPES:
            with self._mode:
                return cast(Tensor, self._module(images.to(_DTYPES[self._form]).float()))
        # A tensor object of its own, so that the caller's tensor is not marked.
        given = _exact(images.detach())
        with self._mode:
            logits = cast(Tensor, self._module(given))
        return _asymmetric(logits, self._ranges) if self._form == "int8-u8" and not _is_exact(logits) else logits


def _name_products(graph_module: fx.GraphModule) -> None:
    """Let the linear layers and products of a graph tell by their shapes whether their results stay float32.

    The operators that torch dispatches to are the same for a map (N,I) and for tokens (N,T,I).
    """
    for node in graph_module.graph.nodes:
        if node.target is _ATEN.linear.default:
            node.target = _linear
        elif node.target is _ATEN.matmul.default:
            node.target = _matmul
    graph_module.recompile()


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if x.dim() == 2:
        return nn.functional.linear(x, weight, bias)
    result = _exact(x.reshape(-1, x.shape[-1]) @ weight.t())
    rows = result if bias is None else result + bias
    return cast(Tensor, _exact(rows.reshape(*x.shape[:-1], -1)))


def _matmul(x: Tensor, other: Tensor) -> Tensor:
    return cast(Tensor, _exact(torch.matmul(x, other)))


def _scale(parameters: dict[str, nn.Parameter], plan: LayerPlan) -> None:
    scaled = plan.scaled({name: parameter.detach().numpy() for name, parameter in parameters.items()})
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(torch.from_numpy(scaled[name]))


def _replace(parameters: Iterable[Tensor], change: Callable[[Tensor], Tensor]) -> None:
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(change(parameter))


def _per_channel(weight: Tensor, levels: int) -> Tensor:
    scale = weight.abs().flatten(1).amax(1).reshape(-1, *[1] * (weight.dim() - 1)).clamp(min=1e-30) / levels
    return (weight / scale).round() * scale


def _symmetric(values: Tensor, ranges: tuple[Method, float]) -> Tensor:
    low, high = _ends(values, ranges)
    scale = torch.maximum(low.abs(), high.abs()).clamp(min=1e-30) / 127
    return (values / scale).round().clamp(-127, 127) * scale


def _asymmetric(values: Tensor, ranges: tuple[Method, float]) -> Tensor:
    low, high = _ends(values, ranges)
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = (high - low).clamp(min=1e-30) / 255
    zero = (-low / scale).round()
    return ((values / scale).round() + zero).clamp(0, 255).sub(zero) * scale


def _ends(values: Tensor, ranges: tuple[Method, float]) -> tuple[Tensor, Tensor]:
    """The ends of the range of ``values``, scalars."""
    if ranges[0] == "minmax":
        return values.min(), values.max()
    found = range_of(with_values(EMPTY, values.detach().numpy()), *ranges)
    return torch.tensor(found.low), torch.tensor(found.high)


def round_tf32(values: Tensor) -> Tensor:
    """float32 values rounded to TF32's 10 bits of mantissa, ties to even; values that are not finite are unchanged."""
    bits = values.contiguous().view(torch.int32)
    half = (1 << (_TF32_DROPPED - 1)) - 1
    rounded = (bits + half + ((bits >> _TF32_DROPPED) & 1)) & -(1 << _TF32_DROPPED)
    return torch.where(torch.isfinite(values), rounded.view(torch.float32), values)


class _Tf32(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Rounds the inputs of products."""

    peak = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _MULTIPLYING:
            # A bias has one dimension and is added in float32.
            read = (round_tf32(v) if isinstance(v, Tensor) and v.dim() > 1 else v for v in args)
            args = tuple(read)
        return func(*args, **(kwargs or {}))


class _InOrder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds the products of a layer one after another to its bias."""

    peak = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _ATEN.convolution.default and args[0].dim() == 4 and not args[6]:
            x, weight, bias, strides, pads, dilations, _, _, groups = args
            padded = nn.functional.pad(x, (pads[1], pads[1], pads[0], pads[0]))
            return torch.stack([_convolved(image, weight, bias, strides, dilations, groups) for image in padded])
        if func is _ATEN.addmm.default:
            return _added_in_order(args[1].t(), args[2].t(), args[0]).t().contiguous()
        if func is _ATEN.mm.default:
            return _added_in_order(args[0].t(), args[1].t(), None).t().contiguous()
        return func(*args, **(kwargs or {}))


def _convolved(
    image: Tensor, weight: Tensor, bias: Tensor | None, strides: list[int], dilations: list[int], groups: int
) -> Tensor:
    """A padded image (C,H,W) to the result (O,h,w) of a convolution, whose products are added in order."""
    outputs, inputs, *kernel = weight.shape
    rows, columns = (
        (image.shape[1 + axis] - dilations[axis] * (kernel[axis] - 1) - 1) // strides[axis] + 1 for axis in (0, 1)
    )
    start = torch.zeros(outputs) if bias is None else bias
    # (groups, outputs or inputs of a group, pixels)
    result = start.reshape(groups, -1, 1).repeat(1, 1, rows * columns)
    for y in range(kernel[0]):
        for x in range(kernel[1]):
            top, left = y * dilations[0], x * dilations[1]
            part = image[:, top :: strides[0], left :: strides[1]][:, :rows, :columns]
            read = part.reshape(groups, inputs, 1, -1)
            factors = weight[:, :, y, x].reshape(groups, -1, inputs, 1)
            for channel in range(inputs):
                result.addcmul_(read[:, channel], factors[:, :, channel])
    return result.reshape(outputs, rows, columns)


def _added_in_order(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(I,N) and (O,I) to (O,N), the products added in order."""
    result = torch.zeros(len(weight), x.shape[1]) if bias is None else bias.reshape(-1, 1).repeat(1, x.shape[1])
    for row, factors in zip(x.contiguous(), weight.t().contiguous(), strict=True):
        result.addcmul_(row[None], factors[:, None])
    return result


class _Rounding(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Rounds the result of each operator, including operators that work in place."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0.0
        self._dtype = dtype

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not isinstance(result, Tensor) or result.dtype != torch.float32:
            return result
        self.peak = _larger(self.peak, result)
        rounded = result.to(self._dtype).float()
        return result.copy_(rounded) if func._schema.is_mutable else rounded


class _Quantizing(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Quantizes the inputs of layers that multiply or combine; parameters have been quantized before.

    A layer whose weight is in the storage ``kept`` multiplies and returns float32, and so does every operator whose
    inputs are all such results. The form for TensorRT quantizes only inputs of int8 layers, so a kept layer reads its
    input unrounded there.
    """

    def __init__(
        self,
        *,
        symmetric: bool,
        kept: Set[int],
        stored: Set[int] = frozenset(),
        ranges: tuple[Method, float] = EXTREMES,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0.0
        self._symmetric = symmetric
        self._kept = kept
        self._stored = stored
        self._ranges = ranges

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _MULTIPLYING:
            # Convolutions and products read (input, weight), a linear layer with bias (bias, input, weight).
            place = 1 if func is _ATEN.addmm.default else 0
            if args[place + 1].untyped_storage().data_ptr() in self._kept:
                read = args[place] if self._symmetric or _is_exact(args[place]) else self._read(args[place])
                return _exact(func(*args[:place], read, *args[place + 1 :], **kwargs))
            return func(*args[:place], self._read(args[place]), *args[place + 1 :], **kwargs)
        if (read := list(_maps(args))) and all(map(_is_exact, read)):
            return _exact(func(*args, **kwargs))
        return func(*args, **kwargs) if self._symmetric else self._between_layers(func, args, kwargs)

    def _between_layers(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the form for CPUs computes between layers with weights."""
        if func is _ATEN.silu.default:
            given = self._inexact(args[0])
            return given * self._read(torch.sigmoid(given))
        if func in _PRODUCTS or func in _FLOAT or (func in _COMBINING and any(map(self._is_stored, _maps(args)))):
            return _exact(func(*map(self._inexact, args), **kwargs))
        if func in _BENDING:
            return func(*map(self._inexact, args), **kwargs)
        return func(*map(self._read, args), **kwargs) if func in _COMBINING else func(*args, **kwargs)

    def _is_stored(self, value: Tensor) -> bool:
        return value.numel() > 1 and value.untyped_storage().data_ptr() in self._stored

    def _inexact(self, value: Any) -> Any:
        """``value`` as it is read outside of layers: float32 results and constants have no levels."""
        if isinstance(value, list):
            return [self._inexact(item) for item in value]
        exact = not isinstance(value, Tensor) or _is_exact(value) or self._is_stored(value)
        return value if exact else self._read(value)

    def _read(self, value: Any) -> Any:
        if isinstance(value, list) and value and isinstance(value[0], Tensor):
            return [self._read(item) for item in value]
        if not isinstance(value, Tensor) or value.dtype != torch.float32 or value.dim() < 2:
            return value
        self.peak = _larger(self.peak, value)
        return _symmetric(value, self._ranges) if self._symmetric else _asymmetric(value, self._ranges)


def _maps(arguments: Iterable[Any]) -> Iterator[Tensor]:
    """The activations among an operator's arguments; scalars and vectors are parts of the operator."""
    for value in arguments:
        if isinstance(value, Tensor) and value.dim() >= 2:
            yield value
        elif isinstance(value, list | tuple):
            yield from _maps(value)


def _exact(result: Any) -> Any:
    """Mark a result as computed in float32; the mark is an attribute of the tensor and ends with it."""
    for values in _maps([result]):
        values._kdexport_exact = True  # type: ignore[attr-defined]
    return result


def _is_exact(values: Any) -> bool:
    return getattr(values, "_kdexport_exact", False)


def _larger(peak: float, values: Tensor) -> float:
    if not values.numel():
        return peak
    largest = values.abs().max().item()
    # NaN comes from an overflow and counts as one, although it compares as smaller than any peak.
    return math.inf if math.isnan(largest) else max(peak, largest)
