"""The drop of top-1 between two models on the same images: an exact test against a limit, its interval and its power.

Of N images, ``lost`` are right in the reference alone and ``gained`` in the candidate alone; the drop is the difference
of their rates. Its test statistic is the score of Tango (Statistics in Medicine 17:891, 1998). The p-value is exact: it
is the largest probability of a score at least as large, over every rate of gained images that the data do not exclude,
plus the probability that they exclude the true one (Berger and Boos, JASA 89:1012, 1994). With a limit of zero it is an
unconditional form of McNemar's test. Conditional tests use only ``lost + gained`` images and cannot test another limit.
"""

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from kdexport.stats.proportions import ACCURACY_CONFIDENCE, Estimate, lower_bound, require_count, upper_bound

#: Probability of finding a rate or drop that is called detectable.
DETECTION_POWER = 0.9

#: Probability that the rate of gained images lies outside of the range over which the p-value is maximised.
_EXCLUDED = 1e-4
#: Rates of gained images at which the p-value is computed.
_RATES = 48
#: Counts of gained images beyond these quantiles are counted as exceeding the score.
_NEGLECTED = 1e-9
_BISECTIONS = 20


def p_drop_within(lost: int, gained: int, images: int, limit: float) -> float:
    """Exact p-value of a drop of at most ``limit`` (-1 < limit < 1) against a larger one; at most 1."""
    require_count(lost + gained, images)
    score = float(_score(np.asarray([lost]), np.asarray([gained]), images, limit)[0])
    low = lower_bound(gained, images, 1 - _EXCLUDED / 2)
    high = upper_bound(gained, images, 1 - _EXCLUDED / 2)
    least, most = max(0.0, -limit), (1 - limit) / 2
    rates = np.clip(np.linspace(math.sqrt(low), math.sqrt(high), _RATES) ** 2, least, most)
    counts = _gained_counts(rates, images)
    needed = _lost_needed(counts, images, limit, score)
    return min(1.0, _EXCLUDED + _largest_tail(rates, counts, needed, images, limit))


def estimate_drop(lost: int, gained: int, images: int, confidence: float = ACCURACY_CONFIDENCE) -> Estimate:
    """The drop of top-1 with one-sided bounds: the limits that the exact test does not reject at ``confidence``.

    Each bound errs with probability at most 1 - ``confidence``, also if no image changed: zero differences in ten
    images do not prove equality.
    """
    require_count(lost + gained, images)
    return Estimate(
        value=(lost - gained) / images,
        low=_low(lost, gained, images, confidence),
        high=-_low(gained, lost, images, confidence),
    )


@lru_cache(maxsize=1024)
def detectable_drop(
    limit: float, images: int, confidence: float = ACCURACY_CONFIDENCE, power: float = DETECTION_POWER
) -> float | None:
    """The smallest drop that ``images`` images without a gained one show to be above ``limit`` with probability
    ``power``; None if none can be shown.
    """
    fewest = _fewest(images, lambda lost: p_drop_within(lost, 0, images, limit) <= 1 - confidence)
    return None if fewest is None else upper_bound(fewest - 1, images, power)


@lru_cache(maxsize=1024)
def detectable_proportion(
    limit: float, trials: int, confidence: float = ACCURACY_CONFIDENCE, power: float = DETECTION_POWER
) -> float | None:
    """The smallest proportion that ``trials`` show to be above ``limit`` with probability ``power``, None if none."""
    fewest = _fewest(trials, lambda count: lower_bound(count, trials, confidence) > limit)
    return None if fewest is None else upper_bound(fewest - 1, trials, power)


@lru_cache(maxsize=256)
def drop_trials_needed(limit: float, confidence: float = ACCURACY_CONFIDENCE) -> int:
    """The number of images that prove a drop of at most ``limit`` > 0 by ``estimate_drop`` if none of them changes."""

    def shown(images: int) -> bool:
        return p_drop_within(0, 0, images, -limit) <= 1 - confidence

    most = 1
    while not shown(most):
        most *= 2
    fewest = _fewest(most, shown)
    assert fewest is not None
    return fewest


