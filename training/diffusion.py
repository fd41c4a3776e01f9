"""The diffusion reverse process along which KDiffusion's branches approach the teacher.

m branches serve m steps; step 0 is clean, and e_j = x0 - z_j is the error of branch j. The trajectories of teacher and
student share their noise, which cancels in the loss, or the teacher's states are drawn from their marginals.
docs/method.md has the equations, the proof of the expectation and the choices that the paper leaves open.
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

__all__ = [
    "SCHEDULES",
    "Backpropagation",
    "MarginalOptions",
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


@dataclass(frozen=True, kw_only=True, slots=True)
class MarginalOptions:
    """Choices of the marginal trajectory; with shared noise they all cancel in the loss.

    ``start`` is where the student starts: from the branch of the first step, which then serves that step too; from a
    separate branch, so that m branches serve m - 1 steps; or from the teacher's noisy feature. ``noise`` is the first
    branch without or with its gradient, a Gaussian with standard deviation ``sigma``, or the branch of each step
    without its gradient. ``target`` is the mean of the posterior, or the teacher's state on its trajectory.
    """

    start: Literal["shared_branch", "own_branch", "teacher"] = "shared_branch"
    noise: Literal["first_branch", "first_branch_attached", "gaussian", "step_branch"] = "first_branch"
    target: Literal["posterior_mean", "sampled"] = "posterior_mean"
    sigma: float = 1.0


_DEFAULT_OPTIONS = MarginalOptions()


def step_weights_of(
    schedule: NoiseSchedule, kind: StepWeights, *, sigma: float = 1.0, limit: float = 10.0
) -> tuple[float, ...]:
    """omega_k for k = 1..m.

    "inverse_v2" is 1 / v_k^2, which gives the errors of all branches the same weight. "kl" is 1 / (2 w_k sigma^2), the
    factor that eq. 12 drops, limited to ``limit``: it is infinite at k = 1, where w = 0.
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
    """The matrix alpha I + beta 11' (m,m) of the loss under a uniformly random permutation."""
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
    marginal: MarginalOptions = _DEFAULT_OPTIONS,
) -> Tensor:
    """Weighted mean squared distance between the reverse processes of branches and teacher (eqs. 11 and 12), a scalar.

    ``branch_features`` is a sequence of m tensors with the shape of ``teacher_feature`` = x0, or one tensor that stacks
    them. ``permutation[k - 1]`` is the branch that serves step k; "expected" gives the exact mean over all
    permutations. An int64 tensor (m,), or (N,m) with one order for each of N samples, stays on its device: the host
    neither waits for its values nor checks them. ``step_weights`` are omega_k for k = 1..m, by default 1.
    ``backpropagation`` "truncated" stops the gradient between one step and the steps before it.

    With "shared_noise", teacher and student use the same noise, so the loss is zero exactly if every branch equals x0.
    "marginal" draws the teacher's states from their marginals with the choices of ``marginal``. Raises ``ValueError``
    for numbers or shapes that do not match, an invalid permutation, choices of ``marginal`` with "shared_noise", and
    "expected" with "marginal".
    """
    count = len(branch_features)
    _check_shapes(branch_features, teacher_feature, schedule, marginal)
    order = _checked_order(permutation, count, teacher_feature)
    weights = _weights(schedule, step_weights)
    if trajectory == "marginal":
        if order is None:
            raise ValueError("permutation 'expected' has a closed form for trajectory 'shared_noise' only")
        return _marginal_loss(branch_features, teacher_feature, schedule, order, weights, marginal, backpropagation)
    if marginal != _DEFAULT_OPTIONS:
        raise ValueError("start, noise and target can be chosen for trajectory 'marginal' only")
    stacked = branch_features if isinstance(branch_features, Tensor) else torch.stack(list(branch_features))
    # Of the other sign, which a quadratic form does not see and a gradient would have to turn back.
    errors = stacked - teacher_feature
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


