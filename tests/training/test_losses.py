import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tests.kdexport.hostile_values import noise
from training.losses import (
    attention_transfer_loss,
    contrastive_nce_loss,
    dkd_loss,
    hierarchical_context_loss,
    kd_loss,
    overhaul_loss,
    overhaul_margin,
    variational_loss,
)

Array = NDArray[np.float64]
TARGETS = torch.tensor([4, 0, 2])
MARGIN = torch.tensor([-0.3, -1.1, -0.02, -2.4, -0.6], dtype=torch.float64)
RAW_SCALE = torch.tensor([5.0, -3.0, 0.2, -40.0, 1.7], dtype=torch.float64)


def logits(seed: int) -> Tensor:
    """(3, 5), unlike in level and spread from row to row."""
    return noise(3, 5, seed=seed) * torch.tensor([[0.5], [3.0], [9.0]]) + torch.tensor([[-2.0], [0.0], [7.0]])


def scores(seed: int = 1) -> Tensor:
    """(3, 5): similarities over a temperature, over a normaliser."""
    return torch.exp(noise(3, 5, seed=seed) * 1.9) / 7.3


def nce(values: Tensor) -> Tensor:
    return contrastive_nce_loss(values, 977)


def kd(student: Tensor, teacher: Tensor) -> Tensor:
    return kd_loss(student, teacher, 3.7)


def dkd(student: Tensor, teacher: Tensor) -> Tensor:
    return dkd_loss(student, teacher, TARGETS, 0.7, 6.3, 2.9)


def attention(student: Tensor, teacher: Tensor) -> Tensor:
    return attention_transfer_loss([student, student[:, :, :3]], [teacher, teacher[:, :, :3]], p=3)


def context(student: Tensor, teacher: Tensor) -> Tensor:
    return hierarchical_context_loss([student, student[..., :2]], [teacher, teacher[..., :2]])


def overhaul(student: Tensor, teacher: Tensor) -> Tensor:
    return overhaul_loss(student, teacher, MARGIN.to(student.dtype))


def variational(student: Tensor, teacher: Tensor) -> Tensor:
    return variational_loss(student, teacher, RAW_SCALE.to(student.dtype))


#: Losses of (student, teacher), and the shape of both.
TWO_SIDED: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], tuple[int, ...]]] = {
    "kd": (kd, (3, 5)),
    "dkd": (dkd, (3, 5)),
    "attention": (attention, (3, 5, 3, 4)),
    "context": (context, (3, 5, 3, 4)),
    "overhaul": (overhaul, (3, 5, 3, 4)),
    "variational": (variational, (3, 5, 3, 4)),
}
two_sided = pytest.mark.parametrize("name", TWO_SIDED)


def pair(name: str) -> tuple[Callable[[Tensor, Tensor], Tensor], Tensor, Tensor]:
    loss, shape = TWO_SIDED[name]
    if len(shape) == 2:
        return loss, logits(1), logits(2)
    return loss, noise(*shape, seed=1), noise(*shape, seed=2) * 1.4 + 0.3


def softmax(values: Array) -> Array:
    raised = np.exp(values - values.max())
    return np.asarray(raised / raised.sum())


def kullback_leibler(p: Array, q: Array) -> float:
    return float(np.sum(p * np.log(p / q)))


def averaged(values: Array, height: int, width: int) -> Array:
    """Means of the cells of a grid whose cells may overlap: rows floor(i H/h) to ceil((i+1) H/h)."""
    n, c, rows, columns = values.shape
    out = np.empty((n, c, height, width))
    for i in range(height):
        for j in range(width):
            top, bottom = i * rows // height, -(-(i + 1) * rows // height)
            left, right = j * columns // width, -(-(j + 1) * columns // width)
            out[:, :, i, j] = values[:, :, top:bottom, left:right].mean((2, 3))
    return out


def gradient_of(loss: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    point = at.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(point), point)
    return gradient


def close(loss: Tensor, expected: float) -> None:
    assert loss.shape == ()
    assert loss.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 4.0, 0.3])
