import dataclasses
import io
import json
import math
import os
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torchvision import transforms
from torchvision.transforms import functional as vision

from kdexport.data.preprocessing import (
    BACKGROUND,
    Preprocessing,
    check_image,
    decode,
    differing_fields,
    read_image,
    resized_size,
)
from kdexport.errors import DataError

IMAGENET = Preprocessing(image_size=224, resize=256, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
CIFAR = Preprocessing(image_size=32, resize=32, mean=(0.5071, 0.4867, 0.4408), std=(0.2675, 0.2565, 0.2761))


def noise_image(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(5).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def smooth_image(width: int, height: int) -> Image.Image:
    """Slow waves with a different phase in each channel: not symmetric, so that a flip or swap changes the result."""
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    waves = [np.sin(2.1 * x + 1.3 * y), np.cos(1.7 * x - 0.9 * y), np.sin(0.4 - 2.3 * y + 0.7 * x)]
    return Image.fromarray((np.stack(waves, -1) * 110 + 128).astype(np.uint8))


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def resize_then_crop(image: Image.Image, preprocessing: Preprocessing) -> NDArray[np.int64]:
    """The two steps that torchvision's reference transforms take."""
    resized = vision.resize(image, [preprocessing.resize], vision.InterpolationMode.BILINEAR)
    return np.asarray(vision.center_crop(resized, [preprocessing.image_size] * 2)).astype(np.int64)


@pytest.mark.parametrize(("width", "height"), [(512, 512), (1536, 768), (768, 2304), (256, 512)])
def test_noise_equals_resize_then_crop_within_one_grey_level(width: int, height: int) -> None:
    image = noise_image(width, height)
    difference = IMAGENET.pixels(image).astype(np.int64) - resize_then_crop(image, IMAGENET)
    assert np.abs(difference).max() <= 1


@pytest.mark.parametrize(("width", "height"), [(901, 640), (500, 375), (333, 1001), (257, 300), (2000, 1999)])
def test_smooth_images_of_odd_sizes_equal_resize_then_crop_within_one_grey_level(width: int, height: int) -> None:
    image = smooth_image(width, height)
    difference = IMAGENET.pixels(image).astype(np.int64) - resize_then_crop(image, IMAGENET)
    assert np.abs(difference).max() <= 1
    flipped = np.abs(IMAGENET.pixels(image)[:, ::-1].astype(np.int64) - resize_then_crop(image, IMAGENET))
    assert flipped.max() > 30


def test_shrinking_averages_over_the_source_rather_than_skipping_pixels() -> None:
    # Columns of black and white: sampling single pixels would keep them, averaging gives grey.
    stripes = np.zeros((512, 512, 3), np.uint8)
    stripes[:, ::2] = 255
    shrunk = Preprocessing(image_size=64, resize=64, mean=IMAGENET.mean, std=IMAGENET.std).pixels(
        Image.fromarray(stripes)
    )
    assert np.abs(shrunk.astype(int) - 127).max() <= 8


def test_an_image_of_the_right_size_is_not_changed() -> None:
    image = noise_image(32, 32)
    assert np.array_equal(CIFAR.pixels(image), np.asarray(image))


def test_a_centre_crop_without_scaling_is_exact() -> None:
    image = noise_image(256, 256)
    assert np.array_equal(IMAGENET.pixels(image), np.asarray(image)[16:240, 16:240])


def test_an_image_of_the_crop_size_is_still_resized_where_resize_is_larger() -> None:
    image = noise_image(224, 224)
    assert not np.array_equal(IMAGENET.pixels(image), np.asarray(image))


@pytest.mark.parametrize("size", [(60000, 1), (1, 60000), (3, 20000), (1, 1)])
def test_extreme_aspect_ratios_cost_neither_memory_nor_time(size: tuple[int, int]) -> None:
    image = Image.new("RGB", size, (9, 200, 30))
    tracemalloc.start()
    began = time.perf_counter()
    pixels = IMAGENET.pixels(image)
    elapsed = time.perf_counter() - began
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert pixels.shape == (224, 224, 3)
    assert (pixels == (9, 200, 30)).all()
    assert elapsed < 1
    assert peak < 8e6  # scaled as a whole, the image would take 256 x 256 x 60000 x 3 bytes


def test_the_crop_of_an_extreme_aspect_ratio_is_its_centre() -> None:
    pixels = np.zeros((1, 60000, 3), np.uint8)
    pixels[0, 29_998:30_002] = (250, 120, 10)
    assert (IMAGENET.pixels(Image.fromarray(pixels)) == (250, 120, 10)).all()


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("L", 77, (77, 77, 77)),
        ("1", 1, (255, 255, 255)),
        ("LA", (77, 0), (77, 77, 77)),
        ("RGBA", (10, 20, 30, 0), (10, 20, 30)),
        ("CMYK", (0, 255, 255, 0), (255, 0, 0)),
        ("P", 0, (0, 0, 0)),
    ],
)
def test_every_eight_bit_mode_becomes_rgb(mode: str, colour: Any, expected: tuple[int, int, int]) -> None:
    assert (CIFAR.pixels(Image.new(mode, (47, 40), colour)) == expected).all()


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "LA", "P", "PA", "1", "CMYK", "YCbCr", "HSV"])
@pytest.mark.parametrize("size", [(61, 90), (300, 37), (24, 24)])
def test_every_mode_has_the_bits_of_converting_first(mode: str, size: tuple[int, int]) -> None:
    rng = np.random.default_rng(9)
    width, height = size
    image = Image.fromarray(rng.integers(0, 256, (height, width, 4), np.uint8), "RGBA")
    image = image.convert(mode) if mode not in ("CMYK", "YCbCr", "HSV") else image.convert("RGB").convert(mode)
    if mode in ("P", "PA"):
        image.info["transparency"] = 3
    preprocessing = Preprocessing(image_size=24, resize=27, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    rgb = image.convert("RGB")
    side = min(size) / 27 * 24
    left, top = (width - side) / 2, (height - side) / 2
    wanted = rgb.resize((24, 24), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side))
    assert np.array_equal(preprocessing.pixels(image), np.asarray(wanted))


