"""The verification of a bundle folder, while it is built and again later, and its verdict.

A build verifies on validation images (``verify_folder``); a finished bundle is verified from its own files
(``replay``). Only ``seal`` makes a ``VerifiedBundle``, and only if no check failed.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdexport.backends.base import Execution
from kdexport.bundle.manifest import (
    EMPTY_FOLDER,
    NOT_EXECUTED,
    TARGETS,
    TASK,
    Manifest,
    irregular_entries,
    onnx_files,
    read_golden,
    target_of,
)
from kdexport.bundle.slim_form import require_whole
from kdexport.core.files import scratch_folder
from kdexport.errors import BundleError, NotExecutedError, UnknownNameError, VerificationError
from kdexport.registry import nearest
from kdexport.targets import Target, parse_target
from kdexport.verify.check import Check, attempt, check_at_most, require_decided
from kdexport.verify.consistency import check_consistency, check_recorded_errors
from kdexport.verify.int8_collapse import explain_collapse
from kdexport.verify.own_logits_checks import check_own_logits
from kdexport.verify.policy import Policy, stored_policy
from kdexport.verify.rebuilt_graphs import RebuiltGraphs
from kdexport.verify.stored_limits import check_stored_limits
from kdexport.verify.stored_results import TaskRecord, load_record
from kdexport.verify.student_checks import check_algebra, check_golden, check_integrity, student_checks
from kdexport.verify.target_checks import CONTENT, FileResult, graph_checks, target_checks
from kdexport.verify.task_record import TaskImages, measure_task, task_checks

_SEAL = object()

_REMEDY = (
    "The bundle is not the student that was trained. Run kdexport explain-failure BUNDLE to find the file and node "
    "that differ, and kdexport explain KDX330 for the meaning of the rungs."
)


@dataclass(frozen=True, slots=True)
class Verdict:
    """All checks of one verification, and the per-image results of rung D."""

    checks: tuple[Check, ...]
    record: TaskRecord | None = None
    remedy: str = ""
    #: What ran each target in this verification; targets that did not run are not in it.
    executed: Mapping[str, Execution] = field(default_factory=dict)

    @property
    def failures(self) -> tuple[Check, ...]:
        """Checks that failed."""
        return tuple(check for check in self.checks if check.failed)

    @property
    def not_run(self) -> tuple[Check, ...]:
        """Checks that did not run; they neither hold nor failed."""
        return tuple(check for check in self.checks if not check.ran)

    @property
    def beyond(self) -> tuple[Check, ...]:
        """Checks whose measured value is beyond the limit, undecided with the images of the task."""
        return tuple(check for check in self.checks if check.beyond)

    def require(self, remedy: str = "") -> None:
        """Raise ``VerificationError`` with every failed check, measured against allowed, if there is one."""
        if not self.failures:
            return
        lines = [check.line for check in self.failures]
        raise VerificationError(
            "\n".join([f"{len(lines)} of {len(self.checks) - len(self.not_run)} checks failed:", *lines]),
            remedy=remedy or self.remedy or _REMEDY,
        )

    def require_decided(self) -> None:
        """Raise ``UndecidedError`` with every check that is beyond its limit, if there is one."""
        require_decided([check.to_json() for check in self.checks], self.remedy)


@dataclass(frozen=True, slots=True)
class VerifiedBundle:
    """A bundle folder of which no check failed in this process; only ``seal`` makes one."""

    folder: Path
    manifest: Manifest
    _seal: object

    def __post_init__(self) -> None:
        if self._seal is not _SEAL:
            raise TypeError("only verification makes a VerifiedBundle")


def seal(folder: Path, manifest: Manifest, verdict: Verdict) -> VerifiedBundle:
    """A ``VerifiedBundle`` if no check of ``verdict`` failed, else ``VerificationError``."""
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

    With ``task`` the files also run on the validation set, which is rung D.
    """
    progress("reference in float64")
    student = attempt("A", "student", partial(student_checks, folder, manifest, pixels))
    if isinstance(student, Check):
        return Verdict((student,))
    checks, context = student
    if context is None:
        return Verdict(tuple(checks))
    executed: dict[str, Execution] = {}
    with scratch_folder("verify") as scratch:
        rebuilt = RebuiltGraphs(folder, manifest, scratch, context.fused)
        for name, form in onnx_files(manifest).items():
            progress(name)
            result = _file_result(name, partial(graph_checks, context, name, form, rebuilt))
            checks += result.checks
            target = target_of(name)
            if target is not None and result.execution is not None and _is_own_run(target):
                executed[str(target)] = result.execution
    for target in map(parse_target, manifest.targets):
        if target.runs_as_reference:
            continue
        progress(f"{target} on {target.runtime.title}")
        result = _file_result(f"{TARGETS}/{target}", partial(target_checks, context, str(target)))
        checks += result.checks
        if result.execution is not None:
            executed[str(target)] = result.execution
    if task is None:
        checks += _checked("files", TASK, partial(check_recorded_errors, context))
        return Verdict(tuple(checks), executed=executed)
    record, faults = measure_task(context, task, progress)
    checks, remedy = explain_collapse(context, [*checks, *faults, *task_checks(record, context.policy)])
    return Verdict(tuple(checks), record, remedy, executed)


def _file_result(name: str, run: Callable[[], FileResult]) -> FileResult:
    result = attempt("audit", name, run)
    return FileResult((result,)) if isinstance(result, Check) else result


