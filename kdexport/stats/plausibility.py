"""Whether predictions can be those of a network that was trained for the classes of this data set."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kdexport.stats.proportions import lower_bound, mcnemar_p_value

#: One-sided confidence of "better than chance" and of "better with the classes in another order".
CONFIDENCE = 0.99
#: A weak teacher confuses some classes systematically; one with its classes in another order is wrong nearly always.
_MUCH_BETTER = 2.0

_Indices = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Judgement:
    """Top-1 of a network on the validation split, and the reason why it cannot be of these classes, if there is one."""

    correct: int
    images: int
    classes: int
    problem: str = ""

    @property
    def top1(self) -> float:
        """The fraction of images whose largest logit is their label."""
        return self.correct / self.images

    def __str__(self) -> str:
        return f"top-1 {self.top1:.2%} of {self.images} validation images, chance level {1 / self.classes:.2%}"


def judge(predictions: _Indices, labels: _Indices, classes: Sequence[str]) -> Judgement:
    """Compare predicted classes (n,) with labels (n,), both indices into ``classes``.

    A network is at chance level unless the exact binomial (Clopper-Pearson) lower bound of its top-1 is above one in K.
    Its classes are in another order if the order that fits one half of the images best is right for at least twice as
    many images of the other half as the given order, and significantly so (McNemar's exact test).
    """
    correct, images = int((predictions == labels).sum()), len(labels)
    measured = Judgement(correct=correct, images=images, classes=len(classes))
    problem = _other_order(predictions, labels, classes)
    if not problem and lower_bound(correct, images, CONFIDENCE) <= 1 / len(classes):
        problem = f"it is not better than chance: {measured}"
    return Judgement(correct=correct, images=images, classes=len(classes), problem=problem)


def _other_order(predictions: _Indices, labels: _Indices, classes: Sequence[str]) -> str:
    from scipy.optimize import linear_sum_assignment

    count = len(classes)
    # Every second image, because the images of a split are sorted by class.
    confusion = np.zeros((count, count), dtype=np.int64)
    np.add.at(confusion, (predictions[0::2], labels[0::2]), 1)
    # Where an output was never the largest, or in a tie, it keeps its place.
    _, order = linear_sum_assignment(confusion + 0.5 * np.eye(count), maximize=True)
    given = predictions[1::2] == labels[1::2]
    reordered = order[predictions[1::2]] == labels[1::2]
    lost, gained = int((given & ~reordered).sum()), int((reordered & ~given).sum())
    much = reordered.sum() >= _MUCH_BETTER * given.sum()
    if not much or gained <= lost or mcnemar_p_value(lost, gained) > 1 - CONFIDENCE:
        return ""
    if lower_bound(int(reordered.sum()), len(reordered), CONFIDENCE) <= 1 / count:
        return ""
    moved = [f"output {index} is {classes[label]!r}" for index, label in enumerate(order) if index != label]
    return (
        f"its classes are in another order: top-1 is {given.mean():.2%}, but {reordered.mean():.2%} if "
        f"{', '.join(moved[:3])}{' and so on' if len(moved) > 3 else ''}"
    )
