"""Strict reading of TOML: every key is known, every type is right, and an error names the nearest key."""

from importlib import resources
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from kdexport.core.toml import Settings, parse, read_toml
from kdexport.data.calibration_images import CalibrationSettings
from kdexport.errors import ConfigError, UnknownNameError
from kdexport.registry import nearest


class ExportSettings(Settings):
    """``[export]``: the ONNX graph and the shapes that an engine is built for."""

    opset: Annotated[int, Field(ge=18, le=24)] = 20
    min_batch: Annotated[int, Field(ge=1)] = 1
    opt_batch: Annotated[int, Field(ge=1)] = 8
    max_batch: Annotated[int, Field(ge=1, le=4096)] = 64
    #: GPU generations a TensorRT-RTX engine is built for; its default is every one it knows from Ampere on.
    compute_capabilities: list[str] = Field(default_factory=list)
    #: Memory that an engine's kernels may use beside its weights and activations, MiB; 0 leaves it to the builder.
    workspace_mb: Annotated[int, Field(ge=0)] = 0
    #: Let float32 engines multiply with 10 bits of mantissa; rung B then says what that costs.
    tf32: bool = False


class SearchSettings(Settings):
    """``[precision_search]``: which layers int8 is not to compute; what a plan may cost on training images."""

    enabled: bool = False
    #: Shares of the images against the float32 graph; those of rung D's policy where they are not given.
    flips: Annotated[float, Field(ge=0, le=1)] | None = None
    top1_drop: Annotated[float, Field(ge=0, le=1)] | None = None
    #: rms error of the logits relative to their size; no limit where it is not given.
    noise: Annotated[float, Field(gt=0)] | None = None
    #: At most this many plans are cast and run.
    evaluations: Annotated[int, Field(ge=3, le=1000)] = 24
    images: Annotated[int, Field(ge=16, le=100_000)] = 512


class VerifySettings(Settings):
    """``[verify]``: how many validation images rungs A to C, rung D and the golden set take."""

    images: Annotated[int, Field(ge=8)] = 512
    task_images: Annotated[int, Field(ge=1)] = 10_000
    golden: Annotated[int, Field(ge=1, le=1024)] = 64


class LatencySettings(Settings):
    """``[latency]``: the interleaved comparison of the fused with the unfused student."""

    max_slowdown: Annotated[float, Field(gt=0, lt=1)] = 0.02
    #: At most this many fresh processes; the test looks after 6, 12 and 20 and ends as soon as it is sure.
    sessions: Annotated[int, Field(ge=3, le=100)] = 20
    pairs: Annotated[int, Field(ge=10, le=1000)] = 40
    batch: Annotated[int, Field(ge=1)] = 1
    threads: Annotated[int, Field(ge=1)] = 1


class BuildConfig(Settings):
    """One export configuration: what is trained, on what, and how it is exported and verified."""

    student: str
    targets: list[str] = Field(default_factory=lambda: ["onnx-fp32"])
    #: A recipe of ``training/recipes`` by name, or the path of a TOML file.
    recipe: str
    #: Files (relative to this one) and modules that register students, teachers, distillers or backends.
    plugins: list[str] = Field(default_factory=list)
    #: Overrides of recipe keys, as in ``[overrides.train] epochs = 30``.
    overrides: dict[str, dict[str, Any]] = Field(default_factory=dict)
    export: ExportSettings = ExportSettings()
    calibration: CalibrationSettings = CalibrationSettings()
    precision_search: SearchSettings = SearchSettings()
    verify: VerifySettings = VerifySettings()
    latency: LatencySettings = LatencySettings()
    #: Limits of the ladder that differ from the defaults, as in ``[policy.D.int8] flips = 0.05``.
    policy: dict[str, Any] = Field(default_factory=dict)


def find_config(student: str, folder: Path = Path("export_configs")) -> Path:
    """The configuration of ``student``: one in ``export_configs`` here, else the one that ships with kdexport."""
    local = folder / f"{student}.toml"
    if local.is_file():
        return local
    packaged = Path(str(resources.files("kdexport"))) / "export_configs"
    checkout = Path(str(resources.files("kdexport"))).parent / "export_configs"
    for place in (packaged, checkout):
        if (place / f"{student}.toml").is_file():
            return place / f"{student}.toml"
    known = {path.stem for place in (folder, packaged, checkout) if place.is_dir() for path in place.glob("*.toml")}
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
    """Read an export configuration."""
    from kdexport.verify.policy import parse_policy

    config = parse(BuildConfig, read_toml(path), str(path))
    export = config.export
    if not export.min_batch <= export.opt_batch <= export.max_batch:
        raise ConfigError(
            f"{path}: [export] needs min_batch <= opt_batch <= max_batch, got {export.min_batch}, {export.opt_batch}, "
            f"{export.max_batch}.",
            remedy="Correct the three batch sizes.",
        )
    parse_policy(config.policy, f"{path}: [policy]")
    return config
