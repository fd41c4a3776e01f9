"""Teachers at chance level, and teachers whose classes are in another order."""

from fractions import Fraction
from math import comb

import numpy as np
import pytest
from numpy.typing import NDArray

from kdexport.stats.plausibility import judge

Indices = NDArray[np.int64]


def names(count: int) -> tuple[str, ...]:
    return tuple(str(index) for index in range(count))


def labelled(count: int, images: int) -> Indices:
    """Labels in the order of a split: class by class."""
    return np.sort(np.arange(images) % count)


def right(labels: Indices, share: float, count: int, seed: int = 0) -> Indices:
    """Predictions that are right for ``share`` of the images, and one of the other classes for the rest."""
    rng = np.random.default_rng(seed)
    wrong = (labels + rng.integers(1, count, len(labels))) % count
    return np.where(rng.random(len(labels)) < share, labels, wrong)


def tail(correct: int, images: int, chance: float) -> float:
    """The probability that at least ``correct`` of ``images`` are right by chance, summed term by term."""
    p = Fraction(chance).limit_denominator(1000)
    return float(sum(comb(images, k) * p**k * (1 - p) ** (images - k) for k in range(correct, images + 1)))


def test_a_good_teacher_is_plausible_and_described() -> None:
    labels = labelled(10, 360)
    judgement = judge(right(labels, 0.9, 10), labels, names(10))
    assert judgement.problem == ""
    assert judgement.top1 == np.mean(right(labels, 0.9, 10) == labels)
    assert str(judgement).endswith("% of 360 validation images, chance level 10.00%")


@pytest.mark.parametrize(("images", "count"), [(18, 3), (120, 7), (300, 30)])
def test_chance_level_ends_exactly_where_the_binomial_test_ends(images: int, count: int) -> None:
    labels, limit = labelled(count, images), 0
    while tail(limit, images, 1 / count) > 0.01:
        limit += 1
    for correct, plausible in ((limit - 1, False), (limit, True)):
        predictions = (labels + 1 + np.arange(images) % (count - 1)) % count
        # The right ones are spread over both halves and over all classes.
        chosen = np.random.default_rng(1).permutation(images)[:correct]
        predictions[chosen] = labels[chosen]
        judgement = judge(predictions, labels, names(count))
        assert judgement.correct == correct
        assert (judgement.problem == "") == plausible, correct


def test_a_teacher_that_always_says_the_same_is_at_chance_level() -> None:
    labels = labelled(5, 500)
    assert "not better than chance: top-1 20.00% of 500" in judge(np.full(500, 3), labels, names(5)).problem


def test_permuted_classes_are_named() -> None:
    labels = labelled(4, 200)
    order = np.array([2, 0, 1, 3])
    outputs = np.argsort(order)
    predictions = outputs[right(labels, 0.95, 4)]
    problem = judge(predictions, labels, ("ant", "bee", "cow", "dog")).problem
    assert problem.startswith("its classes are in another order: top-1 is ")
    assert "output 0 is 'cow', output 1 is 'ant', output 2 is 'bee'" in problem


def test_the_order_of_numbers_as_text_is_found_although_it_is_above_chance() -> None:
    # Folders 0 to 11 are sorted as 0, 1, 10, 11, 2, ...; a teacher counts. Two of twelve classes agree.
    classes = tuple(sorted(names(12)))
    labels = labelled(12, 1200)
    meant = np.array([int(name) for name in classes])
    predictions = right(meant[labels], 0.9, 12)
    assert tail(int((predictions == labels).sum()), 1200, 1 / 12) < 1e-6
    problem = judge(predictions, labels, classes).problem
    assert "in another order" in problem
    assert "output 2 is '2', output 3 is '3', output 4 is '4' and so on" in problem


@pytest.mark.parametrize("seed", range(20))
def test_a_weak_teacher_that_confuses_classes_is_not_taken_for_a_permuted_one(seed: int) -> None:
    labels = labelled(20, 400)
    rng = np.random.default_rng(seed)
    # Half of the classes are never predicted, and each is taken for one fixed other class.
    predictions = right(labels, 0.3, 20, seed)
    silent = rng.permutation(20)[:10]
    replaced = np.arange(20)
    replaced[silent] = rng.integers(0, 20, 10)
    assert "another order" not in judge(replaced[predictions], labels, names(20)).problem


@pytest.mark.parametrize("seed", range(20))
def test_random_predictions_are_not_called_permuted(seed: int) -> None:
    labels = labelled(100, 1000)
    assert "another order" not in judge(np.random.default_rng(seed).integers(0, 100, 1000), labels, names(100)).problem
