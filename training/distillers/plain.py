"""Training without a teacher: the baseline of every method, with the same data, steps and randomness."""

from torch import Tensor

from kdexport.students import Tapped
from training.distillers import DISTILLERS
from training.distillers.distiller import BranchFeatures, Distiller, StepContext


@DISTILLERS.register("plain")
class Plain(Distiller):
    """No loss except the cross-entropy with the labels."""

    reads = frozenset()
    reads_of_student = frozenset()

    def forward(
        self,
        student: Tapped,  # noqa: ARG002
        branches: BranchFeatures,  # noqa: ARG002
        teacher: Tapped,  # noqa: ARG002
        step: StepContext,  # noqa: ARG002
    ) -> dict[str, Tensor]:
        return {}
