"""The layers that are a convolution: Conv, Linear, batch norm, average pooling."""

import math
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from kdexport.errors import ReparamError
from kdexport.reparam import algebra
from kdexport.reparam.algebra import AnyBatchNorm
from kdexport.reparam.convolution import Convolution, Padding, identity

AnyPool = nn.AvgPool1d | nn.AvgPool2d | nn.AvgPool3d

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_POOLS: tuple[type[nn.Module], ...] = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)


def same_padding(kernel: tuple[int, ...], dilation: tuple[int, ...]) -> Padding:
    """What torch makes of padding="same": the odd position of an even span goes behind."""
    totals = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    return tuple((total // 2, total - total // 2) for total in totals)


def from_layer(layer: nn.Module) -> Convolution:
    """A Conv1d, Conv2d, Conv3d or Linear as it is, whatever its padding, mode, groups or dilation.

    Raises ``ReparamError`` for another type, a subclass or parametrization included: its forward may do more.
    """
    kind = type(layer)
    if kind is nn.Linear:
        linear = cast(nn.Linear, layer)
        return Convolution(_double(linear.weight), _bias(linear.bias, linear.out_features), (), (), ())
    if kind not in _CONVS:
        raise ReparamError(
            f"A {kind.__name__} is no plain convolution or linear layer.",
            remedy="Pass Conv1d, Conv2d, Conv3d or Linear; remove parametrizations first.",
        )
    conv = cast("nn.Conv1d | nn.Conv2d | nn.Conv3d", layer)
    kernel, dilation = tuple(conv.kernel_size), tuple(conv.dilation)
    padding: Padding
    if isinstance(conv.padding, str):
        padding = same_padding(kernel, dilation) if conv.padding == "same" else ((0, 0),) * len(kernel)
    else:
        padding = tuple((side, side) for side in conv.padding)
    return Convolution(
        _double(conv.weight),
        _bias(conv.bias, conv.out_channels),
        tuple(conv.stride),
        dilation,
        padding,
        conv.padding_mode,
        conv.groups,
    )


def fold_norm(conv: Convolution, batch_norm: AnyBatchNorm) -> Convolution:
    """An eval-mode batch norm after ``conv``: W' = g W and b' = g (b - mu) + beta, g = gamma / sqrt(var + eps).

    Exact for every geometry, because the border of the output is as linear as its inside. Raises ``ReparamError`` in
    training mode, without running statistics, or for another channel count.
    """
    if batch_norm.training:
        raise ReparamError(
            "A batch norm is in training mode: it would use the batch's statistics.", remedy="Call .eval() first."
        )
    weight, bias = algebra.fold_batch_norm(conv.weight, conv.bias, batch_norm)
    return replace(conv, weight=weight, bias=bias)


def eval_norm(
    mean: Tensor, variance: Tensor, gain: Tensor | None, offset: Tensor | None, epsilon: float
) -> nn.BatchNorm1d:
    """An eval-mode batch norm of these values (C,), in float64."""
    norm = nn.BatchNorm1d(mean.numel(), epsilon, dtype=torch.float64)
    ones = torch.ones_like(mean)
    with torch.no_grad():
        for place, value in (
            (norm.running_mean, mean),
            (norm.running_var, variance),
            (norm.weight, ones if gain is None else gain),
            (norm.bias, 0 * ones if offset is None else offset),
        ):
            cast(Tensor, place).copy_(value)
    return norm.eval()


def from_batch_norm(batch_norm: AnyBatchNorm, dims: int) -> Convolution:
    """A batch norm alone: the depthwise 1x1 convolution y = g x + (beta - g mu)."""
    return fold_norm(identity(batch_norm.num_features, dims), batch_norm)


def average_pool(pool: AnyPool, channels: int) -> Convolution:
    """An average pooling module over ``channels`` channels; see ``pool_convolution``."""
    dims = 1 + _POOLS.index(type(pool))
    kernel, stride, sides = (_tuple(value, dims) for value in (pool.kernel_size, pool.stride, pool.padding))
    return pool_convolution(
        channels,
        kernel,
        stride,
        sides,
        ceil_mode=pool.ceil_mode,
        count_include_pad=pool.count_include_pad,
        divisor_override=None if isinstance(pool, nn.AvgPool1d) else pool.divisor_override,
    )


def pool_convolution(
    channels: int,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    sides: tuple[int, ...],
    *,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Convolution:
    """An average pooling as the depthwise convolution of constant weight 1/divisor, padded with zeros.

    Exact where every window has one divisor: no padding, or padding that counts, or ``divisor_override``. Raises
    ``ReparamError`` otherwise, and for ``ceil_mode`` with a stride, which adds windows that leave the padded input.
    """
    if ceil_mode and any(step > 1 for step in stride):
        raise ReparamError(
            f"An average pooling of stride {stride} with ceil_mode has windows that leave the padded input.",
            remedy="Set ceil_mode=False where the sizes allow it.",
        )
    if any(sides) and not count_include_pad and divisor_override is None:
        raise ReparamError(
            f"An average pooling with padding {sides} and count_include_pad=False divides by less at the border.",
            remedy="Only count_include_pad=True or a divisor_override makes it a convolution.",
        )
    divisor = math.prod(kernel) if divisor_override is None else divisor_override
    weight = torch.full((channels, 1, *kernel), 1.0 / divisor, dtype=torch.float64)
    padding = tuple((side, side) for side in sides)
    return Convolution(weight, weight.new_zeros(channels), stride, (1,) * len(kernel), padding, groups=channels)


def _double(value: Tensor) -> Tensor:
    return value.detach().to("cpu", torch.float64)


def _bias(bias: Tensor | None, channels: int) -> Tensor:
    return torch.zeros(channels, dtype=torch.float64) if bias is None else _double(bias)


def _tuple(value: int | tuple[int, ...], dims: int) -> tuple[int, ...]:
    return (value,) * dims if isinstance(value, int) else tuple(value) * (dims if len(value) == 1 else 1)
