"""Exact bounds of proportions against binomial tails in rational arithmetic and against scipy."""

import math
import re
from fractions import Fraction

import numpy as np
import pytest
from scipy import stats

from kdexport.stats.proportions import (
    Estimate,
    estimate_proportion,
    lower_bound,
    mcnemar_p_value,
    quantile_bounds,
    trials_needed,
    upper_bound,
)


@pytest.mark.parametrize(("count", "trials"), [(0, 1), (0, 3000), (1, 10), (5, 5), (37, 10_000), (499, 500)])
@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
def test_bounds_are_clopper_and_pearson(count: int, trials: int, confidence: float) -> None:
    two_sided = stats.binomtest(count, trials).proportion_ci(2 * confidence - 1, method="exact")
    assert lower_bound(count, trials, confidence) == pytest.approx(two_sided.low, abs=1e-12)
    assert upper_bound(count, trials, confidence) == pytest.approx(two_sided.high, abs=1e-12)


@pytest.mark.parametrize(("count", "trials"), [(-1, 5), (6, 5), (2, 1), (0, 0)])
def test_a_count_outside_of_its_trials_is_refused(count: int, trials: int) -> None:
    message = f"A count must lie between 0 and the number of trials (1 or more); got {count} of {trials}."
    for refuse in (upper_bound, lower_bound, estimate_proportion):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            refuse(count, trials, 0.95)


def test_the_runs_that_prove_a_p99_are_those_of_the_literature() -> None:
    assert trials_needed(0.01, 0.99) == 459
    assert trials_needed(0.01, 0.95) == 299
    for limit, confidence in ((0.01, 0.99), (0.001, 0.95)):
        needed = trials_needed(limit, confidence)
        assert upper_bound(0, needed, confidence) <= limit < upper_bound(0, needed - 1, confidence)


def test_a_proportion_has_three_verdicts() -> None:
    assert estimate_proportion(0, 459, 0.99).verdict(0.01) == "PASS"
    assert estimate_proportion(0, 458, 0.99).verdict(0.01) == "INCONCLUSIVE"
    assert estimate_proportion(40, 500, 0.99).verdict(0.01) == "FAIL"
    found = estimate_proportion(3, 100, 0.95)
    assert found.low < found.value == 0.03 < found.high < 0.2


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 0.1, "PASS"),
        (0, 0.11, "INCONCLUSIVE"),
        (0.1, 0.2, "INCONCLUSIVE"),
        (0.11, 0.2, "FAIL"),
        (float("nan"), 1, "FAIL"),
    ],
)
def test_a_verdict_on_the_limit_passes_and_one_without_a_number_never_does(
    low: float, high: float, expected: str
) -> None:
    assert Estimate(value=0.1, low=low, high=high).verdict(0.1) == expected


def test_quantile_bounds_hold_for_a_skewed_distribution_as_often_as_they_state() -> None:
    rng = np.random.default_rng(8)
    true = stats.lognorm(1.5).ppf(0.99)
    above = below = 0
    for _ in range(1000):
        _, low, high = quantile_bounds(rng.lognormal(0, 1.5, 600), 0.99, confidence=0.95)
        below += low > true
        above += high is not None and high < true
    assert 0 < below <= 70
    assert 0 < above <= 70


def test_a_p99_of_too_few_runs_has_no_upper_bound() -> None:
    assert quantile_bounds(np.arange(1.0, 459.0), 0.99)[2] is None
    estimate, low, high = quantile_bounds(np.arange(1.0, 460.0), 0.99)
    assert high == 459.0
    assert low < estimate == 455.0
    assert quantile_bounds([7.0], 0.5) == (7.0, 0.0, None)
    with pytest.raises(ValueError, match="finite"):
        quantile_bounds([1.0, float("nan")], 0.99)


def tail(count: int, total: int, rate: float, *, upper: bool) -> float:
    """P(X >= count) or P(X <= count) of a binomial, in exact fractions."""
    p = Fraction(rate)
    terms = range(count, total + 1) if upper else range(count + 1)
    return float(sum(math.comb(total, k) * p**k * (1 - p) ** (total - k) for k in terms))


@pytest.mark.parametrize(("count", "total"), [(0, 1), (1, 1), (1, 7), (3, 60), (59, 60), (60, 60)])
@pytest.mark.parametrize("error", [0.05, 0.005])
def test_each_bound_is_the_rate_at_which_the_count_has_the_asked_tail(count: int, total: int, error: float) -> None:
    found = estimate_proportion(count, total, 1 - error)
    assert found.low == 0 if count == 0 else tail(count, total, found.low, upper=True) == pytest.approx(error, rel=1e-9)
    assert (
        found.high == 1
        if count == total
        else tail(count, total, found.high, upper=False) == pytest.approx(error, rel=1e-9)
    )
    theirs = stats.binomtest(count, total).proportion_ci(confidence_level=1 - 2 * error, method="exact")
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high), rel=1e-6)


@pytest.mark.parametrize(("total", "published"), [(3000, 0.001), (10_000, 0.0003)])
def test_no_flip_in_n_images_bounds_the_rate_by_the_rule_of_three(total: int, published: float) -> None:
    high = estimate_proportion(0, total, 0.95).high
    assert high == pytest.approx(1 - 0.05 ** (1 / total), rel=1e-9)
    assert high == pytest.approx(published, rel=0.01)
    assert trials_needed(high * (1 + 1e-6), 0.95) == total
    assert trials_needed(high * (1 - 1e-6), 0.95) == total + 1


@pytest.mark.parametrize(("lost", "gained"), [(0, 0), (1, 0), (0, 9), (7, 7), (30, 11)])
def test_mcnemar_is_the_exact_sign_test(lost: int, gained: int) -> None:
    fewer = min(lost, gained)
    expected = min(1.0, 2 * sum(math.comb(lost + gained, k) for k in range(fewer + 1)) / 2 ** (lost + gained))
    assert mcnemar_p_value(lost, gained) == pytest.approx(expected)
