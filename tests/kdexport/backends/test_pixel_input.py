"""What a file that takes pixels is fed: the pixels of normalised images, exactly or not at all."""

import json

import numpy as np
import pytest
from numpy.typing import NDArray

from kdexport.backends.pixel_input import PixelInput, arrange, image_shape, pixel_input
from kdexport.errors import AuditError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def normalised(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Value by value, as the documentation defines it."""
    count, height, width, _ = pixels.shape
    found = np.empty((count, 3, height, width), np.float32)
    for place, value in np.ndenumerate(pixels):
        n, y, x, channel = place
        found[n, channel, y, x] = (np.float32(value) / np.float32(255) - np.float32(MEAN[channel])) / np.float32(
            STD[channel]
        )
    return found


@pytest.fixture
def pixels() -> NDArray[np.uint8]:
    """Every value in every channel, each channel in another order."""
    ramp = np.arange(256, dtype=np.uint8)
    return np.stack([ramp, np.roll(ramp[::-1], 7), ramp * np.uint8(77)], -1).reshape(4, 8, 8, 3)


def test_normalised_images_are_turned_back_into_all_256_values_of_each_channel(pixels: NDArray[np.uint8]) -> None:
    nhwc, nchw = PixelInput("uint8-nhwc", MEAN, STD), PixelInput("uint8-nchw", MEAN, STD)
    np.testing.assert_array_equal(nhwc.given(normalised(pixels)), pixels)
    np.testing.assert_array_equal(nchw.given(normalised(pixels))[:, 2], pixels[..., 2])
    np.testing.assert_array_equal(nhwc.given(pixels), pixels)


@pytest.mark.parametrize("value", [1e-6, np.nan, np.inf, -40.0])
def test_images_that_are_no_pixels_are_refused(pixels: NDArray[np.uint8], value: float) -> None:
    images = normalised(pixels)
    images[1, 2, 3, 4] += np.float32(value)
    with pytest.raises(AuditError, match="not pixels normalised"):
        PixelInput("uint8-nhwc", MEAN, STD).given(images)


def test_pixels_of_another_normalisation_are_refused(pixels: NDArray[np.uint8]) -> None:
    for mean, std in ((MEAN[::-1], STD), (MEAN, (0.23, 0.224, 0.225)), ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))):
        with pytest.raises(AuditError, match="not pixels normalised"):
            PixelInput("uint8-nchw", mean, std).given(normalised(pixels))


def test_metadata_without_an_input_are_of_a_float32_file_and_damaged_ones_are_refused() -> None:
    preprocessing = json.dumps({"mean": MEAN, "std": STD})
    assert pixel_input({"kdexport.preprocessing": preprocessing}) is None
    found = pixel_input({"kdexport.input": '"uint8-nchw"', "kdexport.preprocessing": preprocessing})
    assert found == PixelInput("uint8-nchw", MEAN, STD)
    for kind, described in (
        ('"uint8"', preprocessing),
        ("7", preprocessing),
        ("[]", preprocessing),
        ("uint8-nhwc", preprocessing),
        ('"uint8-nhwc"', "{}"),
        ('"uint8-nhwc"', "3"),
        ('"uint8-nhwc"', '{"mean": "x", "std": [1]}'),
    ):
        with pytest.raises(AuditError, match="do not say which pixels"):
            pixel_input({"kdexport.input": kind, "kdexport.preprocessing": described})
    with pytest.raises(AuditError, match="do not say which pixels"):
        pixel_input({"kdexport.input": '"uint8-nhwc"'})


def test_a_layout_is_told_by_its_shape(pixels: NDArray[np.uint8]) -> None:
    assert arrange(pixels, "uint8-nhwc").shape[1:] == image_shape("uint8-nhwc", 8) == (8, 8, 3)
    assert arrange(pixels, "uint8-nchw").shape[1:] == image_shape("uint8-nchw", 8) == (3, 8, 8)