def _is_own_run(target: Target) -> bool:
    """Whether the reference run of a target's ONNX file is the run of the target itself."""
    return target.runs_as_reference and target.not_executable() is None


def replay(folder: Path, manifest: Manifest, progress: Callable[[str], None]) -> Verdict:
    """Verify a finished bundle: file digests, golden images from their bytes, and the ladder on these images.

    A failed check does not stop later ones. Raises ``NotExecutedError`` for a slim bundle.
    """
    require_whole(folder, manifest)
    checks, pixels = _files(folder, manifest, progress)
    if pixels is None:
        return Verdict(tuple(checks))
    progress("golden images")
    checks += _checked("golden", "images", partial(check_golden, folder, manifest, pixels))
    checks += _checked("golden", "limits", partial(check_stored_limits, folder, manifest, pixels))
    for name in manifest.targets:
        checks += _checked("golden", name, partial(check_own_logits, folder, manifest, name, pixels))
    verdict = verify_folder(folder, manifest, pixels, progress=progress)
    progress("stored results of the task")
    stored = _checked("D", TASK, lambda: stored_task(folder, manifest, stored_policy(manifest.data)))
    return Verdict((*checks, *verdict.checks, *stored), executed=verdict.executed)


def stored_task(folder: Path, manifest: Manifest, policy: Policy) -> list[Check]:
    """Rung D decided again from the per-image results in the bundle; no image and no model is needed."""
    try:
        record = load_record(folder, manifest)
    except BundleError as error:
        return [check_at_most("D", TASK, "readable", 1, 0, unit="faults", detail=error.message)]
    return [] if record is None else task_checks(record, policy)


def replay_algebra(folder: Path, manifest: Manifest, progress: Callable[[str], None]) -> Verdict:
    """Verify only the file digests and rung A, with one check for each folded block.

    Raises ``NotExecutedError`` for a slim bundle.
    """
    require_whole(folder, manifest)
    checks, pixels = _files(folder, manifest, progress)
    if pixels is None:
        return Verdict(tuple(checks))
    progress("algebra in float64")
    return Verdict((*checks, *_checked("A", "student", partial(check_algebra, folder, manifest, pixels))))


def _checked(rung: str, subject: str, run: Callable[[], list[Check]]) -> list[Check]:
    result = attempt(rung, subject, run)
    return [result] if isinstance(result, Check) else result


def _files(
    folder: Path, manifest: Manifest, progress: Callable[[str], None]
) -> tuple[list[Check], NDArray[np.uint8] | None]:
    progress("files")
    checks = check_integrity(folder, manifest)
    if any(kind != EMPTY_FOLDER for kind in irregular_entries(folder).values()):
        # A link may lead out of the bundle, and reading a pipe never ends.
        return checks, None
    checks += check_consistency(folder, manifest)
    pixels = attempt("golden", "images", partial(read_golden, folder, manifest))
    return ([*checks, pixels], None) if isinstance(pixels, Check) else (checks, pixels)


@dataclass(frozen=True, slots=True)
class TargetRun:
    """Whether a target ran in one verification of its bundle, and what ran it."""

    target: str
    #: "ran here", "ran at build" (according to the manifest), or "never ran".
    state: str
    fact: str
    #: Why the content of its files was not checked in this verification; empty if it was.
    unread: str = ""

    @property
    def facts(self) -> str:
        """What ran it, and what was not read of it."""
        return "; ".join(filter(None, (self.fact, self.unread and f"its content was {self.unread}")))

    def __str__(self) -> str:
        return f"{self.target} {self.state}" + (f" ({self.facts})" if self.facts else "")


def target_runs(manifest: Manifest, verdict: Verdict) -> list[TargetRun]:
    """One entry for each target: what ran it in this verification, or else, by the manifest, at the build; and whether
    the content of its files was not read.
    """
    unread = {check.subject.split("/")[1]: check.detail for check in verdict.not_run if check.name == CONTENT}
    found = [_target_run(name, entry, verdict.executed.get(name)) for name, entry in manifest.targets.items()]
    return [replace(run, unread=unread.get(run.target, "")) for run in found]


def _target_run(name: str, entry: dict[str, Any], execution: Execution | None) -> TargetRun:
    if execution is not None:
        return TargetRun(name, "ran here", str(execution))
    if entry["status"] == NOT_EXECUTED:
        unbound = parse_target(name).compiles and "compiled" not in entry
        return TargetRun(name, "never ran", NOT_EXECUTED + ", not bound to its ONNX file" * unbound)
    recorded = entry.get("executed")
    fact = "{runtime} {version}, {device}".format(**recorded) if recorded else "runtime not recorded"
    return TargetRun(name, "ran at build", f"{fact}, according to the manifest")


def require_executed(runs: Sequence[TargetRun], targets: Sequence[str]) -> None:
    """Raise ``NotExecutedError`` unless each of ``targets`` ran in this verification.

    ``UnknownNameError`` if the bundle has no such target.
    """
    states = {run.target: run for run in runs}
    for name in targets:
        if name not in states:
            raise UnknownNameError(f"The bundle has no target {name!r}.", remedy=nearest(name, states))
    missing = [states[name] for name in targets if states[name].state != "ran here"]
    if missing:
        raise NotExecutedError(
            f"{len(missing)} of {len(targets)} required targets did not run in this verification: "
            f"{'; '.join(map(str, missing))}.",
            remedy="Run kdexport doctor to see what this machine lacks, or verify the bundle on a machine that can run "
            "them.",
        )
