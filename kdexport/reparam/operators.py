"""Reads one operator of a functional graph as a linear map: a layer, a sum or a concatenation."""

import operator
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from kdexport.errors import ReparamError
from kdexport.reparam.convolution import (
    Convolution,
    Padding,
    PaddingMode,
    eval_norm,
    from_batch_norm,
    identity,
    pool_convolution,
    same_padding,
    scale,
    shift,
)
from kdexport.reparam.evaluation import Evaluation

_ATEN = torch.ops.aten

CONVS = {
    _ATEN.conv1d.default, _ATEN.conv2d.default, _ATEN.conv3d.default, _ATEN.conv1d.padding, _ATEN.conv2d.padding,
    _ATEN.conv3d.padding, _ATEN.convolution.default,
}  # fmt: skip

TRANSPOSED = {
    _ATEN.conv_transpose1d.default, _ATEN.conv_transpose2d.input, _ATEN.conv_transpose3d.input,
}  # fmt: skip

LINEARS = {_ATEN.linear.default, _ATEN.addmm.default, _ATEN.mm.default}

NORMS = {
    _ATEN.batch_norm.default, _ATEN._native_batch_norm_legit_no_training.default, _ATEN.native_batch_norm.default,
}  # fmt: skip

#: Operators with weights that a merge can rewrite.
LAYERS = CONVS | TRANSPOSED | LINEARS | NORMS


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """``nodes``, the last one the result, compute ``conv`` of ``source``; ``border`` (C,) is what it pads by."""

    source: fx.Node
    conv: Convolution
    nodes: tuple[fx.Node, ...]
    kind: str
    border: Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Sum:
    """The sum of ``operands`` times ``coefficients``."""

    operands: tuple[fx.Node, ...]
    coefficients: tuple[float, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Concat:
    """``operands`` side by side along the channels."""

    operands: tuple[fx.Node, ...]


Operator = Layer | Sum | Concat

#: Place in memory, shape and steps of a weight.
WeightKey = tuple[int, tuple[int, ...], tuple[int, ...]]


def arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of an operator by name, defaults included."""
    schema = node.target._schema  # type: ignore[union-attr]
    bound = {item.name: item.default_value for item in schema.arguments if item.has_default_value()}
    bound.update((item.name, value) for item, value in zip(schema.arguments, node.args, strict=False))
    return {**bound, **node.kwargs}


def module_paths(names: list[str]) -> list[str]:
    """The modules that parameters of these names belong to, each once, in order."""
    return [path for path in dict.fromkeys(name.rpartition(".")[0] for name in names) if path]


class GraphContext:
    """The shapes, constants and shared weights of a graph, which reading one of its operators needs.

    Layers whose weights are among ``kept`` are not read: several places use these, and merges would differ.
    """

    def __init__(self, evaluation: Evaluation, kept: Collection[WeightKey] = ()) -> None:
        self.evaluation = evaluation
        self.shapes, self.constants = evaluation.shapes, evaluation.constants
        self._kept = kept
        self.uses: Counter[WeightKey] = Counter()
        for node in evaluation.graph.nodes:
            if node.target in LAYERS and node not in self.constants:
                self.uses.update(self.keys(node))

    def weights(self, node: fx.Node) -> list[fx.Node]:
        """The parameters and buffers that the constant arguments of ``node`` are computed from."""
        found: dict[fx.Node, None] = {}
        pending = [item for item in node.all_input_nodes if item in self.constants]
        while pending:
            item = pending.pop(0)
            if item.op == "get_attr":
                found[item] = None
            pending.extend(item.all_input_nodes)
        return list(found)

    def keys(self, node: fx.Node) -> set[WeightKey]:
        """What tells the weights of ``node`` from others: their places in memory, shapes and steps."""
        return {self._key(root) for root in self.weights(node)}

    def require_separate_weights(self, node: fx.Node) -> None:
        """Raise ``ReparamError`` where another layer reads a weight of ``node`` too and both must keep it."""
        for root in self.weights(node):
            key = self._key(root)
            if key in self._kept:
                raise ReparamError(
                    f"{root.target} is used at {self.uses[key]} places, whose merges differ: a set of weights for each "
                    "place would need more weights.",
                    remedy="Give each place its own weights.",
                )

    def constant(self, value: Any) -> Any:
        """The value of a constant node, None for another node; anything else is returned as it is."""
        return self.constants.get(value) if isinstance(value, fx.Node) else value

    def per_channel(self, value: Any, shape: tuple[int, ...]) -> float | Tensor | None:
        """A constant scalar, or a constant that broadcasts over ``shape`` as one value per channel; None otherwise."""
        constant = self.constant(value)
        if constant is None or isinstance(constant, int | float):
            return constant
        if not isinstance(constant, Tensor):
            return None
        if constant.numel() == 1 and constant.dim() <= len(shape):
            return float(constant)
        sizes = [1] * (len(shape) - constant.dim()) + list(constant.shape)
        only_channels = len(sizes) == len(shape) and all(s == 1 for axis, s in enumerate(sizes) if axis != 1)
        return constant.flatten() if only_channels and sizes[1] == shape[1] else None

    def place(self, node: fx.Node) -> str:
        """Where in the module ``node`` is: the path of its weights, or else of the module that calls it."""
        paths = module_paths([str(root.target) for root in self.weights(node)])
        stack = [str(path) for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
        called = stack[-1].removeprefix("L['self'].") if stack else ""
        return paths[0] if paths else f"{called} ({node.name})" if called else node.name

    def _key(self, root: fx.Node) -> WeightKey:
        value: Any = self.evaluation.module
        for part in str(root.target).split("."):
            value = getattr(value, part)
        return value.data_ptr(), tuple(value.shape), tuple(value.stride())


_MOVES = {
    _ATEN.slice.Tensor, _ATEN.slice_scatter.default, _ATEN.copy.default, _ATEN.expand.default, _ATEN.view.default,
    _ATEN.clone.default,
}  # fmt: skip

_PADS = {_ATEN.pad.default, _ATEN.constant_pad_nd.default}


def read_reduction(node: fx.Node, context: GraphContext) -> Operator | None:
    """A sum or mean over the axis along which tensors were stacked."""
    given = arguments(node)
    stacked = given["self"]
    axes = given["dim"] or []
    if len(axes) != 1 or given["keepdim"] or given["dtype"] is not None or len(stacked.users) != 1:
        return None
    axis = axes[0] % len(context.shapes[stacked])
    operands = _stacked(stacked, axis, context)
    shape = context.shapes[node]
    if (
        not operands
        or len(operands) < 2
        or any(context.shapes.get(item) != shape or item in context.constants for item in operands)
    ):
        return None
    factor = 1.0 / len(operands) if node.target is _ATEN.mean.dim else 1.0
    return Sum(operands, (factor,) * len(operands))


def _stacked(node: fx.Node, axis: int, context: GraphContext) -> tuple[fx.Node, ...] | None:
    rank = len(context.shapes[node])
    if node.target is _ATEN.stack.default:
        given = arguments(node)
        return tuple(given["tensors"]) if given["dim"] % rank == axis else None
    if node.target is _ATEN.cat.default:
        given = arguments(node)
        parts = given["tensors"]
        inner = all(
            part.target is _ATEN.unsqueeze.default and part.args[1] % rank == axis and len(part.users) == 1
            for part in parts
        )
        return tuple(part.args[0] for part in parts) if inner and given["dim"] % rank == axis else None
    # A stack decomposes into a concatenation and a view.
    joined = node.args[0] if node.target is _ATEN.view.default else None
    if not isinstance(joined, fx.Node) or joined.target is not _ATEN.cat.default or len(joined.users) != 1:
        return None
    given = arguments(joined)
    shape = context.shapes[given["tensors"][0]]
    whole = (*shape[:axis], len(given["tensors"]), *shape[axis:]) == context.shapes[node]
    return tuple(given["tensors"]) if whole and given["dim"] % len(shape) == axis else None


def read_cat(node: fx.Node, context: GraphContext) -> Operator | None:
    """A concatenation along the channels."""
    given = arguments(node)
    operands = tuple(given["tensors"])
    along_channels = given["dim"] % len(context.shapes[node]) == 1
    if not along_channels or len(operands) < 2 or any(item in context.constants for item in operands):
        return None
    return Concat(operands)


def read_pad_with_border(node: fx.Node, context: GraphContext) -> Operator | None:
    """Zero padding whose border is then overwritten, slice by slice, with one constant per channel.

    The chain of slices and copies only moves values, so running it on two different tensors shows where each value
    goes: the inside must be the tensor itself and the border must not depend on it.
    """
    region = _moves_from_a_pad(node, context)
    if region is None:
        return None
    pad = next(item for item in region if item.target in _PADS)
    given = arguments(pad)
    source, sides = given["self"], given["pad"]
    if given.get("mode", "constant") != "constant" or any(side < 0 for side in sides):
        return None
    shape = context.shapes[source]
    dims = len(shape) - 2
    sides = [*sides, *[0] * (2 * dims - len(sides))]
    fixed = all(isinstance(size, int) for size in source.meta["val"].shape[2:])
    if dims < 1 or len(sides) != 2 * dims or not fixed:
        return None
    pairs = tuple(reversed([(sides[2 * axis], sides[2 * axis + 1]) for axis in range(dims)]))
    border = _border(node, source, pairs, context)
    if border is None:
        return None
    conv = replace(identity(shape[1], dims), padding=pairs)
    return Layer(source, conv, region, "padding", border)


def _moves_from_a_pad(node: fx.Node, context: GraphContext) -> tuple[fx.Node, ...] | None:
    region, pending = {node}, [node]
    while pending:
        for item in pending.pop().all_input_nodes:
            if item in region or item in context.constants or item in context.evaluation.scalars:
                continue
            if item.target not in _MOVES | _PADS:
                return None
            region.add(item)
            if item.target not in _PADS:
                pending.append(item)
    inner = region - {node}
    closed = all(user in region for item in inner for user in item.users)
    if not closed or sum(item.target in _PADS for item in region) != 1:
        return None
    return tuple(item for item in node.graph.nodes if item in region)


def _border(node: fx.Node, source: fx.Node, pairs: tuple[tuple[int, int], ...], context: GraphContext) -> Tensor | None:
    shape = context.shapes[source]
    probe = torch.arange(1, 1 + torch.Size(shape).numel(), dtype=torch.float64).reshape(shape)
    inside: list[Any] = [slice(None)] * 2
    inside += [slice(before, before + size) for (before, _), size in zip(pairs, shape[2:], strict=True)]
    outside = torch.ones(context.shapes[node][2:], dtype=torch.bool)
    outside[tuple(inside[2:])] = False
    values = []
    for factor in (1.0, -3.0):
        result = context.evaluation.compute([node], {source: probe * factor})[0]
        if not torch.equal(result[tuple(inside)], probe * factor):
            return None
        values.append(result[:, :, outside])
    first = values[0][:1, :, :1]
    same = all(torch.equal(value, first.expand_as(value)) for value in values) and bool(outside.any())
    return first.flatten() if same else None


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


def read(node: fx.Node, context: GraphContext) -> Operator | None:
    """The linear map that ``node`` is, or None. Raises ``ReparamError`` for one that looks linear and is not."""
    if node not in context.shapes or node in context.constants or len(context.shapes[node]) < 2:
        return None
    value = node.meta.get("val")
    reader = _READERS.get(node.target)
    if reader is None or not isinstance(value, Tensor) or not value.is_floating_point():
        return None
    return reader(node, context)


def _conv(node: fx.Node, context: GraphContext) -> Operator | None:
    given = arguments(node)
    weight, bias = context.constant(given["weight"]), context.constant(given["bias"])
    source = given["input"]
    if weight is None or (bias is None) != (given["bias"] is None):
        return None
    if given.get("transposed", node.target in TRANSPOSED):
        return _transposed_conv(node, context)
    dims = weight.dim() - 2
    if len(context.shapes[source]) != weight.dim():
        return None
    context.require_separate_weights(node)
    stride, dilation = _spread(given["stride"], dims), _spread(given["dilation"], dims)
    padding: Padding
    if isinstance(given["padding"], str):
        padding = same_padding(tuple(weight.shape[2:]), dilation) if given["padding"] == "same" else ((0, 0),) * dims
    else:
        padding = tuple((side, side) for side in _spread(given["padding"], dims))
    bias = weight.new_zeros(weight.shape[0]) if bias is None else bias
    conv = Convolution(weight, bias, stride, dilation, padding, groups=given["groups"])
    return Layer(source, conv, (node,), "convolution")


def _transposed_conv(node: fx.Node, context: GraphContext) -> Operator | None:
    given = arguments(node)
    weight, bias, source, groups = (
        context.constant(given["weight"]),
        context.constant(given["bias"]),
        given["input"],
        given["groups"],
    )
    if len(context.shapes[source]) != weight.dim():
        return None
    context.require_separate_weights(node)
    weight = swap_channels(weight, groups)
    dims = weight.dim() - 2
    padding = tuple((side, side) for side in _spread(given["padding"], dims))
    bias = weight.new_zeros(weight.shape[0]) if bias is None else bias
    stride, dilation, extra = (_spread(given[name], dims) for name in ("stride", "dilation", "output_padding"))
    conv = Convolution(weight, bias, stride, dilation, padding, groups=groups, output_padding=extra)
    return Layer(source, conv, (node,), "transposed convolution")


def swap_channels(weight: Tensor, groups: int) -> Tensor:
    """The weight of a transposed convolution, (I,O/g,*K) as torch stores it, as (O,I/g,*K), and back."""
    parts = weight.reshape(groups, -1, *weight.shape[1:]).transpose(1, 2)
    return parts.reshape(-1, parts.shape[2], *weight.shape[2:])


def _linear(node: fx.Node, context: GraphContext) -> Operator | None:
    given = arguments(node)
    if node.target is _ATEN.linear.default:
        source, weight, bias = given["input"], context.constant(given["weight"]), given["bias"]
    elif node.target is _ATEN.addmm.default:
        if given["beta"] != 1 or given["alpha"] != 1:
            return None
        source, weight, bias = given["mat1"], context.constant(given["mat2"]), given["self"]
    else:
        source, weight, bias = given["self"], context.constant(given["mat2"]), None
    known = context.constant(bias)
    if weight is None or source in context.constants or len(context.shapes[source]) != 2 or weight.dim() != 2:
        return None
    weight = weight if node.target is _ATEN.linear.default else weight.t()
    if (known is None and bias is not None) or (known is not None and known.shape != weight.shape[:1]):
        return None
    context.require_separate_weights(node)
    return Layer(
        source,
        Convolution(weight, weight.new_zeros(weight.shape[0]) if known is None else known, (), (), ()),
        (node,),
        "linear layer",
    )


def _norm(node: fx.Node, context: GraphContext) -> Operator | None:
    given = arguments(node)
    mean, variance = context.constant(given["running_mean"]), context.constant(given["running_var"])
    if mean is None or variance is None or given.get("training"):
        raise ReparamError(
            "A batch norm uses the statistics of the batch: its output depends on the other images.",
            remedy="Train with track_running_stats=True and export in evaluation mode.",
        )
    context.require_separate_weights(node)
    norm = eval_norm(mean, variance, context.constant(given["weight"]), context.constant(given["bias"]), given["eps"])
    source = given["input"]
    return Layer(source, from_batch_norm(norm, len(context.shapes[source]) - 2), (node,), "batch norm")


def _item(node: fx.Node, context: GraphContext) -> Operator | None:
    """The first of the three results that a decomposed batch norm has."""
    norm, index = node.args
    if not isinstance(norm, fx.Node) or norm.target not in NORMS or index != 0 or len(norm.users) != 1:
        return None
    layer = _norm(norm, context)
    return replace(layer, nodes=(norm, node)) if isinstance(layer, Layer) else None


def _pool(node: fx.Node, context: GraphContext) -> Operator | None:
    given = arguments(node)
    source = next(iter(node.all_input_nodes))
    shape = context.shapes[source]
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


def _pad(node: fx.Node, context: GraphContext) -> Operator | None:
    given = arguments(node)
    source = next(iter(node.all_input_nodes))
    sides = given["pad"] if "pad" in given else given["padding"]
    dims = len(context.shapes[source]) - 2
    mode = _MODES.get(node.target) or _NAMED_MODES[given["mode"]]
    plain = all(isinstance(side, int) for side in sides)
    if not plain or any(sides[2 * dims :]) or len(sides) % 2:
        return None
    sides = [*sides, *[0] * (2 * dims - len(sides))]
    pairs = tuple(reversed([(sides[2 * axis], sides[2 * axis + 1]) for axis in range(dims)]))
    channels = context.shapes[source][1]
    conv = replace(identity(channels, dims), padding=pairs, padding_mode=mode)
    value = given.get("value") or 0.0
    border = torch.full((channels,), float(value), dtype=torch.float64) if value and mode == "zeros" else None
    return Layer(source, conv, (node,), "padding", border)


def _same(node: fx.Node, context: GraphContext) -> Operator | None:
    source = node.all_input_nodes[0]
    if context.shapes.get(source) != context.shapes[node] or arguments(node).get("train"):
        return None
    shape = context.shapes[node]
    return Layer(source, identity(shape[1], len(shape) - 2), (node,), "identity")


def _sum(node: fx.Node, context: GraphContext) -> Operator | None:
    sign = _SIGNS[node.target]
    given = arguments(node)
    first, second, alpha = given["self"], given["other"], given.get("alpha", 1)
    shape = context.shapes[node]
    if not isinstance(alpha, int | float):
        return None
    factor = sign * alpha
    one, two = context.per_channel(first, shape), context.per_channel(second, shape)
    if one is None and two is None:
        same = all(isinstance(x, fx.Node) and context.shapes.get(x) == shape for x in (first, second))
        return Sum((first, second), (1.0, factor)) if same else None
    source, coefficient, offset = (second, factor, one) if two is None else (first, 1.0, two)
    if not isinstance(source, fx.Node) or context.shapes.get(source) != shape or offset is None:
        return None
    moved = shift(scale(identity(shape[1], len(shape) - 2), coefficient), offset if two is None else factor * offset)
    return Layer(source, moved, (node,), "shift")


def _product(node: fx.Node, context: GraphContext) -> Operator | None:
    given = arguments(node)
    first, second = given["self"], given["other"]
    shape, divides = context.shapes[node], node.target in (_ATEN.div.Tensor, _ATEN.div.Scalar)
    factor, source = context.per_channel(second, shape), first
    if factor is None and not divides:
        factor, source = context.per_channel(first, shape), second
    if factor is None or not isinstance(source, fx.Node) or context.shapes.get(source) != shape:
        return None
    factor = 1.0 / factor if divides else factor
    return Layer(source, scale(identity(shape[1], len(shape) - 2), factor), (node,), "scale")


def _negative(node: fx.Node, context: GraphContext) -> Operator | None:
    shape = context.shapes[node]
    return Layer(node.all_input_nodes[0], scale(identity(shape[1], len(shape) - 2), -1.0), (node,), "scale")


def _spread(value: Any, dims: int) -> tuple[int, ...]:
    values = [value] if isinstance(value, int) else list(value)
    return tuple(int(item) for item in (values * dims if len(values) == 1 else values))


_READERS: dict[Any, Callable[[fx.Node, GraphContext], Operator | None]] = {
    **dict.fromkeys(CONVS | TRANSPOSED, _conv),
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

#: Linear operators that treat each image of a batch alike, so that one image shows what they compute.
PER_IMAGE = frozenset(_READERS) - {_ATEN.slice_scatter.default, operator.getitem}
