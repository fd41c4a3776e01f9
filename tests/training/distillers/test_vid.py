"""Variational information distillation, computed again in numpy from the text of the paper."""

import math
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch.nn import functional

from kdexport.errors import ConfigError
from tests.kdexport.hostile_values import noise
from tests.training.distillers.numpy_layers import array, averaged, convolved, parameter
from tests.training.distillers.stage_networks import build, loss_of, random_outputs, small
from tests.training.small_distillation import settings_of
from training.distillers import DISTILLERS
from training.distillers.pairs import average_to_smaller, stage_pairs
from training.recipe import Recipe


def test_vid_is_the_likelihood_under_a_gaussian_for_each_channel() -> None:
    student, teacher = small("shufflenetv2", "vgg8")
    distiller = build("vid", student, teacher, weight=0.7)
    scales = {name: p for name, p in distiller.named_parameters() if name.endswith("raw_scale")}
    for index, scale in enumerate(scales.values()):
        scale.data = noise(len(scale), seed=index) * 4
    student_out, teacher_out = random_outputs(student, teacher)
    expected = 0.0
    for ours, theirs in zip(student.stages, teacher.stages[1:], strict=True):
        a, b = array(student_out.features[ours.name]), array(teacher_out.features[theirs.name])
        side = min(a.shape[2], b.shape[2])
        mean, target = averaged(a, side, side), averaged(b, side, side)
        path = f"matches.{ours.name}"
        for position in (0, 2, 4):
            weight = parameter(distiller, f"{path}.regressor.{position}.weight")
            assert weight.shape[0] == theirs.channels
            mean = convolved(np.maximum(mean, 0) if position else mean, weight)
        variance = (np.log1p(np.exp(array(scales[f"{path}.raw_scale"]))) + 1e-5).reshape(1, -1, 1, 1)
        expected += (0.5 * ((mean - target) ** 2 / variance + np.log(variance))).mean()
    assert loss_of(distiller, student_out, teacher_out) == pytest.approx(0.7 * expected, rel=1e-10)


@pytest.mark.parametrize("variance", [5.0, 0.3, 1.1e-5, 900.0])
def test_vid_starts_from_the_variance_of_its_settings(variance: float) -> None:
    student, teacher = small()
    distiller = DISTILLERS.build(
        "vid", settings=settings_of("vid", initial_variance=variance), student=student, teacher=teacher
    )
    scales = [p for name, p in distiller.named_parameters() if name.endswith("raw_scale")]
    assert [tuple(scale.shape) for scale in scales] == [(16,), (32,), (64,)]
    for scale in scales:
        torch.testing.assert_close(
            functional.softplus(scale.double()) + 1e-5, torch.full_like(scale, variance).double()
        )
        assert scale.requires_grad
    if variance == 5.0:
        assert scales[0][0].item() == pytest.approx(math.log(math.exp(5 - 1e-5) - 1), rel=1e-6)
    assert {f"matches.stage{i}.raw_scale" for i in (2, 3, 4)} <= set(distiller.state_dict())


def test_vid_has_no_gradient_where_the_variance_equals_the_squared_error() -> None:
    student, teacher = small()
    distiller = build("vid", student, teacher)
    student_out, teacher_out = random_outputs(student, teacher)
    (pair,) = stage_pairs(student, teacher)[-1:]
    match = cast(Any, distiller).matches[pair.student.name]
    ours, theirs = average_to_smaller(student_out.features[pair.student.name], teacher_out.features[pair.teacher.name])
    error = (match.regressor(ours) - theirs).square().mean((0, 2, 3)).detach()
    match.raw_scale.data = torch.log(torch.expm1(error - 1e-5))
    match(student_out.features[pair.student.name], teacher_out.features[pair.teacher.name]).backward()
    assert match.raw_scale.grad.abs().max() < 1e-12
    assert match.regressor[4].weight.grad.abs().max() > 1e-6


def test_a_variance_below_its_floor_is_refused() -> None:
    from kdexport.core.toml import parse

    tables = {"data": {"name": "digits"}, "teacher": {"name": "resnet8"}, "student": {"name": "mobilenetv2"}}
    with pytest.raises(ConfigError, match="initial_variance"):
        parse(Recipe, {**tables, "distiller": {"name": "vid", "initial_variance": 1e-5}}, "a recipe")
