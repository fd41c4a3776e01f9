"""The exact statistics against binomial tails summed by hand in rational arithmetic, and against scipy's own tests."""

import math
from fractions import Fraction

import numpy as np
import pytest
from scipy import stats

from kdexport.stats.proportions import estimate_drop, estimate_proportion, mcnemar_p_value, trials_needed


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
    found = estimate_drop(lost, gained, 400)
    fewer = min(lost, gained)
    expected = min(1.0, 2 * sum(math.comb(lost + gained, k) for k in range(fewer + 1)) / 2 ** (lost + gained))
    assert mcnemar_p_value(lost, gained) == pytest.approx(expected)
    assert found.value == (lost - gained) / 400
    assert found.low < found.value < found.high


def test_no_difference_in_few_images_is_no_proof_of_equality() -> None:
    few, many = estimate_drop(0, 0, 10), estimate_drop(0, 0, 10_000)
    assert few.high == pytest.approx(1 - 0.025 ** (1 / 10))
    assert few.low == -few.high
    assert many.high < 0.001


@pytest.mark.parametrize("truth", [(0.03, 0.01), (0.004, 0.004), (0.0, 0.02)])
def test_each_bound_of_the_drop_is_wrong_no_more_often_than_asked(truth: tuple[float, float]) -> None:
    lost, gained = truth
    rng = np.random.default_rng(5)
    counts, repeats = np.unique(
        rng.multinomial(250, [lost, gained, 1 - lost - gained], size=1500), axis=0, return_counts=True
    )
    found = [estimate_drop(int(a), int(b), 250) for a, b, _ in counts]
    above = sum(n for interval, n in zip(found, repeats, strict=True) if interval.high < lost - gained)
    below = sum(n for interval, n in zip(found, repeats, strict=True) if interval.low > lost - gained)
    # Three standard deviations of 1500 draws at 5 % are 1.7 points.
    assert above / 1500 < 0.067
    assert below / 1500 < 0.067


def test_the_interval_of_a_loss_is_the_gain_mirrored() -> None:
    one, other = estimate_drop(12, 5, 300, 0.98), estimate_drop(5, 12, 300, 0.98)
    assert (one.low, one.high) == pytest.approx((-other.high, -other.low))
