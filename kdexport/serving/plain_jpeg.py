"""Plain JPEGs: recognised from the markers before their picture, and decoded by simplejpeg if it is installed.

simplejpeg calls the library that Pillow calls (libjpeg-turbo), in a fifth of the time for a small image; a large one
takes as long with both. It is used only for small ones, if the two agree bit for bit on this machine, and if it finds
no fault in them; Pillow decodes all others.
"""

import functools
import importlib
import io
import logging
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

_log = logging.getLogger("kdexport.serving")

_SMALL_PIXELS = 128 * 128
_START, _JFIF = b"\xff\xd8\xff\xe0", b"JFIF\0"
_APP0, _SCAN = 0xE0, 0xDA
#: Huffman and quantisation tables, restart interval, comment.
_TABLES = frozenset({0xC4, 0xDB, 0xDD, 0xFE})
#: Baseline, extended and progressive frames with Huffman codes.
_PROGRESSIVE = 0xC2
_FRAMES = frozenset({0xC0, 0xC1, _PROGRESSIVE})
_MAX_SEGMENTS = 64


class PlainJpeg(NamedTuple):
    """Width, height and channels, 1 or 3; ``one_scan`` if each pixel is decoded once.

    A progressive image of a few bytes can have thousands of scans.
    """

    width: int
    height: int
    channels: int
    one_scan: bool

    @property
    def is_small(self) -> bool:
        """Whether it takes less time to decode than to hand to a thread and back."""
        return self.width * self.height <= _SMALL_PIXELS


def plain_jpeg(data: bytes) -> PlainJpeg | None:
    """The size of a JFIF image in grey or YCbCr with 8 bits and no other metadata; None for any other bytes.

    EXIF, Adobe's marker and further pictures (MPO) change how an image is shown, and none of them is here.
    """
    if not data.startswith(_START) or data[6:11] != _JFIF:
        return None
    position, found = 2, None
    for _ in range(_MAX_SEGMENTS):
        if len(data) < position + 4 or data[position] != 0xFF:
            return None
        marker, size = data[position + 1], data[position + 2] << 8 | data[position + 3]
        start, position = position + 4, position + 2 + size
        if size < 2 or len(data) < position:
            return None
        if marker == _SCAN:
            whole = found is not None and size > 2 and data[start] == found.channels
            return found if found is None or whole else found._replace(one_scan=False)
        if marker in _FRAMES and found is None:
            found = _frame(data[start:position], one_scan=marker != _PROGRESSIVE)
            if found is None:
                return None
        elif marker not in _TABLES and not (marker == _APP0 and start == 6):
            return None
    return None


def _frame(segment: bytes, *, one_scan: bool) -> PlainJpeg | None:
    """The size in a frame header: precision, height, width, and three bytes for each channel, numbered from 1."""
    if len(segment) < 6 or segment[0] != 8:
        return None
    channels = segment[5]
    height, width = int.from_bytes(segment[1:3], "big"), int.from_bytes(segment[3:5], "big")
    numbers = list(segment[6::3])
    if len(segment) != 6 + 3 * channels or channels not in (1, 3) or numbers != list(range(1, channels + 1)):
        return None
    return PlainJpeg(width, height, channels, one_scan) if width and height else None


def decode_plain(data: bytes, plain: PlainJpeg) -> NDArray[np.uint8] | None:
    """The picture of a plain JPEG, (H,W) or (H,W,3); None if Pillow must decode it: simplejpeg is absent or refuses."""
    decoder = _decoder()
    return None if decoder is None else _decoded(decoder, data, plain)


def decoder_name() -> str:
    """What decodes small plain JPEGs here."""
    decoder = _decoder()
    return "Pillow" if decoder is None else f"simplejpeg {decoder.__version__}"


def _decoded(decoder: Any, data: bytes, plain: PlainJpeg) -> NDArray[np.uint8] | None:
    colours = "RGB" if plain.channels == 3 else "GRAY"
    try:
        pixels: NDArray[np.uint8] = decoder.decode_jpeg(data, colours, fastdct=False, fastupsample=False, strict=True)
    # Pillow decodes those damaged images that it accepts, and finds the words for the others.
    except Exception:  # noqa: BLE001
        return None
    if pixels.shape != (plain.height, plain.width, plain.channels):
        return None
    return pixels if plain.channels == 3 else pixels[:, :, 0]


@functools.cache
def _decoder() -> Any | None:
    """The module simplejpeg, if it is installed and decodes samples as Pillow does."""
    try:
        decoder = importlib.import_module("simplejpeg")
    except ImportError:
        return None
    if _agrees(decoder):
        return decoder
    _log.warning("simplejpeg decodes other pixels than Pillow, which therefore decodes all images.")
    return None


def _agrees(decoder: Any) -> bool:
    """Whether ``decoder`` gives Pillow's pixels for samples in colour and grey, and each way to store colours."""
    from PIL import Image

    noise = np.random.default_rng(0).integers(0, 256, (19, 35, 3), np.uint8)
    smooth = np.add.outer(np.arange(19), np.arange(35))[:, :, np.newaxis] * np.array([1, 3, 4])
    for values in (noise, (smooth % 256).astype(np.uint8)):
        for mode in ("RGB", "L"):
            for subsampling in (0, 1, 2):
                stream = io.BytesIO()
                image = Image.fromarray(values).convert(mode)
                image.save(stream, "JPEG", quality=80, subsampling=subsampling, progressive=subsampling == 1)
                plain = plain_jpeg(stream.getvalue())
                found = None if plain is None else _decoded(decoder, stream.getvalue(), plain)
                if found is None or found.tobytes() != Image.open(stream).tobytes():
                    return False
    return True
