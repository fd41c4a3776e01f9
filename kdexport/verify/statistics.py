"""Exact statistics of paired predictions: how often two models differ, and which of them is right more often.

Clopper and Pearson (1934) for a proportion, McNemar (1947) in its exact binomial form for a paired difference. Nothing
here knows a model, and nothing rests on a normal approximation: the counts are small by design.
"""

import math
from dataclasses import dataclass

from kdexport.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Interval:
    """A closed interval of a proportion or of a difference of two."""

    low: float
    high: float


@dataclass(frozen=True, kw_only=True, slots=True)
class PairedAccuracy:
    """Two models on the same ``total`` images: ``lost`` are right in the reference alone, ``won`` in the subject alone.

    ``drop`` is the accuracy lost, (lost - won) / total, ``interval`` holds it with at least the asked confidence, and
    ``p_value`` is McNemar's exact two-sided one.
    """

    total: int
    lost: int
    won: int
    drop: float
    interval: Interval
    p_value: float


def proportion_interval(count: int, total: int, *, error: float) -> Interval:
    """Clopper-Pearson: each bound is passed with probability at most ``error``, so together at most twice that."""
    from scipy import stats

    _require_counts(count, total)
    low = 0.0 if count == 0 else float(stats.beta.ppf(error, count, total - count + 1))
    high = 1.0 if count == total else float(stats.beta.ppf(1 - error, count + 1, total - count))
    return Interval(low, high)


def paired_accuracy(lost: int, won: int, total: int, *, error: float) -> PairedAccuracy:
    """Compare two models by the images that only one of them gets right; each bound errs with at most ``error``.

    The drop is q * (2 p - 1): q is the share of images that one model alone gets right, p the share of those that the
    subject loses. Each has an exact interval at half the error; their worst corner bounds the drop. Conditional
    intervals, which take q as known, would call zero differences in ten images a proof of equality.
    """
    from scipy import stats

    discordant = lost + won
    _require_counts(discordant, total)
    rate = proportion_interval(discordant, total, error=error / 2)
    if discordant:
        share = proportion_interval(lost, discordant, error=error / 2)
        p_value = float(stats.binomtest(lost, discordant, 0.5).pvalue)
    else:
        share, p_value = Interval(0.0, 1.0), 1.0
    low, high = 2 * share.low - 1, 2 * share.high - 1
    return PairedAccuracy(
        total=total,
        lost=lost,
        won=won,
        drop=(lost - won) / total,
        interval=Interval(low * (rate.high if low < 0 else rate.low), high * (rate.high if high > 0 else rate.low)),
        p_value=p_value,
    )


def images_to_show(rate: float, *, error: float) -> int:
    """How many images without a single event show that the rate is at most ``rate``."""
    return math.ceil(math.log(error) / math.log1p(-rate)) if 0 < rate < 1 else 0


def _require_counts(count: int, total: int) -> None:
    if not 0 <= count <= total or total < 1:
        raise ConfigError(f"{count} of {total} images is no proportion.", remedy="Verify on at least one image.")
