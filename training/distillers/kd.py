"""Knowledge distillation (Hinton et al., 2015): the teacher's softened probabilities."""

from torch import Tensor

from kdexport.students import Tapped
from training.distillers import DISTILLERS
from training.distillers.distiller import BranchFeatures, Distiller, StepContext
from training.distillers.settings import KDSettings
from training.losses import kd_loss


@DISTILLERS.register("kd")
class KD(Distiller):
    """Divergence of the student's probabilities from the teacher's, both at one temperature."""

    settings: KDSettings
    reads = frozenset(("logits",))
    reads_of_student = frozenset()

    def forward(
        self,
        student: Tapped,
        branches: BranchFeatures,  # noqa: ARG002
        teacher: Tapped,
        step: StepContext,
    ) -> dict[str, Tensor]:
        return {"kd": self.scale(step) * kd_loss(student.logits, teacher.logits, self.settings.temperature)}
