"""The cross-entropy with the labels of a step, with smoothed labels and weights of classes."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from training.distillers.distiller import StepContext
from training.recipe import TrainSettings


class Supervision(nn.Module):
    """The mean cross-entropy of logits (N,K) with the classes of a step, or with the parts of classes in mixed images.

    With class weights w it is the mean of w times the loss over the mean of w, so that they do not change its scale.
    """

    weights: Tensor | None

    def __init__(self, label_smoothing: float = 0.0, weights: Tensor | None = None) -> None:
        super().__init__()
        self._smoothing = label_smoothing
        # It follows from the data set, and is no part of a state.
        self.register_buffer("weights", weights, persistent=False)

    def forward(self, logits: Tensor, step: StepContext) -> Tensor:
        wanted = step.labels if step.targets is None else step.targets
        loss = functional.cross_entropy(logits.float(), wanted, weight=self.weights, label_smoothing=self._smoothing)
        if self.weights is None or step.targets is None:
            return loss
        # For parts of classes torch divides by the number of images, and not by the sum of their weights.
        return loss / (step.targets @ self.weights).mean()


def supervision(settings: TrainSettings, labels: Tensor) -> Supervision:
    """The cross-entropy of a run on images with the classes ``labels`` (n,)."""
    if settings.class_weights == "none":
        return Supervision(settings.label_smoothing)
    counts = torch.bincount(labels).float()
    return Supervision(settings.label_smoothing, counts.sum() / (len(counts) * counts))
