"""``[preprocessing]``: the preprocessing of a student in a configuration file."""

from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from kdexport.core.toml import Settings
from kdexport.data.preprocessing import Fit, Geometry, Orientation, Preprocessing
from kdexport.data.resampling import Interpolation
from kdexport.errors import ConfigError


def _as_tuple(value: Any) -> Any:
    # TOML has only arrays, but strict validation needs tuples for fixed lengths.
    return tuple(value) if isinstance(value, list) else value


Pixels = Annotated[int, Field(ge=8, le=4096)]
Part = Annotated[int, Field(ge=0, le=255)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Divisor = Annotated[float, Field(gt=0, allow_inf_nan=False)]
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
    mean: Annotated[tuple[Finite, Finite, Finite], BeforeValidator(_as_tuple)] | None = None
    std: Annotated[tuple[Divisor, Divisor, Divisor], BeforeValidator(_as_tuple)] | None = None


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
