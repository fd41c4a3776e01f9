"""Knowledge review (Chen et al., 2021, ReviewKD): deep student features enter the prediction of shallow ones."""

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from kdexport.students import Student, Tapped
from training.distillers import DISTILLERS
from training.distillers.distiller import BranchFeatures, Distiller, StepContext
from training.distillers.pairs import pooled_width, stage_pairs
from training.distillers.settings import ReviewKDSettings
from training.losses import hierarchical_context_loss
from training.teachers import Teacher


class AttentionFusion(nn.Module):
    """One link of the chain (the paper's ABF): mixes a student feature with the mixture of the deeper links."""

    def __init__(self, inputs: int, middle: int, outputs: int, *, fuses: bool) -> None:
        super().__init__()
        self.reduction = _conv_bn(inputs, middle, 1)
        self.gates = nn.Sequential(nn.Conv2d(2 * middle, 2, 1), nn.Sigmoid()) if fuses else None
        self.expansion = _conv_bn(middle, outputs, 3)

    def forward(self, feature: Tensor, deeper: Tensor | None, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Student feature (N,Cs,H,W) and the deeper link's mixture (N,M,h,w), None for the deepest link.

        Returns the prediction of the teacher's feature (N,Ct,*size) and the mixture (N,M,*size) for the next link.
        """
        mixture = cast(Tensor, self.reduction(feature))
        if self.gates is not None and deeper is not None:
            deeper = _resize(deeper, (mixture.shape[2], mixture.shape[3]))
            both = torch.cat([mixture, deeper], 1)
            gates = cast(Tensor, self.gates(both))
            own, other = (torch.unflatten(both, 1, (2, -1)) * gates.unsqueeze(2)).unbind(1)
            # Not a sum over the dimension, whose result would lose the memory format.
            mixture = own + other
        mixture = _resize(mixture, size)
        return self.expansion(mixture), mixture


@DISTILLERS.register("reviewkd")
class ReviewKD(Distiller):
    """The chain goes from the pooled vector, a map of one pixel, to the shallowest stage with a partner.

    The student's features are read after their activation, the teacher's before it. All links mix ``max_channels``
    channels, or those of the student's pooled vector if it has fewer.
    """

    settings: ReviewKDSettings
    reads = frozenset(("preactivations", "pooled"))
    reads_of_student = frozenset(("features", "pooled"))

    def __init__(self, *, settings: ReviewKDSettings, student: Student, teacher: Teacher) -> None:
        super().__init__(settings=settings, student=student, teacher=teacher)
        self._pairs = stage_pairs(student, teacher)[::-1]
        pooled = pooled_width(student)
        middle = min(settings.max_channels, pooled)
        widths = [(pooled, pooled_width(teacher))]
        widths += [(pair.student.channels, pair.teacher.channels) for pair in self._pairs]
        # From deep to shallow.
        self.links = nn.ModuleList(
            AttentionFusion(inputs, middle, outputs, fuses=index > 0) for index, (inputs, outputs) in enumerate(widths)
        )

    def forward(
        self,
        student: Tapped,
        branches: BranchFeatures,  # noqa: ARG002
        teacher: Tapped,
        step: StepContext,
    ) -> dict[str, Tensor]:
        ours = [_as_map(student.pooled), *(student.features[pair.student.name] for pair in self._pairs)]
        theirs = [_as_map(teacher.pooled), *(teacher.preactivations[pair.teacher.name] for pair in self._pairs)]
        predictions, mixture = [], None
        for link, feature, target in zip(self.links, ours, theirs, strict=True):
            prediction, mixture = link(feature, mixture, (target.shape[2], target.shape[3]))
            predictions.append(prediction)
        return {"reviewkd": self.scale(step) * hierarchical_context_loss(predictions, theirs)}


def _conv_bn(inputs: int, outputs: int, kernel: int) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
    nn.init.kaiming_uniform_(conv.weight, a=1)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


def _resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    return x if x.shape[2:] == size else functional.interpolate(x, size, mode="nearest")


def _as_map(vector: Tensor) -> Tensor:
    """(N,D) to (N,D,1,1)."""
    return vector[:, :, None, None]
