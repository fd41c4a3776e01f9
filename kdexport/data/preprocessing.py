"""Preprocessing of images, from bytes to the input tensor: one definition for training, verification and serving."""

import contextlib
import io
import math
from collections.abc import Callable, Iterator
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from kdexport.core.normalisation import normalise_pixels
from kdexport.data.exif_and_alpha import Colour, ImageFacts, colour_planes, image_facts, orientation
from kdexport.data.resampling import Interpolation, resized_part
from kdexport.errors import DataError, KdexportError

if TYPE_CHECKING:
    from PIL import Image

#: Formats of data sets; Pillow decodes them itself, with no external program.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "PPM", "TIFF", "GIF")
#: A label is of one picture, so that a file with several frames or pages is refused.
_MAY_HAVE_PAGES = ("TIFF", "GIF")
#: Modes that Pillow cannot convert to RGB.
_NO_RGB = ("LAB", "HSV")
#: Lower than the limit of Pillow, so that this limit applies first.
_MAX_PIXELS = 80_000_000

Geometry = Literal["one_step", "two_steps"]
Fit = Literal["crop", "squash", "pad"]
Orientation = Literal["apply", "ignore"]
#: What new students see in place of transparency. Most programs store a transparent pixel as black, so that networks
#: which were trained without regard to transparency saw black too.
BACKGROUND: Colour = (0, 0, 0)
_CHOICES = {
    "geometry": get_args(Geometry),
    "interpolation": get_args(Interpolation),
    "fit": get_args(Fit),
    "orientation": get_args(Orientation),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Preprocessing:
    """How an image becomes the input of a student, in this order; docs/preprocessing.md explains each step.

    1. ``orientation``: the image is turned upright by its EXIF orientation, or that is ignored.
    2. ``background``: transparent pixels are composed on this colour; None ignores transparency. Then RGB.
    3. ``fit`` and ``resize``: the image is resized so that its short side (crop), its long side (pad) or both (squash)
       have ``resize`` pixels.
    4. ``image_size``: the central square of this side; ``pad_colour`` is where the image does not reach.
    5. / 255, (x - ``mean``) / ``std`` for each channel.

    The defaults are those of students without these fields. ``for_new_student`` has those of today.
    """

    image_size: int
    resize: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    #: ``two_steps``: whole pixels after resizing, then the crop, as torchvision and timm do, bit for bit. ``one_step``:
    #: both at once, from a box with fractional edges; only for crops, kept for students that were trained with it.
    geometry: Geometry = "one_step"
    interpolation: Interpolation = "bilinear"
    fit: Fit = "crop"
    pad_colour: Colour = (0, 0, 0)
    orientation: Orientation = "ignore"
    background: Colour | None = None

    def __post_init__(self) -> None:
        """Raise ``ValueError`` for values that have no meaning."""
        _require_pixels("image_size", self.image_size)
        _require_pixels("resize", self.resize)
        _require_triple("mean", self.mean)
        _require_triple("std", self.std)
        if min(self.std) <= 0:
            raise ValueError(f"std is {self.std}, and the pixels are divided by it: each number must be above 0")
        for key, choices in _CHOICES.items():
            if getattr(self, key) not in choices:
                raise ValueError(f"{key} is {getattr(self, key)!r}; it must be one of {', '.join(choices)}")
        _require_colour("pad_colour", self.pad_colour)
        if self.background is not None:
            _require_colour("background", self.background)
        if self.geometry == "one_step" and (self.fit != "crop" or self.resize < self.image_size):
            raise ValueError(
                f"geometry one_step is for fit crop with a resize of at least image_size, not for fit {self.fit} with "
                f"image_size {self.image_size} and resize {self.resize}; use geometry two_steps"
            )

    @classmethod
    def for_new_student(
        cls, *, image_size: int, resize: int, mean: tuple[float, float, float], std: tuple[float, float, float]
    ) -> "Preprocessing":
        """The defaults of students that are trained or imported now: images as viewers show them, exact geometry."""
        return cls(
            image_size=image_size,
            resize=resize,
            mean=mean,
            std=std,
            geometry="two_steps",
            orientation="apply",
            background=BACKGROUND,
        )

    def to_json(self) -> dict[str, Any]:
        """A JSON object that ``from_json`` reads back.

        Fields with their default are left out, so that the JSON of older students, and what is made of it, is as
        before.
        """
        values = asdict(self)
        return {
            field.name: values[field.name]
            for field in fields(self)
            if field.default is MISSING or values[field.name] != field.default
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Preprocessing":
        """Inverse of ``to_json``; raises ``KeyError``, ``TypeError`` or ``ValueError`` for malformed data.

        An unknown key is an error, because ignoring it would leave a setting without effect.
        """
        known = [field.name for field in fields(cls)]
        unknown = sorted(data.keys() - set(known))
        if unknown:
            raise ValueError(f"unknown key {unknown[0]!r} of preprocessing; known are {', '.join(known)}")
        values: dict[str, Any] = {key: tuple(item) if isinstance(item, list) else item for key, item in data.items()}
        for key in ("mean", "std"):
            _require_triple(key, values[key])
            values[key] = tuple(float(value) for value in values[key])
        return cls(image_size=values.pop("image_size"), resize=values.pop("resize"), **values)

    def describe(self) -> str:
        """The steps from an image to pixels, in one line."""
        sides = {"crop": "short side to", "pad": "long side to", "squash": "both sides to"}[self.fit]
        at_once = ", at once with the crop" if self.geometry == "one_step" else ""
        padded = self.fit == "pad" or self.resize < self.image_size
        return (
            f"EXIF orientation {'applied' if self.orientation == 'apply' else 'ignored'}, transparency "
            f"{'ignored' if self.background is None else f'on {_colour_name(self.background)}'}, RGB, {sides} "
            f"{self.resize} pixels ({self.interpolation}{at_once}), central {self.image_size}x{self.image_size}"
            f"{f' padded with {_colour_name(self.pad_colour)}' if padded else ''}"
        )

    def pixels(self, image: "Image.Image") -> NDArray[np.uint8]:
        """An opened image as (image_size, image_size, 3) uint8.

        No intermediate image grows with the aspect ratio. Channels are resized without converting the whole image first
        if the result is the same, because a converted copy would double the memory.
        """
        part = self._one_step if self.geometry == "one_step" else self._two_steps
        planes = [part(plane) for plane in self._planes(image)]
        if planes[0].ndim == 3:
            return self._padded(planes[0])
        return self._padded(np.stack(planes if len(planes) == 3 else planes * 3, axis=-1))

    def rgb(self, image: "Image.Image") -> "Image.Image":
        """The whole image as an upright, opaque RGB image in its own size, for the augmentation of training."""
        from PIL import Image

        planes = list(self._planes(image))
        return Image.merge("RGB", planes) if len(planes) == 3 else planes[0].convert("RGB")

    def _planes(self, image: "Image.Image") -> "Iterator[Image.Image]":
        turn = orientation(image) if self.orientation == "apply" else 1
        return colour_planes(image, turn=turn, background=self.background)

    def _one_step(self, plane: "Image.Image") -> NDArray[np.uint8]:
        from PIL import Image

        size = (self.image_size, self.image_size)
        if plane.size == size and self.resize == self.image_size:
            return np.asarray(plane, dtype=np.uint8)
        scale = min(plane.size) / self.resize
        half = self.image_size * scale / 2
        x, y = plane.width / 2, plane.height / 2
        box = (max(x - half, 0), max(y - half, 0), min(x + half, plane.width), min(y + half, plane.height))
        return np.asarray(plane.resize(size, Image.Resampling[self.interpolation.upper()], box=box), dtype=np.uint8)

    def _two_steps(self, plane: "Image.Image") -> NDArray[np.uint8]:
        size = resized_size(plane.size, self.fit, self.resize)
        left, top = (_crop_start(side, self.image_size) for side in size)
        right, bottom = min(left + self.image_size, size[0]), min(top + self.image_size, size[1])
        box = (max(left, 0), max(top, 0), right, bottom)
        return resized_part(plane, size, box, self.interpolation)

    def _padded(self, part: NDArray[np.uint8]) -> NDArray[np.uint8]:
        height, width, _ = part.shape
        if height == width == self.image_size:
            return part
        top, left = (self.image_size - height) // 2, (self.image_size - width) // 2
        padded = np.full((self.image_size, self.image_size, 3), self.pad_colour, np.uint8)
        padded[top : top + height, left : left + width] = part
        return padded

    def normalise(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """(N,H,W,3) uint8 to (N,3,H,W) float32."""
        return normalise_pixels(pixels, self.mean, self.std)


def _colour_name(colour: Colour) -> str:
    return {(0, 0, 0): "black", (255, 255, 255): "white"}.get(colour, f"RGB {colour}")


def differing_fields(one: Preprocessing, two: Preprocessing) -> tuple[str, ...]:
    """The names of the fields in which two differ."""
    return tuple(field.name for field in fields(one) if getattr(one, field.name) != getattr(two, field.name))


def resized_size(size: tuple[int, int], fit: Fit, resize: int) -> tuple[int, int]:
    """Width and height after resizing an image of width and height ``size``, rounded as torchvision and timm do."""
    short, long = sorted(size)
    if fit == "squash":
        return resize, resize
    if fit == "pad":
        ratio = long / resize
        return max(round(size[0] / ratio), 1), max(round(size[1] / ratio), 1)
    longer = int(resize * long / short)
    return (resize, longer) if size[0] <= size[1] else (longer, resize)


def _crop_start(side: int, wanted: int) -> int:
    """Where the central crop of a side starts; as in torchvision, the half of an odd number is rounded to even."""
    return round((side - wanted) / 2)


def _require_pixels(key: str, value: Any) -> None:
    if isinstance(value, tuple | list):
        raise ValueError(f"{key} is {value!r}, not a number of pixels; inputs of students are square")
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{key} is {value!r}, not a number of pixels")


def _require_triple(key: str, values: Any) -> None:
    numbers = values if isinstance(values, tuple) else ()
    if len(numbers) != 3 or any(isinstance(value, bool) or not isinstance(value, int | float) for value in numbers):
        raise ValueError(f"{key} is {values!r}, not three numbers, one per channel; inputs of students are RGB")
    if not all(math.isfinite(value) for value in numbers):
        raise ValueError(f"{key} is {values!r}, which is not finite")


def _require_colour(key: str, value: Any) -> None:
    numbers = value if isinstance(value, tuple) else ()
    if len(numbers) != 3 or any(type(part) is not int or not 0 <= part <= 255 for part in numbers):
        raise ValueError(f"{key} is {value!r}, not three whole numbers from 0 to 255: red, green, blue")


def decode(
    data: bytes,
    name: str,
    *,
    formats: tuple[str, ...] = FORMATS,
    inspect: "Callable[[Image.Image], None]" = lambda _: None,
) -> "Image.Image":
    """Decode an image; ``name`` is for the error. Raises ``DataError`` for a corrupt, huge or unsupported one.

    ``inspect`` gets the image before its pixels are decoded, and may raise a ``KdexportError``.
    """
    with _explained(name, formats):
        image = _opened(data, name, formats)
        inspect(image)
        image.load()
    return image


def _opened(data: bytes, name: str, formats: tuple[str, ...]) -> "Image.Image":
    """An image whose header is read and allowed; its pixels are not decoded."""
    from PIL import Image

    # The limit is lower than that at which Pillow warns: warnings are process-wide state, and this runs in threads.
    image = Image.open(io.BytesIO(data), formats=formats)
    if image.width * image.height > _MAX_PIXELS:
        raise _unreadable(name, f"it has {image.width}x{image.height} pixels", formats)
    if image.mode[0] in "IF":
        # Pillow clips these at 255 when converting to RGB, so the image would become almost white.
        raise _unreadable(name, f"its channels are wider than 8 bits (mode {image.mode})", formats)
    if image.mode in _NO_RGB:
        raise _unreadable(name, f"its colours are {image.mode}, which cannot be converted to RGB", formats)
    if image.format in _MAY_HAVE_PAGES and getattr(image, "is_animated", False):
        raise _unreadable(name, "it has more than one frame or page", formats)
    return image


@contextlib.contextmanager
def _explained(name: str, formats: tuple[str, ...]) -> Iterator[None]:
    """Raise ``DataError`` with the name of the image for each error of Pillow."""
    from PIL import Image, UnidentifiedImageError

    try:
        yield
    except KdexportError:
        raise
    except UnidentifiedImageError as error:
        raise _unreadable(name, f"its content is not {', '.join(formats[:-1])} or {formats[-1]}", formats) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _unreadable(name, "it has too many pixels", formats) from error
    # Pillow's decoders raise many kinds of error on hostile bytes; each means the same to the user. Their text is
    # left out, because the server sends this message to its clients, and the text may hold addresses of memory.
    except Exception as error:
        raise _unreadable(name, f"it is damaged or truncated ({type(error).__name__})", formats) from error


def check_image(path: Path) -> ImageFacts:
    """Decode one image file, and return how it is shown; raises ``DataError`` if it cannot be read completely.

    Only decoding finds a picture that ends early behind a good header, as after an interrupted copy. A JPEG file is
    decoded at the smallest scale, which reads all of its data in less time.
    """
    data = _bytes_of(path)
    with _explained(str(path), FORMATS):
        image = _opened(data, str(path), FORMATS)
        facts = image_facts(image)
        image.draft(None, (1, 1))
        image.load()
    return facts


def _unreadable(name: str, reason: str, formats: tuple[str, ...]) -> DataError:
    return DataError(
        f"{name} is not a readable image: {reason}.",
        remedy=f"Repair or remove the file; supported are {', '.join(formats)} up to {_MAX_PIXELS:,} pixels.",
    )


def read_image(path: Path) -> "Image.Image":
    """Open and decode one image file; raises ``DataError``."""
    return decode(_bytes_of(path), str(path))


def _bytes_of(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{path} cannot be read: {error.strerror}.", remedy="Check the path and its permissions."
        ) from error
