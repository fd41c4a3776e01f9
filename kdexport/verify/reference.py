"""The one reference that every stage is compared with: the unfused student, in float64 and in float32."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from kdexport.backends.base import IN_ORDER
from kdexport.data.preprocessing import Preprocessing
from kdexport.graph.plan import PLAIN, LayerPlan
from kdexport.graph.tensor_ranges import Method
from kdexport.reparam.evaluation import in_float64
from kdexport.verify.simulation import EXTREMES, Simulation

_ATEN = torch.ops.aten
_RESHAPES = {
    _ATEN.view.default, _ATEN.reshape.default, _ATEN.flatten.using_ints, _ATEN.squeeze.default, _ATEN.squeeze.dim,
    _ATEN.squeeze.dims, _ATEN.clone.default, _ATEN.contiguous.default, _ATEN._unsafe_view.default,
}  # fmt: skip
_MEANS = {_ATEN.mean.dim, _ATEN.adaptive_avg_pool2d.default, _ATEN.avg_pool2d.default}

#: Images of one pass through a torch model.
_CHUNK = 64
#: Real images whose sums are added in order: a simulation of one addition after another takes a while.
_IN_ORDER_IMAGES = 48


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Probes:
    """Inputs of the ladder, (N,3,S,S) float32: ``real`` validation images first, then synthetic edge cases."""

    images: NDArray[np.float32]
    real: int
    edges: tuple[str, ...]

    def name(self, index: int) -> str:
        """The name of input ``index``."""
        return f"image {index}" if index < self.real else self.edges[index - self.real]


@dataclass(frozen=True, slots=True, eq=False)
class Simulated:
    """The simulation of a precision: its logits (n,K), n <= N, and its largest activation."""

    logits: NDArray[np.float32]
    peak: float


@dataclass(frozen=True, slots=True)
class FloatError:
    """The error of logits in float32: rms over real images, and the largest one over all inputs that were tried."""

    rms: float
    largest: float


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Reference:
    """Logits (N,K) of the unfused student, and simulations of the fused one by form (``targets.FORMS``).

    ``exact`` is float64 and ``unfused`` float32. ``added`` (N,K) float64 is the sum of absolute terms of each logit in
    the last linear layer. An int8 simulation covers the real images only: edge inputs are outside the range that int8
    was calibrated for. ``in_order`` is the error of the folded student in float32 if each sum is added in order from
    the bias (``IN_ORDER``), None if nothing is compared with it.
    """

    exact: NDArray[np.float64]
    unfused: NDArray[np.float32]
    added: NDArray[np.float64]
    simulated: Mapping[str, Simulated]
    in_order: FloatError | None = None


def make_probes(pixels: NDArray[np.uint8], preprocessing: Preprocessing) -> Probes:
    """Real images (N,S,S,3) uint8, and edge inputs that break assumptions about range, layout or symmetry."""
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


def make_reference(
    unfused: nn.Module,
    fused: nn.Module,
    probes: Probes,
    *,
    forms: Sequence[str] = ("fp16",),
    weight_bits: int = 8,
    plans: Mapping[str, LayerPlan] = MappingProxyType({}),
    trained: Mapping[str, nn.Module] = MappingProxyType({}),
    ranges: Mapping[str, tuple[Method, float]] = MappingProxyType({}),
) -> Reference:
    """Run the unfused student (eval mode, float32 weights) and simulations of the fused one in ``forms``.

    ``plans`` are the precision plans by form; a form without one is not in it. ``trained`` are the students that
    quantize-aware training made, by form: their simulated error is still measured against the unfused student, and
    includes what the training changed. ``ranges`` are the methods of the calibration and their percentages, by form.
    """
    exact, added = run_exact(unfused, probes.images)
    return Reference(
        exact=exact,
        added=added,
        unfused=run_torch(unfused, probes.images).astype(np.float32),
        simulated={
            form: _simulate(
                Simulation(
                    trained.get(form, fused),
                    form,
                    # Only CPU kernels need fewer bits for weights: TensorRT does not add products in 16 bits.
                    weight_bits=weight_bits if form == "int8-u8" else 8,
                    plan=plans.get(form, PLAIN),
                    ranges=ranges.get(form, EXTREMES),
                ),
                probes.images[: probes.real] if form.startswith("int8") else probes.images,
            )
            for form in forms
            if form not in ("fp32", IN_ORDER)
        },
        in_order=_in_order(fused, probes, exact) if IN_ORDER in forms else None,
    )


def _simulate(simulation: Simulation, images: NDArray[np.float32]) -> Simulated:
    return Simulated(run_torch(simulation, images).astype(np.float32), simulation.peak)


def _in_order(fused: nn.Module, probes: Probes, exact: NDArray[np.float64]) -> FloatError:
    """The error of sums in order, on some real images and all edge inputs."""
    real = min(probes.real, _IN_ORDER_IMAGES)
    chosen = np.r_[:real, probes.real : len(probes.images)]
    error = np.abs(run_torch(Simulation(fused, IN_ORDER), probes.images[chosen]) - exact[chosen])
    return FloatError(float(np.sqrt(np.mean(np.square(error[:real])))), float(error.max()))


def run_exact(unfused: nn.Module, images: NDArray[Any]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Logits (N,K) in float64, and the sum of absolute terms of each in the last linear layer: sum of |w x|, plus |b|.

    Rounding every feature to float32 once changes a logit by up to 2^-24 of that sum, even if the rest is exact. In a
    graph whose features are means over n pixels, a float32 sum in order has n - 1 roundings, each of at most 2^-24 of
    a part of the sum: with random signs their rms is up to 2^-24 sqrt(n / 3) of the mean of absolute values (Higham,
    Accuracy and Stability of Numerical Algorithms, section 4.2; Higham and Mary, 2019). That is sqrt(n / 12) times the
    2^-23 of rung B, and above 12 pixels the sum is counted that many times.
    """
    module = in_float64(unfused)
    if isinstance(module, fx.GraphModule):
        return _run_exact_graph(module, images)
    added: list[Tensor] = []

    def last(layer: nn.Module, given: tuple[Tensor], _result: Tensor) -> None:
        assert isinstance(layer, nn.Linear)
        added[:] = [_added(given[0], layer.weight, layer.bias)]

    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            layer.register_forward_hook(last)
    logits, sums = [], []
    for chunk in _chunks(images.astype(np.float64)):
        values = run_torch(module, chunk)
        logits.append(values)
        # A network without a linear layer at its end has no such sum.
        sums.append(added[0].numpy() if added and added[0].shape == values.shape else np.abs(values))
    return np.concatenate(logits), np.concatenate(sums)


