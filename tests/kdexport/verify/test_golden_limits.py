"""A target's own golden logits: equal bits in the same place, a small distance elsewhere."""

import numpy as np
import pytest
from numpy.typing import NDArray

from kdexport.backends.base import Execution
from kdexport.verify.golden_limits import OwnLogits, allowed_distance, compare_own, place_of

HERE = Execution(runtime="onnxruntime", version="1.2.3", device="CPUExecutionProvider")
OTHER = Execution(runtime="onnxruntime", version="1.2.4", device="CPUExecutionProvider")


def logits() -> NDArray[np.float32]:
    return np.random.default_rng(8).normal(0, 4, (12, 7)).astype(np.float32)


def recorded(target: str = "onnx-int8", allowed: float = 0.01) -> OwnLogits:
    return OwnLogits(target, logits(), place_of(HERE), allowed)


def moved(by: float, count: int = 1) -> NDArray[np.float32]:
    found = logits()
    found.reshape(-1)[:count] += np.float32(by)
    return found


def test_one_changed_bit_fails_where_the_bits_repeat_and_passes_elsewhere() -> None:
    changed = logits()
    changed[3, 2] = np.nextafter(changed[3, 2], np.float32(np.inf))
    assert compare_own(recorded(), logits(), HERE).holds
    assert str(compare_own(recorded(), logits(), HERE)) == "bit for bit those of the build"
    here = compare_own(recorded(), changed, HERE)
    assert not here.holds
    assert "1 values differ from those of the build" in str(here)
    assert "(none on the processor and version of the build)" in str(here)
    assert compare_own(recorded(), changed, OTHER).holds
    # Another batch or number of threads may add in another order.
    assert compare_own(recorded(), changed, HERE, single=False).holds
    # Kernels of a GPU are chosen by measured times.
    assert compare_own(recorded("onnx-fp16"), changed, HERE).holds


def test_elsewhere_the_distance_is_the_rms_and_has_a_limit() -> None:
    size = logits().size
    assert compare_own(recorded(), moved(0.009, size), OTHER).holds
    assert not compare_own(recorded(), moved(0.011, size), OTHER).holds
    found = compare_own(recorded(), moved(0.5), OTHER)
    assert not found.holds
    assert found.rms == pytest.approx(0.5 / size**0.5, rel=1e-3)
    assert "up to 0.01 elsewhere" in str(found)


@pytest.mark.parametrize("where", [HERE, OTHER])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_logit_that_is_not_finite_never_holds(bad: float, where: Execution) -> None:
    changed = logits()
    changed[1, 1] = bad
    assert not compare_own(recorded(), changed, where).holds


@pytest.mark.parametrize("where", [HERE, OTHER])
def test_logits_of_another_shape_never_hold(where: Execution) -> None:
    assert not compare_own(recorded(), logits()[:, :6], where).holds
    assert not compare_own(recorded(), logits()[:1], where).holds


def test_another_implementation_sets_the_distance_and_the_spread_sets_the_least() -> None:
    own = logits().astype(np.float64)
    noise = np.random.default_rng(2).normal(0, 1, own.shape)
    noise *= 0.4 / np.sqrt(np.mean(noise**2))
    assert allowed_distance("int8", own, own + noise) == pytest.approx(0.2)
    assert allowed_distance("fp32", own, own + noise) == pytest.approx(0.8)
    assert allowed_distance("int8", own, own) == pytest.approx(0.002 * own.std())
