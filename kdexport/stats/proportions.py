"""Exact bounds on shares and quantiles: flips, lost top-1, runs over a latency limit.

Counts are binomial, and small shares are where the normal approximation is worst: all bounds are those of Clopper and
Pearson (1934), one-sided at the stated confidence.

Exact statistics of paired predictions: how often two models differ, and which of them is right more often.

Clopper and Pearson (1934) for a proportion, McNemar (1947) in its exact binomial form for a paired difference. Nothing
here knows a model, and nothing rests on a normal approximation: the counts are small by design.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from kdexport.errors import ConfigError
from kdexport.stats.sequential import Verdict

#: One-sided confidence of accuracy bounds, and of service levels (LoadGen's early stopping uses the same).
ACCURACY_CONFIDENCE = 0.95

TAIL_CONFIDENCE = 0.99


@dataclass(frozen=True, kw_only=True, slots=True)
class Bound:
    """A measured value between its two one-sided bounds, and what follows for ``limit``."""

    value: float
    low: float
    high: float
    limit: float
    verdict: Verdict


def upper_share(count: int, trials: int, confidence: float) -> float:
    """Largest share that ``count`` of ``trials`` does not exclude."""
    from scipy.special import betaincinv

    _require_count(count, trials)
    return 1.0 if count == trials else float(betaincinv(count + 1, trials - count, confidence))


def lower_share(count: int, trials: int, confidence: float) -> float:
    """Smallest share that ``count`` of ``trials`` does not exclude."""
    return 1.0 - upper_share(trials - count, trials, confidence)


def bounded_share(count: int, trials: int, limit: float, confidence: float) -> Bound:
    """Is a share at most ``limit``? PASS if its upper bound is, FAIL if its lower bound is not."""
    low, high = lower_share(count, trials, confidence), upper_share(count, trials, confidence)
    return Bound(value=count / trials, low=low, high=high, limit=limit, verdict=_verdict(low, high, limit))


def trials_needed(limit: float, confidence: float) -> int:
    """Trials without a single event that prove a share of at most ``limit``: 459 for 1 % at 99 %."""
    return math.ceil(math.log1p(-confidence) / math.log1p(-limit))


def drop_trials_needed(limit: float, confidence: float = ACCURACY_CONFIDENCE) -> int:
    """Images without a single change that prove a drop of at most ``limit`` by the bound of ``top1_drop``."""
    return trials_needed(limit, _each(confidence))


def _each(confidence: float) -> float:
    """The confidence of each of two bounds of which one may err."""
    return 1 - (1 - confidence) / 2


def top1_drop(lost: int, gained: int, images: int, limit: float, confidence: float = ACCURACY_CONFIDENCE) -> Bound:
    """Does top-1 fall by at most ``limit``? ``lost`` images only the reference has right, ``gained`` the candidate.

    Both are multinomial counts of one sample. The bound of their difference takes each at half the error, so that it
    holds whatever their correlation and also where no image changed at all.
    """
    _require_count(lost + gained, images)
    each = _each(confidence)
    low = lower_share(lost, images, each) - upper_share(gained, images, each)
    high = upper_share(lost, images, each) - lower_share(gained, images, each)
    return Bound(value=(lost - gained) / images, low=low, high=high, limit=limit, verdict=_verdict(low, high, limit))


def quantile_bounds(
    times: ArrayLike, quantile: float, confidence: float = TAIL_CONFIDENCE
) -> tuple[float, float, float | None]:
    """(estimate, lower bound, upper bound) of a quantile of (N,) times, by order statistics of any distribution.

    The upper bound is None where N runs cannot give one: a p99 needs 459 at 99 %.
    """
    from scipy.special import bdtr

    values = np.sort(np.asarray(times, dtype=np.float64))
    count = len(values)
    if not count or not np.isfinite(values).all():
        raise ValueError("quantiles need finite times")
    # The k-th smallest (from 1) exceeds the quantile unless at least k of N lie below it: P = bdtr(k - 1, N, q).
    below = bdtr(np.arange(count), count, quantile)
    above = np.flatnonzero(below >= confidence)
    under = np.flatnonzero(1 - below >= confidence)
    estimate = float(values[min(count - 1, math.ceil(quantile * count) - 1)])
    low = float(values[under[-1]]) if len(under) else 0.0
    return estimate, low, float(values[above[0]]) if len(above) else None


def _verdict(low: float, high: float, limit: float) -> Verdict:
    return "PASS" if high <= limit else "FAIL" if low > limit else "INCONCLUSIVE"


def _require_count(count: int, trials: int) -> None:
    if not 0 <= count <= trials or trials < 1:
        raise ValueError(f"{count} of {trials} is no share")


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
