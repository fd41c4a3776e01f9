"""Reads operators that gather several tensors, or several writes to one tensor, as linear maps."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from kdexport.reparam.convolution import identity
from kdexport.reparam.operators import Concat, Layer, Operator, Sum, Surroundings, arguments

_ATEN = torch.ops.aten
_MOVES = {
    _ATEN.slice.Tensor, _ATEN.slice_scatter.default, _ATEN.copy.default, _ATEN.expand.default, _ATEN.view.default,
    _ATEN.clone.default,
}  # fmt: skip
_PADS = {_ATEN.pad.default, _ATEN.constant_pad_nd.default}


def read_reduction(node: fx.Node, around: Surroundings) -> Operator | None:
    """A sum or mean over the axis along which tensors were stacked."""
    given = arguments(node)
    stacked = given["self"]
    axes = given["dim"] or []
    if len(axes) != 1 or given["keepdim"] or given["dtype"] is not None or len(stacked.users) != 1:
        return None
    axis = axes[0] % len(around.shapes[stacked])
    operands = _stacked(stacked, axis, around)
    shape = around.shapes[node]
    if (
        not operands
        or len(operands) < 2
        or any(around.shapes.get(item) != shape or item in around.constants for item in operands)
    ):
        return None
    factor = 1.0 / len(operands) if node.target is _ATEN.mean.dim else 1.0
    return Sum(operands, (factor,) * len(operands))


def _stacked(node: fx.Node, axis: int, around: Surroundings) -> tuple[fx.Node, ...] | None:
    rank = len(around.shapes[node])
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
    shape = around.shapes[given["tensors"][0]]
    whole = (*shape[:axis], len(given["tensors"]), *shape[axis:]) == around.shapes[node]
    return tuple(given["tensors"]) if whole and given["dim"] % len(shape) == axis else None


def read_cat(node: fx.Node, around: Surroundings) -> Operator | None:
    """A concatenation along the channels."""
    given = arguments(node)
    operands = tuple(given["tensors"])
    along_channels = given["dim"] % len(around.shapes[node]) == 1
    if not along_channels or len(operands) < 2 or any(item in around.constants for item in operands):
        return None
    return Concat(operands)


def read_pad_with_border(node: fx.Node, around: Surroundings) -> Operator | None:
    """Zero padding whose border is then overwritten, slice by slice, with one constant per channel.

    The chain of slices and copies only moves values, so running it on two different tensors shows where each value
    goes: the inside must be the tensor itself and the border must not depend on it.
    """
    region = _moves_back_to_a_pad(node, around)
    if region is None:
        return None
    pad = next(item for item in region if item.target in _PADS)
    given = arguments(pad)
    source, sides = given["self"], given["pad"]
    if given.get("mode", "constant") != "constant" or any(side < 0 for side in sides):
        return None
    shape = around.shapes[source]
    dims = len(shape) - 2
    sides = [*sides, *[0] * (2 * dims - len(sides))]
    fixed = all(isinstance(size, int) for size in source.meta["val"].shape[2:])
    if dims < 1 or len(sides) != 2 * dims or not fixed:
        return None
    pairs = tuple(reversed([(sides[2 * axis], sides[2 * axis + 1]) for axis in range(dims)]))
    border = _border(node, source, pairs, around)
    if border is None:
        return None
    conv = replace(identity(shape[1], dims), padding=pairs)
    return Layer(source, conv, region, "padding", border)


def _moves_back_to_a_pad(node: fx.Node, around: Surroundings) -> tuple[fx.Node, ...] | None:
    region, pending = {node}, [node]
    while pending:
        for item in pending.pop().all_input_nodes:
            if item in region or item in around.constants or item in around.evaluation.scalars:
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


def _border(node: fx.Node, source: fx.Node, pairs: tuple[tuple[int, int], ...], around: Surroundings) -> Tensor | None:
    shape = around.shapes[source]
    probe = torch.arange(1, 1 + torch.Size(shape).numel(), dtype=torch.float64).reshape(shape)
    inside: list[Any] = [slice(None)] * 2
    inside += [slice(before, before + size) for (before, _), size in zip(pairs, shape[2:], strict=True)]
    outside = torch.ones(around.shapes[node][2:], dtype=torch.bool)
    outside[tuple(inside[2:])] = False
    values = []
    for factor in (1.0, -3.0):
        result = around.evaluation.compute([node], {source: probe * factor})[0]
        if not torch.equal(result[tuple(inside)], probe * factor):
            return None
        values.append(result[:, :, outside])
    first = values[0][:1, :, :1]
    same = all(torch.equal(value, first.expand_as(value)) for value in values) and bool(outside.any())
    return first.flatten() if same else None
