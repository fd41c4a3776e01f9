"""The diffusion reverse process along which KDiffusion's branches approach the teacher.

Notation of the paper with its equations corrected (Yao et al., AAAI 2024): a_k = alpha_hat[k], b_k = beta_hat[k],
a_k^2 + b_k^2 = 1, step 0 is clean. m branches walk m steps; e_j = x0 - z_j is the error of branch j.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Permutation = Literal["expected"] | Sequence[int]
Trajectory = Literal["shared_noise", "marginal"]

#: a = 0 at the last step would make it independent of the recursion and its weight degenerate.
_MIN_SIGNAL = 1e-5
_DDPM_STEPS = 1000


@dataclass(frozen=True, slots=True, eq=False)
class NoiseSchedule:
    """Signal and noise levels, each of shape (num_steps + 1,), float64, index 0 = clean."""

    alpha_hat: Tensor
    beta_hat: Tensor

    @property
    def num_steps(self) -> int:
        """Number of steps, equal to the number of branches."""
        return self.alpha_hat.numel() - 1

    @classmethod
    def cosine(cls, num_steps: int) -> "NoiseSchedule":
        """a^2 = cos^2((t + s) / (1 + s) * pi/2), normalised at 0, s = 0.008 (Nichol & Dhariwal, 2021), t uniform."""
        time = torch.arange(num_steps + 1, dtype=torch.float64) / num_steps
        signal = torch.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2
        return cls._from_signal(signal / signal[0])

    @classmethod
    def ddpm_linear(cls, num_steps: int) -> "NoiseSchedule":
        """1000 variances from 1e-4 to 2e-2 (Ho et al., 2020), read at ``num_steps`` uniform times."""
        variances = torch.linspace(1e-4, 2e-2, _DDPM_STEPS, dtype=torch.float64)
        signal = torch.cat([torch.ones(1, dtype=torch.float64), torch.cumprod(1 - variances, 0)])
        times = torch.linspace(0, _DDPM_STEPS, num_steps + 1, dtype=torch.float64).round().long()
        return cls._from_signal(signal[times])

    @classmethod
    def linear(cls, num_steps: int) -> "NoiseSchedule":
        """b^2 grows linearly from 0 to 1."""
        return cls._from_signal(1 - torch.arange(num_steps + 1, dtype=torch.float64) / num_steps)

    @classmethod
    def _from_signal(cls, signal: Tensor) -> "NoiseSchedule":
        clamped = signal.clamp(min=_MIN_SIGNAL, max=1.0)
        return cls(clamped.sqrt(), (1 - clamped).sqrt())


SCHEDULES = {"cosine": NoiseSchedule.cosine, "ddpm_linear": NoiseSchedule.ddpm_linear, "linear": NoiseSchedule.linear}


def posterior_coefficients(schedule: NoiseSchedule, n: int, s: int) -> tuple[float, float, float]:
    """(u, v, w) of q(x_s | x_n, x_0) = N(u x_n + v x_0, w sigma^2) for 0 <= s < n (eq. 10, corrected).

    With A = a_n / a_s: u = A b_s^2 / b_n^2, v = a_s (1 - A^2) / b_n^2, w = (1 - A^2) b_s^2 / b_n^2. Raises
    ``ValueError`` for times that are not on the grid or not in that order.
    """
    if not 0 <= s < n <= schedule.num_steps:
        raise ValueError(f"need 0 <= s < n <= {schedule.num_steps}, got s={s}, n={n}")
    a_n, a_s = schedule.alpha_hat[n].item(), schedule.alpha_hat[s].item()
    noise_n, noise_s = 1 - a_n * a_n, 1 - a_s * a_s
    ratio = a_n / a_s
    # 1 - A^2 written without cancellation: (a_s^2 - a_n^2) / a_s^2 from the noise levels.
    skip = (noise_n - noise_s) / (a_s * a_s)
    return ratio * noise_s / noise_n, a_s * skip / noise_n, skip * noise_s / noise_n


def _step_coefficients(schedule: NoiseSchedule) -> list[tuple[float, float]]:
    """(u_k, v_k) of the steps k -> k-1 for k = 1..m."""
    return [posterior_coefficients(schedule, k, k - 1)[:2] for k in range(1, schedule.num_steps + 1)]


def expected_loss_coefficients(schedule: NoiseSchedule) -> tuple[float, float]:
    """(alpha, beta) with E_pi[L] = alpha sum_j |e_j|^2 + beta |sum_j e_j|^2 under a uniformly random permutation.

    L = (1/m) sum_k |r_{k-1}|^2 is a quadratic form e' M e; averaging M over all permutations leaves the only symmetric
    form there is, alpha I + beta 11'. alpha and beta follow from the sums of its diagonal and off-diagonal entries.
    """
    steps = _step_coefficients(schedule)
    m = len(steps)
    diagonal = total = 0.0
    row = [0.0] * m
    for k in range(m, 0, -1):
        u, v = steps[k - 1]
        row = [u * c for c in row]
        row[k - 1] += v
        diagonal += sum(c * c for c in row)
        total += sum(row) ** 2
    off = total - diagonal
    beta = off / (m * m * (m - 1)) if m > 1 else 0.0
    return diagonal / (m * m) - beta, beta


def reverse_process_loss(
    branch_features: Sequence[Tensor],
    teacher_feature: Tensor,
    schedule: NoiseSchedule,
    permutation: Permutation = "expected",
    trajectory: Trajectory = "shared_noise",
) -> Tensor:
    """Mean squared distance of the branches' reverse process from the teacher's (eqs. 11 and 12), a scalar.

    ``branch_features`` are m tensors shaped like ``teacher_feature`` = x0, where m = ``schedule.num_steps``.
    ``permutation[k - 1]`` is the branch that serves step k; "expected" is the exact mean over all permutations.
    "shared_noise" lets teacher and student walk the same noise, so the loss is zero exactly when every branch equals
    x0; "marginal" draws the teacher's states from their marginals with the first branch, detached, as the noise. Raises
    ``ValueError`` for a wrong number of branches, no permutation of them, or an expectation that has no closed form.
    """
    m = schedule.num_steps
    if len(branch_features) != m:
        raise ValueError(f"{len(branch_features)} branches for a schedule of {m} steps")
    if any(z.shape != teacher_feature.shape for z in branch_features):
        shapes = [tuple(z.shape) for z in branch_features]
        raise ValueError(f"branches {shapes} differ in shape from the teacher's {tuple(teacher_feature.shape)}")
    if permutation == "expected":
        if trajectory != "shared_noise":
            raise ValueError("the expectation has a closed form for the shared-noise trajectory only")
        return _expected_loss([teacher_feature - z for z in branch_features], schedule)
    order = [int(index) for index in permutation]
    if sorted(order) != list(range(m)):
        raise ValueError(f"{order} is not a permutation of 0..{m - 1}")
    walked = [branch_features[index] for index in order]
    if trajectory == "shared_noise":
        return _shared_noise_loss([teacher_feature - z for z in walked], schedule)
    return _marginal_loss(walked, teacher_feature, schedule)


def _expected_loss(errors: list[Tensor], schedule: NoiseSchedule) -> Tensor:
    alpha, beta = expected_loss_coefficients(schedule)
    each = torch.stack([error.square().mean() for error in errors]).sum()
    joint = torch.stack(errors).sum(0).square().mean()
    return alpha * each + beta * joint


def _shared_noise_loss(errors: list[Tensor], schedule: NoiseSchedule) -> Tensor:
    residual = torch.zeros_like(errors[0])
    loss = errors[0].new_zeros(())
    steps = _step_coefficients(schedule)
    for k in range(len(steps), 0, -1):
        u, v = steps[k - 1]
        residual = u * residual + v * errors[k - 1]
        loss = loss + residual.square().mean()
    return loss / len(steps)


def _marginal_loss(walked: list[Tensor], x0: Tensor, schedule: NoiseSchedule) -> Tensor:
    noise, state = walked[-1].detach(), walked[-1]
    loss = x0.new_zeros(())
    steps = _step_coefficients(schedule)
    for k in range(len(steps), 0, -1):
        u, v = steps[k - 1]
        a, b = schedule.alpha_hat[k].item(), schedule.beta_hat[k].item()
        target = u * (a * x0 + b * noise) + v * x0
        state = u * state + v * walked[k - 1]
        loss = loss + (target - state).square().mean()
    return loss / len(steps)
