import numpy as np
import pytest
from scipy import stats

from kdexport.stats.proportions import (
    bounded_share,
    drop_trials_needed,
    lower_share,
    quantile_bounds,
    top1_drop,
    trials_needed,
    upper_share,
)


@pytest.mark.parametrize(("count", "trials"), [(0, 1), (0, 3000), (1, 10), (5, 5), (37, 10_000), (499, 500)])
@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
def test_bounds_are_clopper_and_pearson(count: int, trials: int, confidence: float) -> None:
    two_sided = stats.binomtest(count, trials).proportion_ci(2 * confidence - 1, method="exact")
    assert lower_share(count, trials, confidence) == pytest.approx(two_sided.low, abs=1e-12)
    assert upper_share(count, trials, confidence) == pytest.approx(two_sided.high, abs=1e-12)


@pytest.mark.parametrize(("count", "trials"), [(-1, 5), (6, 5), (0, 0)])
def test_what_is_no_share_is_refused(count: int, trials: int) -> None:
    with pytest.raises(ValueError, match="is no share"):
        upper_share(count, trials, 0.95)


def test_the_runs_that_prove_a_p99_are_those_of_the_literature() -> None:
    assert trials_needed(0.01, 0.99) == 459
    assert trials_needed(0.01, 0.95) == 299
    for limit, confidence in ((0.01, 0.99), (0.001, 0.95)):
        needed = trials_needed(limit, confidence)
        assert upper_share(0, needed, confidence) <= limit < upper_share(0, needed - 1, confidence)


def test_a_share_has_three_verdicts() -> None:
    assert bounded_share(0, 459, 0.01, 0.99).verdict == "PASS"
    assert bounded_share(0, 458, 0.01, 0.99).verdict == "INCONCLUSIVE"
    assert bounded_share(40, 500, 0.01, 0.99).verdict == "FAIL"
    found = bounded_share(3, 100, 0.2, 0.95)
    assert found.low < found.value == 0.03 < found.high < found.limit


def test_top1_bounds_cover_the_true_drop() -> None:
    rng = np.random.default_rng(4)
    images, lost, gained = 400, 0.03, 0.01
    draws = rng.multinomial(images, [lost, gained, 1 - lost - gained], size=1500)
    found = [top1_drop(int(a), int(b), images, 0.02, confidence=0.95) for a, b, _ in draws]
    assert np.mean([bound.high < lost - gained for bound in found]) <= 0.05
    assert np.mean([bound.low > lost - gained for bound in found]) <= 0.05
    # On the limit neither verdict may come more often than its error.
    assert np.mean([bound.verdict == "PASS" for bound in found]) <= 0.05
    assert np.mean([bound.verdict == "FAIL" for bound in found]) <= 0.05


def test_few_images_without_a_change_prove_no_small_drop() -> None:
    assert top1_drop(0, 0, 64, 0.001).verdict == "INCONCLUSIVE"
    assert top1_drop(0, 0, 64, 0.2).verdict == "PASS"
    assert top1_drop(0, 0, 20_000, 0.001).verdict == "PASS"
    assert top1_drop(30, 2, 1000, 0.001).verdict == "FAIL"
    assert top1_drop(2, 30, 1000, 0.001).verdict == "PASS"


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
    assert top1_drop(0, 0, needed, limit, confidence).verdict == "PASS"
    assert top1_drop(0, 0, needed - 1, limit, confidence).verdict == "INCONCLUSIVE"
    assert needed > trials_needed(limit, confidence)
