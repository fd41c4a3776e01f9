"""Factories as users write them; recipes name them as tests.training.foreign.factories:NAME."""

import torch
from torch import Tensor, nn

from tests.training.foreign.small_networks import Residual, Tokens


class Tiny(nn.Module):
    """Two stages of convolution, batch norm and ReLU modules, then a mean and a linear layer."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.layer1 = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.layer2 = nn.Sequential(nn.Conv2d(8, 12, 3, 2, 1, bias=False), nn.BatchNorm2d(12), nn.ReLU(inplace=True))
        self.fc = nn.Linear(12, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.layer2(self.layer1(images)).mean((2, 3)))  # type: ignore[no-any-return]


def tiny(num_classes: int) -> nn.Module:
    return Tiny(num_classes)


def seven() -> nn.Module:
    """A network that always has seven outputs."""
    return Tiny(7)


def residual(num_classes: int) -> nn.Module:
    return Residual(num_classes)


def tokens(num_classes: int) -> nn.Module:
    torch.manual_seed(0)
    return Tokens(num_classes)
