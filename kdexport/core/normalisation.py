"""The arithmetic of the normalisation, in float32 and in one place: training, serving and exported graphs share it."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def normalise_pixels(pixels: NDArray[np.uint8], mean: Sequence[float], std: Sequence[float]) -> NDArray[np.float32]:
    """(N,H,W,3) uint8 to (N,3,H,W) float32: divided by 255, less ``mean``, divided by ``std``, each of 3 channels."""
    scaled = pixels.astype(np.float32) / np.float32(255)
    centred = (scaled - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)
    return np.ascontiguousarray(centred.transpose(0, 3, 1, 2))
