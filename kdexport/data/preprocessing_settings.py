"""``[preprocessing]``: the preprocessing of a student in a configuration file."""

from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from kdexport.core.toml import Settings
from kdexport.data.preprocessing import Fit, Geometry, Orientation, Preprocessing
from kdexport.data.resampling import Interpolation
from kdexport.errors import ConfigError


def _as_tuple(value: Any) -> Any:
    # TOML has only arrays, but strict validation needs tuples for fixed lengths.
    return tuple(value) if isinstance(value, list) else value


Pixels = Annotated[int, Field(ge=8, le=4096)]
Part = Annotated[int, Field(ge=0, le=255)]
#: Pixels from 0 to 255 are 1/255 on this scale, and no images deviate by less; rounded values are allowed.
_LEAST_DEVIATION = 0.003


def _on_unit_scale(value: float) -> float:
    if not 0 <= value <= 1:
        raise ValueError("must be from 0 to 1, because pixels are divided by 255 before; divide it by 255 too")
    return value


def _a_deviation(value: float) -> float:
    if value < _LEAST_DEVIATION:
        raise ValueError(f"is less than one grey level, {1 / 255:.4f}; it must be divided by 255 once, not twice")
    return _on_unit_scale(value)


#: Mean and standard deviation of a channel whose pixels are from 0 to 1.
Mean = Annotated[float, Field(allow_inf_nan=False), AfterValidator(_on_unit_scale)]
Deviation = Annotated[float, Field(gt=0, allow_inf_nan=False), AfterValidator(_a_deviation)]
#: Red, green and blue from 0 to 255.
ColourSetting = Annotated[tuple[Part, Part, Part], BeforeValidator(_as_tuple)]


class PreprocessingSettings(Settings):
    """``[preprocessing]``: each key replaces the student's own; those that are not set keep it."""

    image_size: Pixels | None = None
    resize: Pixels | None = None
    geometry: Geometry | None = None
    interpolation: Interpolation | None = None
    fit: Fit | None = None
    pad_colour: ColourSetting | None = None
    orientation: Orientation | None = None
    #: The colour behind transparent pixels; ``ignore`` shows the colours that are stored under transparency.
    background: ColourSetting | Literal["ignore"] | None = None
    mean: Annotated[tuple[Mean, Mean, Mean], BeforeValidator(_as_tuple)] | None = None
    std: Annotated[tuple[Deviation, Deviation, Deviation], BeforeValidator(_as_tuple)] | None = None


def apply_settings(settings: PreprocessingSettings, base: Preprocessing) -> Preprocessing:
    """``base`` with the keys of ``settings``; raises ``ConfigError`` if they do not fit together."""
    chosen: dict[str, Any] = settings.model_dump(exclude_none=True)
    if chosen.get("background") == "ignore":
        chosen["background"] = None
    try:
        return replace(base, **chosen)
    except ValueError as error:
        raise ConfigError(
            f"[preprocessing] does not fit the student: {error}.",
            remedy="Correct these keys under [preprocessing]; keys that are not set are those of the student.",
        ) from None
