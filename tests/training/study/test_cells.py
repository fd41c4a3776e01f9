"""The cells of a table: planned, run and read."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from kdexport.data.datasets import dataset_digest
from kdexport.errors import ConfigError
from tests.training.study.planned_cells import PAIR, cells, finish, finished
from training.runs.record import claim_input
from training.study.cells import plan, read, require_one_data_set, run_cell, teacher_directory


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


def test_a_finished_cell_is_not_reported_for_other_data_or_another_teacher(tmp_path: Path, tiny_images: Path) -> None:
    weights = tmp_path / "teacher.pt"
    weights.write_bytes(b"new weights")
    data = {"data": {"name": f"folder:{tiny_images}"}, "teacher": {"checkpoint": str(weights)}}
    (cell,) = plan([f"{PAIR}/kd"], (0,), tmp_path, data)
    finish(cell, 0.5)

    def never(*_: object) -> None:
        raise AssertionError

    run_cell(cell, tmp_path, never)
    claim_input(cell.directory, "dataset_sha256", "a" * 64, "elsewhere")
    with pytest.raises(ConfigError, match=f"{cell.directory} belongs to a run with another data set: .*{tiny_images}"):
        run_cell(cell, tmp_path, never)
    own = dataset_digest(cell.recipe.data.spec(), tmp_path / "memory")
    (cell.directory / "inputs.json").write_text(json.dumps({"dataset_sha256": own, "teacher_sha256": "b" * 64}))
    with pytest.raises(ConfigError, match=f"another teacher: its sha256 is bbbbbbbbbbbb.*{weights}"):
        run_cell(cell, tmp_path, never)
    right = {"dataset_sha256": own, "teacher_sha256": hashlib.sha256(b"new weights").hexdigest()}
    (cell.directory / "inputs.json").write_text(json.dumps(right))
    run_cell(cell, tmp_path, never)


def test_cells_of_one_table_are_of_one_data_set(tmp_path: Path) -> None:
    first, second = finished(tmp_path)[:2]
    require_one_data_set([first, second])
    claim_input(first.directory, "dataset_sha256", "a" * 64, "here")
    claim_input(second.directory, "dataset_sha256", "a" * 64, "there")
    require_one_data_set([first, second])
    (second.directory / "inputs.json").write_text(json.dumps({"dataset_sha256": "b" * 64}))
    with pytest.raises(ConfigError) as caught:
        require_one_data_set([first, second])
    assert caught.value.message == (
        f"The runs {first.directory} and {second.directory} are of different data sets: sha256 aaaaaaaaaaaa... and "
        "bbbbbbbbbbbb..."
    )
