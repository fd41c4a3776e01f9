"""Plan a Triton export from the manifest and the options, before anything is verified or written."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdexport.backends.base import Missing
from kdexport.backends.file_interface import PLAIN_INTERFACE
from kdexport.bundle.manifest import TARGETS, VERIFIED, Manifest, interface_of
from kdexport.errors import BundleError, ConfigError, UnknownNameError
from kdexport.registry import nearest
from kdexport.serving.model_names import require_name
from kdexport.serving.triton.pbtxt import Device, Schedule
from kdexport.serving.triton.versions import read_versions, require_repository
from kdexport.targets import parse_target

PLAN_RULE = "a plan loads only in exactly the TensorRT version, and on the GPU generation, that built it"


@dataclass(frozen=True, kw_only=True, slots=True)
class TritonRequest:
    """The options of ``kdexport triton``; None means a default that depends on the device and the bundle."""

    repository: Path
    name: str
    version: int | None = None
    target: str = "onnx-fp32"
    device: Device | None = None
    instances: int = 1
    max_batch: int | None = None
    delay_us: int = 0
    max_queue: int | None = None
    queue_timeout_ms: int = 2000
    keep_versions: int = 2
    tensorrt_version: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class TritonPlan:
    """A complete plan of what is written, with a value for every choice."""

    repository: Path
    name: str
    version: int | None
    target: str
    backend: str
    source: str
    schedule: Schedule
    contract: dict[str, Any]


def plan_export(manifest: Manifest, request: TritonRequest) -> TritonPlan:
    """Choose a value for every option of ``request``; raises ``ConfigError``, ``BundleError`` or ``OutputError``."""
    entry = _target_entry(manifest, request.target)
    engine = bool(entry["engine"])
    device = request.device or ("gpu" if engine else "cpu")
    if engine and device == "cpu":
        raise ConfigError(
            f"{request.target} is a TensorRT plan and runs on a GPU only, but --device is cpu.",
            remedy="Pass --device gpu.",
        )
    if engine:
        _require_same_tensorrt(request, str(entry.get("version")))
    name = request.name
    require_name(name, "Give the model another name: --name NAME")
    for label in manifest.spec.classes:
        if label and label.splitlines() != [label]:
            raise ConfigError(
                f"The class name {label!r} has a line break; Triton's label file has one name per line.",
                remedy="Rename the class in the data set and build the bundle again.",
            )
    require_repository(request.repository)
    read_versions(request.repository / name)
    return TritonPlan(
        repository=request.repository,
        name=name,
        version=request.version,
        target=request.target,
        backend="tensorrt" if engine else "onnxruntime",
        source=f"{TARGETS}/{request.target}/{parse_target(request.target).artifact}",
        schedule=_schedule(manifest, request, device),
        contract=_contract(manifest, request.target),
    )


def _contract(manifest: Manifest, target: str) -> dict[str, Any]:
    """The values that all versions of a model must share, in the form that JSON gives back (lists for tuples)."""
    entry, interface = manifest.targets[target], interface_of(manifest, target)
    # Repositories of earlier versions have plain files and do not say it.
    other = {} if interface == PLAIN_INTERFACE else {"interface": str(interface)}
    contract = {
        **other,
        "backend": "tensorrt" if entry["engine"] else "onnxruntime",
        "tensorrt": entry["version"] if entry["engine"] else None,
        "classes": manifest.spec.classes,
        "preprocessing": manifest.spec.preprocessing.to_json(),
    }
    return dict(json.loads(json.dumps(contract)))


def _target_entry(manifest: Manifest, name: str) -> dict[str, Any]:
    if name not in manifest.targets:
        raise UnknownNameError(f"The bundle has no target {name!r}.", remedy=nearest(name, manifest.targets))
    target, entry = parse_target(name), manifest.targets[name]
    platform = target.runtime.triton_platform(target.precision)
    if isinstance(platform, Missing):
        raise ConfigError(f"{name} {platform.reason}.", remedy=f"{platform.remedy}.")
    if entry["status"] != VERIFIED:
        raise BundleError(
            f"The engine of {name} was built but never run, so its logits were not verified.",
            remedy="Build the bundle on a machine with the GPU that will serve it.",
        )
    return entry


def _require_same_tensorrt(request: TritonRequest, built: str) -> None:
    """Raise ``ConfigError`` for a plan that Triton could not load, before a pod fails to start."""
    command = "`dpkg-query -W 'libnvinfer[0-9]*'` in Triton's image prints its version"
    if request.tensorrt_version is None:
        raise ConfigError(
            f"{request.target} was built with TensorRT {built}: {PLAN_RULE}.",
            remedy=f"Pass --tensorrt-version with the version of the Triton server that will load it; {command}.",
        )
    given = re.split(r"[-+]", request.tensorrt_version)[0]
    if given != built:
        raise ConfigError(
            f"{request.target} was built with TensorRT {built}, but Triton has {given}: {PLAN_RULE}.",
            remedy=f"Use the Triton release with {built}, or build the bundle again with {given}; {command}.",
        )


def _schedule(manifest: Manifest, request: TritonRequest, device: Device) -> Schedule:
    largest = int(manifest.data["export"]["max_batch"])
    # On a CPU a batch gains for small students only: the command measures it after it has verified the bundle.
    max_batch = request.max_batch if request.max_batch is not None else (1 if device == "cpu" else largest)
    if not 1 <= max_batch <= largest:
        raise ConfigError(
            f"--max-batch must be from 1 to {largest}, the batches with which the bundle was verified; "
            f"got {max_batch}.",
            remedy=f"Pass --max-batch {largest}, or raise max_batch under [export] and build the bundle again.",
        )
    limit = request.max_queue if request.max_queue is not None else 2 * request.instances * max_batch + 32
    return Schedule(
        device=device,
        instances=request.instances,
        max_batch=max_batch,
        delay_us=request.delay_us,
        max_queue=limit,
        queue_timeout_us=request.queue_timeout_ms * 1000,
        keep_versions=request.keep_versions,
    )
