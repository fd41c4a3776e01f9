import math

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from kdexport.stats.sequential import (
    ALPHA_PER_LOOK,
    LOOKS,
    decide,
    holm,
    looks_until,
    minimum_detectable_effect,
    p_not_slower,
    p_slower,
    sentinel_bias,
    sequential,
    session_statistic,
    t_interval,
)

LIMIT = math.log(1.02)
#: Log ratios of one model against itself in 35 fresh processes, in thousandths: two cores, load average 5 to 9.
MEASURED = np.asarray([
    20.6, 24.9, -30.6, -38.8, 0.0, -3.6, 29.5, 56.3, 27.6, 52.8, 11.8, -22.1, -4.8, 17.0,
    -17.8, 4.8, -1.6, 27.3, -10.1, 2.4, 13.4, -12.3, 8.5, 9.5, -66.0, -18.5, -15.7, 28.6,
    -44.9, -2.7, 33.1, -22.4, 9.4, -9.1, -42.1,
]) / 1000  # fmt: skip


def draws(noise: str, count: int, sd: float) -> NDArray[np.float64]:
    """(count,20) sessions of mean 0 and deviation ``sd``."""
    rng = np.random.default_rng(20240208)
    shape = (count, LOOKS[-1])
    if noise == "normal":
        return sd * rng.standard_normal(shape)
    if noise == "t3":
        # Student's t with 3 degrees of freedom has a variance of 3.
        return sd * rng.standard_t(3, shape) / math.sqrt(3)
    # Which of two equal arms is called the candidate is a coin flip.
    drawn: NDArray[np.float64] = rng.choice(MEASURED, shape) * rng.choice([-1.0, 1.0], shape)
    return drawn * (sd / math.sqrt(float(np.mean(MEASURED**2))))


def shares(noise: str, effect: float, sd: float, count: int = 10_000) -> dict[str, float]:
    verdicts, _ = sequential(effect + draws(noise, count, sd), LIMIT)
    return {word: float(np.mean(verdicts == word)) for word in ("PASS", "FAIL", "INCONCLUSIVE")}


@pytest.mark.parametrize("count", [2, 3, 6, 20])
def test_the_interval_is_the_t_interval(count: int) -> None:
    ratios = np.random.default_rng(count).normal(0.03, 0.02, count)
    found = t_interval(ratios)
    low, high = stats.t.interval(0.99, count - 1, loc=ratios.mean(), scale=stats.sem(ratios))
    assert (found.low, found.high) == pytest.approx((low, high))
    assert (found.mean, found.deviation) == pytest.approx((ratios.mean(), np.std(ratios, ddof=1)))
    assert found.sessions == count


@pytest.mark.parametrize("limit", [-0.05, 0.0, 0.02])
def test_p_values_are_those_of_the_one_sided_t_test(limit: float) -> None:
    ratios = np.random.default_rng(7).normal(0.01, 0.03, (5, 12))
    slower = stats.ttest_1samp(ratios, limit, axis=1, alternative="greater").pvalue
    faster = stats.ttest_1samp(ratios, limit, axis=1, alternative="less").pvalue
    np.testing.assert_allclose(p_slower(ratios, limit), slower, rtol=1e-9)
    np.testing.assert_allclose(p_not_slower(ratios, limit), faster, rtol=1e-9)


def test_sessions_without_spread_decide_unless_they_lie_on_the_limit() -> None:
    assert decide([np.full(6, 0.5)], 0.02) == ["FAIL"]
    assert decide([np.full(6, -0.5)], 0.02) == ["PASS"]
    assert decide([np.full(6, 0.25)], 0.25) == ["INCONCLUSIVE"]


@pytest.mark.parametrize("noise", ["normal", "t3", "resampled"])
@pytest.mark.parametrize("sd", [0.003, 0.02, 0.06])
def test_a_ratio_on_the_limit_is_misjudged_as_rarely_as_is_claimed(noise: str, sd: float) -> None:
    found = shares(noise, LIMIT, sd)
    # 1.2 % is claimed: four standard errors of 10 000 gates are 0.4 %.
    assert found["FAIL"] <= 0.016
    assert found["PASS"] <= 0.016
    # Three looks of 0.5 % each: an error that never occurred would mean that the test cannot decide.
    assert found["FAIL"] + found["PASS"] > 0.004


@pytest.mark.parametrize("noise", ["normal", "t3", "resampled"])
@pytest.mark.parametrize("sd", [0.003, 0.01, 0.02])
def test_equal_arms_never_fail(noise: str, sd: float) -> None:
    # One-sided 95 % bound of 0 in 10 000 is 0.03 %.
    assert shares(noise, 0.0, sd)["FAIL"] <= 0.0002


def test_equal_arms_of_a_very_noisy_machine_still_fail_in_less_than_one_of_a_hundred() -> None:
    for noise in ("normal", "t3", "resampled"):
        assert shares(noise, 0.0, 0.2)["FAIL"] < 0.01


@pytest.mark.parametrize(("sd", "effect", "least"), [(0.02, 0.05, 0.97), (0.02, 0.10, 0.999), (0.01, 0.03, 0.88)])
def test_true_slowdowns_are_found(sd: float, effect: float, least: float) -> None:
    assert shares("normal", math.log1p(effect), sd)["FAIL"] >= least


def test_a_calm_runner_decides_at_the_first_look() -> None:
    verdicts, used = sequential(draws("normal", 2000, 0.003), LIMIT)
    assert (verdicts == "PASS").mean() > 0.999
    assert (used == 6).mean() > 0.99