def test_kd_is_the_divergence_of_softened_distributions_times_the_squared_temperature(temperature: float) -> None:
    student, teacher = logits(1), logits(2)
    rows = zip(student.numpy() / temperature, teacher.numpy() / temperature, strict=True)
    expected = temperature**2 * np.mean([kullback_leibler(softmax(t), softmax(s)) for s, t in rows])
    close(kd_loss(student, teacher, temperature), float(expected))


def test_the_gradient_of_kd_is_the_difference_of_probabilities_times_the_temperature() -> None:
    student, teacher, temperature = logits(1), logits(2), 4.0
    gradient = gradient_of(lambda s: kd_loss(s, teacher, temperature), student)
    p, q = (np.stack([softmax(row / temperature) for row in x.numpy()]) for x in (teacher, student))
    np.testing.assert_allclose(gradient.numpy(), temperature * (q - p) / 3, rtol=1e-11, atol=1e-15)


@pytest.mark.parametrize(("alpha", "beta", "temperature"), [(1.0, 8.0, 4.0), (0.6, 0.0, 1.3), (0.0, 2.1, 2.7)])
def test_dkd_weights_the_target_and_the_other_classes_separately(alpha: float, beta: float, temperature: float) -> None:
    student, teacher = logits(1), logits(2)
    total = 0.0
    for s, t, target in zip(student.numpy() / temperature, teacher.numpy() / temperature, TARGETS, strict=True):
        p, q, rest = softmax(t), softmax(s), [index for index in range(5) if index != target]
        binary = [np.array([x[target], x[rest].sum()]) for x in (p, q)]
        others = [x[rest] / x[rest].sum() for x in (p, q)]
        total += alpha * kullback_leibler(binary[0], binary[1]) + beta * kullback_leibler(others[0], others[1])
    close(dkd_loss(student, teacher, TARGETS, alpha, beta, temperature), temperature**2 * total / 3)


def test_dkd_equals_kd_if_the_other_classes_weigh_their_share_of_the_teacher() -> None:
    student, teacher, target, temperature = logits(1)[1:2], logits(2)[1:2], torch.tensor([3]), 2.2
    left = 1 - softmax(teacher[0].numpy() / temperature)[3]
    close(dkd_loss(student, teacher, target, 1.0, float(left), temperature), kd_loss(student, teacher, 2.2).item())


def attention_of(values: Array, p: float) -> Array:
    maps = (np.abs(values) ** p).mean(1).reshape(len(values), -1)
    return np.asarray(maps / np.sqrt((maps**2).sum(1, keepdims=True)))


@pytest.mark.parametrize("p", [2, 1, 3, 2.5])
@pytest.mark.parametrize("sides", [((6, 6), (6, 6)), ((8, 8), (4, 4)), ((3, 3), (7, 7)), ((5, 2), (3, 4))])
def test_attention_transfer_compares_normalised_maps_at_the_smaller_size(
    p: float, sides: tuple[tuple[int, int], tuple[int, int]]
) -> None:
    students = [noise(3, 5, *sides[0], seed=1), noise(3, 2, 4, 4, seed=2)]
    teachers = [noise(3, 11, *sides[1], seed=3), noise(3, 7, 4, 4, seed=4)]
    expected = 0.0
    for student, teacher in zip(students, teachers, strict=True):
        h, w = min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3])
        s, t = (attention_of(averaged(x.numpy(), h, w), p) for x in (student, teacher))
        expected += float(np.mean((s - t) ** 2))
    close(attention_transfer_loss(students, teachers, p=p), expected)


def test_attention_transfer_squares_by_default() -> None:
    student, teacher = noise(2, 3, 4, 4, seed=1), noise(2, 5, 4, 4, seed=2)
    close(attention_transfer_loss([student], [teacher]), attention_transfer_loss([student], [teacher], p=2).item())
    assert attention_transfer_loss([student], [teacher]) != attention_transfer_loss([student], [teacher], p=1)


