"""One training step as a module that can be compiled and wrapped for several devices, and the frozen teacher."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from kdexport.reparam.branches import ParallelBranches
from kdexport.students import Classifier, Tapped
from training.devices import compiled
from training.distillers.branched import BranchedDistiller
from training.distillers.distiller import BranchFeatures, Distiller, StepContext
from training.distillers.diversity import as_floats
from training.runs.supervision import Supervision
from training.teachers import Teacher
from training.teachers.folding import folded


@dataclass(frozen=True, slots=True)
class StepResult:
    """Named losses (scalars, weighted) and the logits (N,num_classes)."""

    losses: dict[str, Tensor]
    logits: Tensor


class BranchTaps:
    """Collects the outputs of each branch of ``ParallelBranches`` between ``start`` and ``take``, in any mode."""

    def __init__(self, layers: Mapping[str, ParallelBranches]) -> None:
        self._outputs: BranchFeatures = {name: [] for name in layers}
        self._collects = False
        for name, parallel in layers.items():
            for branch in parallel.branches:
                branch.register_forward_hook(partial(self._collect, name))

    def start(self) -> None:
        """Collect from now on; evaluation does not, because nothing would take its outputs."""
        self._collects = True

    def take(self) -> BranchFeatures:
        """The outputs (N,C,H,W) of each layer in the order of its branches; stops collecting."""
        taken, self._outputs = self._outputs, {name: [] for name in self._outputs}
        self._collects = False
        return taken

    def _collect(self, name: str, _module: nn.Module, _inputs: Any, output: Tensor) -> None:
        if self._collects:
            self._outputs[name].append(output)


class DistillationTask(nn.Module):
    """Student and distiller: the weighted cross-entropy of the student, plus the distiller's losses."""

    def __init__(
        self,
        student: Classifier,
        distiller: Distiller,
        layers: Mapping[str, ParallelBranches],
        supervision: Supervision | None = None,
    ) -> None:
        super().__init__()
        self.student, self.distiller, self.supervision = student, distiller, supervision or Supervision()
        self._taps = BranchTaps(layers)

    def forward(self, images: Tensor, teacher: Tapped, step: StepContext) -> StepResult:
        self._taps.start()
        tapped = self.student.tapped(images)
        branches = self._taps.take()
        entropy = self.supervision(tapped.logits, step)
        weight = self.distiller.settings.cross_entropy
        losses = {"cross_entropy": entropy if weight == 1 else weight * entropy}
        losses.update(self.distiller(tapped, branches, teacher, step))
        return StepResult(losses, tapped.logits)

    @torch.no_grad()
    def diversity(self, images: Tensor, teacher: Tapped) -> dict[str, float]:
        """How the branches differ on normalised images (N,3,S,S), in evaluation mode; the task does not change.

        Raises ``TypeError`` for a distiller without branches.
        """
        if not isinstance(self.distiller, BranchedDistiller):
            raise TypeError(f"{type(self.distiller).__name__} has no branches to compare")
        was_training = self.student.training
        self.student.eval()
        self._taps.start()
        tapped = self.student.tapped(images)
        measured = self.distiller.diversity(tapped, self._taps.take(), teacher)
        self.student.train(was_training)
        return as_floats(measured)


class SupervisedTask(nn.Module):
    """A network that is trained with cross-entropy only."""

    def __init__(self, network: nn.Module, supervision: Supervision | None = None) -> None:
        super().__init__()
        self.network, self.supervision = network, supervision or Supervision()

    def forward(self, images: Tensor, _teacher: None, step: StepContext) -> StepResult:
        logits = self.network(images)
        return StepResult({"cross_entropy": self.supervision(logits, step)}, logits)


class _Taps(nn.Module):
    """A network whose forward pass is ``tapped``."""

    def __init__(self, network: Teacher) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tapped:
        return self.network.tapped(images)


class FrozenTeacher:
    """A teacher in evaluation mode that is never trained; it reads the student's normalised images.

    A copy with folded batch norms runs; ``teacher`` keeps all its layers, which distillers may read.
    """

    def __init__(
        self, teacher: Teacher, device: torch.device, precision: torch.dtype | None, compiling: str = "no"
    ) -> None:
        teacher.to(device).eval().requires_grad_(False).to(memory_format=torch.channels_last)
        network = folded(teacher, precision).to(memory_format=torch.channels_last)
        self._taps = compiled(_Taps(network), compiling, device)
        self._device, self._precision = device, precision
        self._renormalises, self._image_size = False, 0
        self._scale, self._shift = torch.ones((), device=device), torch.zeros((), device=device)

    def renormalise(self, scale: Tensor, shift: Tensor) -> None:
        """Map the student's normalised pixels to the teacher's: x * scale + shift, each (1,3,1,1)."""
        self._scale, self._shift = scale.to(self._device), shift.to(self._device)
        self._renormalises = True

    def resize(self, image_size: int) -> None:
        """Resize the student's images to ``image_size`` pixels a side before the teacher reads them."""
        self._image_size = image_size

    # Not inference mode: a loss may save a feature of the teacher for its gradient.
    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tapped:
        """Features and logits for the student's input (N,3,S,S)."""
        own = torch.addcmul(self._shift, images, self._scale) if self._renormalises else images
        if self._image_size and own.shape[-1] != self._image_size:
            own = _resized(own, self._image_size)
        enabled = self._precision is not None
        with torch.autocast(self._device.type, dtype=self._precision, enabled=enabled):
            return cast(Tapped, self._taps(own))


def _resized(images: Tensor, side: int) -> Tensor:
    """Images (N,3,H,W) as (N,3,side,side), bilinear, and averaged where they become smaller."""
    size = (side, side)
    resized = functional.interpolate(images.float(), size, mode="bilinear", align_corners=False, antialias=True)
    return resized.contiguous(memory_format=torch.channels_last)
