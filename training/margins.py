"""The margin of each stage of a teacher for OFD (Heo et al., 2019): E[x | x < 0] of what its activation reads.

The method takes it from the batch norm that writes the pre-activation. Which one that is, is read off the teacher's own
dataflow. Where a stage ends with a residual sum it is, as in the authors' code, the last batch norm of the last block,
though that writes a summand only. Where no batch norm writes the stage, as in a transformer, it is measured.
"""

import copy
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.nn.modules.batchnorm import _BatchNorm

from kdexport.students import Classifier
from training.losses import MIN_NEGATIVE_SHARE, RARE_MARGIN


def writing_batch_norms(network: Classifier) -> dict[str, str]:
    """The path of the batch norm that writes the pre-activation of a stage, by tap; stages that have none are left out.

    Of several that are added up it is the one with most of the network before it: the end of the residual branch, not
    the projected shortcut. ``network`` is not run: a copy without numbers is.
    """
    if not any(isinstance(module, _BatchNorm) for module in network.modules()):
        return {}
    twin = copy.deepcopy(network).to("meta").eval().requires_grad_(True)
    written: dict[Node, str] = {}
    for path, module in twin.named_modules():
        if isinstance(module, _BatchNorm):
            module.register_forward_hook(partial(_note, written, path))
    size = network.image_size
    with torch.enable_grad():
        tapped = twin.tapped(torch.zeros(1, 3, size, size, device="meta"))
    found = {}
    for tap in network.stages:
        summands = [node for node in _summands(tapped.preactivations[tap.name].grad_fn, written) if node in written]
        if summands:
            found[tap.name] = written[max(summands, key=_count_before)]
    return found


def channel_moments(batch: Tensor) -> Tensor:
    """(N,C,H,W) to (5,C) float64, to be added up over batches and given to ``measured_margin``.

    Rows are the count, the sum and the sum of squares of all values, and the count and the sum of the negative ones.
    """
    values = batch.double().transpose(0, 1).flatten(1)
    negative = values.clamp(max=0)
    terms = (torch.ones_like(values), values, values.square(), (values < 0).double(), negative)
    return torch.stack([term.sum(1) for term in terms])


def measured_margin(moments: Tensor) -> Tensor:
    """(5,C) ``channel_moments`` to the mean of the negative values of each channel, (C,) float64.

    -3 deviations where at most a thousandth of the values is negative, as ``overhaul_margin`` has it.
    """
    count, plain, square, negative_count, negative = moments
    deviation = (square / count - (plain / count).square()).clamp(min=0).sqrt()
    return torch.where(negative_count > MIN_NEGATIVE_SHARE * count, negative / negative_count, -RARE_MARGIN * deviation)


def _note(written: dict[Node, str], path: str, _module: nn.Module, _inputs: Any, output: Tensor) -> None:
    # At once: an activation in place makes the tensor another node's.
    assert output.grad_fn is not None
    written[output.grad_fn] = path


def _summands(node: Node | None, ends: dict[Node, str]) -> Iterator[Node]:
    """What is added up in ``node``: itself where it is no addition."""
    pending = [node]
    while pending:
        node = pending.pop()
        if node is not None and node not in ends and node.name() == "AddBackward0":
            pending += [source for source, _ in node.next_functions]
        elif node is not None:
            yield node


def _count_before(node: Node) -> int:
    """How many operations ``node`` depends on."""
    seen, pending = {node}, [node]
    while pending:
        sources = {source for source, _ in pending.pop().next_functions if source is not None}
        pending += sources - seen
        seen |= sources
    return len(seen)
