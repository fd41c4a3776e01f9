"""The student by itself: the baseline of every method, with the same data, steps and randomness."""

from torch import Tensor

from kdexport.students import Student, Tapped
from training.distillers import DISTILLERS
from training.distillers.distiller import BranchFeatures, Distiller, StepContext
from training.methods import DistillerSettings
from training.teachers import Teacher


@DISTILLERS.register("plain")
class Plain(Distiller):
    """No loss beside the cross-entropy with the labels."""

    def __init__(self, *, settings: DistillerSettings, student: Student, teacher: Teacher) -> None:  # noqa: ARG002
        super().__init__()
        self.settings = settings

    def forward(
        self,
        student: Tapped,  # noqa: ARG002
        branches: BranchFeatures,  # noqa: ARG002
        teacher: Tapped,  # noqa: ARG002
        step: StepContext,  # noqa: ARG002
    ) -> dict[str, Tensor]:
        return {}
