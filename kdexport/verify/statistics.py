"""Exact statistics of paired predictions: how often two models differ, and which of them is right more often.

Clopper and Pearson (1934) for a proportion, McNemar (1947) in its exact binomial form for a paired difference. Nothing
here knows a model, and nothing rests on a normal approximation: the counts are small by design.
"""

from dataclasses import dataclass

from kdexport.errors import ConfigError
from kdexport.gate.bounds import lower_share, top1_drop, upper_share


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
    _require_counts(count, total)
    return Interval(lower_share(count, total, 1 - error), upper_share(count, total, 1 - error))


def paired_accuracy(lost: int, won: int, total: int, *, error: float) -> PairedAccuracy:
    """Compare two models by the images that only one of them gets right; each bound errs with at most ``error``.

    The interval takes both counts as unknown. A conditional one, which takes their sum as known, would call zero
    differences in ten images a proof of equality.
    """
    from scipy import stats

    discordant = lost + won
    _require_counts(discordant, total)
    bound = top1_drop(lost, won, total, limit=0.0, confidence=1 - error)
    return PairedAccuracy(
        total=total,
        lost=lost,
        won=won,
        drop=(lost - won) / total,
        interval=Interval(bound.low, bound.high),
        p_value=float(stats.binomtest(lost, discordant, 0.5).pvalue) if discordant else 1.0,
    )


def _require_counts(count: int, total: int) -> None:
    if not 0 <= count <= total or total < 1:
        raise ConfigError(f"{count} of {total} images is no proportion.", remedy="Verify on at least one image.")
