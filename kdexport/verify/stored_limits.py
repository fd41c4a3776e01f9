"""The check that the limits stored beside the golden logits are those of the files: a server trusts them."""

from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdexport.backends.ort import load_model
from kdexport.bundle.layout import GOLDEN_LOGITS, OWN_DISTANCE, OWN_LOGITS, TARGETS, UNIT_ERROR
from kdexport.bundle.manifest import MODEL, Manifest, load_unfused
from kdexport.checkpoint import load_tensors
from kdexport.targets import parse_target
from kdexport.verify.check import Check, check_at_most
from kdexport.verify.golden import low_precision_error
from kdexport.verify.golden_limits import allowed_distance
from kdexport.verify.parity import float32_unit
from kdexport.verify.policy import stored_policy
from kdexport.verify.reference import run_exact, run_torch
from kdexport.verify.target_checks import open_file

#: Another processor rounds in another order: its largest error may be a small multiple of that of the build.
_LIMIT = 4.0
_ALLOWED = "allowed_error"


def check_stored_limits(folder: Path, manifest: Manifest, pixels: NDArray[np.uint8]) -> list[Check]:
    """Measure each stored limit again on the golden images (N,S,S,3) uint8; it may be up to 4 times as large as here.

    Limits that a bundle of an earlier version does not have are not checked.
    """
    stored = load_tensors(folder / GOLDEN_LOGITS)
    limits = {name: float(value) for name, value in stored.items() if value.numel() == 1 and name != "labels"}
    arrays = {name: value.numpy() for name, value in stored.items()}
    images = manifest.spec.preprocessing.normalise(pixels)
    measured = {name: value for name, value in _measured(folder, manifest, arrays, images).items() if name in limits}
    checks = []
    for name, measure in measured.items():
        here, wanted = measure(), limits[name]
        ratio = wanted / here if here > 0 else float("inf") if wanted > 0 else 0.0
        checks.append(
            check_at_most("golden", GOLDEN_LOGITS, f"stored {name}", ratio, _LIMIT, unit="x the one measured here")
        )
    return checks


def _measured(
    folder: Path, manifest: Manifest, stored: Mapping[str, NDArray[Any]], images: NDArray[np.float32]
) -> dict[str, Callable[[], float]]:
    """How to measure each limit, by the name of its tensor."""
    policy, exact = stored_policy(manifest.data), stored["logits"].astype(np.float64)
    # Two limits are made of it, and it takes a pass in float64.
    unit = cache(partial(_unit, folder, manifest, images))
    found: dict[str, Callable[[], float]] = {
        UNIT_ERROR: unit,
        _ALLOWED: lambda: policy.B.max_error * unit(),
    }
    for name in manifest.targets:
        path, target = folder / TARGETS / name / MODEL, parse_target(name)
        found[f"{_ALLOWED}.{name}"] = partial(_low_error, path, target.form, exact, images, policy.C.max_error)
        own = stored.get(OWN_LOGITS + name)
        if own is not None:
            found[OWN_DISTANCE + name] = partial(_distance, path, target.form, target.precision, own, images)
    return found


def _unit(folder: Path, manifest: Manifest, images: NDArray[np.float32]) -> float:
    student = load_unfused(folder, manifest.spec)
    return float32_unit(*run_exact(student, images), run_torch(student, images))


def _low_error(path: Path, form: str, exact: NDArray[np.float64], images: NDArray[np.float32], factor: float) -> float:
    return low_precision_error(exact, open_file(path, form).logits(images), factor)


def _distance(path: Path, form: str, precision: str, own: NDArray[Any], images: NDArray[np.float32]) -> float:
    # As at the build: onnxruntime's run of the graph as it stands.
    model = open_file(path, form) if form == "bf16" else load_model(path, optimise=False)
    logits = np.concatenate([model.logits(image[np.newaxis]) for image in images])
    return allowed_distance(precision, own, logits)
