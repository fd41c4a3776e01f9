from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from kdexport.errors import DataError
from kdexport.inference.given_images import given_images

PIXELS = np.random.default_rng(1).integers(0, 256, (9, 12, 3), np.uint8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "deep").mkdir()
    for name in ("b.png", "a.PNG", "deep/c.png"):
        Image.fromarray(PIXELS).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "phone.heic").write_bytes(b"not read")
    return tmp_path


def test_a_folder_gives_its_images_by_path_and_those_that_cannot_be_read(folder: Path) -> None:
    found = list(given_images(str(folder)))
    assert [Path(item.source).relative_to(folder).as_posix() for item in found] == [
        "a.PNG", "b.png", "deep/c.png", "phone.heic",
    ]  # fmt: skip
    assert np.array_equal(np.asarray(found[0].open()), PIXELS)
    with pytest.raises(DataError, match=r"phone\.heic"):
        found[3].open()


def test_everything_that_is_an_image_is_opened_with_the_same_pixels(folder: Path) -> None:
    given: list[Any] = [folder / "b.png", str(folder / "b.png"), PIXELS, Image.fromarray(PIXELS)]
    given.append(Image.open(folder / "b.png"))
    found = list(given_images(given))
    assert all(np.array_equal(np.asarray(item.open()), PIXELS) for item in found)
    assert [item.source for item in found[2:4]] == ["image 2", "image 3"]
    assert found[4].source.endswith("b.png")
    for single in given:
        assert len(list(given_images(single))) == 1


def test_grey_pixels_and_slices_of_arrays_are_images() -> None:
    grey, sliced = given_images([PIXELS[:, :, 0], PIXELS[::2, ::-1]])
    assert grey.open().mode == "L"
    assert np.array_equal(np.asarray(sliced.open()), PIXELS[::2, ::-1])


@pytest.mark.parametrize(
    "array",
    [
        PIXELS.astype(np.float32) / 255, PIXELS[np.newaxis], PIXELS.transpose(2, 0, 1), PIXELS.astype(np.int64),
        np.zeros((0, 5, 3), np.uint8), np.zeros((5, 5, 4), np.uint8), np.zeros(5, np.uint8),
    ],
)  # fmt: skip
def test_an_array_that_is_no_image_is_refused_with_its_shape_and_type(array: np.ndarray) -> None:
    (item,) = given_images(array)
    with pytest.raises(DataError) as caught:
        item.open()
    assert str(array.shape) in caught.value.message
    assert str(array.dtype) in caught.value.message


@pytest.mark.parametrize("wrong", [7, None, {"a": 1}, [b"bytes"], [7]])
def test_what_is_no_image_is_named_by_its_type(wrong: Any) -> None:
    with pytest.raises(DataError, match=r"is a \w+, not an image|cannot be read"):
        _ = [item.open() for item in given_images(wrong)]


def test_missing_files_and_empty_folders_are_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="contains no image"):
        list(given_images(tmp_path))
    (item,) = given_images(tmp_path / "nothing.png")
    with pytest.raises(DataError, match=r"nothing\.png"):
        item.open()
    (tmp_path / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (item,) = given_images(tmp_path / "cut.png")
    with pytest.raises(DataError, match=r"cut\.png is not a readable image"):
        item.open()
