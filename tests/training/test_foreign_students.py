"""Students of other origins: trained, with and without branches, and handed over without their code."""

from pathlib import Path

import pytest
import torch

from kdexport.checkpoint import load_student, open_checkpoint
from kdexport.errors import ConfigError
from tests.training.small_runs import tiny_recipe
from training.foreign.network import ForeignStudent
from training.networks import build_student
from training.recipe import Recipe, StudentSettings
from training.runs.handover import Origin
from training.train import distil, evaluate_student, rehearse, train_student, train_teacher

HERE = "tests.training.foreign.factories"
TAPS = 'student.taps={stage1="layer1", stage2="layer2"}'
ORIGIN = Origin(dataset_sha256="d" * 64, teacher_sha256="")


@pytest.fixture(scope="module")
def teacher(tiny_images: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("teacher")
    train_teacher(tiny_recipe(tiny_images), folder)
    return f"teacher.checkpoint={folder / 'model.safetensors'}"


def recipe_of(images: Path, *overrides: str, student: str = "tiny", taps: str = TAPS) -> Recipe:
    own = (f'student.name="{HERE}:{student}"', taps, "train.epochs=2", "distiller.ramp_epochs=0.5")
    return tiny_recipe(images, *own, *overrides)


def refusal(images: Path, *overrides: str, student: str = "tiny", taps: str = TAPS) -> ConfigError:
    recipe = recipe_of(images, *overrides, student=student, taps=taps)
    with pytest.raises(ConfigError) as caught:
        rehearse(recipe)
    return caught.value


@pytest.mark.parametrize("method", ["plain", "ofd", "reviewkd", "norm"])
def test_a_foreign_student_learns_with_methods_of_every_kind(
    method: str, teacher: str, tiny_images: Path, tmp_path: Path
) -> None:
    recipe = recipe_of(tiny_images, teacher, f"distiller.name={method}", "train.epochs=1")
    rehearse(recipe)
    metrics = train_student(recipe, tmp_path / "run", ORIGIN)
    # The stored program computes what the trained network computed.
    assert evaluate_student(recipe, tmp_path / "run" / "student") == metrics["top1"]


def test_branches_of_a_foreign_student_are_handed_over_in_its_program(
    teacher: str, tiny_images: Path, tmp_path: Path
) -> None:
    recipe = recipe_of(tiny_images, teacher, "distiller.layers=multi", "distiller.num_branches=3")
    distil(recipe, tmp_path / "run")
    trained = open_checkpoint(tmp_path / "run" / "student")
    assert trained.spec.student == f"{HERE}:tiny"
    assert trained.spec.branches is None
    graph = load_student(trained)
    # Two layers of three branches, and no other convolution.
    weights = [value for value in graph.state_dict().values() if value.dim() == 4]
    assert sorted(tuple(value.shape) for value in weights) == sorted(3 * [(8, 3, 3, 3)] + 3 * [(12, 8, 3, 3)])
    assert (tmp_path / "run" / "diversity.jsonl").is_file()
    assert str(tiny_images) not in (tmp_path / "run" / "student" / "student.json").read_text()
    # The same command reports the finished run again.
    assert distil(recipe, tmp_path / "run")["top1"] == distil(recipe, tmp_path / "run")["top1"]


def test_methods_that_a_student_cannot_take_are_refused_with_those_that_it_can(tiny_images: Path) -> None:
    tokens = refusal(tiny_images, "data.image_size=32", student="tokens", taps='student.taps={stage1="block"}')
    assert tokens.message == (
        "kdiffusion cannot distil this pair: branches cannot stand at stage1: no batch norm writes 'block'."
    )
    assert tokens.remedy == "This pair can take: at, crd, dist, dkd, kd, norm, ofd, plain, reviewkd, vid."
    adapters = refusal(tiny_images, "distiller.placement=R2", "distiller.name=average")
    assert "placement R2 widens the layer that reads a tap" in adapters.message
    without = refusal(tiny_images, "distiller.name=at", taps="student.taps={}")
    assert "it reads features of the student, but [student] has no taps" in without.message


def test_a_student_of_other_outputs_is_refused(tiny_images: Path, tmp_path: Path) -> None:
    # Of three classes; refused before the teacher is trained, and the folder stays free.
    recipe = recipe_of(tiny_images, student="seven")
    with pytest.raises(ConfigError, match="has 7 outputs, the data set has 3 classes"):
        distil(recipe, tmp_path / "run")
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"dataset", "environment.json"}
    assert rehearse(recipe) == 7


def test_pretrained_weights_keep_the_network_and_replace_the_classifier(tmp_path: Path) -> None:
    from tests.training.foreign.factories import Tiny

    torch.manual_seed(2)
    start = Tiny(7)
    torch.save(
        {"state_dict": {f"module.{name}": value for name, value in start.state_dict().items()}}, tmp_path / "s.pth"
    )
    settings = StudentSettings(name=f"{HERE}:tiny", weights=str(tmp_path / "s.pth"))
    said: list[str] = []
    student = build_student(settings, num_classes=3, image_size=16, say=said.append)
    assert isinstance(student, ForeignStudent)
    own = student.network.state_dict()
    assert torch.equal(own["layer1.0.weight"], start.state_dict()["layer1.0.weight"])
    assert own["fc.weight"].shape == (3, 12)
    assert "the network keeps its own" in said[0]
    assert student.training


@pytest.mark.parametrize(
    ("name", "taps", "layers"),
    [
        ("torchvision:shufflenet_v2_x0_5", {"stage1": "stage3", "stage2": "stage4", "last": "conv5"}, "multi"),
        ("timm:repghostnet_050", {"stage1": "blocks.3", "stage2": "blocks.5", "stage3": "blocks.7"}, "single"),
    ],
)
def test_small_networks_of_libraries_are_distilled_with_branches(
    name: str, taps: dict[str, str], layers: str, teacher: str, tiny_images: Path, tmp_path: Path
) -> None:
    if name.startswith("timm:"):
        pytest.importorskip("timm")
    listed = ", ".join(f'{tap}="{path}"' for tap, path in taps.items())
    texts = (f'student.name="{name}"', f"student.taps={{{listed}}}", f"distiller.layers={layers}", "train.epochs=1")
    recipe = tiny_recipe(tiny_images, *texts, teacher, "data.image_size=32", "distiller.ramp_epochs=0.5")
    rehearse(recipe)
    metrics = train_student(recipe, tmp_path / "run", ORIGIN)
    assert evaluate_student(recipe, tmp_path / "run" / "student") == metrics["top1"]
