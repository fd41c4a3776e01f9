"""A small student with everything that the rungs of verification compare."""

from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from kdexport.data.preprocessing import Preprocessing
from kdexport.reparam.certificate import Certificate
from kdexport.verify.reference import Probes, Reference

PREPROCESSING = Preprocessing(image_size=16, resize=16, mean=(0.51, 0.42, 0.33), std=(0.27, 0.21, 0.36))


class SmallNet(nn.Module):
    """Convolutions with batch norm, a residual add, pooling and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_bn = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8)
        self.inner, self.inner_bn = nn.Conv2d(8, 8, 3, padding=1, groups=2, bias=False), nn.BatchNorm2d(8)
        self.linear = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.stem_bn(self.stem(x)))
        x = x + cast(Tensor, self.inner_bn(self.inner(x)))
        pooled = functional.adaptive_avg_pool2d(functional.relu(x), 1)
        return cast(Tensor, self.linear(torch.flatten(pooled, 1)))


@dataclass(frozen=True, slots=True, eq=False)
class Ladder:
    """A correct student and everything that the rungs compare."""

    unfused: nn.Module
    fused: nn.Module
    certificate: Certificate
    probes: Probes
    reference: Reference


def pixels(count: int, seed: int = 4) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)
