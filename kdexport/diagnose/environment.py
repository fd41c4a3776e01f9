"""What this machine can build and run, and whether it can serve a bundle: one line for each fact."""

import platform
import shutil
from dataclasses import dataclass
from pathlib import Path

from kdexport.backends.nvidia import gpu_fingerprint
from kdexport.backends.ort import CPU
from kdexport.backends.pixel_input import FLOAT32
from kdexport.bundle.manifest import has_synthetic_images
from kdexport.core.digests import tool_versions
from kdexport.core.extras import install
from kdexport.core.processors import usable_cpus
from kdexport.errors import KdexportError
from kdexport.serving.isolated_load import require_one_file
from kdexport.serving.limits import Limits
from kdexport.serving.loading import as_kdexport_error, load, read_files
from kdexport.targets import DEFAULT_TARGET, parse_target, require_servable, target_names
from kdexport.verify.golden_limits import allowed_error

#: Packages of extras, and the module of each.
_PACKAGES = {
    "torch": "torch", "torchvision": "torchvision", "onnxscript": "onnxscript", "accelerate": "accelerate",
    "polygraphy": "polygraphy", "scipy": "scipy", "openvino": "openvino", "ncnn": "ncnn", "pnnx": "pnnx",
    "executorch": "executorch", "ai-edge-litert": "ai_edge_litert", "coremltools": "coremltools",
    "scikit-learn": "sklearn",
}  # fmt: skip
_MIN_FREE_GIB = 2


@dataclass(frozen=True, slots=True)
class Fact:
    """One line of ``kdexport doctor``: what was examined, whether it is usable, and what was found."""

    what: str
    ok: bool
    fact: str


def examine() -> list[Fact]:
    """Examine Python, packages, devices, disk and targets."""
    return [
        Fact("python", True, f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        Fact("processors", True, f"{len(usable_cpus())} usable"),
        *[
            Fact(name, version != "absent", version if version != "absent" else f"not installed. {install(module)}")
            for (name, module), version in zip(_PACKAGES.items(), tool_versions(*_PACKAGES).values(), strict=True)
        ],
        _onnxruntime(),
        _cuda(),
        *_providers(),
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
        return Fact("onnxruntime", False, f"not installed. {install('onnxruntime')}")
    if len(both) > 1:
        return Fact(
            "onnxruntime",
            False,
            f"{' and '.join(both)} are both installed and share one module: pip uninstall one of them",
        )
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
    return Fact("GPU", usable, names if usable else f"{names}, but torch {torch.__version__} cannot use it")


def _providers() -> list[Fact]:
    """Whether onnxruntime can load the libraries of each GPU provider that it has; nothing without a GPU."""
    from kdexport.backends.cuda_libraries import PROVIDER_FILES, missing_library
    from kdexport.backends.ort import INSTALL_LIBRARIES, import_onnxruntime

    if not gpu_fingerprint():
        return []
    ort = import_onnxruntime()
    facts = []
    for provider in sorted(PROVIDER_FILES.keys() & set(ort.get_available_providers())):
        library = missing_library(provider, ort)
        said = f"{library} is missing. {INSTALL_LIBRARIES}" if library else "all libraries load"
        facts.append(Fact(provider, not library, said))
    return facts


def _disk() -> Fact:
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    return Fact(
        "disk", free >= _MIN_FREE_GIB, f"{free:.1f} GiB free in this folder (at least {_MIN_FREE_GIB} GiB required)"
    )


def _target(name: str) -> Fact:
    missing = parse_target(name).unavailable()
    return Fact(
        f"target {name}", missing is None, "can be built here" if missing is None else f"{missing[0]}. {missing[1]}."
    )


def examine_bundle(folder: Path, provider: str = CPU, target: str = DEFAULT_TARGET) -> list[Fact]:
    """Check a bundle as the server does: files, graph, provider, and golden images from their bytes.

    Raises the ``KdexportError`` with which the server would refuse the bundle.
    """
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
    takes = model.signature.takes
    pixels = "" if takes == FLOAT32 else f", takes {takes}"
    kind = "computed images" if has_synthetic_images(files.manifest.data) else "images"
    fact = f"{golden.images} {kind}: pixels as in training, labels as the reference"
    own = str(golden.own or "not recorded: an earlier version built the bundle")
    return [
        Fact("files", True, f"{len(files.manifest.files)} files unchanged since they were verified"),
        Fact("graph", True, f"{target}: one file, {len(files.graph):,} bytes, no foreign operators{pixels}"),
        Fact("provider", True, f"{nodes} of {nodes} nodes on {provider}"),
        Fact("golden images", True, fact),
        Fact("golden logits", True, f"largest error {golden.error:.2e} (up to {golden.allowed:.2e} allowed)"),
        Fact("own golden logits", golden.own is not None, own),
    ]
