"""Reads one operator of a functional graph as a linear map."""

import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from kdexport.errors import ReparamError
from kdexport.reparam.convolution import Convolution, Padding, PaddingMode, identity, scale, shift
from kdexport.reparam.gathering import read_cat, read_pad_with_border, read_reduction
from kdexport.reparam.layers import eval_norm, from_batch_norm, pool_convolution, same_padding
from kdexport.reparam.operators import CONVS, LINEARS, NORMS, Layer, Operator, Sum, Surroundings, arguments

_ATEN = torch.ops.aten
_MODES: dict[Any, PaddingMode] = {
    _ATEN.constant_pad_nd.default: "zeros",
    _ATEN.reflection_pad1d.default: "reflect", _ATEN.reflection_pad2d.default: "reflect",
    _ATEN.reflection_pad3d.default: "reflect", _ATEN.replication_pad1d.default: "replicate",
    _ATEN.replication_pad2d.default: "replicate", _ATEN.replication_pad3d.default: "replicate",
}  # fmt: skip
_NAMED_MODES: dict[str, PaddingMode] = {
    "constant": "zeros", "reflect": "reflect", "replicate": "replicate", "circular": "circular",
}  # fmt: skip
_SIGNS: dict[Any, float] = {
    _ATEN.add.Tensor: 1.0,
    _ATEN.add.Scalar: 1.0,
    _ATEN.sub.Tensor: -1.0,
    _ATEN.sub.Scalar: -1.0,
}


def read(node: fx.Node, around: Surroundings) -> Operator | None:
    """The linear map that ``node`` is, or None. Raises ``ReparamError`` for one that looks linear and is not."""
    if node not in around.shapes or node in around.constants or len(around.shapes[node]) < 2:
        return None
    value = node.meta.get("val")
    reader = _READERS.get(node.target)
    if reader is None or not isinstance(value, Tensor) or not value.is_floating_point():
        return None
    return reader(node, around)


def _conv(node: fx.Node, around: Surroundings) -> Operator | None:
    given = arguments(node)
    weight, bias = around.constant(given["weight"]), around.constant(given["bias"])
    source = given["input"]
    if weight is None or (bias is None) != (given["bias"] is None) or given.get("transposed"):
        return None
    dims = weight.dim() - 2
    if len(around.shapes[source]) != weight.dim():
        return None
    around.require_own_weights(node)
    stride, dilation = _spread(given["stride"], dims), _spread(given["dilation"], dims)
    padding: Padding
    if isinstance(given["padding"], str):
        padding = same_padding(tuple(weight.shape[2:]), dilation) if given["padding"] == "same" else ((0, 0),) * dims
    else:
        padding = tuple((side, side) for side in _spread(given["padding"], dims))
    bias = weight.new_zeros(weight.shape[0]) if bias is None else bias
    conv = Convolution(weight, bias, stride, dilation, padding, groups=given["groups"])
    return Layer(source, conv, (node,), "convolution")


def _linear(node: fx.Node, around: Surroundings) -> Operator | None:
    given = arguments(node)
    if node.target is _ATEN.linear.default:
        source, weight, bias = given["input"], around.constant(given["weight"]), given["bias"]
    elif node.target is _ATEN.addmm.default:
        if given["beta"] != 1 or given["alpha"] != 1:
            return None
        source, weight, bias = given["mat1"], around.constant(given["mat2"]), given["self"]
    else:
        source, weight, bias = given["self"], around.constant(given["mat2"]), None
    known = around.constant(bias)
    if weight is None or source in around.constants or len(around.shapes[source]) != 2 or weight.dim() != 2:
        return None
    weight = weight if node.target is _ATEN.linear.default else weight.t()
    if (known is None and bias is not None) or (known is not None and known.shape != weight.shape[:1]):
        return None
    around.require_own_weights(node)
    return Layer(
        source,
        Convolution(weight, weight.new_zeros(weight.shape[0]) if known is None else known, (), (), ()),
        (node,),
        "linear layer",
    )


def _norm(node: fx.Node, around: Surroundings) -> Operator | None:
    given = arguments(node)
    mean, variance = around.constant(given["running_mean"]), around.constant(given["running_var"])
    if mean is None or variance is None or given.get("training"):
        raise ReparamError(
            "A batch norm uses the statistics of the batch: its output depends on the other images.",
            remedy="Train with track_running_stats=True and export in evaluation mode.",
        )
    around.require_own_weights(node)
    norm = eval_norm(mean, variance, around.constant(given["weight"]), around.constant(given["bias"]), given["eps"])
    source = given["input"]
    return Layer(source, from_batch_norm(norm, len(around.shapes[source]) - 2), (node,), "batch norm")


def _item(node: fx.Node, around: Surroundings) -> Operator | None:
    """The first of the three results that a decomposed batch norm has."""
    norm, index = node.args
    if not isinstance(norm, fx.Node) or norm.target not in NORMS or index != 0 or len(norm.users) != 1:
        return None
    layer = _norm(norm, around)
    return replace(layer, nodes=(norm, node)) if isinstance(layer, Layer) else None


