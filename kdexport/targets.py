"""Targets are ``<backend>-<precision>``: what they need, and whether this machine has it."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from kdexport.errors import BackendUnavailableError, ConfigError, UnknownNameError
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


def unavailable(target: Target) -> tuple[str, str] | None:
    """(what is missing, what to do) where ``target`` cannot be built on this machine, else None."""
    return {"onnx": _onnx_lacks, "openvino": _openvino_lacks, "trt": _trt_lacks, "trt-rtx": _rtx_lacks}[target.backend](
        target
    )


def _onnx_lacks(target: Target) -> tuple[str, str] | None:
    if target.precision == "bf16":
        return (
            "onnxruntime has no bfloat16 convolution",
            "Build openvino-bf16 for a CPU with AMX or AVX512-BF16, or trt-rtx-bf16 for a GPU",
        )
    if target.precision == "fp16" and not gpu_fingerprint():
        return (
            "onnxruntime computes a float16 graph in float32 on a CPU, and this machine has no GPU",
            "Build onnx-fp32 or onnx-int8 for a CPU",
        )
    return None


def _openvino_lacks(target: Target) -> tuple[str, str] | None:
    if importlib.util.find_spec("openvino") is None:
        return "OpenVINO is not installed", "pip install 'kdexport[openvino]'"
    if target.precision == "fp32":
        return None
    from kdexport.backends.openvino import capabilities

    here = capabilities()
    if target.precision.upper() in here:
        return None
    # Asked all the same, OpenVINO would run float32 and not say so.
    return (
        f"OpenVINO has no {target.precision} on this CPU, only {', '.join(name.lower() for name in here)}",
        "Build on a machine whose CPU has it, or for another precision",
    )


def _rtx_lacks(_target: Target) -> tuple[str, str] | None:
    if importlib.util.find_spec("tensorrt_rtx") is None:
        return "TensorRT-RTX is not installed", "pip install 'kdexport[trt-rtx]'"
    return None


def _trt_lacks(_target: Target) -> tuple[str, str] | None:
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
