"""Distances between logits."""

import numpy as np
import pytest

from kdexport.stats.logits import COLLAPSED, logit_noise, typical_noise


def test_one_image_that_is_cut_off_does_not_make_another_network_and_swapped_classes_do() -> None:
    rng = np.random.default_rng(4)
    exact = rng.normal(size=(8, 10)) * 3
    cut = exact + 0.05 * rng.normal(size=(8, 10))
    cut[5] *= 0.1
    cut[5, 2] += 40
    assert logit_noise(exact, cut) > COLLAPSED > typical_noise(exact, cut) > 0
    # Written out: the error of the image in the middle, relative to the spread of all.
    errors = sorted(float(np.sqrt(np.mean((a - b) ** 2))) for a, b in zip(exact, cut, strict=True))
    spread = np.sqrt(np.mean([np.var(row) for row in exact]))
    middle = np.sqrt((errors[3] ** 2 + errors[4] ** 2) / 2)
    assert typical_noise(exact, cut) == pytest.approx(middle / spread)
    swapped = np.roll(exact, 1, axis=1)
    assert typical_noise(exact, swapped) > COLLAPSED
    assert typical_noise(exact, np.where(exact == exact[0, 0], np.nan, exact)) == float("inf")
