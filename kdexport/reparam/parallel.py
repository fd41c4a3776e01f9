"""Convolutions that read one input, as one: summed, or side by side. Each refuses where it would not be exact."""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from kdexport.errors import ReparamError
from kdexport.reparam import algebra
from kdexport.reparam.convolution import Convolution, Padding, PaddingMode


def expand_groups(conv: Convolution, groups: int) -> Convolution:
    """The same map with fewer groups: the kernel over the inputs that an output does not read is zero.

    ``groups`` divides the present count. Output o of old group j reads inputs j * I/g onwards.
    """
    ratio, rest = divmod(conv.groups, groups)
    if rest:
        raise ReparamError(
            f"A convolution of {conv.groups} groups is none of {groups} groups.", remedy="Pass a divisor of its groups."
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

    Grouped branches are expanded to one group, for the outputs of one group would no longer lie together.
    """
    kernel, dilation, padding, mode = aligned_geometry(convs)
    rows = [_place(expand_groups(conv, 1), kernel, dilation, padding) for conv in convs]
    bias = torch.cat([conv.bias for conv in convs])
    return Convolution(torch.cat(rows), bias, convs[0].stride, dilation, padding, mode, 1)
