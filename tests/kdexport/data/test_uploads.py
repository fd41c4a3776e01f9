"""What training reads and the server refuses: found by one definition, and never a golden image."""

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image

from kdexport.data.preprocessing import Preprocessing, decode
from kdexport.data.uploads import ImageLimits, accepted_images, upload_refusal
from kdexport.errors import RequestError
from kdexport.serving.images import PixelBudget, decode_upload
from kdexport.serving.limits import Limits

SMALL = Preprocessing(image_size=16, resize=16, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
LIMITS = ImageLimits()


def noise(width: int = 20, height: int = 24) -> Image.Image:
    return Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8))


def encoded(image: Image.Image, kind: str, *more: Image.Image) -> bytes:
    buffer = io.BytesIO()
    options: dict[str, Any] = {"save_all": True, "append_images": list(more)} if more else {}
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


FOREIGN: dict[str, tuple[Callable[[], bytes], str]] = {
    "small": (lambda: encoded(noise(15, 40), "PNG"), "too small (short side below 16 pixels)"),
    "long": (lambda: encoded(noise(16, 321), "JPEG"), "too long (long side above 20 times the short one)"),
    "bmp": (lambda: encoded(noise(), "BMP"), "not readable as JPEG, PNG or WEBP"),
    "apng": (lambda: encoded(noise(), "PNG", noise().rotate(180)), "animated"),
    "webp": (lambda: encoded(noise(), "WEBP", noise().rotate(180)), "animated"),
    "small webp": (lambda: encoded(noise(9, 9), "WEBP"), "too small (short side below 16 pixels)"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_an_image_that_training_reads_and_the_server_refuses_is_refused_for_the_same_reason(name: str) -> None:
    make, kind = FOREIGN[name]
    data = make()
    decode(data, name)
    refusal = upload_refusal(data, LIMITS)
    assert refusal is not None
    assert refusal.kind == kind
    with pytest.raises(RequestError) as caught:
        decode_upload(data, SMALL, Limits(), PixelBudget(Limits().pixels))
    assert caught.value.message.replace("The upload", "The image") == refusal.message


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("size", [(16, 16), (16, 320), (40, 20)])
def test_what_the_server_takes_is_no_refusal(kind: str, size: tuple[int, int]) -> None:
    data = encoded(noise(*size), kind)
    assert upload_refusal(data, LIMITS) is None
    assert decode_upload(data, SMALL, Limits(), PixelBudget(Limits().pixels)).shape == (16, 16, 3)


def test_the_limits_of_the_server_are_those_of_the_build() -> None:
    assert Limits().images == ImageLimits()
    refusal = upload_refusal(encoded(noise(), "PNG"), ImageLimits(pixels=100))
    assert refusal is not None
    assert (refusal.kind, refusal.status) == ("too large (more than 100 pixels)", 413)


def test_the_nearest_images_that_are_taken_stand_in_for_the_refused_ones() -> None:
    files = [encoded(noise(), "PNG")] * 10
    files[0], files[4], files[5], files[9] = (FOREIGN[name][0]() for name in ("small", "bmp", "webp", "bmp"))
    found = accepted_images([0, 4, 9], len(files), files.__getitem__, LIMITS)
    assert found.accepted
    assert found.positions == [1, 3, 8]
    assert found.passed_over == {
        "not readable as JPEG, PNG or WEBP": 2,
        "too small (short side below 16 pixels)": 1,
    }
    assert accepted_images([2, 6], 10, files.__getitem__, LIMITS).passed_over == {}


def test_no_image_is_taken_twice_and_too_few_are_fewer() -> None:
    files = [FOREIGN["bmp"][0](), encoded(noise(), "PNG"), FOREIGN["small"][0]()]
    found = accepted_images([0, 1, 2], 3, files.__getitem__, LIMITS)
    assert found.positions == [1]
    assert found.accepted


def test_a_data_set_of_which_the_server_takes_nothing_keeps_its_images_and_says_so() -> None:
    files = [FOREIGN["bmp"][0]()] * 4
    found = accepted_images([0, 3], 4, files.__getitem__, LIMITS)
    assert not found.accepted
    assert found.positions == [0, 3]
    assert found.passed_over == {"not readable as JPEG, PNG or WEBP": 4}