def _pool(node: fx.Node, around: Surroundings) -> Operator | None:
    given = arguments(node)
    source = next(iter(node.all_input_nodes))
    shape = around.shapes[source]
    dims = len(shape) - 2
    if node.target is not (_ATEN.avg_pool1d, _ATEN.avg_pool2d, _ATEN.avg_pool3d)[max(dims, 1) - 1].default:
        return None
    kernel = _spread(given["kernel_size"], dims)
    conv = pool_convolution(
        shape[1],
        kernel,
        _spread(given["stride"], dims) if given["stride"] else kernel,
        _spread(given["padding"], dims),
        ceil_mode=given["ceil_mode"],
        count_include_pad=given["count_include_pad"],
        divisor_override=given.get("divisor_override"),
    )
    return Layer(source, conv, (node,), "average pooling")


def _pad(node: fx.Node, around: Surroundings) -> Operator | None:
    given = arguments(node)
    source = next(iter(node.all_input_nodes))
    sides = given["pad"] if "pad" in given else given["padding"]
    dims = len(around.shapes[source]) - 2
    mode = _MODES.get(node.target) or _NAMED_MODES[given["mode"]]
    plain = all(isinstance(side, int) for side in sides)
    if not plain or any(sides[2 * dims :]) or len(sides) % 2:
        return None
    sides = [*sides, *[0] * (2 * dims - len(sides))]
    pairs = tuple(reversed([(sides[2 * axis], sides[2 * axis + 1]) for axis in range(dims)]))
    channels = around.shapes[source][1]
    conv = replace(identity(channels, dims), padding=pairs, padding_mode=mode)
    value = given.get("value") or 0.0
    border = torch.full((channels,), float(value), dtype=torch.float64) if value and mode == "zeros" else None
    return Layer(source, conv, (node,), "padding", border)


def _same(node: fx.Node, around: Surroundings) -> Operator | None:
    source = node.all_input_nodes[0]
    if around.shapes.get(source) != around.shapes[node] or arguments(node).get("train"):
        return None
    shape = around.shapes[node]
    return Layer(source, identity(shape[1], len(shape) - 2), (node,), "identity")


def _sum(node: fx.Node, around: Surroundings) -> Operator | None:
    sign = _SIGNS[node.target]
    given = arguments(node)
    first, second, alpha = given["self"], given["other"], given.get("alpha", 1)
    shape = around.shapes[node]
    if not isinstance(alpha, int | float):
        return None
    factor = sign * alpha
    one, two = around.per_channel(first, shape), around.per_channel(second, shape)
    if one is None and two is None:
        same = all(isinstance(x, fx.Node) and around.shapes.get(x) == shape for x in (first, second))
        return Sum((first, second), (1.0, factor)) if same else None
    source, coefficient, offset = (second, factor, one) if two is None else (first, 1.0, two)
    if not isinstance(source, fx.Node) or around.shapes.get(source) != shape or offset is None:
        return None
    moved = shift(scale(identity(shape[1], len(shape) - 2), coefficient), offset if two is None else factor * offset)
    return Layer(source, moved, (node,), "shift")


def _product(node: fx.Node, around: Surroundings) -> Operator | None:
    given = arguments(node)
    first, second = given["self"], given["other"]
    shape, divides = around.shapes[node], node.target in (_ATEN.div.Tensor, _ATEN.div.Scalar)
    factor, source = around.per_channel(second, shape), first
    if factor is None and not divides:
        factor, source = around.per_channel(first, shape), second
    if factor is None or not isinstance(source, fx.Node) or around.shapes.get(source) != shape:
        return None
    factor = 1.0 / factor if divides else factor
    return Layer(source, scale(identity(shape[1], len(shape) - 2), factor), (node,), "scale")


def _negative(node: fx.Node, around: Surroundings) -> Operator | None:
    shape = around.shapes[node]
    return Layer(node.all_input_nodes[0], scale(identity(shape[1], len(shape) - 2), -1.0), (node,), "scale")


def _spread(value: Any, dims: int) -> tuple[int, ...]:
    values = [value] if isinstance(value, int) else list(value)
    return tuple(int(item) for item in (values * dims if len(values) == 1 else values))


_READERS: dict[Any, Callable[[fx.Node, Surroundings], Operator | None]] = {
    **dict.fromkeys(CONVS, _conv),
    **dict.fromkeys(LINEARS, _linear),
    _ATEN.batch_norm.default: _norm,
    operator.getitem: _item,
    **dict.fromkeys((_ATEN.avg_pool1d.default, _ATEN.avg_pool2d.default, _ATEN.avg_pool3d.default), _pool),
    **dict.fromkeys((_ATEN.pad.default, *_MODES), _pad),
    **dict.fromkeys((_ATEN.clone.default, _ATEN.contiguous.default, _ATEN.detach.default, _ATEN.alias.default), _same),
    _ATEN.dropout.default: _same,
    **dict.fromkeys(_SIGNS, _sum),
    **dict.fromkeys((_ATEN.mul.Tensor, _ATEN.mul.Scalar, _ATEN.div.Tensor, _ATEN.div.Scalar), _product),
    _ATEN.neg.default: _negative,
    **dict.fromkeys((_ATEN.mean.dim, _ATEN.sum.dim_IntList), read_reduction),
    _ATEN.cat.default: read_cat,
    _ATEN.slice_scatter.default: read_pad_with_border,
}
