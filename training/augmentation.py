"""Random changes of training images: operations on each image, erased rectangles, and mixtures of a batch.

Each is a function of the image and of a generator of its own, so that a run that continues, and any number of threads
or processes, draw the same. The operations are those of torchvision, and so are their strengths.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor

from training.recipe import DataSettings, TrainSettings

if TYPE_CHECKING:
    from PIL import Image

_LEVELS = 31
#: The largest strength of each operation: in TrivialAugment, and in RandAugment. Translations are in pixels, in
#: RandAugment in parts of the side.
_TRIVIAL = {"shear": 0.99, "translate": 32.0, "rotate": 135.0, "enhance": 0.99, "posterize": 6}
_RANDAUGMENT = {"shear": 0.3, "translate": 150.0 / 331.0, "rotate": 30.0, "enhance": 0.9, "posterize": 4}
_OPERATIONS = (
    *("identity", "shear_x", "shear_y", "translate_x", "translate_y", "rotate", "brightness", "color", "contrast"),
    *("sharpness", "posterize", "solarize", "autocontrast", "equalize"),
)
#: Part of the area and aspect ratio of an erased rectangle, and the number of draws until one fits.
_ERASED_AREA, _ERASED_ASPECT, _ERASED_TRIES = (0.02, 0.33), (0.3, 3.3), 10


def apply_policy(image: "Image.Image", settings: DataSettings, rng: np.random.Generator) -> "Image.Image":
    """``image`` after the random operations of ``settings.policy``; the same for the same state of ``rng``."""
    if settings.policy == "trivialaugment":
        name = _OPERATIONS[rng.integers(len(_OPERATIONS))]
        return operate(image, name, int(rng.integers(_LEVELS)), _TRIVIAL, negative=bool(rng.integers(2)))
    if settings.policy == "randaugment":
        for _ in range(settings.policy_operations):
            name = _OPERATIONS[rng.integers(len(_OPERATIONS))]
            largest = {**_RANDAUGMENT}
            if name.startswith("translate"):
                largest["translate"] *= image.width if name.endswith("x") else image.height
            image = operate(image, name, settings.policy_magnitude, largest, negative=bool(rng.integers(2)))
    return image


def operate(image: "Image.Image", name: str, level: int, largest: dict[str, float], *, negative: bool) -> "Image.Image":
    """``image`` after the operation ``name`` with a strength of ``level`` (0 to 30) of ``largest``.

    ``negative`` turns the direction of operations that have one.
    """
    from torchvision.transforms.v2 import functional as ops

    part = level / (_LEVELS - 1)
    sign = -1.0 if negative else 1.0
    simple: dict[str, Callable[[Any], Any]] = {
        "identity": lambda x: x,
        "autocontrast": ops.autocontrast,
        "equalize": ops.equalize,
        "posterize": lambda x: ops.posterize(x, 8 - round(part * largest["posterize"])),
        "solarize": lambda x: ops.solarize(x, 255.0 * (1 - part)),
        "brightness": lambda x: ops.adjust_brightness(x, 1 + sign * part * largest["enhance"]),
        "color": lambda x: ops.adjust_saturation(x, 1 + sign * part * largest["enhance"]),
        "contrast": lambda x: ops.adjust_contrast(x, 1 + sign * part * largest["enhance"]),
        "sharpness": lambda x: ops.adjust_sharpness(x, 1 + sign * part * largest["enhance"]),
        "rotate": lambda x: ops.rotate(x, sign * part * largest["rotate"]),
    }
    if name in simple:
        return cast("Image.Image", simple[name](image))
    kind, _, axis = name.partition("_")
    value = sign * part * largest[kind]
    x, y = (value, 0.0) if axis == "x" else (0.0, value)
    if kind == "translate":
        moved = ops.affine(image, angle=0.0, translate=[int(x), int(y)], scale=1.0, shear=[0.0, 0.0])
    else:
        degrees = [float(np.degrees(np.arctan(x))), float(np.degrees(np.arctan(y)))]
        moved = ops.affine(image, angle=0.0, translate=[0, 0], scale=1.0, shear=degrees, center=[0, 0])
    return cast("Image.Image", moved)


def erased_box(rng: np.random.Generator, side: int) -> tuple[slice, slice] | None:
    """The rows and columns of a rectangle to erase in a square of ``side`` pixels; None if no draw fits into it."""
    for _ in range(_ERASED_TRIES):
        area = side * side * rng.uniform(*_ERASED_AREA)
        aspect = np.exp(rng.uniform(*np.log(_ERASED_ASPECT)))
        height, width = round(float(np.sqrt(area * aspect))), round(float(np.sqrt(area / aspect)))
        if 0 < height < side and 0 < width < side:
            top, left = (int(rng.integers(side - size + 1)) for size in (height, width))
            return slice(top, top + height), slice(left, left + width)
    return None


class Mixer:
    """Mixes the images of a batch with each other by mixup or CutMix of torchvision, or leaves them as they are."""

    def __init__(self, settings: TrainSettings, num_classes: int) -> None:
        from torchvision.transforms import v2

        self._seed = settings.seed
        self._mixes: list[Any] = []
        if settings.mixup > 0:
            self._mixes.append(v2.MixUp(alpha=settings.mixup, num_classes=num_classes))
        if settings.cutmix > 0:
            self._mixes.append(v2.CutMix(alpha=settings.cutmix, num_classes=num_classes))

    def __call__(self, images: Tensor, labels: Tensor, epoch: int, step: int) -> tuple[Tensor, Tensor | None]:
        """The images (N,3,S,S) of a step as both networks see them, and the parts of the classes in them (N,K).

        Without mixing, the images themselves and None. ``labels`` are (N,). The draw depends on the seed, ``epoch`` and
        ``step`` only, and the global generator is left as it was.
        """
        if not self._mixes:
            return images, None
        # torchvision draws from the global generator of the CPU.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(((self._seed + 7) * 1_000_003 + epoch) * 1_000_003 + step)
            chosen = self._mixes[int(torch.randint(len(self._mixes), ()))]
            mixed, targets = chosen(images, labels)
        return mixed.contiguous(memory_format=torch.channels_last), targets
