"""The golden logits of a bundle, and how far a runtime's own logits may be from them; needs no torch."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kdexport.bundle.manifest import GOLDEN_LOGITS, UNIT_ERROR, Manifest
from kdexport.errors import BundleError
from kdexport.targets import DEFAULT_TARGET
from kdexport.verify.policy import stored_policy

#: In a bundle without ``unit_error``, ``allowed_error`` is this multiple of it under any policy.
_FORMER_FACTOR = 4.0


def read_reference(folder: Path) -> dict[str, NDArray[np.float64]]:
    """The reference logits and error limits of golden/logits.safetensors; raises ``BundleError``."""
    from safetensors.numpy import load_file

    try:
        tensors = load_file(folder / GOLDEN_LOGITS)
        limits = {k: v for k, v in tensors.items() if k == UNIT_ERROR or k.startswith("allowed_error")}
        return {"logits": tensors["logits"], **limits}
    except Exception as error:
        raise BundleError(
            f"{folder / GOLDEN_LOGITS} cannot be read ({type(error).__name__}).", remedy="Build the bundle again."
        ) from error


def allowed_error(folder: Path, manifest: Manifest, target: str = DEFAULT_TARGET) -> float:
    """The largest error of a golden logit that the bundle's own policy allows.

    It is a multiple of an error stored in the bundle, or of the unfused student's if the bundle is too old to have it.
    Raises ``BundleError`` for a target without a limit.
    """
    limit = stored_limit(folder, manifest, target)
    if limit is None:
        raise BundleError(
            f"{folder} has no limit for the error of {target}: an earlier version of kdexport built it.",
            remedy="Build the bundle again.",
        )
    return limit


def stored_limit(folder: Path, manifest: Manifest, target: str) -> float | None:
    """The same, None for a target that the bundle has no limit for."""
    tensors = read_reference(folder)
    if target != DEFAULT_TARGET:
        limit = tensors.get(f"allowed_error.{target}")
        return None if limit is None else float(limit)
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
