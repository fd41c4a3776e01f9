"""Targets are ``<backend>-<precision>``: what they need, and whether this machine has it."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from kdexport.errors import BackendUnavailableError, ConfigError, UnknownNameError
from kdexport.registry import nearest

#: Backends with what they are; their precisions are those that are built and audited today.
BACKENDS = {
    "onnx": ("onnxruntime", ("fp32",)),
    "trt": ("TensorRT, needs a GPU", ("fp32", "fp16")),
    "trt-rtx": ("TensorRT-RTX, builds without a GPU", ("fp32", "fp16")),
}


@dataclass(frozen=True, slots=True)
class Target:
    """A backend and a precision."""

    backend: str
    precision: str

    def __str__(self) -> str:
        return f"{self.backend}-{self.precision}"

    @property
    def needs_engine(self) -> bool:
        """Whether a plan is compiled from the ONNX file."""
        return self.backend != "onnx"


def target_names() -> tuple[str, ...]:
    """All targets that can be asked for."""
    return tuple(f"{backend}-{precision}" for backend, (_, kinds) in BACKENDS.items() for precision in kinds)


def parse_target(name: str) -> Target:
    """``trt-rtx-fp16`` as a ``Target``; raises ``UnknownNameError`` with the nearest names."""
    backend, _, precision = name.rpartition("-")
    if name not in target_names():
        raise UnknownNameError(f"There is no target named {name!r}.", remedy=nearest(name, target_names()))
    return Target(backend, precision)


def parse_targets(names: list[str]) -> tuple[Target, ...]:
    """Several targets, each once; raises ``ConfigError`` for none."""
    targets = tuple(dict.fromkeys(parse_target(name) for name in names))
    if not targets:
        raise ConfigError("No target was given.", remedy=f"Pass --target; known: {', '.join(target_names())}.")
    return targets


def gpu_fingerprint() -> list[str]:
    """Driver version and models of NVIDIA GPUs as the driver tells them, without loading it; empty without a GPU."""
    driver = Path("/proc/driver/nvidia")
    if not (driver / "version").is_file():
        return []
    lines = [(driver / "version").read_text().splitlines()[0]]
    for info in sorted(driver.glob("gpus/*/information")):
        lines += [line for line in info.read_text().splitlines() if line.startswith("Model:")]
    return lines


def unavailable(target: Target) -> tuple[str, str] | None:
    """(what is missing, what to do) where ``target`` cannot be built on this machine, else None."""
    if target.backend == "trt-rtx" and importlib.util.find_spec("tensorrt_rtx") is None:
        return "TensorRT-RTX is not installed", "pip install 'kdexport[trt-rtx]'"
    if target.backend == "trt":
        if importlib.util.find_spec("tensorrt") is None:
            return (
                "TensorRT is not installed",
                "Install it from NVIDIA's package index (the packages tensorrt-cu13 or tensorrt, 10.13 to 11), or "
                "build for trt-rtx instead, which needs no GPU at build time",
            )
        if not gpu_fingerprint():
            return "TensorRT builds engines on a GPU, and this machine has none", "Run on a machine with an NVIDIA GPU"
    return None


def require_available(targets: tuple[Target, ...]) -> None:
    """Raise ``BackendUnavailableError`` for the first target that this machine cannot build."""
    for target in targets:
        missing = unavailable(target)
        if missing is not None:
            raise BackendUnavailableError(f"Target {target} cannot be built: {missing[0]}.", remedy=f"{missing[1]}.")
