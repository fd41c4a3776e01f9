"""Refuses before hours of training what could not be folded after them."""

import torch

from kdexport.reparam.blocks import attach_branches
from kdexport.students import STUDENTS
from training.distillers import DISTILLERS
from training.recipe import Recipe
from training.teachers import TEACHERS


def rehearse(recipe: Recipe) -> None:
    """Build the networks of ``recipe`` and attach its branches, without data or weights.

    Raises ``UnknownNameError``, ``ConfigError`` or ``ReparamError`` as the training itself would, minutes later.
    """
    DISTILLERS.check(recipe.distiller.name)
    size = recipe.data.image_size
    # Shapes are all that is asked of a teacher here, and a large one takes seconds to initialise.
    with torch.device("meta"):
        teacher = TEACHERS.build(recipe.teacher.name, num_classes=2, image_size=size)
    student = STUDENTS.build(recipe.student.name, num_classes=2, image_size=size)
    distiller = DISTILLERS.build(recipe.distiller.name, settings=recipe.distiller, student=student, teacher=teacher)
    spec = type(distiller).branch_spec(recipe.distiller, student, teacher)
    if spec is not None:
        attach_branches(student, spec)
