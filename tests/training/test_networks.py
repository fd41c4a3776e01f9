"""Teachers and students of other origins: what they compute in a run, what they store, what is refused."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kdexport.checkpoint import StudentSpec, load_student, open_checkpoint, save_checkpoint
from kdexport.data.datasets import open_dataset
from kdexport.data.preprocessing import Preprocessing
from kdexport.errors import CheckpointError, ConfigError, UnknownNameError
from kdexport.origins.weights import Weights, read_weights
from kdexport.students import Student
from tests.training.foreign.factories import Tiny
from tests.training.small_runs import CLASSES, tiny_recipe
from training.foreign.network import ForeignTeacher
from training.networks import build_student, given_teacher
from training.recipe import Recipe, StudentSettings
from training.runs.handover import Origin
from training.runs.task import FrozenTeacher
from training.teachers import TEACHERS
from training.teachers.description import TeacherDescription, described_teacher
from training.train import distil, evaluate_teacher, rehearse, train_student, train_teacher

HERE = "tests.training.foreign.factories"
TAPS = 'taps={stage1="layer1", stage2="layer2"}'
ORIGIN = Origin(dataset_sha256="d" * 64, teacher_sha256="")


def recipe_of(images: Path, *overrides: str, teacher: str = "tiny", taps: str = TAPS) -> Recipe:
    own = (f'teacher.name="{HERE}:{teacher}"', f"teacher.{taps}", "train.epochs=2", "train.warmup_epochs=0.5")
    return tiny_recipe(images, *own, *overrides)


@pytest.fixture(scope="module")
def trained(tiny_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a teacher ``Tiny`` that this project trained with statistics of its own."""
    folder = tmp_path_factory.mktemp("foreign")
    own = ("data.mean=[0.4, 0.5, 0.6]", "data.std=[0.2, 0.3, 0.25]", "teacher.epochs=12")
    train_teacher(recipe_of(tiny_images, *own), folder)
    return folder


def weights(folder: Path) -> str:
    return f"teacher.checkpoint={folder / 'model.safetensors'}"


def test_a_trained_foreign_teacher_is_stored_under_the_names_of_its_network(trained: Path) -> None:
    tensors = load_file(trained / "model.safetensors")
    network = Tiny(3)
    network.load_state_dict(tensors)
    about = described_teacher(trained / "model.safetensors")
    assert about.classes == CLASSES
    assert about.preprocessing is not None
    assert (about.preprocessing.mean, about.preprocessing.image_size) == ((0.4, 0.5, 0.6), 16)


def test_a_foreign_teacher_gets_its_own_input(trained: Path, tiny_images: Path) -> None:
    exact = evaluate_teacher(recipe_of(tiny_images, weights(trained)))
    assert exact > 0.8
    shifted = ("data.mean=[0.9, 0.1, 0.8]", "data.std=[0.05, 0.9, 0.2]")
    assert evaluate_teacher(recipe_of(tiny_images, weights(trained), *shifted)) == exact


@pytest.mark.parametrize("method", ["kd", "crd", "ofd", "reviewkd", "norm", "kdiffusion"])
def test_a_foreign_teacher_teaches_with_methods_of_every_kind(
    method: str, trained: Path, tiny_images: Path, tmp_path: Path
) -> None:
    # A recipe names the keys of its own method only.
    more = ["distiller.ramp_epochs=0.5", "distiller.negatives=5"] if method == "crd" else ["distiller.ramp_epochs=0.5"]
    recipe = recipe_of(tiny_images, weights(trained), f"distiller.name={method}", "train.epochs=1", *more)
    rehearse(recipe)
    metrics = train_student(recipe, tmp_path / "run", ORIGIN)
    assert metrics["teacher_top1"] == evaluate_teacher(recipe)


