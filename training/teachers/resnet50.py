"""ResNet50 (He et al., 2016): a 3x3 stem without pooling for small images, torchvision's form for ImageNet sizes.

In both the 3x3 convolution of the first bottleneck has the stride of a stage.
"""

from typing import cast

from torch import Tensor, nn
from torch.nn import functional

from kdexport.students import Stage, Tap
from kdexport.students.classifier import IMAGENET_MIN_SIZE, torchvision_network
from training.teachers import TEACHERS
from training.teachers.teacher import Teacher

_BLOCKS, _EXPANSION = (3, 4, 6, 3), 4


def _taps(stem_stride: int, first_stride: int) -> tuple[Tap, ...]:
    stem = Tap(name="stem", channels=64, stride=stem_stride)
    stages = [
        Tap(name=f"stage{index + 1}", channels=64 * _EXPANSION * 2**index, stride=first_stride * 2**index)
        for index in range(len(_BLOCKS))
    ]
    return (stem, *stages)


class _Bottleneck(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = width * _EXPANSION
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            projection = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(_preactivate(self, self.shortcut, x))


def _preactivate(block: nn.Module, shortcut: nn.Module | None, x: Tensor) -> Tensor:
    """The input of the last ReLU of a bottleneck, which the in-place ReLU of torchvision's block overwrites."""
    y = functional.relu(block.bn1(block.conv1(x)))  # type: ignore[operator]
    y = functional.relu(block.bn2(block.conv2(y)))  # type: ignore[operator]
    y = block.bn3(block.conv3(y))  # type: ignore[operator]
    return cast(Tensor, y + (x if shortcut is None else shortcut(x)))


class SmallResNet50(Teacher):
    """The form of the distillation literature for 32x32 inputs: 23,705,252 parameters at 100 classes.

    Parameters have the names of public checkpoints: conv1, bn1, layer1.0.conv1, layer1.0.shortcut.0, linear.
    """

    def __init__(self, *, num_classes: int, image_size: int) -> None:
        super().__init__()
        self.num_classes, self.image_size = num_classes, image_size
        self.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        channels = 64
        for index, count in enumerate(_BLOCKS):
            width, outputs = 64 * 2**index, 64 * 2**index * _EXPANSION
            blocks = [_Bottleneck(channels, width, 1 if index == 0 else 2)]
            blocks += [_Bottleneck(outputs, width, 1) for _ in range(count - 1)]
            self.add_module(f"layer{index + 1}", nn.Sequential(*blocks))
            channels = outputs
        self.linear = nn.Linear(channels, num_classes)
        self.taps, self.classifier_path = _taps(stem_stride=1, first_stride=1), "linear"
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
            preactivation = _preactivate(last, cast(_Bottleneck, last).shortcut, x)
        return Stage.rectified(preactivation)

    def predict(self, pooled: Tensor) -> Tensor:
        return cast(Tensor, self.linear(pooled))


class ResNet50(Teacher):
    """torchvision's ResNet50 with its parameter names: 23,712,932 parameters at 100 classes.

    The tap of the stem is before the max pooling, which belongs to the first stage.
    """

    def __init__(self, *, num_classes: int, image_size: int) -> None:
        super().__init__()
        self.num_classes, self.image_size = num_classes, image_size
        net = torchvision_network("resnet50", num_classes=num_classes)
        # The parameter names of torchvision, so that its checkpoints load unchanged.
        self.conv1, self.bn1, self.maxpool = net.conv1, net.bn1, net.maxpool
        self.layer1, self.layer2, self.layer3, self.layer4 = net.layer1, net.layer2, net.layer3, net.layer4
        self.fc = net.fc
        self.taps, self.classifier_path = _taps(stem_stride=2, first_stride=4), "fc"

    def advance(self, index: int, x: Tensor) -> Stage:
        if index == 0:
            preactivation = self.bn1(self.conv1(x))
        else:
            x = self.maxpool(x) if index == 1 else x
            *blocks, last = cast(nn.Sequential, self.get_submodule(f"layer{index}"))
            for block in blocks:
                x = block(x)
            preactivation = _preactivate(last, cast(nn.Module | None, last.downsample), x)
        return Stage.rectified(preactivation)

    def predict(self, pooled: Tensor) -> Tensor:
        return cast(Tensor, self.fc(pooled))


@TEACHERS.register("resnet50")
def resnet50(*, num_classes: int, image_size: int) -> Teacher:
    """The ResNet50 for images with a side of ``image_size`` pixels."""
    form = ResNet50 if image_size >= IMAGENET_MIN_SIZE else SmallResNet50
    return form(num_classes=num_classes, image_size=image_size)
