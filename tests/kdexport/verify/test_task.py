"""Rung D against its own mathematics: what an error can and cannot overturn, and what n images can and cannot show."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from kdexport.stats.logits import kl_divergence
from kdexport.verify.check import Check
from kdexport.verify.policy import Policy, parse_policy
from kdexport.verify.task import TaskMetrics, TaskReference, rung_d, task_metrics, task_reference

COUNT, CLASSES = 4000, 6
ERROR = 0.01


def reference_logits(count: int = COUNT) -> NDArray[np.float32]:
    return np.random.default_rng(2).normal(0, 3, (count, CLASSES)).astype(np.float32)


def labels(count: int = COUNT) -> NDArray[np.int64]:
    """Right for 3 of 4 images."""
    right = reference_logits(count).argmax(axis=1)
    wrong = (right + 1) % CLASSES
    return np.asarray(np.where(np.arange(count) % 4 == 0, wrong, right), np.int64)


def run(
    logits: NDArray[np.float32], policy: Policy | None = None, *, precision: str = "fp16", error: float = ERROR
) -> dict[str, Check]:
    exact = reference_logits(len(logits))
    reference = task_reference(exact, labels(len(logits)), np.arange(len(logits)) * 3, 0.0)
    metrics = task_metrics(logits, exact, precision=precision, unit_error=error / 4)
    return {check.name: check for check in rung_d("file", metrics, reference, policy or Policy())}


def noisy(scale: float = ERROR) -> NDArray[np.float32]:
    noise = np.random.default_rng(3).uniform(-scale, scale, (COUNT, CLASSES))
    return (reference_logits() + noise).astype(np.float32)


def test_noise_within_the_allowed_error_passes_and_each_of_its_flips_is_explained() -> None:
    checks = run(noisy())
    assert all(check.holds for check in checks.values())
    assert checks["flips"].measured > 0
    assert checks["unexplained flips"].measured == 0
    assert 0 < checks["largest KL divergence"].measured <= ERROR**2 / 2


def test_one_flip_of_a_confident_answer_fails_although_accuracy_is_unchanged() -> None:
    logits = noisy(0.0)
    wrong = int(np.flatnonzero(labels() != reference_logits().argmax(axis=1))[5])
    best, second = np.argsort(logits[wrong])[[-1, 0]]
    logits[wrong, [best, second]] = logits[wrong, [second, best]]
    assert second != labels()[wrong]
    checks = run(logits)
    assert checks["top-1 lost"].measured == 0
    assert checks["flips"].holds
    assert not checks["unexplained flips"].holds
    assert checks["unexplained flips"].measured == 1
    assert f"at image {wrong * 3}" in checks["unexplained flips"].detail


def test_a_tie_may_break_either_way() -> None:
    exact = reference_logits(8).copy()
    exact[2, [1, 4]] = exact[2].max() + 1
    other = exact.copy()
    other[2, 1] -= 1e-7
    other[2, 1] = np.nextafter(exact[2, 1], -np.inf, dtype=np.float32)
    reference = task_reference(exact, labels(8), np.arange(8), 0.0)
    metrics = task_metrics(other, exact, precision="fp32", unit_error=float(exact[2, 1] - other[2, 1]))
    checks = {check.name: check for check in rung_d("file", metrics, reference, Policy())}
    assert checks["flips"].measured == 1 / 8
    assert checks["unexplained flips"].holds


def test_swapped_classes_fail_in_every_measure_that_depends_on_them() -> None:
    checks = run(np.ascontiguousarray(reference_logits()[:, [1, 0, 2, 3, 4, 5]]))
    assert {name for name, check in checks.items() if not check.holds} == set(checks)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_an_answer_that_is_not_finite_fails(bad: float) -> None:
    logits = reference_logits().copy()
    logits[7] = bad
    checks = run(logits)
    assert not checks["largest KL divergence"].holds


@pytest.mark.parametrize(
    ("lost", "holds", "undecided", "beyond"),
    [(0, True, False, False), (6, True, True, False), (10, False, True, True), (25, False, False, False)],
)
def test_accuracy_is_shown_to_be_kept_or_lost_or_neither(lost: int, holds: bool, undecided: bool, beyond: bool) -> None:
    logits = reference_logits().copy()
    right = np.flatnonzero(labels() == logits.argmax(axis=1))[:lost]
    logits[right, logits[right].argmin(axis=1)] = 100
    check = run(logits)["top-1 lost"]
    assert check.measured == lost / COUNT
    assert (check.holds, check.undecided, check.beyond) == (holds, undecided, beyond)
    assert check.failed is (not holds and not beyond)
    strict = run(logits, parse_policy({"D": {"on_inconclusive": "fail"}}, "test"))["top-1 lost"]
    assert strict.holds is (holds and not undecided)
    assert strict.failed is not strict.holds


def counted(count: int, lost: int, gained: int, flips: int = 0, precision: str = "int8") -> dict[str, Check]:
    """Rung D of a file that loses, gains and otherwise flips so many of ``count`` images."""
    truth = np.zeros(count, np.int32)
    before, after = truth.copy(), truth.copy()
    after[:lost] = 1
    before[lost : lost + gained] = 1
    before[lost + gained : lost + gained + flips], after[lost + gained : lost + gained + flips] = 1, 2
    even = np.zeros(count, np.float32)
    reference = TaskReference(indices=truth, labels=truth, predictions=before, margins=even, own_error=0.0)
    metrics = TaskMetrics(precision=precision, predictions=after, divergences=even, errors=even, unit_error=1.0)
    return {check.name: check for check in rung_d("file", metrics, reference, Policy())}


def test_ten_lost_images_of_360_fail_a_budget_of_half_a_point() -> None:
    check = counted(360, 10, 0)["top-1 lost"]
    assert check.failed
    assert not check.undecided
    assert "10 lost, 0 gained, McNemar p 0.002" in check.detail


@pytest.mark.parametrize(("lost", "gained", "flips"), [(2, 0, 0), (5, 0, 0), (10, 3, 0), (20, 17, 9)])
def test_a_measured_value_beyond_its_budget_never_holds(lost: int, gained: int, flips: int) -> None:
    checks = counted(360, lost, gained, flips)
    drop = checks["top-1 lost"]
    assert drop.measured > drop.allowed
    assert not drop.holds
    assert drop.beyond
    assert ": beyond the limit, undecided; a proof takes 599 images without a change; 360 images show" in drop.detail
    flipped = checks["flips"]
    assert flipped.holds is (flipped.measured <= 0.1)
    assert flipped.beyond is (lost + gained + flips == 46)


def test_a_hundred_images_are_told_what_they_can_show() -> None:
    kept, one, many = (counted(100, lost, 0)["top-1 lost"] for lost in (0, 1, 4))
    assert kept.holds
    assert kept.undecided
    assert "within the limit, undecided; a proof takes 599 images" in kept.detail
    assert "100 images show that a value is above the limit with 90% power from 6.56% on" in kept.detail
    assert one.beyond
    assert many.failed


def test_few_images_are_inconclusive_and_the_required_number_is_reported() -> None:
    check = run(reference_logits(24))["flips"]
    assert check.holds
    assert check.undecided
    assert "takes 598 images" in check.detail


def test_the_divergence_is_that_of_torch_and_never_above_its_bound() -> None:
    exact = reference_logits(200).astype(np.float64)
    other = exact + np.random.default_rng(1).uniform(-0.7, 0.7, exact.shape)
    expected = torch.nn.functional.kl_div(
        torch.log_softmax(torch.from_numpy(other), 1),
        torch.log_softmax(torch.from_numpy(exact), 1),
        log_target=True,
        reduction="none",
    ).sum(1)
    found = kl_divergence(exact, other)
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-9, atol=1e-14)
    assert (found <= 0.7**2 / 2).all()
    assert kl_divergence(exact, exact + 5) == pytest.approx(0, abs=1e-12)


def test_the_hoeffding_bound_of_the_divergence_is_nearly_reached() -> None:
    # Two equally likely classes pulled apart are the worst case, so that a smaller constant would be wrong.
    error = 0.05
    found = kl_divergence(np.zeros((1, 2)), np.asarray([[error, -error]]))[0]
    assert 0.99 * error**2 / 2 < found <= error**2 / 2


@pytest.mark.parametrize("precision", ["fp32", "tf32", "fp16", "bf16", "int8"])
def test_each_precision_has_a_budget_of_its_own(precision: str) -> None:
    logits = reference_logits().copy()
    logits[:40] = np.roll(logits[:40], 1, axis=1)
    strict = parse_policy({"D": {precision: {"flips": 0.001, "top1_drop": 1.0}}}, "test")
    loose = parse_policy({"D": {precision: {"flips": 0.5, "top1_drop": 1.0}}}, "test")
    assert not run(logits, strict, precision=precision)["flips"].holds
    assert run(logits, loose, precision=precision)["flips"].holds


def test_a_flip_within_the_rounding_of_the_reference_is_explained() -> None:
    exact = reference_logits(50)
    reference: TaskReference = task_reference(exact, labels(50), np.arange(50), 0.0)
    flipped = exact.copy()
    order = np.argsort(exact[9])
    flipped[9, order[-1]] -= reference.margins[9] + np.float32(1e-6)
    metrics: TaskMetrics = task_metrics(flipped, exact, precision="fp32", unit_error=1e-9)
    limits = Policy()
    assert not _unexplained(metrics, reference, limits).holds
    own = replace(reference, own_error=float(reference.margins[9]))
    assert _unexplained(metrics, own, limits).holds


def _unexplained(metrics: TaskMetrics, reference: TaskReference, limits: Policy) -> Check:
    return next(check for check in rung_d("file", metrics, reference, limits) if check.name == "unexplained flips")
