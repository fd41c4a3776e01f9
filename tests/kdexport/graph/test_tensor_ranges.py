from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.nn import functional

from kdexport.errors import AuditError
from kdexport.graph.tensor_ranges import METHODS, Method, Range, calibrate, read_ranges
from tests.kdexport.exported_students import images, small_graph, small_weights

SIZE = 16
BATCHES = [images(5, 1, size=SIZE), images(3, 2, size=SIZE) * 0.5, images(7, 3, size=SIZE)]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_graph(tmp_path_factory.mktemp("calibration") / "small.onnx", small_weights(), size=SIZE)


def small_tensors(x: NDArray[np.float32]) -> dict[str, NDArray[np.float64]]:
    """The tensors of the small graph in float64."""
    w = {name: torch.from_numpy(value).double() for name, value in small_weights().items()}
    conv = functional.conv2d(torch.from_numpy(x).double(), w["conv.weight"], w["conv.bias"], padding=1)
    pooled = conv.relu().mean((2, 3))
    logits = functional.linear(pooled, w["linear.weight"], w["linear.bias"])
    tensors = {"input": torch.from_numpy(x).double(), "c": conv, "r": conv.relu(), "f": pooled, "logits": logits}
    return {name: value.numpy() for name, value in tensors.items()}


def run(source: Path, path: Path, method: Method, percentile: float = 99.9) -> dict[str, Range]:
    return calibrate(source, iter(BATCHES), path, method=method, percentile=percentile)


def test_extremes_are_those_over_all_batches(source: Path, tmp_path: Path) -> None:
    found = run(source, tmp_path / "r.json", "minmax")
    for name, values in small_tensors(np.concatenate(BATCHES)).items():
        assert found[name].low == pytest.approx(values.min(), rel=1e-5, abs=1e-5), name
        assert found[name].high == pytest.approx(values.max(), rel=1e-5, abs=1e-5), name


def test_a_percentile_excludes_its_share_of_the_values(source: Path, tmp_path: Path) -> None:
    values = small_tensors(np.concatenate(BATCHES))["c"]
    found = run(source, tmp_path / "r.json", "percentile", 98.0)["c"]
    outside = np.mean((values < found.low) | (values > found.high))
    # Half a bin of the histogram on each side.
    assert 0.005 < outside < 0.025
    assert run(source, tmp_path / "r.json", "percentile", 99.99)["c"].high > found.high


def test_entropy_stays_inside_the_extremes(source: Path, tmp_path: Path) -> None:
    widest = run(source, tmp_path / "r.json", "minmax")
    for name, found in run(source, tmp_path / "r.json", "entropy").items():
        assert widest[name].low - 1e-4 <= found.low <= found.high <= widest[name].high + 1e-4, name


def test_one_image_far_from_all_others_does_not_keep_entropy_busy(source: Path, tmp_path: Path) -> None:
    far = [*BATCHES, 1e5 * BATCHES[0]]
    found = calibrate(source, iter(far), tmp_path / "r.json", method="entropy", percentile=100.0)
    for name, values in small_tensors(np.concatenate(far)).items():
        reach = np.abs(values).max()
        assert values.min() - 0.01 * reach <= found[name].low <= found[name].high <= values.max() + 0.01 * reach, name


@pytest.mark.parametrize("method", METHODS)
def test_ranges_read_back_and_are_the_same_bytes_each_time(source: Path, tmp_path: Path, method: Method) -> None:
    found = run(source, tmp_path / "a.json", method)
    run(source, tmp_path / "b.json", method)
    assert read_ranges(tmp_path / "a.json") == found
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


def test_calibration_without_images_or_with_an_overflow_is_refused(source: Path, tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    with pytest.raises(AuditError, match=r"^Calibration of int8 got 0 images \(at least 1 required\)\."):
        calibrate(source, iter([]), path, method="minmax", percentile=99.9)
    hot = np.full((2, 3, SIZE, SIZE), np.inf, np.float32)
    with pytest.raises(AuditError, match=r"Tensor \w+ ranges from"):
        calibrate(source, [hot], path, method="minmax", percentile=99.9)
    for method in METHODS:
        with pytest.raises(AuditError, match=r"Tensor \w+ ranges from"):
            calibrate(source, [BATCHES[0], hot, BATCHES[1]], path, method=method, percentile=99.9)
    assert not path.exists()
