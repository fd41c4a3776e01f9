import itertools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.training.noise_schedules import EVERY_SCHEDULE, conditioned, random_schedule
from training.diffusion import (
    SCHEDULES,
    Backpropagation,
    MarginalOptions,
    NoiseSchedule,
    Permutation,
    StepWeights,
    Trajectory,
    expected_loss_coefficients,
    posterior_coefficients,
    reverse_process_loss,
    step_weights_of,
)
from training.distillers.settings import KDiffusionSettings

Array = NDArray[np.float64]
SHAPE = (2, 3, 2, 4)
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


def features(count: int, seed: int = 0) -> tuple[list[Array], Array]:
    """``count`` branch features and a teacher feature, off centre and of different scales."""
    rng = np.random.default_rng(seed)
    branches = [rng.normal(index - 1.5, 0.3 + index, SHAPE) for index in range(count)]
    return branches, rng.normal(0.8, 2.0, SHAPE)


def walked_loss(
    branches: Sequence[Array],
    teacher: Array,
    schedule: NoiseSchedule,
    order: Sequence[int],
    weights: Sequence[float] | None = None,
) -> float:
    """The weighted squared distance of teacher and student, which share their start and the sampled noise."""
    rng = np.random.default_rng(99)
    m = schedule.num_steps
    x_teacher = x_student = rng.normal(-1.0, 3.0, teacher.shape)
    distances = []
    for k in range(m, 0, -1):
        u, v, w = conditioned(schedule, k, k - 1)
        noise = math.sqrt(max(w, 0.0)) * rng.normal(0.0, 2.5, teacher.shape)
        x_teacher = u * x_teacher + v * teacher + noise
        x_student = u * x_student + v * branches[order[k - 1]] + noise
        distances.append((1.0 if weights is None else weights[k - 1]) * np.mean((x_teacher - x_student) ** 2))
    return float(np.sum(distances)) / m


@dataclass(frozen=True, kw_only=True)
class Marginal:
    """The marginal reading, unrolled. Terms without a gradient are computed from ``frozen`` branches."""

    schedule: NoiseSchedule
    order: Sequence[int]
    teacher: Array
    frozen: Sequence[Array]
    reading: MarginalOptions = field(default_factory=MarginalOptions)
    weights: Sequence[float] = (1.0,) * 16
    truncated: bool = False
    gaussian: Array | None = None

    def noise(self, branches: Sequence[Array], k: int) -> Array:
        if self.reading.noise == "gaussian":
            assert self.gaussian is not None
            return self.reading.sigma * self.gaussian
        if self.reading.noise == "step_branch":
            return self.frozen[self.order[k - 1]]
        return (branches if self.reading.noise == "first_branch_attached" else self.frozen)[self.order[-1]]

    def state(self, branches: Sequence[Array], k: int) -> Array:
        """The teacher's x_k = a_k x0 + b_k noise."""
        if k == 0:
            return self.teacher
        signal, noise = self.schedule.alpha_hat[k].item(), self.schedule.beta_hat[k].item()
        return signal * self.teacher + noise * self.noise(branches, k)

    def walk(self, branches: Sequence[Array], carried: Sequence[Array] | None) -> list[Array]:
        """The student's states from the first; ``carried`` stands for its own where gradients are cut."""
        count = self.schedule.num_steps
        states = [self.state(branches, count) if self.reading.start == "teacher" else branches[self.order[-1]]]
        for k in range(count, 0, -1):
            u, v, _ = conditioned(self.schedule, k, k - 1)
            before = states[-1] if carried is None else carried[count - k]
            states.append(u * before + v * branches[self.order[k - 1]])
        return states

    def loss(self, branches: Sequence[Array]) -> float:
        count = self.schedule.num_steps
        states = self.walk(branches, self.walk(self.frozen, None) if self.truncated else None)
        total = 0.0
        for k in range(count, 0, -1):
            u, v, _ = conditioned(self.schedule, k, k - 1)
            target = u * self.state(branches, k) + v * self.teacher
            if self.reading.target == "sampled":
                target = self.state(branches, k - 1)
            total += self.weights[k - 1] * float(np.mean((target - states[count - k + 1]) ** 2))
        return total / count

    def slope(self, branch: int, where: tuple[int, ...], step: float = 1e-5) -> float:
        """The derivative by one element of a branch, by finite differences."""
        values = []
        for sign in (1, -1):
            moved = [array.copy() for array in self.frozen]
            moved[branch][where] += sign * step
            values.append(self.loss(moved))
        return (values[0] - values[1]) / (2 * step)


