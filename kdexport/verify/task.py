"""Rung D: the effect of a file's errors on the task, image by image, paired with the unfused float32 student.

Two limits follow from the largest difference e between their logits that rungs B and C allow: a flip needs a reference
margin of at most 2 e, and by Hoeffding's lemma the KL divergence is at most e^2 / 2. The limits for flips and lost
accuracy are a policy, because they depend on the application.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from kdexport.stats.logits import kl_divergence
from kdexport.stats.paired import (
    DETECTION_POWER,
    detectable_drop,
    detectable_proportion,
    drop_trials_needed,
    estimate_drop,
)
from kdexport.stats.proportions import Estimate, estimate_proportion, mcnemar_p_value, trials_needed
from kdexport.verify.check import Check, check_at_most
from kdexport.verify.policy import Policy, TaskPolicy


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TaskReference:
    """N validation images: labels (N,), and the unfused student's prediction and top1 - top2 margin of each.

    ``indices`` are the positions of the images in the validation split; ``own_error`` is the largest error of the
    student's float32 logits against float64.
    """

    indices: NDArray[np.int32]
    labels: NDArray[np.int32]
    predictions: NDArray[np.int32]
    margins: NDArray[np.float32]
    own_error: float


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TaskMetrics:
    """One file on the same N images: predictions, KL(reference || file) in nats, largest error of a logit.

    ``unit_error`` is the largest error of a logit that the precision itself has: the unit of rungs B and C.
    """

    precision: str
    predictions: NDArray[np.int32]
    divergences: NDArray[np.float32]
    errors: NDArray[np.float32]
    unit_error: float


def task_reference(
    logits: NDArray[np.float32], labels: NDArray[np.int64], indices: NDArray[np.int64], own_error: float
) -> TaskReference:
    """The per-image values that rung D stores of the reference's logits (N,K)."""
    top = np.partition(logits.astype(np.float64), -2, axis=1)[:, -2:]
    return TaskReference(
        indices=indices.astype(np.int32),
        labels=labels.astype(np.int32),
        predictions=logits.argmax(axis=1).astype(np.int32),
        margins=(top[:, 1] - top[:, 0]).astype(np.float32),
        own_error=own_error,
    )


def task_metrics(
    logits: NDArray[np.float32], reference: NDArray[np.float32], *, precision: str, unit_error: float
) -> TaskMetrics:
    """The per-image values that rung D stores of a file's logits (N,K), compared with the reference's."""
    exact, other = reference.astype(np.float64), logits.astype(np.float64)
    return TaskMetrics(
        precision=precision,
        # argmax takes NaN as the largest, so such an answer is a flip unless the class is right by chance; the error
        # is then NaN and fails its check.
        predictions=other.argmax(axis=1).astype(np.int32),
        divergences=kl_divergence(exact, other).astype(np.float32),
        errors=np.abs(other - exact).max(axis=1).astype(np.float32),
        unit_error=unit_error,
    )


def allowed_difference(metrics: TaskMetrics, reference: TaskReference, limits: Policy) -> float:
    """The largest difference of a logit between a file and the reference that the rungs allow; twice this margin can
    flip.
    """
    factor = limits.B.max_error if metrics.precision == "fp32" else limits.C.max_error
    # Both sides differ from the oracle: the file by as much as its rung allows, the reference by its own error.
    return factor * metrics.unit_error + reference.own_error


def rung_d(subject: str, metrics: TaskMetrics, reference: TaskReference, limits: Policy) -> list[Check]:
    """The checks of one file on the task."""
    policy = limits.D
    budget = policy.budget(metrics.precision)
    allowed = allowed_difference(metrics, reference, limits)
    flipped = metrics.predictions != reference.predictions
    flips, total = int(flipped.sum()), len(flipped)
    # In float64, because the stored margin is rounded: only ties reach a limit of exactly 2 e.
    unexplained = flipped & ~(reference.margins.astype(np.float64) <= 2 * allowed)
    right, was_right = metrics.predictions == reference.labels, reference.predictions == reference.labels
    lost, gained = int((was_right & ~right).sum()), int((~was_right & right).sum())
    flip_rate = estimate_proportion(flips, total, policy.confidence)
    drop = estimate_drop(lost, gained, total, policy.confidence)
    divergence = float(np.max(metrics.divergences))
    return [
        _budgeted("flips", subject, flip_rate, budget.flips, policy, f"{flips} of {total}", total),
        check_at_most(
            "D", subject, "unexplained flips", int(unexplained.sum()), policy.unexplained_flips, unit="images",
            detail=_widest(flipped, reference, 2 * allowed),
        ),
        _budgeted(
            "top-1 lost", subject, drop, budget.top1_drop, policy,
            f"{lost} lost, {gained} gained, McNemar p {mcnemar_p_value(lost, gained):.2g}", total,
        ),
        check_at_most(
            "D", subject, "largest KL divergence", divergence, allowed**2 / 2, unit="nats",
            detail=f"mean {float(np.mean(metrics.divergences)):.2g}; largest error of a logit "
            f"{float(np.max(metrics.errors)):.2g}",
        ),
    ]  # fmt: skip


def _budgeted(
    name: Literal["flips", "top-1 lost"],
    subject: str,
    estimate: Estimate,
    limit: float,
    policy: TaskPolicy,
    counts: str,
    images: int,
) -> Check:
    """The check of a budget. An estimate within it holds unless the budget is refuted; one beyond it never holds: it
    fails if the budget is refuted, and is otherwise ``beyond``.

    Refuted means that the exact lower bound is above the limit, which happens with probability at most
    1 - ``confidence`` if the true value is within it.
    """
    verdict, exceeds = estimate.verdict(limit), not estimate.value <= limit
    undecided, accepted = verdict == "INCONCLUSIVE", policy.on_inconclusive == "pass"
    detail = f"{counts}; {policy.confidence:.0%} bounds {estimate.low:.3%} and {estimate.high:.3%}"
    if undecided:
        detail += _resolution(name, limit, images, policy.confidence, exceeds=exceeds)
    return Check(
        rung="D",
        subject=subject,
        name=name,
        holds=verdict == "PASS" or (undecided and accepted and not exceeds),
        measured=estimate.value,
        allowed=limit,
        unit="of images",
        detail=detail,
        undecided=undecided,
        beyond=undecided and accepted and exceeds,
    )


def _resolution(
    name: Literal["flips", "top-1 lost"], limit: float, images: int, confidence: float, *, exceeds: bool
) -> str:
    """What ``images`` images can show about ``limit``."""
    drop = name == "top-1 lost"
    needed: Callable[[float, float], int] = drop_trials_needed if drop else trials_needed
    least = (detectable_drop if drop else detectable_proportion)(limit, images, confidence)
    proof = f"a proof takes {needed(limit, confidence):,} images without a change" if limit else "no proof is possible"
    shows = (
        f"{images:,} images show that a value is above the limit with {DETECTION_POWER:.0%} power from {least:.2%} on"
        if least is not None
        else f"{images:,} images cannot show that a value is above the limit"
    )
    return f": {'beyond' if exceeds else 'within'} the limit, undecided; {proof}; {shows}"


def _widest(flipped: NDArray[np.bool_], reference: TaskReference, explained: float) -> str:
    limit = f"a margin up to {explained:.2g} explains a flip"
    if not flipped.any():
        return limit
    worst = int(np.argmax(np.where(flipped, reference.margins, -np.inf)))
    return f"{limit}; widest {reference.margins[worst]:.2g} at image {reference.indices[worst]}"
