"""The branches of a layer as one convolution and one batch norm: a few kernels in place of a few for each branch.

Every output channel of a convolution and every channel of a batch norm is computed by itself, so that branches side by
side give the values that they have one after the other, up to the order of the sums in their gradients.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from kdexport.reparam.branches import ParallelBranches

_Parts = list[tuple[nn.Conv2d, nn.BatchNorm2d]]


@contextmanager
def branches_together(layers: Iterable[ParallelBranches]) -> Iterator[None]:
    """Within the block each of ``layers``, which are ``joinable``, computes its branches together.

    Hooks of a branch get its output. They must not change it.
    """
    changed = list(layers)
    for layer in changed:
        # Found before the method of the class.
        layer.__dict__["forward"] = partial(_forward, layer)
    try:
        yield
    finally:
        for layer in changed:
            del layer.__dict__["forward"]


def joinable(layer: ParallelBranches) -> bool:
    """Whether the branches of ``layer`` can be computed together in training.

    They are a convolution and a batch norm of the same form each, which nothing watches.
    """
    forms = set()
    for branch in layer.branches:
        if type(branch) is not nn.Sequential or [type(part) for part in branch] != [nn.Conv2d, nn.BatchNorm2d]:
            return False
        conv, norm = cast("tuple[nn.Conv2d, nn.BatchNorm2d]", tuple(branch))
        if any(part._forward_hooks or part._forward_pre_hooks for part in branch) or branch._forward_pre_hooks:
            return False
        form = (conv.weight.shape, conv.stride, conv.padding, conv.dilation, conv.groups, conv.bias is None)
        forms.add((*form, conv.padding_mode, norm.eps, norm.momentum, norm.affine, norm.track_running_stats))
        if conv.padding_mode != "zeros" or norm.momentum is None or not (norm.affine and norm.track_running_stats):
            return False
    return len(forms) == 1 and len(layer.branches) > 1


def _forward(layer: ParallelBranches, x: Tensor) -> Tensor:
    parts = [cast("tuple[nn.Conv2d, nn.BatchNorm2d]", tuple(cast(nn.Sequential, branch))) for branch in layer.branches]
    written = _normalised(parts, _convolved(parts, x))
    for branch, output in zip(layer.branches, written.chunk(len(parts), 1), strict=True):
        for hook in branch._forward_hooks.values():
            hook(branch, (x,), output)
    return torch.unflatten(written, 1, (len(parts), -1)).mean(1)


def _convolved(parts: _Parts, x: Tensor) -> Tensor:
    """The convolutions of all branches of (N,C,H,W): (N,m*C',H',W')."""
    first, count = parts[0][0], len(parts)
    weight = torch.cat([conv.weight for conv, _ in parts])
    bias = None if first.bias is None else torch.cat([cast(Tensor, conv.bias) for conv, _ in parts])
    # Each branch needs groups of its own.
    read, groups = (x, 1) if first.groups == 1 else (torch.cat([x] * count, 1), count * first.groups)
    return functional.conv2d(read, weight, bias, first.stride, first.padding, first.dilation, groups)


def _normalised(parts: _Parts, written: Tensor) -> Tensor:
    """The batch norms of all branches, whose running statistics are updated."""
    norms = [norm for _, norm in parts]
    means, variances = ([cast(Tensor, getattr(norm, f"running_{name}")) for norm in norms] for name in ("mean", "var"))
    mean, variance = torch.cat(means), torch.cat(variances)
    weight, bias = torch.cat([norm.weight for norm in norms]), torch.cat([norm.bias for norm in norms])
    momentum = cast(float, norms[0].momentum)
    normalised = functional.batch_norm(written, mean, variance, weight, bias, True, momentum, norms[0].eps)
    with torch.no_grad():
        torch._foreach_copy_([*means, *variances], [*mean.chunk(len(norms)), *variance.chunk(len(norms))])
        for norm in norms:
            if norm.num_batches_tracked is not None:
                norm.num_batches_tracked += 1
    return normalised
