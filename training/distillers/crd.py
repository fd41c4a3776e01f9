"""Contrastive representation distillation (Tian et al., 2020): which image a pooled vector is of, among many."""

from torch import Tensor, nn
from torch.nn import functional

from kdexport.students import Student, Tapped
from training.contrast import ContrastMemory
from training.distillers import DISTILLERS
from training.distillers.distiller import BranchFeatures, Distiller, StepContext
from training.methods import CRDSettings
from training.pairs import pooled_width
from training.quadratic import full_precision
from training.teachers import Teacher


@DISTILLERS.register("crd")
class CRD(Distiller):
    """Pooled vectors of both networks, projected to one space, against the memory of each other.

    In several processes the memory is the same in all of them, and an image may be in a global batch once.
    """

    settings: CRDSettings
    memory: ContrastMemory

    def __init__(self, *, settings: CRDSettings, student: Student, teacher: Teacher) -> None:
        super().__init__(settings=settings, student=student, teacher=teacher)
        self.student_projection = nn.Linear(pooled_width(student), settings.dimension)
        self.teacher_projection = nn.Linear(pooled_width(teacher), settings.dimension)

    def prepare(self, labels: Tensor) -> None:
        settings = self.settings
        self.memory = ContrastMemory(
            labels,
            dimension=settings.dimension,
            negatives=settings.negatives,
            temperature=settings.temperature,
            momentum=settings.momentum,
        )

    def forward(
        self,
        student: Tapped,
        branches: BranchFeatures,  # noqa: ARG002
        teacher: Tapped,
        step: StepContext,
    ) -> dict[str, Tensor]:
        # Exponentials of 1/T times a rounding error: low precision would end in other probabilities.
        with full_precision(student.pooled.device):
            own = _embedded(self.student_projection, student.pooled)
            given = _embedded(self.teacher_projection, teacher.pooled)
            loss = self.memory(own, given, step.samples)
        return {"crd": self.scale(step) * loss}


def _embedded(projection: nn.Linear, pooled: Tensor) -> Tensor:
    return functional.normalize(projection(pooled.to(projection.weight.dtype)))
