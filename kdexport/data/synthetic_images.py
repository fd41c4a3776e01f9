"""Images that are computed, for bundles that must not hold photos: tiles and gradients in the colours of a data set."""

import numpy as np
from numpy.typing import NDArray

from kdexport.data.preprocessing import Preprocessing
from kdexport.data.uploads import ImageLimits

#: As many as a bundle has golden images of a validation set by default would make files of several megabytes.
SYNTHETIC_IMAGES = 32
_SEED = 20


def synthetic_images(preprocessing: Preprocessing, count: int = SYNTHETIC_IMAGES) -> NDArray[np.uint8]:
    """``count`` different images (N,H,W,3), the same on every machine, larger than the input and not square.

    Colours are drawn around the mean that ``preprocessing`` subtracts with the deviation by which it divides.
    """
    from PIL import Image

    rng = np.random.default_rng(_SEED)
    height = max(preprocessing.resize * 5 // 4, ImageLimits().min_side)
    width = height * 6 // 5
    mean, deviation = (np.array(values) for values in (preprocessing.mean, preprocessing.std))
    made = []
    for index in range(count):
        rows, columns = (int(number) for number in rng.integers(2, 13, 2))
        colours = mean + deviation * rng.standard_normal((rows, columns, 3))
        coarse = Image.fromarray(np.rint(np.clip(colours, 0, 1) * 255).astype(np.uint8))
        # Tiles have hard edges, gradients have none.
        how = Image.Resampling.NEAREST if index % 2 else Image.Resampling.BILINEAR
        made.append(np.asarray(coarse.resize((width, height), how)))
    return np.stack(made)
