import io
import math
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from kdexport.checkpoint import save_tensors
from kdexport.errors import CheckpointError, UnknownNameError
from training.recipe import load_recipe
from training.teachers import TEACHERS, Teacher
from training.teachers.teacher import load_teacher_weights
from training.train import evaluate_teacher

SHARED = Path(__file__).parents[4] / "shared" / "data"
PUBLIC = SHARED / "weights" / "cifar100_resnet56-f2eff4c8.pt"


def resnet(depth: int, num_classes: int = 5, image_size: int = 32) -> Teacher:
    return TEACHERS.build(f"resnet{depth}", num_classes=num_classes, image_size=image_size)


def counted(depth: int, num_classes: int) -> int:
    """Parameters from the description of the network: 3 stages of (depth - 2) / 6 blocks of two 3x3 convolutions."""
    total, inputs = 3 * 16 * 9 + 2 * 16, 16
    for width in (16, 32, 64):
        for _ in range((depth - 2) // 6):
            total += 9 * inputs * width + 9 * width * width + 4 * width
            if inputs != width:
                total += inputs * width + 2 * width
            inputs = width
    return total + 64 * num_classes + num_classes


@pytest.fixture
def weights() -> bytes:
    buffer = io.BytesIO()
    torch.save(resnet(8).state_dict(), buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("depth", [8, 20, 56])
@pytest.mark.parametrize("num_classes", [3, 100])
def test_a_resnet_has_the_parameters_of_its_description(depth: int, num_classes: int) -> None:
    assert sum(p.numel() for p in resnet(depth, num_classes).parameters()) == counted(depth, num_classes)


def test_resnet56_has_the_published_number_of_parameters() -> None:
    assert sum(p.numel() for p in resnet(56, 100).parameters()) == 861_620


@pytest.mark.parametrize("name", TEACHERS.names())
@pytest.mark.parametrize("image_size", [32, 40])
def test_the_taps_of_a_teacher_have_the_shapes_that_it_states(name: str, image_size: int) -> None:
    # Transformers have no small form; the same steps of their patches from there.
    image_size += 96 if name.startswith("swin") else 0
    with torch.device("meta"):
        teacher = TEACHERS.build(name, num_classes=7, image_size=image_size).eval()
        tapped = teacher.tapped(torch.randn(2, 3, image_size, image_size))
    logits, shapes = tapped.logits, {name: tuple(feature.shape) for name, feature in tapped.features.items()}
    sides = {tap.name: (2, tap.channels, *[math.ceil(image_size / tap.stride)] * 2) for tap in teacher.taps}
    assert shapes == sides
    assert logits.shape == (2, 7)
    assert (teacher.num_classes, teacher.image_size) == (7, image_size)


def test_the_last_tap_is_what_the_classifier_pools() -> None:
    teacher = resnet(20).eval()
    images = torch.randn(3, 3, 32, 32)
    classifier = teacher.get_submodule("fc")
    torch.testing.assert_close(classifier(teacher.extract(images).mean((2, 3))), teacher(images))


def test_an_unknown_teacher_is_named_with_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match=r"no teacher named 'resnet55'") as caught:
        TEACHERS.build("resnet55", num_classes=5, image_size=32)
    assert "resnet56" in caught.value.remedy


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("suffix", [".pt", ".pth", ".safetensors"])
def test_saved_weights_come_back_bit_by_bit(wrapped: bool, suffix: str, tmp_path: Path) -> None:
    source, path = resnet(8), tmp_path / f"teacher{suffix}"
    if suffix == ".safetensors":
        save_tensors(path, source.state_dict())
    else:
        torch.save({"model": source.state_dict(), "epoch": 3} if wrapped else source.state_dict(), path)
    teacher = resnet(8)
    load_teacher_weights(teacher, path)
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in teacher.state_dict().items())


def test_missing_weights_are_named(tmp_path: Path) -> None:
    path = tmp_path / "absent.pt"
    with pytest.raises(CheckpointError) as caught:
        load_teacher_weights(resnet(8), path)
    assert caught.value.message == f"There is no teacher checkpoint {path}."


