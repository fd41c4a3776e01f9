"""The machine that measures: what it is, whether it can hold the measurement, and what it was calibrated to see."""

import json
import math
import os
import platform
import tomllib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kdexport.errors import ConfigError
from kdexport.fingerprint import tool_versions
from kdexport.gate.errors import ResolutionError, RunnerError
from kdexport.gate.sessions import usable_cpus
from kdexport.targets import gpu_fingerprint

SCHEMA = "kdexport.runner/1"


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """What latencies depend on besides the model."""

    cpu: str
    cores: int
    system: str
    onnxruntime: str
    gpu: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """What equal arms did on one machine: ``gates`` whole A/A gates, and the sessions of all of them together.

    ``session_deviation`` and ``mde`` are log ratios; ``mde`` is what a limit must not lie below. ``false_fail_high`` is
    the exact 95 % upper bound of the share of false FAILs; ``resampled_false_fails`` the same share over gates drawn
    from the measured sessions.
    """

    machine: Machine
    measured: str
    model: str
    clock: str
    batch: int
    threads: int
    pairs: int
    max_slowdown: float
    sessions: int
    session_deviation: float
    mde: float
    gates: int
    false_fails: int
    false_fail_high: float
    inconclusive: int
    resampled_false_fails: float
    median_gate_seconds: float
    load: float

    @property
    def smallest_slowdown(self) -> float:
        """The smallest --max-slowdown that this machine can enforce, rounded up to a tenth of a percent."""
        return math.ceil(math.expm1(self.mde) * 1000 - 1e-9) / 1000


def this_machine() -> Machine:
    """The machine that runs this."""
    versions = tool_versions("onnxruntime-gpu", "onnxruntime")
    return Machine(
        cpu=_cpu_model(),
        cores=len(usable_cpus()),
        system=f"{platform.system()} {platform.machine()}",
        onnxruntime=next((version for version in versions.values() if version != "absent"), "absent"),
        gpu="; ".join(gpu_fingerprint()),
    )


def require_cores(threads: int) -> None:
    """Raise ``RunnerError`` where sessions of ``threads`` threads would share processors."""
    cores = len(usable_cpus())
    if threads > cores:
        raise RunnerError(
            f"{threads} threads were asked for, and this process may use {cores} processors.",
            remedy=f"Pass --threads {cores} or fewer, or use a larger machine.",
        )


def require_resolution(calibration: Calibration, max_slowdown: float) -> None:
    """Raise ``ResolutionError`` for a threshold that the calibrated machine cannot see."""
    if math.log1p(max_slowdown) < calibration.mde:
        raise ResolutionError(
            f"This runner cannot enforce {max_slowdown:.1%}: equal arms differ by {calibration.session_deviation:.2%} "
            f"between sessions, so that it can enforce {calibration.smallest_slowdown:.1%}.",
            remedy=f"Pass --max-slowdown {calibration.smallest_slowdown:.1%}, or calibrate a quieter machine.",
        )


def write_calibration(calibration: Calibration, path: Path) -> None:
    """Write runner.toml, whole or not at all."""
    data = asdict(calibration)
    machine = data.pop("machine")
    lines = [
        "# Written by `kdexport calibrate-runner`; `kdexport gate` refuses thresholds below what was seen here.",
        f"schema = {json.dumps(SCHEMA)}",
        *(f"{key} = {_toml(value)}" for key, value in data.items()),
        "",
        "[machine]",
        *(f"{key} = {_toml(value)}" for key, value in machine.items()),
    ]
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    partial.write_text("\n".join(lines) + "\n", encoding="utf-8")
    partial.replace(path)


def read_calibration(path: Path) -> Calibration:
    """Read runner.toml; raises ``ConfigError`` where it is not one."""
    from kdexport.config import read_toml

    data = read_toml(path)
    try:
        if data.pop("schema") != SCHEMA:
            raise ValueError(f"its schema is not {SCHEMA}")
        return _checked(data)
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{path} was not written by `kdexport calibrate-runner` of this version: {error}.",
            remedy="Run `kdexport calibrate-runner` again.",
        ) from None


def _checked(data: dict[str, Any]) -> Calibration:
    calibration = Calibration(**{**data, "machine": Machine(**data["machine"])})
    for name in ("mde", "session_deviation", "max_slowdown"):
        value = getattr(calibration, name)
        if not isinstance(value, float) or not 0 <= value < 10:
            raise ValueError(f"{name} is {value!r}")
    return calibration


def _toml(value: object) -> str:
    text = json.dumps(value, ensure_ascii=True) if isinstance(value, str) else repr(value)
    # What is written must be read back as it is: TOML knows floats that repr does not, and the other way round.
    if tomllib.loads(f"x = {text}")["x"] != value:
        raise ValueError(f"{value!r} has no form in TOML")
    return text


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "Model", "CPU part"))]
    return named[0] if named else platform.processor() or "unknown"
