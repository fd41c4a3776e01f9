import re

import numpy as np
import pytest
from scipy import stats

from kdexport.stats.proportions import (
    Estimate,
    drop_trials_needed,
    estimate_drop,
    estimate_proportion,
    lower_bound,
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
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        estimate_drop(count, 0, trials)


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


def test_top1_bounds_cover_the_true_drop() -> None:
    rng = np.random.default_rng(4)
    images, lost, gained = 400, 0.03, 0.01
    draws = rng.multinomial(images, [lost, gained, 1 - lost - gained], size=1500)
    found = [estimate_drop(int(a), int(b), images, 0.95) for a, b, _ in draws]
    assert np.mean([bound.high < lost - gained for bound in found]) <= 0.05
    assert np.mean([bound.low > lost - gained for bound in found]) <= 0.05
    # On the limit neither verdict may come more often than its error.
    assert np.mean([bound.verdict(0.02) == "PASS" for bound in found]) <= 0.05
    assert np.mean([bound.verdict(0.02) == "FAIL" for bound in found]) <= 0.05


def test_few_images_without_a_change_prove_no_small_drop() -> None:
    assert estimate_drop(0, 0, 64).verdict(0.001) == "INCONCLUSIVE"
    assert estimate_drop(0, 0, 64).verdict(0.2) == "PASS"
    assert estimate_drop(0, 0, 20_000).verdict(0.001) == "PASS"
    assert estimate_drop(30, 2, 1000).verdict(0.001) == "FAIL"
    assert estimate_drop(2, 30, 1000).verdict(0.001) == "PASS"


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


@pytest.mark.parametrize(("limit", "confidence"), [(0.001, 0.95), (0.013, 0.9), (0.2, 0.99)])
def test_so_many_unchanged_images_prove_a_drop_and_one_less_does_not(limit: float, confidence: float) -> None:
    needed = drop_trials_needed(limit, confidence)
    assert estimate_drop(0, 0, needed, confidence).verdict(limit) == "PASS"
    assert estimate_drop(0, 0, needed - 1, confidence).verdict(limit) == "INCONCLUSIVE"
    assert needed > trials_needed(limit, confidence)
