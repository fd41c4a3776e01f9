"""Recipes: data, teacher, student, method and schedule of a training run, as TOML; read without importing torch."""

import difflib
import importlib.util
import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from kdexport.core.digests import digest, sha256_file
from kdexport.core.toml import Settings, parse, read_toml
from kdexport.data.datasets import DatasetSpec, dataset_spec, is_cifar100
from kdexport.data.preprocessing import BACKGROUND, Fit, Orientation
from kdexport.data.preprocessing_settings import ColourSetting, Deviation, Mean
from kdexport.data.resampling import Interpolation
from kdexport.errors import ConfigError
from kdexport.plugins import has_plugins
from training.distillers.settings import AnyDistiller, KDiffusionSettings, NonNegative, Positive
from training.shipped_recipes import shipped_names, shipped_recipe


class _GrowingSettings(Settings):
    """A table whose later keys are written only where they have another value than their default.

    A key that came later and has no effect must not make the folders of earlier runs those of other recipes.
    """

    #: Keys that came after the first recipes.
    _later: ClassVar[tuple[str, ...]] = ()

    @model_serializer(mode="wrap")
    def _as_before(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in handler(self).items() if key not in self._later or self._has_set(key)}

    def _has_set(self, key: str) -> bool:
        """Whether ``key`` has another value than its default."""
        return bool(getattr(self, key) != type(self).model_fields[key].get_default(call_default_factory=True))


def _ascending(scale: tuple[float, float]) -> tuple[float, float]:
    if scale[0] > scale[1]:
        raise ValueError("the first part must not be larger than the second one")
    return scale


Part = Annotated[float, Field(gt=0, le=1)]
Probability = Annotated[float, Field(ge=0, le=1)]


class DataSettings(_GrowingSettings):
    """``[data]``: the data set and its augmentation. ``crop_padding`` is used for padded crops only."""

    name: str
    root: str = ""
    image_size: Annotated[int, Field(ge=8, le=1024)] = 32
    #: Pixels of the short side before the central crop at evaluation; 0 means ``image_size``.
    resize: Annotated[int, Field(ge=0)] = 0
    mean: tuple[Mean, Mean, Mean] = (0.5071, 0.4867, 0.4408)
    std: tuple[Deviation, Deviation, Deviation] = (0.2675, 0.2565, 0.2761)
    #: These four are fields of ``kdexport.data.preprocessing.Preprocessing``.
    interpolation: Interpolation = "bilinear"
    fit: Fit = "crop"
    orientation: Orientation = "apply"
    background: ColourSetting | Literal["ignore"] = BACKGROUND
    crop_padding: Annotated[int, Field(ge=0)] = 4
    flip: bool = True
    workers: Annotated[int, Field(ge=0)] = 2
    #: ``padded`` shifts the whole image by up to ``crop_padding`` pixels, ``resized`` is a random part of it, resized.
    #: ``auto`` is padded for images of up to 64 pixels that fit on the device, otherwise resized.
    crop: Literal["auto", "padded", "resized"] = "auto"
    #: The least and the largest part of the area in a resized crop.
    crop_scale: Annotated[tuple[Part, Part], AfterValidator(_ascending)] = (0.08, 1.0)
    #: Random operations on each training image: TrivialAugment (Mueller & Hutter, 2021), RandAugment (Cubuk et al.).
    policy: Literal["none", "trivialaugment", "randaugment"] = "none"
    #: Number and strength (of 30) of the operations of RandAugment.
    policy_operations: Annotated[int, Field(ge=1, le=14)] = 2
    policy_magnitude: Annotated[int, Field(ge=0, le=30)] = 9
    #: The probability that a random rectangle of a training image is erased (Zhong et al., 2020).
    erasing: Probability = 0.0

    _later = ("crop", "crop_scale", "policy", "policy_operations", "policy_magnitude", "erasing")

    @model_validator(mode="after")
    def _augmentation_has_an_effect(self) -> "DataSettings":
        for key in ("policy_operations", "policy_magnitude"):
            if self.policy != "randaugment" and self._has_set(key):
                raise ValueError(f"{key} has no effect without policy = 'randaugment'")
        if self.crop == "padded" and self._has_set("crop_scale"):
            raise ValueError("crop_scale has no effect with crop = 'padded'")
        return self

    @model_validator(mode="after")
    def _covers_the_crop(self) -> "DataSettings":
        if 0 < self.resize < self.image_size:
            raise ValueError(
                f"resize must be 0 or at least image_size, which is {self.image_size}, but is {self.resize}"
            )
        return self

    def spec(self) -> DatasetSpec:
        """The argument of ``kdexport.data.datasets.open_dataset``."""
        return dataset_spec(self.name, self.root)


