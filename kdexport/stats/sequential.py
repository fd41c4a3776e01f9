"""A group-sequential test on paired log ratios of latency sessions: looks, verdicts, detectable effect.

The estimand is theta = log(median latency of the candidate / of the reference). A session is one fresh process; its
statistic is the median over its pairs of log(candidate block / reference block). Sessions are the sample: runs inside a
process share its memory layout and thread placement, so more of them do not reduce the variation between processes.

The test looks after 6, 12 and 20 sessions. At each look, with the one-sided error ``ALPHA_PER_LOOK``:

    FAIL if the lower t bound of theta > log(1 + limit),  PASS if the upper one < log(1 + limit),  else continue.

For independent, normally distributed sessions whose true ratio is exactly the limit, three looks at 0.5 % together err
in about 1.2 % of gates in either direction, and in far fewer if the true ratio is away from the limit. If consecutive
sessions are alike, the standard error is multiplied by a ``widening`` from a calibration (``dependence.py``), which
restores that rate. tests/kdexport/stats/test_sequential.py and test_dependence.py simulate both.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Verdict = Literal["PASS", "FAIL", "INCONCLUSIVE"]

LOOKS = (6, 12, 20)
ALPHA_PER_LOOK = 0.005
#: Probability of finding the minimum detectable effect at the last look.
POWER = 0.9


@dataclass(frozen=True, kw_only=True, slots=True)
class MeanInterval:
    """t interval of the mean log ratio over ``sessions``; ``deviation`` is their sample standard deviation."""

    mean: float
    low: float
    high: float
    deviation: float
    sessions: int


def session_statistic(pairs_s: ArrayLike) -> float:
    """Median log ratio of a session's pairs (P,2), columns reference and candidate block in seconds."""
    pairs = np.asarray(pairs_s, dtype=np.float64)
    if pairs.ndim != 2 or pairs.shape[1] != 2 or not len(pairs) or not (np.isfinite(pairs) & (pairs > 0)).all():
        raise ValueError(f"Pairs must be an array (P,2) of positive finite times; got shape {pairs.shape}.")
    return float(np.median(np.log(pairs[:, 1]) - np.log(pairs[:, 0])))


def t_interval(log_ratios: ArrayLike, alpha: float = ALPHA_PER_LOOK, *, widening: float = 1.0) -> MeanInterval:
    """Two one-sided bounds at ``alpha`` each from the statistics (K,) of K >= 2 sessions."""
    mean, error, deviation, count = _moments(log_ratios)
    half = _quantile(1 - alpha, count - 1) * widening * float(error)
    return MeanInterval(
        mean=float(mean), low=float(mean) - half, high=float(mean) + half, deviation=float(deviation), sessions=count
    )


def p_slower(log_ratios: ArrayLike, limit: float, *, widening: float = 1.0) -> NDArray[np.float64]:
    """One-sided p of theta <= ``limit`` against theta > ``limit``, over the last axis of (...,K)."""
    return _p_value(log_ratios, limit, widening, sign=1.0)


def p_not_slower(log_ratios: ArrayLike, limit: float, *, widening: float = 1.0) -> NDArray[np.float64]:
    """One-sided p of theta >= ``limit`` against theta < ``limit``, over the last axis of (...,K)."""
    return _p_value(log_ratios, limit, widening, sign=-1.0)


def holm(p_values: Sequence[float], alpha: float) -> list[bool]:
    """Which hypotheses Holm's procedure rejects with a family-wise error of ``alpha``: the smallest p is compared
    with alpha / m, the next with alpha / (m - 1), and so on until one is not rejected.
    """
    order = np.argsort(np.asarray(p_values, dtype=np.float64), kind="stable")
    rejected = [False] * len(p_values)
    for rank, index in enumerate(order):
        if not p_values[index] < alpha / (len(p_values) - rank):
            break
        rejected[index] = True
    return rejected


