"""Random layers over every parameter that a convolution has, and the one comparison that the merge tests use."""

import random
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from kdexport.reparam.convolution import Convolution
from tests.kdexport.hostile_values import noise, randomize, relative_difference
from tests.kdexport.reparam.layers_as_data import apply

CONVS: tuple[Any, ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS: tuple[Any, ...] = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
POOLS: tuple[Any, ...] = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
MODES = ("zeros", "reflect", "replicate", "circular")
LIMIT = 1e-12


def sizes(rng: random.Random, dims: int) -> list[tuple[int, ...]]:
    """Three input sizes, odd and even, no side like another."""
    low, high = {1: (23, 60), 2: (13, 24), 3: (12, 16)}[dims]
    return [tuple(rng.randint(low, high) for _ in range(dims)) for _ in range(3)]


def assert_same(conv: Convolution, reference: Callable[[Tensor], Tensor], inputs: Sequence[tuple[int, ...]]) -> None:
    """``conv`` computes what ``reference`` does on every spatial size of ``inputs``, to 1e-12 of the largest value."""
    with torch.no_grad():
        for seed, size in enumerate(inputs):
            x = noise(2, conv.in_channels, *size, seed=seed)
            wanted, found = reference(x), apply(conv, x)
            assert found.shape == wanted.shape, (found.shape, wanted.shape)
            assert relative_difference(found, wanted) < LIMIT


def hostile(module: nn.Module, seed: int) -> nn.Module:
    """``module`` in float64 and evaluation mode, with weights and statistics that hide nothing."""
    return randomize(module.double().eval(), seed)


def random_conv(rng: random.Random, dims: int, *, inputs: int, outputs: int, **fixed: Any) -> nn.Module:
    """A convolution with any kernel, stride, dilation, padding, padding mode and groups that fit."""
    divisors = [g for g in range(1, inputs + 1) if inputs % g == 0 and outputs % g == 0]
    kernel = fixed.pop("kernel_size", tuple(rng.randint(1, 4 if dims == 3 else 5) for _ in range(dims)))
    stride = fixed.pop("stride", tuple(rng.randint(1, 3) for _ in range(dims)))
    options = {
        "dilation": tuple(rng.randint(1, 2) for _ in range(dims)),
        "groups": rng.choice(divisors),
        "bias": rng.random() < 0.5,
        "padding_mode": rng.choice(MODES),
        "padding": tuple(rng.randint(0, 3) for _ in range(dims)),
    }
    if set(stride) == {1} and rng.random() < 0.3:
        # With an even span, "same" pads one more behind than before.
        options["padding"] = rng.choice(["same", "valid"])
    return cast(nn.Module, CONVS[dims - 1](inputs, outputs, kernel, stride, **{**options, **fixed}))


def random_norm(rng: random.Random, dims: int, channels: int) -> nn.Module:
    """A batch norm, affine or not, synchronised or not, with any epsilon."""
    kind = nn.SyncBatchNorm if rng.random() < 0.25 else NORMS[dims - 1]
    return cast(nn.Module, kind(channels, eps=10 ** rng.uniform(-5, -1), affine=rng.random() < 0.7))


def same_size_conv(rng: random.Random, dims: int, *, inputs: int, outputs: int, stride: Any, **fixed: Any) -> nn.Module:
    """A branch of any kernel and dilation whose output has the size of a 1x1 convolution's, behind its own padding."""
    kernel = fixed.pop("kernel_size", tuple(rng.randint(1, 5) for _ in range(dims)))
    dilation = fixed.pop("dilation", tuple(rng.randint(1, 3 if dims < 3 else 2) for _ in range(dims)))
    mode = fixed.pop("padding_mode", "zeros")
    spans = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    before = [rng.randint(0, span) for span in spans]
    sides = [side for b, span in reversed(list(zip(before, spans, strict=True))) for side in (b, span - b)]
    layer = random_conv(
        rng, dims, inputs=inputs, outputs=outputs, stride=stride, kernel_size=kernel, dilation=dilation, padding=0,
        padding_mode="zeros", **fixed,
    )  # fmt: skip
    return nn.Sequential(Pad(sides, mode), layer)


class Pad(nn.Module):
    """torch.nn.functional.pad as a module; ``sides`` in its order, last dimension first."""

    def __init__(self, sides: Sequence[int], mode: str = "zeros") -> None:
        super().__init__()
        self.sides, self.mode = list(sides), mode

    def forward(self, x: Tensor) -> Tensor:
        if not any(self.sides):
            return x
        return nn.functional.pad(x, self.sides, mode="constant" if self.mode == "zeros" else self.mode)

    @property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """(before, after) per dimension, first dimension first."""
        pairs = list(zip(self.sides[::2], self.sides[1::2], strict=True))
        return tuple(reversed(pairs))
