"""Wide residual networks with pre-activation blocks (Zagoruyko & Komodakis, 2016) for small images.

The literature has no ImageNet form; larger images use the same network, at a higher cost. Parameters have the names of
public checkpoints: conv1, block1.layer.0.bn1, block1.layer.0.convShortcut, bn1, fc.
"""

import math
from functools import partial
from typing import cast

from torch import Tensor, nn
from torch.nn import functional

from kdexport.students import Stage, Tap
from training.teachers import TEACHERS
from training.teachers.teacher import Teacher

_STEM_CHANNELS = 16


class _PreactivationBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.projects = inputs != outputs
        if self.projects:
            self.convShortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        activated = functional.relu(self.bn1(x))
        y = self.conv2(functional.relu(self.bn2(self.conv1(activated))))
        # A projection reads the activated input; the identity passes the raw one.
        return cast(Tensor, y + (self.convShortcut(activated) if self.projects else x))


class _Group(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, count: int) -> None:
        super().__init__()
        blocks = [_PreactivationBlock(inputs, outputs, stride)]
        blocks += [_PreactivationBlock(outputs, outputs, 1) for _ in range(count - 1)]
        self.layer = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.layer(x))


class WideResNet(Teacher):
    """Depth 6n+4 and a width factor; wrn40_2 has 2,255,156 parameters at 100 classes.

    The feature of a stage is the sum at the end of its group, without an activation; that of the stem is the output of
    the convolution. The pre-activation is the output of the batch norm that reads the feature next. So no feature
    is the ReLU of its pre-activation.
    """

    def __init__(self, depth: int, factor: int, *, num_classes: int, image_size: int) -> None:
        super().__init__()
        self.num_classes, self.image_size = num_classes, image_size
        channels, taps = _STEM_CHANNELS, [Tap(name="stem", channels=_STEM_CHANNELS, stride=1)]
        self.conv1 = nn.Conv2d(3, channels, 3, 1, 1, bias=False)
        for index in range(3):
            width = _STEM_CHANNELS * factor * 2**index
            self.add_module(f"block{index + 1}", _Group(channels, width, 1 if index == 0 else 2, (depth - 4) // 6))
            channels = width
            taps.append(Tap(name=f"stage{index + 1}", channels=width, stride=2**index))
        self.bn1 = nn.BatchNorm2d(channels)
        self.fc = nn.Linear(channels, num_classes)
        self.taps, self.classifier_path = tuple(taps), "fc"
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
                nn.init.normal_(module.weight, std=math.sqrt(2.0 / fan))
        nn.init.zeros_(self.fc.bias)

    def advance(self, index: int, x: Tensor) -> Stage:
        feature = self.conv1(x) if index == 0 else self.get_submodule(f"block{index}")(x)
        last = index + 1 == len(self.taps)
        batch_norm = self.bn1 if last else self.get_submodule(f"block{index + 1}.layer.0.bn1")
        return Stage(feature, lambda: _normalised(cast(nn.BatchNorm2d, batch_norm), feature))

    def pool(self, feature: Tensor) -> Tensor:
        return super().pool(functional.relu(self.bn1(feature)))

    def predict(self, pooled: Tensor) -> Tensor:
        return cast(Tensor, self.fc(pooled))


def _normalised(batch_norm: nn.BatchNorm2d, feature: Tensor) -> Tensor:
    """The output of ``batch_norm`` for (N,C,h,w), without a second update of its statistics in training mode."""
    if not batch_norm.training:
        return cast(Tensor, batch_norm(feature))
    scale, shift = batch_norm.weight, batch_norm.bias
    return functional.batch_norm(feature, None, None, scale, shift, training=True, eps=batch_norm.eps)


TEACHERS.register("wrn40_2")(partial(WideResNet, 40, 2))
