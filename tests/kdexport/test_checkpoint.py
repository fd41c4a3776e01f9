import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kdexport.checkpoint import (
    StudentSpec,
    build_student,
    load_strictly,
    load_student,
    load_tensors,
    open_checkpoint,
    save_checkpoint,
)
from kdexport.data.preprocessing import Preprocessing
from kdexport.errors import CheckpointError, UnknownNameError
from kdexport.reparam.spec import BranchSpec
from tests.kdexport.hostile_values import noise, randomize

PREPROCESSING = Preprocessing(image_size=32, resize=36, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.1))


def spec(branches: BranchSpec | None = None, classes: int = 5) -> StudentSpec:
    return StudentSpec(
        student="mobilenetv2",
        classes=tuple(f"class {i} é" for i in range(classes)),
        preprocessing=PREPROCESSING,
        branches=branches,
        provenance={"seed": 3, "metrics": {"top1": 0.625}},
    )


def write(directory: Path, description: StudentSpec) -> torch.nn.Module:
    student = randomize(build_student(description)).eval()
    save_checkpoint(directory, student, description)
    return student


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A whole checkpoint of a plain student with five classes."""
    write(tmp_path / "student", spec())
    return tmp_path / "student"


def describe(checkpoint: Path, **changes: Any) -> None:
    path = checkpoint / "student.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def reweigh(checkpoint: Path, changes: dict[str, torch.Tensor | None]) -> None:
    path = checkpoint / "model.safetensors"
    tensors: dict[str, Any] = {**load_file(path), **changes}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)


@pytest.mark.parametrize(
    "branches",
    [
        None,
        BranchSpec(placement="R1", num_branches=3),
        BranchSpec(placement="R2", num_branches=2, adapter_channels=24),
    ],
    ids=["plain", "R1", "R2"],
)
def test_a_student_survives_the_round_trip(branches: BranchSpec | None, tmp_path: Path) -> None:
    written = write(tmp_path, spec(branches))
    trained = open_checkpoint(tmp_path)
    assert trained.spec == spec(branches)
    assert trained.spec.branches == branches
    read = load_student(trained)
    assert not any(module.training for module in read.modules())
    assert list(read.state_dict()) == list(written.state_dict())
    x = noise(3, 3, 32, 32).float()
    with torch.no_grad():
        assert torch.equal(read(x), written(x))


def test_the_weights_are_named_by_the_sha256_of_their_file(checkpoint: Path) -> None:
    trained = open_checkpoint(checkpoint)
    data = (checkpoint / "model.safetensors").read_bytes()
    assert trained.weights_sha256 == hashlib.sha256(data).hexdigest()


def test_nothing_pickled_is_written(checkpoint: Path) -> None:
    assert sorted(path.name for path in checkpoint.iterdir()) == ["model.safetensors", "student.json"]


@pytest.mark.parametrize("missing", ["student.json", "model.safetensors"])
def test_a_missing_file_is_named(checkpoint: Path, missing: str) -> None:
    (checkpoint / missing).unlink()
    with pytest.raises(CheckpointError, match=f"is not a student checkpoint: it has no {missing}"):
        open_checkpoint(checkpoint)


def test_a_missing_folder_and_a_file_in_its_place_are_errors(tmp_path: Path, checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere is not a student checkpoint"):
        open_checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not a student checkpoint"):
        open_checkpoint(checkpoint / "model.safetensors")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"student"', "{}", '{"schema_version": 1}', "\x00\x01"])
def test_a_foreign_description_is_named(checkpoint: Path, text: str) -> None:
    (checkpoint / "student.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"student\.json does not describe a student"):
        open_checkpoint(checkpoint)


def test_a_description_that_is_no_text_is_named(checkpoint: Path) -> None:
    (checkpoint / "student.json").write_bytes(b"\xff\xfe\x80\x80")
    with pytest.raises(CheckpointError, match=r"student\.json does not describe a student"):
        open_checkpoint(checkpoint)


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_another_schema_version_is_refused_with_both_versions(checkpoint: Path, version: Any) -> None:
    describe(checkpoint, schema_version=version)
    with pytest.raises(CheckpointError, match=f"schema_version is {version!r}, this version reads 1"):
        open_checkpoint(checkpoint)


@pytest.mark.parametrize(
    "change",
    [
        {"classes": "abcde"},
        {"classes": []},
        {"classes": None},
        {"preprocessing": None},
        {"preprocessing": {"image_size": 32}},
        {"branches": {"placement": "R3", "num_branches": 2, "adapter_channels": 8}},
        {"branches": {"placement": "r1", "num_branches": 2}},
        {"branches": {"placement": "R1", "num_branches": "2"}},
        {"branches": {"placement": "R1"}},
        {"branches": {"placement": "R1", "num_branches": 2, "colour": "red"}},
        {"branches": []},
        {"provenance": None},
    ],
    ids=str,
)
def test_a_description_with_a_wrong_value_is_refused(checkpoint: Path, change: dict[str, Any]) -> None:
    describe(checkpoint, **change)
    with pytest.raises(CheckpointError, match=r"student\.json does not describe a student"):
        open_checkpoint(checkpoint)


@pytest.mark.parametrize("key", ["student", "classes", "preprocessing", "branches", "provenance", "schema_version"])
def test_a_description_without_a_key_is_refused_by_the_key(checkpoint: Path, key: str) -> None:
    path = checkpoint / "student.json"
    content = json.loads(path.read_text())
    del content[key]
    path.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=f"KeyError: '{key}'"):
        open_checkpoint(checkpoint)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"preprocessing": PREPROCESSING.to_json() | {"antialias": True}},
         "unknown key 'antialias' of preprocessing; known are image_size, resize, mean, std, geometry, interpolation"),
        ({"preprocessing": PREPROCESSING.to_json() | {"image_size": 32.0}}, "image_size is 32.0, not a number"),
        ({"preprocessing": PREPROCESSING.to_json() | {"resize": "36"}}, "resize is '36', not a number of pixels"),
        ({"preprocessing": PREPROCESSING.to_json() | {"mean": "543"}}, "mean is '543', not three numbers, one per"),
        ({"colour": "red"}, "unknown key 'colour'; known: schema_version, student, classes"),
    ],
    ids=["antialias", "a fraction of a pixel", "text", "digits", "outside"],
)  # fmt: skip
def test_an_unknown_key_and_a_wrong_type_are_refused_like_in_every_toml_file(
    checkpoint: Path, change: dict[str, Any], words: str
) -> None:
    describe(checkpoint, **change)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(checkpoint)
    assert words in caught.value.message


def test_an_unknown_student_points_to_the_nearest(checkpoint: Path) -> None:
    describe(checkpoint, student="mobilnetv2")
    with pytest.raises(UnknownNameError, match="no student named 'mobilnetv2'") as caught:
        load_student(open_checkpoint(checkpoint))
    assert "Did you mean mobilenetv2" in caught.value.remedy


@pytest.mark.parametrize("kept", [0, 4, 100, 0.5, 0.999])
def test_truncated_weights_are_an_error_that_names_the_file(checkpoint: Path, kept: float) -> None:
    path = checkpoint / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(kept if kept >= 1 else kept * len(data))])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is truncated or not a safetensors file"):
        load_student(open_checkpoint(checkpoint))


def test_a_pickle_in_place_of_the_weights_is_not_loaded(checkpoint: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (checkpoint / "executed",))

    torch.save({"conv1.0.weight": Trap()}, checkpoint / "model.safetensors")
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        load_student(open_checkpoint(checkpoint))
    assert not (checkpoint / "executed").exists()


def test_missing_weights_are_an_error_that_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"none\.safetensors"):
        load_tensors(tmp_path / "none.safetensors")


def load_error(checkpoint: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_student(open_checkpoint(checkpoint))
    assert "model.safetensors" in caught.value.message
    return caught.value.message


def test_a_missing_tensor_is_named(checkpoint: Path) -> None:
    reweigh(checkpoint, {"conv2.1.running_var": None})
    assert "1 tensors missing, first 'conv2.1.running_var'" in load_error(checkpoint)


def test_a_foreign_tensor_is_named(checkpoint: Path) -> None:
    reweigh(checkpoint, {"distiller.bridge.weight": torch.ones(3)})
    assert "1 tensors unknown, first 'distiller.bridge.weight'" in load_error(checkpoint)


def test_a_renamed_tensor_points_to_the_nearest(checkpoint: Path) -> None:
    bias = load_file(checkpoint / "model.safetensors")["classifier.0.bias"]
    reweigh(checkpoint, {"classifier.0.bias": None, "classifier.bias": bias})
    message = load_error(checkpoint)
    assert "1 tensors missing, first 'classifier.0.bias'" in message
    assert "1 tensors unknown, first 'classifier.bias'" in message
    assert "Did you mean classifier.0.bias" in message


def test_a_tensor_of_another_shape_is_named_with_both_shapes(checkpoint: Path) -> None:
    # One value would broadcast over sixteen.
    reweigh(checkpoint, {"conv1.1.weight": torch.ones(1)})
    assert "1 tensors of another shape or type, first 'conv1.1.weight is (1,), not (16,)'" in load_error(checkpoint)


def test_another_number_of_classes_is_named_with_both_shapes(checkpoint: Path) -> None:
    describe(checkpoint, classes=["a", "b", "c"])
    assert "2 tensors of another shape or type, first 'classifier.0.bias is (5,), not (3,)'" in load_error(checkpoint)


def test_weights_of_another_form_or_without_their_branches_do_not_load(checkpoint: Path, tmp_path: Path) -> None:
    describe(checkpoint, preprocessing=PREPROCESSING.to_json() | {"image_size": 224, "resize": 256})
    assert "tensors missing" in load_error(checkpoint)
    branched = tmp_path / "branched"
    write(branched, spec(BranchSpec(placement="R1", num_branches=2)))
    describe(branched, branches=None)
    message = load_error(branched)
    assert "first 'conv2.0.weight'" in message
    assert "first 'conv2.0.branches.0.0.weight'" in message


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["blocks.3.1.conv.4.running_var", "classifier.0.weight"])
def test_weights_that_are_not_finite_are_refused_by_name(checkpoint: Path, name: str, value: float) -> None:
    tensor = load_file(checkpoint / "model.safetensors")[name].clone()
    tensor.view(-1)[-1] = value
    reweigh(checkpoint, {name: tensor})
    assert f"holds NaN or infinite values, first in '{name}'" in load_error(checkpoint)


def test_a_refused_load_changes_no_weight(checkpoint: Path) -> None:
    student = build_student(spec())
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["classifier.0.bias"] = torch.full((5,), float("nan"))
    with pytest.raises(CheckpointError):
        load_strictly(student, tensors, "weights")
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())


def test_a_student_with_strided_weights_is_written_and_read(tmp_path: Path) -> None:
    student = build_student(spec()).to(memory_format=torch.channels_last)
    save_checkpoint(tmp_path, student, spec())
    read = load_student(open_checkpoint(tmp_path))
    assert all(torch.equal(tensor, read.state_dict()[name]) for name, tensor in student.state_dict().items())


def test_a_description_knows_its_sizes_without_weights() -> None:
    assert (spec(classes=7).num_classes, spec().image_size) == (7, 32)


def test_a_trained_student_cannot_be_changed(checkpoint: Path) -> None:
    trained = open_checkpoint(checkpoint)
    with pytest.raises(AttributeError):
        setattr(trained, "weights_sha256", "0" * 64)  # noqa: B010 - the type checker knows that it is frozen


def test_the_folder_of_a_teacher_is_called_a_teacher(tmp_path: Path) -> None:
    for name in ("teacher.json", "model.safetensors"):
        (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match="holds a teacher, not a student") as caught:
        open_checkpoint(tmp_path)
    assert f"--teacher-checkpoint {tmp_path / 'model.safetensors'}" in caught.value.remedy
