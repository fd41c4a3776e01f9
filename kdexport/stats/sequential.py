"""The gate's statistics, with no model in them: paired log ratios of sessions, looks, verdicts, resolution.

The estimand is theta = log(median latency of the candidate / of the reference). A session is one fresh process; its
statistic is the median over its pairs of log(candidate block / reference block). Sessions are the sample: runs inside a
process share its memory layout and thread placement, so more of them do not narrow what differs between processes.

The test looks after 6, 12 and 20 sessions. At each look, with the one-sided error ``ALPHA_PER_LOOK``:

    FAIL if the lower t bound of theta > log(1 + limit),  PASS if the upper one < log(1 + limit),  else go on.

The union of three looks at 0.5 % errs in about 1.2 % of gates for normal sessions whose true ratio lies exactly on the
limit, in either direction, and far more rarely away from it; tests/kdexport/stats/test_sequential.py simulates it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Verdict = Literal["PASS", "FAIL", "INCONCLUSIVE"]

LOOKS = (6, 12, 20)
ALPHA_PER_LOOK = 0.005
#: With which the minimum detectable effect is found at the last look.
POWER = 0.9


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """t interval of the mean log ratio over ``sessions``; ``deviation`` is the sample deviation between them."""

    mean: float
    low: float
    high: float
    deviation: float
    sessions: int


def session_statistic(pairs_s: ArrayLike) -> float:
    """Median log ratio of a session's pairs (P,2), columns reference and candidate block in seconds."""
    pairs = np.asarray(pairs_s, dtype=np.float64)
    if pairs.ndim != 2 or pairs.shape[1] != 2 or not len(pairs) or not (np.isfinite(pairs) & (pairs > 0)).all():
        raise ValueError("pairs are a (P,2) table of positive times")
    return float(np.median(np.log(pairs[:, 1]) - np.log(pairs[:, 0])))


def t_interval(log_ratios: ArrayLike, alpha: float = ALPHA_PER_LOOK) -> Interval:
    """Two one-sided bounds at ``alpha`` each from the statistics (K,) of K >= 2 sessions."""
    mean, error, deviation, count = _moments(log_ratios)
    half = _quantile(1 - alpha, count - 1) * float(error)
    return Interval(
        mean=float(mean), low=float(mean) - half, high=float(mean) + half, deviation=float(deviation), sessions=count
    )


def p_slower(log_ratios: ArrayLike, limit: float) -> NDArray[np.float64]:
    """One-sided p of theta <= ``limit`` against theta > ``limit``, over the last axis of (...,K)."""
    return _p_value(log_ratios, limit, sign=1.0)


def p_not_slower(log_ratios: ArrayLike, limit: float) -> NDArray[np.float64]:
    """One-sided p of theta >= ``limit`` against theta < ``limit``, over the last axis of (...,K)."""
    return _p_value(log_ratios, limit, sign=-1.0)


def holm(p_values: Sequence[float], alpha: float) -> list[bool]:
    """Which hypotheses Holm's procedure rejects with a family-wise error of ``alpha``: the smallest p is held to
    alpha / m, the next to alpha / (m - 1), and so on until one is not rejected.
    """
    order = np.argsort(np.asarray(p_values, dtype=np.float64), kind="stable")
    rejected = [False] * len(p_values)
    for rank, index in enumerate(order):
        if not p_values[index] < alpha / (len(p_values) - rank):
            break
        rejected[index] = True
    return rejected


def decide(
    samples: Sequence[ArrayLike], limit: float, alpha: float = ALPHA_PER_LOOK, *, margins: Sequence[float] = ()
) -> list[Verdict]:
    """Verdicts of one look over a family of numbers, each a sample (K,) of sessions; ``limit`` is a log ratio.

    FAIL is controlled over the family by Holm: one false FAIL anywhere fails the build. PASS needs no correction,
    because a gate passes only if every number does (an intersection-union test). A margin per number, 0 where none is
    given, is a bias that the machine showed between equal arms: FAIL and PASS must hold in spite of it.
    """
    each = list(margins) or [0.0] * len(samples)
    pairs = list(zip(samples, each, strict=True))
    slower = holm([float(p_slower(sample, limit + margin)) for sample, margin in pairs], alpha)
    verdicts: list[Verdict] = []
    for (sample, margin), fails in zip(pairs, slower, strict=True):
        passes = float(p_not_slower(sample, limit - margin)) < alpha
        verdicts.append("FAIL" if fails else "PASS" if passes else "INCONCLUSIVE")
    return verdicts


def looks_until(max_sessions: int) -> tuple[int, ...]:
    """When the test looks: at ``LOOKS`` below ``max_sessions`` and at ``max_sessions``."""
    return tuple(sorted({look for look in LOOKS if look < max_sessions} | {max_sessions}))


def sequential(
    log_ratios: ArrayLike, limit: float, *, looks: Sequence[int] = LOOKS, alpha: float = ALPHA_PER_LOOK
) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """The whole test over many gates at once: (R,K) sessions drawn beforehand to R verdicts and sessions used."""
    draws = np.asarray(log_ratios, dtype=np.float64)
    verdicts = np.full(len(draws), "INCONCLUSIVE", dtype=object)
    used = np.full(len(draws), looks[-1], dtype=np.int64)
    for look in looks:
        undecided = verdicts == "INCONCLUSIVE"
        part = draws[:, :look]
        for word, p_values in (("FAIL", p_slower(part, limit)), ("PASS", p_not_slower(part, limit))):
            decided = undecided & (p_values < alpha)
            verdicts[decided], used[decided] = word, look
    return verdicts, used


def minimum_detectable_effect(
    deviation: float, *, sessions: int = LOOKS[-1], alpha: float = ALPHA_PER_LOOK, power: float = POWER
) -> float:
    """Log ratio above the limit that ``sessions`` find with ``power``, given the ``deviation`` between sessions."""
    quantiles = _quantile(1 - alpha, sessions - 1) + _quantile(power, sessions - 1)
    return quantiles * deviation / float(np.sqrt(sessions))


def sentinel_bias(log_ratios: Sequence[float]) -> float:
    """What sessions of one artifact against itself see: the absolute median log ratio. It should be below the limit.

    The gate takes one session, and two and again two more where it is not: on a machine whose deviation is as large as
    the limit, a single one would call every third measurement invalid.
    """
    if not log_ratios:
        raise ValueError("a sentinel needs at least one session")
    return abs(float(np.median(np.asarray(log_ratios))))


def _moments(log_ratios: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64], int]:
    """Mean, standard error and deviation over the last axis, and its length K >= 2."""
    values = np.asarray(log_ratios, dtype=np.float64)
    count = values.shape[-1]
    if count < 2 or not np.isfinite(values).all():
        raise ValueError("a t interval needs two or more finite values")
    deviation = values.std(axis=-1, ddof=1)
    return values.mean(axis=-1), deviation / np.sqrt(count), deviation, count


def _p_value(log_ratios: ArrayLike, limit: float, *, sign: float) -> NDArray[np.float64]:
    from scipy.special import stdtr

    mean, error, _, count = _moments(log_ratios)
    with np.errstate(divide="ignore", invalid="ignore"):
        statistic = sign * (mean - limit) / error
    # Sessions without any spread that lie exactly on the limit say nothing in either direction.
    return np.asarray(stdtr(count - 1, -np.nan_to_num(statistic, nan=0.0, posinf=np.inf, neginf=-np.inf)))


def _quantile(probability: float, degrees: int) -> float:
    from scipy.special import stdtrit

    return float(stdtrit(degrees, probability))