def marginal_loss(branches: Sequence[Array], teacher: Array, schedule: NoiseSchedule, order: Sequence[int]) -> float:
    return Marginal(schedule=schedule, order=order, teacher=teacher, frozen=branches).loss(branches)


def tensors(arrays: Sequence[Array]) -> list[torch.Tensor]:
    return [torch.from_numpy(array.copy()) for array in arrays]


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
def test_a_custom_schedule_gives_the_same_distance(seed: int) -> None:
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
    expected = marginal_loss(branches, teacher, schedule, order)
    assert loss.item() == pytest.approx(expected, rel=1e-12)


@EVERY_SCHEDULE
def test_the_marginal_loss_is_not_zero_where_every_branch_is_the_teacher(name: str) -> None:
    teacher = torch.from_numpy(features(1)[1])
    branches = [teacher.clone() for _ in range(4)]
    assert reverse_process_loss(branches, teacher, SCHEDULES[name](4), (0, 1, 2, 3), "marginal").item() > 1e-3


READINGS = [
    MarginalOptions(start=start, noise=noise, target=target, sigma=1.6 if noise == "gaussian" else 1.0)
    for start in get_args(MarginalOptions.__annotations__["start"])
    for noise in get_args(MarginalOptions.__annotations__["noise"])
    for target in get_args(MarginalOptions.__annotations__["target"])
]


@pytest.mark.parametrize("truncated", [False, True], ids=["full", "truncated"])
@pytest.mark.parametrize("reading", READINGS, ids=lambda r: f"{r.start}-{r.noise}-{r.target}")
def test_every_marginal_reading_and_its_gradient_are_those_of_the_unrolled_walk(
    reading: MarginalOptions, truncated: bool
) -> None:
    order = (1, 3, 0, 2)
    schedule = NoiseSchedule.cosine(3 if reading.start == "own_branch" else 4)
    arrays, teacher = features(4, seed=7)
    weights = (0.7, 2.1, 0.4, 1.3)[: schedule.num_steps]
    branches = [tensor.requires_grad_() for tensor in tensors(arrays)]
    torch.manual_seed(5)
    gaussian = torch.randn(SHAPE, dtype=torch.float64).numpy()
    torch.manual_seed(5)
    loss = reverse_process_loss(
        branches,
        torch.from_numpy(teacher),
        schedule,
        order,
        "marginal",
        step_weights=weights,
        backpropagation="truncated" if truncated else "full",
        marginal=reading,
    )
    unrolled = Marginal(
        schedule=schedule,
        order=order,
        teacher=teacher,
        frozen=arrays,
        reading=reading,
        weights=weights,
        truncated=truncated,
        gaussian=gaussian,
    )
    assert loss.item() == pytest.approx(unrolled.loss(arrays), rel=1e-12)
    gradients = torch.autograd.grad(loss, branches, allow_unused=True, materialize_grads=True)
    for branch, gradient in enumerate(gradients):
        where = (1, branch % 3, 1, 2)
        assert gradient[where].item() == pytest.approx(unrolled.slope(branch, where), rel=1e-6, abs=1e-9)


def test_the_readings_of_the_marginal_trajectory_differ() -> None:
    arrays, teacher = features(4, seed=7)
    values = set()
    for reading in READINGS:
        schedule = NoiseSchedule.cosine(3 if reading.start == "own_branch" else 4)
        torch.manual_seed(5)
        inputs = tensors(arrays), torch.from_numpy(teacher), schedule, (1, 3, 0, 2)
        values.add(reverse_process_loss(*inputs, "marginal", marginal=reading).item())
    # The first branch has the same value with and without its gradient.
    assert len(READINGS) == 24
    assert len(values) == 18


