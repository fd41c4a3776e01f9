"""What a convolution as data computes, and average pooling as one."""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from kdexport.reparam import convolution
from kdexport.reparam.convolution import Convolution

_FUNCTIONS: tuple[Any, ...] = (functional.linear, functional.conv1d, functional.conv2d, functional.conv3d)
_POOLS: tuple[Any, ...] = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)


def apply(conv: Convolution, x: Tensor) -> Tensor:
    """What ``conv`` computes from ``x`` (N,I,*spatial), in the type of ``x``."""
    weight, bias = conv.weight.to(x), conv.bias.to(x)
    if not conv.kernel:
        rows = weight.reshape(conv.groups, -1, weight.shape[1])
        return torch.einsum("ngi,goi->ngo", x.reshape(len(x), conv.groups, -1), rows).flatten(1) + bias
    if conv.pads:
        sides = [side for pair in reversed(conv.padding) for side in pair]
        x = functional.pad(x, sides, mode="constant" if conv.padding_mode == "zeros" else conv.padding_mode)
    function = _FUNCTIONS[len(conv.kernel)]
    return cast(Tensor, function(x, weight, bias, conv.stride, 0, conv.dilation, conv.groups))


def average_pool(pool: nn.Module, channels: int) -> Convolution:
    """An average pooling module over ``channels`` channels."""
    dims, options = 1 + _POOLS.index(type(pool)), cast(nn.AvgPool2d, pool)
    kernel, stride, sides = (_tuple(value, dims) for value in (options.kernel_size, options.stride, options.padding))
    return convolution.pool_convolution(
        channels,
        kernel,
        stride,
        sides,
        ceil_mode=options.ceil_mode,
        count_include_pad=options.count_include_pad,
        divisor_override=None if dims == 1 else options.divisor_override,
    )


def _tuple(value: int | tuple[int, ...], dims: int) -> tuple[int, ...]:
    return (value,) * dims if isinstance(value, int) else tuple(value) * (dims if len(value) == 1 else 1)
