"""Attention transfer, computed again in numpy from the text of the paper."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from kdexport.students import Tapped
from tests.training.distillers.numpy_layers import array, averaged
from tests.training.distillers.stage_networks import COUNT, build, loss_of, random_outputs, small
from tests.training.small_distillation import random_tapped


@pytest.mark.parametrize(("student", "teacher"), [("mobilenetv2", "resnet8"), ("shufflenetv2", "vgg8")])
@pytest.mark.parametrize("power", [2.0, 1.0, 3.0])
def test_at_is_the_distance_of_normalised_maps(student: str, teacher: str, power: float) -> None:
    ours, theirs = small(student, teacher)
    student_out, teacher_out = random_outputs(ours, theirs)
    expected = 0.0
    for a, b in zip(reversed(ours.stages), reversed(theirs.stages), strict=False):
        maps = [array(student_out.features[a.name]), array(teacher_out.features[b.name])]
        side = min(x.shape[2] for x in maps)
        energies = [(np.abs(averaged(x, side, side)) ** power).mean(1).reshape(COUNT, -1) for x in maps]
        unit = [energy / np.sqrt((energy**2).sum(1, keepdims=True)) for energy in energies]
        expected += ((unit[0] - unit[1]) ** 2).mean()
    loss = loss_of(build("at", ours, theirs, weight=700.0, power=power), student_out, teacher_out)
    assert loss == pytest.approx(700 * expected, rel=1e-10)


def test_at_is_zero_if_the_attention_maps_agree() -> None:
    student, teacher = small("shufflenetv2", "resnet8")
    teacher_out = random_tapped(teacher, COUNT, 2)
    seen = {}
    for ours, theirs in zip(student.stages, teacher.stages, strict=True):
        side = -(-student.image_size // ours.stride)
        theirs_small = functional.adaptive_avg_pool2d(teacher_out.features[theirs.name], side)
        # The same map in every channel, at another scale for each image.
        energy = theirs_small.square().mean(1, keepdim=True).sqrt()
        seen[ours.name] = energy.expand(-1, ours.channels, -1, -1) * torch.tensor([9, 0.1, 1, 33]).reshape(-1, 1, 1, 1)
    student_out = Tapped(features=seen, preactivations=seen, pooled=teacher_out.pooled, logits=teacher_out.logits)
    distiller = build("at", student, teacher)
    assert loss_of(distiller, student_out, teacher_out) < 1e-20
    assert loss_of(distiller, random_tapped(student, COUNT, 1), teacher_out) > 1
