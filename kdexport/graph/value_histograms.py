"""The values of a tensor over many images as a histogram of constant size, and ranges that leave out rare values.

The bins lie evenly around zero. When a value lies beyond them, neighbours are merged and the range doubles, so that one
image with values a thousand times as large costs resolution, and neither time nor memory.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

#: A multiple of four, so that merged neighbours lie around zero again.
BINS = 16384
#: Bins and levels of the search by entropy, on both sides of zero. Migacz (8-bit Inference with TensorRT, 2017) has
#: 2048 bins of absolute values; where most values are near zero, such fine ones cut off too much.
_COARSE, _LEVELS = 512, 128
#: Bins by which the threshold grows in that search.
_STEP = 2
#: The part of all values that a bin counts at least, where the quantized distribution has none.
_LEAST = 1e-9


@dataclass(frozen=True, slots=True, eq=False)
class Histogram:
    """Values counted in ``BINS`` bins from ``-end`` to ``end``, and their extremes.

    Once a value was not finite, an extreme is not finite, and nothing more is counted.
    """

    counts: NDArray[np.int64]
    end: float
    low: float
    high: float


EMPTY = Histogram(counts=np.zeros(BINS, np.int64), end=0.0, low=np.inf, high=-np.inf)


def with_values(own: Histogram, values: NDArray[np.floating[Any]]) -> Histogram:
    """``own`` with the values of an array of any shape."""
    if values.size == 0:
        return own
    low, high = float(values.min()), float(values.max())
    # NaN is neither the smaller nor the larger one.
    extremes = replace(own, low=float(np.minimum(own.low, low)), high=float(np.maximum(own.high, high)))
    if not np.isfinite([low, high]).all():
        return extremes
    wide = _reaching(extremes, max(abs(low), abs(high)))
    counts = wide.counts.copy()
    if wide.end == 0:
        counts[BINS // 2] += values.size
        return replace(wide, counts=counts)
    places = ((values.reshape(-1).astype(np.float64) + wide.end) * (BINS / (2 * wide.end))).astype(np.int32)
    counts += np.bincount(np.minimum(places, BINS - 1), minlength=BINS)
    return replace(wide, counts=counts)


def _reaching(own: Histogram, reach: float) -> Histogram:
    """``own`` with bins up to ``reach`` at least."""
    if own.end == 0:
        # Zeros lie in the middle of any range.
        return replace(own, end=reach)
    counts, end = own.counts, own.end
    while end < reach:
        counts, end = np.pad(counts.reshape(-1, 2).sum(1), BINS // 4), 2 * end
    return replace(own, counts=counts, end=end)


def without_tails(own: Histogram, percentile: float) -> tuple[float, float]:
    """The range that has ``percentile`` % of the values, half of the others on each side, up to the width of a bin."""
    if not np.isfinite([own.low, own.high]).all():
        return own.low, own.high
    beyond = 0.5 * (1 - percentile / 100) * int(own.counts.sum())
    edges = np.linspace(-own.end, own.end, BINS + 1)
    below = int(np.searchsorted(np.cumsum(own.counts), beyond, side="right"))
    above = int(np.searchsorted(np.cumsum(own.counts[::-1]), beyond, side="right"))
    low, high = edges[min(below, BINS)], edges[BINS - min(above, BINS)]
    return max(float(low), own.low), min(float(high), own.high)


def least_entropy(own: Histogram) -> tuple[float, float]:
    """The range whose levels keep the distribution of the values best, by KL divergence, with values beyond it at its
    ends.
    """
    if not np.isfinite([own.low, own.high]).all() or own.end == 0:
        return own.low, own.high
    counts = own.counts.reshape(_COARSE, -1).sum(1)
    halves = np.arange(_LEVELS // 2, _COARSE // 2 + 1, _STEP)
    divergences = [_divergence(counts, int(half)) for half in halves]
    threshold = own.end * float(halves[int(np.argmin(divergences))]) / (_COARSE // 2)
    return max(-threshold, own.low), min(threshold, own.high)


def _divergence(counts: NDArray[np.int64], half: int) -> float:
    """KL divergence of values cut off ``half`` bins from zero from those that ``_LEVELS`` levels make of the values
    inside.
    """
    middle = len(counts) // 2
    inside = counts[middle - half : middle + half].astype(np.float64)
    cut = inside.copy()
    cut[0] += counts[: middle - half].sum()
    cut[-1] += counts[middle + half :].sum()
    levels = np.arange(len(inside)) * _LEVELS // len(inside)
    filled = inside > 0
    per_bin = np.bincount(levels, inside) / np.maximum(np.bincount(levels, filled), 1)
    quantized = np.where(filled, per_bin[levels], 0.0)
    if not quantized.sum() > 0:
        return float("inf")
    p, q = cut / cut.sum(), np.maximum(quantized / quantized.sum(), _LEAST)
    return float(np.sum(p[p > 0] * np.log(p[p > 0] / q[p > 0])))
