"""Values that no identity hides behind: uneven batch norm statistics, gains of either sign, odd sizes."""

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def randomize(module: nn.Module, seed: int = 0) -> nn.Module:
    """Give every batch norm hostile statistics, and convolutions and linear layers weights that carry signal, in place.

    Variances spread over six orders of magnitude, so that the epsilon matters; the gain follows them, so that the
    activations of a deep network stay finite and alive.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like.dtype)

    def uniform(like: Tensor, low: float, high: float) -> Tensor:
        return (torch.rand(like.shape, generator=generator, dtype=torch.float64) * (high - low) + low).to(like.dtype)

    with torch.no_grad():
        for child in module.modules():
            if isinstance(child, _BatchNorm):
                if child.running_mean is not None and child.running_var is not None:
                    child.running_mean.copy_(normal(child.running_mean))
                    child.running_var.copy_(10 ** uniform(child.running_var, -4, 2))
                if child.weight is not None:
                    spread = torch.ones_like(child.weight) if child.running_var is None else child.running_var.sqrt()
                    sign = torch.where(uniform(child.weight, 0, 1) < 0.3, -1.0, 1.0).to(child.weight.dtype)
                    child.weight.copy_(sign * uniform(child.weight, 0.5, 1.5) * spread)
                    child.bias.copy_(normal(child.bias) * 0.7 + 0.4)
            elif isinstance(child, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
                # By fan-in, whatever the layer's own law: an untrained deep network passes on almost no signal.
                child.weight.copy_(normal(child.weight) * (2 / child.weight[0].numel()) ** 0.5)
                if child.bias is not None:
                    child.bias.copy_(normal(child.bias))
    return module


def relative_difference(candidate: Tensor, reference: Tensor) -> float:
    """Largest absolute difference over the largest absolute reference value; both must be finite."""
    assert candidate.shape == reference.shape
    assert candidate.isfinite().all()
    assert reference.isfinite().all()
    return ((candidate.double() - reference.double()).abs().max() / reference.double().abs().max()).item()


def noise(*shape: int, seed: int = 7) -> Tensor:
    """Seeded float64 noise, off centre."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64) * 1.3 - 0.4
