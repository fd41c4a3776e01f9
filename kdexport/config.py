"""The export configuration of a build, read strictly from TOML: unknown keys and wrong types are errors."""

from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from kdexport.backends.file_interface import FileInterface, OutputKind
from kdexport.backends.pixel_input import FLOAT32, InputKind
from kdexport.core.toml import Settings, parse, read_toml
from kdexport.data.calibration_images import CalibrationSettings
from kdexport.data.preprocessing_settings import PreprocessingSettings
from kdexport.errors import ConfigError, UnknownNameError
from kdexport.origins.references import parse_reference
from kdexport.registry import nearest


class ExportSettings(Settings):
    """``[export]``: the ONNX graph and the shapes that an engine is built for."""

    opset: Annotated[int, Field(ge=18, le=24)] = 20
    min_batch: Annotated[int, Field(ge=1)] = 1
    opt_batch: Annotated[int, Field(ge=1)] = 8
    max_batch: Annotated[int, Field(ge=1, le=4096)] = 64
    #: GPU generations that a TensorRT-RTX engine is built for; empty: all that it supports from Ampere on.
    compute_capabilities: list[str] = Field(default_factory=list)
    #: Memory that the kernels of an engine may use besides weights and activations, MiB; 0: the builder decides.
    workspace_mb: Annotated[int, Field(ge=0)] = 0
    #: Let float32 engines multiply with 10 bits of mantissa (TF32); rung C then limits the error.
    tf32: bool = False
    #: What the files of the targets take: normalised float32 (N,3,S,S), or RGB pixels uint8, which they normalise.
    input: InputKind = FLOAT32
    #: What they give: logits (N,K), or probabilities (N,K) as the first output and logits as the second.
    output: OutputKind = "logits"

    @property
    def interface(self) -> FileInterface:
        """The input and the outputs of the files of the targets."""
        return FileInterface(self.input, self.output)


class SearchSettings(Settings):
    """``[precision_search]``: limits of a precision plan on training images, and the extent of the search."""

    enabled: bool = False
    #: Fractions of the images, compared with the float32 graph; the limits of rung D if not given.
    flips: Annotated[float, Field(ge=0, le=1)] | None = None
    top1_drop: Annotated[float, Field(ge=0, le=1)] | None = None
    #: rms error of the logits relative to their size; no limit if not given.
    noise: Annotated[float, Field(gt=0)] | None = None
    #: At most this many plans are cast and run.
    evaluations: Annotated[int, Field(ge=3, le=1000)] = 24
    images: Annotated[int, Field(ge=16, le=100_000)] = 512


class QuantizeAwareSettings(Settings):
    """``[quantize_aware]``: the folded student is trained further as the int8 graph of its targets.

    ``teacher``: ``recipe`` for the teacher of the recipe, ``student`` for the float32 student itself. The loss is the
    divergence of the logits at ``temperature``, plus ``cross_entropy`` times the cross-entropy with the labels.
    """

    enabled: bool = False
    teacher: Literal["recipe", "student"] = "recipe"
    epochs: Annotated[int, Field(ge=1, le=1000)] = 3
    batch_size: Annotated[int, Field(ge=2, le=4096)] = 32
    #: The change of a weight in one step is at most about this part of the largest weight of its channel.
    learning_rate: Annotated[float, Field(gt=0, le=0.1)] = 5e-4
    temperature: Annotated[float, Field(gt=0, le=100)] = 1.0
    cross_entropy: Annotated[float, Field(ge=0, le=100)] = 0.0
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0


def _golden_count(value: object) -> object:
    if value == "synthetic":
        return 0
    if isinstance(value, str):
        raise ValueError('must be a number of images, or "synthetic"')
    return value


class VerifySettings(Settings):
    """``[verify]``: the number of validation images for rungs A to C, for rung D and for the golden set.

    ``golden``: 0, or "synthetic", puts computed images into the bundle in place of validation images.
    """

    images: Annotated[int, Field(ge=8)] = 512
    task_images: Annotated[int, Field(ge=1)] = 10_000
    golden: Annotated[int, BeforeValidator(_golden_count), Field(ge=0, le=1024)] = 64


class LatencySettings(Settings):
    """``[latency]``: the comparison of the fused with the unfused student, in interleaved pairs."""

    max_slowdown: Annotated[float, Field(gt=0, lt=1)] = 0.02
    #: At most this many new processes; the test looks after 6, 12 and 20 and ends when it has a verdict.
    sessions: Annotated[int, Field(ge=3, le=100)] = 20
    pairs: Annotated[int, Field(ge=10, le=1000)] = 40
    batch: Annotated[int, Field(ge=1)] = 1
    threads: Annotated[int, Field(ge=1)] = 1


class CardSettings(Settings):
    """``[card]``: what the model card in the bundle says and only its owner knows; nothing of it is guessed."""

    #: Identifier of the licence, as on the Hugging Face Hub: "apache-2.0", "mit", "other".
    license: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9.-]*$")] | None = None
    #: Data sets on the Hub.
    datasets: list[str] = Field(default_factory=list)
    tags: list[str] = Field(default_factory=list)


