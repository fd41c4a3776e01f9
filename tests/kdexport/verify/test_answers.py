import math

import numpy as np
import pytest

from kdexport.stats.scores import score, score_answers
from kdexport.verify.answers import file_answers


def hostile_logits(count: int = 83, classes: int = 9) -> tuple[np.ndarray, np.ndarray]:
    """Large, tied and equal logits, and images for which the right class shares its place."""
    rng = np.random.default_rng(5)
    logits = rng.normal(0, 30, (count, classes)).astype(np.float32)
    logits[3], logits[4] = 0.0, 700.0
    logits[5, 2] = logits[5, 7] = logits[5].max() + 1
    labels = rng.integers(0, classes, count)
    labels[5] = 7
    return logits, labels


def test_the_answers_are_those_of_a_loop_over_the_images() -> None:
    logits, labels = hostile_logits()
    found = file_answers(logits, labels)
    for row, values in enumerate(logits.astype(np.float64).tolist()):
        order = sorted(range(9), key=lambda index: (-values[index], index))
        assert found.classes[row].tolist() == order[:5]
        assert found.logits[row].tolist() == [values[index] for index in order[:5]]
        largest = max(values)
        total = math.log(sum(math.exp(value - largest) for value in values)) + largest
        assert found.log_sum_exp[row] == pytest.approx(total, rel=1e-6)
        own = values[labels[row]]
        assert found.ranks[row] == sum(value >= own for value in values) - 1
    assert (found.classes[:, 0] == logits.argmax(axis=1)).all()


def test_scores_of_stored_answers_are_those_of_the_logits() -> None:
    logits, labels = hostile_logits()
    names = tuple("abcdefghi")
    direct, stored = score(logits, labels, names), score_answers(file_answers(logits, labels).answered, labels, names)
    assert (stored.top1, stored.topk, stored.classes) == (direct.top1, direct.topk, direct.classes)
    assert (stored.confusion == direct.confusion).all()
    assert stored.calibration_error.value == pytest.approx(direct.calibration_error.value, abs=1e-5)


def test_fewer_classes_than_answers_give_all_of_them() -> None:
    found = file_answers(np.array([[0.5, 2.0], [3.0, 3.0]]), np.array([0, 1]))
    assert found.classes.tolist() == [[1, 0], [0, 1]]
    assert found.ranks.tolist() == [1, 1]
    assert found.probabilities.sum(axis=1) == pytest.approx([1, 1])


def test_a_logit_that_is_not_a_number_is_the_answer_as_for_argmax_and_never_right_by_its_rank() -> None:
    logits = np.array([[1.0, math.nan, 2.0], [math.inf, 0.0, 1.0]])
    found = file_answers(logits, np.array([1, 0]))
    assert found.classes[:, 0].tolist() == logits.argmax(axis=1).tolist() == [1, 0]
    assert found.ranks.tolist() == [2, 0]
    assert not np.isfinite(found.probabilities[:, 0]).any()
