"""Recipes: what is trained, by what, on what, for how long; one TOML file each, resolved without importing torch."""

from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from kdexport.config import Settings, parse, read_toml
from kdexport.data import DatasetSpec, dataset_spec
from kdexport.errors import ConfigError
from kdexport.registry import nearest
from training.methods import AnyDistiller, KDiffusionSettings, NonNegative, Positive

Finite = Annotated[float, Field(allow_inf_nan=False)]


class DataSettings(Settings):
    """``[data]``: the set and how it is augmented. ``crop_padding`` and ``flip`` act on small images."""

    name: str
    root: str = ""
    image_size: Annotated[int, Field(ge=8, le=1024)] = 32
    #: Pixels of the short side before the central crop at evaluation; 0 means ``image_size``.
    resize: Annotated[int, Field(ge=0)] = 0
    mean: tuple[Finite, Finite, Finite] = (0.5071, 0.4867, 0.4408)
    std: tuple[Positive, Positive, Positive] = (0.2675, 0.2565, 0.2761)
    crop_padding: Annotated[int, Field(ge=0)] = 4
    flip: bool = True
    workers: Annotated[int, Field(ge=0)] = 2

    @model_validator(mode="after")
    def _covers_the_crop(self) -> "DataSettings":
        if 0 < self.resize < self.image_size:
            raise ValueError(f"resize {self.resize} is smaller than the crop of {self.image_size} pixels")
        return self

    def spec(self) -> DatasetSpec:
        """What ``kdexport.data.open_dataset`` takes."""
        return dataset_spec(self.name, self.root)


class TeacherSettings(Settings):
    """``[teacher]``: the network, and its weights where they exist; without them it is trained first."""

    name: str
    checkpoint: str = ""
    epochs: Annotated[int, Field(ge=1)] = 240
    learning_rate: Positive = 0.05
    #: Channel means in whose space the teacher was trained; empty means the student's.
    mean: tuple[Finite, Finite, Finite] | None = None
    std: tuple[Positive, Positive, Positive] | None = None


class StudentSettings(Settings):
    """``[student]``."""

    name: str


class TrainSettings(Settings):
    """``[train]``: the optimiser and its schedule; the defaults are the CRD protocol for mobile students."""

    epochs: Annotated[int, Field(ge=1)] = 240
    batch_size: Annotated[int, Field(ge=2)] = 64
    learning_rate: Positive = 0.01
    schedule: Literal["step", "cosine"] = "step"
    milestones: tuple[int, ...] = (150, 180, 210)
    warmup_epochs: NonNegative = 0.0
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: NonNegative = 5e-4
    nesterov: bool = False
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    #: ``auto`` is bf16 on CUDA and full precision on the CPU.
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    #: The frozen teacher's own precision; ``auto`` follows ``mixed_precision``.
    teacher_precision: Literal["auto", "no", "bf16", "fp16"] = "auto"


class Recipe(Settings):
    """A training run, complete: the same recipe and data give the same weights on one kind of machine."""

    data: DataSettings
    teacher: TeacherSettings
    student: StudentSettings
    distiller: AnyDistiller = KDiffusionSettings()
    train: TrainSettings = TrainSettings()


def recipe_names() -> list[str]:
    """Recipes that ship with the package."""
    return sorted(path.name.removesuffix(".toml") for path in _shipped().iterdir() if path.name.endswith(".toml"))


def load_recipe(source: str, overrides: dict[str, Any] | None = None) -> Recipe:
    """Read a recipe by name or path, its ``extends`` chain first, then apply ``overrides`` (nested tables)."""
    data = _tables(source, ())
    return parse(Recipe, _tuples(_merged(data, overrides or {})), f"recipe {source}")


def parse_override(text: str) -> dict[str, Any]:
    """``train.epochs=30`` as nested tables; the value is TOML, or a bare string where it is none."""
    import tomllib

    key, separator, value = text.partition("=")
    if not separator or not all(part.isidentifier() for part in key.split(".")):
        raise ConfigError(f"--set {text!r} is not KEY=VALUE.", remedy="For example --set train.epochs=30")
    try:
        parsed = tomllib.loads(f"v = {value}")["v"]
    except tomllib.TOMLDecodeError:
        parsed = value
    for part in reversed(key.split(".")):
        parsed = {part: parsed}
    return dict(parsed)


def merge_overrides(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Nested tables laid over each other, the last one on top."""
    merged: dict[str, Any] = {}
    for item in items:
        merged = _merged(merged, item)
    return merged


def _shipped() -> Path:
    return Path(str(resources.files("training"))) / "recipes"


def _tables(source: str, seen: tuple[str, ...]) -> dict[str, Any]:
    path = Path(source) if source.endswith(".toml") else _shipped() / f"{source}.toml"
    if not path.is_file():
        raise ConfigError(
            f"There is no recipe {source!r}.", remedy=f"Pass a TOML file or a name. {nearest(source, recipe_names())}"
        )
    identity = str(path.resolve())
    if identity in seen:
        raise ConfigError(f"Recipe {source!r} extends itself.", remedy=f"Break the chain {' -> '.join(seen)}.")
    data = read_toml(path)
    base = data.pop("extends", None)
    if base is None:
        return data
    parent = str(path.parent / base) if str(base).endswith(".toml") else str(base)
    return _merged(_tables(parent, (*seen, identity)), data)


def _merged(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in top.items():
        below = result.get(key)
        result[key] = _merged(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return result


def _tuples(value: Any) -> Any:
    # TOML has arrays only; strict validation asks for tuples where the length is fixed.
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value
