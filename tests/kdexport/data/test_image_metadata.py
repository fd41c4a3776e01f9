import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageCms, PngImagePlugin

from kdexport.data.exif_and_alpha import orientation
from kdexport.data.image_metadata import without_metadata
from kdexport.data.preprocessing import Preprocessing, decode
from kdexport.errors import DataError

SECRET = b"Ada Lovelace 51.5226 N"
APPLIED = Preprocessing.for_new_student(image_size=24, resize=28, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
IGNORED = Preprocessing(image_size=24, resize=28, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
BOTH = pytest.mark.parametrize("preprocessing", [APPLIED, IGNORED], ids=["applied", "ignored"])


def picture(mode: str = "RGB") -> Image.Image:
    rng = np.random.default_rng(5)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 9, 3), np.uint8)).resize((63, 42), Image.Resampling.BICUBIC)
    if mode == "P":
        return coarse.quantize(37)
    if mode in ("RGBA", "LA"):
        image = coarse.convert(mode)
        image.putalpha(Image.fromarray(rng.integers(0, 256, (42, 63), np.uint8)))
        return image
    return coarse.convert(mode)


def telling_exif(turn: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = turn
    exif[0x010E] = SECRET.decode()
    exif.get_ifd(0x8825)[29] = SECRET.decode()
    return exif.tobytes()


def profile() -> bytes:
    return bytes(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def telling(kind: str, mode: str, turn: int, **options: Any) -> bytes:
    """A file with everything that a camera or a program may write into it."""
    image = picture(mode)
    given: dict[str, Any] = {"exif": telling_exif(turn), "icc_profile": profile(), **options}
    xmp = b"<x:xmpmeta>" + SECRET + b"</x:xmpmeta>"
    if kind in ("JPEG", "WEBP"):
        given["xmp"] = xmp
    if kind == "JPEG":
        given["comment"] = SECRET
    if kind == "PNG":
        texts = PngImagePlugin.PngInfo()
        texts.add_text("Author", SECRET.decode())
        texts.add_itxt("XML:com.adobe.xmp", SECRET.decode())
        texts.add(b"tIME", SECRET[:7])
        given["pnginfo"] = texts
    return saved(image, kind, **given)


def pixels(data: bytes, preprocessing: Preprocessing) -> NDArray[np.uint8]:
    with Image.open(io.BytesIO(data)) as image:
        return preprocessing.pixels(image)


FILES: list[tuple[str, str, dict[str, Any]]] = [
    ("JPEG", mode, extra) for mode in ("RGB", "L", "CMYK") for extra in ({}, {"progressive": True})
]
FILES += [("JPEG", "RGB", {"subsampling": 2, "restart_marker_blocks": 3}), ("JPEG", "RGB", {"keep_rgb": True})]
FILES += [("PNG", mode, {}) for mode in ("RGB", "RGBA", "L", "LA", "P", "1")] + [("PNG", "P", {"transparency": 3})]
FILES += [("WEBP", mode, extra) for mode in ("RGB", "RGBA") for extra in ({}, {"lossless": True})]


@BOTH
@pytest.mark.parametrize("turn", [1, 3, 6, 7])
@pytest.mark.parametrize(("kind", "mode", "extra"), FILES)
def test_nothing_but_the_pixels_and_the_applied_orientation_is_left(
    kind: str, mode: str, extra: dict[str, Any], turn: int, preprocessing: Preprocessing
) -> None:
    data = telling(kind, mode, turn, **extra)
    assert SECRET in data
    bare, suffix = without_metadata(data, ".suffix", preprocessing)
    assert suffix == ".suffix"
    assert SECRET not in bare
    kept = decode(bare, "it")
    assert orientation(kept) == (turn if preprocessing is APPLIED else 1)
    assert "icc_profile" not in kept.info
    assert np.array_equal(np.asarray(decode(data, "it")), np.asarray(kept))
    assert np.array_equal(pixels(data, preprocessing), pixels(bare, preprocessing))
    assert without_metadata(bare, ".suffix", preprocessing)[0] == bare


@pytest.mark.parametrize("kind", ["TIFF", "GIF", "BMP", "PPM"])
def test_formats_of_data_sets_are_written_again_with_the_same_pixels(kind: str) -> None:
    image = picture("P" if kind in ("GIF", "BMP") else "RGB")
    options: dict[str, Any] = {"comment": SECRET} if kind == "GIF" else {}
    if kind == "TIFF":
        options = {"exif": telling_exif(6)}
    data = saved(image, kind, **options)
    if kind == "PPM":
        data = data.replace(b"\n", b"\n# " + SECRET + b"\n", 1)
    if kind == "BMP":
        data += SECRET
    assert SECRET in data
    bare, suffix = without_metadata(data, f".{kind.lower()}", APPLIED)
    assert suffix == f".{kind.lower()}"
    assert SECRET not in bare
    assert decode(bare, "it").format == kind
    assert np.array_equal(pixels(data, APPLIED), pixels(bare, APPLIED))


def test_the_compressed_pixels_of_a_jpeg_are_copied() -> None:
    data = telling("JPEG", "RGB", 6)
    bare, _ = without_metadata(data, ".jpg", APPLIED)
    scan = data[data.index(b"\xff\xda") :]
    assert bare.endswith(scan)
    assert len(bare) < len(data) - 500


def test_pictures_and_films_behind_a_jpeg_are_left_out() -> None:
    second = telling("JPEG", "L", 1)
    several = io.BytesIO()
    first = Image.open(io.BytesIO(telling("JPEG", "RGB", 1)))
    first.save(several, format="MPO", save_all=True, append_images=[Image.open(io.BytesIO(second))])
    data = several.getvalue() + b"\0\0\0\x18ftypmp42" + SECRET
    bare, _ = without_metadata(data, ".jpg", APPLIED)
    assert SECRET not in bare
    assert bare.count(b"\xff\xd8\xff") == 1
    assert decode(bare, "it").format == "JPEG"
    assert np.array_equal(pixels(data, APPLIED), pixels(bare, APPLIED))


def test_the_preview_in_a_jfif_header_is_left_out() -> None:
    data = saved(picture(), "JPEG")
    length = struct.unpack_from(">H", data, 4)[0]
    preview = (SECRET * 4)[:48]
    header = b"\xff\xe0" + struct.pack(">H", length + 48) + data[6:18] + b"\x04\x04" + preview
    bare, _ = without_metadata(b"\xff\xd8" + header + data[4 + length :], ".jpg", APPLIED)
    assert SECRET not in bare
    assert np.array_equal(pixels(data, APPLIED), pixels(bare, APPLIED))


def test_a_text_behind_the_end_of_a_png_and_an_orientation_behind_its_pixels() -> None:
    plain = saved(picture(), "PNG")
    exif = telling_exif(8)[6:]
    chunk = struct.pack(">I", len(exif)) + b"eXIf" + exif + struct.pack(">I", zlib.crc32(b"eXIf" + exif))
    data = plain[:-12] + chunk + plain[-12:] + SECRET
    bare, _ = without_metadata(data, ".png", APPLIED)
    assert SECRET not in bare
    assert orientation(decode(bare, "it")) == 8
    assert np.array_equal(APPLIED.pixels(decode(data, "it")), pixels(bare, APPLIED))


def test_an_animation_becomes_a_png_of_its_first_picture() -> None:
    frames = [picture(), Image.new("RGB", (63, 42), "red")]
    data = saved(frames[0], "WEBP", save_all=True, append_images=frames[1:], exif=telling_exif(1), lossless=True)
    bare, suffix = without_metadata(data, ".webp", APPLIED)
    assert (suffix, bare[:4]) == (".png", b"\x89PNG")
    assert SECRET not in bare
    assert np.array_equal(pixels(data, APPLIED), pixels(bare, APPLIED))


def test_a_file_that_is_no_image_is_an_error() -> None:
    with pytest.raises(DataError, match="not a readable image"):
        without_metadata(b"\xff\xd8\xff" + SECRET, ".jpg", APPLIED)
