"""ResNet-18 (He et al., 2016): the CIFAR definition for 32x32 images, torchvision's for ImageNet sizes."""

from typing import cast

from torch import Tensor, nn
from torch.nn import functional

from kdexport.students import STUDENTS
from kdexport.students.classifier import torchvision_network
from kdexport.students.student import Form, Host, Stage, Student, Tap, is_full

_WIDTHS = (64, 128, 256, 512)


class _BasicBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut.append(nn.Conv2d(inputs, outputs, 1, stride, bias=False)).append(nn.BatchNorm2d(outputs))


def _stage(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(_BasicBlock(inputs, outputs, stride), _BasicBlock(outputs, outputs, 1))


class SmallResNet18(Student):
    """The CIFAR network, 11,220,132 parameters at 100 classes: 3x3 stem of stride 1, no max pooling.

    Parameter names are those of the public CIFAR code of this network, with ``shortcut`` and ``linear``.
    """

    name = "resnet18"

    def __init__(self, num_classes: int, image_size: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.layer1 = _stage(64, 64, 1)
        self.layer2 = _stage(64, 128, 2)
        self.layer3 = _stage(128, 256, 2)
        self.layer4 = _stage(256, 512, 2)
        self.linear = nn.Linear(512, num_classes)
        self.describe(
            num_classes=num_classes,
            image_size=image_size,
            taps=_taps(stem=1, first=1),
            hosts=_hosts(),
            classifier_path="linear",
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                self.init_branch(module)

    def init_branch(self, conv: nn.Conv2d) -> None:
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")

    def advance(self, index: int, x: Tensor) -> Stage:
        if index == 0:
            return Stage.rectified(self.bn1(self.conv1(x)))
        first, last = cast("list[_BasicBlock]", list(self.get_submodule(f"layer{index}").children()))
        x = functional.relu(_residual(first, x, first.shortcut))
        return Stage.rectified(_residual(last, x, last.shortcut))

    def predict(self, pooled: Tensor) -> Tensor:
        return cast(Tensor, self.linear(pooled))


class ResNet18(Student):
    """torchvision's ResNet-18 with its parameter names: 11,227,812 parameters at 100 classes.

    The tap ``stem`` is before the max pooling.
    """

    name = "resnet18"

    def __init__(self, num_classes: int, image_size: int) -> None:
        super().__init__()
        net = torchvision_network("resnet18", num_classes=num_classes)
        # The parameter names of torchvision, so that its checkpoints load unchanged.
        self.conv1, self.bn1, self.maxpool = net.conv1, net.bn1, net.maxpool
        self.layer1, self.layer2, self.layer3, self.layer4 = net.layer1, net.layer2, net.layer3, net.layer4
        self.fc = net.fc
        self.describe(
            num_classes=num_classes,
            image_size=image_size,
            taps=_taps(stem=2, first=4),
            hosts=_hosts(),
            classifier_path="fc",
        )

    def init_branch(self, conv: nn.Conv2d) -> None:
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")

    def advance(self, index: int, x: Tensor) -> Stage:
        if index == 0:
            return Stage.rectified(self.bn1(self.conv1(x)))
        x = self.maxpool(x) if index == 1 else x
        first, last = self.get_submodule(f"layer{index}").children()
        x = functional.relu(_residual(first, x, cast("nn.Module | None", first.downsample)))
        return Stage.rectified(_residual(last, x, cast("nn.Module | None", last.downsample)))

    def predict(self, pooled: Tensor) -> Tensor:
        return cast(Tensor, self.fc(pooled))


def _residual(block: nn.Module, x: Tensor, shortcut: nn.Module | None) -> Tensor:
    """The result of a basic block before its last ReLU."""
    conv1, bn1, conv2, bn2 = (block.get_submodule(name) for name in ("conv1", "bn1", "conv2", "bn2"))
    deep = bn2(conv2(functional.relu(bn1(conv1(x)))))
    return cast(Tensor, deep + (x if shortcut is None else shortcut(x)))


def _taps(*, stem: int, first: int) -> list[Tap]:
    stages = [Tap(name=f"stage{i + 1}", channels=width, stride=first * 2**i) for i, width in enumerate(_WIDTHS)]
    return [Tap(name="stem", channels=_WIDTHS[0], stride=stem), *stages]


def _hosts() -> list[Host]:
    return [Host(tap=f"stage{i}", conv=f"layer{i}.1.conv2", batch_norm=f"layer{i}.1.bn2") for i in range(1, 5)]


@STUDENTS.register("resnet18")
def resnet18(*, num_classes: int, image_size: int, form: Form = "auto") -> Student:
    """The ResNet-18 for images with a side of ``image_size`` pixels."""
    network = ResNet18 if is_full(form, image_size) else SmallResNet18
    return network(num_classes, image_size)
