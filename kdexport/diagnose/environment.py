"""What this machine has: one line a fact, with what to do where something is missing.

``kdexport doctor BUNDLE``: whether this machine would serve a bundle, and gives its labels.
"""

import platform
import shutil
from dataclasses import dataclass
from pathlib import Path

from kdexport.backends.nvidia import gpu_fingerprint
from kdexport.backends.ort import CPU
from kdexport.core.digests import tool_versions
from kdexport.core.processors import usable_cpus
from kdexport.errors import KdexportError
from kdexport.serving.isolated_load import allowed_error, require_one_file
from kdexport.serving.limits import Limits
from kdexport.serving.loading import as_kdexport_error, load, read_files
from kdexport.targets import DEFAULT_TARGET, parse_target, require_servable, target_names

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
        Fact("processors", True, f"{len(usable_cpus())} usable"),
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
    missing = parse_target(name).unavailable()
    return Fact(
        f"target {name}", missing is None, "can be built here" if missing is None else f"{missing[0]}. {missing[1]}."
    )


def examine_bundle(folder: Path, provider: str = CPU, target: str = DEFAULT_TARGET) -> list[Fact]:
    """Files, graph, provider and golden images from their bytes; raises what the server would refuse the bundle for."""
    try:
        require_servable(target, provider)
        files = read_files(folder, target)
        require_one_file(files.graph)
        allowed = allowed_error(folder, files.manifest, target)
        model = load(
            folder, name=folder.name, version=1, provider=provider, limits=Limits(), allowed_error=allowed,
            target=target,
        )  # fmt: skip
    except KdexportError:
        raise
    except Exception as error:
        raise as_kdexport_error(error, folder) from error
    golden = model.golden
    nodes = sum(model.ort.nodes_by_provider.values())
    fact = f"{golden.images} images from their bytes: same pixels as in training, same labels as the reference"
    return [
        Fact("files", True, f"{len(files.manifest.files)} files are those that were verified"),
        Fact("graph", True, f"{target}: one file, {len(files.graph):,} bytes, no foreign operators"),
        Fact("provider", True, f"{nodes} of {nodes} nodes on {provider}"),
        Fact("golden images", True, fact),
        Fact("golden logits", True, f"off by {golden.error:.2e} at most (up to {golden.allowed:.2e} allowed)"),
    ]
