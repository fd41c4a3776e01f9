"""ResNets of depth 6n+2 for small images (He et al., 2016, section 4.2) with 1x1 convolution shortcuts.

The x4 widths are those of Tian et al. (2020): a stem of 32 channels, and a projected shortcut in every stage. The
literature has no ImageNet form; larger images use the same network, at a higher cost. Parameters have the names of
public checkpoints: conv1, bn1, layer1.0.conv1, layer1.0.downsample.0, fc.
"""

from collections.abc import Sequence
from functools import partial
from typing import cast

from torch import Tensor, nn
from torch.nn import functional

from kdexport.students import Stage, Tap
from training.teachers import TEACHERS
from training.teachers.teacher import Teacher

# Channels of the stem and of the three stages.
_PLAIN, _TIMES_FOUR = (16, 16, 32, 64), (32, 64, 128, 256)


class _BasicBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        if stride != 1 or inputs != outputs:
            shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.downsample: nn.Module = nn.Sequential(shortcut, nn.BatchNorm2d(outputs))
        else:
            self.downsample = nn.Identity()

    def preactivate(self, x: Tensor) -> Tensor:
        """The input of the last activation."""
        y = functional.relu(self.bn1(self.conv1(x)))
        return cast(Tensor, self.bn2(self.conv2(y)) + self.downsample(x))

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.preactivate(x))


class ResNetCifar(Teacher):
    """3 stages of n blocks: at 100 classes resnet56 has 861,620 parameters, resnet32x4 7,433,860."""

    def __init__(self, depth: int, widths: Sequence[int], *, num_classes: int, image_size: int) -> None:
        super().__init__()
        self.num_classes, self.image_size = num_classes, image_size
        channels, *stages = widths
        self.conv1 = nn.Conv2d(3, channels, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        taps = [Tap(name="stem", channels=channels, stride=1)]
        for index, width in enumerate(stages):
            blocks = [_BasicBlock(channels, width, 1 if index == 0 else 2)]
            blocks += [_BasicBlock(width, width, 1) for _ in range((depth - 2) // 6 - 1)]
            self.add_module(f"layer{index + 1}", nn.Sequential(*blocks))
            channels = width
            taps.append(Tap(name=f"stage{index + 1}", channels=width, stride=2**index))
        self.fc = nn.Linear(channels, num_classes)
        self.taps, self.classifier_path = tuple(taps), "fc"
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def advance(self, index: int, x: Tensor) -> Stage:
        if index == 0:
            preactivation = self.bn1(self.conv1(x))
        else:
            *blocks, last = cast(nn.Sequential, self.get_submodule(f"layer{index}"))
            for block in blocks:
                x = block(x)
            preactivation = cast(_BasicBlock, last).preactivate(x)
        return Stage.rectified(preactivation)

    def predict(self, pooled: Tensor) -> Tensor:
        return cast(Tensor, self.fc(pooled))


for _depth in (8, 20, 56):
    TEACHERS.register(f"resnet{_depth}")(partial(ResNetCifar, _depth, _PLAIN))
for _depth in (8, 32):
    TEACHERS.register(f"resnet{_depth}x4")(partial(ResNetCifar, _depth, _TIMES_FOUR))
