"""A classifier that can carry training branches and be folded."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

from torch import Tensor, nn

from kdexport.students.classifier import IMAGENET_MIN_SIZE, Classifier, Stage, Tap

__all__ = ["IMAGENET_MIN_SIZE", "Host", "Stage", "Student", "Tap"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Host:
    """The convolution and the batch norm that write the feature of a tap before its activation, shuffle or addition.

    Branches may take the place of both (placement R1); paths are those of ``nn.Module.get_submodule``.
    """

    tap: str
    conv: str
    batch_norm: str


class Student(Classifier):
    """A classifier whose linear parts may be branched while it is trained.

    ``hosts`` has one entry per stage, shallow to deep; the last one ends the feature extractor. ``adapters`` has the
    identity at every tap unless branches sit there (placement R2).
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
        """State what the network is; called once, at the end of a subclass's constructor."""
        self.num_classes, self.image_size = num_classes, image_size
        self.taps, self.hosts, self.classifier_path = tuple(taps), tuple(hosts), classifier_path
        self.adapters = nn.ModuleDict({tap.name: nn.Identity() for tap in self.taps})

    def init_branch(self, conv: nn.Conv2d) -> None:
        """Draw fresh weights for ``conv`` by the law that this architecture is initialised with."""
        raise NotImplementedError

    def adapt(self, name: str, feature: Tensor) -> Tensor:
        """What goes on from tap ``name``: through the branches that sit there, if any."""
        return cast(Tensor, self.adapters[name](feature))
