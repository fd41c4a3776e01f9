"""Attention transfer (Zagoruyko & Komodakis, 2017): the positions of an image where each stage is active."""

from torch import Tensor

from kdexport.students import Student, Tapped
from training.distillers import DISTILLERS
from training.distillers.distiller import BranchFeatures, Distiller, StepContext
from training.distillers.pairs import stage_pairs
from training.distillers.settings import ATSettings
from training.losses import attention_transfer_loss
from training.teachers import Teacher


@DISTILLERS.register("at")
class AT(Distiller):
    """Distance of the normalised attention maps after the activation, summed over all pairs of stages."""

    settings: ATSettings
    reads = frozenset(("features",))
    reads_of_student = frozenset(("features",))

    def __init__(self, *, settings: ATSettings, student: Student, teacher: Teacher) -> None:
        super().__init__(settings=settings, student=student, teacher=teacher)
        self._pairs = stage_pairs(student, teacher)

    def forward(
        self,
        student: Tapped,
        branches: BranchFeatures,  # noqa: ARG002
        teacher: Tapped,
        step: StepContext,
    ) -> dict[str, Tensor]:
        ours = [student.features[pair.student.name] for pair in self._pairs]
        theirs = [teacher.features[pair.teacher.name] for pair in self._pairs]
        return {"at": self.scale(step) * attention_transfer_loss(ours, theirs, self.settings.power)}
