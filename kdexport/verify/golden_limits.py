"""The golden logits of a bundle, and how far a runtime's own logits may be from them; needs no torch.

A bundle has two kinds: those of the unfused student in float64, and for each target that ran at the build those of its
own runtime. The limit for the first kind is a multiple of the error of a precision, which for int8 is as large as the
effect of a wrong zero point. The second kind is exact where the runtime repeats its bits: same version, same processor.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdexport.backends.base import Execution
from kdexport.backends.nvidia import gpu_fingerprint
from kdexport.bundle.layout import OWN_DISTANCE, OWN_LOGITS
from kdexport.bundle.manifest import GOLDEN_LOGITS, UNIT_ERROR, Manifest
from kdexport.core.processors import processor_model
from kdexport.errors import BundleError
from kdexport.targets import DEFAULT_TARGET, parse_target
from kdexport.verify.policy import stored_policy

#: Another implementation of the same graph rounds some values differently. Its distance from the runtime's logits is
#: measured at the build by onnxruntime's run of the graph as it stands, and this multiple of it is allowed elsewhere.
#: Integer kernels add without rounding, so that all of them agree; float kernels each have an error of their own.
_DISTANCES = {"int8": 0.5}
_FLOAT_DISTANCES = 2.0
#: At least this part of the spread of the logits is allowed elsewhere: a value on the boundary of two levels of int8.
_LEAST_DISTANCE = 0.002

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


@dataclass(frozen=True, slots=True, eq=False)
class OwnLogits:
    """A target's own golden logits (N,K), where its runtime computed them, and the rms distance allowed elsewhere."""

    target: str
    logits: NDArray[np.float32]
    place: dict[str, str]
    allowed: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Distance:
    """The rms distance of logits from a target's own of the build; ``exact`` if they must be equal bit for bit."""

    rms: float
    allowed: float
    exact: bool
    changed: int

    @property
    def holds(self) -> bool:
        """Whether the distance is allowed; NaN never is."""
        return not self.changed if self.exact else self.rms <= self.allowed

    def __str__(self) -> str:
        if self.exact and self.holds:
            return "bit for bit those of the build"
        where = (
            "none on the processor and version of the build" if self.exact else f"up to {self.allowed:.2g} elsewhere"
        )
        return f"{self.changed} values differ from those of the build, rms {self.rms:.2g} ({where})"


def place_of(execution: Execution) -> dict[str, str]:
    """Where a runtime ran: what its bits may depend on."""
    processor = "; ".join([processor_model(), *gpu_fingerprint()])
    return {
        "runtime": execution.runtime,
        "version": execution.version,
        "device": execution.device,
        "processor": processor,
    }


def allowed_distance(precision: str, own: NDArray[np.floating[Any]], other: NDArray[np.floating[Any]]) -> float:
    """The rms distance from ``own`` (N,K) that other processors may have, if another implementation gave ``other``."""
    spread = float(own.astype(np.float64).std())
    return max(_DISTANCES.get(precision, _FLOAT_DISTANCES) * _rms(own, other), _LEAST_DISTANCE * spread)


def own_logits(folder: Path, manifest: Manifest, target: str) -> OwnLogits | None:
    """What a bundle has of a target's own golden logits; None if the target did not run, or the bundle is older."""
    from safetensors.numpy import load_file

    place = manifest.targets.get(target, {}).get("golden")
    if place is None:
        return None
    try:
        tensors = load_file(folder / GOLDEN_LOGITS)
        return OwnLogits(target, tensors[OWN_LOGITS + target], place, float(tensors[OWN_DISTANCE + target]))
    except Exception as error:
        raise BundleError(
            f"{folder / GOLDEN_LOGITS} has no logits of {target} ({type(error).__name__}); the manifest requires them.",
            remedy="Build the bundle again.",
        ) from error


def compare_own(own: OwnLogits, logits: NDArray[np.float32], execution: Execution, *, single: bool = True) -> Distance:
    """Compare logits (N,K) of the golden images with the target's own of the build.

    ``single`` says that they were computed image by image on one thread, as at the build.
    """
    here = {key: own.place.get(key) for key in ("runtime", "version", "device", "processor")} == place_of(execution)
    target = parse_target(own.target)
    if logits.shape != own.logits.shape:
        return Distance(rms=float("nan"), allowed=own.allowed, exact=False, changed=own.logits.size)
    return Distance(
        rms=_rms(own.logits, logits),
        allowed=own.allowed,
        exact=here and single and target.runtime.repeats_bits(target.precision),
        changed=int(np.sum(~(own.logits == logits))),
    )


def _rms(one: NDArray[np.floating[Any]], other: NDArray[np.floating[Any]]) -> float:
    return float(np.sqrt(np.mean(np.square(one.astype(np.float64) - other.astype(np.float64)))))


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
