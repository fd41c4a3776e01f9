"""The preprocessing of networks of torchvision and timm, read from what these libraries say of their weights.

Neither library is imported here. Orientation and transparency are those of new students: both libraries leave them to
who opens the image.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NoReturn, get_args

from kdexport.data.preprocessing import Fit, Preprocessing
from kdexport.data.resampling import Interpolation
from kdexport.errors import ConfigError

_CROP_MODES: dict[str, Fit] = {"center": "crop", "squash": "squash", "border": "pad"}
_REQUIRED = ("input_size", "interpolation", "mean", "std", "crop_pct")


def from_torchvision(preset: Any) -> Preprocessing:
    """The preprocessing of ``weights.transforms()``, torchvision's ``ImageClassification`` preset.

    Pixels equal those of the preset on an RGB image of Pillow, bit for bit. Raises ``ConfigError`` for other presets,
    and for what a student cannot have.
    """
    source = "the preprocessing of torchvision"
    crop, size = getattr(preset, "crop_size", None), getattr(preset, "resize_size", None)
    if crop is None or size is None or not hasattr(preset, "mean"):
        raise ConfigError(
            f"{type(preset).__name__} is not a preset of torchvision for image classification: it has no crop_size, "
            "resize_size or mean.",
            remedy="Pass weights.transforms() of weights for classification.",
        )
    mode = getattr(preset.interpolation, "value", preset.interpolation)
    return _made(
        source,
        image_size=_side(crop, "crop_size", source),
        resize=_side(size, "resize_size", source),
        mean=preset.mean,
        std=preset.std,
        # On images of Pillow both mean Pillow's nearest.
        interpolation="nearest" if mode == "nearest-exact" else mode,
    )


def from_timm(config: Mapping[str, Any]) -> Preprocessing:
    """The preprocessing of evaluation of ``timm.data.resolve_data_config({}, model=...)``, or of a ``pretrained_cfg``.

    Pixels equal those of ``timm.data.create_transform(..., is_training=False)`` on an RGB image, bit for bit. Raises
    ``ConfigError`` for what a student cannot have: another number of channels than 3, or an input that is not square.
    """
    source = "the preprocessing of timm"
    missing = [key for key in _REQUIRED if config.get(key) is None]
    if missing:
        raise ConfigError(
            f"The configuration of timm has no {', '.join(missing)}.",
            remedy="Pass timm.data.resolve_data_config({}, model=model).",
        )
    size = tuple(config["input_size"])
    if len(size) != 3 or size[0] != 3:
        _refuse(source, f"input_size is {size}: students take 3 channels (RGB)")
    image_size = _side(size[1:], "input_size", source)
    if not 0 < config["crop_pct"] <= 8:
        _refuse(source, f"crop_pct is {config['crop_pct']!r}")
    mode = config.get("crop_mode") or "center"
    if mode not in _CROP_MODES:
        _refuse(source, f"crop_mode is {mode!r}: known are {', '.join(_CROP_MODES)}")
    fit = _CROP_MODES[mode]
    made = _made(
        source,
        image_size=image_size,
        resize=math.floor(image_size / config["crop_pct"]),
        mean=config["mean"],
        std=config["std"],
        interpolation=config["interpolation"],
    )
    if fit != "pad":
        return replace(made, fit=fit)
    red, green, blue = (min(max(round(255 * value), 0), 255) for value in made.mean)
    return replace(made, fit=fit, pad_colour=(red, green, blue))


def _made(
    source: str, *, image_size: int, resize: int, mean: Sequence[float], std: Sequence[float], interpolation: Any
) -> Preprocessing:
    if interpolation not in get_args(Interpolation):
        _refuse(source, f"interpolation is {interpolation!r}: known are {', '.join(get_args(Interpolation))}")
    for key, values in (("mean", mean), ("std", std)):
        if len(values) != 3:
            _refuse(source, f"{key} is {tuple(values)}: students take 3 channels (RGB)")
    try:
        new = Preprocessing.for_new_student(
            image_size=image_size,
            resize=resize,
            mean=(float(mean[0]), float(mean[1]), float(mean[2])),
            std=(float(std[0]), float(std[1]), float(std[2])),
        )
    except ValueError as error:
        _refuse(source, str(error))
    return replace(new, interpolation=interpolation)


def _side(value: Any, key: str, source: str) -> int:
    """The one side of a size that is a number, or one or two equal numbers."""
    sides = set(value) if isinstance(value, Sequence) else {value}
    if len(sides) != 1:
        _refuse(source, f"{key} is {tuple(value)}: inputs of students are square")
    return int(sides.pop())


def _refuse(source: str, reason: str) -> NoReturn:
    raise ConfigError(f"A student cannot have {source} of this network: {reason}.", remedy="Choose another network.")
