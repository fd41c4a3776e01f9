"""A recipe is rehearsed before its run: what can be refused without data and weights is refused then."""

import pytest

from training.recipe import load_recipe
from training.shipped_recipes import shipped_names
from training.train import rehearse


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
