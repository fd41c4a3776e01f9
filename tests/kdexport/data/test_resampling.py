import time
import tracemalloc

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from kdexport.data.resampling import Box, Interpolation, exact_part, resized_part, rows_first

INTERPOLATIONS: tuple[Interpolation, ...] = ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos")


def picture(width: int, height: int, mode: str, seed: int) -> Image.Image:
    """Noise or, for odd seeds, black and white alone, where kernels with negative lobes leave the range."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels if seed % 2 == 0 else (pixels > 127).astype(np.uint8) * 255).convert(mode)


def whole(image: Image.Image, size: tuple[int, int], box: Box, interpolation: str) -> NDArray[np.uint8]:
    return np.asarray(image.resize(size, Image.Resampling[interpolation.upper()]).crop(box))


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_a_part_has_the_bits_of_the_whole(interpolation: Interpolation, mode: str) -> None:
    rng = np.random.default_rng(7)
    for trial in range(60):
        longest = [(90, 90), (4, 900), (900, 4)][trial % 3]
        width, height = (int(rng.integers(1, side + 1)) for side in longest)
        size = (int(rng.integers(1, 160)), int(rng.integers(1, 160)))
        if trial % 5 == 0:
            size = (width, size[1]) if trial % 2 else (size[0], height)
        left, top = (int(rng.integers(0, side)) for side in size)
        box = (left, top, int(rng.integers(left + 1, size[0] + 1)), int(rng.integers(top + 1, size[1] + 1)))
        image = picture(width, height, mode, trial)
        for part in (exact_part, resized_part):
            np.testing.assert_array_equal(
                part(image, size, box, interpolation),
                whole(image, size, box, interpolation),
                f"{image.size}{size}{box}",
            )


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize(
    ("source", "size"),
    [((1, 3000), (40, 120_000)), ((3000, 1), (120_000, 40)), ((3, 2000), (64, 42_666)), ((1, 50_000), (48, 48))],
)
def test_the_centre_of_an_extreme_image_has_the_bits_of_the_whole(
    interpolation: Interpolation, source: tuple[int, int], size: tuple[int, int]
) -> None:
    image = picture(*source, "RGB", 3)
    left, top = (size[0] - 32) // 2, (size[1] - 32) // 2
    box = (left, top, left + 32, top + 32)
    np.testing.assert_array_equal(exact_part(image, size, box, interpolation), whole(image, size, box, interpolation))


def test_a_picture_whose_whole_would_take_gigabytes_is_resized_in_little_memory_and_time() -> None:
    image = picture(1, 60_000, "RGB", 2)
    middle = (224 * 60_000 - 224) // 2
    for interpolation in INTERPOLATIONS:
        tracemalloc.start()
        began = time.perf_counter()
        part = resized_part(image, (224, 224 * 60_000), (0, middle, 224, middle + 224), interpolation)
        elapsed, peak = time.perf_counter() - began, tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert part.shape == (224, 224, 3)
        assert elapsed < 2
        assert peak < 60e6  # the whole takes 224 x 13440000 x 4 bytes


def test_the_order_of_the_axes_is_that_of_pillow() -> None:
    """Where the order shows: resizing one axis alone, then the other, gives the bits of one of the two orders."""
    rng = np.random.default_rng(0)
    seen = set()
    for trial in range(200):
        width, height, wide, high = (int(side) for side in rng.integers(2, 90, 4))
        image = picture(width, height, "L", trial)
        result = np.asarray(image.resize((wide, high), Image.Resampling.BICUBIC))
        columns = image.resize((wide, height), Image.Resampling.BICUBIC).resize((wide, high), Image.Resampling.BICUBIC)
        rows = image.resize((width, high), Image.Resampling.BICUBIC).resize((wide, high), Image.Resampling.BICUBIC)
        if np.array_equal(np.asarray(columns), np.asarray(rows)):
            continue
        first = rows_first((width, height), (wide, high))
        seen.add(first)
        np.testing.assert_array_equal(result, np.asarray(rows if first else columns))
    assert False in seen
