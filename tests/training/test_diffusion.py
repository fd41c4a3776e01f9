import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from training.diffusion import (
    SCHEDULES,
    NoiseSchedule,
    Permutation,
    expected_loss_coefficients,
    posterior_coefficients,
    reverse_process_loss,
)

Array = NDArray[np.float64]
SHAPE = (2, 3, 2, 4)
EVERY_SCHEDULE = pytest.mark.parametrize("name", sorted(SCHEDULES))
#: Steps are named from the noisiest to the cleanest.
PUBLISHED_V = {
    "cosine": (0.380, 0.581, 0.758, 1),
    "ddpm_linear": (0.057, 0.269, 0.668, 1),
    "linear": (0.5, 0.47, 0.58, 1),
}
PUBLISHED_EXPECTATION = {
    ("cosine", 2): (0.3735, 0.0),
    ("cosine", 4): (0.1224, 0.0082),
    ("cosine", 8): (0.0377, 0.0040),
    ("ddpm_linear", 2): (0.2696, 0.0),
    ("ddpm_linear", 4): (0.0936, 0.0017),
    ("ddpm_linear", 8): (0.0307, 0.0015),
    ("linear", 2): (0.3750, 0.0),
    ("linear", 4): (0.1069, 0.0123),
    ("linear", 8): (0.0298, 0.0051),
}


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


def features(count: int, seed: int = 0) -> tuple[list[Array], Array]:
    """``count`` branch features and a teacher feature, off centre and of different scales."""
    rng = np.random.default_rng(seed)
    branches = [rng.normal(index - 1.5, 0.3 + index, SHAPE) for index in range(count)]
    return branches, rng.normal(0.8, 2.0, SHAPE)


def walked_loss(branches: Sequence[Array], teacher: Array, schedule: NoiseSchedule, order: Sequence[int]) -> float:
    """Teacher and student walk down with the same sampled noise from the same start; mean squared distance."""
    rng = np.random.default_rng(99)
    m = schedule.num_steps
    x_teacher = x_student = rng.normal(-1.0, 3.0, teacher.shape)
    distances = []
    for k in range(m, 0, -1):
        u, v, w = conditioned(schedule, k, k - 1)
        noise = math.sqrt(max(w, 0.0)) * rng.normal(0.0, 2.5, teacher.shape)
        x_teacher = u * x_teacher + v * teacher + noise
        x_student = u * x_student + v * branches[order[k - 1]] + noise
        distances.append(np.mean((x_teacher - x_student) ** 2))
    return float(np.sum(distances)) / m


def marginal_loss(
    branches: Sequence[Array], teacher: Array, schedule: NoiseSchedule, order: Sequence[int], noise: Array
) -> float:
    """The teacher's states come from their marginals with ``noise``; the student's from its own recursion."""
    state, total = branches[order[-1]], 0.0
    for k in range(schedule.num_steps, 0, -1):
        u, v, _ = conditioned(schedule, k, k - 1)
        marginal = schedule.alpha_hat[k].item() * teacher + schedule.beta_hat[k].item() * noise
        state = u * state + v * branches[order[k - 1]]
        total += float(np.mean((u * marginal + v * teacher - state) ** 2))
    return total / schedule.num_steps


def tensors(arrays: Sequence[Array]) -> list[torch.Tensor]:
    return [torch.from_numpy(array.copy()) for array in arrays]


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


def test_the_step_to_the_clean_feature_forgets_the_recursion() -> None:
    for schedule in (NoiseSchedule.cosine(5), NoiseSchedule.linear(3), random_schedule(4)):
        for n in range(1, schedule.num_steps + 1):
            assert posterior_coefficients(schedule, n, 0) == pytest.approx((0.0, 1.0, 0.0), abs=1e-15)


@pytest.mark.parametrize(("n", "s"), [(2, 2), (1, 2), (5, 1), (2, -1), (0, 0)])
def test_times_off_the_grid_or_out_of_order_are_refused(n: int, s: int) -> None:
    with pytest.raises(ValueError, match=rf"need 0 <= s < n <= 4, got s={s}, n={n}"):
        posterior_coefficients(NoiseSchedule.cosine(4), n, s)


