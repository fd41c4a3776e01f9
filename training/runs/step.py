"""One step of the training, and what the steps of an epoch draw; the same for every way in which steps are started."""

from collections.abc import Callable
from typing import NamedTuple, cast

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn

from kdexport.students import Tapped
from training.data import epoch_generator
from training.distillers.distiller import StepContext
from training.recipe import TrainSettings
from training.runs.optimiser import learning_rate
from training.runs.task import StepResult
from training.runs.watch import LossSums

#: The frozen teacher's outputs for the student's images; None if nothing is distilled.
Teach = Callable[[Tensor], Tapped | None]


class EpochPlan(NamedTuple):
    """For each of n steps: the orders of the branches (n,L,m), its place in the training and the learning rate (n,)."""

    orders: Tensor
    positions: Tensor
    rates: Tensor


def epoch_plan(
    settings: TrainSettings, epoch: int, *, steps: int, branches: tuple[int, int], device: torch.device
) -> EpochPlan:
    """The plan of ``epoch`` (from 0) on the host, for ``branches`` = (branched layers, branches in each).

    Rates are in the precision in which the optimiser of ``device`` takes them.
    """
    drawn = torch.rand(steps, *branches, generator=epoch_generator(settings.seed + 1, epoch))
    positions = (epoch + torch.arange(steps, dtype=torch.float64) / steps).float()
    # On CUDA the optimiser reads its rate from the device, where it is a float32: rounded here, both forms are equal.
    precision = torch.float32 if device.type == "cuda" else torch.float64
    rates = [learning_rate(settings, epoch + step / steps) for step in range(steps)]
    return EpochPlan(drawn.argsort(2), positions, torch.tensor(rates, dtype=torch.float64).to(precision))


class OptimisationStep:
    """Teacher, student, losses, gradients and the update of the weights, for one batch on the device.

    ``sums`` and ``right`` add up the losses and the number of images that the student got right; the host waits for
    nothing.
    """

    def __init__(
        self,
        task: nn.Module,
        teach: Teach,
        optimizer: torch.optim.Optimizer,
        accelerator: Accelerator,
        *,
        clip_norm: float,
    ) -> None:
        self.task, self.optimizer = task, optimizer
        self._teach, self._accelerator, self._clip_norm = teach, accelerator, clip_norm
        self.sums = LossSums()
        self.right = torch.zeros((), dtype=torch.int64, device=accelerator.device)
        #: The logits (N,K) of each step that is not counted, and the classes (N,) of its images.
        self._answers: list[tuple[Tensor, Tensor]] = []

    @property
    def autocast_to(self) -> torch.dtype | None:
        """The precision in which convolutions and products run; None if it is that of the weights."""
        return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self._accelerator.mixed_precision)

    def clear(self) -> None:
        """Begin an epoch."""
        self.sums.clear()
        self.right.zero_()

    def teach(self, images: Tensor) -> Tapped | None:
        """The frozen teacher's outputs for normalised images (N,3,S,S); None if nothing is distilled."""
        with self._accelerator.autocast():
            return self._teach(images)

    def forward(
        self, images: Tensor, taught: Tapped | None, context: StepContext, task: nn.Module | None = None
    ) -> StepResult:
        """The losses and the logits for normalised images (N,3,S,S), by another form of the task if it is given."""
        with self._accelerator.autocast():
            return cast(StepResult, (task or self.task)(images, taught, context))

    def __call__(self, images: Tensor, context: StepContext) -> None:
        """Train on normalised images (N,3,S,S), with the rate that the optimiser has."""
        self.train(images, self.teach(images), context)
        self.count()

    def train(self, images: Tensor, taught: Tapped | None, context: StepContext) -> None:
        """One step, with what the teacher says of the images; ``count`` adds up what it found."""
        result = self.forward(images, taught, context)
        self.optimizer.zero_grad(set_to_none=True)
        self._backward(self.sums.note(result.losses))
        if self._clip_norm > 0:
            self._accelerator.clip_grad_norm_(self.task.parameters(), self._clip_norm)
        self.optimizer.step()
        wanted = context.labels if context.targets is None else context.targets.argmax(1)
        self._answers.append((result.logits.detach(), wanted.to(self.right.device)))

    def _backward(self, losses: Tensor) -> None:
        """Compute the gradients of the sum of the losses (n,) of a step."""
        own = self._accelerator
        if own.scaler is None and own.distributed_type == DistributedType.NO:
            # Ones are the gradient of a sum. Accelerate would also divide the sum by 1, both ways.
            losses.backward(torch.ones_like(losses))  # type: ignore[no-untyped-call]
        else:
            own.backward(losses.sum())

    def count(self) -> None:
        """Add up the losses and the right answers of the steps since the last call."""
        self.sums.add()
        logits, wanted = (
            values[0] if len(values) == 1 else torch.cat(values) for values in zip(*self._answers, strict=True)
        )
        self._answers.clear()
        self.right += (logits.argmax(1) == wanted).sum()
