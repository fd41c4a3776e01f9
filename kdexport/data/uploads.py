"""The images that a server takes: fewer formats and shapes than training reads from disk.

The server decodes uploads by these rules, and a build takes as golden images only what they allow.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kdexport.data.preprocessing import decode
from kdexport.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

#: Fewer than training reads from disk: each decoder is one more that hostile bytes can reach.
FORMATS = ("JPEG", "PNG", "WEBP")
_WEBP_HEADER = 30
#: libwebp holds two canvases beside Pillow's two images, so a WebP pixel counts twice.
WEBP_COST = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageLimits:
    """The most pixels of an image, its shortest side, and the largest ratio of its sides; a server's defaults."""

    pixels: int = 25_000_000
    min_side: int = 16
    aspect: int = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Refusal:
    """Why an image is refused: ``kind`` is the same for all images of one reason, ``message`` has the numbers."""

    kind: str
    message: str
    remedy: str
    status: int = 400


def size_refusal(width: int, height: int, limits: ImageLimits, cost: int = 1) -> Refusal | None:
    """Too many pixels, a short side, or sides that differ too much; ``cost`` is how often each pixel counts."""
    allowed = limits.pixels // cost
    if width * height > allowed:
        return Refusal(
            kind=f"too large (more than {allowed:,} pixels)",
            message=f"The image has {width}x{height} pixels (up to {allowed:,} allowed"
            f"{' for WebP' if cost > 1 else ''}).",
            remedy="Scale it down before sending it.",
            status=413,
        )
    short, long = sorted((width, height))
    if short < limits.min_side:
        return Refusal(
            kind=f"too small (short side below {limits.min_side} pixels)",
            message=f"The image is {width}x{height}; its short side must have at least {limits.min_side} pixels.",
            remedy="Send the image at its original size.",
        )
    if long > limits.aspect * short:
        return Refusal(
            kind=f"too long (long side above {limits.aspect} times the short one)",
            message=f"The image is {width}x{height}; its long side may be up to {limits.aspect} times its short side.",
            remedy="Crop it.",
        )
    return None


def cost_of(image: "Image.Image") -> int:
    """How often each pixel of an opened image counts."""
    return WEBP_COST if image.format == "WEBP" else 1


def header_refusal(image: "Image.Image", limits: ImageLimits) -> Refusal | None:
    """What the header of an opened image shows."""
    refused = size_refusal(image.width, image.height, limits, cost_of(image))
    if refused is None and image.format != "MPO" and getattr(image, "is_animated", False):
        return Refusal(kind="animated", message="The image is animated.", remedy="Send a single frame.")
    return refused


def canvas_refusal(data: bytes, limits: ImageLimits) -> Refusal | None:
    """What the first bytes show: libwebp allocates its canvases while Pillow reads the header."""
    size = webp_size(data)
    return None if size is None else size_refusal(*size, limits, WEBP_COST)


def upload_refusal(data: bytes, limits: ImageLimits) -> Refusal | None:
    """Why a server would refuse an image file as an upload; None if it would take it."""
    found = canvas_refusal(data, limits)
    if found is not None:
        return found

    def inspect(image: "Image.Image") -> None:
        nonlocal found
        found = header_refusal(image, limits)
        if found is not None:
            raise DataError(found.message, remedy=found.remedy)

    try:
        decode(data, "The image", formats=FORMATS, inspect=inspect)
    except DataError as error:
        return found or Refusal(
            kind=f"not readable as {', '.join(FORMATS[:-1])} or {FORMATS[-1]}",
            message=error.message,
            remedy=error.remedy,
        )
    return None


@dataclass(frozen=True, slots=True)
class AcceptedImages:
    """Positions of images that a server takes, and how many were passed over for each kind of refusal.

    If it takes none, ``positions`` are the wanted ones and ``accepted`` is False.
    """

    positions: list[int]
    passed_over: dict[str, int]
    accepted: bool = True


def accepted_images(
    wanted: Sequence[int], total: int, read: Callable[[int], bytes], limits: ImageLimits
) -> AcceptedImages:
    """For each of the ``wanted`` positions the nearest of ``total`` images that a server takes, each image once."""
    refused: dict[int, str] = {}
    chosen: list[int] = []
    for start in wanted:
        for position in sorted(range(total), key=lambda each: (abs(each - start), each)):
            if position in chosen or position in refused:
                continue
            refusal = upload_refusal(read(position), limits)
            if refusal is None:
                chosen.append(position)
                break
            refused[position] = refusal.kind
    passed = dict(sorted(Counter(refused.values()).items()))
    return AcceptedImages(sorted(chosen), passed) if chosen else AcceptedImages(list(wanted), passed, False)


def webp_size(data: bytes) -> tuple[int, int] | None:
    """Width and height from the first chunk of a WebP file (RFC 9649), None for other formats."""
    head = data[:_WEBP_HEADER]
    if len(head) < _WEBP_HEADER or head[:4] != b"RIFF" or head[8:12] != b"WEBP":
        return None
    if head[12:16] == b"VP8X":
        return 1 + int.from_bytes(head[24:27], "little"), 1 + int.from_bytes(head[27:30], "little")
    if head[12:16] == b"VP8L":
        bits = int.from_bytes(head[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    return int.from_bytes(head[26:28], "little") & 0x3FFF, int.from_bytes(head[28:30], "little") & 0x3FFF
