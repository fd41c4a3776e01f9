"""The exact paired test of a drop of top-1 against an enumeration by scipy, its error rate, its power."""

import math
import re
from collections.abc import Iterator

import numpy as np
import pytest
from scipy import optimize, stats

from kdexport.stats.paired import (
    detectable_drop,
    detectable_proportion,
    drop_trials_needed,
    estimate_drop,
    p_drop_within,
)


def tables(images: int) -> Iterator[tuple[int, int]]:
    """Every count of lost and gained images."""
    return ((lost, gained) for gained in range(images + 1) for lost in range(images + 1 - gained))


def score(lost: int, gained: int, images: int, limit: float) -> float:
    """Tango's score, with the restricted likelihood maximised numerically."""

    def loss(rate: float) -> float:
        shares = ((lost, rate + limit), (gained, rate), (images - lost - gained, 1 - 2 * rate - limit))
        return -sum(count * math.log(max(share, 1e-300)) for count, share in shares if count)

    bounds = (max(0.0, -limit), (1 - limit) / 2)
    inside = optimize.minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-12}).x
    rate = min((*bounds, inside), key=loss)
    variance = images * (2 * rate + limit - limit**2)
    return (lost - gained - images * limit) / math.sqrt(variance) if variance > 1e-15 else 0.0


@pytest.mark.parametrize(
    ("lost", "gained", "images", "limit"),
    [(3, 0, 20, 0.02), (4, 1, 25, 0.05), (0, 0, 15, -0.1), (2, 5, 18, -0.3), (6, 1, 22, 0.0), (1, 3, 20, 0.01)],
)
def test_the_p_value_is_that_of_an_enumeration(lost: int, gained: int, images: int, limit: float) -> None:
    least = score(lost, gained, images, limit)
    region = np.asarray([table for table in tables(images) if score(*table, images, limit) >= least - 1e-6])
    rows = np.column_stack([region, images - region.sum(axis=1)])
    interval = stats.binomtest(gained, images).proportion_ci(1 - 1e-4, method="exact")
    rates = np.clip(np.linspace(interval.low, interval.high, 300), max(0, -limit), (1 - limit) / 2)
    tails = [stats.multinomial.pmf(rows, images, [q + limit, q, 1 - 2 * q - limit]).sum() for q in rates]
    assert p_drop_within(lost, gained, images, limit) == pytest.approx(1e-4 + max(tails), rel=2e-3)


@pytest.mark.parametrize(("limit", "gained"), [(0.02, 0.0), (0.02, 0.03), (0.02, 0.2), (0.0, 0.05), (0.1, 0.1)])
def test_a_drop_on_its_limit_is_refuted_and_proven_no_more_often_than_asked(limit: float, gained: float) -> None:
    # Exact: every outcome of 40 images with its probability, no sample.
    images = 40
    found = np.asarray(list(tables(images)))
    rows = np.column_stack([found, images - found.sum(axis=1)])
    chance = stats.multinomial.pmf(rows, images, [gained + limit, gained, 1 - 2 * gained - limit])
    likely = chance > 1e-9
    refuted = proven = 0.0
    for (lost, won), probability in zip(found[likely], chance[likely], strict=True):
        refuted += probability * (p_drop_within(int(lost), int(won), images, limit) <= 0.05)
        proven += probability * (p_drop_within(int(won), int(lost), images, -limit) <= 0.05)
    assert refuted <= 0.05
    assert proven <= 0.05


@pytest.mark.parametrize("truth", [(0.03, 0.01), (0.0, 0.02), (0.055, 0.05)])
def test_each_bound_of_the_drop_is_wrong_no_more_often_than_asked(truth: tuple[float, float]) -> None:
    lost, gained = truth
    rng = np.random.default_rng(5)
    counts, repeats = np.unique(
        rng.multinomial(100, [lost, gained, 1 - lost - gained], size=1500), axis=0, return_counts=True
    )
    found = [estimate_drop(int(a), int(b), 100) for a, b, _ in counts]
    above = sum(n for interval, n in zip(found, repeats, strict=True) if interval.high < lost - gained)
    below = sum(n for interval, n in zip(found, repeats, strict=True) if interval.low > lost - gained)
    # Three standard deviations of 1500 draws at 5 % are 1.7 points.
    assert above / 1500 < 0.067
    assert below / 1500 < 0.067


