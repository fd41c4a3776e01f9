"""Verification of a finished bundle from its own files alone."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kdexport.bundle import TASK, Manifest, read_golden
from kdexport.errors import BundleError, DataError
from kdexport.policy import Policy, stored_policy
from kdexport.verify.parity import Check, check_at_most
from kdexport.verify.subjects import check_algebra, check_golden, check_integrity
from kdexport.verify.validation import load_record, task_checks
from kdexport.verify.verdict import Verdict, verify_folder


def replay(folder: Path, manifest: Manifest, progress: Callable[[str], None]) -> Verdict:
    """Files, golden images from their bytes, and the whole ladder on them; a failure stops no later check."""
    checks, pixels = _files(folder, manifest, progress)
    if pixels is None:
        return Verdict(tuple(checks))
    progress("golden images")
    checks += check_golden(folder, manifest, pixels)
    checks += verify_folder(folder, manifest, pixels, progress=progress).checks
    progress("task, as stored")
    return Verdict((*checks, *stored_task(folder, manifest, stored_policy(manifest.data))))


def stored_task(folder: Path, manifest: Manifest, policy: Policy) -> list[Check]:
    """Rung D decided again from the per-image results in the bundle, without the images and without a model."""
    try:
        record = load_record(folder, manifest)
    except BundleError as error:
        return [check_at_most("D", TASK, "readable", 1, 0, unit="faults", detail=error.message)]
    return [] if record is None else task_checks(record, policy)


def replay_algebra(folder: Path, manifest: Manifest, progress: Callable[[str], None]) -> Verdict:
    """Files and rung A alone, with one check per folded block."""
    checks, pixels = _files(folder, manifest, progress)
    if pixels is None:
        return Verdict(tuple(checks))
    progress("algebra in float64")
    return Verdict((*checks, *check_algebra(folder, manifest, pixels)))


def _files(
    folder: Path, manifest: Manifest, progress: Callable[[str], None]
) -> tuple[list[Check], NDArray[np.uint8] | None]:
    progress("files")
    checks = check_integrity(folder, manifest)
    try:
        return checks, read_golden(folder, manifest)
    except DataError as error:
        return [*checks, check_at_most("golden", "images", "readable", 1, 0, unit="faults", detail=error.message)], None
