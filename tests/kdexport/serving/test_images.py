"""Normalisation by table, and the budget of pixels that are decoded together."""

import io
import threading
import time

import numpy as np
import pytest
from PIL import Image, ImageOps

from kdexport.data.exif_and_alpha import ImageFacts
from kdexport.data.preprocessing import Preprocessing
from kdexport.errors import RequestError
from kdexport.serving.images import PixelBudget, decode_upload, normalisation_table, normalise
from kdexport.serving.limits import Limits
from tests.kdexport.serving.served_bundles import encoded, photo

SHOWN = Preprocessing.for_new_student(image_size=8, resize=9, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
SMALL = Preprocessing(image_size=8, resize=8, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def test_normalisation_by_table_is_bit_identical_to_the_arithmetic() -> None:
    preprocessing = Preprocessing(image_size=16, resize=16, mean=(0.41, 0.47, 0.39), std=(0.21, 0.27, 0.24))
    values = np.arange(256, dtype=np.uint8).reshape(16, 16)
    pixels = np.stack([values, values[::-1], values.T], -1)
    ours = normalise(pixels, normalisation_table(preprocessing))
    assert ours.tobytes() == preprocessing.normalise(pixels[None]).tobytes()


@pytest.mark.parametrize(("orientation", "transparency"), [(1, False), (6, False), (3, True)])
def test_how_an_upload_is_shown_is_told_to_who_counts_it(orientation: int, transparency: bool) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = photo(40, 30, 3).convert("RGBA" if transparency else "RGB")
    data, seen = encoded(image, "PNG", exif=exif), list[ImageFacts]()
    pixels = decode_upload(data, SHOWN, Limits(), PixelBudget(Limits().pixels), seen.append)
    assert seen == [(orientation, transparency)]
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    assert np.array_equal(pixels, SHOWN.pixels(upright))


def test_the_pixels_of_all_open_images_are_limited() -> None:
    budget, peak, open_now, lock = PixelBudget(100), [0], [0], threading.Lock()

    def decode(pixels: int) -> None:
        with budget.spend() as spending:
            spending.take(pixels)
            with lock:
                open_now[0] += pixels
                peak[0] = max(peak[0], open_now[0])
            time.sleep(0.002)
            with lock:
                open_now[0] -= pixels

    threads = [threading.Thread(target=decode, args=(size,)) for size in (100, 60, 50, 1, 40, 99) * 4]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert 60 <= peak[0] <= 100
    assert open_now == [0]


class Watched(PixelBudget):
    """A budget that records what is taken and given back."""

    def __init__(self, pixels: int) -> None:
        super().__init__(pixels)
        self.moves: list[int] = []

    def move(self, pixels: int) -> None:
        self.moves.append(pixels)
        super().move(pixels)


@pytest.mark.parametrize(("kind", "side", "cost"), [("PNG", 80, 1), ("WEBP", 56, 2)])
def test_the_pixels_of_a_webp_image_count_twice(kind: str, side: int, cost: int) -> None:
    budget = Watched(80 * 80)
    pixels = decode_upload(encoded(photo(side, side, 3), kind), SMALL, Limits(pixels=80 * 80), budget)
    assert pixels.shape == (8, 8, 3)
    assert budget.moves == [-cost * side * side, cost * side * side]


@pytest.mark.parametrize(("kind", "side", "allowed"), [("PNG", 84, "6,400"), ("WEBP", 60, "3,200")])
def test_a_webp_image_may_have_half_as_many_pixels(kind: str, side: int, allowed: str) -> None:
    data = encoded(photo(side, side, 3), kind)
    with pytest.raises(
        RequestError, match=rf"The image has {side}x{side} pixels \(up to {allowed} allowed( for WebP)?\)\."
    ) as refused:
        decode_upload(data, SMALL, Limits(pixels=80 * 80), PixelBudget(80 * 80))
    assert refused.value.status == 413
