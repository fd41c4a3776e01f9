"""The base of all methods of distillation."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn

from kdexport.reparam.blocks import BranchSpec
from kdexport.students import Student, Tapped
from training.distillers.settings import DistillerSettings
from training.teachers import Teacher

#: The outputs (N,C,H,W) of the branches of each layer, by the name of the student's tap.
BranchFeatures = dict[str, list[Tensor]]
#: What a method reads of a network: maps at taps after and before their activation, the vector that its classifier
#: reads, and its logits.
Output = Literal["features", "preactivations", "pooled", "logits"]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class StepContext:
    """The time of a step in the training and its random draws; all are tensors, so no step waits for the device.

    ``epoch`` () is fractional. ``orders`` (L,m) has a random permutation of the m branches for each of L layers.
    ``labels`` (N,) are the classes of the batch, and ``samples`` (N,) its indices in the training set. ``targets``
    (N,K) are the parts of the classes in images that are mixed with others; None for whole images.
    """

    epoch: Tensor
    orders: Tensor
    labels: Tensor
    samples: Tensor
    targets: Tensor | None = None


class Distiller(nn.Module):
    """A method with its own projections and memories, so that a student checkpoint has only tensors of the student.

    A constructor must accept any weights of the teacher: before a run, methods are built with a teacher of ones.
    """

    settings: DistillerSettings
    #: What the method reads of the teacher; a method that does not say is taken to read everything.
    reads: ClassVar[frozenset[Output]] = frozenset(("features", "preactivations", "pooled", "logits"))
    #: What the method reads of the student besides its logits.
    reads_of_student: ClassVar[frozenset[Output]] = frozenset(("features", "preactivations", "pooled"))
    #: Whether the method reads the one class of an image, which an image that is mixed of two does not have.
    needs_one_class: ClassVar[bool] = False
    #: Whether ``calibrate`` gets the batches of one process of several, and merges what it measures over all of them.
    #: Otherwise every process gets the batches of all.
    calibrates_by_share: ClassVar[bool] = False
    #: Whether an image may occur only once in a batch of all processes.
    needs_distinct_images: ClassVar[bool] = False

    def __init__(self, *, settings: DistillerSettings, student: Student, teacher: Teacher) -> None:  # noqa: ARG002
        super().__init__()
        self.settings = settings

    @classmethod
    def outputs_read(cls, settings: DistillerSettings) -> frozenset[Output]:  # noqa: ARG003
        """What the method reads of the teacher with ``settings``."""
        return cls.reads

    @classmethod
    def branch_spec(
        cls,
        settings: DistillerSettings,  # noqa: ARG003
        student: Student,  # noqa: ARG003
        teacher: Teacher,  # noqa: ARG003
    ) -> BranchSpec | None:
        """The branches that this method attaches to the student, or None."""
        return None

    def prepare(self, labels: Tensor) -> None:  # noqa: ARG002
        """Receive the classes (n,) of all training images; called before training and before a state is loaded."""
        return

    def calibrate(self, teacher_taps: Iterable[Tapped]) -> None:  # noqa: ARG002
        """Set statistics of the teacher's features from a few batches, before training.

        The teacher computes a batch when it is taken, so that one batch at a time is in memory if none is kept.
        """
        return

    def forward(
        self, student: Tapped, branches: BranchFeatures, teacher: Tapped, step: StepContext
    ) -> dict[str, Tensor]:
        """Named, weighted scalar losses, which are added to the cross-entropy."""
        raise NotImplementedError

    def scale(self, step: StepContext) -> Tensor:
        """The weight () of the method's loss at this step, with its ramp."""
        weight, epochs = self.settings.weight, self.settings.ramp_epochs
        return step.epoch.new_full((), weight) if epochs == 0 else (step.epoch * (weight / epochs)).clamp(max=weight)

    def ramp(self, step: StepContext) -> Tensor:
        """The fraction () of the ramp that is done."""
        epochs = self.settings.ramp_epochs
        return step.epoch.new_ones(()) if epochs == 0 else (step.epoch / epochs).clamp(max=1.0)
