"""MobileNetV2 (Sandler et al., 2018): half width for 32x32 images, torchvision's for ImageNet sizes."""

import math
from typing import cast

from torch import Tensor, nn

from kdexport.students import STUDENTS
from kdexport.students.classifier import torchvision_network
from kdexport.students.student import Form, Host, Stage, Student, Tap, is_full

# Expansion, output channels at width 0.5, blocks, first stride: Table 2 of the paper, halved.
_SMALL_GROUPS = (
    (1, 8, 1, 1),
    (6, 12, 2, 1),
    (6, 16, 3, 2),
    (6, 32, 4, 2),
    (6, 48, 3, 1),
    (6, 80, 3, 2),
    (6, 160, 1, 1),
)
# Indices of the last group of each stage, and of the module of torchvision's ``features`` at each tap.
_STAGE_ENDS = (1, 2, 4, 6)
_FEATURE_ENDS = (0, 3, 6, 13, 17, 18)


def _conv_bn(inputs: int, outputs: int, kernel: int, stride: int) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


class _InvertedResidual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.conv = nn.Sequential(
            nn.Conv2d(inputs, hidden, 1, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU(inplace=True),
            nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU(inplace=True),
            nn.Conv2d(hidden, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + cast(Tensor, self.conv(x)) if self.residual else cast(Tensor, self.conv(x))


class SmallMobileNetV2(Student):
    """The half-width network of the distillation literature for 32x32 inputs: 812,836 parameters at 100 classes."""

    name = "mobilenetv2"

    def __init__(self, num_classes: int, image_size: int) -> None:
        super().__init__()
        self.conv1 = _conv_bn(3, 16, 3, stride=2)
        groups, channels, stride = [], 16, 2
        taps, hosts = [Tap(name="stem", channels=16, stride=2)], []
        for index, (expansion, outputs, count, first_stride) in enumerate(_SMALL_GROUPS):
            blocks = [_InvertedResidual(channels, outputs, first_stride, expansion)]
            blocks += [_InvertedResidual(outputs, outputs, 1, expansion) for _ in range(count - 1)]
            groups.append(nn.Sequential(*blocks))
            channels, stride = outputs, stride * first_stride
            if index in _STAGE_ENDS:
                name, end = f"stage{len(taps)}", f"blocks.{index}.{count - 1}.conv"
                taps.append(Tap(name=name, channels=channels, stride=stride))
                hosts.append(Host(tap=name, conv=f"{end}.6", batch_norm=f"{end}.7"))
        self.blocks = nn.ModuleList(groups)
        self.conv2 = _conv_bn(channels, 1280, 1, stride=1)
        self.classifier = nn.Sequential(nn.Linear(1280, num_classes))
        self.describe(
            num_classes=num_classes,
            image_size=image_size,
            taps=[*taps, Tap(name="last", channels=1280, stride=stride)],
            hosts=[*hosts, Host(tap="last", conv="conv2.0", batch_norm="conv2.1")],
            classifier_path="classifier.0",
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                self.init_branch(module)
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(module.bias)

    def init_branch(self, conv: nn.Conv2d) -> None:
        fan = conv.kernel_size[0] * conv.kernel_size[1] * conv.out_channels
        nn.init.normal_(conv.weight, std=math.sqrt(2.0 / fan))

    def advance(self, index: int, x: Tensor) -> Stage:
        if index == 0:
            return Stage.activated(self.conv1, x)
        if index > len(_STAGE_ENDS):
            return Stage.activated(self.conv2, x)
        first = 0 if index == 1 else _STAGE_ENDS[index - 2] + 1
        for position in range(first, _STAGE_ENDS[index - 1] + 1):
            x = self.blocks[position](x)
        return Stage.linear(x)

    def predict(self, pooled: Tensor) -> Tensor:
        return cast(Tensor, self.classifier(pooled))


class MobileNetV2(Student):
    """torchvision's MobileNetV2 with its parameter names: 2,351,972 parameters at 100 classes."""

    name = "mobilenetv2"

    def __init__(self, num_classes: int, image_size: int) -> None:
        super().__init__()
        net = torchvision_network("mobilenet_v2", num_classes=num_classes)
        # The parameter names of torchvision, so that its checkpoints load unchanged.
        self.features, self.classifier = net.features, net.classifier
        for index in (0, len(self.features) - 1):
            cast(nn.ReLU6, self.features[index][2]).inplace = False
        stages = zip(_FEATURE_ENDS[1:-1], (24, 32, 96, 320), (4, 8, 16, 32), strict=True)
        taps, hosts = [Tap(name="stem", channels=32, stride=2)], []
        for end, channels, stride in stages:
            name, block = f"stage{len(taps)}", f"features.{end}.conv"
            taps.append(Tap(name=name, channels=channels, stride=stride))
            hosts.append(Host(tap=name, conv=f"{block}.2", batch_norm=f"{block}.3"))
        self.describe(
            num_classes=num_classes,
            image_size=image_size,
            taps=[*taps, Tap(name="last", channels=1280, stride=32)],
            hosts=[*hosts, Host(tap="last", conv="features.18.0", batch_norm="features.18.1")],
            classifier_path="classifier.1",
        )

    def init_branch(self, conv: nn.Conv2d) -> None:
        nn.init.kaiming_normal_(conv.weight, mode="fan_out")

    def advance(self, index: int, x: Tensor) -> Stage:
        if index in (0, len(_FEATURE_ENDS) - 1):
            return Stage.activated(self.features[_FEATURE_ENDS[index]], x)
        for position in range(_FEATURE_ENDS[index - 1] + 1, _FEATURE_ENDS[index] + 1):
            x = self.features[position](x)
        return Stage.linear(x)

    def predict(self, pooled: Tensor) -> Tensor:
        return cast(Tensor, self.classifier(pooled))


@STUDENTS.register("mobilenetv2")
def mobilenetv2(*, num_classes: int, image_size: int, form: Form = "auto") -> Student:
    """The MobileNetV2 for images with a side of ``image_size`` pixels."""
    network = MobileNetV2 if is_full(form, image_size) else SmallMobileNetV2
    return network(num_classes, image_size)
