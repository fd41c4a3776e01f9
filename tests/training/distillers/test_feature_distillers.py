"""What holds for every method that compares features or logits: it takes every pair of networks and compiles."""

import copy
from typing import Any

import pytest
import torch

from tests.training.distillers.stage_networks import (
    build,
    context,
    loss_of,
    output_shapes,
    random_outputs,
    random_teacher,
    small,
)
from tests.training.small_distillation import settings_of
from training.distillers import DISTILLERS
from training.distillers.distiller import StepContext

METHODS = ("at", "dist", "dkd", "norm", "ofd", "reviewkd", "vid")
CIFAR_PAIRS = (
    ("resnet32x4", "shufflenetv1"),
    ("wrn40_2", "shufflenetv1"),
    ("vgg13", "mobilenetv2"),
    ("resnet50", "mobilenetv2"),
    ("resnet32x4", "shufflenetv2"),
    ("resnet56", "mobilenetv2"),
)
LARGE_STUDENTS = ("mobilenetv2", "mobilenetv3", "resnet18", "shufflenetv1", "shufflenetv2")
PAIRS = [
    *((*pair, 32) for pair in CIFAR_PAIRS),
    *((*pair, 45) for pair in CIFAR_PAIRS[:3]),
    *(("swin_t", student, 224) for student in LARGE_STUDENTS),
]


def _moved(value: Any) -> Any:
    return None if value is None else value.to("meta")


@pytest.mark.parametrize(("teacher", "student", "size"), PAIRS)
def test_every_method_takes_every_pair(teacher: str, student: str, size: int) -> None:
    ours, theirs = small(student, teacher, size)
    student_out, teacher_out = output_shapes("student", student, size), output_shapes("teacher", teacher, size)
    given = context(count=2)
    moved = StepContext(**{key: _moved(getattr(given, key)) for key in StepContext.__slots__})
    for name in METHODS:
        with torch.device("meta"):
            distiller = DISTILLERS.build(name, settings=settings_of(name), student=ours, teacher=theirs)
        assert {key: value.shape for key, value in distiller(student_out, {}, teacher_out, moved).items()} == {name: ()}


@pytest.mark.parametrize("name", ["ofd", "reviewkd"])
def test_a_method_compiles_into_one_graph(name: str) -> None:
    student, teacher = small("shufflenetv2", "vgg8")
    distiller = build(name, student, random_teacher(teacher) if name == "ofd" else teacher)
    student_out, teacher_out = random_outputs(student, teacher)
    torch._dynamo.reset()
    compiled = torch.compile(copy.deepcopy(distiller), backend="eager", fullgraph=True)
    (value,) = compiled(student_out, {}, teacher_out, context()).values()
    assert value.item() == pytest.approx(loss_of(distiller, student_out, teacher_out), rel=1e-12)