class BuildConfig(Settings):
    """One export configuration: the student and its recipe, and how it is exported and verified."""

    student: str
    targets: list[str] = Field(default_factory=lambda: ["onnx-fp32"])
    #: The name of a recipe in ``training/recipes``, or the path of a TOML file. A trained network needs none.
    recipe: str = ""
    #: Weights of a student of another origin: a file, a name of its library's weights, or "own".
    weights: str = ""
    #: The key or index of the logits, for a network that returns several tensors.
    output: str = ""
    #: What differs from the preprocessing that a network of another origin states.
    preprocessing: PreprocessingSettings = PreprocessingSettings()
    #: Files (relative to this one) and modules that register students, teachers, distillers or backends.
    plugins: list[str] = Field(default_factory=list)
    #: Overrides of recipe keys, as in ``[overrides.train] epochs = 30``.
    overrides: dict[str, dict[str, Any]] = Field(default_factory=dict)
    export: ExportSettings = ExportSettings()
    calibration: CalibrationSettings = CalibrationSettings()
    precision_search: SearchSettings = SearchSettings()
    quantize_aware: QuantizeAwareSettings = QuantizeAwareSettings()
    verify: VerifySettings = VerifySettings()
    latency: LatencySettings = LatencySettings()
    card: CardSettings = CardSettings()
    #: Limits of the ladder that differ from the defaults, as in ``[policy.D.int8] flips = 0.05``.
    policy: dict[str, Any] = Field(default_factory=dict)


def default_config(student: str) -> BuildConfig:
    """The configuration of a student of another origin that has none of its own."""
    return BuildConfig(student=student)


def is_trained_elsewhere(student: str, weights: str | None) -> bool:
    """Whether ``student`` is a network of another origin that comes with its weights, so that nothing is trained."""
    reference = parse_reference(student)
    return reference is not None and (bool(weights) or reference.kind == "program")


def default_out(student: str) -> Path:
    """The folder of the bundle of ``student`` if none was chosen."""
    reference = parse_reference(student)
    return Path("dist") / (student if reference is None else reference.folder_name)


def require_reference(student: str, option: str) -> None:
    """Raise ``ConfigError`` if ``student`` is a registered name, which ``option`` is not for."""
    if parse_reference(student) is None:
        raise ConfigError(
            f"{option} is for students of another origin, and {student} is a registered student.",
            remedy="Pass --checkpoint with the folder of a trained student, or --student timm:NAME, torchvision:NAME, "
            "MODULE:FACTORY or FILE.pt2.",
        )


def _shipped_folders() -> tuple[Path, Path]:
    """The configurations in an installed package, and in a checkout."""
    package = Path(str(resources.files("kdexport")))
    return package / "export_configs", package.parent / "export_configs"


def shipped_config(path: Path) -> Path:
    """``path``, or the configuration of kdexport for ``export_configs/NAME.toml`` where there is no such file."""
    if path.exists() or path.parent != Path("export_configs"):
        return path
    return next((place / path.name for place in _shipped_folders() if (place / path.name).is_file()), path)


def find_config(student: str, folder: Path = Path("export_configs")) -> Path | None:
    """The path of the configuration of ``student``: in ``export_configs`` here, else in kdexport's package.

    None for a student of another origin without one.
    """
    reference = parse_reference(student)
    if reference is not None:
        own = folder / f"{reference.folder_name}.toml"
        return own if own.is_file() else None
    local = folder / f"{student}.toml"
    if local.is_file():
        return local
    for place in _shipped_folders():
        if (place / f"{student}.toml").is_file():
            return place / f"{student}.toml"
    places = (folder, *_shipped_folders())
    known = {path.stem for place in places if place.is_dir() for path in place.glob("*.toml")}
    _require_registered(student, known)
    raise ConfigError(
        f"The student {student!r} has no export configuration.",
        remedy=f'Write {student}.toml with two lines, student = "{student}" and recipe = "digits" (`kdexport list '
        f"recipes` prints all recipes), and pass --config {student}.toml.",
    )


def _require_registered(student: str, configured: set[str]) -> None:
    from kdexport.students import STUDENTS

    if student not in STUDENTS.names():
        raise UnknownNameError(
            f"There is no student or export configuration named {student!r}.",
            remedy=f"{nearest(student, {*configured, *STUDENTS.names()})} Pass --plugin FILE.py for a student of your "
            "own.",
        )


def load_config(path: Path) -> BuildConfig:
    """Read an export configuration; raises ``ConfigError`` for an unknown key or a value out of range."""
    from kdexport.verify.policy import parse_policy

    config = parse(BuildConfig, read_toml(path), str(path))
    if not config.recipe and parse_reference(config.student) is None:
        raise ConfigError(
            f"{path}: the key 'recipe' is missing: {config.student} is trained by a recipe.",
            remedy='Add a line, for example recipe = "digits"; `kdexport list recipes` prints all recipes.',
        )
    export = config.export
    if not export.min_batch <= export.opt_batch <= export.max_batch:
        raise ConfigError(
            f"{path}: [export] needs min_batch <= opt_batch <= max_batch, got {export.min_batch}, {export.opt_batch}, "
            f"{export.max_batch}.",
            remedy="Correct the three batch sizes under [export].",
        )
    parse_policy(config.policy, f"{path}: [policy]")
    return config
