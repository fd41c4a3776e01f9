"""The measured batch size: merged requests must get logits within the limits of the target."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from kdexport.backends.ort import CPU
from kdexport.serving import batch_size
from kdexport.serving.batch_size import cpu_batch, measured_pace
from kdexport.serving.batching import Pace
from kdexport.serving.limits import Limits
from kdexport.serving.loading import LoadedModel, load

LIMITS = Limits()
ALLOWED = 0.5


class Shifted:
    """An opened graph whose logits move by ``shift`` in batches of ``size``, in the last row only."""

    takes = None

    def __init__(self, ort: Any, size: int, shift: float) -> None:
        self._ort, self._size, self._shift = ort, size, shift
        self.nodes_by_provider, self.session = ort.nodes_by_provider, ort.session

    def logits(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        found: NDArray[np.float32] = self._ort.logits(images)
        if len(images) == self._size:
            found[-1, 0] += self._shift
        return found


@pytest.fixture(scope="module")
def model(zoo: Path) -> LoadedModel:
    return load(zoo, name="zoo", version=1, provider=CPU, limits=LIMITS, allowed_error=ALLOWED)


@pytest.fixture(autouse=True)
def batches_of_five(monkeypatch: pytest.MonkeyPatch) -> None:
    pace = Pace(seconds=0.0001, together=5, inline_images=5)
    monkeypatch.setattr(batch_size, "measure_pace", lambda *_: pace)


def test_batches_with_the_logits_of_single_runs_are_used(model: LoadedModel, zoo: Path) -> None:
    assert measured_pace(model, zoo, LIMITS).together == 5


@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize("shift", [2 * ALLOWED, float("nan")])
def test_one_row_of_one_batch_beyond_the_limit_ends_merging(
    model: LoadedModel, zoo: Path, size: int, shift: float, caplog: pytest.LogCaptureFixture
) -> None:
    broken: Any = Shifted(model.ort, size, shift)
    with caplog.at_level(logging.WARNING):
        pace = measured_pace(replace(model, ort=broken), zoo, LIMITS)
    assert pace == Pace(seconds=0.0001, together=1, inline_images=1)
    assert "zoo: requests are not merged, because batches compute differently. The logits of " in caplog.text


def test_a_row_that_differs_within_the_limits_is_allowed(model: LoadedModel, zoo: Path) -> None:
    other: Any = Shifted(model.ort, 4, 1e-6)
    assert measured_pace(replace(model, ort=other), zoo, LIMITS).together == 5


def test_rows_further_from_the_targets_own_logits_than_other_processors_end_merging(
    model: LoadedModel, zoo: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # Far below the limit on the distance from the reference, which is wide here.
    golden = replace(model.golden, allowed=1e6)
    other: Any = Shifted(model.ort, 4, 1e4)
    with caplog.at_level(logging.WARNING):
        assert measured_pace(replace(model, ort=other, golden=golden), zoo, LIMITS).together == 1
    assert "The golden logits of onnx-fp32 are not its own: " in caplog.text


def test_triton_on_a_cpu_gets_the_measured_batch_and_a_target_of_gpus_one(zoo: Path) -> None:
    assert cpu_batch(zoo, "onnx-fp32") == 5
    assert cpu_batch(zoo, "onnx-fp16") == 1
