"""Graphs that take pixels: what they take, and the pixels of images that are already normalised.

Such a graph divides by 255 and normalises inside. Its metadata say so. The verification and the gate work on normalised
images; for such a graph they are turned back into the pixels that they were made of, exactly or not at all.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from kdexport.core.normalisation import normalise_pixels
from kdexport.errors import AuditError

#: What a graph takes: normalised float32 (N,3,S,S), or RGB pixels (N,S,S,3) or (N,3,S,S) uint8.
InputKind = Literal["float32", "uint8-nhwc", "uint8-nchw"]
FLOAT32: InputKind = "float32"
#: The entries of an ONNX file's metadata that say what it takes.
INPUT_KEY, _PREPROCESSING_KEY = "kdexport.input", "kdexport.preprocessing"

#: What is fed to a graph: normalised images, or pixels in the layout that it takes.
Given = NDArray[np.float32 | np.uint8]


@dataclass(frozen=True, slots=True)
class PixelInput:
    """The input of a graph that takes pixels, and the normalisation of each channel that it computes."""

    kind: InputKind
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def given(self, images: Given) -> NDArray[np.uint8]:
        """What the graph takes for ``images``: pixels in its own layout as they are, or normalised (N,3,S,S) float32.

        Raises ``AuditError`` if normalised images are not exactly those of pixels.
        """
        if images.dtype == np.uint8:
            return np.ascontiguousarray(images, np.uint8)
        return arrange(self._pixels(images), self.kind)

    def _pixels(self, images: Given) -> NDArray[np.uint8]:
        """(N,3,S,S) float32 to the pixels (N,S,S,3) of which it is the normalisation."""
        channels_last = images.transpose(0, 2, 3, 1).astype(np.float64)
        levels = np.rint((channels_last * np.asarray(self.std) + np.asarray(self.mean)) * 255)
        pixels: NDArray[np.uint8] = np.nan_to_num(levels).clip(0, 255).astype(np.uint8)
        if not np.array_equal(normalise_pixels(pixels, self.mean, self.std), images):
            raise AuditError(
                "The graph takes pixels, and the images given are not pixels normalised with the mean and standard "
                "deviation in its metadata.",
                remedy="Build the bundle again; run the graph on the pixels of an image.",
            )
        return pixels


def pixel_input(metadata: Mapping[str, str]) -> PixelInput | None:
    """What an ONNX file takes by its metadata_props; None for normalised float32.

    Raises ``AuditError`` if the metadata name another kind or lack the normalisation.
    """
    if INPUT_KEY not in metadata:
        return None
    try:
        kind, preprocessing = (json.loads(metadata[key]) for key in (INPUT_KEY, _PREPROCESSING_KEY))
        if kind not in ("uint8-nhwc", "uint8-nchw"):
            raise ValueError(kind)
        mean, std = (tuple(float(value) for value in preprocessing[key]) for key in ("mean", "std"))
    except (KeyError, TypeError, ValueError) as error:
        raise AuditError(
            f"The metadata of the file do not say which pixels it takes ({type(error).__name__}).",
            remedy="The file is damaged; build the bundle again.",
        ) from error
    return PixelInput(kind, mean, std)


def arrange(pixels: NDArray[np.uint8], kind: InputKind) -> NDArray[np.uint8]:
    """Pixels (N,S,S,3) in the layout that a graph of ``kind`` takes."""
    return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2) if kind == "uint8-nchw" else pixels)


def image_shape(kind: InputKind, size: int) -> tuple[int, int, int]:
    """The shape of one image of side ``size`` as a graph of ``kind`` takes it."""
    return (size, size, 3) if kind == "uint8-nhwc" else (3, size, size)
