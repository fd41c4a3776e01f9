"""Image files without the metadata that is not part of the picture: EXIF, positions, names, comments, previews.

The compressed pixels are copied, not encoded again. Of the metadata only the orientation can stay, because it decides
how an image is shown.
"""

import contextlib
import io
import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from kdexport.data.exif_and_alpha import orientation
from kdexport.data.preprocessing import Preprocessing, decode
from kdexport.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_JPEG_SIGNATURE = b"\xff\xd8\xff"
#: Chunks of PNG that decide the pixels: all critical chunks, and transparency.
_PNG_CHUNKS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
_WEBP_CHUNKS = (b"VP8X", b"ALPH", b"VP8 ", b"VP8L")
_WEBP_HAS_EXIF, _WEBP_HAS_NAMED_METADATA = 0x08, 0x20 | 0x08 | 0x04
_APP0, _APP1, _APP14, _APP15, _COM = 0xE0, 0xE1, 0xEE, 0xEF, 0xFE
_START_OF_SCAN, _END = 0xDA, 0xD9
#: Markers of JPEG without a length: TEM and the restarts.
_BARE = (0x01, *range(0xD0, 0xD8))


def without_metadata(data: bytes, suffix: str, preprocessing: Preprocessing) -> tuple[bytes, str]:
    """An image file of the same pixels without metadata, and its suffix.

    The result has the same pixels as ``data`` under ``preprocessing``, bit for bit; a file in which that cannot be kept
    (an animation, a damaged container) becomes a PNG file of the picture as it is shown. An orientation is kept if
    ``preprocessing`` applies it. JPEG, PNG and WebP keep their compressed pixels; formats without compression losses
    are written again. Raises ``DataError`` for a file that is no readable image.
    """
    image = decode(data, "The image")
    turn = orientation(image) if preprocessing.orientation == "apply" else 1
    # Pillow reads some damaged containers that are refused here, and an animation has no picture outside its frames.
    with contextlib.suppress(ValueError, IndexError, struct.error, DataError):
        bare = _stripped(data, image, turn)
        if np.array_equal(preprocessing.pixels(image), preprocessing.pixels(decode(bare, "The image"))):
            return bare, suffix
    return _encoded(preprocessing.rgb(image), "PNG"), ".png"


def _stripped(data: bytes, image: "Image.Image", turn: int) -> bytes:
    if data.startswith(_JPEG_SIGNATURE):
        return _jpeg(data, turn)
    if data.startswith(_PNG_SIGNATURE):
        return _png(data, turn)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return _webp(data, turn)
    bare = image.copy()
    bare.info = {key: value for key, value in image.info.items() if key == "transparency"}
    assert image.format is not None
    return _encoded(bare, image.format)


def _encoded(image: "Image.Image", image_format: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=image_format)
    return buffer.getvalue()


def _exif(turn: int) -> bytes:
    """A block of EXIF with one tag, the orientation."""
    return b"II*\0" + struct.pack("<IHHHIHHI", 8, 1, 0x0112, 3, 1, turn, 0, 0)


def _jpeg(data: bytes, turn: int) -> bytes:
    """The segments that a decoder needs, up to the end of the first image.

    What follows it are further pictures and films of a telephone, with metadata of their own.
    """
    segment = b"Exif\0\0" + _exif(turn)
    exif = [] if turn == 1 else [struct.pack(">BBH", 0xFF, _APP1, len(segment) + 2) + segment]
    head, rest = [], []
    for marker, content in _jpeg_segments(data):
        if marker == _APP0 and content[4:9] == b"JFIF\0":
            # Without the preview that may follow.
            head.append(struct.pack(">BBH", 0xFF, _APP0, 16) + content[4:16] + b"\0\0")
        elif marker == _APP14 and content[4:9] == b"Adobe":
            rest.append(struct.pack(">BBH", 0xFF, _APP14, 14) + content[4:16])
        elif not _APP0 <= marker <= _APP15 and marker != _COM:
            rest.append(content)
    return b"".join([b"\xff\xd8", *head[:1], *exif, *rest])


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Each marker with its whole segment, and with the coded pixels behind a start of scan."""
    place = 2
    while True:
        place = data.index(b"\xff", place)
        marker = data[place + 1]
        if marker in (0x00, 0xFF):
            place += 1
        elif marker == _END:
            yield marker, data[place : place + 2]
            return
        elif marker in _BARE:
            place += 2
        else:
            (length,) = struct.unpack_from(">H", data, place + 2)
            end = place + 2 + length
            if marker == _START_OF_SCAN:
                end = _end_of_scan(data, end)
            yield marker, data[place:end]
            place = end


def _end_of_scan(data: bytes, place: int) -> int:
    while True:
        place = data.index(b"\xff", place)
        if data[place + 1] not in (0x00, 0xFF, *_BARE):
            return place
        place += 2 if data[place + 1] != 0xFF else 1


def _png(data: bytes, turn: int) -> bytes:
    chunks, place = [], len(_PNG_SIGNATURE)
    while True:
        length, kind = struct.unpack_from(">I4s", data, place)
        end = place + 12 + length
        if kind == b"IDAT" and turn != 1:
            chunks.append(_png_chunk(b"eXIf", _exif(turn)))
            turn = 1
        if kind in _PNG_CHUNKS:
            chunks.append(data[place:end])
        if kind == b"IEND":
            return b"".join([_PNG_SIGNATURE, *chunks])
        place = end


def _png_chunk(kind: bytes, content: bytes) -> bytes:
    import zlib

    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def _webp(data: bytes, turn: int) -> bytes:
    (total,) = struct.unpack_from("<I", data, 4)
    chunks, place = [], 12
    while place < min(8 + total, len(data)):
        kind, length = struct.unpack_from("<4sI", data, place)
        content = data[place + 8 : place + 8 + length]
        if kind == b"VP8X":
            flags = content[0] & ~_WEBP_HAS_NAMED_METADATA | (0 if turn == 1 else _WEBP_HAS_EXIF)
            content = bytes([flags]) + content[1:]
        if kind in _WEBP_CHUNKS:
            chunks.append(_webp_chunk(kind, content))
        place += 8 + length + length % 2
    if turn != 1:
        chunks.append(_webp_chunk(b"EXIF", _exif(turn)))
    body = b"WEBP" + b"".join(chunks)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def _webp_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack("<4sI", kind, len(content)) + content + b"\0" * (len(content) % 2)
