"""What a user classifies: files, folders, opened images and arrays, one after the other, each with a name."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from kdexport.data.datasets import image_files
from kdexport.data.preprocessing import read_image
from kdexport.errors import DataError, KdexportError

if TYPE_CHECKING:
    from PIL import Image

#: A file, a folder, an image of Pillow, or uint8 pixels (H,W,3) or (H,W).
OneImage: TypeAlias = "str | Path | Image.Image | NDArray[np.uint8]"
Images: TypeAlias = "OneImage | Iterable[OneImage]"


@dataclass(frozen=True, slots=True)
class GivenImage:
    """The name of an image, and how to open it; opening raises ``DataError``."""

    source: str
    open: "Callable[[], Image.Image]"


def given_images(images: Images) -> Iterator[GivenImage]:
    """Every image of ``images`` in order, those of a folder sorted by path; nothing is opened yet.

    Raises ``DataError`` for a path that does not exist, a folder without images, and anything that is not an image.
    """
    for index, item in enumerate(_listed(images)):
        if isinstance(item, str | Path):
            yield from _files(Path(item))
        else:
            name = str(getattr(item, "filename", "") or f"image {index}")
            yield GivenImage(name, _opener(item, name))


def _listed(images: Images) -> Iterable[Any]:
    from PIL import Image

    single = isinstance(images, str | Path | Image.Image | np.ndarray)
    if single or not isinstance(images, Iterable):
        return [images]
    return images


def _files(path: Path) -> Iterator[GivenImage]:
    if not path.is_dir():
        yield GivenImage(str(path), lambda: read_image(path))
        return
    found = image_files(path)
    if not found:
        raise DataError(f"{path} contains no image.", remedy="Pass a folder with images, or the files themselves.")
    for file in found:
        yield GivenImage(str(file), lambda file=file: read_image(file))  # type: ignore[misc]


def _opener(item: Any, name: str) -> "Callable[[], Image.Image]":
    from PIL import Image

    if isinstance(item, Image.Image):
        return lambda: _loaded(item, name)
    if isinstance(item, np.ndarray):
        return lambda: _from_array(item, name)
    raise DataError(
        f"{name} is a {type(item).__name__}, not an image.",
        remedy="Pass a path, an image of Pillow, or an array of pixels (H,W,3) or (H,W) in uint8.",
    )


def _loaded(image: "Image.Image", name: str) -> "Image.Image":
    try:
        image.load()
    except KdexportError:
        raise
    # Pillow's decoders raise many kinds of error; each means the same to the user.
    except Exception as error:
        raise DataError(
            f"{name} is not a readable image ({type(error).__name__}).", remedy="Open it again, or pass its path."
        ) from error
    return image


def _from_array(pixels: NDArray[Any], name: str) -> "Image.Image":
    from PIL import Image

    is_colour = pixels.ndim == 3 and pixels.shape[-1] == 3
    if pixels.dtype != np.uint8 or not (is_colour or pixels.ndim == 2) or 0 in pixels.shape:
        raise DataError(
            f"{name} is an array of shape {pixels.shape} and type {pixels.dtype}.",
            remedy="Pass pixels (H,W,3) in RGB or (H,W) in grey, as uint8 from 0 to 255, without normalisation.",
        )
    return Image.fromarray(np.ascontiguousarray(pixels))
