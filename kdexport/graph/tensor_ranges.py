"""Calibration: the range of each tensor of a graph on real images, from which int8 scales are computed."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from kdexport.backends.base import INPUT
from kdexport.backends.ort import import_onnxruntime
from kdexport.core.console import quiet
from kdexport.core.files import scratch_folder
from kdexport.errors import AuditError

Method = Literal["minmax", "entropy", "percentile"]
METHODS: tuple[Method, ...] = ("minmax", "entropy", "percentile")


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
    import_onnxruntime()
    from onnxruntime.quantization import CalibrationMethod, create_calibrator

    kinds = dict(
        zip(METHODS, (CalibrationMethod.MinMax, CalibrationMethod.Entropy, CalibrationMethod.Percentile), strict=True)
    )
    options = {"percentile": percentile, "symmetric": False} if method == "percentile" else {}
    with quiet(), scratch_folder("ranges") as folder:
        augmented = str(folder / "augmented.onnx")
        calibrator = create_calibrator(source, None, augmented, kinds[method], extra_options=options)
        seen = 0
        for batch in batches:
            # One batch at a time, because the histogram methods would otherwise hold all values of all images.
            calibrator.collect_data(_reader(batch))
            seen += len(batch)
        if seen == 0:
            raise AuditError(
                "Calibration of int8 got 0 images (at least 1 required).", remedy="Set images under [calibration]."
            )
        found = calibrator.compute_data()
    ranges = {name: Range(*(float(np.asarray(end).item()) for end in found[name].range_value)) for name in found}
    _require_finite(ranges)
    path.write_text(json.dumps({name: [ranges[name].low, ranges[name].high] for name in sorted(ranges)}, indent=0))
    return ranges


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