@EVERY_SCHEDULE
def test_the_weight_of_each_step_is_the_published_one(name: str) -> None:
    weights = [posterior_coefficients(SCHEDULES[name](4), k, k - 1)[1] for k in (4, 3, 2, 1)]
    # The published figures of the linear schedule have two digits.
    np.testing.assert_allclose(weights, PUBLISHED_V[name], atol=0.006 if name == "linear" else 0.0006)


@pytest.mark.parametrize(("name", "steps"), sorted(PUBLISHED_EXPECTATION))
def test_the_expectation_has_the_published_coefficients(name: str, steps: int) -> None:
    coefficients = expected_loss_coefficients(SCHEDULES[name](steps))
    assert coefficients == pytest.approx(PUBLISHED_EXPECTATION[name, steps], abs=5.1e-5)


@EVERY_SCHEDULE
@pytest.mark.parametrize("order", [(0,), (1, 0), (2, 0, 1), (0, 1, 2, 3), (3, 1, 0, 2), (4, 2, 0, 5, 1, 3)])
def test_the_shared_noise_loss_is_the_distance_of_two_sampled_walks(name: str, order: tuple[int, ...]) -> None:
    schedule = SCHEDULES[name](len(order))
    branches, teacher = features(len(order))
    loss = reverse_process_loss(tensors(branches), torch.from_numpy(teacher), schedule, order)
    assert loss.shape == ()
    assert loss.item() == pytest.approx(walked_loss(branches, teacher, schedule, order), rel=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_a_schedule_of_ones_own_walks_the_same_way(seed: int) -> None:
    schedule = random_schedule(seed)
    order = np.random.default_rng(seed).permutation(schedule.num_steps).tolist()
    branches, teacher = features(schedule.num_steps, seed)
    loss = reverse_process_loss(tensors(branches), torch.from_numpy(teacher), schedule, order)
    assert loss.item() == pytest.approx(walked_loss(branches, teacher, schedule, order), rel=1e-12)


@EVERY_SCHEDULE
@pytest.mark.parametrize("permutation", ["expected", (2, 0, 3, 1)])
def test_the_loss_is_zero_exactly_where_every_branch_is_the_teacher(name: str, permutation: Permutation) -> None:
    schedule, teacher = SCHEDULES[name](4), torch.from_numpy(features(1)[1])
    assert reverse_process_loss([teacher.clone() for _ in range(4)], teacher, schedule, permutation).item() == 0.0
    for index in range(4):
        branches = [teacher.clone() for _ in range(4)]
        branches[index][1, 2, 0, 3] += 1e-3
        assert reverse_process_loss(branches, teacher, schedule, permutation).item() > 1e-12


@EVERY_SCHEDULE
@pytest.mark.parametrize("order", [(1, 0), (2, 0, 1), (3, 1, 0, 2)])
def test_the_marginal_loss_is_that_of_the_unrolled_marginals(name: str, order: tuple[int, ...]) -> None:
    schedule = SCHEDULES[name](len(order))
    branches, teacher = features(len(order), seed=5)
    loss = reverse_process_loss(tensors(branches), torch.from_numpy(teacher), schedule, order, "marginal")
    expected = marginal_loss(branches, teacher, schedule, order, branches[order[-1]])
    assert loss.item() == pytest.approx(expected, rel=1e-12)


@EVERY_SCHEDULE
def test_the_marginal_loss_is_not_zero_where_every_branch_is_the_teacher(name: str) -> None:
    teacher = torch.from_numpy(features(1)[1])
    branches = [teacher.clone() for _ in range(4)]
    assert reverse_process_loss(branches, teacher, SCHEDULES[name](4), (0, 1, 2, 3), "marginal").item() > 1e-3


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 2, 0)])
def test_the_noise_of_the_marginal_loss_is_detached(order: tuple[int, ...]) -> None:
    schedule = NoiseSchedule.cosine(3)
    arrays, teacher = features(3, seed=7)
    branches = [tensor.requires_grad_() for tensor in tensors(arrays)]
    reverse_process_loss(branches, torch.from_numpy(teacher), schedule, order, "marginal").backward()  # type: ignore[no-untyped-call]
    first, where, step = order[-1], (1, 0, 1, 2), 1e-5
    gradient = branches[first].grad
    assert gradient is not None

    def slope(move_noise: bool) -> float:
        values = []
        for sign in (1, -1):
            moved = [array.copy() for array in arrays]
            moved[first][where] += sign * step
            values.append(marginal_loss(moved, teacher, schedule, order, (moved if move_noise else arrays)[first]))
        return (values[0] - values[1]) / (2 * step)

    assert gradient[where].item() == pytest.approx(slope(move_noise=False), rel=1e-6)
    assert gradient[where].item() != pytest.approx(slope(move_noise=True), rel=1e-3)