_WEIGHT_FILES = (".safetensors", ".pt", ".pth", ".ckpt", ".bin", ".tar")
_TAP = re.compile(r"stem|last|stage[1-9]\d?")


def _in_order(taps: dict[str, str]) -> dict[str, str]:
    wrong = [name for name in taps if not _TAP.fullmatch(name)]
    if wrong:
        raise ValueError(f"{wrong[0]!r} is not the name of a tap: use stem, stage1, stage2, ..., last")
    return taps


#: Modules whose outputs are read, by the name of the tap, from shallow to deep: ``{ stage1 = "layer1" }``.
Taps = Annotated[dict[str, str], AfterValidator(_in_order)]


def _is_weight_file(weights: str) -> bool:
    return weights.endswith(_WEIGHT_FILES) or "/" in weights


class _NetworkSettings(_GrowingSettings):
    """What ``[teacher]`` and ``[student]`` have in common.

    ``name`` is registered, or a reference to a network of another origin: ``torchvision:NAME``, ``timm:NAME`` or
    ``MODULE:FACTORY``.
    """

    name: str
    #: Weights of a network of another origin: ``DEFAULT`` or another name of its library, or a file.
    weights: str = ""
    taps: Taps = Field(default_factory=dict)

    _later: ClassVar[tuple[str, ...]] = ("weights", "taps")

    @property
    def is_reference(self) -> bool:
        """Whether the network is of another origin than the registry."""
        return ":" in self.name or self.name.endswith(".pt2")

    @model_validator(mode="after")
    def _keys_have_an_effect(self) -> Self:
        for key in self._foreign_keys():
            if not self.is_reference and self._has_set(key):
                raise ValueError(
                    f"{key} is for networks of another origin (torchvision:NAME, timm:NAME, MODULE:FACTORY), but "
                    f"{self.name!r} is a registered name"
                )
        return self

    def _foreign_keys(self) -> tuple[str, ...]:
        return ("weights", "taps")


class TeacherSettings(_NetworkSettings):
    """``[teacher]``: the network and the file of its weights; without a file it is trained first."""

    checkpoint: str = ""
    epochs: Annotated[int, Field(ge=1)] = 240
    learning_rate: Positive = 0.05
    #: The normalisation with which the teacher was trained, if its weights do not tell; without it, the student's.
    mean: tuple[Mean, Mean, Mean] | None = None
    std: tuple[Deviation, Deviation, Deviation] | None = None
    #: Whether a teacher at chance level, or with its classes in another order, ends the run or is only reported.
    plausibility: Literal["required", "reported"] = "required"
    #: Pixels a side of the images that a teacher of another origin gets; without it, what its weights tell.
    image_size: Annotated[int, Field(ge=8, le=1024)] | None = None

    _later = ("weights", "taps", "plausibility", "image_size")

    @model_validator(mode="before")
    @classmethod
    def _files_are_checkpoints(cls, data: Any) -> Any:
        # All that is done with checkpoints, such as their digests, is then done with it.
        weights = data.get("weights") if isinstance(data, dict) else None
        if not isinstance(weights, str) or not _is_weight_file(weights):
            return data
        if data.get("checkpoint"):
            raise ValueError("weights and checkpoint both name a file; give one of them")
        return {**{key: value for key, value in data.items() if key != "weights"}, "checkpoint": weights}

    def _foreign_keys(self) -> tuple[str, ...]:
        return ("weights", "taps", "image_size")

    @model_validator(mode="after")
    def _normalisation_is_whole(self) -> "TeacherSettings":
        if (self.mean is None) != (self.std is None):
            given, missing = ("mean", "std") if self.std is None else ("std", "mean")
            raise ValueError(f"{given} is given without {missing}; set both, or neither")
        return self


