"""Calibration by measurement: of several methods, the one whose int8 file answers most nearly as float32 does.

None is the best for every network. Where a few images have values many times as large as all others, the extremes leave
the others few levels; where the large values decide the answer, ranges without them cut it off. Which of the two
costs more shows in the answers only.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdexport.backends.ort import load_model
from kdexport.core.files import scratch_folder
from kdexport.graph.quantize import Form, quantize
from kdexport.graph.tensor_ranges import Method, observe, ranges_of, write_ranges
from kdexport.stats.logits import kl_divergence

#: The methods that are compared, with the percentage of ``percentile``; of equal ones the first is chosen.
COMPARED: tuple[tuple[Method, float], ...] = (
    ("minmax", 100.0), ("entropy", 100.0), ("percentile", 99.99), ("percentile", 99.9), ("percentile", 99.5),
    ("percentile", 99.0),
)  # fmt: skip

Batches = Callable[[], Iterable[NDArray[np.float32]]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Chosen:
    """The method that was chosen, and the mean divergence of each in nats, by ``name_of``."""

    method: Method
    percentile: float
    divergence: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        """The entry of the manifest; a divergence that is not finite is null."""
        finite = {name: value if np.isfinite(value) else None for name, value in self.divergence.items()}
        return {"method": self.method, "percentile": self.percentile, "divergence": finite}


def name_of(method: str, percentile: float) -> str:
    """The name of a method: ``minmax``, ``percentile 99.9``."""
    return f"{method} {percentile:g}" if method == "percentile" else method


def choose_ranges(source: Path, batches: Batches, path: Path, *, form: Form, weight_bits: int) -> Chosen:
    """Calibrate ``source`` (float32) by each method on the images (N,3,S,S) of ``batches``; write the best ranges to
    ``path``.

    The best has the smallest mean KL divergence of the answers of its file in ``form`` from those of ``source``, on the
    same images. Raises as ``calibrate``.
    """
    observed = observe(source, batches())
    exact = _answers(source, batches, optimise=True)
    found: list[tuple[float, bytes]] = []
    with scratch_folder("ranges") as folder:
        ranges, file = folder / "ranges.json", folder / "int8.onnx"
        for method, percentile in COMPARED:
            write_ranges(ranges_of(observed, method, percentile), ranges)
            quantize(source, ranges, file, form=form, weight_bits=weight_bits)
            # onnxruntime must not fuse the Q/DQ nodes of the form for TensorRT, whose operators then run in float32.
            answers = _answers(file, batches, optimise=form != "int8-s8")
            found.append((_divergence(exact, answers), ranges.read_bytes()))
    values = [value for value, _ in found]
    best = values.index(min(values))
    path.write_bytes(found[best][1])
    names = [name_of(*compared) for compared in COMPARED]
    method, percentile = COMPARED[best]
    return Chosen(method=method, percentile=percentile, divergence=dict(zip(names, values, strict=True)))


def _answers(path: Path, batches: Batches, *, optimise: bool) -> NDArray[np.float64]:
    model = load_model(path, threads=1, optimise=optimise)
    return np.concatenate([model.logits(batch) for batch in batches()]).astype(np.float64)


def _divergence(exact: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    """The mean over images; infinite if a logit is not finite."""
    return float(np.mean(kl_divergence(exact, other))) if np.isfinite(other).all() else float("inf")
