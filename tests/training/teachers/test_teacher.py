"""Weights of teachers from public checkpoints."""

import argparse
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kdexport.errors import CheckpointError
from tests.training.teachers.described_teachers import SHAPES, built
from training.teachers import Teacher
from training.teachers.teacher import load_teacher_weights


def checkpoint(name: str, num_classes: int = 100, prefix: str = "") -> dict[str, Tensor]:
    """A state_dict in the public names, made from the description alone."""
    generator = torch.Generator().manual_seed(2)
    return {
        prefix + key: torch.rand(shape, generator=generator) if shape else torch.tensor(1_234)
        for key, shape in SHAPES[name](num_classes).items()
    }


def holds(teacher: Teacher, tensors: dict[str, Tensor]) -> bool:
    own = teacher.state_dict()
    return own.keys() == tensors.keys() and all(torch.equal(own[key], value) for key, value in tensors.items())


@pytest.mark.parametrize("name", SHAPES)
def test_a_public_checkpoint_loads_to_the_last_tensor(name: str, tmp_path: Path) -> None:
    tensors, path = checkpoint(name), tmp_path / "ckpt_epoch_240.pth"
    # As the public training scripts write it.
    extra = {"epoch": 240, "best_acc": torch.tensor(75.61), "optimizer": {"state": {}, "param_groups": [{"lr": 5e-4}]}}
    torch.save({**extra, "model": tensors}, path)
    teacher = built(name, 32)
    load_teacher_weights(teacher, path)
    assert holds(teacher, tensors)


@pytest.mark.parametrize("key", ["block2.layer.0.convShortcut.weight", "bn1.running_var"])
def test_one_tensor_too_few_or_too_many_is_refused(key: str, tmp_path: Path) -> None:
    tensors, path = checkpoint("wrn40_2"), tmp_path / "odd.pth"
    value = tensors.pop(key)
    torch.save({"model": tensors}, path)
    with pytest.raises(CheckpointError, match=f"1 tensor missing: '{key}'"):
        load_teacher_weights(built("wrn40_2", 32), path)
    torch.save({"model": {**tensors, key: value, f"{key}.more": value}}, path)
    with pytest.raises(CheckpointError, match=f"1 tensor unknown: '{key}.more'"):
        load_teacher_weights(built("wrn40_2", 32), path)


def test_the_prefix_of_a_parallel_wrapper_is_taken_off_when_all_names_have_it(tmp_path: Path) -> None:
    path, wrapped = tmp_path / "parallel.pth", checkpoint("vgg8", prefix="module.")
    torch.save({"model": wrapped}, path)
    teacher = built("vgg8", 32)
    notes = load_teacher_weights(teacher, path)
    assert holds(teacher, checkpoint("vgg8"))
    assert notes == ("weights taken from 'model'", "prefix 'module.' removed")
    wrapped["classifier.bias"] = wrapped.pop("module.classifier.bias")
    torch.save({"model": wrapped}, path)
    with pytest.raises(CheckpointError, match=r"'classifier\.bias'"):
        load_teacher_weights(built("vgg8", 32), path)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_checkpoint_with_training_options_loads(legacy: bool, tmp_path: Path) -> None:
    tensors, path = checkpoint("vgg8"), tmp_path / "it's a vgg8 \u00e9 last.pth"
    options = argparse.Namespace(epochs=240, lr_decay_epochs=[150, 180], root=tmp_path, nested=argparse.Namespace(a=1))
    torch.save({"opt": options, "model": tensors}, path, _use_new_zipfile_serialization=not legacy)
    teacher = built("vgg8", 32)
    assert load_teacher_weights(teacher, path) == ("weights taken from 'model'", "not read: 'opt'")
    assert holds(teacher, tensors)


def test_a_folder_is_refused_with_the_file_in_it(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(CheckpointError, match="is a folder, not a file of weights") as caught:
        load_teacher_weights(built("vgg8", 32), tmp_path)
    assert str(tmp_path / "model.safetensors") in caught.value.remedy