class StudentSettings(_NetworkSettings):
    """``[student]``: the network that is trained."""

    #: Whether a network of another origin starts from the ``DEFAULT`` weights of its library.
    pretrained: bool = False
    #: The definition of a registered student for small images or for ImageNet sizes; ``auto`` follows data.image_size.
    form: Literal["auto", "small", "full"] = "auto"

    _later = ("weights", "taps", "pretrained", "form")

    @property
    def starts_from_a_file(self) -> bool:
        """Whether ``weights`` is a file, and not the name of a library's weights."""
        return _is_weight_file(self.weights)

    def _foreign_keys(self) -> tuple[str, ...]:
        return ("weights", "taps", "pretrained")

    @model_validator(mode="after")
    def _starts_from_one(self) -> Self:
        if self.pretrained and self.weights:
            raise ValueError("pretrained = true means weights = 'DEFAULT'; give one of them")
        if self.is_reference and self._has_set("form"):
            raise ValueError(f"form is for registered students, but {self.name!r} is a network of another origin")
        return self


class TrainSettings(_GrowingSettings):
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
    #: The precision of the frozen teacher; ``auto`` follows ``mixed_precision``.
    teacher_precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    #: Whether teacher and step are compiled; ``auto`` compiles on CUDA.
    compile: Literal["auto", "no", "yes"] = "auto"
    #: Whether a GPU gets the whole step as one CUDA graph; ``auto`` where the recipe allows it.
    capture: Literal["auto", "no", "yes"] = "auto"
    #: The share of each batch in the running statistics of batch norms; without it, that of the network.
    batch_norm_momentum: Annotated[float, Field(gt=0, le=1)] | None = None
    optimizer: Literal["sgd", "adamw"] = "sgd"
    #: Decay of the running means of gradients and of their squares, for AdamW.
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    #: Largest norm of the gradient of all weights; larger ones are scaled down to it. 0 leaves them.
    clip_norm: NonNegative = 0.0
    #: Decay of a running mean of the weights, which is evaluated and handed over in place of the weights; 0 is none.
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.0
    #: The part of each label that is spread over all classes, in the cross-entropy.
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    #: Parameters of the Beta distributions of mixup (Zhang et al., 2018) and CutMix (Yun et al., 2019); 0 is off. With
    #: both, each batch gets one of them.
    mixup: NonNegative = 0.0
    cutmix: NonNegative = 0.0
    #: ``balanced`` gives all classes the same weight in the cross-entropy, however many images they have.
    class_weights: Literal["none", "balanced"] = "none"
    #: ``balanced`` draws images with replacement so that all classes are equally frequent.
    sampling: Literal["shuffled", "balanced"] = "shuffled"
    #: The part of the training images of each class that is left out of the training, to choose the best epoch on.
    validation: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    #: The run ends after so many epochs without a better top-1 on the validation images; 0 is never.
    patience: Annotated[int, Field(ge=0)] = 0
    #: Whether the learning rate is found by a range test before the first epoch, instead of ``learning_rate``.
    find_lr: bool = False
    #: Whether CUDA uses only kernels that give the same bits each time, which are slower; a CPU always does.
    deterministic: bool = False
    #: Services that get the metrics of each epoch besides the files of the run: the names that accelerate knows.
    trackers: tuple[str, ...] = ()

    _later = (
        *("batch_norm_momentum", "optimizer", "betas", "clip_norm", "ema", "label_smoothing", "mixup", "cutmix"),
        *("class_weights", "sampling", "validation", "patience", "find_lr", "deterministic", "trackers", "capture"),
    )

    @model_validator(mode="after")
    def _keys_have_an_effect(self) -> Self:
        effects = {
            "betas": (self.optimizer == "adamw", "optimizer = 'adamw'"),
            "momentum": (self.optimizer == "sgd", "optimizer = 'sgd'; AdamW has betas"),
            "nesterov": (self.optimizer == "sgd", "optimizer = 'sgd'"),
            "patience": (self.validation > 0, "a validation above 0: the test split does not choose the end of a run"),
        }
        for key, (acts, needed) in effects.items():
            if self._has_set(key) and not acts:
                raise ValueError(f"{key} has no effect without {needed}")
        return self


