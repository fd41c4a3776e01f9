"""A verified bundle as a version of a model in a Triton repository."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kdexport.bundle.manifest import MODEL, TARGETS
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
from kdexport.serving.triton.versions import ORIGIN, Version, enter, read_versions, staging
from kdexport.verify.verdict import VerifiedBundle


@dataclass(frozen=True, kw_only=True, slots=True)
class TritonResult:
    """A model in a repository; ``up_to_date`` where this very version was there before."""

    model: Path
    version: int
    up_to_date: bool


def export_triton(bundle: VerifiedBundle, plan: TritonPlan) -> TritonResult:
    """Write the model; it appears whole or not at all. Raises ``OutputError``, ``BundleError``, ``StorageError``."""
    model = plan.repository / plan.name
    sha256 = bundle.manifest.files.get(plan.source)
    if sha256 is None:
        raise BundleError(f"The bundle has no {plan.source}.", remedy="Build the bundle again.")
    with staging(plan.repository) as folder:
        versions = read_versions(model)
        number, present = _choose_version(plan, sha256, versions)
        _require_same_contract(plan, versions)
        staged = folder / plan.name
        staged.mkdir()
        if not present:
            _write_version(staged / str(number), bundle, plan, sha256)
        _write_shared(staged, bundle, plan)
        enter(staged, model, number)
    return TritonResult(model=model, version=number, up_to_date=present)


def _choose_version(plan: TritonPlan, sha256: str, versions: tuple[Version, ...]) -> tuple[int, bool]:
    """The version's number, and whether it is there already with the very same model."""
    same = {version.number for version in versions if version.origin["sha256"] == sha256}
    taken = {version.number for version in versions}
    if plan.version is None:
        return (max(same), True) if same else (max(taken, default=0) + 1, False)
    if plan.version in taken and plan.version not in same:
        raise OutputError(
            f"{plan.repository / plan.name} has a version {plan.version} with another model.",
            remedy=f"Leave --version away for {max(taken) + 1}; a version that clients may be using is never replaced.",
        )
    return plan.version, plan.version in same


def _require_same_contract(plan: TritonPlan, versions: tuple[Version, ...]) -> None:
    """All versions share one configuration and one kind of client, so they must mean the same by their tensors."""
    for version in versions:
        contract = version.origin["contract"]
        wrong = [key for key in sorted(plan.contract) if contract.get(key) != plan.contract[key]]
        if wrong:
            raise OutputError(
                f"Version {version.number} of {plan.name} has other {', '.join(wrong)} than this bundle; the versions "
                f"of a Triton model share one {CONFIG}, one {LABELS} and their clients.",
                remedy="Pass another --name.",
            )


def _write_version(folder: Path, bundle: VerifiedBundle, plan: TritonPlan, sha256: str) -> None:
    from kdexport import __version__

    folder.mkdir()
    target = folder / PLATFORMS[plan.backend][1]
    shutil.copyfile(bundle.folder / plan.source, target)
    if sha256_file(target) != sha256:
        raise BundleError(
            f"{plan.source} changed after it was verified.", remedy="Let nothing write to the bundle, and try again."
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
    image = spec.preprocessing.normalise(pixels[np.newaxis])[0].astype("<f4").tobytes()
    # Named by its content: the old file stays in place for as long as the old configuration may be read.
    warmup = f"golden-{sha256_bytes(image)[:16]}"
    (staged / WARMUP).mkdir()
    (staged / WARMUP / warmup).write_bytes(image)
    (staged / LABELS).write_text("".join(f"{name}\n" for name in spec.classes), encoding="utf-8")
    interface = read_interface(bundle.folder / TARGETS / plan.target / MODEL)
    parameters = _parameters(plan)
    config = model_config(plan.name, plan.backend, interface, plan.schedule, warmup_file=warmup, parameters=parameters)
    text = to_pbtxt(config)
    if from_pbtxt(text, CONFIG) != config:
        raise OutputError(f"{CONFIG} does not read back as it was made.", remedy="Report the name and the classes.")
    (staged / CONFIG).write_text(text, encoding="utf-8")


def _parameters(plan: TritonPlan) -> dict[str, str]:
    if plan.backend == "tensorrt":
        return {"tensorrt_version": str(plan.contract["tensorrt"]), "tensorrt_version_rule": PLAN_RULE}
    # Without these onnxruntime takes a thread for every core of the host, whatever the container is allowed.
    return {"intra_op_thread_count": "1", "inter_op_thread_count": "1"}


def read_interface(path: Path) -> Interface:
    """Names and dimensions, without the batch, of an audited ONNX file's one input and one output."""
    import onnx

    graph = onnx.load(str(path), load_external_data=False).graph
    (given,), (result,) = graph.input, graph.output
    dims = [tuple(dim.dim_value for dim in item.type.tensor_type.shape.dim[1:]) for item in (given, result)]
    return Interface(input_name=given.name, input_dims=dims[0], output_name=result.name, output_dims=dims[1])
