"""Networks as other people write them: with names of their own, changes in place, tokens and shared modules."""

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

SIZE, CLASSES = 32, 4


def hostile(network: nn.Module) -> nn.Module:
    """``network`` with statistics of batch norms unlike those of fresh ones."""
    for norm in network.modules():
        if isinstance(norm, nn.BatchNorm2d):
            for value, low, high in (
                (norm.running_mean, -0.6, 0.4),
                (norm.running_var, 0.3, 3),
                (norm.bias, -0.7, 0.9),
            ):
                cast(Tensor, value).data.uniform_(low, high)
    return network


class Residual(nn.Module):
    """Two stages: a convolution with a functional ReLU, and a block whose ReLU changes its sum in place."""

    def __init__(self, num_classes: int = CLASSES) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 6, 3, 2, 1, bias=False), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 10, 3, 2, 1, bias=False), nn.BatchNorm2d(10)
        self.shortcut, self.bn3 = nn.Conv2d(6, 10, 1, 2, bias=False), nn.BatchNorm2d(10)
        self.conv4, self.bn4 = nn.Conv2d(10, 10, 3, 1, 1, bias=False), nn.BatchNorm2d(10)
        self.relu, self.end = nn.ReLU(inplace=True), nn.ReLU(inplace=True)
        self.drop, self.head = nn.Dropout(0.3), nn.Linear(10, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.bn1(self.conv1(x)))
        y = self.bn4(self.conv4(self.relu(self.bn2(self.conv2(x)))))
        y += self.bn3(self.shortcut(x))
        y = self.end(y)
        return cast(Tensor, self.head(self.drop(y.mean((2, 3)))))


class Tokens(nn.Module):
    """Patches of 8 pixels with a class token before them; the classifier reads the class token."""

    def __init__(self, num_classes: int = CLASSES) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 12, 8, 8)
        self.token = nn.Parameter(torch.randn(1, 1, 12))
        self.block = nn.TransformerEncoderLayer(12, 2, 16, 0.0, batch_first=True)
        self.fc = nn.Linear(12, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.patches(x).flatten(2).transpose(1, 2)
        tokens = self.block(torch.cat([self.token.expand(len(x), -1, -1), patches], 1))
        return cast(Tensor, self.fc(tokens[:, 0]))


class Twice(nn.Module):
    """One convolution that runs twice, and a batch norm behind two different convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again, self.norm = nn.Conv2d(3, 5, 3, 4, 1), nn.Conv2d(5, 5, 3, 1, 1), nn.BatchNorm2d(5)
        self.fc = nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.fc(self.norm(self.again(self.again(self.first(x)))).mean((2, 3))))


class ReadTwice(nn.Module):
    """A convolution that the batch norm and a sum read."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(3, 5, 3, 4, 1), nn.BatchNorm2d(5), nn.Linear(5, CLASSES)
        self.out = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return cast(Tensor, self.fc(self.out(self.norm(y) + y).mean((2, 3))))


class Several(nn.Module):
    """Logits with an auxiliary head while it is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 5, 3, 4, 1), nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        logits = cast(Tensor, self.fc(self.conv(x).mean((2, 3))))
        return (logits, logits) if self.training else logits
