"""Tries a bundle in a process of its own before the server touches it, and says how far its logits may be off.

A graph that crashes onnxruntime ends this process and nothing else.
"""

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kdexport.bundle.manifest import MODEL, UNIT_ERROR, Manifest
from kdexport.core.child import ChildDiedError, ChildTimeoutError, call
from kdexport.core.console import guarded, print_json
from kdexport.errors import AuditError, BundleError
from kdexport.serving.limits import Limits
from kdexport.targets import DEFAULT_TARGET, require_servable

_TIMEOUT_S = 120
#: ``allowed_error`` of a bundle without ``unit_error`` is this multiple of it, whatever its policy says.
_FORMER_FACTOR = 4.0


def try_bundle(folder: Path, provider: str, limits: Limits, target: str = DEFAULT_TARGET) -> float:
    """Load ``folder`` completely in a child process; the largest error of a logit that its golden images may have.

    Raises what the child found, or ``BundleError`` where the child died.
    """
    settings = [str(folder), provider, json.dumps(asdict(limits)), target]
    try:
        answer = call(
            "kdexport.serving.isolated_load", settings, timeout_s=_TIMEOUT_S, environment={"OMP_NUM_THREADS": "1"}
        )
    except ChildTimeoutError as error:
        raise BundleError(f"{folder} did not load within {error.seconds:g} s.", remedy="Build it again.") from None
    except ChildDiedError as error:
        raise BundleError(
            f"Loading {folder} ended its process with code {error.exit_code}: {error.said}",
            remedy="The graph crashes onnxruntime; build the bundle again.",
        ) from None
    return float(answer["allowed_error"])


def allowed_error(folder: Path, manifest: Manifest, target: str = DEFAULT_TARGET) -> float:
    """The largest error of a logit that the bundle's own policy allows on its golden images.

    An older bundle has no error in its file that this limit is a multiple of; its unfused student gives it then.
    """
    from kdexport.serving.self_check import read_reference
    from kdexport.verify.policy import stored_policy

    tensors = read_reference(folder)
    if target != DEFAULT_TARGET:
        if f"allowed_error.{target}" not in tensors:
            raise BundleError(
                f"{folder} does not say how far {target} may lie from the reference: an earlier version built it.",
                remedy="Build it again.",
            )
        return float(tensors[f"allowed_error.{target}"])
    return stored_policy(manifest.data).B.max_error * _float32_unit(folder, manifest, tensors)


def _float32_unit(folder: Path, manifest: Manifest, tensors: Mapping[str, NDArray[np.float64]]) -> float:
    if UNIT_ERROR in tensors:
        return float(tensors[UNIT_ERROR])
    if "allowed_error" in tensors:
        return float(tensors["allowed_error"]) / _FORMER_FACTOR
    from kdexport.bundle.manifest import load_unfused, read_golden
    from kdexport.verify.parity import float32_unit
    from kdexport.verify.reference import run_exact, run_torch

    images = manifest.spec.preprocessing.normalise(read_golden(folder, manifest))
    student = load_unfused(folder, manifest.spec)
    return float32_unit(*run_exact(student, images), run_torch(student, images))


def require_one_file(graph: bytes) -> None:
    """Raise ``AuditError`` for a graph that keeps weights in other files or brings code of its own."""
    import onnx
    from onnx.external_data_helper import _get_all_tensors, uses_external_data

    model = onnx.ModelProto.FromString(graph)
    if any(uses_external_data(tensor) for tensor in _get_all_tensors(model)):
        raise AuditError(f"{MODEL} keeps weights outside itself.", remedy="Build it again; one file holds all.")
    foreign = {entry.domain for entry in model.opset_import} - {"", "ai.onnx"}
    if foreign or model.functions:
        raise AuditError(f"{MODEL} uses operators of {sorted(foreign) or 'its own'}.", remedy="Build it again.")


def _main() -> None:
    from kdexport.serving.loading import as_kdexport_error, load, read_files

    folder, provider, limits, target = Path(sys.argv[1]), sys.argv[2], Limits(**json.loads(sys.argv[3])), sys.argv[4]
    try:
        require_servable(target, provider)
        files = read_files(folder, target)
        require_one_file(files.graph)
        allowed = allowed_error(folder, files.manifest, target)
        load(
            folder, name=folder.name, version=1, provider=provider, limits=limits, allowed_error=allowed, target=target
        )  # fmt: skip
    except Exception as error:
        raise as_kdexport_error(error, folder) from error
    print_json({"allowed_error": allowed})


if __name__ == "__main__":
    guarded(_main)
