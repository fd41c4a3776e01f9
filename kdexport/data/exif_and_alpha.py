"""Images as viewers show them: turned by their EXIF orientation, transparent pixels on a background.

Neither is part of the stored pixels. A photo of a phone is often stored sideways, and the colour of a transparent pixel
is whatever the program that wrote it left there.
"""

import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from PIL import Image

Colour = tuple[int, int, int]

_ORIENTATION_TAG, _SHORT = 0x0112, 3
#: How an image of each EXIF orientation is turned to be upright, as names of ``PIL.Image.Transpose``.
_TURNS = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}


class ImageFacts(NamedTuple):
    """What a file says about how it is shown: its EXIF orientation (1 is upright), and whether it has transparency."""

    orientation: int
    transparency: bool


def image_facts(image: "Image.Image") -> ImageFacts:
    """The facts of an opened image; its pixels need not be decoded."""
    stored = getattr(image, "tag_v2", {}).get(_ORIENTATION_TAG, 1) if image.format == "TIFF" else orientation(image)
    return ImageFacts(stored if stored in _TURNS else 1, image.has_transparency_data)


def orientation(image: "Image.Image") -> int:
    """The EXIF orientation by which a decoded image must be turned, 1 to 8; 1 if it has none or none that is valid.

    TIFF is 1, because Pillow turns it when it decodes it. An orientation in XMP or in a text chunk of PNG is not read,
    as in web browsers.
    """
    data = image.info.get("exif")
    return 1 if image.format == "TIFF" or not isinstance(data, bytes) else exif_orientation(data)


def exif_orientation(data: bytes) -> int:
    """The orientation in a block of EXIF, 1 to 8; 1 if it has none, or if the block is damaged.

    Read here, because Pillow takes one from XMP too, and warns on damaged blocks: warnings are process-wide state, and
    this runs in threads.
    """
    while data.startswith(b"Exif\0\0"):
        data = data[6:]
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(data[:4])
    if order is None or len(data) < 8:
        return 1
    (start,) = struct.unpack_from(f"{order}I", data, 4)
    if start + 2 > len(data):
        return 1
    (count,) = struct.unpack_from(f"{order}H", data, start)
    for place in range(start + 2, min(start + 2 + 12 * count, len(data) - 11), 12):
        tag, kind, length, value = struct.unpack_from(f"{order}HHIH", data, place)
        if (tag, kind, length) == (_ORIENTATION_TAG, _SHORT, 1):
            return value if value in _TURNS else 1
    return 1


def colour_planes(image: "Image.Image", *, turn: int = 1, background: Colour | None = None) -> "Iterator[Image.Image]":
    """The colours of a decoded image: the RGB or the L image itself, or its red, green and blue as three L images.

    Each is turned upright from the orientation ``turn``. Transparent pixels are composed on ``background``, or
    transparency is ignored if that is None. A plane at a time takes less memory than a whole copy.
    """
    for plane in _composed(image, turn, background):
        yield _turned(plane, turn)


def _composed(image: "Image.Image", turn: int, background: Colour | None) -> "Iterator[Image.Image]":
    if background is not None and image.has_transparency_data:
        yield from _on_background(image if image.mode in ("RGBA", "LA") else image.convert("RGBA"), background)
    elif image.mode in ("RGBA", "LA"):
        # Pillow would multiply by alpha before resizing; alpha must be ignored.
        yield from (image.getchannel(name) for name in image.mode[:-1])
    else:
        colours = image if image.mode in ("RGB", "L") else image.convert("RGB")
        if colours.mode == "L" or turn == 1:
            yield colours
        else:
            yield from (colours.getchannel(name) for name in "RGB")


def _on_background(image: "Image.Image", background: Colour) -> "Iterator[Image.Image]":
    from PIL import Image

    alpha = image.getchannel("A")
    for name, value in zip("RGB", background, strict=True):
        plane = Image.new("L", image.size, value)
        plane.paste(image.getchannel("L" if image.mode == "LA" else name), mask=alpha)
        yield plane


def _turned(plane: "Image.Image", turn: int) -> "Image.Image":
    from PIL import Image

    return plane.transpose(Image.Transpose[_TURNS[turn]]) if turn in _TURNS else plane
