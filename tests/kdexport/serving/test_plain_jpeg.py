"""Plain JPEGs: what counts as one, and that simplejpeg gives Pillow's pixels or none."""

import io
import random
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from kdexport.data.preprocessing import Preprocessing, decode
from kdexport.data.uploads import FORMATS
from kdexport.errors import DataError, RequestError
from kdexport.serving import plain_jpeg as subject
from kdexport.serving.images import PixelBudget, decode_upload
from kdexport.serving.limits import Limits
from kdexport.serving.plain_jpeg import PlainJpeg, decode_plain, decoder_name, plain_jpeg
from tests.kdexport.serving.served_bundles import encoded, photo

PREPROCESSING = Preprocessing.for_new_student(
    image_size=24, resize=24, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)
)  # fmt: skip


@pytest.fixture(autouse=True)
def chosen_anew() -> Iterator[None]:
    subject._decoder.cache_clear()
    yield
    subject._decoder.cache_clear()


def samples() -> list[bytes]:
    kinds: list[dict[str, Any]] = [
        {"quality": 75}, {"quality": 95, "subsampling": 0}, {"quality": 40, "subsampling": 1, "progressive": True},
        {"quality": 60, "optimize": True}, {"subsampling": "4:1:1"}, {"restart_marker_rows": 1},
        {"comment": b"\xff\xd9" * 9}, {"progressive": True, "quality": 90},
    ]  # fmt: skip
    found = []
    for index, kind in enumerate(kinds):
        for width, height in ((24, 24), (33, 47), (17, 16)):
            image = photo(width, height, index)
            found.append(encoded(image, "JPEG", **kind))
            if "subsampling" not in kind:
                found.append(encoded(image.convert("L"), "JPEG", **kind))
    return found


def test_jpegs_of_common_programs_are_plain() -> None:
    for data in samples():
        image = Image.open(io.BytesIO(data))
        one_scan = not image.info.get("progressive", False)
        assert plain_jpeg(data) == PlainJpeg(image.width, image.height, len(image.getbands()), one_scan)


def test_a_baseline_image_whose_first_scan_has_one_channel_has_several_scans() -> None:
    data = encoded(photo(24, 24, 1), "JPEG")
    at = data.index(b"\xff\xda")
    assert data[at + 4] == 3
    plain = plain_jpeg(data[: at + 4] + b"\x01" + data[at + 5 :])
    assert plain is not None
    assert not plain.one_scan


def exif(orientation: int) -> bytes:
    block = Image.Exif()
    block[0x0112] = orientation
    return block.tobytes()


@pytest.mark.parametrize(
    "data",
    [
        b"", b"\xff\xd8", b"\xff\xd8\xff\xe0\x00\x10JFIF\x00", encoded(photo(20, 20, 1), "PNG"),
        encoded(photo(20, 20, 1), "WEBP"), encoded(photo(20, 20, 1), "JPEG", exif=exif(6)),
        encoded(photo(20, 20, 1), "JPEG", exif=exif(1)), encoded(photo(20, 20, 1).convert("CMYK"), "JPEG"),
        encoded(photo(20, 20, 1), "JPEG", icc_profile=b"x" * 100), encoded(photo(20, 20, 1), "JPEG", keep_rgb=True),
        encoded(photo(20, 20, 1), "MPO", save_all=True, append_images=[photo(20, 20, 2)]),
        encoded(photo(20, 20, 1), "JPEG")[:300],
    ],
    ids=["empty", "start", "no size", "png", "webp", "turned", "upright", "cmyk", "profile", "rgb", "two", "cut"],
)  # fmt: skip
def test_everything_else_is_not(data: bytes) -> None:
    assert plain_jpeg(data) is None


def test_a_header_of_lengths_that_lead_nowhere_ends() -> None:
    start = encoded(photo(20, 20, 1), "JPEG")[:20]
    assert plain_jpeg(start + b"\xff\xfe\x00\x02" * 100_000) is None
    assert plain_jpeg(start + b"\xff\xfe\x00\x00" * 10) is None
    assert plain_jpeg(start + b"\xff\xfe\xff\xff") is None


def pillow(data: bytes) -> Image.Image | None:
    try:
        return decode(data, "x", formats=FORMATS)
    except DataError:
        return None


