import math

import numpy as np
import pytest

from kdexport.stats.scores import BINS, score

CLASSES = tuple("abcdefg")


def answers(count: int, classes: int = 7, seed: int = 3) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, count)
    logits = rng.normal(0, 2, (count, classes)).astype(np.float32)
    logits[np.arange(count), labels] += 2
    return logits, labels


def softmax(row: np.ndarray) -> list[float]:
    powers = [math.exp(float(value) - float(max(row))) for value in row]
    return [power / sum(powers) for power in powers]


def test_every_count_is_that_of_a_loop_over_the_images() -> None:
    logits, labels = answers(211)
    found = score(logits, labels, CLASSES)
    top1 = top5 = 0
    confusion = [[0] * 7 for _ in range(7)]
    for row, label in zip(logits, labels, strict=True):
        order = sorted(range(7), key=lambda index: -row[index])
        top1 += order[0] == label
        top5 += label in order[:5]
        confusion[label][order[0]] += 1
    assert found.top1.value == top1 / 211
    assert (found.k, found.topk.value) == (5, top5 / 211)
    assert found.confusion.tolist() == confusion
    for index, item in enumerate(found.classes):
        assert (item.name, item.images) == (CLASSES[index], sum(confusion[index]))
        assert item.recall is not None
        assert item.recall.value == confusion[index][index] / sum(confusion[index])
        assert item.predicted == sum(row[index] for row in confusion)
        assert item.precision == confusion[index][index] / item.predicted


def test_the_calibration_error_is_that_of_a_loop_over_the_bins() -> None:
    logits, labels = answers(173)
    found = score(logits, labels, CLASSES)
    total = 0.0
    sums = {index: [0, 0.0, 0] for index in range(BINS)}
    for row, label in zip(logits, labels, strict=True):
        probabilities = softmax(row)
        best = max(range(7), key=lambda index: probabilities[index])
        place = sums[min(int(probabilities[best] * BINS), BINS - 1)]
        place[0] += 1
        place[1] += probabilities[best]
        place[2] += int(best == label)
    for images, confidence, right in sums.values():
        total += abs(confidence - right) / 173 if images else 0
    assert found.calibration_error.value == pytest.approx(total, abs=1e-9)
    assert found.calibration_error.low < found.calibration_error.high
    assert sum(item.images for item in found.bins) == 173
    for item in found.bins:
        images, confidence, right = sums[round(item.low * BINS)]
        assert (item.images, item.accuracy) == (images, right / images)
        assert item.confidence == pytest.approx(confidence / images)


def test_the_interval_of_top1_covers_the_truth_as_often_as_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdexport.stats.scores._RESAMPLES", 1)
    rng = np.random.default_rng(11)
    covered = 0
    for _ in range(200):
        labels = np.zeros(60, np.int64)
        logits = np.where(rng.random((60, 1)) < 0.7, [[1.0, 0.0]], [[0.0, 1.0]])
        found = score(logits, labels, ("a", "b")).top1
        covered += found.low <= 0.7 <= found.high
    assert covered >= 186


def test_a_perfectly_sure_network_that_is_half_right_has_half_a_calibration_error() -> None:
    logits = np.tile([[80.0, 0.0]], (40, 1))
    labels = np.arange(40) % 2
    found = score(logits, labels, ("a", "b"))
    assert found.calibration_error.value == pytest.approx(0.5)
    assert [(item.images, item.confidence, item.accuracy) for item in found.bins] == [(40, 1.0, 0.5)]


def test_classes_without_images_or_predictions_have_no_share() -> None:
    found = score(np.array([[3.0, 1.0, 0.0]]), np.array([0]), ("seen", "never", "neither"))
    seen, never, neither = found.classes
    assert seen.recall is not None
    assert (seen.recall.value, seen.precision) == (1.0, 1.0)
    assert never == neither.__class__(name="never", images=0, recall=None, predicted=0, precision=None)
    assert found.k == 3
    assert found.topk.value == 1.0
    assert found.most_confused(5) == []


def test_a_tie_is_right_only_if_the_prediction_is() -> None:
    logits = np.zeros((2, 7))
    found = score(logits, np.array([0, 6]), CLASSES)
    assert found.top1.value == 0.5
    assert found.topk.value == 0.5


def test_the_most_frequent_mistakes_come_first() -> None:
    labels = np.array([0, 0, 0, 1, 1, 2])
    logits = np.eye(3)[[1, 1, 0, 2, 1, 2]]
    found = score(logits, labels, ("x", "y", "z"))
    assert found.most_confused(9) == [("x", "y", 2), ("y", "z", 1)]
    assert found.most_confused(1) == [("x", "y", 2)]
    assert found.to_json()["confusion"] == [[1, 2, 0], [0, 1, 1], [0, 0, 1]]
