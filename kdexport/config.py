"""Strict reading of TOML: every key is known, every type is right, and an error names the nearest key."""

import tomllib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kdexport.errors import ConfigError, UnknownNameError
from kdexport.registry import nearest


class Settings(BaseModel):
    """Base of all configuration: frozen, no unknown key, no conversion of types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    @classmethod
    def model_of(cls, data: Mapping[str, Any]) -> type["Settings"]:  # noqa: ARG003
        """The model that reads ``data``: this one, unless a key of it chooses among several."""
        return cls


class ExportSettings(Settings):
    """``[export]``: the ONNX graph and the shapes that an engine is built for."""

    opset: Annotated[int, Field(ge=18, le=24)] = 20
    min_batch: Annotated[int, Field(ge=1)] = 1
    opt_batch: Annotated[int, Field(ge=1)] = 8
    max_batch: Annotated[int, Field(ge=1, le=4096)] = 64
    #: GPU generations a TensorRT-RTX engine is built for; its default is every one it knows from Ampere on.
    compute_capabilities: list[str] = []
    #: Memory that an engine's kernels may use beside its weights and activations, MiB; 0 leaves it to the builder.
    workspace_mb: Annotated[int, Field(ge=0)] = 0
    #: Let float32 engines multiply with 10 bits of mantissa; rung B then says what that costs.
    tf32: bool = False


class CalibrationSettings(Settings):
    """``[calibration]``: how int8 finds the range of each tensor, always on training images."""

    method: Literal["minmax", "entropy", "percentile"] = "minmax"
    images: Annotated[int, Field(ge=1, le=100_000)] = 256
    #: For ``percentile``: how many per cent of the values an activation's levels hold.
    percentile: Annotated[float, Field(gt=50, le=100)] = 99.99
    #: Bits of a weight for CPUs. With 8, processors without VNNI saturate inside OpenVINO and in Triton.
    weight_bits: Literal[7, 8] = 7


class SearchSettings(Settings):
    """``[precision_search]``: which layers int8 is not to compute; what a plan may cost on training images."""

    enabled: bool = False
    #: Shares of the images against the float32 graph; those of rung D's policy where they are not given.
    flips: Annotated[float, Field(ge=0, le=1)] | None = None
    top1_drop: Annotated[float, Field(ge=0, le=1)] | None = None
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
    targets: list[str] = ["onnx-fp32"]
    #: A recipe of ``training/recipes`` by name, or the path of a TOML file.
    recipe: str
    #: Overrides of recipe keys, as in ``[overrides.train] epochs = 30``.
    overrides: dict[str, dict[str, Any]] = {}
    export: ExportSettings = ExportSettings()
    calibration: CalibrationSettings = CalibrationSettings()
    precision_search: SearchSettings = SearchSettings()
    verify: VerifySettings = VerifySettings()
    latency: LatencySettings = LatencySettings()
    #: Limits of the ladder that differ from the defaults, as in ``[policy.D.int8] flips = 0.05``.
    policy: dict[str, Any] = {}


M = TypeVar("M", bound=BaseModel)


def read_toml(path: Path) -> dict[str, Any]:
    """Parse a TOML file; raises ``ConfigError`` with the line of a syntax error."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"There is no file {path}.", remedy="Check the path.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}.", remedy="Check the file and its permissions.") from error
    # A number of thousands of digits is a ValueError, nesting without end a RecursionError.
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}.", remedy="Correct the line that is named.") from error


def parse(model: type[M], data: Mapping[str, Any], source: str) -> M:
    """Validate ``data`` against ``model``; raises ``ConfigError`` with each wrong key and the nearest known one."""
    try:
        return model.model_validate(dict(data))
    except ValidationError as error:
        problems = [
            _problem(model, data, item["type"], item["loc"], item["msg"], item["input"]) for item in error.errors()
        ]
        raise ConfigError(
            f"{source}: {problems[0]}" if len(problems) == 1 else f"{source}:\n  " + "\n  ".join(problems),
            remedy="Correct the file or the option; nothing was started.",
        ) from None


def _problem(
    model: type[BaseModel], data: Any, kind: str, location: tuple[int | str, ...], text: str, value: Any
) -> str:
    key = ".".join(str(part) for part in location)
    if kind == "extra_forbidden":
        known = _fields_at(model, data, location[:-1])
        return f"unknown key {key!r}. {nearest(str(location[-1]), known)}" if known else f"unknown key {key!r}."
    if kind == "missing":
        return f"the key {key!r} is missing."
    return f"{key} = {value!r} ({type(value).__name__}): {text[:1].lower()}{text[1:]}."


def _fields_at(model: type[BaseModel], data: Any, location: tuple[int | str, ...]) -> list[str]:
    current: Any = model
    for part in location:
        field = current.model_fields.get(str(part)) if isinstance(part, str) else None
        if field is None:
            return []
        current = next(
            (t for t in (field.annotation, *get_args(field.annotation)) if _is_model(t)),
            None,
        )
        if current is None:
            return []
        data = data.get(part) if isinstance(data, Mapping) else None
        if issubclass(current, Settings) and isinstance(data, Mapping):
            current = current.model_of(data)
    return list(current.model_fields)


def _is_model(candidate: Any) -> bool:
    return isinstance(candidate, type) and issubclass(candidate, BaseModel)


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
    known = [path.stem for place in (folder, packaged, checkout) if place.is_dir() for path in place.glob("*.toml")]
    raise UnknownNameError(
        f"There is no student {student!r} with an export configuration.",
        remedy=f"Pass --config FILE for a student of your own. {nearest(student, set(known))}",
    )


def load_config(path: Path) -> BuildConfig:
    """Read an export configuration."""
    from kdexport.policy import parse_policy

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
