"""DIST (Huang et al., 2022): correlation with the teacher's probabilities instead of equality."""

from torch import Tensor

from kdexport.students import Tapped
from training.distillers import DISTILLERS
from training.distillers.distiller import BranchFeatures, Distiller, StepContext
from training.distillers.settings import DISTSettings
from training.losses import dist_loss


@DISTILLERS.register("dist")
class DIST(Distiller):
    """One minus the correlation, over the classes of each image and over the images for each class."""

    settings: DISTSettings
    reads = frozenset(("logits",))
    reads_of_student = frozenset()

    def forward(
        self,
        student: Tapped,
        branches: BranchFeatures,  # noqa: ARG002
        teacher: Tapped,
        step: StepContext,
    ) -> dict[str, Tensor]:
        own = self.settings
        loss = dist_loss(student.logits, teacher.logits, own.inter_class, own.intra_class, own.temperature)
        return {"dist": self.scale(step) * loss}
