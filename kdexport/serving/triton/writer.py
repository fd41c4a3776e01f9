"""Write a verified bundle as a version of a model in a Triton repository."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kdexport.backends.pixel_input import FLOAT32, arrange
from kdexport.bundle.manifest import MODEL, TARGETS, interface_of
from kdexport.core.digests import sha256_bytes, sha256_file
from kdexport.data.preprocessing import read_image
from kdexport.errors import BundleError, OutputError
from kdexport.serving.triton.pbtxt import (
    CONFIG,
    LABELS,
    PLATFORMS,
    WARMUP,
    Interface,
    from_pbtxt,
    model_config,
    to_pbtxt,
)
from kdexport.serving.triton.variants import PLAN_RULE, TritonPlan
from kdexport.serving.triton.versions import ORIGIN, Version, publish_version, read_versions, staging
from kdexport.verify.verdict import VerifiedBundle


@dataclass(frozen=True, kw_only=True, slots=True)
class TritonResult:
    """A model in a repository; ``up_to_date`` if the repository already had this version of it."""

    model: Path
    version: int
    up_to_date: bool


def export_triton(bundle: VerifiedBundle, plan: TritonPlan) -> TritonResult:
    """Write the model in one step or not at all; raises ``OutputError``, ``BundleError`` or ``StorageError``."""
    model = plan.repository / plan.name
    sha256 = bundle.manifest.files.get(plan.source)
    if sha256 is None:
        raise BundleError(
            f"The manifest of the bundle lists no {plan.source}.",
            remedy=f"Build the bundle again with --target {plan.target}.",
        )
    with staging(plan.repository) as folder:
        versions = read_versions(model)
        number, present = _choose_version(plan, sha256, versions)
        _require_same_contract(plan, versions)
        staged = folder / plan.name
        staged.mkdir()
        if not present:
            _write_version(staged / str(number), bundle, plan, sha256)
        _write_shared(staged, bundle, plan)
        publish_version(staged, model, number)
    return TritonResult(model=model, version=number, up_to_date=present)


def _choose_version(plan: TritonPlan, sha256: str, versions: tuple[Version, ...]) -> tuple[int, bool]:
    """The number of the version, and whether it already exists with the same model."""
    same = {version.number for version in versions if version.origin["sha256"] == sha256}
    taken = {version.number for version in versions}
    if plan.version is None:
        return (max(same), True) if same else (max(taken, default=0) + 1, False)
    if plan.version in taken and plan.version not in same:
        raise OutputError(
            f"{plan.repository / plan.name} already has a version {plan.version} with a different model; a version "
            "that clients may use is never replaced.",
            remedy=f"Omit --version to write version {max(taken) + 1}.",
        )
    return plan.version, plan.version in same


def _require_same_contract(plan: TritonPlan, versions: tuple[Version, ...]) -> None:
    """Raise ``OutputError`` if the tensors of this version mean something different from those of the others."""
    for version in versions:
        contract = version.origin["contract"]
        different = [key for key in sorted(plan.contract) if contract.get(key) != plan.contract[key]]
        if different:
            raise OutputError(
                f"Version {version.number} of {plan.name} and this bundle differ in {', '.join(different)}; all "
                f"versions of a Triton model share one {CONFIG}, one {LABELS} and their clients.",
                remedy="Pass another --name.",
            )


def _write_version(folder: Path, bundle: VerifiedBundle, plan: TritonPlan, sha256: str) -> None:
    from kdexport import __version__

    folder.mkdir()
    target = folder / PLATFORMS[plan.backend][1]
    shutil.copyfile(bundle.folder / plan.source, target)
    if sha256_file(target) != sha256:
        raise BundleError(
            f"{plan.source} changed after it was verified.",
            remedy="Stop the process that writes to the bundle, and run the command again.",
        )
    origin = {
        "kdexport": __version__,
        "build_key": bundle.manifest.build_key,
        "target": plan.target,
        "sha256": sha256,
        "contract": plan.contract,
    }
    (folder / ORIGIN).write_text(json.dumps(origin, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def _write_shared(staged: Path, bundle: VerifiedBundle, plan: TritonPlan) -> None:
    spec = bundle.manifest.spec
    pixels = spec.preprocessing.pixels(read_image(bundle.folder / bundle.manifest.golden[0]))
    takes = interface_of(bundle.manifest, plan.target).takes
    normalised = spec.preprocessing.normalise(pixels[np.newaxis]).astype("<f4")
    image = (normalised if takes == FLOAT32 else arrange(pixels[np.newaxis], takes))[0].tobytes()
    # The name depends on the content, so the old file stays until the old configuration is replaced.
    warmup = f"golden-{sha256_bytes(image)[:16]}"
    (staged / WARMUP).mkdir()
    (staged / WARMUP / warmup).write_bytes(image)
    (staged / LABELS).write_text("".join(f"{name}\n" for name in spec.classes), encoding="utf-8")
    interface = read_interface(bundle.folder / TARGETS / plan.target / MODEL)
    parameters = _parameters(plan)
    config = model_config(plan.name, plan.backend, interface, plan.schedule, warmup_file=warmup, parameters=parameters)
    text = to_pbtxt(config)
    if from_pbtxt(text, CONFIG) != config:
        raise OutputError(
            f"{CONFIG} changes when it is written and read back, probably because of the model name or a class name.",
            remedy="Use other names, or open an issue in kdexport's repository with the name and the classes.",
        )
    (staged / CONFIG).write_text(text, encoding="utf-8")


def _parameters(plan: TritonPlan) -> dict[str, str]:
    if plan.backend == "tensorrt":
        return {"tensorrt_version": str(plan.contract["tensorrt"]), "tensorrt_version_rule": PLAN_RULE}
    # Without these onnxruntime starts a thread per core of the host, even if the container may use fewer.
    return {"intra_op_thread_count": "1", "inter_op_thread_count": "1"}


def read_interface(path: Path) -> Interface:
    """Names and dimensions, without the batch, of the input and outputs of an audited ONNX file."""
    import onnx

    graph = onnx.load(str(path), load_external_data=False).graph
    (given,), results = graph.input, tuple(item.name for item in graph.output)
    dims = [tuple(dim.dim_value for dim in item.type.tensor_type.shape.dim[1:]) for item in (given, graph.output[0])]
    pixels = given.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    return Interface(
        input_name=given.name,
        input_type="TYPE_UINT8" if pixels else "TYPE_FP32",
        input_dims=dims[0],
        outputs=results,
        output_dims=dims[1],
    )
