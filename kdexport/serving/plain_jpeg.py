"""Recognise plain JPEGs from the markers before their picture: what a small upload is, without a decoder."""

from typing import NamedTuple

#: Images of up to this many pixels take less time to decode than handing them to a thread and back.
INLINE_PIXELS = 128 * 128
_START, _JFIF = b"\xff\xd8\xff\xe0", b"JFIF\0"
_APP0, _SCAN = 0xE0, 0xDA
#: Huffman and quantisation tables, restart interval, comment.
_TABLES = frozenset({0xC4, 0xDB, 0xDD, 0xFE})
#: Baseline, extended and progressive frames with Huffman codes.
_FRAMES = frozenset({0xC0, 0xC1, 0xC2})
_MAX_SEGMENTS = 64


class PlainJpeg(NamedTuple):
    """Width, height and channels, 1 or 3."""

    width: int
    height: int
    channels: int


def plain_jpeg(data: bytes) -> PlainJpeg | None:
    """The size of a JFIF image in grey or YCbCr with 8 bits and no other metadata; None for any other bytes.

    EXIF, Adobe's marker and further pictures (MPO) change how an image is shown, and none of them is here.
    """
    if not data.startswith(_START) or data[6:11] != _JFIF:
        return None
    position, found = 2, None
    for _ in range(_MAX_SEGMENTS):
        head = data[position : position + 4]
        if len(head) < 4 or head[0] != 0xFF:
            return None
        marker, size = head[1], int.from_bytes(head[2:], "big")
        segment = data[position + 4 : position + 2 + size]
        if size < 2 or len(segment) != size - 2:
            return None
        if marker == _SCAN:
            return found
        if marker in _FRAMES and found is None:
            found = _frame(segment)
            if found is None:
                return None
        elif marker not in _TABLES and not (marker == _APP0 and position == 2):
            return None
        position += 2 + size
    return None


def _frame(segment: bytes) -> PlainJpeg | None:
    """The size in a frame header: precision, height, width, and three bytes for each channel, numbered from 1."""
    if len(segment) < 6 or segment[0] != 8:
        return None
    channels = segment[5]
    height, width = int.from_bytes(segment[1:3], "big"), int.from_bytes(segment[3:5], "big")
    numbers = list(segment[6::3])
    if len(segment) != 6 + 3 * channels or channels not in (1, 3) or numbers != list(range(1, channels + 1)):
        return None
    return PlainJpeg(width, height, channels) if width and height else None
