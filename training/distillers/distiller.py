"""What a method of distillation owns and answers."""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn

from kdexport.reparam.blocks import BranchSpec
from kdexport.students import Student, Tapped
from training.recipe import DistillerSettings
from training.teachers import Teacher

#: What each branch of a layer wrote, (N,C,H,W), by the name of the student's tap.
BranchFeatures = dict[str, list[Tensor]]


@dataclass(frozen=True, kw_only=True, slots=True)
class StepContext:
    """``epoch`` in fractions, and ``order``, this step's random permutation of the branches."""

    epoch: float
    order: tuple[int, ...]


class Distiller(nn.Module):
    """Owns its projections and memory, so that a student checkpoint holds student tensors only."""

    settings: DistillerSettings

    @classmethod
    def branch_spec(cls, settings: DistillerSettings, student: Student, teacher: Teacher) -> BranchSpec | None:
        """The branches that the student must carry for this method, or None."""
        raise NotImplementedError

    def calibrate(self, teacher_taps: Iterable[Tapped]) -> None:
        """Fix statistics of the teacher's features from a few batches, before training."""
        raise NotImplementedError

    def forward(
        self, student: Tapped, branches: BranchFeatures, teacher: Tapped, step: StepContext
    ) -> dict[str, Tensor]:
        """Named scalar losses, weighted, to be added to cross-entropy."""
        raise NotImplementedError
