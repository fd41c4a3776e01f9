"""Noise schedules of the diffusion process, and the posterior of its steps.

Notation of the paper with its equations corrected (Yao et al., AAAI 2024; docs/method.md): a_k = alpha_hat[k],
b_k = beta_hat[k], a_k^2 + b_k^2 = 1, step 0 is clean.
"""

import math
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

#: The least a^2: with a = 0 at the last step, its weight would be degenerate and the recursion would not enter it.
_MIN_SIGNAL = 1e-5
_DDPM_STEPS = 1000


class Posterior(NamedTuple):
    """q(x_s | x_n, x_0) = N(u x_n + v x_0, w sigma^2)."""

    u: float
    v: float
    w: float


@dataclass(frozen=True, slots=True, eq=False)
class NoiseSchedule:
    """Signal and noise levels, each of shape (num_steps + 1,), float64, index 0 = clean.

    The same as plain numbers, so that a training step reads no tensor: ``levels[k]`` is (a_k, b_k), and
    ``steps[k - 1]`` is the posterior of the step k -> k-1.
    """

    alpha_hat: Tensor
    beta_hat: Tensor
    levels: tuple[tuple[float, float], ...] = field(init=False, repr=False)
    steps: tuple[Posterior, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        signal = self.alpha_hat.tolist()
        object.__setattr__(self, "levels", tuple(zip(signal, self.beta_hat.tolist(), strict=True)))
        object.__setattr__(self, "steps", tuple(_posterior(a_n, a_s) for a_s, a_n in pairwise(signal)))

    @property
    def num_steps(self) -> int:
        """The number of steps."""
        return len(self.steps)

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


def posterior_coefficients(schedule: NoiseSchedule, n: int, s: int) -> Posterior:
    """(u, v, w) of q(x_s | x_n, x_0) = N(u x_n + v x_0, w sigma^2) for 0 <= s < n (eq. 10, corrected).

    With A = a_n / a_s: u = A b_s^2 / b_n^2, v = a_s (1 - A^2) / b_n^2, w = (1 - A^2) b_s^2 / b_n^2. Raises
    ``ValueError`` unless 0 <= s < n <= ``schedule.num_steps``.
    """
    if not 0 <= s < n <= schedule.num_steps:
        raise ValueError(f"s and n must satisfy 0 <= s < n <= {schedule.num_steps}, but s={s} and n={n}")
    return _posterior(schedule.alpha_hat[n].item(), schedule.alpha_hat[s].item())


def _posterior(a_n: float, a_s: float) -> Posterior:
    noise_n, noise_s = 1 - a_n * a_n, 1 - a_s * a_s
    ratio = a_n / a_s
    # 1 - A^2 written without cancellation: (a_s^2 - a_n^2) / a_s^2 from the noise levels.
    skip = (noise_n - noise_s) / (a_s * a_s)
    return Posterior(ratio * noise_s / noise_n, a_s * skip / noise_n, skip * noise_s / noise_n)
