import json
from pathlib import Path

import pytest

from kdexport.errors import ConfigError
from training.recipe import Recipe, load_recipe
from training.runs.record import (
    claim,
    claim_input,
    claimed_if_trained,
    difference,
    extensions,
    read_environment,
    recorded_inputs,
)
from training.train import claim_start

OLD, NEW = "a1" * 32, "b2" * 32


def student(folder: Path, **provenance: object) -> None:
    folder.mkdir(parents=True)
    (folder / "student.json").write_text(json.dumps({"provenance": provenance}))


@pytest.mark.parametrize(("key", "noun"), [("dataset_sha256", "data set"), ("teacher_sha256", "teacher")])
def test_a_folder_keeps_its_inputs_and_refuses_others_with_both_digests(tmp_path: Path, key: str, noun: str) -> None:
    run = tmp_path / "run"
    claim_input(run, key, OLD, "/data/old")
    claim_input(run, key, OLD, "/moved/old")
    record = (run / "inputs.json").read_bytes()
    with pytest.raises(ConfigError) as caught:
        claim_input(run, key, NEW, "/data/new")
    assert caught.value.message == (
        f"{run} belongs to a run with another {noun}: its sha256 is a1a1a1a1a1a1... there and b2b2b2b2b2b2... in this "
        "run (/data/new)."
    )
    assert caught.value.remedy == (
        f"Pass another --out (for a table, another --runs), remove the folder, or pass the {noun} of that run."
    )
    assert caught.value.exit_code == 2
    assert (run / "inputs.json").read_bytes() == record


