"""What a low precision costs by itself: a float32 module with its numbers rounded as that precision rounds them."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

#: Precisions that can be simulated from the student alone; int8 also needs the scales, which are in its file.
SIMULATED = ("tf32", "fp16", "bf16")

_ATEN = torch.ops.aten
_PRODUCTS = {_ATEN.convolution.default, _ATEN.addmm.default, _ATEN.mm.default, _ATEN.bmm.default}
#: float32 keeps 23 bits of the mantissa, TF32 the upper 10 of them.
_TF32_DROPPED = 13


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Simulation:
    """Logits (N,K) of a simulated precision, and the largest activation met on the way, before rounding."""

    logits: NDArray[np.float32]
    peak: float


class SimulatedPrecision(nn.Module):
    """A float32 module computed as ``precision`` would, products accumulated in float32.

    float16 and bfloat16 round weights and every intermediate result; TF32 rounds the operands of products alone.
    """

    def __init__(self, module: nn.Module, precision: str) -> None:
        super().__init__()
        self._module = copy.deepcopy(module).float()
        self._rounding = _Rounding(precision)
        if precision != "tf32":
            with torch.no_grad():
                for parameter in self._module.parameters():
                    parameter.copy_(_ROUND[precision](parameter))

    @property
    def peak(self) -> float:
        """Largest absolute activation so far, before rounding."""
        return self._rounding.peak

    def forward(self, images: Tensor) -> Tensor:
        """(N,3,S,S) to logits (N,K)."""
        with self._rounding:
            return cast(Tensor, self._module(self._rounding.results(images)))


def round_tf32(values: Tensor) -> Tensor:
    """float32 values at TF32's 10 bits of mantissa, to nearest, ties to even; what is not finite stays."""
    bits = values.contiguous().view(torch.int32)
    half = (1 << (_TF32_DROPPED - 1)) - 1
    rounded = (bits + half + ((bits >> _TF32_DROPPED) & 1)) & -(1 << _TF32_DROPPED)
    return torch.where(torch.isfinite(values), rounded.view(torch.float32), values)


_ROUND: dict[str, Callable[[Tensor], Tensor]] = {
    "tf32": round_tf32,
    "fp16": lambda values: values.half().float(),
    "bf16": lambda values: values.bfloat16().float(),
}


class _Rounding(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Rounds what each operator returns, and what an in-place operator leaves behind; for TF32, what products read."""

    def __init__(self, precision: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0.0
        self._operands = precision == "tf32"
        self._round = _ROUND[precision]

    def results(self, values: Tensor) -> Tensor:
        """Values as this precision stores them."""
        return values if self._operands else self._round(values)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._operands and func in _PRODUCTS:
            args = tuple(self._operand(value) for value in args)
        result = func(*args, **(kwargs or {}))
        if not isinstance(result, Tensor) or result.dtype != torch.float32:
            return result
        if result.numel():
            largest = result.abs().max().item()
            # NaN compares as smaller than any peak; it comes from an overflow and is one.
            self.peak = math.inf if math.isnan(largest) else max(self.peak, largest)
        rounded = self.results(result)
        return result.copy_(rounded) if func._schema.is_mutable else rounded

    def _operand(self, value: Any) -> Any:
        # A bias (one dimension) is added in float32.
        return self._round(value) if isinstance(value, Tensor) and value.dim() > 1 else value
