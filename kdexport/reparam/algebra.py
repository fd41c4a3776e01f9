"""The identities behind the merge, on plain tensors.

Shapes: O output channels, I input channels per group, K kernel extents. ``weight`` is (O,I,*K) for a convolution or
(O,I) for a linear layer; ``bias`` is (O,) or None, which means zero. All sums run in float64 and are rounded once, to
the type of the weight that came in.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kdexport.errors import ReparamError

AnyBatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm


def fold_batch_norm(weight: Tensor, bias: Tensor | None, batch_norm: AnyBatchNorm) -> tuple[Tensor, Tensor]:
    """Fold an eval-mode batch norm into the convolution or linear layer before it.

    W' = g W and b' = g (b - mu) + beta per output channel, with g = gamma / sqrt(var + eps) (Ioffe & Szegedy, 2015, the
    inference transform). Raises ``ReparamError`` for a batch norm that keeps no running statistics, because its output
    then depends on the batch, and for a channel count that is not the weight's.
    """
    mean, variance = batch_norm.running_mean, batch_norm.running_var
    if mean is None or variance is None:
        raise ReparamError(
            "A batch norm keeps no running statistics: its output depends on the other images of the batch.",
            remedy="Train with track_running_stats=True; there is no exact fold otherwise.",
        )
    if weight.shape[0] != mean.numel():
        raise ReparamError(
            f"A batch norm over {mean.numel()} channels follows a layer with {weight.shape[0]} output channels.",
            remedy="Pass the batch norm that directly follows this layer.",
        )
    gain = torch.rsqrt(variance.detach().double() + batch_norm.eps)
    if batch_norm.weight is not None:
        gain = gain * batch_norm.weight.detach().double()
    shift = -mean.detach().double() * gain
    if batch_norm.bias is not None:
        shift = shift + batch_norm.bias.detach().double()
    if bias is not None:
        shift = shift + bias.detach().double() * gain
    folded = weight.detach().double() * gain.reshape(-1, *[1] * (weight.dim() - 1))
    return folded.to(weight.dtype), shift.to(weight.dtype)


def merge_branches(
    branches: Sequence[tuple[Tensor, Tensor | None]], coefficients: Sequence[float] | None = None
) -> tuple[Tensor, Tensor]:
    """Merge parallel linear branches of one shape: W = sum_i c_i W_i and b = sum_i c_i b_i, with c_i = 1/m by default.

    ``branches`` are (weight, bias) pairs that share input, stride, padding, dilation and groups. Raises
    ``ReparamError`` for no branch, for weights of different shapes and for a wrong number of coefficients.
    """
    if not branches:
        raise ReparamError("There is no branch to merge.", remedy="Pass at least one (weight, bias) pair.")
    count = len(branches)
    factors = [1.0 / count] * count if coefficients is None else list(coefficients)
    if len(factors) != count:
        raise ReparamError(
            f"{count} branches were given {len(factors)} coefficients.", remedy="Pass one coefficient per branch."
        )
    first = branches[0][0]
    shapes = {tuple(weight.shape) for weight, _ in branches}
    if len(shapes) > 1:
        raise ReparamError(
            f"Branches of different shapes cannot be summed: {sorted(shapes)}.",
            remedy="Pad smaller kernels and expand groups first.",
        )
    weight_sum = torch.zeros_like(first, dtype=torch.float64)
    bias_sum = torch.zeros(first.shape[0], dtype=torch.float64, device=first.device)
    for factor, (weight, bias) in zip(factors, branches, strict=True):
        weight_sum += factor * weight.detach().double()
        if bias is not None:
            bias_sum += factor * bias.detach().double()
    return weight_sum.to(first.dtype), bias_sum.to(first.dtype)
