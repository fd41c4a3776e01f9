"""The export configuration of a student that is trained on a folder of images, if the user gave none."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdexport.build.train import propose_recipe
from kdexport.config import BuildConfig, is_trained_elsewhere
from kdexport.core.files import write_text
from kdexport.data.datasets import is_cifar100, require_folder
from kdexport.errors import ConfigError

_CIFAR_RECIPES = "cifar100"


@dataclass(frozen=True, kw_only=True, slots=True)
class GivenImages:
    """The options of a build on its images, and whether it has a configuration (``--config``) and a trained student."""

    data: str | None
    image_size: int | None
    has_config: bool
    has_checkpoint: bool


def for_images(
    config: BuildConfig, given: GivenImages, say: Callable[[str], None] = lambda _: None
) -> tuple[BuildConfig, bool]:
    """``config`` for the images of a build, and whether its recipe was proposed for them.

    A recipe is proposed for a training without ``--config`` on images that are not those of the configuration of the
    student; ``say`` gets one line on what was chosen and why. Raises ``DataError`` if there is no such folder, or no
    folders of classes in it, and ``ConfigError`` for a size where the size is fixed.
    """
    if given.has_checkpoint and given.image_size is not None:
        raise ConfigError(
            "--image-size cannot change a trained student, whose checkpoint states the size of its images.",
            remedy="Omit --image-size.",
        )
    if is_trained_elsewhere(config.student, config.weights):
        return _imported_with_size(config, given.image_size), False
    if given.data is not None and not given.has_config and not given.has_checkpoint:
        # Before a place of data or of a teacher that the user did not name is missed.
        require_folder(Path(given.data))
    if given.has_config or given.data is None or not _needs_recipe(config, Path(given.data)):
        return _trained_with_size(config, given.image_size), False
    if given.has_checkpoint:
        return config.model_copy(update={"recipe": "", "overrides": {}}), False
    proposed = propose_recipe(given.data, config.student, given.image_size)
    tables: dict[str, dict[str, Any]] = proposed["tables"]
    tables["data"] = {"root": given.data, **tables["data"]}
    reason = f"{given.data} is not CIFAR-100" if config.recipe else f"{config.student} has no recipe of its own"
    say(f"recipe for photos, because {reason} and no --config was given: {proposed['summary']}")
    return config.model_copy(update={"recipe": proposed["base"], "overrides": tables}), True


def _needs_recipe(config: BuildConfig, data: Path) -> bool:
    """Whether images at ``data`` need another recipe than that of ``config``.

    The configurations of the registered students are for CIFAR-100; one for another data set is the user's own.
    """
    if not config.recipe:
        return True
    is_for_cifar = config.recipe.partition("/")[0] == _CIFAR_RECIPES and "name" not in config.overrides.get("data", {})
    return is_for_cifar and data.is_dir() and not is_cifar100(data)


def _imported_with_size(config: BuildConfig, image_size: int | None) -> BuildConfig:
    if image_size is None:
        return config
    sized = config.preprocessing.model_copy(update={"image_size": image_size})
    return config.model_copy(update={"preprocessing": sized})


def _trained_with_size(config: BuildConfig, image_size: int | None) -> BuildConfig:
    if image_size is None:
        return config
    sized = {**config.overrides.get("data", {}), "image_size": image_size}
    return config.model_copy(update={"overrides": {**config.overrides, "data": sized}})


def write_proposed(path: Path, config: BuildConfig, *, is_proposed: bool) -> None:
    """Write a configuration with a proposed recipe as TOML for editing.

    Raises ``ConfigError`` for another configuration, for a file that exists, and for a path that is not text.
    """
    if not is_proposed:
        raise ConfigError(
            "--write-config writes the configuration of a training on photos, and this build has another one.",
            remedy="Pass --student and --data DIR with images other than CIFAR-100, without --config, --checkpoint and "
            "--weights.",
        )
    if path.exists():
        raise ConfigError(f"{path} exists and is not overwritten.", remedy="Pass another file with --write-config.")
    text = to_toml(config)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ConfigError(
            f"The path {config.overrides['data']['root']!a} is not text in UTF-8.", remedy="Rename the folder."
        ) from None
    write_text(path, text)


def to_toml(config: BuildConfig) -> str:
    """What differs from the defaults of a configuration, as TOML with a few words of advice."""
    values = config.model_dump(mode="json", exclude_defaults=True, exclude={"overrides"})
    top = {key: value for key, value in values.items() if not isinstance(value, dict)}
    tables = {key: value for key, value in values.items() if isinstance(value, dict)}
    lines = [
        "# Edit, then run: kdexport build --config THIS_FILE",
        "# All keys of a recipe: docs/training.md; of a configuration: export_configs/ and docs/targets.md.",
        *_assignments(top),
    ]
    for name, table in config.overrides.items():
        lines += ["", f"[overrides.{name}]", *_assignments(table), *_advice(name, table)]
    for name, table in tables.items():
        lines += ["", f"{name} = {_value(table)}"] if not table else ["", f"[{name}]", *_assignments(table)]
    return "\n".join(lines) + "\n"


def _advice(name: str, table: dict[str, Any]) -> list[str]:
    if name == "teacher" and str(table.get("name", "")).startswith("torchvision:"):
        return ['# weights = "DEFAULT"  # those of ImageNet, which torchvision downloads, instead of a training']
    return []


def _assignments(table: dict[str, Any]) -> list[str]:
    return [f"{_key(key)} = {_value(value)}" for key, value in table.items()]


def _key(key: str) -> str:
    return key if key.replace("_", "").replace("-", "").isalnum() and key.isascii() else _value(key)


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return f"{{ {', '.join(_assignments(value))} }}" if value else "{}"
    if isinstance(value, list):
        return f"[{', '.join(map(_value, value))}]"
    # JSON scalars are TOML values; a deleted character is not, unless it is escaped.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
