"""Re-parameterizable blocks as other projects write them: convolutions, batch norms, sums, pooling, padding."""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.kdexport.hostile_values import randomize


def conv_bn(inputs: int, outputs: int, kernel: Any, **options: Any) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, bias=False, **options), nn.BatchNorm2d(outputs, eps=10 ** -(2 + inputs % 3))
    )


class RepVgg(nn.Module):
    """3x3, 1x1 and, where the shapes allow, the identity, each with its batch norm (Ding et al., CVPR 2021)."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.dense = conv_bn(inputs, outputs, 3, stride=stride, padding=1, groups=groups)
        self.point = conv_bn(inputs, outputs, 1, stride=stride, groups=groups)
        self.skip = nn.BatchNorm2d(inputs) if inputs == outputs and stride == 1 else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.dense(x) + self.point(x)
        return functional.relu(y if self.skip is None else y + self.skip(x))


class MobileOne(nn.Module):
    """k equal branches, a 1x1 scale branch and a skip (Vasu et al., CVPR 2023)."""

    def __init__(self, inputs: int, outputs: int, kernel: int, branches: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        options = {"stride": stride, "padding": kernel // 2, "groups": groups}
        self.convs = nn.ModuleList([conv_bn(inputs, outputs, kernel, **options) for _ in range(branches)])
        self.scale = conv_bn(inputs, outputs, 1, stride=stride, groups=groups) if kernel > 1 else None
        self.skip = nn.BatchNorm2d(inputs) if inputs == outputs and stride == 1 else None

    def forward(self, x: Tensor) -> Tensor:
        y: Any = 0
        y = y if self.scale is None else y + self.scale(x)
        y = y if self.skip is None else y + self.skip(x)
        for conv in self.convs:
            y = y + conv(x)
        return functional.gelu(y)


class Asymmetric(nn.Module):
    """kxk, 1xk and kx1, each with its batch norm (ACNet, Ding et al., ICCV 2019)."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        half, options = kernel // 2, {"stride": stride, "groups": groups}
        self.square = conv_bn(inputs, outputs, kernel, padding=half, **options)
        self.row = conv_bn(inputs, outputs, (1, kernel), padding=(0, half), **options)
        self.column = conv_bn(inputs, outputs, (kernel, 1), padding=(half, 0), **options)

    def forward(self, x: Tensor) -> Tensor:
        return functional.silu(self.square(x) + self.row(x) + self.column(x))


class BatchNormAndPad(nn.Module):
    """A batch norm whose output is padded with what it makes of zero, as DBB writes it: slice by slice, in place."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.bn, self.width = nn.BatchNorm2d(channels, eps=1e-3), width

    def forward(self, x: Tensor) -> Tensor:
        bn, width = self.bn, self.width
        mean, variance = cast(Tensor, bn.running_mean), cast(Tensor, bn.running_var)
        value = bn.bias.detach() - mean * bn.weight.detach() / torch.sqrt(variance + bn.eps)
        y = functional.pad(bn(x), [width] * 4)
        value = value.view(1, -1, 1, 1)
        y[:, :, :width, :] = value
        y[:, :, -width:, :] = value
        y[:, :, :, :width] = value
        y[:, :, :, -width:] = value
        return y


class BatchNormLiftedAndPad(BatchNormAndPad):
    """The same border without a slice: the value is taken out before zeros are padded, and added again."""

    def forward(self, x: Tensor) -> Tensor:
        bn = self.bn
        mean, variance = cast(Tensor, bn.running_mean), cast(Tensor, bn.running_var)
        value = (bn.bias.detach() - mean * bn.weight.detach() / torch.sqrt(variance + bn.eps)).view(1, -1, 1, 1)
        return functional.pad(bn(x) - value, [self.width] * 4) + value


_BORDERS = {"shift": BatchNormAndPad, "lifted": BatchNormLiftedAndPad}


class Diverse(nn.Module):
    """kxk, 1x1, 1x1 then kxk, 1x1 then average pooling (DBB, Ding et al., CVPR 2021).

    ``border`` chooses how the padding between is written: in place, by lifting the batch norm, before the 1x1 layer, or
    wrongly, with zeros.
    """

    def __init__(self, inputs: int, outputs: int, stride: int = 1, border: str = "shift") -> None:
        super().__init__()
        self.origin = conv_bn(inputs, outputs, 3, stride=stride, padding=1)
        self.point = conv_bn(inputs, outputs, 1, stride=stride)
        self.border = border
        self.squeeze = nn.Conv2d(inputs, inputs, 1, bias=False)
        self.middle: nn.Module = _BORDERS[border](inputs, 1) if border in _BORDERS else nn.BatchNorm2d(inputs)
        self.expand = conv_bn(inputs, outputs, 3, stride=stride)
        self.before_pool = nn.Conv2d(inputs, outputs, 1, bias=False)
        self.pool_middle: nn.Module = _BORDERS[border](outputs, 1) if border in _BORDERS else nn.BatchNorm2d(outputs)
        self.pool = nn.Sequential(nn.AvgPool2d(3, stride), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.origin(x) + self.point(x) + self._sequence(x) + self._pooled(x))

    def _sequence(self, x: Tensor) -> Tensor:
        if self.border == "before":
            x = functional.pad(x, [1] * 4)
        y = self.middle(self.squeeze(x))
        return cast(Tensor, self.expand(functional.pad(y, [1] * 4) if self.border == "zeros" else y))

    def _pooled(self, x: Tensor) -> Tensor:
        if self.border not in _BORDERS:
            x = functional.pad(x, [1] * 4)
        return cast(Tensor, self.pool(self.pool_middle(self.before_pool(x))))


def ready(net: nn.Module, seed: int = 3, dtype: torch.dtype = torch.float64) -> nn.Module:
    """``net`` in evaluation mode, with weights and statistics that hide nothing."""
    return randomize(net.eval(), seed).to(dtype)


class Forward(nn.Module):
    """A module of named parts whose forward pass is a function of the module and its input."""

    def __init__(self, run: Callable[..., Any], **parts: nn.Module) -> None:
        super().__init__()
        self.run = run
        for name, part in parts.items():
            self.add_module(name, part)

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name)

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


def whole_net(blocks: Sequence[nn.Module], channels: int) -> nn.Module:
    """Blocks, global average pooling and a classifier."""
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 5))