@EVERY_SCHEDULE
def test_step_weights_undo_the_coefficients_that_they_are_named_after(name: str) -> None:
    schedule, sigma, limit = SCHEDULES[name](5), 0.6, 7.0
    inverse = step_weights_of(schedule, "inverse_v2", sigma=sigma, limit=limit)
    divergence = step_weights_of(schedule, "kl", sigma=sigma, limit=limit)
    for k in range(1, 6):
        _, v, w = conditioned(schedule, k, k - 1)
        assert inverse[k - 1] * v**2 == pytest.approx(1, rel=1e-10)
        exact = 1 / (2 * w * sigma**2) if k > 1 else math.inf
        assert divergence[k - 1] == pytest.approx(min(exact, limit), rel=1e-10)
    assert divergence[0] == limit
    assert divergence[-1] < limit
    assert step_weights_of(schedule, "uniform") == (1.0,) * 5


@EVERY_SCHEDULE
@pytest.mark.parametrize("kind", ["inverse_v2", "kl"])
def test_weighted_steps_are_those_of_the_sampled_walk(name: str, kind: StepWeights) -> None:
    schedule, order = SCHEDULES[name](4), (2, 0, 3, 1)
    weights = step_weights_of(schedule, kind, sigma=1.3)
    branches, teacher = features(4, seed=3)
    loss = reverse_process_loss(tensors(branches), torch.from_numpy(teacher), schedule, order, step_weights=weights)
    assert loss.item() == pytest.approx(walked_loss(branches, teacher, schedule, order, weights), rel=1e-12)


def carried_gradients(arrays: Sequence[Array], teacher: Array, order: Sequence[int]) -> list[Array]:
    """Gradients of the cosine walk where each residual is taken as given by the step that reads it."""
    schedule = NoiseSchedule.cosine(len(arrays))
    residual, gradients = np.zeros_like(teacher), [np.zeros_like(teacher) for _ in arrays]
    for k in range(len(arrays), 0, -1):
        u, v, _ = conditioned(schedule, k, k - 1)
        residual = u * residual + v * (teacher - arrays[order[k - 1]])
        gradients[order[k - 1]] = -2 * v * residual / teacher.size / len(arrays)
    return gradients


@pytest.mark.parametrize("permutation", ["expected", (2, 0, 3, 1), torch.tensor([2, 0, 3, 1])], ids=str)
def test_truncated_backpropagation_keeps_the_value_and_cuts_the_gradient_between_steps(
    permutation: Permutation,
) -> None:
    arrays, teacher = features(4, seed=2)
    schedule, x0 = NoiseSchedule.cosine(4), torch.from_numpy(teacher)
    branches = [tensor.requires_grad_() for tensor in tensors(arrays)]
    loss = reverse_process_loss(branches, x0, schedule, permutation, backpropagation="truncated")
    full = reverse_process_loss(branches, x0, schedule, permutation)
    torch.testing.assert_close(loss, full, rtol=1e-14, atol=0)
    orders = list(itertools.permutations(range(4))) if isinstance(permutation, str) else [(2, 0, 3, 1)]
    every = [carried_gradients(arrays, teacher, order) for order in orders]
    for index, gradient in enumerate(torch.autograd.grad(loss, branches)):
        expected = np.mean([gradients[index] for gradients in every], axis=0)
        np.testing.assert_allclose(gradient.numpy(), expected, rtol=1e-11, atol=1e-15)


