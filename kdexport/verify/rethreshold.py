"""Decides a finished bundle again under other limits, from its stored numbers: no model, image or GPU is needed."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdexport.bundle.manifest import Manifest
from kdexport.errors import BundleError, ConfigError
from kdexport.graph.precision import FLOAT16_MAX
from kdexport.verify.check import Check
from kdexport.verify.consistency import check_consistency
from kdexport.verify.policy import Change, Policy, load_policy, policy_changes, stored_policy
from kdexport.verify.student_checks import check_integrity
from kdexport.verify.verdict import Verdict, stored_task


@dataclass(frozen=True, slots=True)
class Rethresholded:
    """The verdict on the stored numbers under the new policy, and the limits that it changes."""

    verdict: Verdict
    changes: tuple[Change, ...]


def rethreshold(folder: Path, manifest: Manifest, policy_file: Path, *, allow_looser: bool) -> Rethresholded:
    """Decide every rung again; raises ``ConfigError`` for a looser limit unless ``allow_looser``."""
    old = stored_policy(manifest.data)
    new = load_policy(policy_file, old)
    changes = policy_changes(old, new)
    looser = [change for change in changes if change.loosens]
    if looser and not allow_looser:
        lines = [f"  {change.key}: {change.old:g} -> {change.new:g}" if _numbers(change) else
                 f"  {change.key}: {change.old} -> {change.new}" for change in looser]  # fmt: skip
        raise ConfigError(
            "\n".join([f"{policy_file} has looser limits than the build of the bundle:", *lines]),
            remedy="Lower these limits, or pass --allow-looser to accept them.",
        )
    stored = [redecide(check, new) for check in manifest.data["parity"] if check["rung"] != "D"]
    return Rethresholded(
        Verdict(
            (
                *check_integrity(folder, manifest),
                *check_consistency(folder, manifest),
                *stored,
                *stored_task(folder, manifest, new),
            )
        ),
        changes,
    )


def redecide(stored: Mapping[str, Any], policy: Policy) -> Check:
    """A stored check of rungs A to C against the policy's limit; other checks are unchanged."""
    try:
        check = Check(
            rung=str(stored["rung"]),
            subject=str(stored["subject"]),
            name=str(stored["name"]),
            holds=bool(stored["holds"]),
            measured=math.nan if stored["measured"] is None else float(stored["measured"]),
            allowed=math.inf if stored["allowed"] is None else float(stored["allowed"]),
            unit=str(stored["unit"]),
            detail=str(stored["detail"]),
            ran=bool(stored.get("ran", True)),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise BundleError(
            f"A check stored in the manifest is damaged: {type(error).__name__}: {error}.",
            remedy="Build the bundle again.",
        ) from error
    limit = _limits(policy).get((check.rung, check.name))
    if limit is None or check.unit == "faults":
        return check
    return Check(
        rung=check.rung,
        subject=check.subject,
        name=check.name,
        holds=check.measured <= limit,
        measured=check.measured,
        allowed=limit,
        unit=check.unit,
        detail=check.detail,
    )


def _limits(policy: Policy) -> dict[tuple[str, str], float]:
    return {
        ("A", "blocks"): policy.A.relative_error,
        ("A", "whole"): policy.A.relative_error,
        ("B", "rms error"): policy.B.rms_error,
        ("B", "max error"): policy.B.max_error,
        ("C", "rms error"): policy.C.rms_error,
        ("C", "max error"): policy.C.max_error,
        ("C", "largest activation"): FLOAT16_MAX / policy.C.headroom,
    }


def _numbers(change: Change) -> bool:
    return not isinstance(change.old, str) and not isinstance(change.new, str)
