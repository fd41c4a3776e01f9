"""A part of a resized image, without the rest of it: the pixels that Pillow's ``resize`` gives there, bit for bit.

Pillow resizes from a box too, but keeps its edges in single precision and starts at it, so that its pixels differ from
those of the whole image. The arithmetic here is that of Pillow: one axis after the other, each with weights in double
precision that are rounded to 22 bits and a sum that is rounded to 8 (``src/libImaging/Resample.c`` of Pillow 11 to 13).
"""

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL import Image

Interpolation = Literal["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"]
#: Left, top, right and bottom edge in pixels.
Box = tuple[int, int, int, int]

_Values = NDArray[np.floating[Any]]
#: Fractional bits of a weight.
_BITS = 22
#: Pixels of the source that are resized together, and positions that are computed together.
_BLOCK = 2**20
#: A whole image is resized, which is faster, if no image on the way has more pixels than this, or than ...
_WHOLE = 2**20
#: ... this many times the result.
_WHOLE_PARTS = 4


class _Axis(NamedTuple):
    """Per result pixel of one axis: the first source pixel, and the weights of it and those after it in 2^-22."""

    starts: list[int]
    weights: list[NDArray[np.int64]]

    @property
    def first(self) -> int:
        """The first source pixel that any result needs."""
        return min(self.starts)

    @property
    def end(self) -> int:
        """One past the last source pixel that any result needs."""
        return max(start + len(weights) for start, weights in zip(self.starts, self.weights, strict=True))


def resized_part(
    image: "Image.Image", size: tuple[int, int], box: Box, interpolation: Interpolation
) -> NDArray[np.uint8]:
    """``image.resize(size).crop(box)`` as (H,W) or (H,W,3) uint8; ``image`` is L or RGB, ``box`` within ``size``.

    Memory is bounded by a few times the larger of source and result, however large ``size`` is.
    """
    from PIL import Image

    if image.size == size:
        return np.asarray(image.crop(box), dtype=np.uint8)
    result = (box[2] - box[0]) * (box[3] - box[1])
    if rows_first(image.size, size):
        largest = size[1] * max(size[0], image.width)
    else:
        largest = size[0] * max(size[1], image.height)
    if largest <= max(_WHOLE, _WHOLE_PARTS * result):
        whole = image.resize(size, Image.Resampling[interpolation.upper()])
        return np.asarray(whole.crop(box), dtype=np.uint8)
    return exact_part(image, size, box, interpolation)


def rows_first(source: tuple[int, int], target: tuple[int, int]) -> bool:
    """Whether Pillow resizes the height before the width. The order changes pixels, as each step rounds to 8 bits.

    Pillow 13 does so if the height shrinks by more than twice the pixels by which the width does, earlier ones never.
    """
    import PIL

    shrinks_by = source[1] - target[1]
    return int(PIL.__version__.partition(".")[0]) >= 13 and shrinks_by > max(2 * (source[0] - target[0]), 0)


def exact_part(
    image: "Image.Image", size: tuple[int, int], box: Box, interpolation: Interpolation
) -> NDArray[np.uint8]:
    """The same as ``resized_part``, always without the whole; slower if the whole is not much larger."""
    from PIL import Image

    left, top, right, bottom = box
    if interpolation == "nearest":
        columns = _nearest(image.width, size[0], left, right)
        rows = _nearest(image.height, size[1], top, bottom)
        source = _pixels(image, (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1))
        part = source[np.subtract(rows, rows[0])][:, np.subtract(columns, columns[0])]
        return np.ascontiguousarray(part)
    if rows_first(image.size, size):
        turned = image.transpose(Image.Transpose.TRANSPOSE)
        return np.ascontiguousarray(
            _columns_first(turned, size[::-1], (top, left, bottom, right), interpolation).swapaxes(0, 1)
        )
    return _columns_first(image, size, box, interpolation)


def _columns_first(
    image: "Image.Image", size: tuple[int, int], box: Box, interpolation: Interpolation
) -> NDArray[np.uint8]:
    left, top, right, bottom = box
    across = _axis(image.width, size[0], range(left, right), interpolation)
    down = _axis(image.height, size[1], range(top, bottom), interpolation)
    channels = len(image.getbands())
    total = np.full((bottom - top, right - left, channels), 1 << (_BITS - 1), np.int64)
    for start, block in _blocks(image, across, down):
        for place, weights in enumerate(down.weights):
            low = max(down.starts[place], start)
            high = min(down.starts[place] + len(weights), start + len(block))
            if low < high:
                own = weights[low - down.starts[place] : high - down.starts[place]]
                total[place] += np.tensordot(own, block[low - start : high - start].astype(np.int64), axes=1)
    part = _rounded(total)
    return part[:, :, 0] if channels == 1 else part