def test_normalisation_is_per_channel_and_channels_come_first() -> None:
    pixels = np.random.default_rng(3).integers(0, 256, (3, 5, 7, 3), dtype=np.uint8)
    expected = vision.normalize(
        torch.from_numpy(pixels).permute(0, 3, 1, 2).double() / 255, list(CIFAR.mean), list(CIFAR.std)
    )
    ours = CIFAR.normalise(pixels)
    assert ours.dtype == np.float32
    assert ours.flags.c_contiguous
    assert ours.shape == (3, 3, 5, 7)
    np.testing.assert_allclose(ours, expected.numpy(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "PPM", "TIFF"])
def test_lossless_formats_decode_exactly(kind: str) -> None:
    image = noise_image(19, 23)
    assert np.array_equal(np.asarray(decode(encoded(image, kind), "x")), np.asarray(image))


@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
def test_lossy_formats_decode_closely(kind: str) -> None:
    image = smooth_image(64, 48)
    difference = np.asarray(decode(encoded(image, kind, quality=95), "x")).astype(int) - np.asarray(image)
    assert np.abs(difference).mean() < 3


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "PPM", "TIFF", "GIF"])
@pytest.mark.parametrize("kept", [0.02, 0.5, 0.9])
def test_a_truncated_image_is_an_error_that_names_it(kind: str, kept: float) -> None:
    data = encoded(noise_image(61, 53), kind)
    with pytest.raises(DataError, match=r"cats/tom\.img is not a readable image"):
        decode(data[: int(len(data) * kept)], "cats/tom.img")


@pytest.mark.parametrize(
    "data",
    [b"", b"\x00" * 64, b"<svg xmlns='http://www.w3.org/2000/svg'/>", encoded(noise_image(9, 9), "ICO")],
    ids=["empty", "zeros", "svg", "ico"],
)
def test_a_foreign_file_is_an_error_that_names_it_and_the_formats(data: bytes) -> None:
    with pytest.raises(DataError, match=r"^photo is not a readable image") as caught:
        decode(data, "photo")
    assert "JPEG, PNG, WEBP, BMP, PPM, TIFF, GIF" in caught.value.remedy


