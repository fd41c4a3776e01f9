"""The parts of a ShuffleNet unit as the public code computes them from a state dict."""

from torch import Tensor
from torch.nn import functional


def shuffled(x: Tensor, groups: int) -> Tensor:
    """``x`` with its channels reordered: output channel j is input channel j // groups of group j % groups."""
    size = x.shape[1] // groups
    return x[:, [(j % groups) * size + j // groups for j in range(x.shape[1])]]


def conv_and_norm(
    state: dict[str, Tensor], path: str, index: int, x: Tensor, groups: int = 1, stride: int = 1
) -> Tensor:
    """Convolution and batch norm number ``index`` of a unit."""
    weight, norm = state[f"{path}conv{index}.weight"], f"{path}bn{index}"
    out = functional.conv2d(x, weight, None, stride, weight.shape[-1] // 2, 1, groups)
    values = (state[f"{norm}.{key}"] for key in ("running_mean", "running_var", "weight", "bias"))
    mean, variance, gain, shift = (value.view(-1, 1, 1) for value in values)
    return (out - mean) / (variance + 1e-5).sqrt() * gain + shift
