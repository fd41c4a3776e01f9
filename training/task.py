"""One training step as a module: everything that needs a gradient, so that it can be wrapped for several devices."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from kdexport.reparam.blocks import ParallelBranches
from kdexport.students import Classifier, Tapped
from training.distillers import Distiller
from training.distillers.distiller import BranchFeatures, StepContext
from training.teachers import Teacher


@dataclass(frozen=True, slots=True)
class StepResult:
    """Named losses (scalars, weighted) and the logits (N,num_classes)."""

    losses: dict[str, Tensor]
    logits: Tensor


class BranchTaps:
    """Collects what each branch of some ``ParallelBranches`` computed in the last forward pass."""

    def __init__(self, layers: Mapping[str, ParallelBranches]) -> None:
        self._outputs: BranchFeatures = {name: [] for name in layers}
        for name, parallel in layers.items():
            for branch in parallel.branches:
                branch.register_forward_hook(partial(self._collect, name))

    def take(self) -> BranchFeatures:
        """The outputs (N,C,H,W) of each layer in the order of its branches, which are then forgotten."""
        taken, self._outputs = self._outputs, {name: [] for name in self._outputs}
        return taken

    def _collect(self, name: str, module: nn.Module, _inputs: Any, output: Tensor) -> None:
        if module.training:
            self._outputs[name].append(output)


class DistillationTask(nn.Module):
    """Student and distiller: weighted cross-entropy on the mean of the branches plus the distiller's losses."""

    def __init__(self, student: Classifier, distiller: Distiller, layers: Mapping[str, ParallelBranches]) -> None:
        super().__init__()
        self.student, self.distiller = student, distiller
        self._taps = BranchTaps(layers)

    def forward(self, images: Tensor, teacher: Tapped, step: StepContext) -> StepResult:
        tapped = self.student.tapped(images)
        entropy = functional.cross_entropy(tapped.logits.float(), step.labels)
        losses = {"cross_entropy": self.distiller.settings.cross_entropy * entropy}
        losses.update(self.distiller(tapped, self._taps.take(), teacher, step))
        return StepResult(losses, tapped.logits)


class SupervisedTask(nn.Module):
    """A network by itself: cross-entropy."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor, _teacher: None, step: StepContext) -> StepResult:
        logits = self.network(images)
        return StepResult({"cross_entropy": functional.cross_entropy(logits.float(), step.labels)}, logits)


class FrozenTeacher:
    """A teacher in evaluation mode that is never trained; it reads the student's normalised images."""

    def __init__(self, teacher: Teacher, device: torch.device, precision: torch.dtype | None) -> None:
        teacher.to(device).eval().requires_grad_(False).to(memory_format=torch.channels_last)
        self._network = teacher
        self._device, self._precision = device, precision
        self._scale, self._shift = torch.ones((), device=device), torch.zeros((), device=device)

    def renormalise(self, scale: Tensor, shift: Tensor) -> None:
        """Map the student's normalised pixels to the teacher's: x * scale + shift, each (1,3,1,1)."""
        self._scale, self._shift = scale.to(self._device), shift.to(self._device)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tapped:
        """Features and logits for the student's input (N,3,S,S)."""
        own = images * self._scale + self._shift
        enabled = self._precision is not None
        with torch.autocast(self._device.type, dtype=self._precision, enabled=enabled):
            return self._network.tapped(own)
