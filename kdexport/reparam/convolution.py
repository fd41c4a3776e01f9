"""A convolution as data: the terms in which parallel and sequential layers are merged.

Shapes: O output channels, I input channels, g groups, K kernel extents, one per spatial dimension. Everything is
float64 on the CPU. What a ``Convolution`` c computes from x is, per output o and position p,

    y[o, p] = bias[o] + sum over i, k of weight[o, i, k] x~[i, p * stride + k * dilation - before]

where x~ is x, continued outside by the padding mode. A linear layer is the case of no spatial dimension. A transposed
convolution has the same fields; its stride divides the positions of the output instead of the input.

Batch norm and average pooling are convolutions too.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal, cast, get_args

import torch
from torch import Tensor, nn

from kdexport.errors import ReparamError
from kdexport.reparam import algebra
from kdexport.reparam.algebra import AnyBatchNorm

PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]

Padding = tuple[tuple[int, int], ...]

#: A sum this small beside its terms, a few float64 roundings, is zero.
_CANCELLED = 1e-14


@dataclass(frozen=True, slots=True, eq=False)
class Convolution:
    """weight (O,I/g,*K) and bias (O,) in float64; stride, dilation and (before, after) padding per dimension.

    ``output_padding`` is given for a transposed convolution alone, one size per dimension. Raises ``ReparamError`` for
    shapes that do not fit together and for a negative padding.
    """

    weight: Tensor
    bias: Tensor
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: Padding
    padding_mode: PaddingMode = "zeros"
    groups: int = 1
    output_padding: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        counts = {len(self.kernel), len(self.stride), len(self.dilation), len(self.padding)}
        divides = self.groups >= 1 and self.out_channels % self.groups == 0
        if len(counts) > 1 or not divides or self.bias.shape != self.weight.shape[:1]:
            raise ReparamError(
                f"A convolution of weight {tuple(self.weight.shape)}, bias {tuple(self.bias.shape)}, stride "
                f"{self.stride}, dilation {self.dilation}, padding {self.padding} and {self.groups} groups "
                "does not exist.",
                remedy="Give one stride, dilation and padding per spatial dimension, and groups that divide.",
            )
        if self.padding_mode not in get_args(PaddingMode) or any(side < 0 for pair in self.padding for side in pair):
            raise ReparamError(
                f"Padding {self.padding} in mode {self.padding_mode!r} has no exact form as part of a convolution.",
                remedy=f"Pad by 0 or more in one of the modes {', '.join(get_args(PaddingMode))}.",
            )

    @property
    def kernel(self) -> tuple[int, ...]:
        """Kernel extents."""
        return tuple(self.weight.shape[2:])

    @property
    def in_channels(self) -> int:
        """I."""
        return self.weight.shape[1] * self.groups

    @property
    def out_channels(self) -> int:
        """O."""
        return self.weight.shape[0]

    @property
    def is_transposed(self) -> bool:
        """Whether it spreads each input over the output, as nn.ConvTranspose2d does."""
        return self.output_padding is not None

    @property
    def pads(self) -> bool:
        """Whether it reads outside its input."""
        return any(side > 0 for pair in self.padding for side in pair)

    @property
    def span(self) -> tuple[int, ...]:
        """Distance of the last kernel tap from the first, in input positions."""
        return tuple(d * (k - 1) for d, k in zip(self.dilation, self.kernel, strict=True))

    @property
    def slack(self) -> tuple[int, ...]:
        """Padding minus span: with the stride it fixes the output size, (n + slack - 1) // stride + 1 for n inputs."""
        return tuple(before + after - s for (before, after), s in zip(self.padding, self.span, strict=True))

    @property
    def is_per_channel(self) -> bool:
        """Whether it multiplies and shifts each channel by itself, at each position alike."""
        plain = all(k == 1 for k in self.kernel) and all(s == 1 for s in self.stride)
        return self.is_depthwise and plain and not self.pads and not self.is_transposed

    @property
    def is_depthwise(self) -> bool:
        """Whether each output channel reads the input channel of its own number alone."""
        return self.groups == self.in_channels == self.out_channels


def identity(channels: int, dims: int) -> Convolution:
    """y = x, as a depthwise 1x1 convolution over ``dims`` spatial dimensions."""
    weight = torch.ones(channels, 1, *[1] * dims, dtype=torch.float64)
    return Convolution(weight, weight.new_zeros(channels), (1,) * dims, (1,) * dims, ((0, 0),) * dims, groups=channels)


def scale(conv: Convolution, factor: float | Tensor) -> Convolution:
    """c y for a scalar or a per-channel (O,) factor c: W' = c W, b' = c b."""
    column = torch.as_tensor(factor, dtype=torch.float64).expand(conv.out_channels)
    weight = conv.weight * column.reshape(-1, *[1] * (conv.weight.dim() - 1))
    return replace(conv, weight=weight, bias=conv.bias * column)


def shift(conv: Convolution, offset: float | Tensor) -> Convolution:
    """y + c for a scalar or a per-channel (O,) offset c: b' = b + c, exactly zero where the two cancel."""
    return replace(conv, bias=add_shifts(conv.bias, torch.as_tensor(offset, dtype=torch.float64).expand_as(conv.bias)))


def add_shifts(one: Tensor, other: Tensor) -> Tensor:
    """one + other (O,), exactly zero where they cancel.

    A shift that is taken out again was computed in two ways, whose last bits differ; padding tells them from zero.
    """
    total = one + other
    return torch.where(total.abs() <= _CANCELLED * one.abs(), 0.0, total)


def from_layer(layer: nn.Module) -> Convolution:
    """A Conv1d, Conv2d, Conv3d or Linear as it is, whatever its padding, mode, groups or dilation."""
    if isinstance(layer, nn.Linear):
        return Convolution(_double(layer.weight), _bias(layer.bias, layer.out_features), (), (), ())
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


def _double(value: Tensor) -> Tensor:
    return value.detach().to("cpu", torch.float64)


def _bias(bias: Tensor | None, channels: int) -> Tensor:
    return torch.zeros(channels, dtype=torch.float64) if bias is None else _double(bias)


def same_padding(kernel: tuple[int, ...], dilation: tuple[int, ...]) -> Padding:
    """What torch makes of padding="same": the odd position of an even span goes behind."""
    totals = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    return tuple((total // 2, total - total // 2) for total in totals)


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
