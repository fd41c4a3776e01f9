"""The marginal reading of the reverse process: the teacher's states are drawn, the student runs freely beside them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from training.noise_schedule import NoiseSchedule


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
