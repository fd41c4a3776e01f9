"""What a method of distillation owns and answers."""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn

from kdexport.reparam.blocks import BranchSpec
from kdexport.students import Student, Tapped
from training.distillers.settings import DistillerSettings
from training.teachers import Teacher

#: What each branch of a layer wrote, (N,C,H,W), by the name of the student's tap.
BranchFeatures = dict[str, list[Tensor]]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class StepContext:
    """Where a step stands in the training, and what it has drawn; tensors, so that no step waits for the device.

    ``epoch`` () counts in fractions. ``orders`` (L,m) is a random permutation of the m branches for each of L layers.
    ``labels`` (N,) are the classes of the batch and ``samples`` (N,) its places in the training set.
    """

    epoch: Tensor
    orders: Tensor
    labels: Tensor
    samples: Tensor


class Distiller(nn.Module):
    """Owns its projections and memory, so that a student checkpoint holds student tensors only."""

    settings: DistillerSettings

    def __init__(self, *, settings: DistillerSettings, student: Student, teacher: Teacher) -> None:  # noqa: ARG002
        super().__init__()
        self.settings = settings

    @classmethod
    def branch_spec(
        cls,
        settings: DistillerSettings,  # noqa: ARG003
        student: Student,  # noqa: ARG003
        teacher: Teacher,  # noqa: ARG003
    ) -> BranchSpec | None:
        """The branches that the student must carry for this method, or None."""
        return None

    def prepare(self, labels: Tensor) -> None:  # noqa: ARG002
        """Learn the classes (n,) of all training images, before training and before any state is loaded."""
        return

    def calibrate(self, teacher_taps: Iterable[Tapped]) -> None:  # noqa: ARG002
        """Fix statistics of the teacher's features from a few batches, before training."""
        return

    def forward(
        self, student: Tapped, branches: BranchFeatures, teacher: Tapped, step: StepContext
    ) -> dict[str, Tensor]:
        """Named scalar losses, weighted, to be added to cross-entropy."""
        raise NotImplementedError

    def scale(self, step: StepContext) -> Tensor:
        """The weight of the method's loss at this step, (), after its ramp."""
        return self.settings.weight * self.ramp(step)

    def ramp(self, step: StepContext) -> Tensor:
        """The share of the ramp that is done, ()."""
        epochs = self.settings.ramp_epochs
        return step.epoch.new_ones(()) if epochs == 0 else (step.epoch / epochs).clamp(max=1.0)
