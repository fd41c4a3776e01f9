"""What one precision plan costs and brings, on the images of a search: accuracy, flips, size, latency."""

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kdexport.backends.base import run_in_batches
from kdexport.backends.ort import OrtModel, load_model
from kdexport.graph.plan import PLAIN, LayerPlan
from kdexport.stats.logits import kl_divergence, logit_noise

_BATCH = 32

_LATENCY_RUNS = 15


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchBudget:
    """What a plan may cost on the images of the search against the float32 graph.

    ``flips`` and ``top1_drop`` are shares of the images. A network that knows its training images by heart changes no
    answer to them; ``noise``, the rms error of the logits relative to their size, is what it then can be held to.
    """

    flips: float
    top1_drop: float
    noise: float = float("inf")

    def holds(self, flips: float, top1_drop: float, noise: float) -> bool:
        """Whether such costs are within; what is not finite never is."""
        return bool(np.isfinite(noise)) and flips <= self.flips and top1_drop <= self.top1_drop and noise <= self.noise


@dataclass(frozen=True, slots=True, eq=False)
class SearchImages:
    """Images (N,3,S,S) float32 and labels (N,) of the search; never those that judge its result."""

    images: NDArray[np.float32]
    labels: NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Trade:
    """One plan's costs.

    ``kept`` are its float32 nodes, ``equalised`` counts its scaled pairs. ``flips`` and ``top1_drop`` are shares of the
    images against the float32 graph, ``divergence`` the mean KL in nats, ``noise`` the rms error of the logits relative
    to theirs, infinite where one is not finite. ``latency_ms`` is the median of single images on one thread of
    onnxruntime; None for a form that it does not run as int8.
    """

    kept: tuple[str, ...]
    equalised: int
    flips: float
    top1: float
    top1_drop: float
    divergence: float
    noise: float
    bytes: int
    latency_ms: float | None
    within: bool


@dataclass(frozen=True, slots=True, eq=False)
class Judge:
    """Measures files against the float32 graph's logits ``exact`` (N,K)."""

    exact: NDArray[np.float32]
    data: SearchImages
    budget: SearchBudget

    @classmethod
    def of(cls, source: Path, data: SearchImages, budget: SearchBudget) -> "Judge":
        """The judge whose reference is the float32 file ``source``."""
        return cls(run_in_batches(load_model(source).logits, data.images, (_BATCH,)), data, budget)

    def measure(self, path: Path, form: str, layers: LayerPlan = PLAIN) -> Trade:
        """The trade of the file ``path``, which is written in ``form`` by ``layers``."""
        # Q/DQ around float32 operators is what the form for TensorRT means, and what no optimisation here leaves alone.
        native = form != "int8-s8"
        model = load_model(path, threads=1, optimise=native)
        logits = run_in_batches(model.logits, self.data.images, (_BATCH,))
        labels, before, after = self.data.labels, self.exact.argmax(axis=1), logits.argmax(axis=1)
        flips, top1 = float(np.mean(before != after)), float(np.mean(after == labels))
        drop = float(np.mean(before == labels)) - top1
        exact, other = self.exact.astype(np.float64), logits.astype(np.float64)
        noise = logit_noise(exact, other)
        return Trade(
            kept=layers.nodes,
            equalised=len(layers.equalised),
            flips=flips,
            top1=top1,
            top1_drop=drop,
            divergence=float(np.mean(kl_divergence(exact, other))),
            noise=noise,
            bytes=path.stat().st_size,
            latency_ms=_latency_ms(model, self.data.images[:1]) if native else None,
            within=self.budget.holds(flips, drop, noise),
        )


def _latency_ms(model: OrtModel, image: NDArray[np.float32]) -> float:
    model.logits(image)
    times = []
    for _ in range(_LATENCY_RUNS):
        started = time.perf_counter()
        model.logits(image)
        times.append(time.perf_counter() - started)
    return float(np.median(times)) * 1e3
