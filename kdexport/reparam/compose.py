"""Merges convolutions that read one input (summed or concatenated) and convolutions in sequence, with exact borders.

Each function raises ``ReparamError`` if the merge would not be exact.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from kdexport.errors import ReparamError
from kdexport.reparam import algebra
from kdexport.reparam.convolution import Convolution, Padding, PaddingMode, add_shifts


def expand_groups(conv: Convolution, groups: int) -> Convolution:
    """The same map with fewer groups: the kernel over the inputs that an output does not read is zero.

    ``groups`` divides the present count. Output o of old group j reads inputs j * I/g onwards.
    """
    ratio, rest = divmod(conv.groups, groups)
    if rest:
        raise ReparamError(
            f"Cannot rewrite a convolution with {conv.groups} groups as one with {groups}: {groups} must divide "
            f"{conv.groups}.",
            remedy="Pass a divisor of its groups.",
        )
    if ratio == 1:
        return conv
    width = conv.weight.shape[1]
    wide = conv.weight.new_zeros(conv.out_channels, width * ratio, *conv.kernel)
    per_group = conv.out_channels // conv.groups
    for group in range(conv.groups):
        rows, start = slice(group * per_group, (group + 1) * per_group), group % ratio * width
        wide[rows, start : start + width] = conv.weight[rows]
    return replace(conv, weight=wide, groups=groups)


def aligned_geometry(convs: Sequence[Convolution]) -> tuple[tuple[int, ...], tuple[int, ...], Padding, PaddingMode]:
    """(kernel, dilation, padding, mode) of the smallest convolution that holds the taps of all of them.

    The taps of a convolution lie at offsets k * dilation - before from p * stride. The union of all offsets spans from
    the smallest to the largest, in steps of the greatest common divisor of their differences. Exact if the strides and
    the slacks are equal, for then the output sizes agree for every input size, and if those that read outside agree on
    what lies there. Raises ``ReparamError`` otherwise.
    """
    first = convs[0]
    if any(conv.is_transposed for conv in convs):
        raise ReparamError(
            "A transposed convolution absorbs the batch norm after it, but is not summed with other branches.",
            remedy="Sum plain convolutions before the upsampling.",
        )
    for conv in convs:
        facts = [("inputs", c.in_channels, c.stride, c.slack) for c in (first, conv)]
        if facts[0] != facts[1]:
            raise ReparamError(
                f"Branches differ in channels, stride or slack (padding minus kernel span): {first.in_channels}, "
                f"{first.stride}, {first.slack} against {conv.in_channels}, {conv.stride}, {conv.slack}.",
                remedy="Only branches whose outputs agree in size for every input size can be merged.",
            )
    modes = {conv.padding_mode for conv in convs if conv.pads}
    if len(modes) > 1:
        raise ReparamError(
            f"Branches read different values outside the image: {', '.join(sorted(modes))}.",
            remedy="Give all padded branches one padding mode.",
        )
    kernel, dilation, padding = [], [], []
    for axis, slack in enumerate(first.slack):
        low = min(-conv.padding[axis][0] for conv in convs)
        high = max(conv.span[axis] - conv.padding[axis][0] for conv in convs)
        steps = [conv.dilation[axis] for conv in convs if conv.kernel[axis] > 1]
        step = math.gcd(*steps, *(-conv.padding[axis][0] - low for conv in convs)) or 1
        kernel.append((high - low) // step + 1)
        dilation.append(step)
        padding.append((-low, slack + high))
    return tuple(kernel), tuple(dilation), tuple(padding), next(iter(modes), "zeros")


def add(*convs: Convolution, coefficients: Sequence[float] | None = None) -> Convolution:
    """k parallel branches: W = sum c_i W_i with taps aligned by offset, b = sum c_i b_i, groups expanded to their gcd.

    Exact under the conditions of ``aligned_geometry`` and for one output channel count; raises ``ReparamError``
    otherwise.
    """
    if not convs or len({conv.out_channels for conv in convs}) > 1:
        raise ReparamError(
            f"Branches that write {[conv.out_channels for conv in convs]} channels cannot be summed.",
            remedy="Pass at least one branch, all of one output channel count.",
        )
    kernel, dilation, padding, mode = aligned_geometry(convs)
    groups = math.gcd(*(conv.groups for conv in convs))
    branches = []
    for conv in convs:
        placed = _place(expand_groups(conv, groups), kernel, dilation, padding)
        branches.append((placed, conv.bias))
    weight, bias = algebra.merge_branches(branches, [1.0] * len(convs) if coefficients is None else coefficients)
    return Convolution(weight, bias, convs[0].stride, dilation, padding, mode, groups)


def _place(conv: Convolution, kernel: tuple[int, ...], dilation: tuple[int, ...], padding: Padding) -> Tensor:
    placed = conv.weight.new_zeros(*conv.weight.shape[:2], *kernel)
    where = [slice(None), slice(None)]
    for axis, step in enumerate(dilation):
        start = (padding[axis][0] - conv.padding[axis][0]) // step
        stride = max(conv.dilation[axis] // step, 1) if conv.kernel[axis] > 1 else 1
        where.append(slice(start, start + stride * (conv.kernel[axis] - 1) + 1, stride))
    placed[tuple(where)] = conv.weight
    return placed


def concatenate(*convs: Convolution) -> Convolution:
    """Outputs side by side along the channels: rows of W and b are stacked, taps aligned as in ``add``.

    Grouped branches are expanded to one group, because the outputs of one group would not be adjacent any more.
    """
    kernel, dilation, padding, mode = aligned_geometry(convs)
    rows = [_place(expand_groups(conv, 1), kernel, dilation, padding) for conv in convs]
    bias = torch.cat([conv.bias for conv in convs])
    return Convolution(torch.cat(rows), bias, convs[0].stride, dilation, padding, mode, 1)


#: Largest relative difference of two ways to compute one border value in float64.
_BORDER = 1e-12


def composed_weights(first: Convolution, second: Convolution) -> int:
    """Number of weights that ``compose`` would make of the two, without making them."""
    taps = math.prod(
        (a + s * b) // (_common_step(first, second, axis)) + 1
        for axis, (a, b, s) in enumerate(zip(first.span, second.span, first.stride, strict=True))
    )
    return second.out_channels * first.in_channels // _composed_groups(first, second) * taps


def compose(first: Convolution, second: Convolution, border: Tensor | None = None) -> Convolution:
    """``second`` after ``first``: W[k + l] = sum W2[l] W1[k] and b = b2 + (sum of W2) b1.

    Stride s1 s2, taps at k d1 + l d2 s1, padding (before1 + s1 before2, after1 + s1 after2). Exact for any geometry if
    ``second`` does not pad. If it pads, its border must be what ``first`` would have computed out there:

    - reflect, replicate and circular borders, where ``first`` is pointwise along each padded dimension;
    - a border of zeros, where ``first`` reads only zeros beyond its own border and has no shift; with ``border`` (A,)
      those positions hold these values per channel instead, which must be the shift of ``first`` (the padding of DBB,
      Ding et al., 2021).

    Raises ``ReparamError`` where none of this holds: zeros padded after a shift are no zeros before it.
    """
    if first.out_channels != second.in_channels or len(first.kernel) != len(second.kernel):
        raise ReparamError(
            f"A convolution of {second.in_channels} inputs in {len(second.kernel)} dimensions cannot follow one of "
            f"{first.out_channels} outputs in {len(first.kernel)}.",
            remedy="Pass two layers that follow each other.",
        )
    if second.is_transposed or (first.is_transposed and not second.is_per_channel):
        raise ReparamError(
            "A transposed convolution is followed or preceded by another layer; it absorbs only a scale and a shift "
            "per channel after it.",
            remedy="Put the batch norm after the transposed convolution.",
        )
    mode = _joint_mode(first, second)
    if second.pads and second.padding_mode == "zeros":
        _require_border(first, second, border)
    elif second.pads:
        _require_pointwise(first, second)
    padding = tuple(
        (b1 + s * b2, a1 + s * a2)
        for (b1, a1), (b2, a2), s in zip(first.padding, second.padding, first.stride, strict=True)
    )
    weight, dilation = _compose_weights(first, second)
    taps_summed = second.weight.reshape(second.groups, -1, second.weight.shape[1], math.prod(second.kernel)).sum(3)
    carried = (taps_summed @ first.bias.reshape(second.groups, -1, 1)).flatten()
    stride = tuple(a * b for a, b in zip(first.stride, second.stride, strict=True))
    bias = add_shifts(second.bias, carried)
    groups = _composed_groups(first, second)
    return Convolution(weight, bias, stride, dilation, padding, mode, groups, first.output_padding)


def pool_to_linear(conv: Convolution, linear: Convolution) -> Convolution:
    """linear(mean over positions of conv(x)) as one linear layer of mean(x): W = W_l W_c and b = W_l b_c + b_l.

    Exact for a pointwise ``conv`` of stride 1 without padding, which commutes with the mean; raises ``ReparamError``
    otherwise.
    """
    if any(k > 1 for k in conv.kernel) or any(s > 1 for s in conv.stride) or conv.pads or linear.kernel:
        raise ReparamError(
            f"A convolution of kernel {conv.kernel}, stride {conv.stride} and padding {conv.padding} does not commute "
            "with the mean over positions.",
            remedy="Only a 1x1 convolution of stride 1 without padding folds through global average pooling.",
        )
    dense = expand_groups(conv, 1)
    return compose(Convolution(dense.weight.flatten(1), dense.bias, (), (), ()), linear)


def _joint_mode(first: Convolution, second: Convolution) -> PaddingMode:
    modes = {conv.padding_mode for conv in (first, second) if conv.pads}
    if len(modes) > 1:
        raise ReparamError(
            f"A convolution padded by {first.padding_mode} is followed by one padded by {second.padding_mode}.",
            remedy="One convolution has one padding mode: give both the same.",
        )
    return next(iter(modes), "zeros")


def _require_border(first: Convolution, second: Convolution, border: Tensor | None) -> None:
    for span, stride, own, padded in zip(first.span, first.stride, first.padding, second.padding, strict=True):
        # The nearest output outside must read nothing inside, for any input size.
        if (padded[0] > 0 and own[0] < span - (stride - 1)) or (padded[1] > 0 and own[1] < span):
            raise ReparamError(
                f"A convolution of kernel {first.kernel} and padding {first.padding} is followed by one that pads its "
                f"output by {second.padding}: the first would not compute zeros there.",
                remedy="Pad before the first convolution instead of between the two.",
            )
    wanted = torch.zeros_like(first.bias) if border is None else border
    if (first.bias - wanted).abs().max() > _BORDER * first.bias.abs().max():
        raise ReparamError(
            "The output of a convolution with a shift is padded with values other than that shift: beyond the "
            "border the result is not the convolution of zeros.",
            remedy="Pad before the first layer, or pad with its shift (bias of its batch norm at zero input).",
        )


def _require_pointwise(first: Convolution, second: Convolution) -> None:
    for axis, padded in enumerate(second.padding):
        pointwise = first.kernel[axis] == 1 and first.stride[axis] == 1 and first.padding[axis] == (0, 0)
        if any(padded) and not pointwise:
            raise ReparamError(
                f"A convolution of kernel {first.kernel}, stride {first.stride} and padding {first.padding} is "
                f"followed by one with {second.padding_mode} padding {second.padding}, which continues its output.",
                remedy="Only a first layer that is pointwise along the padded dimensions commutes with this padding.",
            )


def _common_step(first: Convolution, second: Convolution, axis: int) -> int:
    own = first.dilation[axis] if first.kernel[axis] > 1 else 0
    return math.gcd(own, second.dilation[axis] * first.stride[axis] if second.kernel[axis] > 1 else 0) or 1


def _composed_groups(first: Convolution, second: Convolution) -> int:
    if first.is_depthwise:
        return second.groups
    return first.groups if second.is_depthwise else math.gcd(first.groups, second.groups)


def _compose_weights(first: Convolution, second: Convolution) -> tuple[Tensor, tuple[int, ...]]:
    dims, groups = len(first.kernel), _composed_groups(first, second)
    steps = tuple(_common_step(first, second, axis) for axis in range(dims))
    jumps = [second.dilation[axis] * first.stride[axis] // steps[axis] for axis in range(dims)]
    inner = [first.dilation[axis] // steps[axis] if first.kernel[axis] > 1 else 1 for axis in range(dims)]
    extents = [
        jump * (b - 1) + step * (a - 1) + 1
        for jump, step, a, b in zip(jumps, inner, first.kernel, second.kernel, strict=True)
    ]
    weight = first.weight.new_zeros(second.out_channels, first.in_channels // groups, *extents)
    taps = second.weight.reshape(*second.weight.shape[:2], -1)
    for number, tap in enumerate(itertools.product(*(range(extent) for extent in second.kernel))):
        where: list[slice] = [slice(None)] * 2
        for axis, index in enumerate(tap):
            start = index * jumps[axis]
            where.append(slice(start, start + inner[axis] * (first.kernel[axis] - 1) + 1, inner[axis]))
        weight[tuple(where)] += _product(first, taps[:, :, number], second, groups)
    return weight, steps


def _product(first: Convolution, tap: Tensor, second: Convolution, groups: int) -> Tensor:
    """One tap (O,A/g2) of ``second`` times the kernel of ``first``: (O,I/groups,*K1)."""
    ones = [1] * len(first.kernel)
    if first.is_depthwise:
        # Output o of group j reads the channels of j: their own kernels, in that order.
        kernels = first.weight.reshape(second.groups, 1, -1, *first.kernel)
        per_group = tap.reshape(second.groups, -1, tap.shape[1], *ones) * kernels
        return per_group.reshape(second.out_channels, tap.shape[1], *first.kernel)
    if second.is_depthwise:
        return tap.reshape(-1, 1, *ones) * first.weight
    dense = expand_groups(first, groups).weight
    flat = Convolution(tap, second.bias, (), (), (), groups=second.groups)
    outer = expand_groups(flat, groups).weight.reshape(groups, -1, first.out_channels // groups)
    inner = dense.reshape(groups, first.out_channels // groups, dense.shape[1], -1)
    return torch.einsum("goa,gaik->goik", outer, inner).reshape(second.out_channels, -1, *first.kernel)
