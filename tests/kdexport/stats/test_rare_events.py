"""A sequential test of a share against the exact probability of each of its verdicts."""

import numpy as np
import pytest
from scipy import stats

from kdexport.stats.rare_events import decide_share, share_looks


def probabilities(share: float, limit: float, family: int = 1) -> dict[str, float]:
    """The exact probability of each verdict: the counts at every look, and what is left of them after it."""
    counts, found, before = np.ones(1), {"PASS": 0.0, "FAIL": 0.0}, 0
    for look in share_looks(limit):
        counts = np.convolve(counts, stats.binom.pmf(np.arange(look - before + 1), look - before, share))
        for events in np.flatnonzero(counts):
            verdict = decide_share(int(events), look, limit, family=family)
            if verdict != "INCONCLUSIVE":
                found[verdict] += float(counts[events])
                counts[events] = 0.0
        before = look
    return found


@pytest.mark.parametrize("limit", [0.02, 0.05, 0.1, 0.3, 0.5])
def test_a_share_on_the_limit_is_misjudged_in_at_most_one_of_a_hundred(limit: float) -> None:
    found = probabilities(limit, limit)
    assert found["PASS"] <= 0.01
    assert found["FAIL"] <= 0.01
    assert found["PASS"] > 0.003


@pytest.mark.parametrize(
    ("share", "limit", "passes", "fails"), [(0.10, 0.05, 0.001, 0.5), (0.5, 0.05, 1e-9, 0.999), (0.2, 0.1, 0.001, 0.3)]
)
def test_a_share_above_the_limit_does_not_pass(share: float, limit: float, passes: float, fails: float) -> None:
    found = probabilities(share, limit)
    assert found["PASS"] <= passes
    assert found["FAIL"] >= fails


def test_a_share_far_below_the_limit_passes() -> None:
    assert probabilities(0.0, 0.05)["PASS"] == 1.0
    assert probabilities(0.002, 0.05)["PASS"] > 0.99


def test_several_tests_share_the_error_of_a_wrong_fail() -> None:
    assert 3 * probabilities(0.1, 0.1, family=3)["FAIL"] <= 0.01
    assert probabilities(0.1, 0.1, family=3)["PASS"] == pytest.approx(probabilities(0.1, 0.1)["PASS"], abs=1e-3)


@pytest.mark.parametrize("limit", [0.01, 0.05, 0.25])
def test_the_looks_are_the_smallest_that_can_pass(limit: float) -> None:
    looks = share_looks(limit)
    for events, trials in enumerate(looks[1:]):
        # Independent of the bounds: a count this small must have a probability of at most a third of 1 %.
        assert stats.binom.cdf(events, trials, limit) <= 0.01 / 3 < stats.binom.cdf(events, trials - 1, limit)
        assert decide_share(events, trials, limit) == "PASS"
        assert decide_share(events, trials - 1, limit) == "INCONCLUSIVE"
    assert decide_share(0, looks[0], limit) == "INCONCLUSIVE"
    assert decide_share(looks[0], looks[0], limit) == "FAIL"


@pytest.mark.parametrize("limit", [0.0, 1.0, -0.1, float("nan")])
def test_a_limit_that_is_not_a_share_is_refused(limit: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        share_looks(limit)
