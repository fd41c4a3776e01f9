"""ShuffleNetV2 at width 1 (Ma et al., 2018): the CIFAR definition for 32x32 images, torchvision's for ImageNet sizes.

A stage ends with its last shuffle. The last convolution of a stage computes one half of its channels; the other half
comes from the units before and already has their ReLU. The preactivation of a tap is shuffled like the feature, so that
the feature is its ReLU, channel by channel; the public CIFAR code reads it before the shuffle, in a different order.
"""

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from kdexport.students import STUDENTS
from kdexport.students.channel_shuffle import shuffle_channels
from kdexport.students.classifier import torchvision_network
from kdexport.students.student import Form, Host, Stage, Student, Tap, is_full

_STEM, _LAST = 24, 1024
# Channels and units of each stage: Table 5 of the paper, width 1.
_STAGES = ((116, 4), (232, 8), (464, 4))


class _DownUnit(nn.Module):
    """A unit with stride 2: both branches read the whole input, and each computes half of the output channels."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        half = outputs // 2
        self.conv1 = nn.Conv2d(inputs, inputs, 3, 2, 1, groups=inputs, bias=False)
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv2 = nn.Conv2d(inputs, half, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = nn.Conv2d(inputs, half, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(half)
        self.conv4 = nn.Conv2d(half, half, 3, 2, 1, groups=half, bias=False)
        self.bn4 = nn.BatchNorm2d(half)
        self.conv5 = nn.Conv2d(half, half, 1, bias=False)
        self.bn5 = nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> Tensor:
        left = functional.relu(self.bn2(self.conv2(self.bn1(self.conv1(x)))))
        right = self.bn4(self.conv4(functional.relu(self.bn3(self.conv3(x)))))
        right = functional.relu(self.bn5(self.conv5(right)))
        return shuffle_channels(torch.cat([left, right], 1), 2)


class _BasicUnit(nn.Module):
    """A unit with stride 1: one half of the channels is unchanged, the other goes through three convolutions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.conv1 = nn.Conv2d(half, half, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(half)
        self.conv2 = nn.Conv2d(half, half, 3, 1, 1, groups=half, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = nn.Conv2d(half, half, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(half)

    def halves(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The unchanged half, and the other half before its last ReLU."""
        left, right = x.chunk(2, 1)
        right = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(right)))))
        return left, self.bn3(self.conv3(right))

    def forward(self, x: Tensor) -> Tensor:
        return _end(*self.halves(x)).feature


def _end(left: Tensor, right: Tensor) -> Stage:
    """The result of a unit from its unchanged half and the other half before its last ReLU."""
    feature = shuffle_channels(torch.cat([left, functional.relu(right)], 1), 2)
    # Computed on demand, because the network itself never shuffles values before the ReLU.
    return Stage(feature, lambda: shuffle_channels(torch.cat([left, right], 1), 2))


class SmallShuffleNetV2(Student):
    """The network of the distillation literature for 32x32 inputs: 1,355,528 parameters at 100 classes.

    It has the parameter names of public CIFAR checkpoints.
    """

    name = "shufflenetv2"

    def __init__(self, num_classes: int, image_size: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, _STEM, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(_STEM)
        inputs, hosts = _STEM, []
        for index, (outputs, units) in enumerate(_STAGES, 1):
            stage = nn.Sequential(_DownUnit(inputs, outputs), *[_BasicUnit(outputs) for _ in range(units - 1)])
            self.add_module(f"layer{index}", stage)
            end = f"layer{index}.{units - 1}"
            hosts.append(Host(tap=f"stage{index}", conv=f"{end}.conv3", batch_norm=f"{end}.bn3"))
            inputs = outputs
        self.conv2 = nn.Conv2d(inputs, _LAST, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(_LAST)
        self.linear = nn.Linear(_LAST, num_classes)
        self.describe(
            num_classes=num_classes,
            image_size=image_size,
            taps=_taps(stem=1, first=2),
            hosts=[*hosts, Host(tap="last", conv="conv2", batch_norm="bn2")],
            classifier_path="linear",
        )

    def init_branch(self, conv: nn.Conv2d) -> None:
        conv.reset_parameters()

    def advance(self, index: int, x: Tensor) -> Stage:
        if index == 0:
            return Stage.rectified(self.bn1(self.conv1(x)))
        if index > len(_STAGES):
            return Stage.rectified(self.bn2(self.conv2(x)))
        *units, last = self.get_submodule(f"layer{index}").children()
        for unit in units:
            x = unit(x)
        return _end(*cast(_BasicUnit, last).halves(x))

    def predict(self, pooled: Tensor) -> Tensor:
        return cast(Tensor, self.linear(pooled))


class ShuffleNetV2(Student):
    """torchvision's ShuffleNetV2 x1.0 with its parameter names: 1,356,104 parameters at 100 classes.

    The tap ``stem`` is before the max pooling.
    """

    name = "shufflenetv2"

    def __init__(self, num_classes: int, image_size: int) -> None:
        super().__init__()
        net = torchvision_network("shufflenet_v2_x1_0", num_classes=num_classes)
        # The parameter names of torchvision, so that its checkpoints load unchanged.
        self.conv1, self.maxpool = net.conv1, net.maxpool
        self.stage2, self.stage3, self.stage4 = net.stage2, net.stage3, net.stage4
        self.conv5, self.fc = net.conv5, net.fc
        for block in (self.conv1, self.conv5):
            cast(nn.ReLU, block[2]).inplace = False
        hosts = []
        for index, (_, units) in enumerate(_STAGES, 1):
            end = f"stage{index + 1}.{units - 1}.branch2"
            hosts.append(Host(tap=f"stage{index}", conv=f"{end}.5", batch_norm=f"{end}.6"))
        self.describe(
            num_classes=num_classes,
            image_size=image_size,
            taps=_taps(stem=2, first=8),
            hosts=[*hosts, Host(tap="last", conv="conv5.0", batch_norm="conv5.1")],
            classifier_path="fc",
        )

    def init_branch(self, conv: nn.Conv2d) -> None:
        conv.reset_parameters()

    def advance(self, index: int, x: Tensor) -> Stage:
        if index == 0:
            return Stage.activated(self.conv1, x)
        if index > len(_STAGES):
            return Stage.activated(self.conv5, x)
        x = self.maxpool(x) if index == 1 else x
        *units, last = self.get_submodule(f"stage{index + 1}").children()
        for unit in units:
            x = unit(x)
        left, right = x.chunk(2, 1)
        *layers, _relu = last.get_submodule("branch2").children()
        for layer in layers:
            right = layer(right)
        return _end(left, right)

    def predict(self, pooled: Tensor) -> Tensor:
        return cast(Tensor, self.fc(pooled))


def _taps(*, stem: int, first: int) -> list[Tap]:
    stages = [Tap(name=f"stage{i + 1}", channels=width, stride=first * 2**i) for i, (width, _) in enumerate(_STAGES)]
    last = Tap(name="last", channels=_LAST, stride=stages[-1].stride)
    return [Tap(name="stem", channels=_STEM, stride=stem), *stages, last]


@STUDENTS.register("shufflenetv2")
def shufflenetv2(*, num_classes: int, image_size: int, form: Form = "auto") -> Student:
    """The ShuffleNetV2 for images with a side of ``image_size`` pixels."""
    network = ShuffleNetV2 if is_full(form, image_size) else SmallShuffleNetV2
    return network(num_classes, image_size)