def test_simplejpeg_has_the_pixels_of_pillow_or_none() -> None:
    pytest.importorskip("simplejpeg")
    assert decoder_name().startswith("simplejpeg ")
    rng, whole, equal, left = random.Random(8), samples(), 0, 0
    for data in whole:
        plain = plain_jpeg(data)
        assert plain is not None
        found, expected = decode_plain(data, plain), pillow(data)
        assert found is not None
        assert expected is not None
        assert np.array_equal(found, np.asarray(expected))
    for _ in range(6000):
        damaged = bytearray(rng.choice(whole))
        for _ in range(rng.randrange(1, 4)):
            at = rng.randrange(2, len(damaged))
            if rng.random() < 0.6:
                damaged[at] = rng.randrange(256)
            elif rng.random() < 0.5:
                del damaged[at : at + rng.randrange(1, 9)]
            else:
                damaged[at:at] = rng.randbytes(rng.randrange(1, 9))
        data = bytes(damaged)
        plain = plain_jpeg(data)
        found = None if plain is None else decode_plain(data, plain)
        if found is None:
            left += 1
            continue
        expected = pillow(data)
        assert expected is not None
        assert np.array_equal(found, np.asarray(expected))
        equal += 1
    assert equal > 500
    assert left > 500


def test_a_large_image_is_decoded_by_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    used = []
    monkeypatch.setattr("kdexport.serving.images.decode_plain", lambda data, plain: used.append(plain))
    for width, height in ((128, 128), (129, 128)):
        decode_upload(encoded(photo(width, height, 1), "JPEG"), PREPROCESSING, Limits(), PixelBudget(20_000))
    assert used == [PlainJpeg(128, 128, 3, True)]


def fake(change: int = 0, error: type[Exception] | None = None) -> Any:
    """In place of simplejpeg: Pillow's pixels plus ``change``, or an error."""

    def decode_jpeg(data: bytes, colorspace: str, **options: bool) -> Any:
        assert options == {"fastdct": False, "fastupsample": False, "strict": True}
        if error is not None and Image.open(io.BytesIO(data)).width == 60:
            raise error("text of a library at 0x7f0d98552b10")
        pixels = np.array(Image.open(io.BytesIO(data)))
        return (pixels + np.uint8(change)).reshape(*pixels.shape[:2], -1)

    return SimpleNamespace(__version__="9", decode_jpeg=decode_jpeg)


def test_a_decoder_of_other_pixels_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("kdexport.serving.plain_jpeg.importlib.import_module", lambda _: fake(change=1))
    assert decoder_name() == "Pillow"
    assert caplog.messages == ["simplejpeg decodes other pixels than Pillow, which therefore decodes all images."]


def test_without_simplejpeg_pillow_decodes(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr("kdexport.serving.plain_jpeg.importlib.import_module", missing)
    data = encoded(photo(24, 24, 1), "JPEG")
    assert (decoder_name(), decode_plain(data, PlainJpeg(24, 24, 3, True))) == ("Pillow", None)
    pixels = decode_upload(data, PREPROCESSING, Limits(), PixelBudget(10_000))
    assert np.array_equal(pixels, np.asarray(Image.open(io.BytesIO(data))))


@pytest.mark.parametrize("error", [ValueError, RuntimeError, MemoryError])
def test_what_simplejpeg_refuses_is_decoded_or_explained_by_pillow(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kdexport.serving.plain_jpeg.importlib.import_module", lambda _: fake(error=error))
    assert decoder_name() == "simplejpeg 9"
    budget = PixelBudget(60 * 80)
    good = encoded(photo(60, 80, 1), "JPEG", quality=95)
    assert decode_upload(good, PREPROCESSING, Limits(), budget).shape == (24, 24, 3)
    with pytest.raises(RequestError, match=r"^The upload is not a readable image: it is damaged or truncated"):
        decode_upload(good[:-2000], PREPROCESSING, Limits(), budget)
    with pytest.raises(RequestError, match=r"^The image has 60x80 pixels \(up to 4,000 allowed\)"):
        decode_upload(good, PREPROCESSING, Limits(pixels=4000), budget)
