"""The certificate of a fold: float64 errors per block and of the whole, on hostile input.

It also lists hazards of an exact merge: channels that only the epsilon keeps finite, ranges that int8 cannot represent.
"""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from kdexport.errors import CertificateError

#: Ratio of the largest output channel's weights to the median channel's from which a per-tensor int8 scale is a hazard:
#: the median channel keeps 127 / 16, eight levels of either sign.
RANGE_LIMIT = 16.0

#: Growth of that ratio by the merge from which the merge, and not the trained weights, is the cause.
GROWTH_LIMIT = 2.0

#: A channel counts as dead where the epsilon is at least this share of what the batch norm divides by.
EPSILON_SHARE = 0.5

#: A gain is real where it is at least this share of the layer's median gain.
GAIN_SHARE = 0.01

_FLOAT16 = torch.finfo(torch.float16)

#: Weights may use an eighth of float16's range: the headroom that rung C leaves to activations.
_FLOAT16_HEADROOM = 8.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Hazard:
    """One warning about one layer: ``measured`` against ``limit``, and in words what it means."""

    layer: str
    kind: str
    measured: float
    limit: float
    detail: str

    def __str__(self) -> str:
        return f"{self.layer}: {self.kind}, {self.detail}"


def dead_channels(name: str, variance: Tensor | None, gain: Tensor | None, epsilon: float) -> list[Hazard]:
    """Channels whose variance is near zero while their gain is not: the epsilon, not the data, sets their scale.

    ``variance`` and ``gain`` are a batch norm's, (C,); without one of them there is nothing to say.

    Such a channel is almost constant on the training data; its folded weights are gamma / sqrt(var + eps) times the
    trained ones, so that one row dwarfs the others and the least change of its input becomes a large output.
    """
    if variance is None or gain is None:
        return []
    variance, gain = variance.detach().double(), gain.detach().double().abs()
    share = epsilon / (variance + epsilon)
    dead = (share >= EPSILON_SHARE) & (gain > GAIN_SHARE * gain.median())
    if not dead.any():
        return []
    scale = gain / torch.sqrt(variance + epsilon)
    worst = int(torch.where(dead, scale, -1.0).argmax())
    detail = (
        f"{int(dead.sum())} of {dead.numel()} channels; channel {worst} has variance {variance[worst]:.1e}, epsilon "
        f"{epsilon:.0e} and gain {gain[worst]:.2g}: its weights grow by {scale[worst]:.3g}, the median "
        f"channel's by {scale.median():.2g}"
    )
    return [
        Hazard(layer=name, kind="dead channels", measured=float(dead.sum()), limit=0.0, detail=detail),
    ]


def range_hazards(name: str, folded: Tensor, trained: Iterable[Tensor]) -> list[Hazard]:
    """Ranges of a folded weight (O,I,*K) that int8 or float16 cannot hold, beside the weights that were trained.

    ``trained`` are the weights of the layer, or of its branches, before the fold, with O output channels each.
    """
    after = _per_channel(folded)
    ratio = _spread(after)
    before = max((_spread(_per_channel(weight)) for weight in trained), default=1.0)
    hazards = []
    if ratio > RANGE_LIMIT and ratio > GROWTH_LIMIT * before:
        lost = torch.log2(torch.tensor(ratio)).item()
        detail = (
            f"largest channel {after.max():.3g}, median {after.median():.3g}: ratio {ratio:.3g} "
            f"({before:.3g} as trained). One int8 scale for all channels would cost the median channel {lost:.1f} bits"
        )
        hazards.append(Hazard(layer=name, kind="int8 range", measured=ratio, limit=RANGE_LIMIT, detail=detail))
    largest, limit = float(after.max()), _FLOAT16.max / _FLOAT16_HEADROOM
    if largest > limit:
        detail = f"largest weight {largest:.3g}, float16 ends at {_FLOAT16.max:.0f}"
        hazards.append(Hazard(layer=name, kind="float16 overflow", measured=largest, limit=limit, detail=detail))
    tiny = (after > 0) & (after < _FLOAT16.smallest_normal)
    if tiny.any():
        detail = (
            f"{int(tiny.sum())} of {tiny.numel()} channels have no weight above {_FLOAT16.smallest_normal:.1e}, where "
            "float16 begins to lose bits"
        )
        hazards.append(
            Hazard(layer=name, kind="float16 underflow", measured=float(tiny.sum()), limit=0.0, detail=detail)
        )
    return hazards


def find_hazards(original: nn.Module, fused: nn.Module, layers: dict[str, tuple[str, ...]]) -> tuple[Hazard, ...]:
    """All warnings of a fold; ``layers`` maps each folded layer of ``fused`` to its trained ones in ``original``."""
    hazards: list[Hazard] = []
    for name, module in original.named_modules():
        if isinstance(module, _BatchNorm):
            hazards += dead_channels(name, module.running_var, module.weight, module.eps)
    for name, sources in layers.items():
        weight = fused.get_submodule(name).weight
        trained = (original.get_submodule(source).weight for source in sources)
        assert isinstance(weight, Tensor)
        hazards += range_hazards(name, weight, [w for w in trained if isinstance(w, Tensor)])
    return tuple(hazards)


def _per_channel(weight: Tensor) -> Tensor:
    return weight.detach().double().abs().flatten(1).amax(1)


def _spread(per_channel: Tensor) -> float:
    # Of the channels that compute anything: a pruned row of zeros says nothing about the others.
    alive = per_channel[per_channel > 0]
    return float(alive.max() / alive.median()) if alive.numel() else 1.0


#: Largest float64 error allowed, relative to the largest value of the reference. Correct algebra stays near 1e-15, and
#: one rounding to float32 is 6e-8: no value is in between, so this limit needs no tuning.
RELATIVE_LIMIT = 1e-9


def relative_error(candidate: Tensor, reference: Tensor, *, infinities: bool = False) -> float:
    """Largest absolute difference over the largest absolute reference; NaN where either is not finite.

    With ``infinities`` equal infinities are equal, as in logits that are masked by -inf; all others still give NaN.
    """
    if candidate.shape != reference.shape:
        return math.nan
    if not reference.is_complex():
        candidate, reference = candidate.double(), reference.double()
    finite = candidate.isfinite() & reference.isfinite()
    if not (finite | (candidate == reference) if infinities else finite).all():
        return math.nan
    if not finite.any():
        return 0.0
    scale = torch.where(finite, reference, 0).abs().max().item()
    difference = torch.where(finite, candidate - reference, 0).abs().max().item()
    return difference / scale if scale > 0 else difference


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
            remedy="This is an algebra error, not rounding: open an issue in kdexport's repository with the module "
            "that shows it.",
        )

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        return asdict(self)


def hostile_input(shape: tuple[int, ...]) -> Tensor:
    """Seeded float64 noise of uneven scale: neither centred nor of unit variance."""
    generator = torch.Generator().manual_seed(20240208)
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    return noise * 1.7 + 0.3


def _ordered(error: float) -> float:
    return math.inf if math.isnan(error) else error
