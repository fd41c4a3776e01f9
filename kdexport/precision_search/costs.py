"""The cost of a precision plan on the images of a search: flips, lost accuracy, noise, size and latency."""

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
    """The limits for a plan, relative to the float32 graph on the images of the search.

    ``flips`` and ``top1_drop`` are fractions of the images. An overfitted network may change no prediction on its
    training images; ``noise``, the RMS error of the logits relative to their size, limits such a network too.
    """

    flips: float
    top1_drop: float
    noise: float = float("inf")

    def allows(self, flips: float, top1_drop: float, noise: float) -> bool:
        """Whether the costs are within all limits; noise that is not finite never is."""
        return bool(np.isfinite(noise)) and flips <= self.flips and top1_drop <= self.top1_drop and noise <= self.noise


@dataclass(frozen=True, slots=True, eq=False)
class SearchImages:
    """Images (N,3,S,S) float32 and labels (N,) of the search; the result is judged on other images."""

    images: NDArray[np.float32]
    labels: NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanCost:
    """The measured cost of one plan, relative to the float32 graph.

    ``kept`` are its float32 nodes, ``equalised`` is the number of scaled pairs. ``flips`` and ``top1_drop`` are
    fractions of the images, ``divergence`` is the mean KL in nats, ``noise`` the RMS error of the logits relative to
    their size, infinite if a logit is not finite. ``latency_ms`` is the median for one image on one thread of
    onnxruntime, None for a form that onnxruntime does not run in int8. ``within`` tells whether the budget allows it.
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
class PlanEvaluator:
    """Measures files against the logits ``exact`` (N,K) of the float32 graph."""

    exact: NDArray[np.float32]
    data: SearchImages
    budget: SearchBudget

    @classmethod
    def of(cls, source: Path, data: SearchImages, budget: SearchBudget) -> "PlanEvaluator":
        """The evaluator with the float32 file ``source`` as its reference."""
        return cls(run_in_batches(load_model(source).logits, data.images, (_BATCH,)), data, budget)

    def measure(self, path: Path, form: str, layers: LayerPlan = PLAIN) -> PlanCost:
        """The cost of the file ``path``, which was written in ``form`` with the plan ``layers``."""
        # onnxruntime must not fuse the Q/DQ nodes of the form for TensorRT, whose operators then run in float32.
        native = form != "int8-s8"
        model = load_model(path, threads=1, optimise=native)
        logits = run_in_batches(model.logits, self.data.images, (_BATCH,))
        labels, before, after = self.data.labels, self.exact.argmax(axis=1), logits.argmax(axis=1)
        flips, top1 = float(np.mean(before != after)), float(np.mean(after == labels))
        drop = float(np.mean(before == labels)) - top1
        exact, other = self.exact.astype(np.float64), logits.astype(np.float64)
        noise = logit_noise(exact, other)
        return PlanCost(
            kept=layers.nodes,
            equalised=len(layers.equalised),
            flips=flips,
            top1=top1,
            top1_drop=drop,
            divergence=float(np.mean(kl_divergence(exact, other))),
            noise=noise,
            bytes=path.stat().st_size,
            latency_ms=_latency_ms(model, self.data.images[:1]) if native else None,
            within=self.budget.allows(flips, drop, noise),
        )


def _latency_ms(model: OrtModel, image: NDArray[np.float32]) -> float:
    model.logits(image)
    times = []
    for _ in range(_LATENCY_RUNS):
        started = time.perf_counter()
        model.logits(image)
        times.append(time.perf_counter() - started)
    return float(np.median(times)) * 1e3
