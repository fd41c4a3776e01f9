"""The cells of a table: planned, run and read."""

from pathlib import Path
from typing import Any

import pytest

from kdexport.errors import ConfigError
from tests.training.study.planned_cells import PAIR, cells, finished
from training.study.cells import plan, read, run_cell, teacher_directory


def test_cells_are_planned_seed_by_seed_each_in_a_folder_of_its_own(tmp_path: Path) -> None:
    planned = cells(tmp_path)
    assert [(cell.method, cell.seed) for cell in planned] == [("plain", 0), ("kd", 0), ("plain", 1), ("kd", 1)]
    assert [cell.recipe.train.seed for cell in planned] == [0, 0, 1, 1]
    assert [cell.recipe.train.epochs for cell in planned] == [3] * 4
    assert len({cell.directory for cell in planned}) == 4
    assert planned[3].directory == tmp_path / PAIR / "kd" / "seed1"


def test_a_pattern_takes_all_that_match_it_and_none_is_an_error(tmp_path: Path) -> None:
    assert len(plan(["cifar100/*/*"], [0], tmp_path, {"distiller": {}})) == 6 * 14
    with pytest.raises(ConfigError, match=r"No recipe matches 'cifar/\*'"):
        plan(["cifar/*"], [0], tmp_path, {})
    with pytest.raises(ConfigError, match=rf"^--recipes selects {PAIR}/kd twice\."):
        plan([f"{PAIR}/*", f"{PAIR}/kd"], [0], tmp_path, {})


def test_cells_share_a_teacher_whatever_their_method_and_seed(tmp_path: Path) -> None:
    folders = {teacher_directory(cell, tmp_path) for cell in cells(tmp_path)}
    assert len(folders) == 1
    # Its own length and rate are keys of [teacher]; those of the student do not reach it.
    assert {teacher_directory(cell, tmp_path) for cell in cells(tmp_path, epochs=7, learning_rate=0.3)} == folders
    assert folders.pop().parent == tmp_path / "teachers"
    others = [cells(tmp_path, batch_size=32)[0], plan(["cifar100/vgg13-mobilenetv2/kd"], [0], tmp_path, {})[0]]
    assert len({teacher_directory(cell, tmp_path) for cell in [*others, cells(tmp_path)[0]]}) == 3


def test_numbers_of_another_recipe_are_never_shown(tmp_path: Path) -> None:
    finished(tmp_path)
    for changed, change in (
        (cells(tmp_path, learning_rate=0.02), r"train\.learning_rate is 0\.01 there and 0\.02"),
        (cells(tmp_path, nesterov=True), r"train\.nesterov is False there and True"),
    ):
        with pytest.raises(
            ConfigError,
            match=f"belongs to another run: {change} in this run",
        ):
            read(changed[0])


def test_errors_of_the_machine_or_the_call_stop_the_table(tmp_path: Path) -> None:
    def absent(recipe: Any, directory: Path, teacher: Path) -> None:
        raise ConfigError("There is no data.", remedy="Pass --data.")

    with pytest.raises(ConfigError, match="no data"):
        run_cell(cells(tmp_path)[0], tmp_path, absent)
    assert read(cells(tmp_path)[0]).state == "not run"