@pytest.mark.parametrize("legacy", [False, True])
def test_truncated_weights_are_refused_wherever_they_end(legacy: bool, tmp_path: Path) -> None:
    buffer, path, teacher = io.BytesIO(), tmp_path / "cut.pt", resnet(8)
    torch.save(teacher.state_dict(), buffer, _use_new_zipfile_serialization=not legacy)
    whole, before = buffer.getvalue(), {name: value.clone() for name, value in teacher.state_dict().items()}
    ends = np.random.default_rng(0).integers(0, len(whole), 25)
    for end in (0, 1, 2, 3, 10, 100, len(whole) // 2, len(whole) - 1, *ends.tolist()):
        path.write_bytes(whole[:end])
        with pytest.raises(CheckpointError, match=r"cut\.pt is (truncated|empty)"):
            load_teacher_weights(teacher, path)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_truncated_safetensors_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "cut.safetensors"
    save_tensors(path, resnet(8).state_dict())
    whole = path.read_bytes()
    for end in (0, 7, 100, len(whole) - 1):
        path.write_bytes(whole[:end])
        with pytest.raises(CheckpointError, match=r"cut\.safetensors is (truncated|empty)"):
            load_teacher_weights(resnet(8), path)


class Trap:
    """Pickles to a call that creates a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[object, tuple[str]]:
        import os

        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("wrap", [lambda trap: trap, lambda trap: {"model": {"conv1.weight": trap}}])
@pytest.mark.parametrize("plain", [False, True])
def test_code_in_a_foreign_pickle_never_runs(wrap: object, plain: bool, tmp_path: Path) -> None:
    assert callable(wrap)
    sprung, path = tmp_path / "sprung", tmp_path / "foreign.pt"
    if plain:
        path.write_bytes(pickle.dumps(wrap(Trap(sprung)), protocol=2))
    else:
        torch.save(wrap(Trap(sprung)), path)
    with pytest.raises(
        CheckpointError, match=r"contains code or objects other than tensors: it names (posix|nt)\.mkdir"
    ) as caught:
        load_teacher_weights(resnet(8), path)
    assert not sprung.exists()
    assert "Code of a file is never run" in caught.value.remedy
    # The pickle does run its code when it is loaded without protection.
    torch.load(path, weights_only=False) if not plain else pickle.loads(path.read_bytes())
    assert sprung.exists()


@pytest.mark.parametrize("content", [[1, 2], {"conv1.weight": 3}, torch.zeros(3), {}])
def test_a_file_without_a_state_dict_is_refused(content: object, tmp_path: Path) -> None:
    path = tmp_path / "odd.pt"
    torch.save(content, path)
    with pytest.raises(CheckpointError):
        load_teacher_weights(resnet(8), path)


def test_a_wrong_number_of_classes_or_depth_is_refused(weights: bytes, tmp_path: Path) -> None:
    path = tmp_path / "five.pt"
    path.write_bytes(weights)
    with pytest.raises(CheckpointError) as caught:
        load_teacher_weights(resnet(8, num_classes=6), path)
    assert "the file's classifier fc.weight has 5 outputs, the network 6" in caught.value.message
    with pytest.raises(CheckpointError, match=r"tensors missing: 'layer1\.1\.conv1\.weight'"):
        load_teacher_weights(resnet(20), path)


def test_weights_that_diverged_are_refused(tmp_path: Path) -> None:
    tensors = resnet(8).state_dict()
    tensors["layer2.0.bn1.running_var"][3] = float("nan")
    torch.save(tensors, tmp_path / "nan.pt")
    with pytest.raises(
        CheckpointError, match=r"NaN or infinite values in 1 of 56 tensors: 'layer2\.0\.bn1\.running_var'"
    ):
        load_teacher_weights(resnet(8), tmp_path / "nan.pt")


@pytest.mark.skipif(not PUBLIC.is_file(), reason="the public resnet56 weights are not in ../shared/data/weights")
def test_the_public_resnet56_fits_to_the_last_tensor() -> None:
    teacher = resnet(56, 100)
    fresh = {name: value.clone() for name, value in teacher.state_dict().items()}
    load_teacher_weights(teacher, PUBLIC)
    same = [name for name, value in teacher.state_dict().items() if torch.equal(value, fresh[name])]
    assert same == []
    with pytest.raises(CheckpointError, match="has 100 outputs, the network 99"):
        load_teacher_weights(resnet(56, 99), PUBLIC)


@pytest.fixture(scope="session")
def cifar100(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cifar100")
    command = [sys.executable, str(SHARED / "unpack.py"), "cifar100", "--to", str(folder)]
    subprocess.run(command, check=True, capture_output=True)
    return folder


@pytest.mark.skipif(not SHARED.is_dir(), reason="CIFAR-100 and the public resnet56 weights are not in ../shared/data")
def test_the_public_resnet56_scores_its_published_accuracy(cifar100: Path, tmp_path: Path) -> None:
    # A fifth of the test split, to save time: docs/results/cifar100_mobilenetv2.md has all of it, 72.63 %.
    for split, share in (("train", 500), ("test", 5)):
        for source in sorted((cifar100 / split).iterdir()):
            folder = tmp_path / split / source.name
            folder.mkdir(parents=True)
            for image in sorted(source.iterdir())[::share]:
                (folder / image.name).symlink_to(image)
    overrides = {"data": {"root": str(tmp_path)}, "teacher": {"checkpoint": str(PUBLIC)}}
    deviation = 100 * math.sqrt(0.7263 * (1 - 0.7263) / 2000)
    assert evaluate_teacher(load_recipe("cifar100", overrides)) * 100 == pytest.approx(72.63, abs=3 * deviation)
