"""The small-image teachers, written out from their description: their tensors by name and what they compute.

Nothing here is read from the networks. A batch norm has five tensors, a convolution one or two.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from training.teachers import TEACHERS, Teacher

Shapes = dict[str, tuple[int, ...]]
State = dict[str, Tensor]


@dataclass
class Description:
    """Tensors by name, collected layer by layer."""

    shapes: Shapes = field(default_factory=dict)

    def conv(self, name: str, inputs: int, outputs: int, kernel: int, *, bias: bool = False) -> None:
        self.shapes[f"{name}.weight"] = (outputs, inputs, kernel, kernel)
        if bias:
            self.shapes[f"{name}.bias"] = (outputs,)

    def norm(self, name: str, channels: int) -> None:
        for part in ("weight", "bias", "running_mean", "running_var"):
            self.shapes[f"{name}.{part}"] = (channels,)
        self.shapes[f"{name}.num_batches_tracked"] = ()

    def linear(self, name: str, inputs: int, outputs: int) -> None:
        self.shapes[f"{name}.weight"], self.shapes[f"{name}.bias"] = (outputs, inputs), (outputs,)


def resnet(count: int, widths: tuple[int, int, int, int], classes: int) -> Shapes:
    text, inputs = Description(), widths[0]
    text.conv("conv1", 3, inputs, 3)
    text.norm("bn1", inputs)
    for stage, width in enumerate(widths[1:], 1):
        for block in range(count):
            at = f"layer{stage}.{block}"
            text.conv(f"{at}.conv1", inputs, width, 3)
            text.conv(f"{at}.conv2", width, width, 3)
            text.norm(f"{at}.bn1", width)
            text.norm(f"{at}.bn2", width)
            if inputs != width:
                text.conv(f"{at}.downsample.0", inputs, width, 1)
                text.norm(f"{at}.downsample.1", width)
            inputs = width
    text.linear("fc", inputs, classes)
    return text.shapes


def wide_resnet(classes: int) -> Shapes:
    text, inputs = Description(), 16
    text.conv("conv1", 3, 16, 3)
    for group, width in enumerate((32, 64, 128), 1):
        for block in range(6):
            at = f"block{group}.layer.{block}"
            text.norm(f"{at}.bn1", inputs)
            text.conv(f"{at}.conv1", inputs, width, 3)
            text.norm(f"{at}.bn2", width)
            text.conv(f"{at}.conv2", width, width, 3)
            if block == 0:
                text.conv(f"{at}.convShortcut", inputs, width, 1)
            inputs = width
    text.norm("bn1", 128)
    text.linear("fc", 128, classes)
    return text.shapes


def vgg(count: int, classes: int) -> Shapes:
    text, inputs = Description(), 3
    for block, width in enumerate((64, 128, 256, 512, 512)):
        for position in range(count):
            text.conv(f"block{block}.{3 * position}", inputs, width, 3, bias=True)
            text.norm(f"block{block}.{3 * position + 1}", width)
            inputs = width
    text.linear("classifier", 512, classes)
    return text.shapes


def resnet50(classes: int) -> Shapes:
    text, inputs = Description(), 64
    text.conv("conv1", 3, 64, 3)
    text.norm("bn1", 64)
    for stage, (width, count) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3)), 1):
        for block in range(count):
            at = f"layer{stage}.{block}"
            text.conv(f"{at}.conv1", inputs, width, 1)
            text.conv(f"{at}.conv2", width, width, 3)
            text.conv(f"{at}.conv3", width, 4 * width, 1)
            for index, channels in enumerate((width, width, 4 * width), 1):
                text.norm(f"{at}.bn{index}", channels)
            if block == 0:
                text.conv(f"{at}.shortcut.0", inputs, 4 * width, 1)
                text.norm(f"{at}.shortcut.1", 4 * width)
            inputs = 4 * width
    text.linear("linear", 2048, classes)
    return text.shapes


SHAPES: dict[str, Callable[[int], Shapes]] = {
    "resnet8": lambda classes: resnet(1, (16, 16, 32, 64), classes),
    "resnet20": lambda classes: resnet(3, (16, 16, 32, 64), classes),
    "resnet56": lambda classes: resnet(9, (16, 16, 32, 64), classes),
    "resnet8x4": lambda classes: resnet(1, (32, 64, 128, 256), classes),
    "resnet32x4": lambda classes: resnet(5, (32, 64, 128, 256), classes),
    "wrn40_2": wide_resnet,
    "vgg8": lambda classes: vgg(1, classes),
    "vgg13": lambda classes: vgg(2, classes),
    "resnet50": resnet50,
}


@dataclass
class Walk:
    """What a network gives: features and pre-activations from shallow to deep, pooled vectors and logits."""

    features: list[Tensor]
    preactivations: list[Tensor]
    pooled: Tensor
    logits: Tensor


@dataclass
class Layers:
    """Layers by name, on the tensors of a state_dict in evaluation mode."""

    state: State

    def conv(self, name: str, x: Tensor, stride: int = 1) -> Tensor:
        weight = self.state[f"{name}.weight"]
        return functional.conv2d(x, weight, self.state.get(f"{name}.bias"), stride, weight.shape[-1] // 2)

    def norm(self, name: str, x: Tensor) -> Tensor:
        mean, variance, gain, bias = (
            self.state[f"{name}.{part}"].reshape(1, -1, 1, 1)
            for part in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / torch.sqrt(variance + 1e-5) * gain + bias

    def linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.state[f"{name}.weight"].T + self.state[f"{name}.bias"]

    def count(self, prefix: str) -> int:
        """Number of numbered parts below ``prefix``."""
        return len({name[len(prefix) + 1 :].split(".")[0] for name in self.state if name.startswith(f"{prefix}.")})

    def residual(self, at: str, x: Tensor, shortcut: str, stride: int) -> Tensor:
        """The sum of a basic block or a bottleneck, before its last ReLU."""
        depth = 3 if f"{at}.conv3.weight" in self.state else 2
        y = x
        for index in range(1, depth + 1):
            strided = index == (2 if depth == 3 else 1)
            y = self.norm(f"{at}.bn{index}", self.conv(f"{at}.conv{index}", y, stride if strided else 1))
            y = y.clamp(min=0) if index < depth else y
        if f"{at}.{shortcut}.0.weight" in self.state:
            x = self.norm(f"{at}.{shortcut}.1", self.conv(f"{at}.{shortcut}.0", x, stride))
        return y + x


def walk_resnet(state: State, images: Tensor) -> Walk:
    layers = Layers(state)
    fc, shortcut = ("linear", "shortcut") if "linear.weight" in state else ("fc", "downsample")
    preactivations = [layers.norm("bn1", layers.conv("conv1", images))]
    x = preactivations[0].clamp(min=0)
    features = [x]
    for stage in range(1, 5 if fc == "linear" else 4):
        for block in range(layers.count(f"layer{stage}")):
            stride = 2 if stage > 1 and block == 0 else 1
            before = layers.residual(f"layer{stage}.{block}", x, shortcut, stride)
            x = before.clamp(min=0)
        preactivations.append(before)
        features.append(x)
    pooled = x.mean((2, 3))
    return Walk(features, preactivations, pooled, layers.linear(fc, pooled))


def walk_wide_resnet(state: State, images: Tensor) -> Walk:
    layers = Layers(state)
    x = layers.conv("conv1", images)
    features = [x]
    for group in (1, 2, 3):
        for block in range(6):
            at, stride = f"block{group}.layer.{block}", 2 if group > 1 and block == 0 else 1
            active = layers.norm(f"{at}.bn1", x).clamp(min=0)
            y = layers.norm(f"{at}.bn2", layers.conv(f"{at}.conv1", active, stride)).clamp(min=0)
            carried = layers.conv(f"{at}.convShortcut", active, stride) if block == 0 else x
            x = layers.conv(f"{at}.conv2", y) + carried
        features.append(x)
    readers = ("block1.layer.0.bn1", "block2.layer.0.bn1", "block3.layer.0.bn1", "bn1")
    preactivations = [layers.norm(reader, feature) for reader, feature in zip(readers, features, strict=True)]
    pooled = preactivations[-1].clamp(min=0).mean((2, 3))
    return Walk(features, preactivations, pooled, layers.linear("fc", pooled))


def walk_vgg(state: State, images: Tensor) -> Walk:
    layers, x = Layers(state), images
    features: list[Tensor] = []
    preactivations: list[Tensor] = []
    for block in range(5):
        if block in (1, 2, 3):
            n, c, h, w = x.shape
            x = x.reshape(n, c, h // 2, 2, w // 2, 2).amax((3, 5))
        for position in range(layers.count(f"block{block}") // 2):
            before = layers.norm(f"block{block}.{3 * position + 1}", layers.conv(f"block{block}.{3 * position}", x))
            x = before.clamp(min=0)
        preactivations.append(before)
        features.append(x)
    pooled = x.mean((2, 3))
    return Walk(features, preactivations, pooled, layers.linear("classifier", pooled))


def walk(name: str, state: State, images: Tensor) -> Walk:
    """What the teacher ``name`` with the tensors ``state`` computes for ``images`` of 32 pixels a side."""
    if name.startswith("vgg"):
        return walk_vgg(state, images)
    return walk_wide_resnet(state, images) if name.startswith("wrn") else walk_resnet(state, images)


def built(name: str, image_size: int, num_classes: int = 100, *, device: str = "cpu") -> Teacher:
    with torch.device(device):
        return TEACHERS.build(name, num_classes=num_classes, image_size=image_size)