def test_attention_transfer_ignores_the_scale_of_an_image_and_accepts_a_zero_map() -> None:
    student, teacher = noise(3, 5, 4, 4, seed=1), noise(3, 5, 4, 4, seed=2)
    scale = torch.tensor([3.0, 0.02, 700.0], dtype=torch.float64).reshape(3, 1, 1, 1)
    close(attention_transfer_loss([student * scale], [teacher]), attention_transfer_loss([student], [teacher]).item())
    dead = torch.zeros(3, 5, 4, 4, dtype=torch.float64)
    # Each image's map of the teacher has length 1 over 16 pixels.
    close(attention_transfer_loss([dead], [teacher]), 1 / 16)
    assert gradient_of(lambda s: attention_transfer_loss([s], [teacher]), dead).isfinite().all()


#: Side of the map, and the weights of the averages of 4, 2 and 1 pixels a side.
CONTEXT_WEIGHTS = {
    9: {4: 1 / 2, 2: 1 / 4, 1: 1 / 8}, 5: {4: 1 / 2, 2: 1 / 4, 1: 1 / 8}, 4: {2: 1 / 2, 1: 1 / 4},
    3: {2: 1 / 2, 1: 1 / 4}, 2: {1: 1 / 2}, 1: {},
}  # fmt: skip


def context_of(student: Array, teacher: Array, weights: dict[int, float]) -> float:
    terms = [np.mean((student - teacher) ** 2)]
    for side, weight in weights.items():
        terms.append(weight * np.mean((averaged(student, side, side) - averaged(teacher, side, side)) ** 2))
    return float(np.sum(terms) / (1 + sum(weights.values())))


@pytest.mark.parametrize("side", CONTEXT_WEIGHTS)
def test_the_context_loss_assigns_its_weights_in_the_order_of_the_scales_used(side: int) -> None:
    student, teacher = noise(3, 5, side, side, seed=1), noise(3, 5, side, side, seed=2)
    expected = context_of(student.numpy(), teacher.numpy(), CONTEXT_WEIGHTS[side])
    close(hierarchical_context_loss([student], [teacher]), expected)


def test_the_context_loss_sums_over_stages() -> None:
    students = [noise(3, 2 + side, side, side, seed=side) for side in CONTEXT_WEIGHTS]
    teachers = [noise(3, 2 + side, side, side, seed=40 + side) for side in CONTEXT_WEIGHTS]
    each = [
        context_of(s.numpy(), t.numpy(), weights)
        for s, t, weights in zip(students, teachers, CONTEXT_WEIGHTS.values(), strict=True)
    ]
    close(hierarchical_context_loss(students, teachers), sum(each))


def overhaul_of(student: Array, teacher: Array, margin: Sequence[float]) -> float:
    total = 0.0
    for index, t in np.ndenumerate(teacher):
        s, m = float(student[index]), margin[index[1]]
        if t > 0:
            total += (s - t) ** 2
        elif s > max(t, m):
            total += (s - max(t, m)) ** 2
    return total / len(student)


def test_overhaul_sums_what_the_student_should_change() -> None:
    student, teacher = noise(3, 5, 4, 6, seed=1), noise(3, 5, 4, 6, seed=2)
    expected = overhaul_of(student.numpy(), teacher.numpy(), MARGIN.tolist())
    close(overhaul_loss(student, teacher, MARGIN), expected)


def test_overhaul_averages_the_teacher_to_the_students_size_before_the_margin() -> None:
    student, teacher = noise(3, 5, 3, 2, seed=1), noise(3, 5, 7, 6, seed=2)
    expected = overhaul_of(student.numpy(), averaged(teacher.numpy(), 3, 2), MARGIN.tolist())
    close(overhaul_loss(student, teacher, MARGIN), expected)


def test_overhaul_has_no_loss_below_the_margin_of_an_inactive_teacher() -> None:
    teacher = -noise(3, 5, 4, 4).abs() - 0.01
    student = torch.minimum(teacher, MARGIN.reshape(1, 5, 1, 1)) - 2.0
    assert overhaul_loss(student, teacher, MARGIN).item() == 0
    assert not gradient_of(lambda s: overhaul_loss(s, teacher, MARGIN), student).any()


