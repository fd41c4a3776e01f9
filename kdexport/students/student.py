"""The base of all students: a classifier that can have training branches and be folded."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

from torch import Tensor, nn

from kdexport.students.classifier import IMAGENET_MIN_SIZE, Classifier, Form, Stage, Tap, is_full

__all__ = ["IMAGENET_MIN_SIZE", "Form", "Host", "Stage", "Student", "Tap", "is_full"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Host:
    """The convolution and batch norm that compute the feature of a tap before its activation, shuffle or addition.

    Branches may replace both (placement R1); paths are those of ``nn.Module.get_submodule``.
    """

    tap: str
    conv: str
    batch_norm: str


class Student(Classifier):
    """A classifier whose linear layers may have branches during training.

    ``hosts`` has one entry per stage, from shallow to deep; the last one is the end of the feature extractor.
    ``adapters`` has an identity at every tap, or branches (placement R2).
    """

    name: ClassVar[str]
    hosts: tuple[Host, ...]
    adapters: nn.ModuleDict

    def describe(
        self,
        *,
        num_classes: int,
        image_size: int,
        taps: Sequence[Tap],
        hosts: Sequence[Host],
        classifier_path: str,
    ) -> None:
        """Set the attributes that describe the network; called once, at the end of the constructor of a subclass."""
        self.num_classes, self.image_size = num_classes, image_size
        self.taps, self.hosts, self.classifier_path = tuple(taps), tuple(hosts), classifier_path
        self.adapters = nn.ModuleDict({tap.name: nn.Identity() for tap in self.taps})

    def init_branch(self, conv: nn.Conv2d) -> None:
        """Initialise ``conv`` with fresh weights in the way of this architecture."""
        raise NotImplementedError

    def adapt(self, name: str, feature: Tensor) -> Tensor:
        """The feature of tap ``name`` after the branches at this tap, if there are any."""
        return cast(Tensor, self.adapters[name](feature))
