"""The shared-noise loss as a quadratic form of the branch errors.

e_j = x0 - z_j is the error of branch j; r_{k-1} = u_k r_k + v_k e_{pi(k)} is the distance between the two trajectories
after step k, and L = (1/m) sum_k omega_k mean(r_{k-1}^2) = e' F e. A matrix (m,m) of plain numbers is called a form
here; before a permutation is applied, its rows and columns are steps, and afterwards branches.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor

from training.noise_schedule import Posterior

Form = tuple[tuple[float, ...], ...]


def distance_rows(steps: Sequence[Posterior]) -> Form:
    """Row k - 1 has the coefficients of r_{k-1} as a sum over the errors of the branches that serve steps 1..m."""
    row, rows = [0.0] * len(steps), []
    for k in range(len(steps), 0, -1):
        row = [steps[k - 1].u * value for value in row]
        row[k - 1] += steps[k - 1].v
        rows.append(tuple(row))
    return tuple(reversed(rows))


def loss_form(steps: Sequence[Posterior], step_weights: Sequence[float]) -> Form:
    """The symmetric matrix F with L = e' F e."""
    rows = distance_rows(steps)
    return _weighted(rows, rows, step_weights)


def truncated_form(steps: Sequence[Posterior], step_weights: Sequence[float]) -> Form:
    """The matrix T with dL/de = 2 T e if no gradient flows through r_k into earlier steps; in general not symmetric."""
    count = len(steps)
    own = tuple(tuple(steps[k].v if k == j else 0.0 for j in range(count)) for k in range(count))
    return _weighted(own, distance_rows(steps), step_weights)


def permutation_average(form: Form) -> tuple[float, float]:
    """(alpha, beta) such that alpha I + beta 11' is the mean of ``form`` over all orders of the branches.

    Only matrices of that kind are the same under every exchange of branches; trace and sum determine the two numbers.
    """
    count = len(form)
    trace = sum(form[i][i] for i in range(count))
    beta = (sum(map(sum, form)) - trace) / (count * (count - 1)) if count > 1 else 0.0
    return trace / count - beta, beta


def symmetric_form(alpha: float, beta: float, count: int) -> Form:
    """alpha I + beta 11' with ``count`` rows."""
    return tuple(tuple(beta + (alpha if i == j else 0.0) for j in range(count)) for i in range(count))


def reordered(form: Form, order: Sequence[int]) -> Form:
    """``form`` with a row and a column for each branch; ``order[k - 1]`` is the branch of step k."""
    step_of = [order.index(branch) for branch in range(len(form))]
    return tuple(tuple(form[i][j] for j in step_of) for i in step_of)


def reordered_on_device(form: Tensor, orders: Tensor) -> Tensor:
    """``reordered`` of a tensor (m,m) by int64 orders (m,) or (N,m), on their device: (m,m) or (N,m,m)."""
    # The inverse of each order, without a sort.
    steps = torch.arange(orders.shape[-1], device=orders.device).expand_as(orders)
    step_of = torch.empty_like(orders).scatter_(-1, orders, steps)
    if orders.ndim == 1:
        return form.index_select(0, step_of).index_select(1, step_of)
    return form[step_of.unsqueeze(-1), step_of.unsqueeze(-2)]


def on_device(form: Form, like: Tensor) -> Tensor:
    """``form`` as a tensor with the dtype and device of ``like``; copied once, as each copy waits for the device."""
    if torch.compiler.is_compiling():
        return torch.tensor(form, dtype=like.dtype, device=like.device)
    return _copied(form, like.dtype, like.device)


@lru_cache(maxsize=256)
def _copied(form: Form, dtype: torch.dtype, device: torch.device) -> Tensor:
    # A tensor that is created in inference mode cannot be used in training later.
    with torch.inference_mode(mode=False):
        return torch.tensor(form, dtype=dtype, device=device)


def quadratic_mean(errors: Tensor, form: Tensor, gradient_form: Tensor | None = None) -> Tensor:
    """Mean over elements of e' F e, a scalar, for errors (m,N,...) and ``form`` F (m,m), or (N,m,m) for each sample.

    The gradient is 2 T e / elements with T = ``gradient_form``, by default F, which must be symmetric. Errors of lower
    precision are summed in float32.
    """
    precise = errors.to(torch.promote_types(errors.dtype, torch.float32))
    per_sample = form.ndim == 3
    # Autocast would run the product in half precision.
    with full_precision(errors.device):
        flat = precise.flatten(2).transpose(0, 1) if per_sample else _in_memory_order(precise).flatten(1)
        total = _QuadraticForm.apply(flat, form, gradient_form)
    return cast(Tensor, total) / errors[0].numel()


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """A context without autocast on ``device``; the meta device has no autocast."""
    # Not torch.amp.is_autocast_available: torch 2.11 cannot trace it, and a compiled loss would break into two graphs.
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def _in_memory_order(errors: Tensor) -> Tensor:
    """(m,...) with its other dimensions in memory order: the result is the same, and flattening needs no copy."""
    inner = sorted(range(1, errors.ndim), key=lambda dim: (-errors.stride()[dim], dim))
    return errors.permute(0, *inner)


class _QuadraticForm(torch.autograd.Function):
    """sum(e * F e) of errors (..., m, D); if F gives the gradient too, one product serves both passes."""

    @staticmethod
    def forward(ctx: Any, errors: Tensor, form: Tensor, gradient_form: Tensor | None) -> Tensor:
        pull = form @ errors
        # Not through a Gram matrix: BLAS would add up half a million products in one float32.
        total = (errors * pull).sum()
        leading = form if gradient_form is None else gradient_form
        ctx.save_for_backward(errors, leading, pull if gradient_form is None else leading @ errors)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        errors, form, pull = ctx.saved_tensors
        # A second derivative needs the product as a part of the graph.
        return 2 * gradient * (form @ errors if torch.is_grad_enabled() else pull), None, None


def _weighted(left: Form, right: Form, step_weights: Sequence[float]) -> Form:
    """(1/m) left' diag(omega) right."""
    count = len(left)
    return tuple(
        tuple(
            sum(weight * a[i] * b[j] for weight, a, b in zip(step_weights, left, right, strict=True)) / count
            for j in range(count)
        )
        for i in range(count)
    )
