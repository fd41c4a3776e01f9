"""Uploaded images: checked against the limits, decoded and normalised exactly as in training."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kdexport.data.exif_and_alpha import ImageFacts, image_facts
from kdexport.data.preprocessing import Preprocessing, decode
from kdexport.data.uploads import FORMATS, Refusal, canvas_refusal, cost_of, header_refusal, size_refusal
from kdexport.errors import DataError, RequestError
from kdexport.serving.limits import Limits
from kdexport.serving.plain_jpeg import PlainJpeg, decode_plain, plain_jpeg

if TYPE_CHECKING:
    from PIL import Image


class PixelBudget:
    """The pixels that all decoding threads may hold together: a large image waits until enough of them are free."""

    def __init__(self, pixels: int) -> None:
        self._free = pixels
        self._changed = threading.Condition()

    @contextmanager
    def spend(self) -> "Iterator[Spending]":
        """An image's share of the budget, 0 pixels at first; all of it is given back at the end of the block."""
        spending = Spending(self)
        try:
            yield spending
        finally:
            self.move(spending.pixels)

    def move(self, pixels: int) -> None:
        """Give back ``pixels``; if negative, wait until as many are free and take them."""
        with self._changed:
            self._changed.wait_for(lambda: self._free + pixels >= 0)
            self._free += pixels
            self._changed.notify_all()


class Spending:
    """The pixels that one image holds of a ``PixelBudget``."""

    def __init__(self, budget: PixelBudget) -> None:
        self._budget = budget
        self.pixels = 0

    def take(self, pixels: int) -> None:
        """Wait until ``pixels`` are free, and take them."""
        self._budget.move(-pixels)
        self.pixels += pixels


def decode_upload(
    data: bytes,
    preprocessing: Preprocessing,
    limits: Limits,
    budget: PixelBudget,
    seen: Callable[[ImageFacts], None] = lambda _: None,
) -> NDArray[np.uint8]:
    """Image bytes to (S,S,3) uint8 as in training; raises ``RequestError`` if unreadable or beyond the limits.

    ``seen`` gets the orientation and transparency of an image that was decoded.
    """
    _require(canvas_refusal(data, limits.images))
    plain = plain_jpeg(data)
    if plain is not None and plain.is_small:
        return decode_small(data, plain, preprocessing, limits, seen)
    with budget.spend() as spending:
        return _decoded_pixels(data, preprocessing, limits, spending.take, seen)


def decode_small(
    data: bytes, plain: PlainJpeg, preprocessing: Preprocessing, limits: Limits, seen: Callable[[ImageFacts], None]
) -> NDArray[np.uint8]:
    """``decode_upload`` of a plain JPEG of so few pixels that they need no budget, and Pillow most of its time."""
    _require(size_refusal(plain.width, plain.height, limits.images))
    picture = decode_plain(data, plain)
    if picture is not None:
        return _plain_pixels(picture, preprocessing, seen)
    return _decoded_pixels(data, preprocessing, limits, lambda _: None, seen)


def _plain_pixels(
    picture: NDArray[np.uint8], preprocessing: Preprocessing, seen: Callable[[ImageFacts], None]
) -> NDArray[np.uint8]:
    from PIL import Image

    seen(ImageFacts(orientation=1, transparency=False))
    if picture.shape == (preprocessing.image_size, preprocessing.image_size, 3) and (
        preprocessing.resize == preprocessing.image_size
    ):
        return picture
    return preprocessing.pixels(Image.fromarray(picture))


def _decoded_pixels(
    data: bytes,
    preprocessing: Preprocessing,
    limits: Limits,
    take: Callable[[int], None],
    seen: Callable[[ImageFacts], None],
) -> NDArray[np.uint8]:
    def inspect(image: "Image.Image") -> None:
        _require(header_refusal(image, limits.images))
        take(image.width * image.height * cost_of(image))

    try:
        image = decode(data, "The upload", formats=FORMATS, inspect=inspect)
    except DataError as error:
        raise RequestError(error.message, remedy=f"Send one of {', '.join(FORMATS)}.", reason="image") from None
    seen(image_facts(image))
    return preprocessing.pixels(image)


def _require(refusal: Refusal | None) -> None:
    if refusal is not None:
        raise RequestError(refusal.message, remedy=refusal.remedy, status=refusal.status, reason="image")


def normalisation_table(preprocessing: Preprocessing) -> NDArray[np.float32]:
    """(3,256) float32: the result of ``preprocessing.normalise`` for each of the 256 values of each channel."""
    values = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 3, axis=1)
    return np.ascontiguousarray(preprocessing.normalise(values[None, :, None, :])[0, :, :, 0])


def normalise(pixels: NDArray[np.uint8], table: NDArray[np.float32]) -> NDArray[np.float32]:
    """(S,S,3) uint8 to (1,3,S,S) float32 by table: bit-identical to the arithmetic, in a fifth of the time."""
    height, width, channels = pixels.shape
    planes = np.empty((1, channels, height, width), np.float32)
    for channel in range(channels):
        np.take(table[channel], pixels[:, :, channel], out=planes[0, channel], mode="clip")
    return planes
