"""What it means that a folded network is the plain one: exact values, and not one operation more."""

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from kdexport.reparam.branches import ParallelBranches
from tests.kdexport.hostile_values import relative_difference

LIMIT = 1e-12
GEOMETRY = ("stride", "padding", "dilation", "groups", "padding_mode")


class OperatorCount(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what runs, by operator, whatever module calls it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        # Allocations and views of batch norm and autograd compute nothing.
        if name not in {"empty", "detach"}:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def operators(module: nn.Module, x: Tensor) -> Counter[str]:
    with torch.no_grad(), OperatorCount() as mode:
        module(x)
    counts: Counter[str] = mode.counts
    return counts


def layers(module: nn.Module) -> list[tuple[Any, ...]]:
    """Type, weight shape and geometry of each convolution and linear layer, in order of registration."""
    return [
        (type(m), tuple(m.weight.shape), *(getattr(m, key, None) for key in GEOMETRY))
        for m in module.modules()
        if isinstance(m, nn.Conv2d | nn.Linear)
    ]


def assert_equal_outputs(fused: nn.Module, original: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        reference = original(x)
        # Dead features would make every fold look right.
        assert (reference[0] - reference[1]).abs().max() > 1e-3 * reference.abs().max()
        assert relative_difference(fused(x), reference) <= LIMIT


def assert_plain(fused: nn.Module, plain: nn.Module, x: Tensor) -> None:
    """``fused`` is ``plain`` without its batch norms: the same layers, operators and parameters, with a bias each."""
    assert not [name for name, m in fused.named_modules() if isinstance(m, _BatchNorm | ParallelBranches)]
    assert layers(fused) == layers(plain)
    expected = operators(plain, x)
    assert expected.pop("native_batch_norm") == sum(isinstance(m, _BatchNorm) for m in plain.modules())
    assert operators(fused, x) == expected
    weights = sum(m.weight.numel() + m.weight.shape[0] for m in plain.modules() if isinstance(m, nn.Conv2d | nn.Linear))
    assert sum(p.numel() for p in fused.parameters()) == weights


def flops(module: nn.Module, x: Tensor) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(x)
    return int(counter.get_total_flops())
