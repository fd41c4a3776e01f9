"""ShuffleNetV1 (Zhang et al., 2018) with three groups: the CIFAR definition, also for ImageNet sizes."""

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from kdexport.students import STUDENTS
from kdexport.students.channel_shuffle import shuffle_channels
from kdexport.students.student import Form, Host, Stage, Student, Tap, is_full

_GROUPS, _STEM = 3, 24
# Channels and units of each stage: Table 1 of the paper, three groups.
_STAGES = ((240, 4), (480, 8), (960, 4))


class _Unit(nn.Module):
    """Grouped 1x1, shuffle, depthwise 3x3, grouped 1x1, parallel to the identity or to average pooling (stride 2).

    A strided unit computes only the channels that the pooled input does not provide, and its bottleneck is a quarter of
    these; in the paper it is a quarter of all channels.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        computed = outputs - inputs if stride == 2 else outputs
        hidden = computed // 4
        # As in the paper, the first convolution of the first unit is not grouped: its input has too few channels.
        self.groups = 1 if inputs == _STEM else _GROUPS
        self.conv1 = nn.Conv2d(inputs, hidden, 1, groups=self.groups, bias=False)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.conv2 = nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False)
        self.bn2 = nn.BatchNorm2d(hidden)
        self.conv3 = nn.Conv2d(hidden, computed, 1, groups=_GROUPS, bias=False)
        self.bn3 = nn.BatchNorm2d(computed)
        self.stride = stride

    def preactivation(self, x: Tensor) -> Tensor:
        """The result of the unit before its last ReLU."""
        deep = functional.relu(self.bn1(self.conv1(x)))
        deep = shuffle_channels(deep, self.groups) if self.groups > 1 else deep
        deep = functional.relu(self.bn2(self.conv2(deep)))
        deep = self.bn3(self.conv3(deep))
        if self.stride == 2:
            return torch.cat([deep, functional.avg_pool2d(x, 3, 2, 1)], 1)
        return cast(Tensor, deep + x)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.preactivation(x))


def _stage(inputs: int, outputs: int, units: int) -> nn.Sequential:
    return nn.Sequential(_Unit(inputs, outputs, 2), *[_Unit(outputs, outputs, 1) for _ in range(units - 1)])


class ShuffleNetV1(Student):
    """The network of the distillation literature, 949,258 parameters at 100 classes, with a 1x1 stem of stride 1.

    In the full form the stem is 3x3 with stride 2, followed by max pooling after its tap:
    949,834 parameters. No public network has this form. The small form has the parameter names of public CIFAR
    checkpoints.
    """

    name = "shufflenetv1"

    def __init__(self, num_classes: int, image_size: int, form: Form) -> None:
        super().__init__()
        self.large = is_full(form, image_size)
        kernel, stride = (3, 2) if self.large else (1, 1)
        self.conv1 = nn.Conv2d(3, _STEM, kernel, stride, kernel // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(_STEM)
        taps, hosts, inputs = [Tap(name="stem", channels=_STEM, stride=stride)], [], _STEM
        stride = 4 if self.large else 1
        for index, (outputs, units) in enumerate(_STAGES, 1):
            self.add_module(f"layer{index}", _stage(inputs, outputs, units))
            inputs, stride = outputs, stride * 2
            end = f"layer{index}.{units - 1}"
            taps.append(Tap(name=f"stage{index}", channels=outputs, stride=stride))
            hosts.append(Host(tap=f"stage{index}", conv=f"{end}.conv3", batch_norm=f"{end}.bn3"))
        self.linear = nn.Linear(inputs, num_classes)
        self.describe(num_classes=num_classes, image_size=image_size, taps=taps, hosts=hosts, classifier_path="linear")

    def init_branch(self, conv: nn.Conv2d) -> None:
        conv.reset_parameters()

    def advance(self, index: int, x: Tensor) -> Stage:
        if index == 0:
            return Stage.rectified(self.bn1(self.conv1(x)))
        x = functional.max_pool2d(x, 3, 2, 1) if index == 1 and self.large else x
        *units, last = cast("list[_Unit]", list(self.get_submodule(f"layer{index}").children()))
        for unit in units:
            x = unit(x)
        return Stage.rectified(last.preactivation(x))

    def predict(self, pooled: Tensor) -> Tensor:
        return cast(Tensor, self.linear(pooled))


@STUDENTS.register("shufflenetv1")
def shufflenetv1(*, num_classes: int, image_size: int, form: Form = "auto") -> Student:
    """The ShuffleNetV1 for images with a side of ``image_size`` pixels."""
    return ShuffleNetV1(num_classes, image_size, form)
