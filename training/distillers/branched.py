"""The base of methods with parallel branches: pairs of stages, bridges to the teacher's channels, its statistics."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from kdexport.reparam.blocks import BranchSpec
from kdexport.students import Student, Tapped
from training.channel_moments import ChannelMoments
from training.distillers.distiller import BranchFeatures, Distiller, Output, StepContext
from training.distillers.diversity import branch_diversity
from training.distillers.guide import TargetGuide
from training.distillers.pairs import Pair, paired_stages
from training.distillers.settings import BranchedSettings, DistillerSettings
from training.losses import kd_loss
from training.quadratic import Form, on_device
from training.teachers import Teacher

#: Features of so many images are pooled in double precision together.
_PART = 16


class LayerMatch(nn.Module):
    """One pair of stages: the statistics of the teacher's feature, and a 1x1 bridge that R1 branches share.

    R1 branches have the student's channels; the bridge, which is dropped after training, maps them to the teacher's. R2
    adapters have the teacher's channels.
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

    def observe(self, teacher_feature: Tensor, moments: ChannelMoments) -> None:
        """Take a feature (N,Ct,H,W) into the ``moments`` of this layer, in the size in which it is compared."""
        for start in range(0, len(teacher_feature), _PART):
            moments.add(self._pool(teacher_feature[start : start + _PART].double()))

    def calibrate(self, moments: ChannelMoments) -> None:
        """Set the mean and standard deviation of each channel."""
        mean, variance = (values.reshape(1, -1, 1, 1) for values in moments.over_all_processes())
        self.teacher_mean.copy_(mean)
        # A channel that is always zero after its ReLU has no information and must not be scaled up.
        self.teacher_std.copy_(variance.sqrt().clamp(min=1e-3))

    def forward(self, branch_features: list[Tensor], teacher_feature: Tensor) -> tuple[Tensor, Tensor]:
        """Map m branch features (N,C,H,W) and the teacher's (N,Ct,H',W') to one space: (m,N,Ct,h,w) and (N,Ct,h,w)."""
        together = torch.cat([self._pool(feature) for feature in branch_features])
        target = (self._pool(_precise(teacher_feature)) - self.teacher_mean) / self.teacher_std
        bridged = _precise(cast(Tensor, self.bridge(together)))
        return torch.unflatten(bridged, 0, (len(branch_features), -1)), target

    def in_teacher_scale(self, standardised: Tensor) -> Tensor:
        """Map features (...,Ct,h,w) from the space of ``forward`` back to the scale of the teacher."""
        return standardised * self.teacher_std + self.teacher_mean

    def _pool(self, feature: Tensor) -> Tensor:
        # The larger map is averaged to the size of the smaller, the convention of AT and VID.
        if feature.shape[-2:] == (self._side, self._side):
            return feature
        return functional.adaptive_avg_pool2d(feature, self._side)


