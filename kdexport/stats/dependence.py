"""The dependence of consecutive sessions, estimated by blocks, and what it does to an interval of their mean.

A t interval takes its sessions to be independent. If consecutive sessions are alike, for example because the machine
drifts, the mean of a block of them varies more than their spread inside the block suggests, and the interval is too
narrow. One-way analysis of variance measures exactly that: F is the variance of block means over the variance that
the spread inside of the blocks predicts, and the interval must be wider by sqrt(F). F is 1 for independent sessions;
no model of the dependence is assumed.
"""

import math

import numpy as np
from numpy.typing import ArrayLike

#: Sessions of a block: as many as a gate has at its first look.
BLOCK = 6

#: One-sided confidence of the upper bound on F.
CONFIDENCE = 0.9

#: The largest result: blocks without any spread inside would give an infinite one.
MOST = 100.0


def lag_correlation(values: ArrayLike) -> float:
    """Correlation of consecutive values (K,), K >= 3, in the order in which they were measured; 0 if all are equal."""
    series = np.asarray(values, dtype=np.float64)
    if series.ndim != 1 or len(series) < 3 or not np.isfinite(series).all():
        raise ValueError(f"A lag correlation needs three or more finite values; got shape {series.shape}.")
    centred = series - series.mean()
    total = float((centred**2).sum())
    return float((centred[1:] * centred[:-1]).sum()) / total if total else 0.0


def widening(values: ArrayLike, block: int = BLOCK, confidence: float = CONFIDENCE) -> float:
    """How much wider the t interval of ``block`` consecutive sessions must be than that of independent ones.

    ``values`` (K,) are in the order in which they were measured; the last K modulo ``block`` of them are not used. The
    result is the square root of the upper bound of F at ``confidence``, so few blocks give a large one; it is at least
    1 and at most ``MOST``.
    """
    from scipy.stats import f

    series = np.asarray(values, dtype=np.float64)
    count = len(series) // block
    if series.ndim != 1 or count < 2 or not np.isfinite(series).all():
        raise ValueError(f"The widening needs two or more blocks of {block} finite values; got shape {series.shape}.")
    blocks = series[: count * block].reshape(count, block)
    within = float(blocks.var(axis=1, ddof=1).mean())
    between = block * float(blocks.mean(axis=1).var(ddof=1))
    if within == 0:
        return 1.0 if between == 0 else MOST
    smallest = float(f.ppf(1 - confidence, count - 1, count * (block - 1)))
    return min(MOST, math.sqrt(max(1.0, between / within / smallest)))
