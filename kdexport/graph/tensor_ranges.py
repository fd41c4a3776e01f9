"""Calibration: the range of each tensor of a graph on real images, from which int8 scales are computed."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from kdexport.backends.base import INPUT
from kdexport.backends.ort import import_onnxruntime
from kdexport.core.console import quiet
from kdexport.core.files import scratch_folder
from kdexport.errors import AuditError
from kdexport.graph.value_histograms import EMPTY, Histogram, least_entropy, with_values, without_tails

Method = Literal["minmax", "entropy", "percentile"]
METHODS: tuple[Method, ...] = ("minmax", "entropy", "percentile")
#: Images whose values of all tensors are in memory at once.
_AT_ONCE = 4


@dataclass(frozen=True, slots=True)
class Range:
    """The range of one tensor that int8 must represent, ends included."""

    low: float
    high: float


def calibrate(
    source: Path, batches: Iterable[NDArray[np.float32]], path: Path, *, method: Method, percentile: float
) -> dict[str, Range]:
    """Run ``source`` (float32) on ``batches`` of images (N,3,S,S) and write the range of each tensor to ``path``.

    ``minmax`` uses the extremes; ``entropy`` minimises the divergence of the quantized histogram; ``percentile``
    excludes (100 - ``percentile``) % of the values. Raises ``AuditError`` if a range is not finite or there is no
    image.
    """
    ranges = (
        _extremes(source, batches) if method == "minmax" else ranges_of(observe(source, batches), method, percentile)
    )
    write_ranges(ranges, path)
    return ranges


def observe(source: Path, batches: Iterable[NDArray[np.float32]]) -> dict[str, Histogram]:
    """The values of each tensor of ``source`` on the images (N,3,S,S) of ``batches``; raises ``AuditError`` without
    images.
    """
    import_onnxruntime()
    from onnxruntime.quantization import CalibrationMethod, create_calibrator

    collected = _Collector()
    with quiet(), scratch_folder("ranges") as folder:
        calibrator = create_calibrator(source, None, str(folder / "augmented.onnx"), CalibrationMethod.Entropy)
        calibrator.collector = collected
        for batch in batches:
            for start in range(0, len(batch), _AT_ONCE):
                calibrator.collect_data(_reader(batch[start : start + _AT_ONCE]))
    if not collected.found:
        raise _no_images()
    return collected.found


class _Collector:
    """What onnxruntime hands the values of all tensors to."""

    def __init__(self) -> None:
        self.found: dict[str, Histogram] = {}

    def collect(self, values: dict[str, Any]) -> None:
        for name, arrays in values.items():
            for array in arrays:
                self.found[name] = with_values(self.found.get(name, EMPTY), np.asarray(array))


def ranges_of(found: dict[str, Histogram], method: Method, percentile: float) -> dict[str, Range]:
    """The range of each tensor by ``method``, from what ``observe`` returned; see ``calibrate``."""
    return {name: range_of(own, method, percentile) for name, own in found.items()}


def range_of(found: Histogram, method: Method, percentile: float) -> Range:
    """The range of one tensor."""
    if method == "minmax":
        return Range(found.low, found.high)
    return Range(*(least_entropy(found) if method == "entropy" else without_tails(found, percentile)))


def write_ranges(ranges: dict[str, Range], path: Path) -> None:
    """Write what ``read_ranges`` reads; raises ``AuditError`` if a range is not finite."""
    _require_finite(ranges)
    path.write_text(json.dumps({name: [ranges[name].low, ranges[name].high] for name in sorted(ranges)}, indent=0))


def _extremes(source: Path, batches: Iterable[NDArray[np.float32]]) -> dict[str, Range]:
    """The smallest and largest value of each tensor, found by the graph itself; no value leaves onnxruntime."""
    import_onnxruntime()
    from onnxruntime.quantization import CalibrationMethod, create_calibrator

    with quiet(), scratch_folder("ranges") as folder:
        calibrator = create_calibrator(source, None, str(folder / "augmented.onnx"), CalibrationMethod.MinMax)
        seen = 0
        for batch in batches:
            calibrator.collect_data(_reader(batch))
            seen += len(batch)
        if seen == 0:
            raise _no_images()
        found = calibrator.compute_data()
    return {name: Range(*(float(np.asarray(end).item()) for end in found[name].range_value)) for name in found}


def _no_images() -> AuditError:
    return AuditError(
        "Calibration of int8 got 0 images (at least 1 required).", remedy="Set images under [calibration]."
    )


def _require_finite(ranges: dict[str, Range]) -> None:
    for name, found in ranges.items():
        if not (np.isfinite([found.low, found.high]).all() and found.low <= found.high):
            raise AuditError(
                f"Tensor {name} ranges from {found.low} to {found.high} on the calibration images (finite required).",
                remedy="Train the student again: it overflows float32 on its own training images.",
            )


def read_ranges(path: Path) -> dict[str, Range]:
    """The ranges that ``calibrate`` wrote, by tensor."""
    return {name: Range(float(low), float(high)) for name, (low, high) in json.loads(path.read_text()).items()}


def _reader(batch: NDArray[np.float32]) -> object:
    import_onnxruntime()
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._rest: Iterator[dict[str, NDArray[np.float32]]] = iter([{INPUT: batch}])

        def get_next(self) -> dict[str, NDArray[np.float32]] | None:
            return next(self._rest, None)

    return Reader()
