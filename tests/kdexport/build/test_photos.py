"""The configuration that a build on photos gets; the recipe is proposed by a child process, as in a build."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kdexport.build.photos import GivenImages, for_images, to_toml, write_proposed
from kdexport.config import BuildConfig, load_config
from kdexport.errors import ConfigError, DataError
from tests.conftest import run_command

CIFAR = BuildConfig(student="mobilenetv2", recipe="cifar100", targets=["trt-fp16"])


def folders(root: Path, classes: int = 2, images: int = 12, size: tuple[int, int] = (40, 32), split: str = "") -> Path:
    for c in range(classes):
        place = root / split / f"class{c:03}"
        place.mkdir(parents=True)
        for i in range(images):
            pixels = np.random.default_rng(c * 1000 + i).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
            Image.fromarray(pixels).save(place / f"{i}.png")
    return root


def given(data: Path | None, **changes: object) -> GivenImages:
    settings = {"image_size": None, "has_config": False, "has_checkpoint": False} | changes
    return GivenImages(data=None if data is None else str(data), **settings)  # type: ignore[arg-type]


def test_photos_get_a_recipe_that_is_told_and_can_be_passed_back(tmp_path: Path) -> None:
    data, lines = folders(tmp_path / "my photos \u00e9"), list[str]()
    config, is_proposed = for_images(CIFAR, given(data), lines.append)
    assert is_proposed
    assert (config.recipe, config.targets) == ("parts/photos", ["trt-fp16"])
    assert (config.overrides["data"]["root"], config.overrides["data"]["image_size"]) == (str(data), 32)
    assert len(lines) == 1
    assert f"because {data} is not CIFAR-100 and no --config was given: mobilenetv2 at 32 pixels" in lines[0]
    write_proposed(tmp_path / "mine.toml", config, is_proposed=True)
    assert load_config(tmp_path / "mine.toml") == config
    with pytest.raises(ConfigError, match="exists"):
        write_proposed(tmp_path / "mine.toml", config, is_proposed=True)


def test_cifar_in_folders_keeps_its_configuration(tmp_path: Path) -> None:
    cifar = folders(tmp_path / "cifar", classes=100, images=1, size=(32, 32), split="train")
    assert for_images(CIFAR, given(cifar)) == (CIFAR, False)
    archive = tmp_path / "archive"
    (archive / "cifar-100-python").mkdir(parents=True)
    (archive / "cifar-100-python" / "meta").touch()
    assert for_images(CIFAR, given(archive)) == (CIFAR, False)


@pytest.mark.parametrize("changes", [{"has_config": True}, {"data": None}, {"recipe": "digits"}, {"name": "folder:"}])
def test_a_configuration_that_the_user_chose_is_kept(tmp_path: Path, changes: dict[str, object]) -> None:
    data = None if "data" in changes else folders(tmp_path / "photos")
    own = CIFAR.model_copy(update={"recipe": changes.get("recipe", "cifar100")})
    if "name" in changes:
        own = own.model_copy(update={"overrides": {"data": {"name": changes["name"]}}})
    assert for_images(own, given(data, has_config=bool(changes.get("has_config")))) == (own, False)


def test_the_size_goes_where_it_acts(tmp_path: Path) -> None:
    trained, _ = for_images(CIFAR, given(None, image_size=64))
    assert trained.overrides == {"data": {"image_size": 64}}
    imported = BuildConfig(student="torchvision:resnet18", weights="DEFAULT")
    sized, is_proposed = for_images(imported, given(tmp_path, image_size=64))
    assert (sized.preprocessing.image_size, sized.overrides, is_proposed) == (64, {}, False)
    with pytest.raises(ConfigError, match="cannot change a trained student"):
        for_images(CIFAR, given(None, image_size=64, has_checkpoint=True))


def test_a_trained_student_needs_no_recipe_for_photos(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"There is no folder .*missing"):
        for_images(CIFAR, given(tmp_path / "missing"))
    config, is_proposed = for_images(CIFAR, given(folders(tmp_path / "photos"), has_checkpoint=True))
    assert (config.recipe, config.overrides, config.targets, is_proposed) == ("", {}, ["trt-fp16"], False)


def test_another_configuration_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has another one"):
        write_proposed(tmp_path / "mine.toml", CIFAR, is_proposed=False)
    assert not (tmp_path / "mine.toml").exists()


def test_any_path_survives_the_file(tmp_path: Path) -> None:
    for index, root in enumerate(('a "quoted" \\ path', "tab\tand\x7f", "a = [1] # \u2028")):
        config = BuildConfig(student="mobilenetv2", recipe="parts/photos", overrides={"data": {"root": root}})
        path = tmp_path / f"{index}.toml"
        path.write_text(to_toml(config), encoding="utf-8")
        assert load_config(path) == config


def test_the_documented_command_writes_what_the_documented_build_reads(tmp_path: Path) -> None:
    page = (Path(__file__).parents[3] / "docs" / "training.md").read_text()
    section = page.split("## Your own photos")[1].split("\n## ")[0]
    one, write, build = (shlex.split(line) for line in re.findall(r"^    kdexport (.*)$", section, flags=re.MULTILINE))
    assert write[: len(one)] == one
    folders(tmp_path / "photos")
    done = run_command(*write, cwd=tmp_path)
    assert done.exit_code == 0, done.stderr
    assert done.stderr.count("\n") == 1
    config = load_config(tmp_path / build[build.index("--config") + 1])
    assert config.overrides["data"]["image_size"] == 224
    assert config.overrides["teacher"]["name"] == "torchvision:resnet18"