class Published(Settings):
    """``[published]``: the published top-1 in percent and its source; they do not affect the training."""

    teacher: Annotated[float, Field(gt=0, le=100)] | None = None
    top1: Annotated[float, Field(gt=0, le=100)] | None = None
    source: str = ""


class Recipe(Settings):
    """A complete training run.

    The same recipe and data give the same weights on CPUs of one kind, and on GPUs of one kind with
    ``train.deterministic``.
    """

    data: DataSettings
    teacher: TeacherSettings
    student: StudentSettings
    distiller: AnyDistiller = KDiffusionSettings()
    train: TrainSettings = TrainSettings()
    published: Published = Published()

    def identity(self) -> dict[str, Any]:
        """The keys that determine the weights, as JSON values: without paths, threads and published numbers."""
        tables = self.model_dump(mode="json", exclude={"published"})
        # Paths may change between two calls; the caller compares digests of the files.
        tables["data"].update(root="", workers=0)
        tables["teacher"].update(checkpoint="")
        tables["teacher"].pop("plausibility", None)
        for key in ("trackers", "capture"):
            tables["train"].pop(key, None)
        if self.student.starts_from_a_file:
            tables["student"].update(weights="")
        return tables


def load_recipe(source: str, overrides: dict[str, Any] | None = None) -> Recipe:
    """Read a recipe by name or path: the recipes that it extends, then its own keys, then ``overrides`` (nested)."""
    data = read_tables(source)
    recipe = parse(Recipe, _tuples(_extended(data, overrides or {})), f"recipe {source}")
    if _reads_another_set(recipe.data, str(_table(data, "data").get("root", ""))):
        return recipe.model_copy(update={"published": Published()})
    return recipe


def _reads_another_set(data: DataSettings, usual: str) -> bool:
    """Whether the folder of the recipe's CIFAR-100, usually ``usual``, holds other images; then nothing is published.

    A folder that was given and is not there counts as another one.
    """
    if data.name != "cifar100":
        return False
    root = Path(data.root)
    return (root.exists() or data.root != usual) and not is_cifar100(root)


def check_schedule(recipe: Recipe) -> None:
    """Raise ``ConfigError`` if a part of the schedule lies beyond the run, where it cannot act, with what to set."""
    train, distiller = recipe.train, recipe.distiller
    problems = _schedule_problems(train, train.epochs, "train.epochs")
    if distiller.ramp_epochs > train.epochs:
        problems.append(
            (
                f"distiller.ramp_epochs = {distiller.ramp_epochs:g} is longer than train.epochs = {train.epochs}, so "
                "the loss of the method never gets its full weight",
                f"distiller.ramp_epochs={_rounded(train.epochs / 12)}",
            )
        )
    if not recipe.teacher.checkpoint:
        # Epoch by epoch the teacher has the schedule of the student.
        problems += _schedule_problems(train, recipe.teacher.epochs, "teacher.epochs")
    if problems:
        raise ConfigError(
            f"The schedule cannot act: {'; '.join(problem for problem, _ in problems)}.",
            remedy=f"For example: {' '.join(f'--set {setting}' for setting in dict.fromkeys(s for _, s in problems))}",
        )


def _schedule_problems(train: TrainSettings, epochs: int, key: str) -> list[tuple[str, str]]:
    """What cannot act in a run of ``epochs``, which the recipe has at ``key``, each with a setting that can."""
    problems = []
    early = [milestone for milestone in train.milestones if milestone < 1]
    if train.schedule == "step" and (early or sorted(set(train.milestones)) != list(train.milestones)):
        problems.append(
            (
                f"train.milestones = {list(train.milestones)} must be different epochs of 1 or more that rise",
                f"train.milestones={sorted({milestone for milestone in train.milestones if milestone > 0})}",
            )
        )
    if train.warmup_epochs >= epochs:
        problems.append(
            (
                f"train.warmup_epochs = {train.warmup_epochs:g} leaves nothing of {key} = {epochs}",
                f"train.warmup_epochs={_rounded(epochs / 20)}",
            )
        )
    late = [milestone for milestone in train.milestones if milestone >= epochs]
    if train.schedule == "step" and late:
        # The last one is where the CRD protocol has it: at 210 of 240 epochs.
        places = {round(milestone * 0.875 * epochs / max(late)) for milestone in train.milestones}
        scaled = sorted(place for place in places if 0 < place < epochs)
        problems.append(
            (
                f"train.milestones has {', '.join(map(str, late))}, which {key} = {epochs} does not reach",
                f"train.milestones={scaled}" if scaled and key == "train.epochs" else "train.schedule=cosine",
            )
        )
    return problems


