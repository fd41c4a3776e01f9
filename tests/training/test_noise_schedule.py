"""Schedules of the noise, and the coefficients of one step between two of their times."""

import math

import numpy as np
import pytest
import torch

from tests.training.noise_schedules import EVERY_SCHEDULE, conditioned, random_schedule
from training.noise_schedule import SCHEDULES, NoiseSchedule, posterior_coefficients


@EVERY_SCHEDULE
@pytest.mark.parametrize("steps", [1, 2, 4, 7, 16])
def test_a_schedule_falls_from_clean_to_noise_and_never_loses_the_signal(name: str, steps: int) -> None:
    schedule = SCHEDULES[name](steps)
    alpha, beta = schedule.alpha_hat, schedule.beta_hat
    assert schedule.num_steps == steps
    assert alpha.shape == beta.shape == (steps + 1,)
    assert alpha.dtype == beta.dtype == torch.float64
    assert (alpha[0].item(), beta[0].item()) == (1.0, 0.0)
    torch.testing.assert_close(alpha.square() + beta.square(), torch.ones_like(alpha), rtol=0, atol=1e-15)
    assert (alpha.diff() < 0).all()
    assert (beta.diff() > 0).all()
    assert alpha[-1] > 0
    assert alpha[-1] < 0.01


def test_the_ddpm_schedule_is_the_cumulative_product_of_its_thousand_variances() -> None:
    signal = np.cumprod(1 - np.linspace(1e-4, 2e-2, 1000))
    expected = [1.0, *(math.sqrt(signal[t - 1]) for t in (250, 500, 750, 1000))]
    np.testing.assert_allclose(NoiseSchedule.ddpm_linear(4).alpha_hat.numpy(), expected, rtol=1e-12)


def test_the_cosine_schedule_is_normalised_at_its_start_and_cut_before_zero() -> None:
    raw = [math.cos((t / 4 + 0.008) / 1.008 * math.pi / 2) for t in range(5)]
    expected = [value / raw[0] for value in raw[:4]] + [math.sqrt(1e-5)]
    np.testing.assert_allclose(NoiseSchedule.cosine(4).alpha_hat.numpy(), expected, rtol=1e-12)


def test_the_linear_schedule_adds_equal_variance_at_each_step() -> None:
    np.testing.assert_allclose(NoiseSchedule.linear(4).beta_hat[:4].square().numpy(), [0, 0.25, 0.5, 0.75], atol=1e-15)


@pytest.mark.parametrize(
    "schedule",
    [
        *(make(steps) for make in SCHEDULES.values() for steps in (1, 3, 8)),
        *(random_schedule(seed) for seed in range(20)),
    ],
)
def test_posterior_coefficients_are_those_of_exact_gaussian_conditioning(schedule: NoiseSchedule) -> None:
    for n in range(1, schedule.num_steps + 1):
        for s in range(n):
            u, v, w = posterior_coefficients(schedule, n, s)
            np.testing.assert_allclose((u, v, w), conditioned(schedule, n, s), rtol=0, atol=1e-12)
            a_n, a_s = schedule.alpha_hat[n].item(), schedule.alpha_hat[s].item()
            assert u * a_n + v == pytest.approx(a_s, abs=1e-13)
            assert w >= 0


def test_the_step_to_the_clean_feature_depends_on_the_prediction_alone() -> None:
    for schedule in (NoiseSchedule.cosine(5), NoiseSchedule.linear(3), random_schedule(4)):
        for n in range(1, schedule.num_steps + 1):
            assert posterior_coefficients(schedule, n, 0) == pytest.approx((0.0, 1.0, 0.0), abs=1e-15)


@pytest.mark.parametrize(("n", "s"), [(2, 2), (1, 2), (5, 1), (2, -1), (0, 0)])
def test_times_off_the_grid_or_out_of_order_are_refused(n: int, s: int) -> None:
    with pytest.raises(ValueError, match=rf"^s and n must satisfy 0 <= s < n <= 4, but s={s} and n={n}$"):
        posterior_coefficients(NoiseSchedule.cosine(4), n, s)
