import json
from pathlib import Path

import pytest

from kdexport.errors import ConfigError
from training.recipe import Recipe, load_recipe
from training.runs.record import claim, claim_input, difference, extensions, recorded_inputs

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


def test_a_damaged_record_is_refused_and_named(tmp_path: Path) -> None:
    (tmp_path / "inputs.json").write_text("[1")
    with pytest.raises(ConfigError, match=r"inputs\.json is not a JSON object"):
        claim_input(tmp_path, "dataset_sha256", NEW, "/data")


def recipe(epochs: int, **changes: object) -> Recipe:
    return load_recipe("digits", {"train": {"epochs": epochs, **changes}})


def test_a_run_is_extended_by_more_epochs_and_by_nothing_else(tmp_path: Path) -> None:
    claim(tmp_path, recipe(20), "student")
    with pytest.raises(ConfigError, match=r"train\.epochs is 20 there and 30 in this run"):
        # It has no state to continue from.
        claim(tmp_path, recipe(30), "student")
    (tmp_path / "resume.safetensors").touch()
    for other in (recipe(19), recipe(30, seed=1), recipe(30, learning_rate=0.01)):
        with pytest.raises(ConfigError, match="belongs to another run"):
            claim(tmp_path, other, "student")
    assert extensions(tmp_path) == ()
    claim(tmp_path, recipe(30), "student")
    claim(tmp_path, recipe(30), "student")
    claim(tmp_path, recipe(45), "student")
    assert extensions(tmp_path) == (20, 30)
    assert difference(tmp_path, recipe(45), "student") == ""
    with pytest.raises(ConfigError, match=r"train\.epochs is 45 there and 20 in this run"):
        claim(tmp_path, recipe(20), "student")