def test_the_whole_test_agrees_with_its_looks_one_by_one() -> None:
    table = LIMIT + draws("t3", 300, 0.02) + np.linspace(-0.03, 0.03, 300)[:, None]
    verdicts, used = sequential(table, LIMIT)
    assert len(set(verdicts)) == 3
    for row, verdict, count in zip(table, verdicts, used, strict=True):
        for look in LOOKS:
            (found,) = decide([row[:look]], LIMIT)
            if found != "INCONCLUSIVE" or look == LOOKS[-1]:
                assert (found, look) == (verdict, count)
                break


def test_a_verdict_is_the_interval_beside_the_limit() -> None:
    rng = np.random.default_rng(5)
    for _ in range(200):
        sample = rng.normal(LIMIT, 0.01, 6) + rng.normal(0, 0.02)
        interval, (verdict,) = t_interval(sample), decide([sample], LIMIT)
        expected = "FAIL" if interval.low > LIMIT else "PASS" if interval.high < LIMIT else "INCONCLUSIVE"
        assert verdict == expected


def test_the_detectable_effect_is_found_with_the_power_it_states() -> None:
    effect = minimum_detectable_effect(0.02)
    power = stats.nct.sf(stats.t.ppf(1 - ALPHA_PER_LOOK, 19), 19, effect / (0.02 / math.sqrt(20)))
    assert power == pytest.approx(0.9, abs=0.02)
    assert minimum_detectable_effect(0.04) == pytest.approx(2 * effect)
    assert minimum_detectable_effect(0.02, alpha=ALPHA_PER_LOOK / 3) > effect


def test_holm_rejects_what_its_definition_rejects() -> None:
    # Worked by hand for alpha 0.05: 0.01 <= 0.05/4, 0.015 <= 0.05/3, 0.03 > 0.05/2, and 0.04 stays with it.
    assert holm([0.03, 0.01, 0.04, 0.015], 0.05) == [False, True, False, True]
    assert holm([0.04], 0.05) == [True]
    assert holm([0.04, 0.04], 0.05) == [False, False]
    assert holm([], 0.05) == []
    assert holm([float("nan"), 0.001], 0.05) == [False, True]


def test_a_family_of_equal_numbers_fails_no_more_often_than_one() -> None:
    # Three numbers exactly on the limit: without a correction 3 x 0.5 % would fail at the first look.
    rng = np.random.default_rng(11)
    table = LIMIT + 0.02 * rng.standard_normal((1500, 3, 6))
    failed = sum("FAIL" in decide(list(samples), LIMIT) for samples in table)
    assert stats.binomtest(failed, 1500).proportion_ci(0.99).low <= ALPHA_PER_LOOK
    uncorrected = (p_slower(table, LIMIT) < ALPHA_PER_LOOK).any(axis=1).sum()
    assert failed < uncorrected


def test_one_bad_number_of_several_is_found() -> None:
    rng = np.random.default_rng(3)
    samples = [rng.normal(0, 0.005, 6), rng.normal(0.1, 0.005, 6), rng.normal(0, 0.005, 6)]
    assert decide(samples, LIMIT) == ["PASS", "FAIL", "PASS"]


def test_looks_end_where_sessions_do() -> None:
    assert looks_until(20) == (6, 12, 20)
    assert looks_until(3) == (3,)
    assert looks_until(12) == (6, 12)
    assert looks_until(30) == (6, 12, 20, 30)


def test_a_session_is_the_median_log_ratio_of_its_pairs() -> None:
    pairs = [(1.0, 2.0), (10.0, 30.0), (5.0, 500.0)]
    assert session_statistic(pairs) == pytest.approx(math.log(3))


@pytest.mark.parametrize(
    "pairs", [[], [[1.0, 0.0]], [[1.0, float("nan")]], [[1.0, -1.0]], [1.0, 2.0], [[1.0, 2.0, 3.0]]]
)
def test_pairs_that_are_no_times_are_refused(pairs: list[object]) -> None:
    with pytest.raises(ValueError, match=r"array \(P,2\) of positive finite times"):
        session_statistic(pairs)  # type: ignore[arg-type]


def test_an_interval_needs_two_finite_values() -> None:
    for values in ([0.1], [0.1, float("nan")], [0.1, float("inf")]):
        with pytest.raises(ValueError, match="two or more finite"):
            t_interval(values)


def test_a_sentinel_is_the_median_of_what_it_was_given() -> None:
    assert sentinel_bias([-0.021]) == 0.021
    assert sentinel_bias([0.03, -0.01, 0.015]) == 0.015
    with pytest.raises(ValueError, match="one or more sessions; got none"):
        sentinel_bias([])


def test_a_margin_is_asked_of_both_verdicts() -> None:
    near = np.asarray([-1, 1, -0.5, 0.5, 0.2, -0.2]) * 0.002
    assert decide([LIMIT + 0.03 + near], LIMIT, margins=[0.02]) == ["FAIL"]
    assert decide([LIMIT + 0.03 + near], LIMIT, margins=[0.03]) == ["INCONCLUSIVE"]
    assert decide([LIMIT - 0.03 + near], LIMIT, margins=[0.02]) == ["PASS"]
    assert decide([LIMIT - 0.03 + near], LIMIT, margins=[0.03]) == ["INCONCLUSIVE"]