def _marginal_loss(
    branch_features: Sequence[Tensor] | Tensor,
    x0: Tensor,
    schedule: NoiseSchedule,
    order: Sequence[int] | Tensor,
    step_weights: Sequence[float],
    options: MarginalOptions,
    backpropagation: Literal["full", "truncated"],
) -> Tensor:
    """(1/m) sum_k omega_k mean((target_{k-1} - state_{k-1})^2), a scalar.

    The teacher's states are x_k = a_k x0 + b_k noise, the student's state_{k-1} = u_k state_k + v_k z_{pi(k)}.
    """
    served, count = _in_step_order(branch_features, order), schedule.num_steps
    noises = _noises(served, x0, count, options)
    # The teacher's states at the times 0..m; at time 0 it is x0 itself.
    states = [x0, *(a * x0 + b * noise for (a, b), noise in zip(schedule.levels[1:], noises, strict=True))]
    state = states[count] if options.start == "teacher" else served[-1]
    loss = x0.new_zeros(())
    for k in range(count, 0, -1):
        u, v, _ = schedule.steps[k - 1]
        target = states[k - 1] if options.target == "sampled" else u * states[k] + v * x0
        carried = state.detach() if backpropagation == "truncated" else state
        state = u * carried + v * served[k - 1]
        loss = loss + step_weights[k - 1] * (target - state).square().mean()
    return loss / count


def _noises(served: list[Tensor], x0: Tensor, count: int, options: MarginalOptions) -> list[Tensor]:
    """The noise in the teacher's state at the times 1..m."""
    if options.noise == "step_branch":
        return [z.detach() for z in served[:count]]
    if options.noise == "gaussian":
        return [options.sigma * torch.randn_like(x0)] * count
    first = served[-1]
    return [first if options.noise == "first_branch_attached" else first.detach()] * count


def _in_step_order(branch_features: Sequence[Tensor] | Tensor, order: Sequence[int] | Tensor) -> list[Tensor]:
    """The branches in the order of the steps that they serve."""
    if not isinstance(order, Tensor):
        return [branch_features[index] for index in order]
    stacked = branch_features if isinstance(branch_features, Tensor) else torch.stack(list(branch_features))
    if order.ndim == 1:
        return list(stacked.index_select(0, order).unbind(0))
    samples = torch.arange(order.shape[0], device=order.device)
    return [stacked[order[:, step], samples] for step in range(order.shape[1])]


def _compute_forms(
    steps: tuple[Posterior, ...], weights: tuple[float, ...], backpropagation: Backpropagation
) -> tuple[Form, ...]:
    value = loss_form(steps, weights)
    return (value,) if backpropagation == "full" else (value, truncated_form(steps, weights))


_cached_forms = lru_cache(maxsize=64)(_compute_forms)


def _forms(
    steps: tuple[Posterior, ...], weights: tuple[float, ...], backpropagation: Backpropagation
) -> tuple[Form, ...]:
    # A compiler cannot trace the cache, and computes the forms once anyway.
    compute = _compute_forms if torch.compiler.is_compiling() else _cached_forms
    return compute(steps, weights, backpropagation)


def _weights(schedule: NoiseSchedule, step_weights: Sequence[float] | None) -> tuple[float, ...]:
    if step_weights is None:
        return (1.0,) * schedule.num_steps
    if len(step_weights) != schedule.num_steps:
        raise ValueError(f"got {len(step_weights)} step weights for a schedule of {schedule.num_steps} steps")
    return tuple(step_weights)


def _check_shapes(
    branch_features: Sequence[Tensor] | Tensor, x0: Tensor, schedule: NoiseSchedule, options: MarginalOptions
) -> None:
    served = len(branch_features) - (options.start == "own_branch")
    if served != schedule.num_steps or served < 1:
        extra = ", one of which is the start," if options.start == "own_branch" else ""
        raise ValueError(f"got {len(branch_features)} branches{extra} for a schedule of {schedule.num_steps} steps")
    if any(z.shape != x0.shape for z in branch_features):
        shapes = [tuple(z.shape) for z in branch_features]
        raise ValueError(f"branches have the shapes {shapes}, but the teacher's feature has {tuple(x0.shape)}")


def _checked_order(permutation: Permutation, count: int, x0: Tensor) -> list[int] | Tensor | None:
    """The order of the branches; None for the expectation over all orders."""
    if isinstance(permutation, Tensor):
        if permutation.dtype != torch.int64 or permutation.shape not in {(count,), (x0.shape[0], count)}:
            described = f"{permutation.dtype} {tuple(permutation.shape)}"
            expected = f"int64 ({count},) or ({x0.shape[0]},{count})"
            raise ValueError(f"permutation is a tensor {described}, but must be {expected}")
        return permutation
    if isinstance(permutation, str):
        if permutation != "expected":
            raise ValueError(f"permutation must be 'expected' or an order of the branches, but is {permutation!r}")
        return None
    order = [int(index) for index in permutation]
    if sorted(order) != list(range(count)):
        raise ValueError(f"permutation must contain each of 0..{count - 1} once, but is {order}")
    return order