def _rounded(epochs: float) -> float:
    return round(epochs, 1) if epochs >= 0.1 else round(epochs, 2)


def plugin_digests(recipe: Recipe) -> dict[str, str]:
    """The sha256 of the sources outside this project that define the student, teacher or distiller, by kind.

    These are plugins, the modules of factories, and the file of weights that the student starts from. Raises
    ``UnknownNameError`` for a name that no plugin registers. Without plugins nothing is imported.
    """
    networks = {"student": recipe.student.name, "teacher": recipe.teacher.name}
    factories = {kind: factory_digest(name) for kind, name in networks.items()}
    start = Path(recipe.student.weights)
    if recipe.student.starts_from_a_file and start.is_file():
        factories["student_weights"] = sha256_file(start)
    return {**_registered_digests(recipe), **{kind: sha256 for kind, sha256 in factories.items() if sha256}}


def factory_digest(name: str) -> str:
    """The sha256 of the source of the factory MODULE:FACTORY: the file, or all Python files, of its top package.

    Empty for another name, and for a module that does not exist: an error when the network is made.
    """
    top = name.partition(":")[0].partition(".")[0]
    if ":" not in name or top in ("torchvision", "timm"):
        return ""
    try:
        found = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        found = None
    folders = [Path(folder) for folder in (found.submodule_search_locations or ())] if found is not None else []
    files = sorted((path.relative_to(folder).as_posix(), path) for folder in folders for path in folder.rglob("*.py"))
    if not folders and found is not None and found.origin is not None and Path(found.origin).is_file():
        files = [("", Path(found.origin))]
    return digest([(place, sha256_file(path)) for place, path in files]) if files else ""


def _registered_digests(recipe: Recipe) -> dict[str, str]:
    if not has_plugins("kdexport.students", "kdexport.teachers", "kdexport.distillers"):
        return {}
    from kdexport.students import STUDENTS
    from training.distillers import DISTILLERS
    from training.teachers import TEACHERS

    found = {
        "student": "" if recipe.student.is_reference else STUDENTS.plugin_digest(recipe.student.name),
        "teacher": "" if recipe.teacher.is_reference else TEACHERS.plugin_digest(recipe.teacher.name),
        "distiller": DISTILLERS.plugin_digest(recipe.distiller.name),
    }
    return {kind: source for kind, source in found.items() if source}


def parse_override(text: str) -> dict[str, Any]:
    """``train.epochs=30`` as nested tables; the value is TOML, or a string if it is not valid TOML."""
    import tomllib

    key, separator, value = text.partition("=")
    if not separator or not all(part.isidentifier() for part in key.split(".")):
        raise ConfigError(f"--set must be KEY=VALUE; got {text!r}.", remedy="For example: --set train.epochs=30")
    try:
        parsed = tomllib.loads(f"v = {value}")["v"]
    except tomllib.TOMLDecodeError:
        parsed = value
    for part in reversed(key.split(".")):
        parsed = {part: parsed}
    return dict(parsed)


