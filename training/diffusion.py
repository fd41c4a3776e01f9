"""The diffusion reverse process along which KDiffusion's branches approach the teacher.

m branches walk m steps; step 0 is clean, e_j = x0 - z_j is the error of branch j. docs/method.md has the equations, the
proof of the expectation and the choices that the paper leaves open.

The marginal reading of the reverse process: the teacher's states are drawn, the student runs freely beside them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from training.noise_schedule import SCHEDULES, NoiseSchedule, Posterior, posterior_coefficients
from training.quadratic import (
    Form,
    loss_form,
    on_device,
    permutation_average,
    quadratic_mean,
    reordered,
    reordered_on_device,
    symmetric_form,
    truncated_form,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class MarginalReading:
    """How the marginal trajectory is read; with shared noise all of this cancels out of the loss.

    ``start``: the student starts from the branch of the first step, which serves that step too; from a branch of its
    own, so that m branches serve m - 1 steps; or from the teacher's noisy feature. ``noise``: the first branch without
    or with its gradient, a Gaussian of deviation ``sigma``, or each step's own branch, without gradient. ``target``:
    the mean of the posterior, or the teacher's own state on its trajectory.
    """

    start: Literal["shared_branch", "own_branch", "teacher"] = "shared_branch"
    noise: Literal["first_branch", "first_branch_attached", "gaussian", "step_branch"] = "first_branch"
    target: Literal["posterior_mean", "sampled"] = "posterior_mean"
    sigma: float = 1.0


def marginal_loss(
    branch_features: Sequence[Tensor] | Tensor,
    x0: Tensor,
    schedule: NoiseSchedule,
    order: Sequence[int] | Tensor,
    step_weights: Sequence[float],
    reading: MarginalReading,
    backpropagation: Literal["full", "truncated"],
) -> Tensor:
    """(1/m) sum_k omega_k mean((target_{k-1} - state_{k-1})^2), a scalar; arguments are ``reverse_process_loss``'s.

    The teacher's states are x_k = a_k x0 + b_k noise, the student's state_{k-1} = u_k state_k + v_k z_{pi(k)}.
    """
    walked, count = _walked(branch_features, order), schedule.num_steps
    noises = _noises(walked, x0, count, reading)
    # At the times 0..m; at time 0 the teacher's state is x0 itself.
    states = [x0, *(a * x0 + b * noise for (a, b), noise in zip(schedule.levels[1:], noises, strict=True))]
    state = states[count] if reading.start == "teacher" else walked[-1]
    loss = x0.new_zeros(())
    for k in range(count, 0, -1):
        u, v, _ = schedule.steps[k - 1]
        target = states[k - 1] if reading.target == "sampled" else u * states[k] + v * x0
        carried = state.detach() if backpropagation == "truncated" else state
        state = u * carried + v * walked[k - 1]
        loss = loss + step_weights[k - 1] * (target - state).square().mean()
    return loss / count


def _noises(walked: list[Tensor], x0: Tensor, count: int, reading: MarginalReading) -> list[Tensor]:
    """The noise in the teacher's state at the times 1..m."""
    if reading.noise == "step_branch":
        return [z.detach() for z in walked[:count]]
    if reading.noise == "gaussian":
        return [reading.sigma * torch.randn_like(x0)] * count
    first = walked[-1]
    return [first if reading.noise == "first_branch_attached" else first.detach()] * count


def _walked(branch_features: Sequence[Tensor] | Tensor, order: Sequence[int] | Tensor) -> list[Tensor]:
    """The branches by the step that they serve."""
    if not isinstance(order, Tensor):
        return [branch_features[index] for index in order]
    stacked = branch_features if isinstance(branch_features, Tensor) else torch.stack(list(branch_features))
    if order.ndim == 1:
        return list(stacked.index_select(0, order).unbind(0))
    samples = torch.arange(order.shape[0], device=order.device)
    return [stacked[order[:, step], samples] for step in range(order.shape[1])]


__all__ = [
    "SCHEDULES",
    "Backpropagation",
    "MarginalReading",
    "NoiseSchedule",
    "Permutation",
    "StepWeights",
    "Trajectory",
    "expected_loss_coefficients",
    "expected_loss_form",
    "posterior_coefficients",
    "reverse_process_loss",
    "step_weights_of",
]

Permutation = Literal["expected"] | Sequence[int] | Tensor

Trajectory = Literal["shared_noise", "marginal"]

Backpropagation = Literal["full", "truncated"]

StepWeights = Literal["uniform", "inverse_v2", "kl"]

_PLAIN = MarginalReading()


def step_weights_of(
    schedule: NoiseSchedule, kind: StepWeights, *, sigma: float = 1.0, limit: float = 10.0
) -> tuple[float, ...]:
    """omega_k for k = 1..m.

    "inverse_v2" is 1 / v_k^2: every step weighs the error of its branch alike. "kl" is 1 / (2 w_k sigma^2), the factor
    that eq. 12 drops; it is infinite at k = 1, where w = 0, and cut at ``limit``.
    """
    if kind == "uniform":
        return (1.0,) * schedule.num_steps
    if kind == "inverse_v2":
        return tuple(1 / step.v**2 for step in schedule.steps)
    return tuple(1 / max(2 * step.w * sigma**2, 1 / limit) for step in schedule.steps)


def expected_loss_coefficients(
    schedule: NoiseSchedule, step_weights: Sequence[float] | None = None
) -> tuple[float, float]:
    """(alpha, beta) with E_pi[L] = alpha sum_j |e_j|^2 + beta |sum_j e_j|^2 under a uniformly random permutation."""
    return permutation_average(_forms(schedule.steps, _weights(schedule, step_weights), "full")[0])


