"""The classes and the preprocessing that are stored with the weights of a teacher."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from kdexport.checkpoint import load_tensors, save_tensors
from kdexport.data.preprocessing import Preprocessing
from kdexport.errors import CheckpointError
from tests.training.small_runs import CLASSES, tiny_recipe
from training.teachers.description import TeacherDescription, described_teacher
from training.train import train_teacher

OWN = Preprocessing(image_size=16, resize=20, mean=(0.31, 0.42, 0.53), std=(0.11, 0.22, 0.33))


@pytest.fixture(scope="module")
def weights(tiny_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    train_teacher(tiny_recipe(tiny_images, "teacher.epochs=1"), folder)
    return folder / "model.safetensors"


def test_a_description_travels_inside_the_file_of_the_weights(tmp_path: Path) -> None:
    path = tmp_path / "anything.safetensors"
    about = TeacherDescription(classes=("b", "a"), preprocessing=OWN)
    save_tensors(path, {"w": torch.arange(3.0)}, about.metadata("resnet8"))
    assert described_teacher(path) == about
    assert torch.equal(load_tensors(path)["w"], torch.arange(3.0))


def test_what_a_file_does_not_tell_is_not_known(tmp_path: Path) -> None:
    plain, pickled = tmp_path / "plain.safetensors", tmp_path / "t.pt"
    save_tensors(plain, {"w": torch.ones(1)})
    torch.save({"w": torch.ones(1)}, pickled)
    # A file of another program may have metadata too.
    other = tmp_path / "other.safetensors"
    save_tensors(other, {"w": torch.ones(1)}, {"format": "pt"})
    for path in (plain, pickled, other, tmp_path / "absent.safetensors"):
        assert described_teacher(path) == TeacherDescription()


def test_a_teacher_json_of_an_earlier_version_tells_the_classes_only(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_tensors(path, {"w": torch.ones(1)})
    (tmp_path / "teacher.json").write_text(json.dumps({"teacher": "resnet8", "classes": ["x", "y"], "metrics": {}}))
    assert described_teacher(path) == TeacherDescription(classes=("x", "y"))


@pytest.mark.parametrize("text", ["[]", "{}", '{"classes": 3}', '{"classes": null, "preprocessing": {"mean": 1}}'])
def test_a_damaged_description_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    save_tensors(path, {"w": torch.ones(1)}, {"kdexport.teacher": text})
    with pytest.raises(CheckpointError, match=r"metadata of .*t\.safetensors cannot be read"):
        described_teacher(path)


def test_the_file_and_the_page_beside_it_say_the_same(weights: Path) -> None:
    about = described_teacher(weights)
    assert about.classes == CLASSES
    assert about.preprocessing is not None
    assert about.preprocessing.mean == (0.305, 0.305, 0.305)
    beside = json.loads((weights.parent / "teacher.json").read_text())
    assert Preprocessing.from_json(beside["preprocessing"]) == about.preprocessing
    with safe_open(weights, framework="np") as file:
        assert list(file.metadata()) == ["kdexport.teacher"]
