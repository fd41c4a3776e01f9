"""The whole verification of a bundle folder; only its success makes a ``VerifiedBundle``.

Verification of a finished bundle from its own files alone.
"""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdexport.backends.base import Execution
from kdexport.bundle.manifest import NOT_EXECUTED, TASK, Manifest, onnx_files, read_golden, target_of
from kdexport.errors import BundleError, DataError, NotExecutedError, UnknownNameError, VerificationError
from kdexport.registry import nearest
from kdexport.targets import Target, parse_target
from kdexport.verify.check import Check, check_at_most
from kdexport.verify.int8_collapse import explain_collapse
from kdexport.verify.policy import Policy, stored_policy
from kdexport.verify.rebuilt_graphs import RebuiltGraphs
from kdexport.verify.student_checks import check_algebra, check_golden, check_integrity, student_checks
from kdexport.verify.target_checks import graph_checks, target_checks
from kdexport.verify.task_record import TaskImages, TaskRecord, load_record, measure_task, task_checks

_SEAL = object()

_BUILD_AGAIN = (
    "This is not the student that was trained. `kdexport explain-failure` names the place; `kdexport explain KDX330` "
    "says what the rungs mean."
)


@dataclass(frozen=True, slots=True)
class Verdict:
    """All checks of one verification, and the per-image results that rung D was decided on."""

    checks: tuple[Check, ...]
    record: TaskRecord | None = None
    remedy: str = ""
    #: What ran each target in this verification; a target that is missing here did not run.
    executed: Mapping[str, Execution] = field(default_factory=dict)

    @property
    def failures(self) -> tuple[Check, ...]:
        """Checks that do not hold."""
        return tuple(check for check in self.checks if not check.holds)

    def require(self, remedy: str = "") -> None:
        """Raise ``VerificationError`` that lists what failed, measured against allowed."""
        if not self.failures:
            return
        lines = [
            f"  {check.rung} {check.subject}: {check.name} {check.measured:.3g} (up to {check.allowed:.3g} "
            f"{check.unit} allowed) {check.detail}".rstrip()
            for check in self.failures
        ]
        raise VerificationError(
            "\n".join([f"{len(lines)} of {len(self.checks)} checks failed:", *lines]),
            remedy=remedy or self.remedy or _BUILD_AGAIN,
        )


@dataclass(frozen=True, slots=True)
class TargetRun:
    """Whether a target ran in one verification of its bundle, and what ran it."""

    target: str
    #: "ran here", "ran at build" (says the manifest), or "never ran".
    state: str
    fact: str

    def __str__(self) -> str:
        return f"{self.target} {self.state}" + (f" ({self.fact})" if self.fact else "")


def target_runs(manifest: Manifest, verdict: Verdict) -> list[TargetRun]:
    """One entry per target: what this verification ran, and otherwise what the manifest says of the build."""
    return [_target_run(name, entry, verdict.executed.get(name)) for name, entry in manifest.targets.items()]


def _target_run(name: str, entry: dict[str, Any], execution: Execution | None) -> TargetRun:
    if execution is not None:
        return TargetRun(name, "ran here", str(execution))
    if entry["status"] == NOT_EXECUTED:
        return TargetRun(name, "never ran", NOT_EXECUTED)
    told = entry.get("executed")
    fact = "{runtime} {version}, {device}".format(**told) if told else "by an earlier version"
    return TargetRun(name, "ran at build", f"{fact}, says the manifest")


def require_executed(runs: Sequence[TargetRun], targets: Sequence[str]) -> None:
    """Raise unless each of ``targets`` ran in this verification: ``UnknownNameError`` or ``NotExecutedError``."""
    states = {run.target: run for run in runs}
    for name in targets:
        if name not in states:
            raise UnknownNameError(f"The bundle holds no target {name!r}.", remedy=nearest(name, states))
    missing = [states[name] for name in targets if states[name].state != "ran here"]
    if missing:
        raise NotExecutedError(
            f"{len(missing)} of {len(targets)} required targets did not run in this verification: "
            f"{'; '.join(map(str, missing))}.",
            remedy="Verify the bundle on a machine that runs them: `kdexport doctor` says what this one lacks.",
        )


@dataclass(frozen=True, slots=True)
class VerifiedBundle:
    """A bundle folder whose checks held in this process; made by ``seal`` alone."""

    folder: Path
    manifest: Manifest
    _seal: object

    def __post_init__(self) -> None:
        if self._seal is not _SEAL:
            raise TypeError("only verification makes a VerifiedBundle")


def seal(folder: Path, manifest: Manifest, verdict: Verdict) -> VerifiedBundle:
    """A ``VerifiedBundle`` if every check of ``verdict`` held, else ``VerificationError``."""
    verdict.require()
    return VerifiedBundle(folder, manifest, _SEAL)


def verify_folder(
    folder: Path,
    manifest: Manifest,
    pixels: NDArray[np.uint8],
    *,
    task: TaskImages | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Verdict:
    """Check every file of a bundle against its unfused student on real images (N,S,S,3) uint8 and edge inputs.

    With ``task`` its files also run on the validation set, which is rung D.
    """
    progress("reference in float64")
    checks, subject = student_checks(folder, manifest, pixels)
    if subject is None:
        return Verdict(tuple(checks))
    executed: dict[str, Execution] = {}
    with tempfile.TemporaryDirectory(prefix="kdexport-verify-") as scratch:
        rebuilt = RebuiltGraphs(folder, manifest, Path(scratch))
        for name, form in onnx_files(manifest).items():
            progress(name)
            result = graph_checks(subject, name, form, rebuilt)
            checks += result.checks
            target = target_of(name)
            if target is not None and result.execution is not None and _is_own_run(target):
                executed[str(target)] = result.execution
    for target in map(parse_target, manifest.targets):
        if target.runs_as_reference:
            continue
        progress(f"{target} on {target.runtime.title}")
        result = target_checks(subject, str(target))
        checks += result.checks
        if result.execution is not None:
            executed[str(target)] = result.execution
    if task is None:
        return Verdict(tuple(checks), executed=executed)
    record, faults = measure_task(subject, task, progress)
    checks, remedy = explain_collapse(subject, [*checks, *faults, *task_checks(record, subject.policy)])
    return Verdict(tuple(checks), record, remedy, executed)


def _is_own_run(target: Target) -> bool:
    """Whether the reference run of a target's ONNX file is the run of the target itself."""
    return target.runs_as_reference and target.not_executable() is None


def replay(folder: Path, manifest: Manifest, progress: Callable[[str], None]) -> Verdict:
    """Files, golden images from their bytes, and the whole ladder on them; a failure stops no later check."""
    checks, pixels = _files(folder, manifest, progress)
    if pixels is None:
        return Verdict(tuple(checks))
    progress("golden images")
    checks += check_golden(folder, manifest, pixels)
    verdict = verify_folder(folder, manifest, pixels, progress=progress)
    progress("task, as stored")
    stored = stored_task(folder, manifest, stored_policy(manifest.data))
    return Verdict((*checks, *verdict.checks, *stored), executed=verdict.executed)


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
