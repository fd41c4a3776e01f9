"""Decoupled knowledge distillation, computed again in numpy from the text of the paper."""

import numpy as np
import pytest

from tests.training.distillers.numpy_layers import array, softened
from tests.training.distillers.stage_networks import CLASSES, COUNT, build, context, loss_of, random_outputs, small


def test_dkd_weights_the_target_and_the_other_classes_separately() -> None:
    student, teacher = small()
    student_out, teacher_out = random_outputs(student, teacher)
    p, q = (softened(array(taps.logits), 3.0) for taps in (student_out, teacher_out))
    total = 0.0
    for row, label in enumerate(context().labels.tolist()):
        a, b = p[row, label], q[row, label]
        binary = b * np.log(b / a) + (1 - b) * np.log((1 - b) / (1 - a))
        others = [index for index in range(CLASSES) if index != label]
        rest = sum(q[row, k] / (1 - b) * np.log(q[row, k] / (1 - b) / (p[row, k] / (1 - a))) for k in others)
        total += 9 * (0.6 * binary + 5.0 * rest) / COUNT
    distiller = build("dkd", student, teacher, alpha=0.6, beta=5.0, temperature=3.0, weight=0.4)
    assert loss_of(distiller, student_out, teacher_out) == pytest.approx(0.4 * total, rel=1e-9)
    assert loss_of(distiller, teacher_out, teacher_out) == pytest.approx(0, abs=1e-12)