def test_a_teacher_of_other_classes_is_refused_for_logits_and_read_for_features(
    tiny_images: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(1)
    path = tmp_path / "seven.safetensors"
    save_file(Tiny(7).state_dict(), path)
    given = f"teacher.checkpoint={path}"
    for factory in ("tiny", "seven"):
        logits = recipe_of(tiny_images, given, "distiller.name=kd", teacher=factory)
        with pytest.raises(CheckpointError) as caught:
            train_student(logits, tmp_path / factory, ORIGIN)
        assert f"The teacher {HERE}:{factory} cannot teach kd, which reads its logits" in caught.value.message
        assert "the data set has 3" in caught.value.message
        assert "kdexport teacher" in caught.value.remedy
        assert caught.value.remedy.endswith("average, crd, kdiffusion, norm, ofd, plain, reviewkd, vid.")
        features = recipe_of(tiny_images, given, "distiller.name=at", "distiller.ramp_epochs=0.5", teacher=factory)
        metrics = train_student(features, tmp_path / f"{factory}-at", ORIGIN)
        assert "teacher_top1" not in metrics
        assert "only its features are read" in capfd.readouterr().err
    with pytest.raises(CheckpointError, match="cannot be evaluated on these classes: it has 7 classes"):
        evaluate_teacher(recipe_of(tiny_images, given, teacher="seven"))


def test_a_registered_teacher_of_other_classes_is_read_for_features_with_its_own_classifier(
    tiny_images: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(1)
    path = tmp_path / "seven.safetensors"
    own = TEACHERS.build("resnet20", num_classes=7, image_size=16).state_dict()
    save_file(own, path)
    named = ('teacher.name="resnet20"', f"teacher.checkpoint={path}", "train.epochs=1", "train.warmup_epochs=0.5")
    with pytest.raises(CheckpointError, match="has 7 outputs, the network 3"):
        train_student(tiny_recipe(tiny_images, *named, "distiller.name=kd"), tmp_path / "kd", ORIGIN)
    guided = tiny_recipe(
        tiny_images, *named, "distiller.layers=multi", "distiller.target_guide=1.0", "distiller.ramp_epochs=0.5"
    )
    metrics = train_student(guided, tmp_path / "run", ORIGIN)
    assert "teacher_top1" not in metrics
    assert "no top-1, because its file has a classifier of 7 classes; only its features" in capfd.readouterr().err
    reads: list[Path] = []

    def counted(file: Path) -> Weights:
        reads.append(file)
        return read_weights(file)

    monkeypatch.setattr("training.teachers.teacher.read_weights", counted)
    given = given_teacher(guided, open_dataset(guided.data.spec(), "train"), lambda _: None)
    assert reads == [path]
    # The target guide reads the classifier: it must be that of the file.
    torch.testing.assert_close(given.teacher.state_dict(), own, rtol=0, atol=0)
    with pytest.raises(CheckpointError, match="classifier of 7 classes, the data set has 3"):
        evaluate_teacher(guided)
    # Classes that the file describes are those of another data set, unless the recipe says to go on.
    described = TeacherDescription(classes=tuple("abcdefg")).metadata("resnet20")
    save_file(own, path, metadata=described)
    images = open_dataset(guided.data.spec(), "train")
    assert given_teacher(guided, images, lambda _: None).problem.startswith("it was trained for 7 other classes (only")
    strict = guided.teacher.model_copy(update={"plausibility": "required"})
    with pytest.raises(CheckpointError, match="trained for 7 classes, the data set has 3") as caught:
        given_teacher(guided.model_copy(update={"teacher": strict}), images, lambda _: None)
    assert "--set teacher.plausibility=reported" in caught.value.remedy
    save_file({name: value for name, value in own.items() if "fc." not in name}, path)
    with pytest.raises(CheckpointError, match="classifier"):
        train_student(guided, tmp_path / "headless", ORIGIN)


def test_fine_tuning_replaces_the_classifier_and_keeps_the_rest(tiny_images: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    start = Tiny(7)
    save_file(start.state_dict(), tmp_path / "seven.safetensors")
    # The rate is too small to move a weight.
    more = ("teacher.epochs=1", "teacher.learning_rate=1e-30", "train.weight_decay=0.0")
    recipe = recipe_of(tiny_images, *more, f"teacher.checkpoint={tmp_path / 'seven.safetensors'}")
    train_teacher(recipe, tmp_path / "tuned")
    tuned = load_file(tmp_path / "tuned" / "model.safetensors")
    assert tuned["fc.weight"].shape == (3, 12)
    assert torch.equal(tuned["layer2.0.weight"], start.state_dict()["layer2.0.weight"])


def test_a_library_states_the_input_of_its_weights(tiny_images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision import models

    def offline(self: object, *_args: object, **_options: object) -> dict[str, torch.Tensor]:
        torch.manual_seed(5)
        return dict(models.shufflenet_v2_x0_5(weights=None).state_dict())

    monkeypatch.setattr(models.WeightsEnum, "get_state_dict", offline)
    own = ('teacher.name="torchvision:shufflenet_v2_x0_5"', 'teacher.weights="DEFAULT"', "distiller.name=at")
    taps = 'teacher.taps={stage1="stage2", stage2="stage3", stage3="stage4"}'
    recipe = tiny_recipe(tiny_images, *own, taps, "teacher.image_size=48")
    images = open_dataset(recipe.data.spec(), "train")
    given = given_teacher(recipe, images, lambda _: None)
    assert given.problem == "it has 1000 classes"
    assert given.given.preprocessing.mean == (0.485, 0.456, 0.406)
    assert given.given.preprocessing.image_size == given.teacher.image_size == 48
    assert [tap.stride for tap in given.teacher.taps] == [8, 16, 32]
    # Without a size of the recipe, the one of the library.
    own_size = given_teacher(tiny_recipe(tiny_images, *own), images, lambda _: None)
    assert own_size.given.preprocessing.image_size == own_size.teacher.image_size == 224


def test_the_teacher_reads_resized_and_renormalised_images(tiny_images: Path, tmp_path: Path, trained: Path) -> None:
    recipe = recipe_of(tiny_images, weights(trained), "data.image_size=24")
    images = open_dataset(recipe.data.spec(), "train")
    given = given_teacher(recipe, images, lambda _: None)
    assert isinstance(given.teacher, ForeignTeacher)
    assert given.teacher.image_size == 16
    frozen = FrozenTeacher(given.teacher, torch.device("cpu"), None)
    frozen.resize(16)
    x = torch.randn(2, 3, 24, 24)
    small = torch.nn.functional.interpolate(x, (16, 16), mode="bilinear", antialias=True)
    torch.testing.assert_close(frozen(x).logits, given.teacher.network(small))


def refusal(images: Path, *overrides: str, teacher: str = "tiny", taps: str = TAPS) -> ConfigError:
    recipe = recipe_of(images, *overrides, teacher=teacher, taps=taps)
    with pytest.raises(ConfigError) as caught:
        rehearse(recipe)
    return caught.value


def test_methods_that_a_teacher_cannot_take_are_refused_before_the_training(tiny_images: Path) -> None:
    bare = refusal(tiny_images, "distiller.name=at", teacher="residual")
    assert "The tap stage1 = 'layer1' is not a module of the network" in bare.message
    size = ("teacher.image_size=32", "distiller.target_guide=1.0")
    guide = refusal(tiny_images, *size, teacher="tokens", taps='taps={stage1="block"}')
    assert "target_guide needs a teacher whose classifier reads the average of its last tap" in guide.message
    assert "is an exported program" in refusal(tiny_images, "teacher.name=model.pt2").message


def test_a_method_that_reads_features_needs_taps(tiny_images: Path) -> None:
    recipe = tiny_recipe(tiny_images, f'teacher.name="{HERE}:tiny"', "distiller.name=at")
    with pytest.raises(ConfigError) as caught:
        rehearse(recipe)
    assert "at cannot distil this pair: it reads features of the teacher, but [teacher] has no taps" in str(
        caught.value
    )
    assert "This pair can take: crd, dist, dkd, kd, plain." in caught.value.remedy
    rehearse(tiny_recipe(tiny_images, f'teacher.name="{HERE}:tiny"', "distiller.name=kd"))


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ('teacher.weights="DEFAULT"', "weights is for networks of another origin"),
        ('teacher.taps={stage1="layer1"}', "taps is for networks of another origin"),
        ("student.pretrained=true", "pretrained is for networks of another origin"),
        ('student.taps={layer1="layer1"}', "'layer1' is not the name of a tap"),
    ],
)
def test_keys_of_other_origins_are_refused_for_registered_networks(
    override: str, problem: str, tiny_images: Path
) -> None:
    with pytest.raises(ConfigError, match=problem):
        tiny_recipe(tiny_images, override)


def test_a_file_in_weights_is_the_checkpoint(tiny_images: Path) -> None:
    recipe = tiny_recipe(tiny_images, f'teacher.name="{HERE}:tiny"', 'teacher.weights="a/b.pth"')
    assert (recipe.teacher.checkpoint, recipe.teacher.weights) == ("a/b.pth", "")
    with pytest.raises(ConfigError, match="weights and checkpoint both name a file"):
        tiny_recipe(tiny_images, f'teacher.name="{HERE}:tiny"', 'teacher.weights="b.pth"', "teacher.checkpoint=c.pth")


def test_another_network_does_not_inherit_taps_and_weights(tiny_images: Path) -> None:
    from training.recipe import load_recipe

    first = tmp = tiny_images.parent / "base.toml"
    tmp.write_text(
        f'extends = "digits"\n[teacher]\nname = "{HERE}:tiny"\nweights = "x"\ntaps = {{ stage1 = "layer1" }}\n'
    )
    assert load_recipe(str(first)).teacher.taps == {"stage1": "layer1"}
    assert load_recipe(str(first), {"teacher": {"name": "resnet8"}}).teacher.taps == {}


def test_the_form_of_a_student_can_be_chosen_and_is_said_with_its_reason(tmp_path: Path) -> None:
    def built(form: str, size: int) -> tuple[Student, str]:
        lines: list[str] = []
        settings = StudentSettings.model_validate({"name": "mobilenetv2", "form": form})
        return build_student(settings, num_classes=3, image_size=size, say=lines.append), lines[0]

    small, said = built("auto", 64)
    assert said.startswith("student mobilenetv2: the small form, because data.image_size is 64")
    full, said = built("full", 64)
    assert said == "student mobilenetv2: the full form, because student.form is full"
    assert [tap.stride for tap in full.taps] == [2, 4, 8, 16, 32, 32]
    assert [tap.stride for tap in small.taps] != [tap.stride for tap in full.taps]
    assert [tap.stride for tap in built("small", 128)[0].taps] == [tap.stride for tap in small.taps]
    # A checkpoint states the form, so that the same network is built from it.
    mean = (0.5, 0.5, 0.5)
    spec = StudentSpec(
        student="mobilenetv2",
        classes=("a", "b", "c"),
        preprocessing=Preprocessing.for_new_student(image_size=64, resize=64, mean=mean, std=mean),
        branches=None,
        provenance={},
        form="full",
    )
    save_checkpoint(tmp_path / "full", full, spec)
    trained = open_checkpoint(tmp_path / "full")
    assert load_student(trained).state_dict().keys() == full.state_dict().keys()
    assert "form" not in replace(spec, form="auto").to_json()


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_weights_that_a_library_does_not_have_are_refused_before_the_data(role: str, tmp_path: Path) -> None:
    # The data set does not exist, and is not asked for.
    recipe = tiny_recipe(
        tmp_path / "absent", f"{role}.name=torchvision:resnet18", f"{role}.weights=IMAGENET9K_V1", "distiller.name=kd"
    )
    with pytest.raises(UnknownNameError, match="resnet18 has no weights named 'IMAGENET9K_V1' in torchvision"):
        distil(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_missing_files_of_weights_are_refused_before_the_data(tmp_path: Path) -> None:
    for key, option in (("teacher.checkpoint", "--teacher-checkpoint"), ("student.weights", "student.weights")):
        changes = [f"{key}={tmp_path / 'none.pt'}", "distiller.name=kd"]
        if key.startswith("student"):
            changes.append("student.name=torchvision:resnet18")
        with pytest.raises(CheckpointError, match="There is no file") as caught:
            distil(tiny_recipe(tmp_path / "absent", *changes), tmp_path / "run")
        assert option in caught.value.remedy


def test_an_exported_program_is_no_student_to_train_but_can_be_built() -> None:
    with pytest.raises(ConfigError) as caught:
        build_student(StudentSettings(name="net.pt2"), num_classes=3, image_size=32)
    assert "kdexport build --student net.pt2 --data DIR" in caught.value.remedy
