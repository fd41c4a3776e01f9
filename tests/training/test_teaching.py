"""The input of a teacher in a run: stored with its weights, or decided by the recipe, and never both."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from kdexport.checkpoint import load_tensors, save_tensors
from kdexport.data.preprocessing import Preprocessing
from kdexport.errors import CheckpointError, ConfigError
from tests.training.small_runs import tiny_recipe
from training.recipe import DataSettings, TeacherSettings
from training.runs.handover import Origin
from training.teachers import TEACHERS
from training.teachers.description import TeacherDescription
from training.teaching import teacher_input
from training.train import distil, evaluate_teacher, train_student, train_teacher

OWN = Preprocessing(image_size=16, resize=20, mean=(0.31, 0.42, 0.53), std=(0.11, 0.22, 0.33))
ORIGIN = Origin(dataset_sha256="d" * 64, teacher_sha256="e" * 64)
SHIFTED = ("data.mean=[0.9, 0.1, 0.8]", "data.std=[0.05, 0.9, 0.2]")


def settings(**keys: object) -> TeacherSettings:
    return TeacherSettings.model_validate({"name": "resnet8", **keys})


@pytest.fixture(scope="module")
def weights(tiny_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    train_teacher(tiny_recipe(tiny_images, "teacher.epochs=6", "train.warmup_epochs=0.5"), folder)
    return folder / "model.safetensors"


def with_teacher(images: Path, weights: Path, *more: str) -> Any:
    return tiny_recipe(images, f"teacher.checkpoint={weights}", "train.epochs=2", *more)


def test_the_weights_decide_then_the_recipe_then_the_student() -> None:
    data = DataSettings(name="digits", image_size=24, resize=30, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    stored = teacher_input(settings(), data, OWN, "t.pt")
    assert stored.preprocessing == OWN
    assert str(stored) == "mean 0.31 0.42 0.53, std 0.11 0.22 0.33, 16x16 pixels (stored with t.pt)"
    told = teacher_input(settings(mean=(0.7, 0.8, 0.9), std=(0.2, 0.3, 0.4)), data)
    assert (told.preprocessing.mean, told.preprocessing.std) == ((0.7, 0.8, 0.9), (0.2, 0.3, 0.4))
    assert (told.preprocessing.image_size, told.preprocessing.resize) == (24, 30)
    assert "[teacher] in the recipe" in str(told)
    unknown = teacher_input(settings(), data)
    assert (unknown.preprocessing.mean, unknown.preprocessing.std) == (data.mean, data.std)
    assert "that of the student" in str(unknown)


def test_a_recipe_that_contradicts_the_weights_is_refused_with_both_values() -> None:
    data = DataSettings(name="digits")
    # Rounded in a paper: a quarter of a grey level does not contradict the weights, which decide.
    close = settings(mean=(0.3104, 0.4196, 0.53), std=(0.11, 0.22, 0.3301))
    assert teacher_input(close, data, OWN, "t.pt").preprocessing == OWN
    with pytest.raises(ConfigError) as caught:
        teacher_input(settings(mean=(0.31, 0.42, 0.54), std=OWN.std), data, OWN, "t.pt")
    assert str(caught.value) == (
        "t.pt was trained with mean 0.31 0.42 0.53, but teacher.mean of the recipe is 0.31 0.42 0.54.\n"
        "Remove teacher.mean from the recipe, or set it to that of the weights: --set teacher.mean=[0.31, 0.42, 0.53]"
    )


def test_a_trained_teacher_keeps_its_input_when_the_student_gets_another(
    weights: Path, tiny_images: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    exact = evaluate_teacher(with_teacher(tiny_images, weights))
    assert exact > 0.8
    assert evaluate_teacher(with_teacher(tiny_images, weights, *SHIFTED)) == exact
    assert "teacher resnet8: mean 0.305 0.305 0.305, std 0.36 0.36 0.36" in capfd.readouterr().err
    # The same weights without their description get the input of the student, which ruins them.
    bare = weights.with_name("bare.safetensors")
    save_tensors(bare, load_tensors(weights))
    assert evaluate_teacher(with_teacher(tiny_images, bare)) == exact
    assert evaluate_teacher(with_teacher(tiny_images, bare, *SHIFTED)) < exact


def test_a_teacher_of_another_image_size_gets_its_own_size(weights: Path, tiny_images: Path) -> None:
    # The classes differ in colour, so that a resized image is as good as any.
    assert evaluate_teacher(with_teacher(tiny_images, weights, "data.image_size=24")) > 0.8


def test_a_copied_teacher_of_other_classes_is_refused(weights: Path, tiny_images: Path, tmp_path: Path) -> None:
    copied = tmp_path / "t.safetensors"
    tensors = load_tensors(weights)
    save_tensors(copied, tensors, TeacherDescription(classes=("bee", "ant", "cow")).metadata("resnet8"))
    with pytest.raises(CheckpointError, match="was trained for 3 other classes"):
        evaluate_teacher(with_teacher(tiny_images, copied))


def test_a_contradiction_ends_a_run_before_anything_is_written(
    weights: Path, tiny_images: Path, tmp_path: Path
) -> None:
    wrong = ("teacher.mean=[0.5, 0.5, 0.5]", "teacher.std=[0.25, 0.25, 0.25]")
    with pytest.raises(ConfigError, match=rf"^{re.escape(str(weights))} was trained with mean 0\.305"):
        distil(with_teacher(tiny_images, weights, *wrong), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_teacher_at_chance_level_ends_the_run_before_the_training(
    tiny_images: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    fresh = tmp_path / "fresh.safetensors"
    save_tensors(fresh, TEACHERS.build("resnet8", num_classes=3, image_size=16).state_dict())
    recipe = with_teacher(tiny_images, fresh, "teacher.plausibility=required")
    with pytest.raises(CheckpointError) as caught:
        train_student(recipe, tmp_path / "run", ORIGIN)
    assert re.search(
        r"teacher resnet8: top-1 \S+% of 18 validation images, chance level 33\.33%", capfd.readouterr().err
    )
    message = f"The teacher resnet8 with the weights {fresh} cannot teach this data set: it is not better than chance"
    assert caught.value.message.startswith(message)
    assert "in the order of the classes: ant, bee, cow." in caught.value.remedy
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    # A baseline does not read its teacher, and a user may insist.
    for name, override in (("plain", "distiller.name=plain"), ("insists", "teacher.plausibility=reported")):
        more = ("distiller.ramp_epochs=0.0", "teacher.plausibility=required", override)
        train_student(with_teacher(tiny_images, fresh, *more), tmp_path / name, ORIGIN)
        assert (tmp_path / name / "student").is_dir()


def test_a_teacher_with_permuted_classes_ends_the_run(weights: Path, tiny_images: Path, tmp_path: Path) -> None:
    tensors, permuted = load_tensors(weights), tmp_path / "permuted.safetensors"
    for name in ("fc.weight", "fc.bias"):
        tensors[name] = tensors[name][[1, 2, 0]]
    save_tensors(permuted, tensors, TeacherDescription(preprocessing=None).metadata("resnet8"))
    recipe = with_teacher(tiny_images, permuted, "teacher.plausibility=required")
    with pytest.raises(CheckpointError, match=r"in another order: .* output 0 is 'bee', output 1 is 'cow'"):
        train_student(recipe, tmp_path / "run", ORIGIN)
    train_student(with_teacher(tiny_images, weights, "teacher.plausibility=required"), tmp_path / "good", ORIGIN)