def _added(features: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The sum of absolute terms of each result (N,K) of a linear layer."""
    return features.abs() @ weight.abs().T + (0 if bias is None else bias.abs())


def _run_exact_graph(module: fx.GraphModule, images: NDArray[Any]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """``run_exact`` of a graph, whose last operator is usually the linear layer of the logits."""
    output = next(node for node in module.graph.nodes if node.op == "output")
    logits: Any = output.args[0]
    if logits.target is not torch.ops.aten.linear.default:
        values = run_torch(module, images.astype(np.float64))
        return values, np.abs(values)
    pooled = _pooled_map(logits.args[0])
    output.args = ((logits, pooled if pooled is not None else logits, *logits.args),)
    module.recompile()
    found, sums = [], []
    for chunk in _chunks(images.astype(np.float64)):
        with torch.no_grad():
            values, averaged, features, weight, *bias = module(torch.from_numpy(chunk))
        terms = 1 if pooled is None else averaged.numel() / max(features.numel(), 1)
        found.append(values.numpy())
        sums.append(_added(features, weight, bias[0] if bias else None).numpy() * max(1.0, math.sqrt(terms / 12)))
    return np.concatenate(found), np.concatenate(sums)


def _pooled_map(node: Any) -> Any:
    """The map whose mean over its pixels ``node`` is, None if it is something else."""
    while isinstance(node, fx.Node) and node.target in _RESHAPES:
        node = node.args[0]
    return node.args[0] if isinstance(node, fx.Node) and node.target in _MEANS else None


def run_torch(module: nn.Module, images: NDArray[Any]) -> NDArray[np.float64]:
    """Logits (N,K) of an eval-mode module on the CPU, as float64."""
    with torch.no_grad():
        parts = [cast(Tensor, module(torch.from_numpy(chunk))).double() for chunk in _chunks(images)]
    return torch.cat(parts).numpy()


def _chunks(images: NDArray[Any]) -> Iterator[NDArray[Any]]:
    for start in range(0, len(images), _CHUNK):
        yield images[start : start + _CHUNK]