def test_ten_lost_and_none_gained_of_360_refute_half_a_point() -> None:
    assert p_drop_within(10, 0, 360, 0.005) < 0.005
    assert estimate_drop(10, 0, 360).verdict(0.005) == "FAIL"
    # Five of ten thousand are measured above a limit of 0.04 points, and do not refute it.
    assert estimate_drop(5, 0, 10_000).verdict(0.0004) == "INCONCLUSIVE"


def test_few_images_without_a_change_prove_no_small_drop() -> None:
    assert estimate_drop(0, 0, 64).verdict(0.001) == "INCONCLUSIVE"
    assert estimate_drop(0, 0, 64).verdict(0.2) == "PASS"
    assert estimate_drop(0, 0, 20_000).verdict(0.001) == "PASS"
    assert estimate_drop(30, 2, 1000).verdict(0.001) == "FAIL"
    assert estimate_drop(2, 30, 1000).verdict(0.001) == "PASS"
    # No change at all is most likely if nothing is gained: (1 - drop)^N, plus the 1e-4 of the excluded rates.
    assert estimate_drop(0, 0, 10).high == pytest.approx(1 - (0.05 - 1e-4) ** (1 / 10), abs=1e-5)


def test_the_interval_of_a_loss_is_the_gain_mirrored() -> None:
    one, other = estimate_drop(12, 5, 300, 0.98), estimate_drop(5, 12, 300, 0.98)
    assert one.value == 7 / 300
    assert one.low < one.value < one.high
    assert (one.low, one.high) == (-other.high, -other.low)


@pytest.mark.parametrize(("lost", "gained", "images"), [(1, 0, 1), (0, 1, 1), (7, 0, 7), (0, 7, 7), (3, 4, 7)])
def test_changes_of_every_image_have_an_interval(lost: int, gained: int, images: int) -> None:
    found = estimate_drop(lost, gained, images)
    assert -1 <= found.low <= found.value <= found.high <= 1
    assert 0 <= p_drop_within(lost, gained, images, 0.1) <= 1


@pytest.mark.parametrize(("limit", "confidence"), [(0.001, 0.95), (0.013, 0.9), (0.2, 0.99)])
def test_so_many_unchanged_images_prove_a_drop_and_one_less_does_not(limit: float, confidence: float) -> None:
    needed = drop_trials_needed(limit, confidence)
    assert p_drop_within(0, 0, needed, -limit) <= 1 - confidence < p_drop_within(0, 0, needed - 1, -limit)
    # No test can need fewer: without a gained image the chance of no change is (1 - limit)^N.
    assert 0 <= needed - math.log(1 - confidence) / math.log1p(-limit) < 4


@pytest.mark.parametrize(("limit", "images"), [(0.001, 360), (0.005, 360), (0.005, 100), (0.002, 10_000)])
def test_a_detectable_drop_is_found_in_nine_of_ten_samples(limit: float, images: int) -> None:
    drop = detectable_drop(limit, images)
    assert drop is not None
    lost = np.random.default_rng(7).binomial(images, drop, 4000)
    refuted = {int(count): p_drop_within(int(count), 0, images, limit) <= 0.05 for count in np.unique(lost)}
    assert np.mean([refuted[int(count)] for count in lost]) == pytest.approx(0.9, abs=0.015)


def test_360_images_show_a_drop_of_two_points_and_a_rate_of_flips_half_above_its_limit() -> None:
    assert detectable_drop(0.001, 360) == pytest.approx(0.0185, abs=1e-4)
    assert detectable_proportion(0.1, 360) == pytest.approx(0.1533, abs=1e-4)
    fewest = next(k for k in range(361) if stats.binom.sf(k - 1, 360, 0.1) < 0.05)
    assert stats.binom.sf(fewest - 1, 360, 0.1533) == pytest.approx(0.9, abs=0.002)


def test_one_image_shows_no_drop() -> None:
    assert detectable_drop(0.5, 1) is None
    assert detectable_proportion(0.5, 1) is None


@pytest.mark.parametrize(("count", "trials"), [(-1, 5), (6, 5), (2, 1), (0, 0)])
def test_a_count_outside_of_its_trials_is_refused(count: int, trials: int) -> None:
    message = f"A count must lie between 0 and the number of trials (1 or more); got {count} of {trials}."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        estimate_drop(count, 0, trials)
