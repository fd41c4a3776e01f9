"""N-to-one representation matching (Liu et al., 2023, NORM): many student features for one teacher feature."""

from torch import Tensor, nn
from torch.nn import functional

from kdexport.students import Student, Tapped
from training.distillers import DISTILLERS
from training.distillers.distiller import BranchFeatures, Distiller, StepContext
from training.distillers.settings import NORMSettings
from training.losses import many_to_one_loss
from training.teachers import Teacher


@DISTILLERS.register("norm")
class NORM(Distiller):
    """The matching loss only: the student's last feature, expanded to n segments, against the teacher's last feature.

    In the paper the expanded feature also returns to the student, through a second 1x1 convolution and batch norm
    before the pooling, and the chain folds into the classifier. Here a branch that folds is one convolution and one
    batch norm (``kdexport.reparam.BranchSpec`` does not describe a chain of two), so such a student could not be
    exported exactly. The expansion is dropped after training instead. The paper's normalisation of the logits is
    omitted too, because it would change the output of the student.
    """

    settings: NORMSettings
    reads = frozenset(("features",))
    reads_of_student = frozenset(("features",))

    def __init__(self, *, settings: NORMSettings, student: Student, teacher: Teacher) -> None:
        super().__init__(settings=settings, student=student, teacher=teacher)
        width = settings.num_segments * teacher.taps[-1].channels
        conv = nn.Conv2d(student.taps[-1].channels, width, 1, bias=False)
        self.expansion = nn.Sequential(conv, nn.BatchNorm2d(width))

    def forward(
        self,
        student: Tapped,
        branches: BranchFeatures,  # noqa: ARG002
        teacher: Tapped,
        step: StepContext,
    ) -> dict[str, Tensor]:
        height, width = student.last.shape[2:]
        theirs = teacher.last
        # The paper max-pools the teacher's map; if the student's map is larger, it is averaged.
        smaller = (min(height, theirs.shape[2]), min(width, theirs.shape[3]))
        peaks = functional.adaptive_max_pool2d(theirs, smaller)
        ours = functional.adaptive_avg_pool2d(student.last, smaller)
        return {"norm": self.scale(step) * many_to_one_loss(self.expansion(ours), peaks)}
