"""What is refused before a run: recipes that cannot be built, and weights that are missing or do not fit."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kdexport.core.digests import sha256_file
from kdexport.errors import CheckpointError, ConfigError, TrainingError
from tests.training.small_runs import arguments, environment, tiny_recipe
from training import train
from training.recipe import load_recipe
from training.shipped_recipes import shipped_names
from training.teachers import TEACHERS
from training.train import distil, evaluate_teacher, make_accelerator, rehearse, train_teacher


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


#: The teachers of these tests are not trained.
ONE_EPOCH = ("train.epochs=1", "distiller.ramp_epochs=0.5", "teacher.plausibility=reported")


def lightning(path: Path, seed: int = 1, classes: int = 3) -> Path:
    """A checkpoint of resnet8 as lightning writes it, with a loss beside the model."""
    torch.manual_seed(seed)
    state: dict[str, Tensor] = TEACHERS.build("resnet8", num_classes=classes, image_size=16).state_dict()
    tensors = {**{f"model.{name}": tensor for name, tensor in state.items()}, "criterion.weight": torch.ones(classes)}
    torch.save({"state_dict": tensors, "epoch": 3, "hyper_parameters": {"root": path}}, path)
    return path


def test_a_run_says_how_a_file_of_weights_was_read(
    tiny_images: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    weights = lightning(tmp_path / "last.ckpt")
    said = (
        f"read {weights}: weights taken from 'state_dict'; not read: 'epoch', 'hyper_parameters'; prefix 'model.' "
        "removed; 1 other tensor not used: 'criterion.weight'\n"
    )
    recipe = tiny_recipe(tiny_images, f"teacher.checkpoint={weights}", *ONE_EPOCH)
    evaluate_teacher(recipe)
    assert said in capfd.readouterr().err
    distil(recipe, tmp_path / "run")
    assert capfd.readouterr().err.count(said) == 1
    assert json.loads((tmp_path / "run" / "inputs.json").read_text())["teacher_sha256"] == sha256_file(weights)


def test_weights_that_do_not_fit_leave_the_run_to_those_that_do(tiny_images: Path, tmp_path: Path) -> None:
    wrong, right, other = (
        lightning(tmp_path / f"{classes}-{seed}.ckpt", seed, classes) for seed, classes in ((1, 1_000), (1, 3), (2, 3))
    )
    # Only a method that reads logits needs a classifier of these classes.
    own = ("distiller.kd_weight=1.0", *ONE_EPOCH)
    with pytest.raises(CheckpointError, match=r"the file's classifier fc\.weight has 1000 outputs, the network 3"):
        distil(tiny_recipe(tiny_images, f"teacher.checkpoint={wrong}", *own), tmp_path / "run")
    distil(tiny_recipe(tiny_images, f"teacher.checkpoint={right}", *own), tmp_path / "run")
    with pytest.raises(ConfigError, match="belongs to a run with another teacher"):
        distil(tiny_recipe(tiny_images, f"teacher.checkpoint={other}", *own), tmp_path / "run")


@pytest.mark.parametrize("name", ["pointer.safetensors", "pointer.pt"])
def test_a_file_that_holds_no_weights_ends_the_command_with_one_error(
    name: str, tiny_images: Path, tmp_path: Path
) -> None:
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 3\n")
    command = arguments(tiny_images, tmp_path / "run", f"teacher.checkpoint={tmp_path / name}")
    done = subprocess.run(
        [sys.executable, "-m", "training", *command], env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "is a pointer of Git LFS, not the weights" in " ".join(done.stderr.split())
    assert "git lfs pull" in done.stderr
    assert "Traceback" not in done.stderr


def test_one_process_can_run_recipes_of_several_precisions(tiny_images: Path) -> None:
    for precision in ("no", "bf16", "no"):
        settings = tiny_recipe(tiny_images, f"train.mixed_precision={precision}").train
        assert make_accelerator(settings).mixed_precision == precision


@pytest.mark.parametrize(("multiplies", "chosen"), [(True, "bf16"), (False, "no")])
def test_auto_is_bf16_only_on_a_gpu_that_multiplies_it_itself(
    multiplies: bool, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Torch counts emulation as support unless it is asked not to.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or multiplies
    )
    assert train._precision("auto") == chosen


def test_a_teacher_that_diverges_names_its_own_learning_rate(tiny_images: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(tiny_images, "teacher.learning_rate=1e30", "teacher.epochs=2", "train.schedule=cosine")
    with pytest.raises(TrainingError, match=r"^teacher resnet8: ") as caught:
        train_teacher(recipe, tmp_path / "teacher")
    assert "teacher.learning_rate" in caught.value.remedy
    assert "train.learning_rate" not in caught.value.remedy