def test_a_run_of_an_earlier_version_gets_its_inputs_recorded(tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_text("{}")
    assert recorded_inputs(tmp_path) == {}
    claim_input(tmp_path, "dataset_sha256", OLD, "/data")
    assert recorded_inputs(tmp_path) == {"dataset_sha256": OLD}
    claim_input(tmp_path, "teacher_sha256", NEW, "/teacher")
    assert json.loads((tmp_path / "inputs.json").read_text()) == {"dataset_sha256": OLD, "teacher_sha256": NEW}


@pytest.mark.parametrize("folder", ["student", "best"])
def test_the_student_of_an_earlier_version_tells_the_inputs_of_its_run(tmp_path: Path, folder: str) -> None:
    student(tmp_path / folder, dataset_sha256=OLD, teacher_sha256="", seed=3)
    assert recorded_inputs(tmp_path) == {"dataset_sha256": OLD}
    with pytest.raises(ConfigError, match="another data set"):
        claim_input(tmp_path, "dataset_sha256", NEW, "/data")
    assert not (tmp_path / "inputs.json").exists()
    claim_input(tmp_path, "teacher_sha256", NEW, "/teacher")
    assert json.loads((tmp_path / "inputs.json").read_text()) == {"dataset_sha256": OLD, "teacher_sha256": NEW}


@pytest.mark.parametrize("started", [False, True])
def test_a_command_that_trained_nothing_leaves_the_folder_to_the_corrected_one(tmp_path: Path, started: bool) -> None:
    if started:
        claim(tmp_path, recipe(20), "student")
        (tmp_path / "resume.safetensors").touch()

    def failing(chosen: Recipe) -> None:
        with claimed_if_trained(tmp_path, writes=True):
            claim(tmp_path, chosen, "student")
            claim_input(tmp_path, "dataset_sha256", OLD, "/data")
            raise KeyboardInterrupt

    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(KeyboardInterrupt):
        failing(recipe(30))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    claim(tmp_path, recipe(30), "student")


def test_a_command_that_trained_something_keeps_its_folder(tmp_path: Path) -> None:
    def training() -> None:
        with claimed_if_trained(tmp_path, writes=True):
            claim(tmp_path, recipe(20), "student")
            (tmp_path / "teacher").mkdir()
            (tmp_path / "teacher" / "model.safetensors").touch()
            raise ValueError("late")

    with pytest.raises(ValueError, match="late"):
        training()
    with pytest.raises(ConfigError, match=r"train\.seed is 0 there and 1") as caught:
        claim(tmp_path, recipe(20, seed=1), "student")
    assert f"--teacher-checkpoint {tmp_path / 'teacher' / 'model.safetensors'}" in caught.value.remedy


def test_a_damaged_record_is_refused_and_named(tmp_path: Path) -> None:
    (tmp_path / "inputs.json").write_text("[1")
    with pytest.raises(ConfigError, match=r"inputs\.json is not a JSON object"):
        claim_input(tmp_path, "dataset_sha256", NEW, "/data")


@pytest.mark.parametrize("content", ["", "[]", "3", "{}", '{"recipe": 3}', '{"recipe": {"train": 3}}', "[[1]]", "\0\0"])
def test_any_damaged_recipe_of_a_run_is_an_error_that_names_it(tmp_path: Path, content: str) -> None:
    (tmp_path / "resume.safetensors").touch()
    (tmp_path / "recipe.json").write_text(content)
    with pytest.raises(ConfigError, match=r"belongs to another run|is not a JSON object"):
        claim(tmp_path, recipe(20), "student")
    (tmp_path / "environment.json").write_text(content)
    if content not in ("[]", "{}"):
        with pytest.raises(ConfigError, match=r"environment\.json is not a JSON list"):
            read_environment(tmp_path)


def recipe(epochs: int, **changes: object) -> Recipe:
    return load_recipe("digits", {"train": {"epochs": epochs, **changes}})


def test_a_run_is_extended_by_more_epochs_and_by_nothing_else(tmp_path: Path) -> None:
    claim(tmp_path, recipe(20), "student")
    with pytest.raises(ConfigError, match=r"train\.epochs is 20 there and 30 in this run"):
        # It has no state to continue from.
        claim(tmp_path, recipe(30), "student")
    (tmp_path / "resume.safetensors").touch()
    others = {
        "train.epochs is 20 there and 19": recipe(19),
        "train.seed is 0 there and 1": recipe(30, seed=1),
        # Not the epochs, which may grow.
        r"train.learning_rate is 0\.05 there and 0\.01": recipe(30, learning_rate=0.01),
    }
    for difference_, other in others.items():
        with pytest.raises(ConfigError, match=f"belongs to another run: {difference_}"):
            claim(tmp_path, other, "student")
    assert extensions(tmp_path) == ()
    claim(tmp_path, recipe(30), "student")
    claim(tmp_path, recipe(30), "student")
    claim(tmp_path, recipe(45), "student")
    assert extensions(tmp_path) == (20, 30)
    assert difference(tmp_path, recipe(45), "student") == ""
    with pytest.raises(ConfigError, match=r"train\.epochs is 45 there and 20 in this run"):
        claim(tmp_path, recipe(20), "student")


def test_a_teacher_that_is_fine_tuned_keeps_the_file_that_it_started_from(tmp_path: Path) -> None:
    file, run = tmp_path / "start.pt", tmp_path / "run"
    file.write_bytes(b"one")
    teacher = {"name": "torchvision:resnet18", "checkpoint": str(file)}
    claim_start(run, load_recipe("digits", {"teacher": teacher}))
    claim_start(run, load_recipe("digits", {"teacher": {"name": "torchvision:resnet18"}}))
    file.write_bytes(b"two")
    with pytest.raises(ConfigError, match="belongs to a run with another teacher"):
        claim_start(run, load_recipe("digits", {"teacher": teacher}))
    with pytest.raises(ConfigError, match=r"resnet8 is trained from fresh weights, but teacher\.checkpoint is .*start"):
        claim_start(run, load_recipe("digits", {"teacher": {"checkpoint": str(file)}}))


def test_a_run_folder_whose_path_is_not_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"run\\udce9' is not text in UTF-8") as caught:
        claim(tmp_path / "run\udce9", recipe(20), "student")
    assert caught.value.remedy == "Pass another --out."
    assert not list(tmp_path.iterdir())
