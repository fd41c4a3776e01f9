"""The base of all networks, students and teachers: a description of the network, and access to its features."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

#: Networks for images with a smaller side, in pixels, use the small-image (CIFAR) definition of their architecture.
IMAGENET_MIN_SIZE = 128
#: The definition of a network for small images or for ImageNet sizes; ``auto`` is chosen by the size of the images.
Form = Literal["auto", "small", "full"]


def is_full(form: Form, image_size: int) -> bool:
    """Whether ``form`` is the definition for ImageNet sizes, for images of ``image_size`` pixels a side."""
    return form == "full" or (form == "auto" and image_size >= IMAGENET_MIN_SIZE)


def torchvision_network(name: str, *, num_classes: int) -> Any:
    """torchvision's network ``name`` with fresh weights; it keeps its parameter names, so its checkpoints load."""
    # Imported here, because it takes as long to import as torch and most commands build small students.
    from torchvision import models

    return getattr(models, name)(num_classes=num_classes)


@dataclass(frozen=True, kw_only=True, slots=True)
class Tap:
    """A feature that can be read from a network: (N, channels, ceil(H/stride), ceil(W/stride)).

    Taps are named ``stem``, ``stage1``, ``stage2``, ..., which the literature calls f0, f1, f2, ...; a convolution
    between the last stage and the pooling adds the tap ``last``.
    """

    name: str
    channels: int
    stride: int


@dataclass(frozen=True, slots=True)
class Stage:
    """The feature (N,C,h,w) at a tap after its activation, and before it (computed on demand).

    Both have the same shape. If a stage ends without an activation, they are the same tensor.
    """

    feature: Tensor
    preactivation: Callable[[], Tensor]

    @classmethod
    def activated(cls, block: nn.Module, x: Tensor) -> "Stage":
        """A stage that ends with ``block``: convolution, batch norm, and an activation that is not in place."""
        conv, batch_norm, activation = block.children()
        preactivation = batch_norm(conv(x))
        return cls(activation(preactivation), lambda: preactivation)

    @classmethod
    def rectified(cls, preactivation: Tensor) -> "Stage":
        """A stage that ends with a ReLU of ``preactivation``."""
        return cls(functional.relu(preactivation), lambda: preactivation)

    @classmethod
    def linear(cls, feature: Tensor) -> "Stage":
        """A stage that ends without an activation."""
        return cls(feature, lambda: feature)


@dataclass(frozen=True, kw_only=True, slots=True)
class Tapped:
    """One forward pass with everything that a distiller may read.

    ``features`` and ``preactivations`` hold (N,C,h,w) by the name of the tap, shallow to deep; ``pooled`` is the vector
    (N,D) that the classifier reads; ``logits`` is (N,K).
    """

    features: dict[str, Tensor]
    preactivations: dict[str, Tensor]
    pooled: Tensor
    logits: Tensor

    @property
    def last(self) -> Tensor:
        """The feature before the pooling."""
        return self.features[next(reversed(self.features))]


class Classifier(nn.Module):
    """A chain of stages, each ending at a tap, then global average pooling and a classifier.

    ``classifier_path`` is the path of the linear layer that reads the pooled vector. A subclass sets the attributes and
    defines ``advance``, and ``pool`` if there is more than an average between the last feature and the classifier.
    """

    image_size: int
    num_classes: int
    taps: tuple[Tap, ...]
    classifier_path: str

    @property
    def stages(self) -> tuple[Tap, ...]:
        """The taps at the end of a stage: all except ``stem`` and ``last``."""
        return tuple(tap for tap in self.taps if tap.name.startswith("stage"))

    def advance(self, index: int, x: Tensor) -> Stage:
        """The stage of tap ``index`` from the feature ``x`` of the tap before (normalised images (N,3,H,W) for 0)."""
        raise NotImplementedError

    def pool(self, feature: Tensor) -> Tensor:
        """(N,C,h,w) last feature to the vector (N,D) that the classifier reads."""
        return torch.flatten(functional.adaptive_avg_pool2d(feature, 1), 1)

    def predict(self, pooled: Tensor) -> Tensor:
        """(N,D) pooled vectors to logits (N,num_classes)."""
        raise NotImplementedError

    def adapt(self, name: str, feature: Tensor) -> Tensor:  # noqa: ARG002
        """The input of the next stage after tap ``name``: the feature itself, unless a subclass changes it."""
        return feature

    def extract(self, images: Tensor) -> Tensor:
        """(N,3,H,W) normalised images to the last feature (N,C,h,w), after its activation."""
        *_, (_, stage) = self._walk(images)
        return stage.feature

    def classify(self, feature: Tensor) -> Tensor:
        """(N,C,h,w) last features to logits (N,num_classes)."""
        return self.predict(self.pool(feature))

    def tapped(self, images: Tensor) -> Tapped:
        """(N,3,H,W) normalised images to logits and all features."""
        features, preactivations, x = {}, {}, images
        for name, stage in self._walk(images):
            features[name], preactivations[name] = stage.feature, stage.preactivation()
            x = stage.feature
        pooled = self.pool(self.adapt(self.taps[-1].name, x))
        return Tapped(features=features, preactivations=preactivations, pooled=pooled, logits=self.predict(pooled))

    def forward(self, images: Tensor) -> Tensor:
        """(N,3,H,W) normalised images to logits (N,num_classes)."""
        return self.classify(self.adapt(self.taps[-1].name, self.extract(images)))

    def _walk(self, images: Tensor) -> Iterator[tuple[str, Stage]]:
        x = images
        for index, tap in enumerate(self.taps):
            stage = self.advance(index, x)
            yield tap.name, stage
            if index + 1 < len(self.taps):
                x = self.adapt(tap.name, stage.feature)