def merge_overrides(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Merge nested tables; later ones override earlier ones."""
    merged: dict[str, Any] = {}
    for item in items:
        merged = _merged(merged, item)
    return merged


def read_tables(source: str, seen: tuple[str, ...] = ()) -> dict[str, Any]:
    """The tables of a recipe or part, merged over those that it extends; ``seen`` are the recipes that extend it."""
    path = Path(source) if source.endswith(".toml") else None
    identity = source if path is None else str(path.resolve())
    if identity in seen:
        raise ConfigError(
            f"Recipe {source!r} extends itself: {' -> '.join((*seen, identity))}.",
            remedy="Remove it from `extends` in one of these recipes.",
        )
    data = shipped_recipe(source) if path is None else read_toml(path) if path.is_file() else None
    if data is None:
        raise ConfigError(
            f"There is no recipe {source!r}.",
            remedy=f"{_similar(source)}Run kdexport list recipes for all names, or pass a TOML file.",
        )
    bases = data.pop("extends", [])
    tables: dict[str, Any] = {}
    for base in [bases] if isinstance(bases, str) else _names(bases, source):
        parent = str(path.parent / base) if path is not None and base.endswith(".toml") else base
        tables = _extended(tables, read_tables(parent, (*seen, identity)))
    return _extended(tables, data)


def _names(value: Any, source: str) -> list[str]:
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return value
    raise ConfigError(
        f"`extends` in recipe {source!r} must be a recipe or a list of recipes; got {value!r}.",
        remedy='For example: extends = ["cifar100", "parts/kd"]',
    )


def _similar(name: str) -> str:
    close = difflib.get_close_matches(name, shipped_names(), n=3, cutoff=0.5)
    return f"Did you mean {' or '.join(close)}? " if close else ""


def _extended(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    """``top`` merged over ``base``, without the keys of ``base`` that are facts about what ``top`` replaces.

    Another data set does not inherit the path of the base, and a path makes image folders of the digits; another data
    set or another teacher does not inherit the normalisation of the base's teacher; another data set, pair or method
    has no published numbers of the base, nor has another folder of images, which nothing identifies. Raises
    ``ConfigError`` if only the student would get the normalisation of ``top``, although the base sets one for the
    teacher.
    """
    if _table(base, "data").get("name") == "digits" and _table(top, "data").get("root") and "name" not in top["data"]:
        # The digits are in a package: a folder has other images.
        top = {**top, "data": {**top["data"], "name": "folder:"}}
    if _replaces(base, top, "data"):
        base = _without(base, "data", "root")
    if _replaces(base, top, "data") or _replaces(base, top, "teacher"):
        base = _without(base, "teacher", *_STATISTICS)
    # Names of modules and of weights are of one network.
    for table in ("teacher", "student"):
        if _replaces(base, top, table):
            base = _without(base, table, "taps", "weights", "pretrained", "image_size", "form")
    # Published numbers are of one data set, one pair and one method.
    if _moves_folder(base, top) or any(_replaces(base, top, table) for table in ("data", "teacher", "student")):
        base = {key: value for key, value in base.items() if key != "published"}
    if _replaces(base, top, "distiller"):
        base = _without(base, "published", "top1")
    _require_whole_normalisation(base, top)
    return _merged(base, top)


_STATISTICS = ("mean", "std")


def _table(tables: dict[str, Any], name: str) -> dict[str, Any]:
    value = tables.get(name)
    return value if isinstance(value, dict) else {}


def _replaces(base: dict[str, Any], top: dict[str, Any], table: str) -> bool:
    """Whether ``top`` has another ``name`` in ``table`` than ``base``."""
    old, new = _table(base, table).get("name"), _table(top, table).get("name")
    return old is not None and new is not None and new != old


def _moves_folder(base: dict[str, Any], top: dict[str, Any]) -> bool:
    """Whether ``top`` names another folder of images than ``base``: nothing tells whether it is the same data set."""
    old, new = _table(base, "data"), _table(top, "data").get("root")
    return str(old.get("name", "")).startswith("folder:") and new is not None and new != old.get("root")


def _without(tables: dict[str, Any], name: str, *keys: str) -> dict[str, Any]:
    if not isinstance(tables.get(name), dict):
        return tables
    return {**tables, name: {key: value for key, value in tables[name].items() if key not in keys}}


def _require_whole_normalisation(base: dict[str, Any], top: dict[str, Any]) -> None:
    student, teacher = _table(top, "data"), _table(base, "teacher")
    for key in _STATISTICS:
        if key in student and key in teacher and key not in _table(top, "teacher") and student[key] != teacher[key]:
            raise ConfigError(
                f"data.{key} is changed to {student[key]}, but the recipe below it also sets teacher.{key}, to "
                f"{teacher[key]}: the teacher would keep that one.",
                remedy="Set teacher.mean and teacher.std too, to those with which the teacher was trained, or will be.",
            )


def _merged(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in top.items():
        old = result.get(key)
        result[key] = _merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return result


def _tuples(value: Any) -> Any:
    # TOML has only arrays, but strict validation needs tuples for fixed lengths.
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value