@pytest.mark.parametrize("kind", ["GIF", "TIFF"])
def test_a_file_of_several_frames_or_pages_is_refused(kind: str, tmp_path: Path) -> None:
    frames = [noise_image(9, 7), smooth_image(9, 7)]
    path = tmp_path / "film"
    path.write_bytes(encoded(frames[0], kind, save_all=True, append_images=frames[1:]))
    reason = "film is not a readable image: it has more than one frame or page"
    with pytest.raises(DataError, match=reason):
        decode(path.read_bytes(), "film")
    with pytest.raises(DataError, match=reason):
        check_image(path)
    path.write_bytes(encoded(frames[0], kind))
    check_image(path)
    assert decode(path.read_bytes(), "film").size == frames[0].size


def test_colours_that_cannot_become_rgb_are_refused() -> None:
    lab = Image.merge("LAB", [Image.new("L", (9, 7), 90)] * 3)
    with pytest.raises(DataError, match="its colours are LAB, which cannot be converted to RGB"):
        decode(encoded(lab, "TIFF"), "scan")


def test_flipped_bytes_in_compressed_data_are_an_error() -> None:
    data = bytearray(encoded(noise_image(61, 53), "PNG"))
    data[len(data) // 2] ^= 0xFF
    with pytest.raises(DataError, match="photo"):
        decode(bytes(data), "photo")


def test_an_image_just_within_the_limit_on_pixels_is_read() -> None:
    # One bit a pixel: a small file that decodes to a large image.
    assert decode(encoded(Image.new("1", (10_000, 8_000)), "PNG"), "large.png").size == (10_000, 8_000)


@pytest.mark.parametrize("size", [(10_000, 8_001), (10_000, 9_500), (40_000, 40_000)])
def test_an_image_beyond_the_limit_on_pixels_is_refused_by_its_header(size: tuple[int, int]) -> None:
    with pytest.raises(DataError, match=r"bomb\.pbm is not a readable image: .*pixels") as caught:
        decode(b"P4 %d %d\n" % size + b"\x00" * 1000, "bomb.pbm")
    assert "80,000,000 pixels" in caught.value.remedy


@pytest.mark.parametrize("kind", ["PNG", "PPM"])
def test_an_image_of_sixteen_bits_is_refused_rather_than_clipped_to_white(kind: str) -> None:
    grey = Image.fromarray((np.arange(4096, dtype=np.uint16) * 16).reshape(64, 64))
    with pytest.raises(DataError, match=r"scan is not a readable image: its channels are wider than 8 bits"):
        decode(encoded(grey, kind), "scan")


def test_a_missing_file_and_a_folder_are_errors_that_name_the_path(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.png cannot be read: No such file"):
        read_image(tmp_path / "none.png")
    with pytest.raises(DataError, match="cannot be read: Is a directory"):
        read_image(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads files of any mode")
def test_a_file_without_permission_is_an_error_that_names_the_path(tmp_path: Path) -> None:
    path = tmp_path / "secret.png"
    path.write_bytes(encoded(noise_image(8, 8), "PNG"))
    path.chmod(0)
    with pytest.raises(DataError, match=r"secret\.png cannot be read: Permission denied"):
        read_image(path)


def test_reading_a_file_gives_its_pixels_and_its_error_its_path(tmp_path: Path) -> None:
    image = noise_image(8, 9)
    good, bad = tmp_path / "good.png", tmp_path / "bad.png"
    good.write_bytes(encoded(image, "PNG"))
    bad.write_bytes(good.read_bytes()[:60])
    assert np.array_equal(np.asarray(read_image(good)), np.asarray(image))
    with pytest.raises(DataError, match=r"bad\.png is not a readable image"):
        read_image(bad)


#: Landscape and portrait, odd and even, shrunk and enlarged, thin and tiny.
SIZES = [
    *((64, 48), (48, 64), (61, 90), (90, 61), (33, 33), (300, 37), (37, 300), (500, 375), (333, 500), (101, 99)),
    *((17, 19), (5, 3), (3, 5), (1, 1), (1, 40), (40, 1), (400, 2), (7, 250), (32, 36), (36, 32), (36, 36), (128, 64)),
]
#: Image size and resize; in the last two the crop is larger than the resized image.
CROPS = [(32, 36), (24, 27), (31, 32), (32, 31), (16, 16), (24, 17), (25, 9)]
INTERPOLATIONS = ["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"]
MODES = ["RGB", "L", "LA", "RGBA", "P", "CMYK", "1"]


def exact(image_size: int, resize: int, **changes: Any) -> Preprocessing:
    new = Preprocessing.for_new_student(image_size=image_size, resize=resize, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.1))
    return dataclasses.replace(new, **changes)


def in_mode(image: Image.Image, mode: str) -> Image.Image:
    if mode in ("LA", "RGBA"):
        image = image.convert(mode)
        image.putalpha(Image.fromarray(np.random.default_rng(1).integers(0, 256, image.size[::-1], np.uint8)))
        return image
    return image.convert(mode)


def of_torchvision(image: Image.Image, preprocessing: Preprocessing) -> NDArray[np.uint8]:
    modes = {"hamming": vision.InterpolationMode.HAMMING, "box": vision.InterpolationMode.BOX}
    mode = modes.get(preprocessing.interpolation) or vision.InterpolationMode(preprocessing.interpolation)
    size = preprocessing.resize if preprocessing.fit == "crop" else [preprocessing.resize] * 2
    steps = transforms.Compose(
        [transforms.Resize(size, interpolation=mode), transforms.CenterCrop(preprocessing.image_size)]
    )
    return np.asarray(steps(image.convert("RGB")))


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("crop", CROPS, ids=str)
def test_every_size_has_the_bits_of_torchvision(interpolation: str, crop: tuple[int, int]) -> None:
    for fit in ("crop", "squash"):
        preprocessing = exact(*crop, interpolation=interpolation, fit=fit)
        for size in SIZES:
            image = noise_image(*size)
            np.testing.assert_array_equal(preprocessing.pixels(image), of_torchvision(image, preprocessing), f"{size}")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
def test_every_mode_has_the_bits_of_torchvision(mode: str, interpolation: str) -> None:
    preprocessing = exact(24, 27, interpolation=interpolation, background=None)
    for size in ((61, 90), (300, 37), (24, 24), (27, 27), (27, 40), (9, 12)):
        image = in_mode(noise_image(*size), mode)
        np.testing.assert_array_equal(preprocessing.pixels(image), of_torchvision(image, preprocessing), f"{size}")


def test_photos_have_the_bits_of_torchvision_at_the_size_of_imagenet() -> None:
    for size in ((640, 427), (375, 500), (1200, 799), (255, 257), (230, 2000)):
        for resize, interpolation in ((256, "bilinear"), (232, "bilinear"), (235, "bicubic")):
            preprocessing = exact(224, resize, interpolation=interpolation)
            image = noise_image(*size)
            np.testing.assert_array_equal(preprocessing.pixels(image), of_torchvision(image, preprocessing), f"{size}")


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos", "nearest"])
@pytest.mark.parametrize(("crop_mode", "fit"), [("center", "crop"), ("squash", "squash"), ("border", "pad")])
@pytest.mark.parametrize(("image_size", "crop_pct"), [(32, 0.875), (24, 0.9), (31, 1.0), (28, 0.95)])
def test_every_size_has_the_bits_of_timm(
    interpolation: str, crop_mode: str, fit: str, image_size: int, crop_pct: float
) -> None:
    timm_data = pytest.importorskip("timm.data")
    mean = (0.485, 0.456, 0.406)
    steps = timm_data.create_transform(
        (3, image_size, image_size), is_training=False, interpolation=interpolation, mean=mean, crop_pct=crop_pct,
        crop_mode=crop_mode, normalize=False,
    )  # fmt: skip
    colour = (124, 116, 104) if fit == "pad" else (0, 0, 0)
    preprocessing = exact(
        image_size, math.floor(image_size / crop_pct), interpolation=interpolation, fit=fit, pad_colour=colour
    )
    for size in SIZES:
        if fit == "pad" and max(size) > 2 * preprocessing.resize * min(size):
            continue  # timm rounds the short side to 0 pixels
        image = noise_image(*size)
        wanted = steps(image).permute(1, 2, 0).numpy()
        np.testing.assert_array_equal(preprocessing.pixels(image), wanted, f"{size}")


def test_a_padded_image_keeps_at_least_one_pixel_of_its_short_side() -> None:
    assert resized_size((1, 50_000), "pad", 32) == (1, 32)
    pixels = exact(32, 32, fit="pad", pad_colour=(1, 2, 3)).pixels(Image.new("RGB", (1, 50_000), (200, 100, 50)))
    assert (pixels[:, 15] == (200, 100, 50)).all()
    assert (np.delete(pixels, 15, axis=1) == (1, 2, 3)).all()


def test_the_colour_of_the_padding_reaches_grey_images_too() -> None:
    pixels = exact(20, 20, fit="pad", pad_colour=(9, 80, 170)).pixels(Image.new("L", (40, 20), 77))
    assert (pixels[:5] == (9, 80, 170)).all()
    assert (pixels[5:15] == 77).all()
    assert (pixels[15:] == (9, 80, 170)).all()


@pytest.mark.parametrize("fit", ["crop", "squash", "pad"])
@pytest.mark.parametrize("size", [(60_000, 1), (1, 60_000), (3, 20_000)])
def test_exact_geometry_of_extreme_aspect_ratios_costs_neither_memory_nor_time(fit: str, size: tuple[int, int]) -> None:
    image = Image.new("RGB", size, (9, 200, 30))
    tracemalloc.start()
    began = time.perf_counter()
    pixels = exact(224, 256, fit=fit).pixels(image)
    elapsed = time.perf_counter() - began
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (pixels == (9, 200, 30)).all(-1).any()
    assert elapsed < 3
    assert peak < 80e6


def in_the_old_way(image: Image.Image, image_size: int, resize: int) -> NDArray[np.uint8]:
    """What a student without the newer fields was trained with; it must not change."""
    size = (image_size, image_size)
    rgb = image.convert("RGB")
    if image.size == size and resize == image_size:
        return np.asarray(rgb)
    scale = min(image.size) / resize
    half = image_size * scale / 2
    x, y = image.width / 2, image.height / 2
    box = (max(x - half, 0), max(y - half, 0), min(x + half, image.width), min(y + half, image.height))
    return np.asarray(rgb.resize(size, Image.Resampling.BILINEAR, box=box))


@pytest.mark.parametrize("mode", MODES)
def test_students_without_the_newer_fields_see_what_they_saw(mode: str) -> None:
    for image_size, resize in ((32, 36), (24, 27), (16, 16), (32, 32)):
        stored = {"image_size": image_size, "resize": resize, "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
        preprocessing = Preprocessing.from_json(json.loads(json.dumps(stored)))
        assert json.loads(json.dumps(preprocessing.to_json())) == stored
        for size in SIZES:
            image = in_mode(noise_image(*size), mode)
            image.getexif()[0x0112] = 6
            data = encoded(image.convert("RGB"), "JPEG", exif=image.getexif(), quality=90)
            wanted = in_the_old_way(image, image_size, resize)
            np.testing.assert_array_equal(preprocessing.pixels(image), wanted, f"{size}")
            photo = decode(data, "photo")
            np.testing.assert_array_equal(preprocessing.pixels(photo), in_the_old_way(photo, image_size, resize))


def test_an_image_is_shown_as_it_is_or_as_viewers_show_it() -> None:
    rgba = Image.new("RGBA", (40, 20), (255, 255, 255, 0))
    rgba.paste((200, 0, 0, 255), (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6
    image = decode(encoded(rgba, "PNG", exif=exif), "x")
    shown = exact(20, 20, fit="squash", interpolation="nearest").pixels(image)
    assert (shown[:10] == (200, 0, 0)).all()
    assert (shown[10:] == BACKGROUND).all()
    stored = exact(20, 20, fit="squash", interpolation="nearest", orientation="ignore", background=None).pixels(image)
    assert (stored[:, :10] == (200, 0, 0)).all()
    assert (stored[:, 10:] == 255).all()
    assert exact(20, 20).rgb(image).size == (20, 40)
    assert exact(20, 20).rgb(image).getpixel((5, 35)) == BACKGROUND
    assert exact(20, 20).rgb(Image.new("L", (3, 2), 9)).getpixel((0, 0)) == (9, 9, 9)


def test_the_steps_are_described_in_one_line() -> None:
    assert IMAGENET.describe() == (
        "EXIF orientation ignored, transparency ignored, RGB, short side to 256 pixels (bilinear, at once with the "
        "crop), central 224x224"
    )
    assert exact(32, 30, interpolation="bicubic").describe() == (
        "EXIF orientation applied, transparency on black, RGB, short side to 30 pixels (bicubic), central 32x32 padded "
        "with black"
    )
    assert exact(32, 36, fit="pad", pad_colour=(9, 8, 7), background=(255, 255, 255)).describe() == (
        "EXIF orientation applied, transparency on white, RGB, long side to 36 pixels (bilinear), central 32x32 padded "
        "with RGB (9, 8, 7)"
    )


def test_differences_are_named() -> None:
    assert differing_fields(exact(20, 20), exact(20, 20)) == ()
    assert differing_fields(exact(20, 20), exact(20, 22, interpolation="bicubic", background=None)) == (
        "resize",
        "interpolation",
        "background",
    )


def test_preprocessing_survives_json() -> None:
    new = exact(224, 256, fit="pad", pad_colour=(1, 2, 3), interpolation="bicubic")
    for value in (IMAGENET, CIFAR, new, exact(32, 36), exact(32, 36, background=None)):
        assert Preprocessing.from_json(json.loads(json.dumps(value.to_json()))) == value


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"mean": [0.5]}, r"mean is \(0.5,\), not three numbers, one per channel; inputs of students are RGB"),
        ({"std": [0.1] * 4}, "std is .*not three numbers"),
        ({"mean": 0.5}, "mean is 0.5, not three numbers"),
        ({"mean": [0.1, float("nan"), 0.2]}, "which is not finite"),
        ({"std": [0.1, 0, 0.2]}, "each number must be above 0"),
        ({"image_size": "large"}, "image_size is 'large', not a number of pixels"),
        ({"image_size": [32, 40]}, r"image_size is \(32, 40\), not a number of pixels; inputs of students are square"),
        ({"resize": None}, "resize is None, not a number of pixels"),
        ({"resize": 31}, "geometry one_step is for fit crop with a resize of at least image_size"),
        ({"fit": "pad"}, "geometry one_step is for fit crop"),
        ({"fit": "stretch"}, "fit is 'stretch'; it must be one of crop, squash, pad"),
        ({"interpolation": "cubic"}, "interpolation is 'cubic'; it must be one of nearest, box, bilinear"),
        ({"orientation": True}, "orientation is True; it must be one of apply, ignore"),
        ({"geometry": ["two_steps"]}, "geometry is .*; it must be one of one_step, two_steps"),
        ({"background": [0, 0]}, "background is .*not three whole numbers from 0 to 255"),
        ({"background": [0, 0, 256]}, "background is .*not three whole numbers from 0 to 255"),
        ({"pad_colour": [0, 0, 1.0]}, "pad_colour is .*not three whole numbers from 0 to 255"),
        ({"pad_colour": None}, "pad_colour is None, not three whole numbers"),
        ({"antialias": True}, "unknown key 'antialias' of preprocessing; known are image_size, resize, mean"),
    ],
    ids=str,
)
def test_foreign_json_raises(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Preprocessing.from_json(CIFAR.to_json() | change)
