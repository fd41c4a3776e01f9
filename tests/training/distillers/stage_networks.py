"""Students and teachers of which only the shapes are needed, and distillers between them."""

from functools import cache
from typing import Any, cast

import torch

from kdexport.students import STUDENTS, Classifier, Student, Tapped
from tests.training.small_distillation import hostile, random_tapped, settings_of
from training.distillers import DISTILLERS
from training.distillers.distiller import Distiller, StepContext
from training.teachers import TEACHERS, Teacher

COUNT, CLASSES, SIZE = 4, 5, 21


@cache
def shapes_of(kind: str, name: str, size: int) -> Any:
    """A network on the meta device: it has taps, and its forward passes compute shapes only."""
    registry: Any = STUDENTS if kind == "student" else TEACHERS
    with torch.device("meta"):
        return registry.build(name, num_classes=CLASSES, image_size=size).eval()


@cache
def output_shapes(kind: str, name: str, size: int) -> Tapped:
    with torch.no_grad():
        return cast(Tapped, shapes_of(kind, name, size).tapped(torch.zeros(2, 3, size, size, device="meta")))


def context(epoch: float = 200.0, count: int = COUNT) -> StepContext:
    return StepContext(
        epoch=torch.tensor(epoch, dtype=torch.float64),
        orders=torch.zeros(0, 1, dtype=torch.int64),
        labels=torch.arange(count) * 2 % CLASSES,
        samples=torch.arange(count),
    )


def build(name: str, student: Student, teacher: Teacher, **changes: object) -> Distiller:
    """A distiller in float64, with batch norms that are not identities and parameters unlike fresh ones."""
    torch.manual_seed(2)
    distiller = DISTILLERS.build(name, settings=settings_of(name, **changes), student=student, teacher=teacher)
    hostile(distiller, 5)
    return distiller.double()


def loss_of(distiller: Distiller, student: Tapped, teacher: Tapped) -> float:
    (value,) = distiller(student, {}, teacher, context()).values()
    return float(value.detach())


def small(student: str = "mobilenetv2", teacher: str = "resnet8", size: int = SIZE) -> tuple[Student, Teacher]:
    return shapes_of("student", student, size), shapes_of("teacher", teacher, size)


def random_outputs(student: Classifier, teacher: Classifier) -> tuple[Tapped, Tapped]:
    return random_tapped(student, COUNT, 1), random_tapped(teacher, COUNT, 2)


def random_teacher(teacher: Classifier) -> Teacher:
    """A teacher of the same kind as ``teacher`` with real weights, and with statistics unlike fresh ones."""
    torch.manual_seed(6)
    name = "vgg8" if type(teacher).__name__ == "SmallVgg" else "resnet8"
    real = TEACHERS.build(name, num_classes=CLASSES, image_size=teacher.image_size).eval()
    hostile(real, 3)
    return real
