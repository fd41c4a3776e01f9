"""Exact bounds on proportions and quantiles: flips, lost top-1 accuracy, runs above a latency limit.

Counts are binomial, and the normal approximation is worst for small proportions, which are the usual case here. All
bounds on proportions are those of Clopper and Pearson (1934), one-sided at the stated confidence; two models on the
same images are compared by McNemar's test (1947) in its exact binomial form.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from kdexport.stats.sequential import Verdict

#: One-sided confidence of bounds on accuracy.
ACCURACY_CONFIDENCE = 0.95

#: One-sided confidence of bounds on tail latencies; the early stopping of MLPerf's LoadGen uses the same.
TAIL_CONFIDENCE = 0.99


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """A measured proportion, or a difference of two, between a lower and an upper bound."""

    value: float
    low: float
    high: float

    def verdict(self, limit: float) -> Verdict:
        """Is the true value at most ``limit``? PASS if the upper bound is, FAIL if the lower bound is not."""
        if self.high <= limit:
            return "PASS"
        # Negated, so that a bound that is not a number fails.
        return "FAIL" if not self.low <= limit else "INCONCLUSIVE"


def upper_bound(count: int, trials: int, confidence: float) -> float:
    """The largest proportion that ``count`` events in ``trials`` do not exclude."""
    from scipy.special import betaincinv

    require_count(count, trials)
    return 1.0 if count == trials else float(betaincinv(count + 1, trials - count, confidence))


def lower_bound(count: int, trials: int, confidence: float) -> float:
    """The smallest proportion that ``count`` events in ``trials`` do not exclude."""
    require_count(count, trials)
    return 1.0 - upper_bound(trials - count, trials, confidence)


def estimate_proportion(count: int, trials: int, confidence: float) -> Estimate:
    """The proportion of ``count`` events in ``trials``. Each bound errs with probability at most 1 - ``confidence``,
    so the two together with at most twice that.
    """
    low, high = lower_bound(count, trials, confidence), upper_bound(count, trials, confidence)
    return Estimate(value=count / trials, low=low, high=high)


def mcnemar_p_value(lost: int, gained: int) -> float:
    """Two-sided p-value of McNemar's exact test that ``lost`` and ``gained`` images are equally likely."""
    from scipy import stats

    return float(stats.binomtest(lost, lost + gained, 0.5).pvalue) if lost + gained else 1.0


def binomial_p_value(count: int, trials: int) -> float:
    """One-sided p-value of ``count`` or more events in ``trials`` if an event and its absence are equally likely."""
    from scipy import stats

    return float(stats.binomtest(count, trials, 0.5, alternative="greater").pvalue) if trials else 1.0


def trials_needed(limit: float, confidence: float) -> int:
    """The number of trials that prove a proportion of at most ``limit`` if none of them has an event: 459 for 1 % at
    99 %.
    """
    return math.ceil(math.log1p(-confidence) / math.log1p(-limit))


def quantile_bounds(
    times: ArrayLike, quantile: float, confidence: float = TAIL_CONFIDENCE
) -> tuple[float, float, float | None]:
    """(estimate, lower bound, upper bound) of a quantile of (N,) times; valid for any distribution (order statistics).

    The upper bound is None if N runs are too few to give one: a p99 needs 459 at 99 %.
    """
    from scipy.special import bdtr

    values = np.sort(np.asarray(times, dtype=np.float64))
    count = len(values)
    if not count or not np.isfinite(values).all():
        raise ValueError(f"A quantile needs one or more finite times; got {count}, not all of them finite.")
    # The k-th smallest (from 1) exceeds the quantile unless at least k of N lie below it: P = bdtr(k - 1, N, q).
    below = bdtr(np.arange(count), count, quantile)
    above = np.flatnonzero(below >= confidence)
    under = np.flatnonzero(1 - below >= confidence)
    estimate = float(values[min(count - 1, math.ceil(quantile * count) - 1)])
    low = float(values[under[-1]]) if len(under) else 0.0
    return estimate, low, float(values[above[0]]) if len(above) else None


def require_count(count: int, trials: int) -> None:
    """Raise ``ValueError`` unless ``trials`` is at least 1 and ``count`` lies between 0 and it."""
    if trials < 1 or not 0 <= count <= trials:
        raise ValueError(f"A count must lie between 0 and the number of trials (1 or more); got {count} of {trials}.")
