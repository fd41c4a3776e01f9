"""Overhaul of feature distillation (Heo et al., 2019, OFD): features before their activation, beyond a margin."""

import math
from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from kdexport.students import Student, Tapped
from training.distillers import DISTILLERS
from training.distillers.distiller import BranchFeatures, Distiller, StepContext
from training.losses import overhaul_loss, overhaul_margin
from training.margins import channel_moments, measured_margin, writing_batch_norms
from training.methods import OFDSettings
from training.pairs import StagePair, stage_pairs
from training.teachers import Teacher


class MarginMatch(nn.Module):
    """One pair of stages: a 1x1 convolution and a batch norm to the teacher's channels, and the teacher's margin (Ct,).

    The margin is not a number until it is known, so that training without calibration does not pass unseen.
    """

    margin: Tensor

    def __init__(self, pair: StagePair) -> None:
        super().__init__()
        channels = pair.teacher.channels
        conv = nn.Conv2d(pair.student.channels, channels, 1, bias=False)
        nn.init.normal_(conv.weight, std=math.sqrt(2.0 / channels))
        self.connector = nn.Sequential(conv, nn.BatchNorm2d(channels))
        self.register_buffer("margin", torch.full((channels,), math.nan))

    def forward(self, student_feature: Tensor, teacher_feature: Tensor) -> Tensor:
        """Pre-activations (N,Cs,h,w) and (N,Ct,H,W) to the scalar loss of this stage."""
        return overhaul_loss(self.connector(student_feature), teacher_feature, self.margin)


@DISTILLERS.register("ofd")
class OFD(Distiller):
    """Partial squared distance of pre-activations; each stage weighs half of the next deeper one.

    Margins come from the teacher's batch norms; stages that no batch norm writes are measured by ``calibrate`` (see
    ``training.margins``). The teacher stays in evaluation mode, where the authors' code runs it in training mode and
    so lets its statistics drift.
    """

    settings: OFDSettings

    def __init__(self, *, settings: OFDSettings, student: Student, teacher: Teacher) -> None:
        super().__init__(settings=settings, student=student, teacher=teacher)
        self._pairs = stage_pairs(student, teacher)
        self.matches = nn.ModuleDict({pair.student.name: MarginMatch(pair) for pair in self._pairs})
        writers = writing_batch_norms(teacher)
        self._measured = tuple(pair for pair in self._pairs if pair.teacher.name not in writers)
        for pair in self._pairs:
            if pair.teacher.name in writers:
                batch_norm = cast(_BatchNorm, teacher.get_submodule(writers[pair.teacher.name]))
                self._match(pair).margin.copy_(overhaul_margin(batch_norm))

    def calibrate(self, teacher_taps: Iterable[Tapped]) -> None:
        if not self._measured:
            return
        totals: dict[StagePair, Tensor] = {}
        for taps in teacher_taps:
            for pair in self._measured:
                moments = channel_moments(taps.preactivations[pair.teacher.name])
                totals[pair] = totals[pair] + moments if pair in totals else moments
        for pair, total in totals.items():
            self._match(pair).margin.copy_(measured_margin(total))

    def forward(
        self,
        student: Tapped,
        branches: BranchFeatures,  # noqa: ARG002
        teacher: Tapped,
        step: StepContext,
    ) -> dict[str, Tensor]:
        losses = []
        for depth, pair in enumerate(reversed(self._pairs)):
            ours, theirs = student.preactivations[pair.student.name], teacher.preactivations[pair.teacher.name]
            losses.append(self._match(pair)(ours, theirs) / 2**depth)
        return {"ofd": self.scale(step) * torch.stack(losses).sum()}

    def _match(self, pair: StagePair) -> MarginMatch:
        return cast(MarginMatch, self.matches[pair.student.name])
