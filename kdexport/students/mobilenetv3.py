"""MobileNetV3 (Howard et al., 2019): torchvision's Large for ImageNet sizes, Small with two fewer strides for 32x32.

The distillation literature specifies neither the variant nor its form for 32x32 images. For ImageNet sizes it is Large
here, because the reported accuracies fit it: Large is above MobileNetV2 and Small clearly below (on ImageNet,
torchvision's first weights: 74.0 %, 71.9 % and 67.7 %). For 32x32 it is Small, which has the size of the other small
students; Large has 2.7 times its parameters.
"""

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from kdexport.students import STUDENTS
from kdexport.students.classifier import torchvision_network
from kdexport.students.student import Form, Host, Stage, Student, Tap, is_full


@dataclass(frozen=True, slots=True)
class _Form:
    """The index of the module of torchvision's ``features`` at each tap, and the stride of the tap."""

    ends: tuple[int, ...]
    strides: tuple[int, ...]


_SMALL = _Form((0, 1, 3, 8, 11, 12), (1, 1, 2, 4, 8, 8))
_LARGE = _Form((0, 3, 6, 12, 15, 16), (2, 4, 8, 16, 32, 32))


class MobileNetV3(Student):
    """A MobileNetV3 with torchvision's parameter names, so that its checkpoints load strictly.

    The pooled vector is the input of the last linear layer: after the average, the hidden layer and its hard swish.
    """

    name = "mobilenetv3"

    def __init__(self, net: nn.Module, form: _Form, num_classes: int, image_size: int) -> None:
        super().__init__()
        self.features = cast(nn.Sequential, net.get_submodule("features"))
        self.classifier = cast(nn.Sequential, net.get_submodule("classifier"))
        # An in-place activation would overwrite the feature of a tap.
        for module in self.modules():
            if isinstance(module, nn.ReLU | nn.Hardswish | nn.Dropout):
                module.inplace = False
        self._ends = form.ends
        names = ("stem", "stage1", "stage2", "stage3", "stage4", "last")
        hosts = [self._host(name, end) for name, end in zip(names, form.ends, strict=True)]
        convs = [cast(nn.Conv2d, self.get_submodule(host.conv)) for host in hosts]
        taps = [
            Tap(name=name, channels=conv.out_channels, stride=stride)
            for name, conv, stride in zip(names, convs, form.strides, strict=True)
        ]
        self.describe(
            num_classes=num_classes, image_size=image_size, taps=taps, hosts=hosts[1:], classifier_path="classifier.3"
        )

    def _host(self, name: str, end: int) -> Host:
        module, path = self.features[end], f"features.{end}"
        if name.startswith("stage"):
            # Not every block has an expansion or squeeze-and-excitation; the projection is always the last part.
            path = f"{path}.block.{len(cast(nn.Sequential, module.block)) - 1}"
        return Host(tap=name, conv=f"{path}.0", batch_norm=f"{path}.1")

    def init_branch(self, conv: nn.Conv2d) -> None:
        nn.init.kaiming_normal_(conv.weight, mode="fan_out")

    def advance(self, index: int, x: Tensor) -> Stage:
        if index in (0, len(self._ends) - 1):
            return Stage.activated(self.features[self._ends[index]], x)
        for position in range(self._ends[index - 1] + 1, self._ends[index] + 1):
            x = self.features[position](x)
        return Stage.linear(x)

    def pool(self, feature: Tensor) -> Tensor:
        average = torch.flatten(functional.adaptive_avg_pool2d(feature, 1), 1)
        return cast(Tensor, self.classifier[1](self.classifier[0](average)))

    def predict(self, pooled: Tensor) -> Tensor:
        return cast(Tensor, self.classifier[3](self.classifier[2](pooled)))


def _small(num_classes: int, image_size: int) -> Student:
    """1,620,356 parameters at 100 classes; stem and first block have stride 1, so 32x32 images end at 4x4."""
    net = torchvision_network("mobilenet_v3_small", num_classes=num_classes)
    for path in ("features.0.0", "features.1.block.0.0"):
        net.get_submodule(path).stride = (1, 1)
    return MobileNetV3(net, _SMALL, num_classes, image_size)


def _large(num_classes: int, image_size: int) -> Student:
    """4,330,132 parameters at 100 classes."""
    return MobileNetV3(
        torchvision_network("mobilenet_v3_large", num_classes=num_classes), _LARGE, num_classes, image_size
    )


@STUDENTS.register("mobilenetv3")
def mobilenetv3(*, num_classes: int, image_size: int, form: Form = "auto") -> Student:
    """The MobileNetV3 for images with a side of ``image_size`` pixels."""
    return (_large if is_full(form, image_size) else _small)(num_classes, image_size)
