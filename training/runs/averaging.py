"""A running mean of the weights of a network, which is evaluated and handed over in place of the last weights."""

import copy

import torch
from torch import Tensor, nn

from kdexport.reparam.branches import ParallelBranches


class WeightAverage:
    """An exponential mean of all floating-point tensors of ``network``, in a copy of it.

    The mean of the first steps has a smaller decay, min(``decay``, (1 + n) / (10 + n)) after n steps, so that the
    initial weights do not stay in it.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self._source, self._decay = network, decay
        self.network = copy.deepcopy(network).requires_grad_(False)
        for module in self.network.modules():
            if isinstance(module, ParallelBranches):
                for branch in module.branches:
                    # Those of the training, which collects the outputs of the branches that it trains.
                    branch._forward_hooks.clear()

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take the weights after ``step`` steps of the whole training (from 1) into the mean."""
        decay = min(self._decay, (1 + step) / (10 + step))
        own, given = self.network.state_dict(), self._source.state_dict()
        floating = [name for name, value in given.items() if value.is_floating_point()]
        torch._foreach_lerp_([own[name] for name in floating], [given[name] for name in floating], 1 - decay)
        for name in given.keys() - set(floating):
            own[name].copy_(given[name])

    def state(self) -> dict[str, Tensor]:
        """The tensors of the mean by name."""
        return self.network.state_dict()
