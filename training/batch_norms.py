"""The running statistics of batch norms, which an evaluated and exported network uses instead of those of a batch."""

import math

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

#: Below this many time constants of a running average, its initial values still have more than 0.7 % of the weight.
_ENOUGH = 5.0
#: With a larger momentum the statistics are hardly more than those of the last batch.
_LARGEST = 0.5


def set_momentum(network: nn.Module, momentum: float | None) -> None:
    """Let the batch norms of ``network`` take the share ``momentum`` of each batch into their statistics, if given."""
    if momentum is None:
        return
    for module in network.modules():
        if isinstance(module, _BatchNorm):
            module.momentum = momentum


def slow_statistics(network: nn.Module, steps: int) -> str:
    """Why the running statistics of ``network`` cannot follow a training of ``steps`` steps; empty if they can."""
    momenta = [module.momentum for module in network.modules() if isinstance(module, _BatchNorm)]
    smallest = min((momentum for momentum in momenta if momentum is not None), default=1.0)
    if steps * smallest >= _ENOUGH or smallest >= 1:
        return ""
    needed = math.ceil(100 * _ENOUGH / steps) / 100
    setting = f"set train.batch_norm_momentum={needed:g}, or train longer" if needed <= _LARGEST else "train longer"
    return (
        f"its batch norms have the momentum {smallest:g}, so that after the {steps} steps of this run their running "
        f"statistics are still to {(1 - smallest) ** steps:.0%} those before the training, and its top-1 can be far "
        f"below what it has learned: {setting}"
    )
