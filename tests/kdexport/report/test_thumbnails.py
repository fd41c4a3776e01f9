import base64
import io

import numpy as np
from PIL import Image

from kdexport.report.thumbnails import SIDE, thumbnails


def opened(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(";base64,")[2])))


def test_a_small_image_is_kept_without_loss_and_a_large_one_is_made_small() -> None:
    rng = np.random.default_rng(0)
    for side, kind in ((17, "PNG"), (224, "JPEG")):
        pixels = rng.integers(0, 256, (2, side, side, 3), np.uint8)
        found = thumbnails([9, 4], pixels)
        assert list(found) == [9, 4]
        image = opened(found[4])
        assert image.format == kind
        assert image.size == (min(side, SIDE),) * 2
        assert not image.getexif()
        if kind == "PNG":
            assert (np.asarray(image) == pixels[1]).all()
