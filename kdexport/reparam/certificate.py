"""The proof that a fold changed nothing: float64 error per block and of the whole, on hostile input."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from kdexport.errors import CertificateError
from kdexport.reparam.hazards import Hazard

#: Largest float64 error allowed, relative to the largest value of the reference. Correct algebra stays near 1e-15, and
#: one rounding to float32 is 6e-8: nothing lies between, so this limit never needs tuning.
RELATIVE_LIMIT = 1e-9


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockCertificate:
    """One folded block: what was folded, and the largest error relative to its largest output."""

    name: str
    kind: str
    relative_error: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Certificate:
    """Float64 errors of a fold, per block and whole, parameter counts before and after, and warnings for later."""

    blocks: tuple[BlockCertificate, ...]
    whole_relative_error: float
    input_shape: tuple[int, ...]
    unfused_parameters: int
    fused_parameters: int
    hazards: tuple[Hazard, ...] = ()
    limit: float = RELATIVE_LIMIT

    @property
    def worst(self) -> BlockCertificate | None:
        """The block with the largest error, NaN counting as largest."""
        return max(self.blocks, key=lambda block: _ordered(block.relative_error), default=None)

    @property
    def holds(self) -> bool:
        """Whether the whole and every block lie within the limit; NaN never does."""
        errors = [self.whole_relative_error, *(block.relative_error for block in self.blocks)]
        return all(error <= self.limit for error in errors)

    def require(self) -> None:
        """Raise ``CertificateError`` that names the worst block unless the certificate holds."""
        if self.holds:
            return
        worst = self.worst
        where = f"; worst block {worst.name} ({worst.kind}) at {worst.relative_error:.2e}" if worst else ""
        raise CertificateError(
            f"The folded module differs from the original by {self.whole_relative_error:.2e} of its largest output in "
            f"float64 (up to {self.limit:.0e} allowed){where}.",
            remedy="This is an algebra error, not rounding: report the module that shows it.",
        )

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        return asdict(self)


def relative_error(candidate: Tensor, reference: Tensor) -> float:
    """Largest absolute difference over the largest absolute reference; NaN where either is not finite."""
    if candidate.shape != reference.shape or not (candidate.isfinite().all() and reference.isfinite().all()):
        return math.nan
    scale = reference.abs().max().item()
    difference = (candidate - reference).abs().max().item()
    return difference / scale if scale > 0 else difference


def hostile_input(shape: tuple[int, ...]) -> Tensor:
    """Seeded float64 noise of uneven scale: neither centred nor of unit variance."""
    generator = torch.Generator().manual_seed(20240208)
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    return noise * 1.7 + 0.3


def _ordered(error: float) -> float:
    return math.inf if math.isnan(error) else error
