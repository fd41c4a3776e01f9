"""MobileNetV2 (Sandler et al., 2018): half width for 32x32 images, torchvision's for ImageNet sizes."""

import math
from typing import cast

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional

from kdexport.students import STUDENTS
from kdexport.students.student import IMAGENET_MIN_SIZE, Student, Tap

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


def _conv_bn(inputs: int, outputs: int, kernel: int, stride: int) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


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
    last_host = ("conv2.0", "conv2.1")
    classifier_path = "classifier.0"

    def __init__(self, num_classes: int, image_size: int) -> None:
        super().__init__()
        self.num_classes, self.image_size = num_classes, image_size
        self.conv1 = _conv_bn(3, 16, 3, stride=2)
        groups, channels, stride, taps = [], 16, 2, [Tap(name="stem", module="conv1", channels=16, stride=2)]
        for index, (expansion, outputs, count, first_stride) in enumerate(_SMALL_GROUPS):
            blocks = [_InvertedResidual(channels, outputs, first_stride, expansion)]
            blocks += [_InvertedResidual(outputs, outputs, 1, expansion) for _ in range(count - 1)]
            groups.append(nn.Sequential(*blocks))
            channels, stride = outputs, stride * first_stride
            if index in (1, 2, 4, 6):
                taps.append(Tap(name=f"stage{len(taps)}", module=f"blocks.{index}", channels=channels, stride=stride))
        self.blocks = nn.ModuleList(groups)
        self.conv2 = _conv_bn(channels, 1280, 1, stride=1)
        self.adapter = nn.Identity()
        self.classifier = nn.Sequential(nn.Linear(1280, num_classes))
        self.taps = (*taps, Tap(name="last", module="conv2", channels=1280, stride=stride))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                self.init_branch(module)
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(module.bias)

    def init_branch(self, conv: nn.Conv2d) -> None:
        fan = conv.kernel_size[0] * conv.kernel_size[1] * conv.out_channels
        nn.init.normal_(conv.weight, std=math.sqrt(2.0 / fan))

    def extract(self, images: Tensor) -> Tensor:
        x = self.conv1(images)
        for group in self.blocks:
            x = group(x)
        return cast(Tensor, self.conv2(x))

    def classify(self, feature: Tensor) -> Tensor:
        pooled = functional.adaptive_avg_pool2d(feature, 1)
        return cast(Tensor, self.classifier(torch.flatten(pooled, 1)))


class MobileNetV2(Student):
    """torchvision's MobileNetV2 with its parameter names: 2,351,972 parameters at 100 classes."""

    name = "mobilenetv2"
    last_host = ("features.18.0", "features.18.1")
    classifier_path = "classifier.1"

    def __init__(self, num_classes: int, image_size: int) -> None:
        super().__init__()
        self.num_classes, self.image_size = num_classes, image_size
        net = torchvision.models.mobilenet_v2(num_classes=num_classes)
        # torchvision's own names, so that its checkpoints load unchanged.
        self.features = net.features
        self.adapter = nn.Identity()
        self.classifier = net.classifier
        self.taps = (
            Tap(name="stem", module="features.0", channels=32, stride=2),
            Tap(name="stage1", module="features.3", channels=24, stride=4),
            Tap(name="stage2", module="features.6", channels=32, stride=8),
            Tap(name="stage3", module="features.13", channels=96, stride=16),
            Tap(name="stage4", module="features.17", channels=320, stride=32),
            Tap(name="last", module="features.18", channels=1280, stride=32),
        )

    def init_branch(self, conv: nn.Conv2d) -> None:
        nn.init.kaiming_normal_(conv.weight, mode="fan_out")

    def extract(self, images: Tensor) -> Tensor:
        return cast(Tensor, self.features(images))

    def classify(self, feature: Tensor) -> Tensor:
        pooled = functional.adaptive_avg_pool2d(feature, 1)
        return cast(Tensor, self.classifier(torch.flatten(pooled, 1)))


@STUDENTS.register("mobilenetv2")
def mobilenetv2(*, num_classes: int, image_size: int) -> Student:
    """The form of MobileNetV2 that fits images of ``image_size`` pixels a side."""
    form = MobileNetV2 if image_size >= IMAGENET_MIN_SIZE else SmallMobileNetV2
    return form(num_classes, image_size)
