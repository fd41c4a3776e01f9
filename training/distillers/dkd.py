"""Decoupled knowledge distillation (Zhao et al., 2022): the target class and the other classes separately."""

from torch import Tensor

from kdexport.students import Tapped
from training.distillers import DISTILLERS
from training.distillers.distiller import BranchFeatures, Distiller, StepContext
from training.distillers.settings import DKDSettings
from training.losses import dkd_loss


@DISTILLERS.register("dkd")
class DKD(Distiller):
    """Two divergences of softened probabilities, each with its own weight."""

    settings: DKDSettings
    reads = frozenset(("logits",))
    needs_one_class = True
    reads_of_student = frozenset()

    def forward(
        self,
        student: Tapped,
        branches: BranchFeatures,  # noqa: ARG002
        teacher: Tapped,
        step: StepContext,
    ) -> dict[str, Tensor]:
        own = self.settings
        loss = dkd_loss(student.logits, teacher.logits, step.labels, own.alpha, own.beta, own.temperature)
        return {"dkd": self.scale(step) * loss}
