"""The one reference that every stage is compared with: the unfused student, in float64 and in float32."""

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from kdexport.preprocessing import Preprocessing

#: Images of one pass through a torch model.
_CHUNK = 64


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Probes:
    """Inputs of the ladder, (N,3,S,S) float32: ``real`` validation images first, then synthetic edge cases."""

    images: NDArray[np.float32]
    real: int
    edges: tuple[str, ...]

    def name(self, index: int) -> str:
        """What input ``index`` is."""
        return f"image {index}" if index < self.real else self.edges[index - self.real]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Reference:
    """Logits (N,K) of the unfused student, and of the fp16 simulation of the fused one.

    ``exact`` is float64; ``unfused`` float32; ``simulated_fp16`` has weights and activations rounded to float16 with
    float32 accumulation; ``fp16_peak`` is the largest activation that the simulation met.
    """

    exact: NDArray[np.float64]
    unfused: NDArray[np.float32]
    simulated_fp16: NDArray[np.float32]
    fp16_peak: float


def make_probes(pixels: NDArray[np.uint8], preprocessing: Preprocessing) -> Probes:
    """Real images (N,S,S,3) uint8 and the inputs that break range, layout or symmetry assumptions."""
    size = preprocessing.image_size
    rng = np.random.default_rng(20240208)
    flat = np.zeros((size, size, 3), np.uint8)
    edges: dict[str, NDArray[np.uint8]] = {"all 0": flat, "all 255": np.full_like(flat, 255)}
    for channel, name in enumerate(("red", "green", "blue")):
        solid = flat.copy()
        solid[..., channel] = 255
        edges[f"solid {name}"] = solid
        edges[f"all but {name}"] = 255 - solid
    checker = (np.indices((size, size)).sum(0) % 2 * 255).astype(np.uint8)
    edges["checkerboard"] = np.repeat(checker[..., None], 3, axis=2)
    edges["binary noise"] = (rng.random((size, size, 3)) < 0.5).astype(np.uint8) * np.uint8(255)
    edges["uniform noise"] = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
    everything = np.concatenate([pixels, np.stack(list(edges.values()))])
    return Probes(images=preprocessing.normalise(everything), real=len(pixels), edges=tuple(edges))


def make_reference(unfused: nn.Module, fused: nn.Module, probes: Probes) -> Reference:
    """Run the unfused student (eval mode, float32 weights) and the simulation of its fused form."""
    simulation = SimulatedFp16(fused)
    return Reference(
        exact=run_torch(copy.deepcopy(unfused).double(), probes.images.astype(np.float64)),
        unfused=run_torch(unfused, probes.images).astype(np.float32),
        simulated_fp16=run_torch(simulation, probes.images).astype(np.float32),
        fp16_peak=simulation.peak,
    )


def run_torch(module: nn.Module, images: NDArray[Any]) -> NDArray[np.float64]:
    """Logits (N,K) of an eval-mode module on the CPU, as float64."""
    with torch.no_grad():
        parts = [cast(Tensor, module(torch.from_numpy(chunk))).double() for chunk in _chunks(images)]
    return torch.cat(parts).numpy()


def _chunks(images: NDArray[Any]) -> Iterator[NDArray[Any]]:
    for start in range(0, len(images), _CHUNK):
        yield images[start : start + _CHUNK]


class SimulatedFp16(nn.Module):
    """A float32 module whose weights and every intermediate result are rounded to float16."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._module = copy.deepcopy(module).float()
        with torch.no_grad():
            for parameter in self._module.parameters():
                parameter.copy_(parameter.half().float())
        self._rounding = _Rounding()  # type: ignore[no-untyped-call]

    @property
    def peak(self) -> float:
        """Largest absolute activation so far, before rounding."""
        return self._rounding.peak

    def forward(self, images: Tensor) -> Tensor:
        """(N,3,S,S) to logits (N,K)."""
        with self._rounding:
            return cast(Tensor, self._module(images.half().float()))


class _Rounding(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Rounds what each operator returns, and what an in-place operator leaves behind."""

    peak = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not isinstance(result, Tensor) or result.dtype != torch.float32:
            return result
        if result.numel():
            largest = result.abs().max().item()
            # NaN compares as smaller than any peak; it comes from an overflow and is one.
            self.peak = math.inf if math.isnan(largest) else max(self.peak, largest)
        rounded = result.half().float()
        return result.copy_(rounded) if func._schema.is_mutable else rounded
