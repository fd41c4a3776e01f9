"""Preprocessing of images, from bytes to the input tensor: one definition for training, verification and serving."""

import contextlib
import io
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

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


@dataclass(frozen=True, kw_only=True, slots=True)
class Preprocessing:
    """RGB, short side to ``resize`` pixels, the central ``image_size`` square, / 255, (x - mean) / std per channel."""

    image_size: int
    resize: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def to_json(self) -> dict[str, Any]:
        """A JSON object that ``from_json`` reads back."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Preprocessing":
        """Inverse of ``to_json``; raises ``KeyError``, ``TypeError`` or ``ValueError`` for malformed data.

        An unknown key is an error, because ignoring it would leave a setting without effect.
        """
        known = [field.name for field in fields(cls)]
        unknown = sorted(data.keys() - set(known))
        if unknown:
            raise ValueError(f"unknown key {unknown[0]!r} of preprocessing; known are {', '.join(known)}")
        return cls(
            image_size=_pixels(data, "image_size"),
            resize=_pixels(data, "resize"),
            mean=_triple(data["mean"]),
            std=_triple(data["std"]),
        )

    def pixels(self, image: "Image.Image") -> NDArray[np.uint8]:
        """An opened image as (image_size, image_size, 3) uint8.

        Resizing and cropping are one step with the crop box in source pixels, so that no intermediate image grows with
        the aspect ratio. Channels are resized without converting the whole image first if the result is the same,
        because a converted copy would double the memory.
        """
        from PIL import Image

        size = (self.image_size, self.image_size)
        if image.size == size and self.resize == self.image_size:
            return np.asarray(image.convert("RGB"), dtype=np.uint8)
        scale = min(image.size) / self.resize
        half = self.image_size * scale / 2
        x, y = image.width / 2, image.height / 2
        box = (max(x - half, 0), max(y - half, 0), min(x + half, image.width), min(y + half, image.height))
        planes = [
            np.asarray(part.resize(size, Image.Resampling.BILINEAR, box=box), dtype=np.uint8)
            for part in _colour_planes(image)
        ]
        if planes[0].ndim == 3:
            return planes[0]
        return np.stack(planes if len(planes) == 3 else planes * 3, axis=-1)

    def normalise(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """(N,H,W,3) uint8 to (N,3,H,W) float32."""
        scaled = pixels.astype(np.float32) / np.float32(255)
        centred = (scaled - np.asarray(self.mean, np.float32)) / np.asarray(self.std, np.float32)
        return np.ascontiguousarray(centred.transpose(0, 3, 1, 2))


def _colour_planes(image: "Image.Image") -> "Iterator[Image.Image]":
    """The parts of an image to resize separately: the RGB image itself, or single channels."""
    if image.mode in ("RGB", "L"):
        yield image
    elif image.mode in ("RGBA", "LA"):
        # Pillow would multiply by alpha before resizing; alpha must be ignored.
        yield from (image.getchannel(name) for name in image.mode[:-1])
    else:
        yield image.convert("RGB")


def _pixels(data: dict[str, Any], key: str) -> int:
    value = data[key]
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{key} is {value!r}, not a number of pixels")
    return value


def _triple(values: Any) -> tuple[float, float, float]:
    if isinstance(values, str) or any(isinstance(value, str | bool) for value in values):
        raise ValueError(f"{values!r} is not three numbers, one per channel")
    red, green, blue = (float(value) for value in values)
    return red, green, blue


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


def check_image(path: Path) -> None:
    """Check one image file without decoding its pixels; raises ``DataError``.

    The header is read and, in PNG files, the checksum of each chunk. A damaged picture behind a good header is found
    only by decoding.
    """
    data = _bytes_of(path)
    with _explained(str(path), FORMATS):
        _opened(data, str(path), FORMATS).verify()


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
