"""Modules of parallel linear branches that are folded after training."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn


class ParallelBranches(nn.Module):
    """The uniform mean of m linear branches that share one input: (N,C,H,W) to (N,C',H',W').

    Only the mean goes on through the network, so that training runs exactly what is exported.
    """

    def __init__(self, branches: Sequence[nn.Module]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        """(N,C,H,W) to the mean of what the branches write, (N,C',H',W')."""
        return torch.stack([cast(Tensor, branch(x)) for branch in self.branches]).mean(0)


class Adapters(ParallelBranches):
    """Branches appended after a feature; they fold into the one linear layer that reads them (placement R2)."""
