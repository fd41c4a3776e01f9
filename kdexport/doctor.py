"""What this machine has: one line a fact, with what to do where something is missing."""

import os
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path

from kdexport.fingerprint import tool_versions
from kdexport.targets import gpu_fingerprint, parse_target, target_names, unavailable

_PACKAGES = (
    "torch",
    "torchvision",
    "onnx",
    "onnxscript",
    "safetensors",
    "accelerate",
    "polygraphy",
    "openvino",
    "scikit-learn",
)
_MIN_FREE_GB = 2


@dataclass(frozen=True, slots=True)
class Fact:
    """One line of the doctor: what was looked at, whether it serves, and what was found."""

    what: str
    ok: bool
    fact: str


def examine() -> list[Fact]:
    """Look at Python, packages, devices, disk and targets."""
    return [
        Fact("python", True, f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        Fact("processors", True, f"{len(os.sched_getaffinity(0))} usable"),
        *[
            Fact(name, version != "absent", version if version != "absent" else f"absent: pip install {name}")
            for name, version in tool_versions(*_PACKAGES).items()
        ],
        _onnxruntime(),
        _cuda(),
        _disk(),
        *[_target(name) for name in target_names()],
    ]


def _onnxruntime() -> Fact:
    both = {
        name: version
        for name, version in tool_versions("onnxruntime-gpu", "onnxruntime").items()
        if version != "absent"
    }
    if not both:
        return Fact("onnxruntime", False, "absent: pip install onnxruntime-gpu")
    if len(both) > 1:
        return Fact("onnxruntime", False, f"{both}: both install the same module; remove one")
    from kdexport.backends.ort import import_onnxruntime

    providers = ", ".join(import_onnxruntime().get_available_providers())
    name, version = next(iter(both.items()))
    return Fact("onnxruntime", True, f"{name} {version}: {providers}; telemetry off")


def _cuda() -> Fact:
    gpus = gpu_fingerprint()
    if not gpus:
        return Fact("GPU", True, "none: training and verification use the CPU")
    import torch

    usable = torch.cuda.is_available()
    names = "; ".join(line.removeprefix("Model:").strip() for line in gpus[1:])
    return Fact("GPU", usable, names if usable else f"{names}, but torch {torch.__version__} does not see it")


def _disk() -> Fact:
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    return Fact("disk", free >= _MIN_FREE_GB, f"{free:.1f} GiB free here ({_MIN_FREE_GB} GiB are enough)")


def _target(name: str) -> Fact:
    missing = unavailable(parse_target(name))
    return Fact(
        f"target {name}", missing is None, "can be built here" if missing is None else f"{missing[0]}. {missing[1]}."
    )