def margin_norm(means: Sequence[float], scales: Sequence[float], *, dtype: torch.dtype) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(len(means), dtype=dtype)
    with torch.no_grad():
        norm.bias.copy_(torch.tensor(means))
        norm.weight.copy_(torch.tensor(scales))
    return norm


def test_the_overhaul_margin_is_the_mean_of_the_negative_part() -> None:
    means, scales = [0.7, -0.4, 0.0, -6.0, 2.5, 0.3], [1.3, -0.9, 2.2, 0.5, -1.0, 0.1]
    margin = overhaul_margin(margin_norm(means, scales, dtype=torch.float64))
    grid = (np.arange(400_000) + 0.5) * -3e-5
    expected = []
    for mean, scale in zip(means, scales, strict=True):
        density = np.exp(-(((grid - mean) / scale) ** 2) / 2)
        expected.append(float((grid * density).sum() / density.sum()))
    np.testing.assert_allclose(margin.numpy(), expected, rtol=1e-6)


def test_a_channel_that_is_hardly_ever_negative_gets_three_deviations() -> None:
    # One in a thousand lies below -3.0902 deviations.
    margin = overhaul_margin(margin_norm([3.08, 3.10, 60.0, -3.10], [1.0, -1.0, 0.5, 1.0], dtype=torch.float64))
    assert margin[1:3].tolist() == [-3.0, -1.5]
    assert margin[0].item() == pytest.approx(-0.3, abs=0.03)
    assert margin[3].item() == pytest.approx(-3.10, abs=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_margin_of_a_channel_without_spread_is_finite_and_never_positive(dtype: torch.dtype) -> None:
    margin = overhaul_margin(margin_norm([-0.5, 0.5, 0.0], [0.0, 0.0, 0.0], dtype=dtype))
    assert margin.tolist() == pytest.approx([-0.5, 0.0, 0.0], abs=1e-15)
    assert margin.dtype == dtype
    assert not margin.requires_grad


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(4, affine=False), nn.BatchNorm1d(4)])
def test_the_margin_of_a_standard_normal_is_that_of_the_half_normal(norm: _BatchNorm) -> None:
    assert overhaul_margin(norm).tolist() == pytest.approx([-math.sqrt(2 / math.pi)] * 4, rel=1e-6)


def test_the_variational_loss_is_the_likelihood_of_a_gaussian_without_its_constant() -> None:
    mean, target = noise(3, 5, 4, 6, seed=1), noise(3, 5, 4, 6, seed=2)
    variance = np.log1p(np.exp(RAW_SCALE.numpy())) + 1e-5
    spread = np.sqrt(variance).reshape(1, 5, 1, 1)
    density = np.exp(-(((mean.numpy() - target.numpy()) / spread) ** 2).clip(max=600) / 2) / spread
    # A channel whose variance is almost zero is improbable beyond floating point, and is left to the next test.
    alive = [0, 1, 2, 4]
    expected = float(np.mean(-np.log(density[:, alive])))
    close(variational_loss(mean[:, alive], target[:, alive], RAW_SCALE[alive]), expected)


def test_the_variance_of_the_variational_loss_has_a_floor() -> None:
    mean, raw = torch.full((1, 1, 1, 1), 2e-3, dtype=torch.float64), torch.tensor([-800.0], dtype=torch.float64)
    close(variational_loss(mean, torch.zeros_like(mean), raw), (4e-6 / 1e-5 + math.log(1e-5)) / 2)


def test_the_variational_loss_is_least_at_the_variance_of_the_error() -> None:
    mean, target = noise(3, 1, 4, 6, seed=1), noise(3, 1, 4, 6, seed=2)
    raw = torch.log(torch.expm1((mean - target).square().mean() - 1e-5)).reshape(1)
    assert abs(gradient_of(lambda scale: variational_loss(mean, target, scale), raw).item()) < 1e-15


