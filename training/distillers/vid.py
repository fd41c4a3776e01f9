"""Variational information distillation (Ahn et al., 2019): the likelihood of the teacher's features."""

import math
from typing import cast

import torch
from torch import Tensor, nn

from kdexport.students import Student, Tapped
from training.distillers import DISTILLERS
from training.distillers.distiller import BranchFeatures, Distiller, StepContext
from training.distillers.pairs import StagePair, average_to_smaller, stage_pairs
from training.distillers.settings import VIDSettings
from training.losses import MIN_VARIANCE, variational_loss
from training.teachers import Teacher


class GaussianMatch(nn.Module):
    """A Gaussian over a teacher feature: a regression from the student's feature, and a variance for each channel.

    ``raw_scale`` (Ct,) is a parameter that is trained and saved like the regressor; its initial value is the inverse
    softplus of the initial variance.
    """

    def __init__(self, pair: StagePair, initial_variance: float) -> None:
        super().__init__()
        channels = pair.teacher.channels
        self.regressor = nn.Sequential(
            nn.Conv2d(pair.student.channels, channels, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 1, bias=False),
        )
        above = initial_variance - MIN_VARIANCE
        # log(exp(v) - 1) in a form that cannot overflow.
        self.raw_scale = nn.Parameter(torch.full((channels,), above + math.log(-math.expm1(-above))))

    def forward(self, student_feature: Tensor, teacher_feature: Tensor) -> Tensor:
        """The scalar loss of this stage from features (N,Cs,H,W) and (N,Ct,H',W')."""
        ours, theirs = average_to_smaller(student_feature, teacher_feature)
        return variational_loss(self.regressor(ours), theirs, self.raw_scale)


@DISTILLERS.register("vid")
class VID(Distiller):
    """Negative log-likelihood of the teacher's features after their activation, summed over all pairs of stages."""

    settings: VIDSettings
    reads = frozenset(("features",))
    reads_of_student = frozenset(("features",))

    def __init__(self, *, settings: VIDSettings, student: Student, teacher: Teacher) -> None:
        super().__init__(settings=settings, student=student, teacher=teacher)
        self._pairs = stage_pairs(student, teacher)
        matches = {pair.student.name: GaussianMatch(pair, settings.initial_variance) for pair in self._pairs}
        self.matches = nn.ModuleDict(matches)

    def forward(
        self,
        student: Tapped,
        branches: BranchFeatures,  # noqa: ARG002
        teacher: Tapped,
        step: StepContext,
    ) -> dict[str, Tensor]:
        losses = [
            cast(Tensor, self.matches[ours](student.features[ours], teacher.features[theirs]))
            for ours, theirs in ((pair.student.name, pair.teacher.name) for pair in self._pairs)
        ]
        return {"vid": self.scale(step) * torch.stack(losses).sum()}
