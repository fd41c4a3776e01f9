"""DIST, computed again in numpy from the text of the paper."""

from typing import cast

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.kdexport.hostile_values import noise
from tests.training.distillers.numpy_layers import array, softened
from tests.training.distillers.stage_networks import CLASSES, build, loss_of, random_outputs, small
from training.losses import dist_loss


def test_dist_is_one_minus_the_correlations_of_rows_and_columns() -> None:
    student, teacher = small()
    student_out, teacher_out = random_outputs(student, teacher)
    p, q = (softened(array(taps.logits), 2.5) for taps in (student_out, teacher_out))
    rows = 1 - np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(p, q, strict=True)])
    columns = 1 - np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(p.T, q.T, strict=True)])
    expected = 2.5**2 * (1.7 * rows + 0.4 * columns)
    distiller = build("dist", student, teacher, inter_class=1.7, intra_class=0.4, temperature=2.5, weight=0.3)
    # The authors' epsilon is in the denominators.
    assert loss_of(distiller, student_out, teacher_out) == pytest.approx(0.3 * expected, rel=1e-5)


def test_dist_ignores_shift_and_scale_of_probabilities() -> None:
    logits = noise(6, CLASSES) * 2
    assert dist_loss(logits, logits + noise(6, 1), 1.3, 0.7, 3.0).item() == pytest.approx(0, abs=1e-5)
    flatter = torch.log(0.3 * torch.softmax(logits, 1) + 0.7 / CLASSES)
    assert dist_loss(flatter, logits, 1.3, 0.7, 1.0).item() == pytest.approx(0, abs=1e-5)
    assert dist_loss(-logits, logits, 1.3, 0.7, 1.0).item() > 1


@pytest.mark.parametrize("logits", [torch.zeros(3, 4), torch.eye(4)[:3] * 1e4, torch.ones(1, 4) * torch.arange(4)])
def test_dist_is_finite_where_there_is_nothing_to_correlate(logits: Tensor) -> None:
    student = logits.clone().requires_grad_(True)
    loss = dist_loss(student, logits.flip(1), 2.0, 3.0, 4.0)
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.isfinite()
    assert cast(Tensor, student.grad).isfinite().all()
    assert loss.item() <= 4.0**2 * (2 * 2.0 + 2 * 3.0)


def test_dist_refuses_different_shapes_and_a_temperature_of_zero() -> None:
    with pytest.raises(ValueError, match="does not match the teacher's"):
        dist_loss(noise(3, 4), noise(3, 5), 1.0, 1.0, 1.0)
    with pytest.raises(ValueError, match="temperature"):
        dist_loss(noise(3, 4), noise(3, 4), 1.0, 1.0, 0.0)