def expected_loss_form(schedule: NoiseSchedule, step_weights: Sequence[float] | None = None) -> Form:
    """The matrix alpha I + beta 11' of that expectation, (m,m)."""
    return symmetric_form(*expected_loss_coefficients(schedule, step_weights), schedule.num_steps)


def reverse_process_loss(
    branch_features: Sequence[Tensor] | Tensor,
    teacher_feature: Tensor,
    schedule: NoiseSchedule,
    permutation: Permutation = "expected",
    trajectory: Trajectory = "shared_noise",
    *,
    step_weights: Sequence[float] | None = None,
    backpropagation: Backpropagation = "full",
    marginal: MarginalReading = _PLAIN,
) -> Tensor:
    """Weighted mean squared distance of the branches' reverse process from the teacher's (eqs. 11 and 12), a scalar.

    ``branch_features`` are m tensors, or one with them as its first dimension, shaped like ``teacher_feature`` = x0.
    ``permutation[k - 1]`` is the branch that serves step k; "expected" is the exact mean over all permutations. As an
    int64 tensor (m,), or (N,m) with an order for each of N samples, it stays on its device: nothing waits for it, and
    its values are not checked. ``step_weights`` has omega_k for k = 1..m, by default 1; "truncated" lets no gradient
    flow from one step into the steps before it.

    "shared_noise" lets teacher and student walk the same noise, so the loss is zero exactly when every branch equals
    x0; "marginal" draws the teacher's states from their marginals, as ``marginal`` says. Raises ``ValueError`` for
    numbers and shapes that do not fit, no permutation, and what the shared noise cancels or the expectation lacks.
    """
    count = len(branch_features)
    _check_shapes(branch_features, teacher_feature, schedule, marginal)
    order = _checked_order(permutation, count, teacher_feature)
    weights = _weights(schedule, step_weights)
    if trajectory == "marginal":
        if order is None:
            raise ValueError("the expectation has a closed form for the shared-noise trajectory only")
        return marginal_loss(branch_features, teacher_feature, schedule, order, weights, marginal, backpropagation)
    if marginal != _PLAIN:
        raise ValueError("the shared-noise trajectory has one start, noise and target: others belong to the marginal")
    stacked = branch_features if isinstance(branch_features, Tensor) else torch.stack(list(branch_features))
    errors = teacher_feature - stacked
    forms = _forms(schedule.steps, weights, backpropagation)
    if order is None:
        forms = tuple(symmetric_form(*permutation_average(form), count) for form in forms)
    elif not isinstance(order, Tensor):
        forms = tuple(reordered(form, order) for form in forms)
    like = errors.new_empty((), dtype=torch.promote_types(errors.dtype, torch.float32))
    tensors = [on_device(form, like) for form in forms]
    if isinstance(order, Tensor):
        tensors = [reordered_on_device(tensor, order) for tensor in tensors]
    return quadratic_mean(errors, *tensors)


def _compute_forms(
    steps: tuple[Posterior, ...], weights: tuple[float, ...], backpropagation: Backpropagation
) -> tuple[Form, ...]:
    value = loss_form(steps, weights)
    return (value,) if backpropagation == "full" else (value, truncated_form(steps, weights))


_cached_forms = lru_cache(maxsize=64)(_compute_forms)


def _forms(
    steps: tuple[Posterior, ...], weights: tuple[float, ...], backpropagation: Backpropagation
) -> tuple[Form, ...]:
    # A compiler sees through neither caches nor the need for them.
    compute = _compute_forms if torch.compiler.is_compiling() else _cached_forms
    return compute(steps, weights, backpropagation)


def _weights(schedule: NoiseSchedule, step_weights: Sequence[float] | None) -> tuple[float, ...]:
    if step_weights is None:
        return (1.0,) * schedule.num_steps
    if len(step_weights) != schedule.num_steps:
        raise ValueError(f"{len(step_weights)} step weights for a schedule of {schedule.num_steps} steps")
    return tuple(step_weights)


def _check_shapes(
    branch_features: Sequence[Tensor] | Tensor, x0: Tensor, schedule: NoiseSchedule, reading: MarginalReading
) -> None:
    served = len(branch_features) - (reading.start == "own_branch")
    if served != schedule.num_steps or served < 1:
        extra = ", one of them the start," if reading.start == "own_branch" else ""
        raise ValueError(f"{len(branch_features)} branches{extra} for a schedule of {schedule.num_steps} steps")
    if any(z.shape != x0.shape for z in branch_features):
        shapes = [tuple(z.shape) for z in branch_features]
        raise ValueError(f"branches {shapes} differ in shape from the teacher's {tuple(x0.shape)}")


def _checked_order(permutation: Permutation, count: int, x0: Tensor) -> list[int] | Tensor | None:
    """None stands for the expectation."""
    if isinstance(permutation, Tensor):
        if permutation.dtype != torch.int64 or permutation.shape not in {(count,), (x0.shape[0], count)}:
            described = f"{permutation.dtype} {tuple(permutation.shape)}"
            raise ValueError(f"{described} is not an int64 order of {count} branches, nor one for each sample")
        return permutation
    if isinstance(permutation, str):
        if permutation != "expected":
            raise ValueError(f"{permutation!r} is neither 'expected' nor a permutation")
        return None
    order = [int(index) for index in permutation]
    if sorted(order) != list(range(count)):
        raise ValueError(f"{order} is not a permutation of 0..{count - 1}")
    return order
