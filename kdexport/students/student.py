"""What every student tells about itself, without being run."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

#: Below this many pixels a side the small-image (CIFAR) definition of an architecture is built.
IMAGENET_MIN_SIZE = 128


@dataclass(frozen=True, kw_only=True, slots=True)
class Tap:
    """A feature that can be read off a network: the output (N, channels, H/stride, W/stride) of one module."""

    name: str
    module: str
    channels: int
    stride: int


class Student(nn.Module):
    """A classifier: features (N,C,H,W), an optional linear adapter, global average pooling, a linear classifier.

    ``last_host`` names the convolution and the batch norm that end the feature extractor: branches may take their place
    (placement R1). ``adapter`` is the identity unless branches sit there (placement R2). ``classifier_path`` names the
    linear layer that follows the pooling.
    """

    name: ClassVar[str]
    image_size: int
    num_classes: int
    taps: tuple[Tap, ...]
    last_host: tuple[str, str]
    classifier_path: str
    adapter: nn.Module

    def extract(self, images: Tensor) -> Tensor:
        """(N,3,H,W) normalised images to the last feature (N,C,h,w), after its activation."""
        raise NotImplementedError

    def classify(self, feature: Tensor) -> Tensor:
        """(N,C,h,w) features, adapted or not, to logits (N,num_classes)."""
        raise NotImplementedError

    def init_branch(self, conv: nn.Conv2d) -> None:
        """Draw fresh weights for ``conv`` by the law that this architecture is initialised with."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> Tensor:
        """(N,3,H,W) normalised images to logits (N,num_classes)."""
        return self.classify(self.adapter(self.extract(images)))
