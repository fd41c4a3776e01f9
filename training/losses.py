"""The losses of the methods that KDiffusion is compared with, as pure functions of tensors.

Each loss is computed in float32 or better, whatever the precision of its inputs, and is a scalar. Weights between
losses, projections and memory banks belong to the distillers. The teacher's input comes second and is not detached
here. Shapes that do not match raise ``ValueError``.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from training.quadratic import full_precision, on_device

#: Sides of the pooled maps of the hierarchical context loss, and the factor between the weights of two of them.
_CONTEXT_SIDES, _CONTEXT_DECAY = (4, 2, 1), 0.5
#: If fewer values than this fraction are negative, their mean is not estimated: it is three standard deviations.
MIN_NEGATIVE_SHARE, RARE_MARGIN = 1e-3, 3.0
MIN_VARIANCE = 1e-5
_NCE_EPSILON = 1e-7
_CORRELATION_EPSILON = 1e-8


def kd_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """T^2 KL(softmax(t/T) || softmax(s/T)) of logits (N,K), mean over the batch (Hinton et al., 2015)."""
    _check_logits(student_logits, teacher_logits, temperature)
    student, teacher = _precise(student_logits) / temperature, _precise(teacher_logits) / temperature
    return temperature**2 * _divergence(student, teacher)


def dkd_loss(
    student_logits: Tensor, teacher_logits: Tensor, targets: Tensor, alpha: float, beta: float, temperature: float
) -> Tensor:
    """T^2 (alpha TCKD + beta NCKD) of logits (N,K) and classes (N,), mean over the batch (Zhao et al., 2022, eq. 7).

    TCKD compares the probability of the target with that of all other classes together, NCKD the other classes.
    """
    _check_logits(student_logits, teacher_logits, temperature)
    count, classes = student_logits.shape
    if targets.shape != (count,) or classes < 2:
        raise ValueError(
            f"logits {(count, classes)} need targets ({count},) and 2 or more classes, but targets are "
            f"{tuple(targets.shape)}"
        )
    target_index, index = targets.unsqueeze(1), torch.arange(classes - 1, device=targets.device)
    other_index = index + (index >= target_index).long()

    def split(logits: Tensor) -> tuple[Tensor, Tensor]:
        scaled = _precise(logits) / temperature
        others = scaled.gather(1, other_index)
        # Logits of the two-class distribution: no probability is computed, so none underflows.
        return torch.cat([scaled.gather(1, target_index), torch.logsumexp(others, 1, keepdim=True)], 1), others

    (student_target, student_others), (teacher_target, teacher_others) = split(student_logits), split(teacher_logits)
    target, others = _divergence(student_target, teacher_target), _divergence(student_others, teacher_others)
    return temperature**2 * (alpha * target + beta * others)


def dist_loss(
    student_logits: Tensor, teacher_logits: Tensor, inter_class: float, intra_class: float, temperature: float
) -> Tensor:
    """T^2 (b (1 - r_rows) + g (1 - r_columns)) of logits (N,K), weights b, g (Huang et al., 2022).

    r is the mean of Pearson's correlations between student and teacher of softmax(logits/T): over the classes of each
    image, and over the images for each class. As in the authors' code, 1e-8 is added to the product of the two standard
    deviations, so that a class with nearly no probability in the batch counts as uncorrelated.
    """
    _check_logits(student_logits, teacher_logits, temperature)
    student, teacher = (torch.softmax(_precise(x) / temperature, 1) for x in (student_logits, teacher_logits))
    inter, intra = 1 - _correlation(student, teacher), 1 - _correlation(student.T, teacher.T)
    return temperature**2 * (inter_class * inter + intra_class * intra)


def many_to_one_loss(student_feature: Tensor, teacher_feature: Tensor) -> Tensor:
    """Sum over n segments of the mean squared error to one teacher feature (Liu et al., 2023, NORM).

    The student's (N,n*C,H,W) holds n segments of C channels one after another, the teacher's is (N,C,H,W).
    """
    (count, wide, *size), channels = student_feature.shape, teacher_feature.shape[1]
    if teacher_feature.shape != (count, channels, *size) or wide % channels:
        raise ValueError(_differ(student_feature, teacher_feature))
    segments = torch.unflatten(_precise(student_feature), 1, (wide // channels, channels))
    return (segments - _precise(teacher_feature).unsqueeze(1)).square().mean((0, 2, 3, 4)).sum()


def attention_transfer_loss(
    student_features: Sequence[Tensor], teacher_features: Sequence[Tensor], p: float = 2
) -> Tensor:
    """Sum over stages of mean((Q_s - Q_t)^2) for features (N,C,H,W) (Zagoruyko & Komodakis, 2017, eq. 2).

    Q (N,H*W) is the mean over channels of |feature|^p, divided by its L2 norm. The larger map is averaged to the size
    of the smaller; numbers of channels may differ.
    """
    if p < 1:
        raise ValueError(f"the power p must be 1 or more, but is {p}")
    losses = []
    for student, teacher in _paired(student_features, teacher_features):
        side = _smaller_side(student, teacher)
        maps = [_attention(functional.adaptive_avg_pool2d(_precise(x), side), p) for x in (student, teacher)]
        losses.append((maps[0] - maps[1]).square().mean())
    return torch.stack(losses).sum()


def hierarchical_context_loss(student_features: Sequence[Tensor], teacher_features: Sequence[Tensor]) -> Tensor:
    """Sum over stages of the weighted mean of squared errors at several scales (Chen et al., 2021, ReviewKD's HCL).

    Features of a stage (N,C,H,W) have one shape. Scales are the map itself and those of its averages to 4, 2
    and 1 pixels a side that are smaller than it; their weights are 1, 1/2, 1/4, 1/8 in that order.
    """
    compared: list[Tensor] = []
    shares: list[float] = []
    with full_precision(student_features[0].device):
        for student, teacher in _paired(student_features, teacher_features):
            _check_same(student, teacher)
            # The difference of averages is the average of the difference. One that is precise makes it precise.
            difference = student - _precise(teacher)
            count, channels, height, width = difference.shape
            sides = tuple(side for side in _CONTEXT_SIDES if side < min(height, width))
            weights = [_CONTEXT_DECAY**index for index in range(1 + len(sides))]
            compared.append(difference)
            shares.append(1 / sum(weights) / difference.numel())
            if sides:
                cells = _context_cells((height, width), sides, difference.dtype, difference.device)
                compared.append(torch.bmm(cells.expand(count, -1, -1), difference.flatten(2).mT))
                shares.append(1 / sum(weights) / (count * channels))
        return cast(Tensor, _SquareSum.apply(tuple(shares), *compared))


def _context_cells(size: tuple[int, int], sides: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """(cells,H*W): the averages of all scales of a map of ``size`` as one product.

    A row is multiplied by the root of its part in the loss: the weight of its scale over the number of its cells.
    """
    make = _computed_cells if torch.compiler.is_compiling() else _cached_cells
    return make(size, sides, dtype, device)


def _computed_cells(size: tuple[int, int], sides: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    rows = []
    for index, side in enumerate(sides, 1):
        down, across = (functional.adaptive_avg_pool1d(_identity(n, device), side).T for n in size)
        rows.append(torch.kron(down, across) * (_CONTEXT_DECAY**index / side**2) ** 0.5)
    return torch.cat(rows).to(dtype)


def _identity(count: int, device: torch.device) -> Tensor:
    return torch.eye(count, dtype=torch.float64, device=device)


@lru_cache(maxsize=64)
def _cached_cells(size: tuple[int, int], sides: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    # A tensor that is created in inference mode cannot be used in training later.
    with torch.inference_mode(mode=False):
        return _computed_cells(size, sides, dtype, device)


class _SquareSum(torch.autograd.Function):
    """sum_i share_i |x_i|^2 of tensors of any shapes, with a few kernels for all of them."""

    @staticmethod
    def forward(ctx: Any, shares: tuple[float, ...], *values: Tensor) -> Tensor:
        ctx.shares = shares
        ctx.save_for_backward(*values)
        norms = torch.stack(list(torch._foreach_norm(list(values))))
        return torch.dot(norms.square(), on_device((shares,), norms)[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        scaled = list(torch._foreach_mul(list(ctx.saved_tensors), [2 * share for share in ctx.shares]))
        torch._foreach_mul_(scaled, gradient)
        return None, *scaled


def overhaul_loss(student_feature: Tensor, teacher_feature: Tensor, margin: Tensor) -> Tensor:
    """Squared distance to max(t, margin), summed over C,H,W, mean over the batch (Heo et al., 2019).

    Both features (N,C,H,W) are pre-activations; ``margin`` (C,) is ``overhaul_margin``. Where the teacher is not
    positive, a student below the target has no loss. The teacher's map is averaged to the student's size.
    """
    if student_feature.shape[:2] != teacher_feature.shape[:2]:
        raise ValueError(_differ(student_feature, teacher_feature))
    if margin.shape != student_feature.shape[1:2]:
        raise ValueError(
            f"margin must have one value for each of {student_feature.shape[1]} channels, but has the shape "
            f"{tuple(margin.shape)}"
        )
    student = _precise(student_feature)
    teacher = functional.adaptive_avg_pool2d(_precise(teacher_feature), (student.shape[2], student.shape[3]))
    target = torch.maximum(teacher, _precise(margin).reshape(1, -1, 1, 1))
    counts = (student > target) | (teacher > 0)
    return torch.where(counts, (student - target).square(), 0.0).sum((1, 2, 3)).mean()


def overhaul_margin(batch_norm: _BatchNorm) -> Tensor:
    """E[x | x < 0] (C,) for the output x ~ N(beta, gamma^2) of ``batch_norm`` (Heo et al., 2019).

    beta - |gamma| phi(beta/|gamma|) / Phi(-beta/|gamma|), or -3 |gamma| if at most a thousandth of x is negative.
    """
    reference = torch.zeros(batch_norm.num_features) if batch_norm.bias is None else batch_norm.bias.detach()
    mean = reference.double()
    scale = torch.ones_like(mean) if batch_norm.weight is None else batch_norm.weight.detach().double().abs()
    # Without variance a channel is its mean, which the formula approaches as a limit.
    ratio = mean / scale.clamp(min=1e-30)
    density = torch.exp(-ratio.square() / 2) / math.sqrt(2 * math.pi)
    share = torch.special.ndtr(-ratio)
    margin = torch.where(share > MIN_NEGATIVE_SHARE, mean - scale * density / share, -RARE_MARGIN * scale)
    return margin.to(reference.dtype)


def variational_loss(predicted_mean: Tensor, target: Tensor, raw_scale: Tensor) -> Tensor:
    """mean((r - t)^2 / var + log var) / 2 of maps (N,C,H,W), var = softplus(raw_scale) + 1e-5 (Ahn et al., 2019).

    ``raw_scale`` (C,) is learned; the constant of the Gaussian log-likelihood is omitted.
    """
    _check_same(predicted_mean, target)
    if raw_scale.shape != target.shape[1:2]:
        raise ValueError(
            f"raw_scale must have one value for each of {target.shape[1]} channels, but has the shape "
            f"{tuple(raw_scale.shape)}"
        )
    variance = (functional.softplus(_precise(raw_scale)) + MIN_VARIANCE).reshape(1, -1, 1, 1)
    error = _precise(predicted_mean) - _precise(target)
    return (error.square() / variance + variance.log()).mean() / 2


def contrastive_nce_loss(scores: Tensor, num_samples: int) -> Tensor:
    """Noise-contrastive loss of scores (N,1+K), the positive first, mean over the batch (Tian et al., 2020).

    Scores are exp(similarity / T) / Z > 0; ``num_samples`` is the size n of the data set. Noise is drawn uniformly from
    it, so the K samples have the weight K/n.
    """
    if scores.ndim != 2 or scores.shape[1] < 2 or num_samples < 1:
        raise ValueError(
            f"scores must be (N,1+K) with K of 1 or more, and num_samples 1 or more, but scores are "
            f"{tuple(scores.shape)} and num_samples is {num_samples}"
        )
    positive, negatives = _precise(scores[:, 0]), _precise(scores[:, 1:])
    noise = negatives.shape[1] / num_samples
    hit = torch.log(positive / (positive + noise + _NCE_EPSILON))
    miss = torch.log(noise / (negatives + noise + _NCE_EPSILON)).sum(1)
    return -(hit + miss).mean()


def _precise(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) of scaled logits (N,K), mean over the batch."""
    own, given = torch.log_softmax(student, 1), torch.log_softmax(teacher, 1)
    return functional.kl_div(own, given, reduction="batchmean", log_target=True)


def _correlation(a: Tensor, b: Tensor) -> Tensor:
    """The mean correlation between corresponding rows of two matrices."""
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    product = torch.linalg.vector_norm(a, dim=1) * torch.linalg.vector_norm(b, dim=1)
    correlations: Tensor = (a * b).sum(1) / (product + _CORRELATION_EPSILON)
    return correlations.mean()


def _attention(feature: Tensor, p: float) -> Tensor:
    return functional.normalize(feature.abs().pow(p).mean(1).flatten(1))


def _smaller_side(a: Tensor, b: Tensor) -> tuple[int, int]:
    return min(a.shape[2], b.shape[2]), min(a.shape[3], b.shape[3])


def _paired(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    if len(student) != len(teacher) or not student:
        raise ValueError(
            "student and teacher need equally many features, at least 1, but the student has "
            f"{len(student)} and the teacher {len(teacher)}"
        )
    pairs = list(zip(student, teacher, strict=True))
    for s, t in pairs:
        if s.ndim != 4 or t.ndim != 4:
            raise ValueError(f"features must be (N,C,H,W), but have the shapes {tuple(s.shape)} and {tuple(t.shape)}")
        if s.shape[0] != t.shape[0]:
            raise ValueError(_differ(s, t))
    return pairs


def _check_logits(student: Tensor, teacher: Tensor, temperature: float) -> None:
    if student.ndim != 2:
        raise ValueError(f"logits must be (N,K), but have the shape {tuple(student.shape)}")
    _check_same(student, teacher)
    if temperature <= 0:
        raise ValueError(f"the temperature must be above 0, but is {temperature}")


def _check_same(student: Tensor, teacher: Tensor) -> None:
    if student.shape != teacher.shape:
        raise ValueError(_differ(student, teacher))


def _differ(student: Tensor, teacher: Tensor) -> str:
    return f"the student's shape {tuple(student.shape)} does not match the teacher's {tuple(teacher.shape)}"
