"""What is refused before a run: recipes that cannot be built, and missing weights."""

import pytest

from kdexport.errors import CheckpointError
from training.recipe import load_recipe
from training.shipped_recipes import shipped_names
from training.train import evaluate_teacher, rehearse


def one_recipe_for_each_combination() -> list[str]:
    """The first shipped recipe for each teacher, student and method."""
    names: dict[tuple[str, str, str], str] = {}
    for name in shipped_names():
        recipe = load_recipe(name)
        names.setdefault((recipe.teacher.name, recipe.student.name, recipe.distiller.name), name)
    return list(names.values())


@pytest.mark.parametrize("name", one_recipe_for_each_combination())
def test_every_shipped_recipe_can_be_rehearsed(name: str) -> None:
    rehearse(load_recipe(name))


def test_a_teacher_without_weights_is_not_evaluated() -> None:
    with pytest.raises(CheckpointError) as caught:
        evaluate_teacher(load_recipe("digits"))
    assert str(caught.value) == (
        "The recipe has no file with weights of the teacher resnet8.\nPass --teacher-checkpoint FILE."
    )