@pytest.mark.parametrize("trajectory", ["shared_noise", "marginal"])
def test_an_order_may_live_on_the_device_and_differ_for_each_sample(trajectory: Trajectory) -> None:
    arrays, teacher = features(4, seed=9)
    schedule, x0 = NoiseSchedule.linear(4), torch.from_numpy(teacher)
    orders = [(2, 0, 3, 1), (3, 2, 0, 1)]

    def loss(branches: Sequence[torch.Tensor], target: torch.Tensor, order: Permutation) -> float:
        return reverse_process_loss(branches, target, schedule, order, trajectory).item()

    whole = loss(tensors(arrays), x0, orders[0])
    assert loss(tensors(arrays), x0, torch.tensor(orders[0])) == pytest.approx(whole, rel=1e-13)
    # Where every sample has one order; then one for each.
    assert loss(tensors(arrays), x0, torch.tensor([orders[0]] * 2)) == pytest.approx(whole, rel=1e-13)
    alone = [loss([z[n : n + 1] for z in tensors(arrays)], x0[n : n + 1], orders[n]) for n in (0, 1)]
    assert alone[0] != pytest.approx(alone[1], rel=1e-2)
    assert loss(tensors(arrays), x0, torch.tensor(orders)) == pytest.approx(sum(alone) / 2, rel=1e-13)


@pytest.mark.parametrize("trajectory", ["shared_noise", "marginal"])
@pytest.mark.parametrize("orders", [(4,), (2, 4)], ids=["batch", "sample"])
def test_an_order_on_the_device_is_never_read_by_the_host(trajectory: Trajectory, orders: tuple[int, ...]) -> None:
    # Tensors of the meta device have no values: reading one fails.
    branches = torch.empty(4, *SHAPE, device="meta", requires_grad=True)
    order = torch.empty(orders, dtype=torch.int64, device="meta")
    loss = reverse_process_loss(branches, branches[0].detach(), NoiseSchedule.cosine(4), order, trajectory)
    (gradient,) = torch.autograd.grad(loss, [branches])
    assert gradient.shape == branches.shape


