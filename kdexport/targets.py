"""Targets are ``<backend>-<precision>``: what they need, and whether this machine has it."""

from dataclasses import dataclass
from pathlib import Path

from kdexport.errors import ConfigError, UnknownNameError
from kdexport.registry import nearest

PRECISIONS = ("fp32", "fp16", "bf16", "int8")

#: Backends with what they are.
BACKENDS = {
    "onnx": "onnxruntime",
    "openvino": "OpenVINO on a CPU",
    "trt": "TensorRT, needs a GPU",
    "trt-rtx": "TensorRT-RTX, builds without a GPU",
}

#: The ONNX graphs that precisions are written into: int8 has two, because no runtime executes the other's.
FORMS = ("fp32", "fp16", "bf16", "int8-u8", "int8-s8")


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
        return self.backend in ("trt", "trt-rtx")

    @property
    def form(self) -> str:
        """The ONNX graph that this target is made of, one of ``FORMS``."""
        if self.precision != "int8":
            return self.precision
        return "int8-s8" if self.needs_engine else "int8-u8"


def target_names() -> tuple[str, ...]:
    """All targets that can be asked for."""
    return tuple(f"{backend}-{precision}" for backend in BACKENDS for precision in PRECISIONS)


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
