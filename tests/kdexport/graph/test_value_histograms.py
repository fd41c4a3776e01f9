"""Histograms of constant size, against numpy on all values at once."""

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from kdexport.graph.value_histograms import BINS, EMPTY, Histogram, least_entropy, with_values, without_tails

RNG = np.random.default_rng(3)
#: Values of very different size, in orders that let the range grow, and with zeros first.
PARTS: dict[str, list[NDArray[np.float32]]] = {
    "growing": [RNG.normal(size=(5, 40)).astype(np.float32) * scale for scale in (1e-6, 1, 30, 1e4)],
    "shrinking": [RNG.normal(size=2000).astype(np.float32) * scale for scale in (300, 2, 0.1)],
    "zeros first": [np.zeros((3, 2), np.float32), RNG.exponential(size=1000).astype(np.float32)],
    "negative": [-RNG.exponential(size=700).astype(np.float32), np.zeros(0, np.float32)],
    "one value": [np.full(9, 3.25, np.float32)],
}


def collected(parts: list[NDArray[np.float32]]) -> Histogram:
    found = EMPTY
    for part in parts:
        found = with_values(found, part)
    return found


@pytest.mark.parametrize("name", PARTS)
def test_all_values_are_counted_in_their_bins(name: str) -> None:
    values = np.concatenate([part.reshape(-1) for part in PARTS[name]]).astype(np.float64)
    found = collected(PARTS[name])
    assert (found.low, found.high) == (values.min(), values.max())
    assert np.abs(values).max() <= found.end < 2 * np.abs(values).max() or name == "shrinking"
    expected, _ = np.histogram(values, BINS, range=(-found.end, found.end))
    assert found.counts.sum() == len(values)
    # A value at an edge may fall on either side of it.
    assert np.abs(np.cumsum(found.counts) - np.cumsum(expected)).max() <= 2


def test_zeros_alone_have_an_empty_range() -> None:
    found = collected([np.zeros(5, np.float32)])
    assert without_tails(found, 99.0) == least_entropy(found) == (0.0, 0.0)
    assert found.counts.sum() == 5


@pytest.mark.parametrize("percentile", [90.0, 99.0, 99.9, 100.0])
def test_a_percentile_leaves_out_its_part_of_the_values(percentile: float) -> None:
    values = np.concatenate([RNG.normal(size=90_000), RNG.exponential(5, size=10_000)]).astype(np.float32)
    low, high = without_tails(collected(list(np.split(values, 4))), percentile)
    beyond, width = (50 - percentile / 2) / 100 * len(values), 2 * 2 * float(np.abs(values).max()) / BINS
    for end, ordered in ((low, values), (-high, -values)):
        # No more than these are left out, and a range that is one bin narrower would leave out more.
        assert np.sum(ordered < end) <= beyond + 1e-6
        assert np.sum(ordered <= end + width) >= beyond
    assert low >= values.min()
    assert high <= values.max()


def test_the_least_entropy_is_that_of_a_search_over_all_thresholds() -> None:
    values = np.concatenate([RNG.normal(size=50_000), 40 * RNG.normal(size=20)]).astype(np.float32)
    found = collected([values])
    counts, edges = np.histogram(values, 512, range=(-found.end, found.end))
    divergences = {}
    for half in range(64, 257, 2):
        inside = counts[256 - half : 256 + half]
        p = inside.astype(np.float64)
        p[0] += counts[: 256 - half].sum()
        p[-1] += counts[256 + half :].sum()
        q = np.zeros(len(p))
        for level in range(128):
            own = [index for index in range(len(p)) if index * 128 // len(p) == level and inside[index]]
            q[own] = inside[own].sum() / max(len(own), 1)
        q = np.maximum(q / q.sum(), 1e-9)
        divergences[half] = stats.entropy(p, q)
    best = min(divergences, key=lambda half: divergences[half])
    low, high = least_entropy(found)
    assert (low, high) == pytest.approx((edges[256 - best], edges[256 + best]), rel=0.02)
    # The few values that are forty times as large are cut off.
    assert high < 0.3 * values.max()


def test_values_that_are_not_finite_show_in_the_ends() -> None:
    for bad in (np.inf, -np.inf, np.nan):
        found = collected([np.ones(4, np.float32), np.array([0.5, bad], np.float32), np.ones(4, np.float32)])
        for ends in (without_tails(found, 99.0), least_entropy(found)):
            assert not np.isfinite(ends).all(), bad