def test_the_contrastive_loss_tells_the_positive_from_noise() -> None:
    values, total = scores(), 0.0
    rate = 4 / 977
    for positive, *negatives in values.numpy():
        total += math.log(positive / (positive + rate + 1e-7))
        total += sum(math.log(rate / (negative + rate + 1e-7)) for negative in negatives)
    close(contrastive_nce_loss(values, 977), -total / 3)


def test_the_contrastive_loss_falls_with_the_positive_and_rises_with_each_negative() -> None:
    gradient = gradient_of(nce, scores())
    assert (gradient[:, 0] < 0).all()
    assert (gradient[:, 1:] > 0).all()
    perfect = torch.tensor([[1e9, 1e-12, 1e-12]], dtype=torch.float64)
    assert 0 <= contrastive_nce_loss(perfect, 10).item() < 1e-5


@two_sided
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    loss, student, teacher = pair(name)
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher), (student.requires_grad_(),))


def test_gradients_of_scales_and_scores_are_those_of_finite_differences() -> None:
    mean, target = noise(2, 4, 3, 2, seed=1), noise(2, 4, 3, 2, seed=2)
    raw = RAW_SCALE[[0, 1, 2, 4]].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda scale: variational_loss(mean, target, scale), (raw,))
    assert torch.autograd.gradcheck(nce, (scores().requires_grad_(),))


@two_sided
def test_a_student_that_equals_its_teacher_is_at_the_minimum(name: str) -> None:
    loss, student, teacher = pair(name)
    value = loss(teacher, teacher)
    if name == "variational":
        assert value < loss(student, teacher)
    else:
        assert abs(value.item()) < 1e-15
    assert gradient_of(lambda s: loss(s, teacher), teacher).abs().max() < 1e-14
    assert loss(student, teacher) > 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@two_sided
def test_low_precision_is_computed_in_float32_also_under_autocast(name: str, dtype: torch.dtype) -> None:
    loss, student, teacher = pair(name)
    low = student.to(dtype), teacher.to(dtype)
    expected = loss(low[0].double(), low[1].double()).item()
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            result = loss(low[0].requires_grad_(), low[1])
        assert result.dtype == torch.float32
        # Margins and scales are rounded to the low precision too, by the functions above.
        assert result.item() == pytest.approx(expected, rel=2e-6 if name not in ("overhaul", "variational") else 1e-2)


def test_scores_in_low_precision_are_computed_in_float32() -> None:
    values = scores().bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        result = nce(values)
    assert result.dtype == torch.float32
    assert result.item() == pytest.approx(nce(values.double()).item(), rel=1e-6)


def test_sums_beyond_half_precision_stay_finite() -> None:
    student, teacher = torch.full((2, 5, 32, 32), -300.0).half(), torch.full((2, 5, 32, 32), 300.0).half()
    assert overhaul(student, teacher).item() == 5 * 32 * 32 * 600**2
    assert context(student, teacher).item() == pytest.approx(2 * 600**2, rel=1e-6)
    assert attention_transfer_loss([student], [teacher]).item() == 0