def test_the_loss_compiles_into_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    # As in torch 2.11, whose compiler cannot trace this function.
    untraceable = torch.compiler.disable(torch.amp.is_autocast_available)  # type: ignore[no-untyped-call]
    monkeypatch.setattr(torch.amp, "is_autocast_available", untraceable)
    schedule = NoiseSchedule.cosine(3)
    arrays, teacher = features(3)
    branches, x0 = torch.from_numpy(np.stack(arrays)).requires_grad_(), torch.from_numpy(teacher)

    def both(z: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
        shared = reverse_process_loss(z, x0, schedule, order)
        return shared + reverse_process_loss(z, x0, schedule, order, "marginal")

    compiled = torch.compile(both, fullgraph=True, backend="eager")
    for order in (torch.tensor([2, 0, 1]), torch.tensor([0, 2, 1])):
        found, expected = compiled(branches, order), both(branches, order)
        torch.testing.assert_close(found, expected, rtol=1e-14, atol=0)
        gradients = [torch.autograd.grad(value, [branches])[0] for value in (found, expected)]
        torch.testing.assert_close(*gradients, rtol=1e-13, atol=1e-16)


@pytest.mark.parametrize("per_sample", [False, True], ids=["batch", "sample"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_single_precision_and_autocast_lose_no_more_than_rounding(
    layout: torch.memory_format, per_sample: bool
) -> None:
    generator = torch.Generator().manual_seed(2)
    shape, order = (32, 64, 8, 8), torch.tensor([2, 0, 3, 1])
    x0 = torch.randn(shape, generator=generator)
    branches = x0 + 0.4 * torch.randn(shape, generator=generator) + 0.1 * torch.randn(4, *shape, generator=generator)
    laid_out = torch.unflatten(branches.flatten(0, 1).contiguous(memory_format=layout), 0, (4, 32)).requires_grad_()
    exact = branches.double().requires_grad_()
    expected = reverse_process_loss(exact, x0.double(), NoiseSchedule.cosine(4), (2, 0, 3, 1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        orders = order.expand(32, 4) if per_sample else order
        loss = reverse_process_loss(laid_out, x0.contiguous(memory_format=layout), NoiseSchedule.cosine(4), orders)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    (found,), (wanted,) = torch.autograd.grad(loss, [laid_out]), torch.autograd.grad(expected, [exact])
    assert ((found - wanted).norm() / wanted.norm()).item() < 3e-7


def test_half_precision_is_summed_in_single_precision() -> None:
    branches, x0 = torch.full((2, 64, 128), 1.5), torch.full((64, 128), 1.0)
    single = reverse_process_loss(branches, x0, NoiseSchedule.cosine(2), (1, 0))
    half = reverse_process_loss(branches.half(), x0.half(), NoiseSchedule.cosine(2), (1, 0))
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(single.item(), rel=1e-6)


def test_a_loss_measured_in_inference_mode_does_not_keep_training_from_the_next() -> None:
    # Coefficients that nothing else in this process uses, so that they are copied here.
    schedule, x0 = random_schedule(77), torch.randn(2, 3)
    branches = torch.randn(schedule.num_steps, 2, 3)
    with torch.inference_mode():
        measured = reverse_process_loss(branches, x0, schedule).item()
    trained = reverse_process_loss(branches.requires_grad_(), x0, schedule)
    trained.backward()  # type: ignore[no-untyped-call]
    assert trained.item() == measured


@pytest.mark.parametrize("backpropagation", ["full", "truncated"])
def test_second_derivatives_are_those_of_finite_differences(backpropagation: Backpropagation) -> None:
    x0 = torch.tensor([[0.3, -0.8]], dtype=torch.float64)

    def loss(*branches: torch.Tensor) -> torch.Tensor:
        inputs = list(branches), x0, NoiseSchedule.cosine(3), (2, 0, 1)
        return reverse_process_loss(*inputs, backpropagation=backpropagation)

    generator = torch.Generator().manual_seed(4)
    inputs = [torch.randn(1, 2, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(3)]
    assert torch.autograd.gradgradcheck(loss, inputs)


@EVERY_SCHEDULE
def test_one_branch_is_plain_mean_squared_error(name: str) -> None:
    (branch,), teacher = features(1)
    schedule, expected = SCHEDULES[name](1), float(np.mean((branch - teacher) ** 2))
    inputs = tensors([branch]), torch.from_numpy(teacher), schedule
    assert reverse_process_loss(*inputs, "expected").item() == pytest.approx(expected, rel=1e-14)
    assert reverse_process_loss(*inputs, (0,)).item() == pytest.approx(expected, rel=1e-14)
    assert reverse_process_loss(*inputs, (0,), "marginal").item() == pytest.approx(expected, rel=1e-14)


@EVERY_SCHEDULE
@pytest.mark.parametrize("kind", ["uniform", "inverse_v2", "kl"])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_the_expectation_is_the_mean_over_all_permutations(name: str, kind: StepWeights, count: int) -> None:
    schedule = SCHEDULES[name](count)
    weights = step_weights_of(schedule, kind, sigma=0.8)
    branches, teacher = features(count, seed=count)
    orders = itertools.permutations(range(count))
    losses = [walked_loss(branches, teacher, schedule, order, weights) for order in orders]
    assert len(losses) == math.factorial(count)
    inputs = tensors(branches), torch.from_numpy(teacher), schedule
    expected = reverse_process_loss(*inputs, "expected", step_weights=weights)
    assert expected.item() == pytest.approx(float(np.mean(losses)), rel=1e-12)
    alpha, beta = expected_loss_coefficients(schedule, weights)
    errors = np.stack([teacher - branch for branch in branches])
    closed = alpha * np.mean(errors**2, axis=(1, 2, 3, 4)).sum() + beta * np.mean(errors.sum(0) ** 2)
    assert expected.item() == pytest.approx(closed, rel=1e-12)


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
        lambda x0, *z: reverse_process_loss(z, x0, NoiseSchedule.linear(3), torch.tensor([[2, 0, 1], [0, 2, 1]])),
        lambda x0, *z: reverse_process_loss(z, x0, NoiseSchedule.cosine(3), (2, 0, 1), step_weights=(0.4, 3, 1.5)),
    ],
    ids=["expected", "sequence", "sample", "weighted"],
)
def test_gradients_are_those_of_finite_differences(loss: Callable[..., torch.Tensor]) -> None:
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(2, 2, 1, 2, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(4)]
    assert torch.autograd.gradcheck(loss, inputs)


def test_arguments_that_do_not_fit_the_schedule_are_refused() -> None:
    schedule, teacher = NoiseSchedule.cosine(3), torch.zeros(2, 3)
    branches = [torch.ones(2, 3) for _ in range(3)]
    with pytest.raises(ValueError, match=r"^got 2 branches for a schedule of 3 steps$"):
        reverse_process_loss(branches[:2], teacher, schedule)
    with pytest.raises(ValueError, match=r"\(2, 1\)\], but the teacher's feature has \(2, 3\)$"):
        reverse_process_loss([*branches[:2], torch.ones(2, 1)], teacher, schedule)
    for order in ([0, 1], [0, 1, 1], [1, 2, 3], [0, 1, 2, 2]):
        with pytest.raises(
            ValueError, match=rf"^permutation must contain each of 0\.\.2 once, but is {re.escape(str(order))}$"
        ):
            reverse_process_loss(branches, teacher, schedule, order)
    with pytest.raises(
        ValueError, match=r"^permutation 'expected' has a closed form for trajectory 'shared_noise' only$"
    ):
        reverse_process_loss(branches, teacher, schedule, "expected", "marginal")
    with pytest.raises(
        ValueError, match=r"^permutation must be 'expected' or an order of the branches, but is 'shuffled'$"
    ):
        reverse_process_loss(branches, teacher, schedule, "shuffled")  # type: ignore[arg-type]
    for wrong in (torch.tensor([0, 1]), torch.tensor([0.0, 1, 2]), torch.tensor([[0, 1, 2]] * 3)):
        with pytest.raises(
            ValueError, match=r"^permutation is a tensor torch\..*, but must be int64 \(3,\) or \(2,3\)$"
        ):
            reverse_process_loss(branches, teacher, schedule, wrong)
    with pytest.raises(ValueError, match=r"^got 2 step weights for a schedule of 3 steps$"):
        reverse_process_loss(branches, teacher, schedule, step_weights=(1.0, 2.0))
    own = MarginalOptions(start="own_branch")
    with pytest.raises(ValueError, match=r"^got 3 branches, one of which is the start, for a schedule of 3 steps$"):
        reverse_process_loss(branches, teacher, schedule, (0, 1, 2), "marginal", marginal=own)
    with pytest.raises(ValueError, match=r"^start, noise and target can be chosen for trajectory 'marginal' only$"):
        reverse_process_loss(branches, teacher, schedule, (0, 1, 2), marginal=MarginalOptions(noise="gaussian"))


def test_the_documented_coefficients_are_those_of_the_code() -> None:
    page = (Path(__file__).parents[2] / "docs" / "method.md").read_text()
    header, _, *rows = page.split("<!-- coefficients -->\n")[1].split("\n<!-- end -->")[0].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in (header, *rows)]
    counts = [int(cell.removeprefix("m = ")) for cell in cells[0][1:]]
    assert counts == [1, 2, 4, 8]
    assert [row[0] for row in cells[1:]] == sorted(SCHEDULES)
    for name, *values in cells[1:]:
        computed = [expected_loss_coefficients(SCHEDULES[name](count)) for count in counts]
        assert values == [f"{alpha:.4f}, {beta:.4f}" for alpha, beta in computed]


def test_every_key_and_value_of_the_method_is_documented() -> None:
    page = (Path(__file__).parents[2] / "docs" / "method.md").read_text()
    for name, field_ in KDiffusionSettings.model_fields.items():
        if name in ("name", "cross_entropy"):
            continue
        assert f"`{name}`" in page, name
        for value in get_args(field_.annotation):
            assert not isinstance(value, str) or f'`"{value}"`' in page, (name, value)
        # The default comes first.
        row = next(line for line in page.splitlines() if f"`{name}` = " in line or name in ("ramp_epochs",))
        default = field_.default
        if isinstance(default, str):
            assert row.split(f"`{name}` = ")[1].startswith(f'`"{default}"`')
