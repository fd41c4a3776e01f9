import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from kdexport.data.datasets import DatasetSpec
from kdexport.errors import ConfigError, ReparamError
from tests.conftest import run_command
from tests.training.small_runs import environment
from training.__main__ import app
from training.recipe import (
    Published,
    Recipe,
    check_schedule,
    load_recipe,
    merge_overrides,
    parse_override,
    plugin_digests,
)


def write(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return str(path)


def refused(source: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_recipe(source, merge_overrides([parse_override(text) for text in overrides]))
    return str(caught.value)


def test_a_recipe_lies_over_the_one_it_extends(tmp_path: Path) -> None:
    write(tmp_path / "base.toml", 'extends = "cifar100"\n[train]\nepochs = 7\nseed = 3\n[teacher]\nname = "resnet20"\n')
    top = write(tmp_path / "deep" / "top.toml", 'extends = "../base.toml"\n[train]\nepochs = 9\n')
    recipe = load_recipe(top, {"train": {"seed": 11}})
    assert (recipe.train.epochs, recipe.train.seed, recipe.train.batch_size) == (9, 11, 64)
    assert (recipe.teacher.name, recipe.student.name) == ("resnet20", "mobilenetv2")


def test_a_relative_base_is_found_from_any_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a" / "base.toml", 'extends = "digits"\n[train]\nepochs = 2\n')
    write(tmp_path / "a" / "b" / "top.toml", 'extends = "../base.toml"\n')
    monkeypatch.chdir(tmp_path / "a")
    assert load_recipe("b/top.toml").train.epochs == 2
    monkeypatch.chdir(tmp_path)
    assert load_recipe("a/b/top.toml").train.epochs == 2


@pytest.mark.parametrize("back", ["first.toml", "sub/../first.toml", "./first.toml"])
def test_a_cycle_of_bases_is_refused(back: str, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    write(tmp_path / "second.toml", f'extends = "{back}"\n')
    first = write(tmp_path / "first.toml", 'extends = "second.toml"\n')
    message = refused(first)
    assert f"extends itself: {first} -> {tmp_path / 'second.toml'} -> {first}.\n" in message
    assert message.endswith("Remove it from `extends` in one of these recipes.")


def test_a_recipe_that_extends_itself_is_refused(tmp_path: Path) -> None:
    assert "extends itself" in refused(write(tmp_path / "own.toml", 'extends = "own.toml"\n'))


def test_a_missing_recipe_or_base_is_named_with_the_nearest(tmp_path: Path) -> None:
    assert refused("cifar10") == (
        "There is no recipe 'cifar10'.\n"
        "Did you mean cifar100? Run kdexport list recipes for all names, or pass a TOML file."
    )
    absent = tmp_path / "absent.toml"
    assert f"There is no recipe '{absent}'." in refused(write(tmp_path / "top.toml", 'extends = "absent.toml"\n'))


def test_of_several_bases_the_later_one_lies_on_top(tmp_path: Path) -> None:
    write(tmp_path / "one.toml", 'extends = "digits"\n[train]\nepochs = 2\nseed = 5\n')
    write(tmp_path / "two.toml", "[train]\nepochs = 3\nbatch_size = 7\n")
    top = write(tmp_path / "top.toml", 'extends = ["one.toml", "two.toml"]\n[train]\nbatch_size = 9\n')
    train = load_recipe(top).train
    assert (train.epochs, train.seed, train.batch_size) == (3, 5, 9)


@pytest.mark.parametrize("value", ["3", "[1]", "{a = 1}"])
def test_bases_must_be_names(value: str, tmp_path: Path) -> None:
    message = refused(write(tmp_path / "top.toml", f"extends = {value}\n"))
    assert "`extends` in recipe " in message
    assert "must be a recipe or a list of recipes; got " in message
    assert message.endswith('For example: extends = ["cifar100", "parts/kd"]')


def test_the_identity_of_a_run_excludes_paths_and_published_numbers() -> None:
    base = load_recipe("cifar100")
    same = ("data.root=elsewhere", "data.workers=7", "teacher.checkpoint=a.pt", "published.top1=12.5")
    moved = load_recipe("cifar100", merge_overrides([parse_override(text) for text in same]))
    assert moved.identity() == base.identity()
    for text in ("train.seed=1", "distiller.weight=1.5", "data.flip=false", "teacher.name=resnet20"):
        assert load_recipe("cifar100", parse_override(text)).identity() != base.identity()


def test_a_syntax_error_is_named_with_its_line(tmp_path: Path) -> None:
    broken = write(tmp_path / "broken.toml", "[train]\nepochs = = 3\n")
    assert f"{broken} is not valid TOML" in (message := refused(broken))
    assert "line 2" in message


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("train.epoch=3", "unknown key 'train.epoch'. Did you mean epochs"),
        ("distiller.num_branch=3", "unknown key 'distiller.num_branch'. Did you mean num_branches"),
        ("distill.weight=3", "unknown key 'distill'. Did you mean distiller"),
        ("extends=digits", "unknown key 'extends'"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest(override: str, problem: str) -> None:
    assert f"recipe digits: {problem}" in refused("digits", override)


@pytest.mark.parametrize(
    "override",
    [
        "train.epochs=3.0",
        "train.epochs=0",
        'train.epochs="3"',
        "train.epochs=true",
        "train.epochs=",
        "train.batch_size=1",
        "train.learning_rate=nan",
        "train.learning_rate=inf",
        "train.learning_rate=-0.1",
        "train.momentum=1.0",
        "train.schedule=linear",
        "train.mixed_precision=fp8",
        "train=3",
        "data.flip=1",
        "data.name=3",
        "data.mean=[0.5,0.5]",
        "data.mean=[0.5,0.5,nan]",
        "data.mean=[123.7,116.3,103.5]",
        "data.mean=[0.5,-0.1,0.5]",
        "data.std=[58.4,57.1,57.4]",
        "data.std=[0.5,0.0,0.5]",
        "teacher.mean=[123.7,116.3,103.5]",
        "data.image_size=4",
        "distiller.num_branches=17",
        "distiller.weight=inf",
        "distiller.placement=R3",
        "teacher.std=[1.0,1.0,-1.0]",
    ],
)
def test_a_wrong_type_or_range_is_refused_and_nothing_is_converted(override: str) -> None:
    message = refused("digits", override)
    assert override.partition("=")[0] in message
    assert message.endswith("Correct the file or the option, then run the same command again.")


def test_means_on_the_scale_of_bytes_are_refused_with_what_to_do() -> None:
    message = refused("digits", "teacher.std=[0.2,58.4,0.2]")
    assert "teacher.std.1 = 58.4 (float)" in message
    assert "must be from 0 to 1, because pixels are divided by 255 before; divide it by 255 too." in message


def test_every_problem_is_reported_at_once() -> None:
    message = refused("digits", "train.epochs=-1", "data.flip=3", "nonsense.key=1")
    assert all(part in message for part in ("train.epochs = -1 (int)", "data.flip = 3 (int)", "unknown key 'nonsense'"))


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    assert "the key 'student' is missing." in refused(
        write(tmp_path / "r.toml", '[data]\nname = "digits"\n[teacher]\nname = "resnet8"\n')
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train.epochs=30", {"train": {"epochs": 30}}),
        ("train.learning_rate=1e-3", {"train": {"learning_rate": 0.001}}),
        ("data.flip=false", {"data": {"flip": False}}),
        ("data.mean=[0.1, 0.2, 0.3]", {"data": {"mean": [0.1, 0.2, 0.3]}}),
        ("student.name=mobilenetv2", {"student": {"name": "mobilenetv2"}}),
        ('student.name="mobilenetv2"', {"student": {"name": "mobilenetv2"}}),
        ("data.root=/some where/a=b", {"data": {"root": "/some where/a=b"}}),
        ("data.name=folder:C:\\x", {"data": {"name": "folder:C:\\x"}}),
        ("data.root=", {"data": {"root": ""}}),
        ("a.b.c=1", {"a": {"b": {"c": 1}}}),
    ],
)
def test_an_override_is_toml_or_else_a_bare_string(text: str, expected: dict[str, Any]) -> None:
    assert parse_override(text) == expected


@pytest.mark.parametrize("text", ["train.epochs", "=3", "train..epochs=3", "train.1st=3", "train epochs=3", ".=1", ""])
def test_an_override_without_key_and_value_is_refused(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_override(text)
    assert str(caught.value) == f"--set must be KEY=VALUE; got {text!r}.\nFor example: --set train.epochs=30"


def test_the_last_override_of_a_key_wins_and_its_neighbours_stay() -> None:
    items = [parse_override(text) for text in ("train.epochs=3", "train.seed=4", "train.epochs=5")]
    assert merge_overrides(items) == {"train": {"epochs": 5, "seed": 4}}
    assert items[0] == {"train": {"epochs": 3}}
    recipe = load_recipe("cifar100", merge_overrides(items))
    assert (recipe.train.epochs, recipe.train.seed, recipe.train.batch_size) == (5, 4, 64)


def test_resolve_prints_the_whole_recipe_without_importing_torch() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "training", "resolve", "--recipe", "cifar100"]
    options = ["--set", "train.epochs=3", "--data", "/elsewhere", "--teacher-checkpoint", "t.pt"]
    result = subprocess.run([*command, *options], env=environment(), capture_output=True, text=True, check=True)
    imported = {
        line.rpartition("|")[2].strip() for line in result.stderr.splitlines() if line.startswith("import time:")
    }
    assert "training.recipe" in imported
    assert not {name for name in imported if name.partition(".")[0] in ("torch", "torchvision", "accelerate")}
    printed = json.loads(result.stdout)["recipe"]
    overrides = {"train": {"epochs": 3}, "data": {"root": "/elsewhere"}, "teacher": {"checkpoint": "t.pt"}}
    assert printed == load_recipe("cifar100", overrides).model_dump(mode="json")


def test_a_wrong_recipe_ends_the_command_with_code_2_and_no_traceback() -> None:
    command = [sys.executable, "-m", "training", "resolve", "--recipe", "digits", "--set", "train.epoch=3"]
    result = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error KDX100: recipe digits: unknown key 'train.epoch'.")
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("command", ["train", "teacher"])
def test_a_placement_that_could_not_be_folded_is_refused_before_training(command: str, tmp_path: Path) -> None:
    settings = ["distiller.placement=R2", "distiller.layers=multi", "student.name=resnet18"]
    options = [part for item in settings for part in ("--set", item)]
    done = CliRunner().invoke(app, [command, "--recipe", "digits", "--out", str(tmp_path / "run"), *options])
    assert isinstance(done.exception, ReparamError)
    assert (done.exception.code, done.exception.exit_code) == ("KDX300", 2)
    assert re.search(r"adapters\.stage\d has 2 users", done.exception.message)
    assert not (tmp_path / "run").exists()


def test_another_data_set_does_not_keep_the_root_of_the_base(tmp_path: Path) -> None:
    base = tmp_path / "base.toml"
    base.write_text('extends = "cifar100"\n[data]\nroot = "data/cifar100"\n')
    top = tmp_path / "top.toml"
    top.write_text('extends = "base.toml"\n[data]\nname = "folder:mine"\n')
    assert load_recipe(str(top)).data.spec().name == "folder:mine"
    one = load_recipe(str(base), {"data": {"name": "folder:other"}}).data
    assert (one.name, one.root, one.spec().name) == ("folder:other", "", "folder:other")
    # What is said on one level belongs together, and a place alone still moves the set.
    both = {"data": {"name": "folder:other", "root": "/moved"}}
    assert load_recipe(str(base), both).data.spec().name == "folder:/moved"
    assert load_recipe(str(base), {"data": {"root": "/moved"}}).data.spec().root == "/moved"
    assert load_recipe(str(base), {"data": {"name": "cifar100"}}).data.root == "data/cifar100"


def test_training_commands_refuse_bad_recipes() -> None:
    done = run_command("resolve", "--recipe", "digts", module="training")
    assert done.exit_code == 2
    assert "digits" in done.stderr
    done = run_command("resolve", "--recipe", "digits", "--set", "train.epoch=3", module="training")
    assert done.exit_code == 2
    assert "train.epoch" in done.stderr
    assert "epochs" in done.stderr
    resolved = json.loads(
        run_command("resolve", "--recipe", "digits", "--set", "train.epochs=3", module="training").stdout
    )
    assert resolved["recipe"]["train"]["epochs"] == 3


PUBLIC = (0.5070, 0.4865, 0.4409)


def test_another_data_set_or_teacher_does_not_keep_the_normalisation_of_the_teacher() -> None:
    assert load_recipe("cifar100", {"data": {"root": "x"}}).teacher.mean == PUBLIC
    assert load_recipe("cifar100", {"teacher": {"checkpoint": "t.pt"}}).teacher.mean == PUBLIC
    for change in ({"data": {"name": "folder:x"}}, {"teacher": {"name": "resnet20"}}):
        changed = load_recipe("cifar100", change)
        assert (changed.teacher.mean, changed.teacher.std) == (None, None)


def test_the_student_alone_is_not_given_another_normalisation() -> None:
    half = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}
    with pytest.raises(ConfigError, match=r"data\.mean is changed to \[0\.5, 0\.5, 0\.5\], but .* teacher\.mean"):
        load_recipe("cifar100", {"data": half})
    assert load_recipe("cifar100", {"data": half, "teacher": half}).teacher.mean == (0.5, 0.5, 0.5)
    kept = {"mean": list(PUBLIC), "std": [0.2673, 0.2564, 0.2761]}
    assert load_recipe("cifar100", {"data": half, "teacher": kept}).teacher.mean == PUBLIC
    # Where the teacher has no normalisation of its own, it follows the student.
    assert load_recipe("digits", {"data": half}).teacher.mean is None


def test_a_mean_without_a_deviation_is_refused() -> None:
    with pytest.raises(ConfigError, match="mean is given without std; set both, or neither"):
        load_recipe("digits", {"teacher": {"mean": [0.5, 0.5, 0.5]}})


def schedule_error(source: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        check_schedule(load_recipe(source, merge_overrides([parse_override(text) for text in overrides])))
    return str(caught.value)


@pytest.mark.parametrize("milestones", ["[0, 5]", "[-3]", "[5, 5]", "[7, 5]"])
def test_milestones_that_are_no_rising_epochs_are_refused(milestones: str) -> None:
    message = schedule_error("digits", "train.schedule=step", f"train.milestones={milestones}")
    assert f"train.milestones = {milestones} must be different epochs of 1 or more that rise" in message


def test_a_folder_in_place_of_the_digits_is_another_data_set() -> None:
    for root in ("photos", "folder:photos"):
        recipe = load_recipe("digits", {"data": {"root": root}, "teacher": {"epochs": 3}})
        assert recipe.data.spec() == DatasetSpec(name="folder:photos")
    assert recipe.identity()["data"]["name"] == "folder:"
    assert load_recipe("digits", {"data": {"root": ""}}).data.name == "digits"


@pytest.mark.parametrize("key", ["data.std", "teacher.std"])
def test_a_deviation_that_was_divided_by_255_twice_is_refused(key: str) -> None:
    table, _, name = key.partition(".")
    values = {name: [0.2 / 255] * 3, **({"mean": [0.5] * 3} if table == "teacher" else {})}
    with pytest.raises(ConfigError, match=r"is less than one grey level, 0\.0039; it must be divided by 255 once"):
        load_recipe("digits", {table: values})


def test_milestones_beyond_the_run_are_refused_with_where_they_could_be() -> None:
    given = "teacher.checkpoint=t.pt"
    cell = "cifar100/vgg13-mobilenetv2/crd"
    assert schedule_error(cell, "train.epochs=30", given) == (
        "The schedule cannot act: train.milestones has 150, 180, 210, which train.epochs = 30 does not reach.\n"
        "For example: --set train.milestones=[19, 22, 26]"
    )
    assert "train.milestones has 210, which train.epochs = 210" in schedule_error(cell, "train.epochs=210", given)
    assert "--set train.schedule=cosine" in schedule_error(cell, "train.epochs=1", given)
    for accepted in ("train.epochs=211", "train.schedule=cosine", "train.milestones=[19, 22, 26]"):
        rest = [] if accepted.startswith("train.epochs") else ["train.epochs=30"]
        texts = [accepted, given, *rest]
        check_schedule(load_recipe(cell, merge_overrides([parse_override(text) for text in texts])))


def test_a_warm_up_or_a_ramp_that_outlasts_the_run_is_refused() -> None:
    text = schedule_error("digits", "train.epochs=4", "train.warmup_epochs=4.0", "teacher.epochs=5")
    assert text == (
        "The schedule cannot act: train.warmup_epochs = 4 leaves nothing of train.epochs = 4; "
        "distiller.ramp_epochs = 5 is longer than train.epochs = 4, so the loss of the method never gets "
        "its full weight.\n"
        "For example: --set train.warmup_epochs=0.2 --set distiller.ramp_epochs=0.3"
    )
    check_schedule(load_recipe("digits", {"train": {"epochs": 5}, "distiller": {"ramp_epochs": 5.0}}))


def test_the_schedule_of_a_teacher_that_will_be_trained_is_checked_too() -> None:
    cell = "cifar100/vgg13-mobilenetv2/kd"
    assert "150, 180, 210, which teacher.epochs = 20 does not reach" in schedule_error(cell, "teacher.epochs=20")
    check_schedule(load_recipe(cell, {"teacher": {"epochs": 20, "checkpoint": "t.pt"}}))
    assert "leaves nothing of teacher.epochs = 1" in schedule_error("digits", "teacher.epochs=1")


def test_a_schedule_that_cannot_act_ends_the_command_before_anything_is_written(tmp_path: Path) -> None:
    out = tmp_path / "run"
    done = CliRunner().invoke(app, ["train", "--recipe", "digits", "--set", "train.epochs=2", "--out", str(out)])
    assert isinstance(done.exception, ConfigError)
    assert "distiller.ramp_epochs = 5" in done.exception.message
    assert not out.exists()


def test_published_numbers_are_dropped_with_what_they_were_published_for() -> None:
    cell = "cifar100/vgg13-mobilenetv2/kd"
    assert load_recipe(cell, {"train": {"epochs": 30}}).published.top1 == 67.37
    for change in (
        {"data": {"name": "folder:x"}},
        {"teacher": {"name": "resnet20"}},
        {"student": {"name": "resnet18"}},
    ):
        assert load_recipe(cell, change).published == Published()
    other = load_recipe(cell, {"distiller": {"name": "dist"}}).published
    assert (other.top1, other.teacher) == (None, 74.64)
    own = {"student": {"name": "resnet18"}, "published": {"top1": 50.0, "source": "mine"}}
    assert load_recipe(cell, own).published.top1 == 50.0


def test_a_key_that_came_later_does_not_make_an_old_run_another_one() -> None:
    assert set(load_recipe("digits").identity()["teacher"]) == {
        *("name", "checkpoint", "epochs", "learning_rate", "mean", "std")
    }
    reported = load_recipe("digits", {"teacher": {"plausibility": "reported"}})
    assert reported.identity() == load_recipe("digits").identity()
    assert reported.model_dump()["teacher"]["plausibility"] == "reported"


def test_the_source_of_a_factory_belongs_to_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    file, package = tmp_path / "mynet_file.py", tmp_path / "mynet_package"
    write(file, "a = 1\n")
    write(package / "__init__.py", "")
    write(package / "deep" / "part.py", "b = 1\n")
    for name, changed in (("mynet_file:make", file), ("mynet_package.deep.part:make", package / "deep" / "part.py")):
        recipe = load_recipe("digits", {"student": {"name": name}})
        before = plugin_digests(recipe)
        assert set(before) == {"student"}
        changed.write_text("c = 2\n")
        assert plugin_digests(recipe) != before
    assert plugin_digests(load_recipe("digits", {"student": {"name": "timm:resnet18"}})) == {}
    assert plugin_digests(load_recipe("digits", {"teacher": {"name": "no_such_module:make"}})) == {}


def test_the_file_that_a_student_starts_from_counts_by_its_content(tmp_path: Path) -> None:
    def with_weights(path: Path) -> Recipe:
        return load_recipe("digits", {"student": {"name": "timm:resnet18", "weights": str(path)}})

    first, moved = tmp_path / "a.pth", tmp_path / "b.pth"
    first.write_bytes(b"1")
    moved.write_bytes(b"1")
    assert with_weights(first).identity() == with_weights(moved).identity()
    before = plugin_digests(with_weights(first))
    assert before == plugin_digests(with_weights(moved))
    moved.write_bytes(b"2")
    assert plugin_digests(with_weights(moved)) != before


def test_another_folder_of_images_has_no_published_numbers() -> None:
    name = "imagenet100/swin_t-mobilenetv2/kdiffusion-multi"
    assert load_recipe(name).published.top1 == 86.2
    assert load_recipe(name, {"data": {"root": "data/imagenet100"}}).published.top1 == 86.2
    elsewhere = load_recipe(name, {"data": {"root": "photos"}}).published
    assert (elsewhere.top1, elsewhere.teacher, elsewhere.source) == (None, None, "")


def test_other_images_under_the_name_of_cifar_have_no_published_numbers(tmp_path: Path) -> None:
    def published(root: Path) -> float | None:
        return load_recipe("cifar100/vgg13-mobilenetv2/kd", {"data": {"root": str(root)}}).published.top1

    archive, photos = tmp_path / "archive", tmp_path / "photos"
    for folder in (archive / "cifar-100-python", photos / "train" / "cat", photos / "test" / "cat"):
        folder.mkdir(parents=True)
    assert published(archive) == 67.37
    assert published(photos) is None
    assert published(tmp_path / "absent") is None


def test_the_form_of_a_student_is_for_registered_ones_and_not_inherited() -> None:
    full = load_recipe("digits", {"student": {"form": "full"}})
    assert full.student.form == "full"
    assert full.model_dump()["student"] == {"name": "mobilenetv2", "form": "full"}
    assert load_recipe("digits").model_dump()["student"] == {"name": "mobilenetv2"}
    with pytest.raises(ConfigError, match="form is for registered students"):
        load_recipe("digits", {"student": {"name": "torchvision:resnet18", "form": "full"}})
    with pytest.raises(ConfigError, match=r"student\.form = 'large'"):
        load_recipe("digits", {"student": {"form": "large"}})
