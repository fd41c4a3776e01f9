"""What a network predicts on a split, and the measures of it; several processes evaluate a part each."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from kdexport.errors import TrainingError
from training.data import Labelled
from training.devices import buffers_of_first_process, full_float32, gathered_rows

#: Bins of equal width of the confidence, in the calibration error (Guo et al., 2017).
_BINS = 15
_TOP = 5
#: Pairs of classes that are named as confused most often.
_CONFUSED = 20


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Predictions:
    """For each of N images its class, the predicted one, its probability, and whether the class is among the top 5."""

    labels: NDArray[np.int64]
    predicted: NDArray[np.int64]
    confidence: NDArray[np.float32]
    in_top5: NDArray[np.bool_]

    @property
    def top1(self) -> float:
        """The fraction of images whose largest logit is their class."""
        return int((self.predicted == self.labels).sum()) / len(self.labels)

    @property
    def top5(self) -> float:
        """The fraction of images whose class is one of the five with the largest logits."""
        return int(self.in_top5.sum()) / len(self.labels)

    def calibration_error(self) -> float:
        """The expected calibration error: |accuracy - confidence| in 15 bins of confidence, weighted by their size."""
        bins = np.minimum((self.confidence.astype(np.float64) * _BINS).astype(np.int64), _BINS - 1)
        right = np.bincount(bins, self.predicted == self.labels, _BINS)
        confidence = np.bincount(bins, self.confidence.astype(np.float64), _BINS)
        return float(np.abs(right - confidence).sum() / len(self.labels))

    def confusion(self, num_classes: int) -> NDArray[np.int64]:
        """(K,K): how often class i was predicted as class j."""
        pairs = self.labels * num_classes + self.predicted
        return np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)

    def scalars(self) -> dict[str, float]:
        """Top-1, top-5 and calibration error by name."""
        return {"top1": self.top1, "top5": self.top5, "calibration_error": self.calibration_error()}

    def report(self, classes: Sequence[str]) -> dict[str, Any]:
        """A JSON object: the scalars, the recall of each class, the confusion matrix and the commonest confusions."""
        confusion = self.confusion(len(classes))
        images = confusion.sum(1)
        wrong = confusion - np.diag(confusion.diagonal())
        places = np.argsort(-wrong, axis=None, kind="stable")[:_CONFUSED]
        pairs = [divmod(int(place), len(classes)) for place in places]
        return {
            **self.scalars(),
            "images": len(self.labels),
            "per_class": {
                name: (int(confusion[i, i]) / int(images[i]) if images[i] else None) for i, name in enumerate(classes)
            },
            "confused_most": [[classes[i], classes[j], int(wrong[i, j])] for i, j in pairs if wrong[i, j]],
            # A row is a class, a column a prediction, in the order of per_class.
            "confusion": confusion.tolist(),
        }


@torch.no_grad()
def predict(network: nn.Module, batches: Iterable[Labelled]) -> Predictions:
    """Run ``network`` on ``batches`` in evaluation mode, in full float32, and restore its mode.

    Several processes have the batches of a part each, and all get the predictions for all of them, by the running
    statistics of the first process. Raises ``TrainingError`` if a logit is not finite.
    """
    was_training = network.training
    network.eval()
    columns: list[tuple[torch.Tensor, ...]] = []
    with buffers_of_first_process(network), full_float32():
        for images, labels in batches:
            logits = network(images).float()
            best = logits.softmax(1).max(1)
            count = min(_TOP, logits.shape[1])
            in_top = (logits.topk(count, 1).indices == labels[:, None]).any(1)
            columns.append((labels, logits.argmax(1), best.values, in_top))
    network.train(was_training)
    whole = [torch.cat(part).cpu().numpy() for part in zip(*columns, strict=True)] if columns else None
    rows = gathered_rows(whole)
    # The softmax of logits with an infinity or a NaN is NaN.
    lost = int((~np.isfinite(rows[2])).sum())
    if lost:
        raise TrainingError(
            f"The network has logits that are not finite for {lost} of {len(rows[2])} images: its training diverged, "
            "or its weights or the statistics of its batch norms are damaged.",
            remedy="Train it with a lower learning rate, or pass another file of weights.",
        )
    return Predictions(labels=rows[0], predicted=rows[1], confidence=rows[2], in_top5=rows[3])