class BranchedDistiller(Distiller):
    """Compares the branches of each layer with the teacher's feature; the loss is the mean over the layers."""

    settings: BranchedSettings
    #: Branches are read themselves.
    reads_of_student = frozenset()
    calibrates_by_share = True
    #: The name of the loss.
    loss_name: str

    def __init__(self, *, settings: BranchedSettings, student: Student, teacher: Teacher) -> None:
        super().__init__(settings=settings, student=student, teacher=teacher)
        self._pairs = paired_stages(student, teacher, settings.layers)
        sizes = {"student_size": student.image_size, "teacher_size": teacher.image_size}
        self.layers = nn.ModuleDict({pair.student: LayerMatch(settings, pair, **sizes) for pair in self._pairs})
        self._guide = TargetGuide(teacher) if settings.target_guide > 0 else None

    @classmethod
    def outputs_read(cls, settings: DistillerSettings) -> frozenset[Output]:
        assert isinstance(settings, BranchedSettings)
        feature: Output = "features" if settings.teacher_feature == "post_activation" else "preactivations"
        # The target guide reads the weight of the teacher's classifier, but not what its outputs stand for.
        return frozenset((feature, "logits")) if settings.kd_weight > 0 else frozenset((feature,))

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
        standardised = self.settings.teacher_normalisation == "standardised"
        moments = {pair.student: ChannelMoments() for pair in self._pairs if standardised}
        if self._guide is None and not moments:
            return
        for taps in teacher_taps:
            if self._guide is not None:
                self._guide.observe(taps)
            for pair in self._pairs if standardised else ():
                self._layer(pair).observe(self._target(taps, pair), moments[pair.student])
            # The features of this batch, before those of the next one are computed.
            del taps
        if self._guide is not None:
            self._guide.decide(self.settings.teacher_feature)
        for pair in self._pairs if standardised else ():
            self._layer(pair).calibrate(moments[pair.student])

    def order(self, step: StepContext, layer: int) -> Tensor | None:  # noqa: ARG002
        """The order of the branches of layer number ``layer``, (m,) or (N,m); None if the method uses no order."""
        return None

    def distance(self, branches: Tensor, target: Tensor, order: Tensor | None) -> Tensor:
        """The scalar loss of a layer from m bridged branches (m,N,Ct,h,w) and their target (N,Ct,h,w)."""
        raise NotImplementedError

    def guided(self, branches: Tensor, order: Tensor | None) -> Tensor:  # noqa: ARG002
        """The features (k,N,Ct,h,w) that the target guide compares, from m bridged branches: here their mean."""
        return branches.mean(0, keepdim=True)

    def loss_form(self) -> Form | None:
        """The matrix F (m,m) of the expected loss e' F e of the branch errors; None if the loss has no such form."""
        raise NotImplementedError

    def forward(
        self, student: Tapped, branches: BranchFeatures, teacher: Tapped, step: StepContext
    ) -> dict[str, Tensor]:
        settings, losses = self.settings, []
        for index, pair in enumerate(self._pairs):
            bridged, target = self._layer(pair)(branches[pair.student], self._target(teacher, pair))
            order = self.order(step, index)
            losses.append(self.distance(bridged, target, order))
        named = {self.loss_name: self.scale(step) * torch.stack(losses).mean()}
        if self._guide is not None:
            # The deepest pair is last; the teacher's classifier reads its stage.
            layer = self._layer(self._pairs[-1])
            compared = layer.in_teacher_scale(self.guided(bridged, order))
            guide = self._guide.distance(compared, layer.in_teacher_scale(target))
            named["guide"] = settings.target_guide * self.ramp(step) * guide
        if settings.kd_weight > 0:
            named["kd"] = settings.kd_weight * kd_loss(student.logits, teacher.logits, settings.kd_temperature)
        return named

    @torch.no_grad()
    def diversity(
        self,
        student: Tapped,  # noqa: ARG002
        branches: BranchFeatures,
        teacher: Tapped,
    ) -> dict[str, Tensor]:
        """How the branches of each layer differ on one batch: the scalars of ``BranchDiversity`` by layer and name.

        The bridges are in evaluation mode meanwhile; this module does not change.
        """
        form, named = self.loss_form(), {}
        with _evaluating(self):
            for pair in self._pairs:
                bridged, target = self._layer(pair)(branches[pair.student], self._target(teacher, pair))
                measured = branch_diversity(bridged, target, None if form is None else on_device(form, bridged))
                named.update({f"{pair.student}/{name}": value for name, value in measured.scalars().items()})
        return named

    def _target(self, teacher: Tapped, pair: Pair) -> Tensor:
        after = self.settings.teacher_feature == "post_activation"
        return (teacher.features if after else teacher.preactivations)[pair.teacher]

    def _layer(self, pair: Pair) -> LayerMatch:
        return cast(LayerMatch, self.layers[pair.student])


def _precise(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training
