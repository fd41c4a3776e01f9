import io
import struct
import warnings
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageOps

from kdexport.data.exif_and_alpha import colour_planes, exif_orientation, image_facts, orientation
from kdexport.data.preprocessing import decode

RED = (250, 20, 35)


def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(4).integers(0, 256, (13, 21, 3), dtype=np.uint8))


def exif_with(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x010F] = "a maker"
    exif[0x0112] = value
    return exif


def stored(image: Image.Image, kind: str, **options: Any) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return decode(buffer.getvalue(), "x")


def shown(image: Image.Image, **options: Any) -> NDArray[np.uint8]:
    planes = [np.asarray(plane) for plane in colour_planes(image, **options)]
    if planes[0].ndim == 3:
        return planes[0]
    return np.stack(planes if len(planes) == 3 else planes * 3, -1)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("value", range(1, 9))
def test_each_orientation_of_each_format_is_that_of_pillow(kind: str, value: int) -> None:
    options = {"lossless": True} if kind == "WEBP" else {"quality": 95, "subsampling": 0} if kind == "JPEG" else {}
    image = stored(picture(), kind, exif=exif_with(value), **options)
    wanted = np.asarray(ImageOps.exif_transpose(image))
    np.testing.assert_array_equal(shown(image, turn=orientation(image)), wanted)
    assert wanted.shape[:2] == ((21, 13) if value >= 5 else (13, 21))


@pytest.mark.parametrize(("kind", "found"), [("JPEG", 6), ("PNG", 6), ("WEBP", 6), ("TIFF", 6), ("BMP", 1)])
def test_the_header_alone_tells_the_orientation(kind: str, found: int) -> None:
    buffer = io.BytesIO()
    picture().save(buffer, kind, **({} if kind == "BMP" else {"exif": exif_with(6)}))
    assert image_facts(Image.open(buffer)) == (found, False)


@pytest.mark.parametrize("value", [0, 9, 65_535])
def test_an_orientation_that_does_not_exist_is_upright(value: int) -> None:
    assert exif_orientation(exif_with(value).tobytes()) == 1


def test_both_byte_orders_are_read() -> None:
    entry = struct.pack(">HHIHH", 0x0112, 3, 1, 8, 0)
    assert exif_orientation(b"Exif\0\0MM\0*" + struct.pack(">IH", 8, 1) + entry) == 8
    entry = struct.pack("<HHIHH", 0x0112, 3, 1, 8, 0)
    assert exif_orientation(b"II*\0" + struct.pack("<IH", 8, 1) + entry) == 8


def test_damaged_exif_is_upright_without_a_warning_or_an_error() -> None:
    whole = exif_with(6).tobytes()
    rng = np.random.default_rng(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for end in range(len(whole)):
            assert exif_orientation(whole[:end]) in (1, 6)
        for _ in range(2000):
            data = bytearray(whole)
            data[int(rng.integers(len(data)))] = int(rng.integers(256))
            assert 1 <= exif_orientation(bytes(data)) <= 8
    assert exif_orientation(b"") == exif_orientation(b"Exif\0\0" * 50) == 1


def test_an_orientation_in_xmp_alone_is_ignored_as_in_browsers() -> None:
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    image = stored(picture(), "JPEG", xmp=xmp)
    # Pillow 11.0 does not look into XMP; later versions do, and give what they find there as EXIF.
    assert image.getexif().get(0x0112) in (6, None)
    assert orientation(image) == 1


def test_a_cmyk_photo_is_turned() -> None:
    image = stored(picture().convert("CMYK"), "JPEG", exif=exif_with(8), quality=95)
    assert image.mode == "CMYK"
    wanted = ImageOps.exif_transpose(image).convert("RGB")
    np.testing.assert_array_equal(shown(image, turn=orientation(image)), np.asarray(wanted))


def composed(colours: NDArray[np.uint8], alpha: NDArray[np.uint8], background: tuple[int, int, int]) -> NDArray[Any]:
    share = alpha[..., None] / 255
    return np.asarray(np.floor(colours * share + np.array(background) * (1 - share) + 0.5))


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_transparency_is_composed_on_the_background(kind: str) -> None:
    rng = np.random.default_rng(8)
    alpha = rng.choice(np.array([0, 1, 100, 254, 255], np.uint8), (13, 21))
    colours = np.asarray(picture())
    rgba = Image.fromarray(np.dstack([colours, alpha]), "RGBA")
    image = stored(rgba, kind, **({"lossless": True, "exact": True} if kind == "WEBP" else {}))
    assert image.mode == "RGBA"
    difference = shown(image, background=RED) - composed(colours, alpha, RED)
    assert np.abs(difference).max() <= 1e-6
    np.testing.assert_array_equal(shown(image), colours)


def test_grey_with_alpha_takes_the_colour_of_the_background() -> None:
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    alpha = grey[::-1].T.copy()
    image = stored(Image.merge("LA", [Image.fromarray(grey), Image.fromarray(alpha)]), "PNG")
    assert image.mode == "LA"
    wanted = composed(np.repeat(grey[..., None], 3, 2), alpha, RED)
    np.testing.assert_array_equal(shown(image, background=RED), wanted)
    np.testing.assert_array_equal(shown(image), np.repeat(grey[..., None], 3, 2))


@pytest.mark.parametrize("mode", ["P", "L", "RGB", "1"])
def test_a_transparent_colour_without_alpha_channel_is_composed(mode: str) -> None:
    image = Image.new("RGB", (6, 4), (255, 255, 255))
    image.paste((0, 0, 0), (0, 0, 3, 4))
    image = image.convert(mode)
    key = {"P": image.getpixel((0, 0)), "L": 0, "RGB": (0, 0, 0), "1": 0}[mode]
    image = stored(image, "PNG", transparency=key)
    assert image_facts(image) == (1, True)
    pixels = shown(image, background=RED)
    assert (pixels[:, :3] == RED).all()
    assert (pixels[:, 3:] == 255).all()
    assert (shown(image)[:, :3] == 0).all()


def test_the_transparent_part_of_a_gif_is_composed() -> None:
    image = Image.new("P", (6, 4), 1)
    image.putpalette([9, 9, 9, 255, 255, 255])
    image.paste(0, (0, 0, 3, 4))
    image = stored(image, "GIF", transparency=0)
    assert (shown(image, background=RED)[:, :3] == RED).all()


def test_an_image_with_transparency_is_turned_too() -> None:
    rgba = Image.fromarray(np.random.default_rng(2).integers(0, 256, (13, 21, 4), dtype=np.uint8), "RGBA")
    image = stored(rgba, "PNG", exif=exif_with(6))
    upright = ImageOps.exif_transpose(image)
    np.testing.assert_array_equal(shown(image, turn=6, background=RED), shown(upright, background=RED))


def test_the_image_itself_stays_as_it_is() -> None:
    rgba = Image.fromarray(np.random.default_rng(2).integers(0, 256, (13, 21, 4), dtype=np.uint8), "RGBA")
    before = rgba.tobytes()
    shown(rgba, turn=3, background=RED)
    assert rgba.tobytes() == before