def _blocks(image: "Image.Image", across: _Axis, down: _Axis) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """The needed rows of the source at the width of the result, a block at a time, each with its first row."""
    width = max(across.end - across.first, len(across.starts))
    height = max(_BLOCK // width, 1)
    for start in range(down.first, down.end, height):
        end = min(start + height, down.end)
        source = _pixels(image, (across.first, start, across.end, end)).astype(np.int64)
        source = source.reshape(*source.shape[:2], -1)
        block = np.empty((end - start, len(across.starts), source.shape[2]), np.int64)
        for place, (first, weights) in enumerate(zip(across.starts, across.weights, strict=True)):
            begin = first - across.first
            taps = source[:, begin : begin + len(weights)]
            block[:, place] = np.tensordot(taps, weights, axes=(1, 0))
        block += 1 << (_BITS - 1)
        yield start, _rounded(block)


def _pixels(image: "Image.Image", box: Box) -> NDArray[np.uint8]:
    return np.asarray(image.crop(box), dtype=np.uint8)


def _rounded(total: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Pixels from sums, which are overwritten: a copy of a large block would be most of the memory."""
    total >>= _BITS
    return np.clip(total, 0, 255, out=total).astype(np.uint8)


def _axis(source: int, target: int, places: range, interpolation: Interpolation) -> _Axis:
    """The weights of the results ``places`` of one axis of ``source`` pixels, resized to ``target``."""
    if source == target:
        return _Axis(list(places), [np.array([1 << _BITS], np.int64)] * len(places))
    kernel, radius = _KERNELS[interpolation]
    scale = source / target
    stretch = max(scale, 1.0)
    support = radius * stretch
    axis = _Axis([], [])
    for place in places:
        centre = (place + 0.5) * scale
        first = max(int(centre - support + 0.5), 0)
        end = min(int(centre + support + 0.5), source)
        values = kernel((np.arange(first, end) - centre + 0.5) * (1.0 / stretch))
        # Pillow adds one by one, numpy's sum in pairs.
        values = values / np.cumsum(values)[-1]
        axis.starts.append(first)
        axis.weights.append(np.trunc(values * (1 << _BITS) + np.copysign(0.5, values)).astype(np.int64))
    return axis


def _nearest(source: int, target: int, first: int, end: int) -> list[int]:
    """The source pixels of the results ``first`` to ``end``. Pillow adds the step up, which rounds at each result."""
    step = source / target
    position, done, found = step * 0.5, 0, []
    while done < end:
        count = min(_BLOCK, end - done)
        positions = np.cumsum(np.concatenate(([position], np.full(count, step))))
        found += [int(value) for value in positions[max(first - done, 0) : count]]
        position, done = float(positions[-1]), done + count
    return [min(value, source - 1) for value in found]


def _box(x: _Values) -> _Values:
    return np.where((x > -0.5) & (x <= 0.5), 1.0, 0.0)


def _bilinear(x: _Values) -> _Values:
    return np.maximum(1.0 - np.abs(x), 0.0)


def _sinc(x: _Values) -> _Values:
    angle = np.where(x == 0, 1.0, x * math.pi)
    return np.where(x == 0, 1.0, np.sin(angle) / angle)


def _hamming(x: _Values) -> _Values:
    # Pillow has these two numbers in single precision.
    low, high = float(np.float32(0.54)), float(np.float32(0.46))
    return np.where(np.abs(x) < 1, _sinc(x) * (low + high * np.cos(x * math.pi)), 0.0)


def _bicubic(x: _Values) -> _Values:
    a, x = -0.5, np.abs(x)
    near = ((a + 2.0) * x - (a + 3.0)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def _lanczos(x: _Values) -> _Values:
    return np.where((x >= -3) & (x < 3), _sinc(x) * _sinc(x / 3), 0.0)


#: The kernel of each interpolation and its radius in source pixels.
_KERNELS: dict[str, tuple[Callable[[_Values], _Values], float]] = {
    "box": (_box, 0.5),
    "bilinear": (_bilinear, 1.0),
    "hamming": (_hamming, 1.0),
    "bicubic": (_bicubic, 2.0),
    "lanczos": (_lanczos, 3.0),
}
