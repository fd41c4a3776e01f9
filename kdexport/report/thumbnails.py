"""Small copies of images for a page, as data URIs, without anything of the file that they came from."""

import base64
import io
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

#: Pixels of a side; images up to this size are kept as they are.
SIDE = 96


def thumbnails(positions: Sequence[int], pixels: NDArray[np.uint8]) -> dict[int, str]:
    """Images (N,S,S,3) by their position; small ones without loss."""
    return {position: _data_uri(image) for position, image in zip(positions, pixels, strict=True)}


def _data_uri(pixels: NDArray[np.uint8]) -> str:
    from PIL import Image

    image, written = Image.fromarray(pixels), io.BytesIO()
    if max(image.size) <= SIDE:
        image.save(written, format="PNG", optimize=True)
        kind = "png"
    else:
        image.thumbnail((SIDE, SIDE))
        image.save(written, format="JPEG", quality=85)
        kind = "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(written.getvalue()).decode('ascii')}"