@pytest.mark.parametrize("loss", [kd, dkd])
def test_extreme_logits_give_finite_losses_and_gradients(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    student = torch.tensor([[2e4, -2e4, 0, 5, 1], [0, 0, 0, 0, 3e4], [-1e4, 1e4, -1e4, 1e4, 0]])
    teacher = student.flip(1)
    value = loss(student, teacher)
    assert value.isfinite()
    assert value > 1e3
    assert gradient_of(lambda s: loss(s, teacher), student).isfinite().all()


@two_sided
def test_each_image_counts_the_same_and_batches_average(name: str) -> None:
    loss, student, teacher = pair(name)
    if name == "dkd":
        singles = [
            dkd_loss(student[i : i + 1], teacher[i : i + 1], TARGETS[i : i + 1], 0.7, 6.3, 2.9) for i in range(3)
        ]
    else:
        singles = [loss(student[i : i + 1], teacher[i : i + 1]) for i in range(3)]
    close(loss(student, teacher), float(torch.stack(singles).mean()))


FEATURE, LOGITS = torch.zeros(3, 5, 4, 4), torch.zeros(3, 5)
WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "kd, classes": (lambda: kd_loss(LOGITS, torch.zeros(3, 6), 4), r"student's shape \(3, 5\) .* teacher's \(3, 6\)"),
    "kd, broadcast": (lambda: kd_loss(LOGITS, torch.zeros(1, 5), 4), r"student's shape \(3, 5\) .* teacher's \(1, 5\)"),
    "kd, maps": (lambda: kd_loss(FEATURE, FEATURE, 4), r"^logits must be \(N,K\), but have the shape \(3, 5, 4, 4\)$"),
    "kd, temperature": (lambda: kd_loss(LOGITS, LOGITS, 0), "^the temperature must be above 0, but is 0$"),
    "dkd, targets": (
        lambda: dkd_loss(LOGITS, LOGITS, torch.zeros(2).long(), 1, 1, 4), r"need targets \(3,\) .* are \(2,\)$"
    ),
    "dkd, one-hot": (
        lambda: dkd_loss(LOGITS, LOGITS, torch.zeros(3, 5).long(), 1, 1, 4), r"need targets \(3,\) .* are \(3, 5\)$"
    ),
    "dkd, one class": (
        lambda: dkd_loss(torch.zeros(3, 1), torch.zeros(3, 1), torch.zeros(3).long(), 1, 1, 4), "2 or more classes"
    ),
    "attention, stages": (
        lambda: attention_transfer_loss([FEATURE], [FEATURE] * 2), "student has 1 and the teacher 2$"
    ),
    "attention, none": (lambda: attention_transfer_loss([], []), "student has 0 and the teacher 0$"),
    "attention, batch": (lambda: attention_transfer_loss([FEATURE], [FEATURE[:1]]), r"teacher's \(1, 5, 4, 4\)"),
    "attention, vectors": (
        lambda: attention_transfer_loss([LOGITS], [LOGITS]),
        r"^features must be \(N,C,H,W\), but have the shapes \(3, 5\) and \(3, 5\)$",
    ),
    "attention, p": (
        lambda: attention_transfer_loss([FEATURE], [FEATURE], p=0), "^the power p must be 1 or more, but is 0$"
    ),
    "context, channels": (lambda: hierarchical_context_loss([FEATURE], [FEATURE[:, :1]]), r"teacher's \(3, 1, 4, 4\)"),
    "context, size": (lambda: hierarchical_context_loss([FEATURE], [FEATURE[..., :1]]), r"teacher's \(3, 5, 4, 1\)"),
    "context, stages": (
        lambda: hierarchical_context_loss([FEATURE] * 3, [FEATURE] * 2), "student has 3 and the teacher 2$"
    ),
    "overhaul, channels": (lambda: overhaul_loss(FEATURE, FEATURE[:, :1], torch.zeros(5)), r"teacher's \(3, 1, 4, 4\)"),
    "overhaul, margin": (
        lambda: overhaul_loss(FEATURE, FEATURE, torch.zeros(1)), r"^margin must have one value for each of 5 .* \(1,\)$"
    ),
    "variational, size": (lambda: variational_loss(FEATURE, FEATURE[..., :1], torch.zeros(5)), r"\(3, 5, 4, 1\)"),
    "variational, scale": (
        lambda: variational_loss(FEATURE, FEATURE, torch.zeros(1)), r"^raw_scale must .* 5 .* \(1,\)$"
    ),
    "nce, no noise": (
        lambda: contrastive_nce_loss(torch.ones(3, 1), 10), r"scores are \(3, 1\) and num_samples is 10$"
    ),
    "nce, vector": (lambda: contrastive_nce_loss(torch.ones(3), 10), r"scores are \(3,\)"),
    "nce, no samples": (lambda: contrastive_nce_loss(torch.ones(3, 4), 0), "num_samples is 0$"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_mismatched_arguments_are_refused_with_their_shapes(case: str) -> None:
    call, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        call()
