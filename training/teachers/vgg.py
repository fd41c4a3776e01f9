"""VGG with batch norm (Simonyan & Zisserman, 2015): one linear layer for small images, torchvision's form for ImageNet.

f0 to f4 of the literature are ``stem`` and ``stage1`` to ``stage4``: each ends with the ReLU of its last convolution,
and the max pooling between two stages belongs to the later stage.
"""

import math
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from kdexport.errors import ConfigError
from kdexport.students import Stage, Tap
from kdexport.students.classifier import IMAGENET_MIN_SIZE, torchvision_network
from training.teachers import TEACHERS
from training.teachers.teacher import Teacher

_WIDTHS = (64, 128, 256, 512, 512)
#: For images of this side or more, the small form also pools before its last stage, as its public definition does.
_FOURTH_POOLING = 64
# In torchvision's ``features``, the ReLU that ends each stage; the next stage's pooling comes right after it.
_RELUS, _LAST_POOLING = (5, 12, 19, 26, 33), 34


def _taps(strides: Sequence[int]) -> tuple[Tap, ...]:
    names = ("stem", "stage1", "stage2", "stage3", "stage4")
    return tuple(
        Tap(name=name, channels=channels, stride=stride)
        for name, channels, stride in zip(names, _WIDTHS, strides, strict=True)
    )


class SmallVgg(Teacher):
    """The form of the distillation literature for 32x32 inputs; at 100 classes vgg13 has 9,462,180 parameters.

    Convolutions have a bias. Global average pooling and one linear layer replace the three linear layers, so images may
    have any size. Odd maps are pooled with ``ceil_mode``. Parameters have the names of public checkpoints: block0.0,
    block0.1, block0.3, block0.4, classifier.
    """

    def __init__(self, convs_per_stage: int, *, num_classes: int, image_size: int) -> None:
        super().__init__()
        self.num_classes, self.image_size = num_classes, image_size
        self._poolings = 4 if image_size >= _FOURTH_POOLING else 3
        for index, (inputs, outputs) in enumerate(pairwise((3, *_WIDTHS))):
            layers: list[nn.Module] = []
            for position in range(convs_per_stage):
                conv = nn.Conv2d(inputs if position == 0 else outputs, outputs, 3, padding=1)
                layers += [conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
            # ``advance`` applies the last ReLU, because it also returns the pre-activation.
            self.add_module(f"block{index}", nn.Sequential(*layers[:-1]))
        self.classifier = nn.Linear(_WIDTHS[-1], num_classes)
        self.taps = _taps([2 ** min(index, self._poolings) for index in range(len(_WIDTHS))])
        self.classifier_path = "classifier"
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=math.sqrt(2.0 / (9 * module.out_channels)))
                nn.init.zeros_(cast(Tensor, module.bias))
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)

    def advance(self, index: int, x: Tensor) -> Stage:
        if 0 < index <= self._poolings:
            x = functional.max_pool2d(x, 2, ceil_mode=True)
        preactivation = self.get_submodule(f"block{index}")(x)
        return Stage.rectified(preactivation)

    def predict(self, pooled: Tensor) -> Tensor:
        return cast(Tensor, self.classifier(pooled))


class Vgg13(Teacher):
    """torchvision's vgg13_bn with its parameter names: 129,366,436 parameters at 100 classes.

    Its classifier has three linear layers with ReLU and dropout between them. The pooled vector is the input of the
    first one: the last feature, max-pooled, averaged to 7x7 and flattened to 25,088 values. ``classifier_path`` is
    that layer, whose output is 4,096 values, not the logits.
    """

    def __init__(self, *, num_classes: int, image_size: int) -> None:
        super().__init__()
        if image_size % 16:
            raise ConfigError(
                f"vgg13 at ImageNet sizes needs a multiple of 16 pixels a side, but data.image_size is {image_size}: "
                "its poolings would drop odd rows.",
                remedy=f"Set data.image_size to {image_size // 16 * 16} or {(image_size // 16 + 1) * 16}.",
            )
        self.num_classes, self.image_size = num_classes, image_size
        net = torchvision_network("vgg13_bn", num_classes=num_classes)
        # The parameter names of torchvision, so that its checkpoints load unchanged.
        self.features, self.avgpool, self.classifier = net.features, net.avgpool, net.classifier
        for index in _RELUS:
            # An in-place ReLU would overwrite the pre-activation.
            cast(nn.ReLU, self.features[index]).inplace = False
        self.taps, self.classifier_path = _taps([2**index for index in range(len(_WIDTHS))]), "classifier.0"

    def advance(self, index: int, x: Tensor) -> Stage:
        first, relu = 0 if index == 0 else _RELUS[index - 1] + 1, _RELUS[index]
        for position in range(first, relu):
            x = self.features[position](x)
        preactivation = x
        return Stage(self.features[relu](preactivation), lambda: preactivation)

    def pool(self, feature: Tensor) -> Tensor:
        return torch.flatten(self.avgpool(self.features[_LAST_POOLING](feature)), 1)

    def predict(self, pooled: Tensor) -> Tensor:
        return cast(Tensor, self.classifier(pooled))


@TEACHERS.register("vgg13")
def vgg13(*, num_classes: int, image_size: int) -> Teacher:
    """The VGG13 for images with a side of ``image_size`` pixels."""
    if image_size >= IMAGENET_MIN_SIZE:
        return Vgg13(num_classes=num_classes, image_size=image_size)
    return SmallVgg(2, num_classes=num_classes, image_size=image_size)


# VGG with one convolution in each stage exists only for small images; larger images use the same network.
TEACHERS.register("vgg8")(partial(SmallVgg, 1))