@EVERY_SCHEDULE
def test_one_branch_is_plain_mean_squared_error(name: str) -> None:
    (branch,), teacher = features(1)
    schedule, expected = SCHEDULES[name](1), float(np.mean((branch - teacher) ** 2))
    inputs = tensors([branch]), torch.from_numpy(teacher), schedule
    assert reverse_process_loss(*inputs, "expected").item() == pytest.approx(expected, rel=1e-14)
    assert reverse_process_loss(*inputs, (0,)).item() == pytest.approx(expected, rel=1e-14)
    assert reverse_process_loss(*inputs, (0,), "marginal").item() == pytest.approx(expected, rel=1e-14)


@EVERY_SCHEDULE
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_the_expectation_is_the_mean_over_all_permutations(name: str, count: int) -> None:
    schedule = SCHEDULES[name](count)
    branches, teacher = features(count, seed=count)
    losses = [walked_loss(branches, teacher, schedule, order) for order in itertools.permutations(range(count))]
    assert len(losses) == math.factorial(count)
    expected = reverse_process_loss(tensors(branches), torch.from_numpy(teacher), schedule, "expected")
    assert expected.item() == pytest.approx(float(np.mean(losses)), rel=1e-12)


def test_the_order_of_the_branches_matters_for_a_fixed_permutation_alone() -> None:
    schedule = NoiseSchedule.cosine(4)
    branches, teacher = features(4)
    inputs, target = tensors(branches), torch.from_numpy(teacher)
    ahead = reverse_process_loss(inputs, target, schedule, (0, 1, 2, 3))
    back = reverse_process_loss(inputs, target, schedule, (3, 2, 1, 0))
    assert abs(ahead.item() - back.item()) > 0.05 * ahead.item()
    torch.testing.assert_close(reverse_process_loss(inputs[::-1], target, schedule, (3, 2, 1, 0)), ahead)
    swapped = reverse_process_loss(inputs[::-1], target, schedule, "expected")
    torch.testing.assert_close(swapped, reverse_process_loss(inputs, target, schedule, "expected"))


@pytest.mark.parametrize(
    "loss",
    [
        lambda x0, *z: reverse_process_loss(z, x0, NoiseSchedule.cosine(3), "expected"),
        lambda x0, *z: reverse_process_loss(z, x0, NoiseSchedule.ddpm_linear(3), (2, 0, 1)),
    ],
    ids=["expected", "sequence"],
)
def test_gradients_are_those_of_finite_differences(loss: Callable[..., torch.Tensor]) -> None:
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(2, 2, 1, 2, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(4)]
    assert torch.autograd.gradcheck(loss, inputs)


def test_what_does_not_fit_the_schedule_is_refused() -> None:
    schedule, teacher = NoiseSchedule.cosine(3), torch.zeros(2, 3)
    branches = [torch.ones(2, 3) for _ in range(3)]
    with pytest.raises(ValueError, match=r"^2 branches for a schedule of 3 steps$"):
        reverse_process_loss(branches[:2], teacher, schedule)
    with pytest.raises(ValueError, match=r"\(2, 1\).* differ in shape from the teacher's \(2, 3\)"):
        reverse_process_loss([*branches[:2], torch.ones(2, 1)], teacher, schedule)
    for order in ([0, 1], [0, 1, 1], [1, 2, 3], [0, 1, 2, 2]):
        with pytest.raises(ValueError, match=r"is not a permutation of 0\.\.2"):
            reverse_process_loss(branches, teacher, schedule, order)
    with pytest.raises(ValueError, match="closed form for the shared-noise trajectory only"):
        reverse_process_loss(branches, teacher, schedule, "expected", "marginal")