def decide(
    samples: Sequence[ArrayLike],
    limit: float,
    alpha: float = ALPHA_PER_LOOK,
    *,
    margins: Sequence[float] = (),
    widening: float = 1.0,
) -> list[Verdict]:
    """Verdicts of one look over a family of measurements, each a sample (K,) of sessions; ``limit`` is a log ratio.

    FAIL is controlled over the family by Holm's procedure, because one false FAIL anywhere fails the build. PASS needs
    no correction, because a gate passes only if every measurement does (an intersection-union test). The margin of a
    measurement, 0 by default, is a bias that the machine showed between equal arms: a FAIL must lie above the limit by
    more than the margin, and a PASS below it by more than the margin.
    """
    each = list(margins) or [0.0] * len(samples)
    pairs = list(zip(samples, each, strict=True))
    slower = holm([float(p_slower(sample, limit + margin, widening=widening)) for sample, margin in pairs], alpha)
    verdicts: list[Verdict] = []
    for (sample, margin), fails in zip(pairs, slower, strict=True):
        passes = float(p_not_slower(sample, limit - margin, widening=widening)) < alpha
        verdicts.append("FAIL" if fails else "PASS" if passes else "INCONCLUSIVE")
    return verdicts


def looks_until(max_sessions: int) -> tuple[int, ...]:
    """Session counts at which the test looks: those of ``LOOKS`` below ``max_sessions``, and ``max_sessions``."""
    return tuple(sorted({look for look in LOOKS if look < max_sessions} | {max_sessions}))


def sequential(
    log_ratios: ArrayLike,
    limit: float,
    *,
    looks: Sequence[int] = LOOKS,
    alpha: float = ALPHA_PER_LOOK,
    widening: float = 1.0,
) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """The whole test for many simulated gates at once: (R,K) log ratios to R verdicts and R counts of sessions used."""
    draws = np.asarray(log_ratios, dtype=np.float64)
    verdicts = np.full(len(draws), "INCONCLUSIVE", dtype=object)
    used = np.full(len(draws), looks[-1], dtype=np.int64)
    for look in looks:
        undecided = verdicts == "INCONCLUSIVE"
        part = draws[:, :look]
        slower, not_slower = (p(part, limit, widening=widening) for p in (p_slower, p_not_slower))
        for verdict, p_values in (("FAIL", slower), ("PASS", not_slower)):
            decided = undecided & (p_values < alpha)
            verdicts[decided], used[decided] = verdict, look
    return verdicts, used


def minimum_detectable_effect(
    deviation: float, *, sessions: int = LOOKS[-1], alpha: float = ALPHA_PER_LOOK, power: float = POWER
) -> float:
    """Log ratio above the limit that ``sessions`` sessions of this ``deviation`` detect with ``power``."""
    quantiles = _quantile(1 - alpha, sessions - 1) + _quantile(power, sessions - 1)
    return quantiles * deviation / float(np.sqrt(sessions))


def sentinel_bias(log_ratios: Sequence[float]) -> float:
    """Absolute median log ratio (K,) of sessions that time one artifact against itself; it should be below the limit.

    The gate takes one such session, and up to four more, two at a time, while the bias exceeds the limit: on a machine
    whose deviation equals the limit, a single session would reject every third measurement.
    """
    if not log_ratios:
        raise ValueError("The bias of a sentinel needs one or more sessions; got none.")
    return abs(float(np.median(np.asarray(log_ratios))))


def _moments(log_ratios: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64], int]:
    """Mean, standard error and deviation over the last axis, and its length K >= 2."""
    values = np.asarray(log_ratios, dtype=np.float64)
    count = values.shape[-1]
    if count < 2 or not np.isfinite(values).all():
        raise ValueError(f"A t interval needs two or more finite values; got {count}, or values that are not finite.")
    deviation = values.std(axis=-1, ddof=1)
    return values.mean(axis=-1), deviation / np.sqrt(count), deviation, count


def _p_value(log_ratios: ArrayLike, limit: float, widening: float, *, sign: float) -> NDArray[np.float64]:
    from scipy.special import stdtr

    mean, error, _, count = _moments(log_ratios)
    with np.errstate(divide="ignore", invalid="ignore"):
        statistic = sign * (mean - limit) / (widening * error)
    # Sessions that all lie exactly on the limit give 0 / 0: no evidence in either direction.
    return np.asarray(stdtr(count - 1, -np.nan_to_num(statistic, nan=0.0, posinf=np.inf, neginf=-np.inf)))


def _quantile(probability: float, degrees: int) -> float:
    from scipy.special import stdtrit

    return float(stdtrit(degrees, probability))