def _fewest(most: int, holds: Callable[[int], bool]) -> int | None:
    """The smallest count from 1 to ``most`` from which on ``holds``; None if it does not hold for ``most``."""
    if not holds(most):
        return None
    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def _low(lost: int, gained: int, images: int, confidence: float) -> float:
    """The largest drop below the measured one that the test rejects; -1 if it rejects none."""
    value, error = (lost - gained) / images, 1 - confidence
    low, high = -1.0, value
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        rejected = p_drop_within(lost, gained, images, middle) <= error
        low, high = (middle, high) if rejected else (low, middle)
    return low


def _score(lost: NDArray[np.integer], gained: NDArray[np.integer], images: int, limit: float) -> NDArray[np.float64]:
    """Tango's score of a drop above ``limit``; 0 if the counts say nothing (none, against a limit of 0)."""
    both, difference = (lost + gained).astype(np.float64), (lost - gained).astype(np.float64)
    slope = both + (difference - 2 * images) * limit
    # The most likely rate of gained images if the drop is exactly the limit.
    rate = (slope + np.sqrt(np.maximum(slope**2 + 8 * images * gained * limit * (1 - limit), 0))) / (4 * images)
    variance = images * (2 * np.maximum(rate, max(0.0, -limit)) + limit * (1 - limit))
    excess = difference - images * limit
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(variance > 0, excess / np.sqrt(variance), np.where(excess == 0, 0.0, np.inf * np.sign(excess)))


def _gained_counts(rates: NDArray[np.float64], images: int) -> NDArray[np.int64]:
    """The counts of gained images that are likely at one of ``rates``."""
    counts = np.arange(images + 1)
    least, most = float(rates.min()), float(rates.max())
    likely = (_at_least(counts, images, most) > _NEGLECTED) & (_at_least(counts + 1, images, least) < 1 - _NEGLECTED)
    return counts[likely]


def _lost_needed(gained: NDArray[np.int64], images: int, limit: float, score: float) -> NDArray[np.int64]:
    """For each count of gained images the fewest lost ones whose score is at least ``score``; images + 1 if none is."""
    low, high = np.full_like(gained, -1), images - gained + 1
    # Equal scores must count as equal although they are computed from other counts.
    least = score - 1e-9 * max(1.0, abs(score)) if math.isfinite(score) else score
    while (high - low > 1).any():
        middle = (low + high) // 2
        reached = _score(np.maximum(middle, 0), gained, images, limit) >= least
        open_ = high - low > 1
        high, low = np.where(open_ & reached, middle, high), np.where(open_ & ~reached, middle, low)
    return np.where(high > images - gained, images + 1, high)


def _largest_tail(
    rates: NDArray[np.float64], gained: NDArray[np.int64], needed: NDArray[np.int64], images: int, limit: float
) -> float:
    """The largest probability, over ``rates`` of gained images, of ``needed`` lost images if the drop is ``limit``."""
    from scipy.special import gammaln, xlog1py, xlogy

    rate = rates[:, None]
    ways = gammaln(images + 1) - gammaln(gained + 1) - gammaln(images - gained + 1)
    each = np.exp(ways + xlogy(gained, rate) + xlog1py(images - gained, -rate))
    share = np.clip((rate + limit) / np.maximum(1 - rate, 1e-300), 0, 1)
    return float((each * _at_least(needed, images - gained, share)).sum(axis=1).max()) + 2 * _NEGLECTED


def _at_least(
    count: NDArray[np.int64], trials: NDArray[np.int64] | int, rate: NDArray[np.float64] | float
) -> NDArray[np.float64]:
    """Probability of ``count`` or more events in ``trials``."""
    from scipy.special import betainc

    reachable = np.minimum(np.maximum(count, 1), trials)
    tail = betainc(np.maximum(reachable, 1), np.maximum(trials - reachable + 1, 1), rate)
    return np.where(count <= 0, 1.0, np.where(count > trials, 0.0, tail))
