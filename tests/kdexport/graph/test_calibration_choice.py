"""The choice of a calibration by the answers of its file, on images with and without values far from all others."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from scipy.special import log_softmax

from kdexport.errors import AuditError
from kdexport.graph import calibration_choice
from kdexport.graph.calibration_choice import COMPARED, choose_ranges, name_of
from kdexport.graph.quantize import FORMS, Form, quantize
from kdexport.graph.tensor_ranges import calibrate, read_ranges
from tests.kdexport.exported_students import images, small_graph, small_weights

SIZE, BITS = 16, {"int8-u8": 7, "int8-s8": 8}
EVEN = images(48, 4, size=SIZE)
#: One pixel of the last image is three hundred times as large: the extremes leave one level to the others.
OUTLIER = EVEN.copy()
OUTLIER[-1, :, 5, 5] *= 300


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_graph(tmp_path_factory.mktemp("choice") / "small.onnx", small_weights(), size=SIZE)


def parts(given: NDArray[np.float32]) -> Iterator[NDArray[np.float32]]:
    return iter(np.split(given, 3))


def log_probabilities(path: Path, given: NDArray[np.float32], *, fuse: bool = True) -> NDArray[np.float64]:
    options = ort.SessionOptions()
    if not fuse:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return np.asarray(log_softmax(np.asarray(session.run(None, {"input": given})[0], np.float64), 1))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("given", [EVEN, OUTLIER], ids=["even", "outlier"])
def test_the_ranges_are_those_whose_answers_diverge_least(
    source: Path, tmp_path: Path, form: Form, given: NDArray[np.float32]
) -> None:
    path, file = tmp_path / "ranges.json", tmp_path / "int8.onnx"
    found = choose_ranges(source, lambda: parts(given), path, form=form, weight_bits=BITS[form])

    exact, measured, ranges = log_probabilities(source, given), {}, {}
    for method, percentile in COMPARED:
        name = name_of(method, percentile)
        ranges[name] = calibrate(source, parts(given), tmp_path / "own.json", method=method, percentile=percentile)
        quantize(source, tmp_path / "own.json", file, form=form, weight_bits=BITS[form])
        other = log_probabilities(file, given, fuse=form == "int8-u8")
        measured[name] = float(np.mean(np.sum(np.exp(exact) * (exact - other), 1)))
    assert found.divergence == pytest.approx(measured, rel=1e-3, abs=1e-7)
    best = min(measured, key=lambda name: measured[name])
    assert name_of(found.method, found.percentile) == best
    assert read_ranges(path) == ranges[best]


def test_values_far_from_all_others_are_left_out_where_that_helps(source: Path, tmp_path: Path) -> None:
    path = tmp_path / "ranges.json"
    outlier = choose_ranges(source, lambda: parts(OUTLIER), path, form="int8-s8", weight_bits=8)
    assert outlier.method != "minmax"
    assert min(outlier.divergence.values()) < 0.5 * outlier.divergence["minmax"]


def test_of_equal_methods_the_first_is_chosen_and_answers_that_are_not_finite_never_are(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, given = tmp_path / "ranges.json", lambda: parts(EVEN)
    values = iter([float("inf"), 0.25, 0.25, 0.5, 0.75, 1.0])
    monkeypatch.setattr(calibration_choice, "_divergence", lambda exact, other: next(values))
    found = choose_ranges(source, given, path, form="int8-u8", weight_bits=7)
    assert found.to_json() == {
        "method": "entropy",
        "percentile": 100.0,
        "divergence": {
            "minmax": None,
            "entropy": 0.25,
            "percentile 99.99": 0.25,
            "percentile 99.9": 0.5,
            "percentile 99.5": 0.75,
            "percentile 99": 1.0,
        },
    }
    monkeypatch.undo()
    assert calibration_choice._divergence(np.zeros((2, 3)), np.array([[0, 1, 2], [0, np.nan, 1]])) == float("inf")


def test_without_images_it_is_refused_as_every_calibration(source: Path, tmp_path: Path) -> None:
    with pytest.raises(AuditError, match=r"got 0 images \(at least 1 required\)"):
        choose_ranges(source, lambda: iter(()), tmp_path / "ranges.json", form="int8-u8", weight_bits=7)
    assert list(tmp_path.iterdir()) == []
