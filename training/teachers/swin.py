"""Swin transformers (Liu et al., 2021) from torchvision, with taps in the (N,C,H,W) of convolutional networks."""

from functools import partial
from typing import cast

from torch import Tensor, nn

from kdexport.errors import ConfigError
from kdexport.students import Stage, Tap
from kdexport.students.classifier import IMAGENET_MIN_SIZE, torchvision_network
from training.teachers import TEACHERS
from training.teachers.teacher import Teacher

_PATCH = 4
_STAGES = 4


class Swin(Teacher):
    """Patch embedding and four stages, with torchvision's names; swin_t has 27,596,254 parameters at 100 classes.

    A stage ends without an activation, so its feature and its pre-activation are one tensor. Only the last feature is
    after the final layer norm, because the pooling reads that, and its pre-activation before it. The merging of patches
    between two stages belongs to the later stage.
    """

    def __init__(self, name: str, *, num_classes: int, image_size: int) -> None:
        super().__init__()
        _check_size(name, image_size)
        self.num_classes, self.image_size = num_classes, image_size
        net = torchvision_network(name, num_classes=num_classes)
        # The parameter names of torchvision, so that its checkpoints load unchanged.
        self.features, self.norm = cast(nn.Sequential, net.features), cast(nn.LayerNorm, net.norm)
        self.head = cast(nn.Linear, net.head)
        width = self.head.in_features // 2 ** (_STAGES - 1)
        stages = [
            Tap(name=f"stage{index + 1}", channels=width * 2**index, stride=_PATCH * 2**index)
            for index in range(_STAGES)
        ]
        self.taps = (Tap(name="stem", channels=width, stride=_PATCH), *stages)
        self.classifier_path = "head"

    def advance(self, index: int, x: Tensor) -> Stage:
        if index == 0:
            return Stage.linear(_channels_first(self.features[0](x)))
        x = x.permute(0, 2, 3, 1)
        # Odd positions have the blocks of a stage, even ones the merging of patches before it.
        for position in range(max(1, 2 * index - 2), 2 * index):
            x = self.features[position](x)
        if index < _STAGES:
            return Stage.linear(_channels_first(x))
        return Stage(_channels_first(self.norm(x)), lambda: _channels_first(x))

    def predict(self, pooled: Tensor) -> Tensor:
        return cast(Tensor, self.head(pooled))


def _channels_first(x: Tensor) -> Tensor:
    """(N,H,W,C) to (N,C,H,W)."""
    return x.permute(0, 3, 1, 2)


def _check_size(name: str, image_size: int) -> None:
    if image_size < IMAGENET_MIN_SIZE:
        raise ConfigError(
            f"{name} needs images of at least {IMAGENET_MIN_SIZE} pixels a side, but data.image_size is {image_size}: "
            "smaller images have too few windows of 7 patches of 4 pixels.",
            remedy="Set data.image_size to 224, which resizes images for the student too, or choose another teacher.",
        )
    if image_size % _PATCH:
        raise ConfigError(
            f"{name} needs a multiple of {_PATCH} pixels a side, but data.image_size is {image_size}.",
            remedy=f"Set data.image_size to {image_size // _PATCH * _PATCH}.",
        )


for _name in ("swin_t", "swin_s", "swin_b"):
    TEACHERS.register(_name)(partial(Swin, _name))
