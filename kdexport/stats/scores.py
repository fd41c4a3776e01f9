"""How good answers on labelled images are: top-1, top-k, each class, confusion and calibration, with intervals."""

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdexport.stats.logits import probabilities_of
from kdexport.stats.proportions import Estimate, estimate_proportion

#: Two one-sided bounds at this confidence are a two-sided interval of 95 %.
CONFIDENCE = 0.975
TOP_K = 5
#: Bins of equal width of the expected calibration error (Guo et al. 2017).
BINS = 15
_RESAMPLES, _SEED = 1000, 0


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassScore:
    """One class: its images, and the share that is recognised, None without images.

    ``predicted`` is how often it is predicted; ``precision`` the share of these that are right, None if it never is.
    """

    name: str
    images: int
    recall: Estimate | None
    predicted: int
    precision: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibrationBin:
    """Images whose confidence is in one bin: how many, their mean confidence, and the share that is right."""

    low: float
    high: float
    images: int
    confidence: float
    accuracy: float


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Scores:
    """The answers to N labelled images. ``confusion`` (K,K) counts images by true class (row) and predicted class.

    Intervals are two-sided at 95 %: exact ones (Clopper and Pearson 1934) for shares of images, a percentile bootstrap
    over images for the calibration error. That error is biased upwards for few images, and so is its interval.
    """

    images: int
    top1: Estimate
    #: The right class is among the ``k`` most probable ones; ``k`` is 5, or the number of classes if there are fewer.
    topk: Estimate
    k: int
    calibration_error: Estimate
    bins: tuple[CalibrationBin, ...]
    classes: tuple[ClassScore, ...]
    confusion: NDArray[np.int64] = field(repr=False)

    def to_json(self) -> dict[str, Any]:
        """A JSON object; ``confusion`` as lists."""
        return {**asdict(self), "confusion": self.confusion.tolist()}

    def most_confused(self, count: int) -> list[tuple[str, str, int]]:
        """(true class, predicted class, images) of the most frequent mistakes."""
        wrong = self.confusion.copy()
        np.fill_diagonal(wrong, 0)
        order = np.argsort(-wrong, axis=None, kind="stable")[:count]
        pairs = [divmod(int(place), len(wrong)) for place in order]
        names = [score.name for score in self.classes]
        return [(names[true], names[said], int(wrong[true, said])) for true, said in pairs if wrong[true, said]]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Answered:
    """What the scores of N images take of their logits: the predicted class (N,), the probability of that class (N,),
    and the rank of the true class (N,), from 0; ties count against it, as its place is not decided.
    """

    predicted: NDArray[np.integer[Any]]
    confidence: NDArray[np.floating[Any]]
    rank: NDArray[np.integer[Any]]


def true_ranks(logits: NDArray[np.floating[Any]], labels: NDArray[np.integer[Any]]) -> NDArray[np.int64]:
    """The rank (N,) of the class ``labels`` (N,) among logits (N,K), from 0, ties counted against it."""
    own = np.take_along_axis(logits, labels[:, None].astype(np.int64), axis=1)
    # The smaller ones are counted, so that a logit that is not a number is never behind the true class.
    return np.asarray(logits.shape[1] - 1 - (logits < own).sum(axis=1), np.int64)


def score(logits: NDArray[np.floating[Any]], labels: NDArray[np.int64], classes: tuple[str, ...]) -> Scores:
    """Judge logits (N,K) of images with ``labels`` (N,), N at least 1."""
    found = Answered(
        predicted=logits.argmax(axis=1).astype(np.int64),
        confidence=probabilities_of(logits).max(axis=1),
        rank=true_ranks(logits, labels),
    )
    return score_answers(found, labels, classes)


def score_answers(found: Answered, labels: NDArray[np.integer[Any]], classes: tuple[str, ...]) -> Scores:
    """Judge the answers to images with ``labels`` (N,), N at least 1."""
    count, k = len(labels), min(TOP_K, len(classes))
    right = found.predicted == labels
    in_top = right | (found.rank < k)
    confidence = found.confidence.astype(np.float64)
    confusion = np.zeros((len(classes), len(classes)), np.int64)
    np.add.at(confusion, (labels, found.predicted), 1)
    return Scores(
        images=count,
        top1=estimate_proportion(int(right.sum()), count, CONFIDENCE),
        topk=estimate_proportion(int(in_top.sum()), count, CONFIDENCE),
        k=k,
        calibration_error=_calibration_error(confidence, right),
        bins=_bins(confidence, right),
        classes=tuple(_class_score(name, index, confusion) for index, name in enumerate(classes)),
        confusion=confusion,
    )


def _class_score(name: str, index: int, confusion: NDArray[np.int64]) -> ClassScore:
    images, predicted = int(confusion[index].sum()), int(confusion[:, index].sum())
    right = int(confusion[index, index])
    return ClassScore(
        name=name,
        images=images,
        recall=estimate_proportion(right, images, CONFIDENCE) if images else None,
        predicted=predicted,
        precision=right / predicted if predicted else None,
    )


def _bin_of(confidence: NDArray[np.float64]) -> NDArray[np.int64]:
    return np.minimum((confidence * BINS).astype(np.int64), BINS - 1)


def calibration_error(confidence: NDArray[np.float64], right: NDArray[np.bool_]) -> float:
    """The expected calibration error of answers with ``confidence`` (N,) of which some are ``right`` (N,)."""
    sums = np.bincount(_bin_of(confidence), weights=confidence - right, minlength=BINS)
    return float(np.abs(sums).sum() / len(right))


def _calibration_error(confidence: NDArray[np.float64], right: NDArray[np.bool_]) -> Estimate:
    rng, count = np.random.default_rng(_SEED), len(right)
    resampled = []
    for _ in range(_RESAMPLES):
        chosen = rng.integers(0, count, count)
        resampled.append(calibration_error(confidence[chosen], right[chosen]))
    low, high = np.quantile(resampled, (1 - CONFIDENCE, CONFIDENCE))
    return Estimate(value=calibration_error(confidence, right), low=float(low), high=float(high))


def _bins(confidence: NDArray[np.float64], right: NDArray[np.bool_]) -> tuple[CalibrationBin, ...]:
    places = _bin_of(confidence)
    return tuple(
        CalibrationBin(
            low=index / BINS,
            high=(index + 1) / BINS,
            images=int((places == index).sum()),
            confidence=float(confidence[places == index].mean()),
            accuracy=float(right[places == index].mean()),
        )
        for index in range(BINS)
        if (places == index).any()
    )
