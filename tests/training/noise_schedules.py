"""Schedules for tests, and an independent computation of one step between two times."""

import math

import numpy as np
import pytest
import torch

from training.noise_schedule import SCHEDULES, NoiseSchedule

EVERY_SCHEDULE = pytest.mark.parametrize("name", sorted(SCHEDULES))


def conditioned(schedule: NoiseSchedule, n: int, s: int, sigma: float = 1.7) -> tuple[float, float, float]:
    """(u, v, w) by conditioning the joint Gaussian of (x_s, x_n, x_0) on its last two coordinates.

    x_0 gets a prior of its own, whose variance must not matter.
    """
    a_n, a_s = schedule.alpha_hat[n].item(), schedule.alpha_hat[s].item()
    ratio, prior = a_n / a_s, 2.3
    # Rows x_s, x_n, x_0; columns the independent draws x_0, noise up to s, noise from s to n.
    noise_s, noise_step = sigma * math.sqrt(1 - a_s**2), sigma * math.sqrt(1 - ratio**2)
    mixing = np.array([[a_s * prior, noise_s, 0], [a_n * prior, ratio * noise_s, noise_step], [prior, 0, 0]])
    covariance = mixing @ mixing.T
    weights = np.linalg.solve(covariance[1:, 1:], covariance[1:, 0])
    variance = covariance[0, 0] - covariance[0, 1:] @ weights
    return float(weights[0]), float(weights[1]), float(variance) / sigma**2


def random_schedule(seed: int) -> NoiseSchedule:
    rng = np.random.default_rng(seed)
    alpha = np.sort(rng.uniform(0.05, 0.97, size=int(rng.integers(1, 9))))[::-1]
    alpha_hat = torch.from_numpy(np.concatenate([[1.0], alpha]))
    return NoiseSchedule(alpha_hat, (1 - alpha_hat.square()).sqrt())
