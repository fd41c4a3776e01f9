"""What methods with parallel branches have in common: bridges to the teacher's channels, its statistics, pairs."""

import math
from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from kdexport.reparam.blocks import BranchSpec
from kdexport.students import Student, Tapped
from training.distillers.distiller import BranchFeatures, Distiller, StepContext
from training.methods import BranchedSettings, DistillerSettings
from training.pairs import Pair, paired_stages
from training.teachers import Teacher


class LayerMatch(nn.Module):
    """One pair of stages: a shared 1x1 bridge for R1 branches and the teacher's statistics.

    R1 branches keep the student's channels and reach the teacher's through the bridge, which is dropped after training;
    R2 adapters write the teacher's channels themselves.
    """

    teacher_mean: Tensor
    teacher_std: Tensor

    def __init__(self, settings: BranchedSettings, pair: Pair, *, student_size: int, teacher_size: int) -> None:
        super().__init__()
        channels = pair.teacher_channels
        self._side = min(math.ceil(student_size / pair.student_stride), math.ceil(teacher_size / pair.teacher_stride))
        self.bridge: nn.Module = nn.Identity()
        if settings.placement == "R1":
            conv = nn.Conv2d(pair.student_channels, channels, 1, bias=False)
            nn.init.kaiming_normal_(conv.weight, nonlinearity="linear")
            self.bridge = nn.Sequential(conv, nn.BatchNorm2d(channels))
        self.register_buffer("teacher_mean", torch.zeros(1, channels, 1, 1))
        self.register_buffer("teacher_std", torch.ones(1, channels, 1, 1))

    def calibrate(self, teacher_features: Iterable[Tensor]) -> None:
        """Take mean and deviation of each channel from features (N,Ct,H,W)."""
        features = torch.cat([self._pool(feature.double()).cpu() for feature in teacher_features])
        variance, mean = torch.var_mean(features, dim=(0, 2, 3), keepdim=True)
        self.teacher_mean.copy_(mean)
        # A channel that is always zero after its ReLU has nothing to teach and must not be blown up.
        self.teacher_std.copy_(variance.sqrt().clamp(min=1e-3))

    def forward(self, branch_features: list[Tensor], teacher_feature: Tensor) -> tuple[list[Tensor], Tensor]:
        """m branch features (N,C,H,W) and the teacher's (N,Ct,H',W') in one space: m of (N,Ct,h,w), and one."""
        stacked = torch.stack(branch_features)
        count, batch = stacked.shape[:2]
        target = (self._pool(teacher_feature.float()) - self.teacher_mean) / self.teacher_std
        bridged = cast(Tensor, self.bridge(self._pool(stacked.flatten(0, 1)))).float()
        return list(torch.unflatten(bridged, 0, (count, batch)).unbind(0)), target

    def _pool(self, feature: Tensor) -> Tensor:
        # The larger map is averaged down to the smaller, the convention of AT and VID.
        return functional.adaptive_avg_pool2d(feature, self._side)


class BranchedDistiller(Distiller):
    """The branches of each layer against the teacher's feature; the loss is the mean over the layers."""

    settings: BranchedSettings
    #: What its loss is called.
    loss_name: str

    def __init__(self, *, settings: BranchedSettings, student: Student, teacher: Teacher) -> None:
        super().__init__()
        self.settings = settings
        self._pairs = paired_stages(student, teacher, settings.layers)
        sizes = {"student_size": student.image_size, "teacher_size": teacher.image_size}
        self.layers = nn.ModuleDict({pair.student: LayerMatch(settings, pair, **sizes) for pair in self._pairs})

    @classmethod
    def branch_spec(cls, settings: DistillerSettings, student: Student, teacher: Teacher) -> BranchSpec:
        assert isinstance(settings, BranchedSettings)
        pairs = paired_stages(student, teacher, settings.layers)
        channels = tuple(pair.teacher_channels for pair in pairs) if settings.placement == "R2" else None
        return BranchSpec(
            placement=settings.placement,
            num_branches=settings.num_branches,
            adapter_channels=channels,
            layers=tuple(pair.student for pair in pairs),
        )

    def calibrate(self, teacher_taps: Iterable[Tapped]) -> None:
        if not self.settings.standardise_teacher:
            return
        batches = list(teacher_taps)
        for pair in self._pairs:
            self._layer(pair).calibrate(batch.features[pair.teacher] for batch in batches)

    def distance(self, branches: list[Tensor], target: Tensor, step: StepContext, layer: int) -> Tensor:
        """m bridged branches and their target, each (N,Ct,h,w), to the scalar loss of layer number ``layer``."""
        raise NotImplementedError

    def forward(
        self,
        student: Tapped,  # noqa: ARG002
        branches: BranchFeatures,
        teacher: Tapped,
        step: StepContext,
    ) -> dict[str, Tensor]:
        losses = []
        for index, pair in enumerate(self._pairs):
            bridged, target = self._layer(pair)(branches[pair.student], teacher.features[pair.teacher])
            losses.append(self.distance(bridged, target, step, index))
        return {self.loss_name: self.scale(step) * torch.stack(losses).mean()}

    def _layer(self, pair: Pair) -> LayerMatch:
        return cast(LayerMatch, self.layers[pair.student])
