"""What the pages show of a bundle, as numbers: each target, the scores of one file, its flips. No text, no drawing."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdexport.bundle.layout import TARGETS, UNFUSED
from kdexport.bundle.manifest import MODEL, Manifest, onnx_files
from kdexport.core.digests import sha256_file
from kdexport.errors import ConfigError, UnknownNameError
from kdexport.stats.proportions import Estimate, estimate_proportion
from kdexport.stats.scores import CONFIDENCE, Scores, calibration_error, score_answers
from kdexport.targets import DEFAULT_TARGET, Target, parse_target, providers
from kdexport.verify.answers import FileAnswers, load_answers
from kdexport.verify.policy import stored_policy
from kdexport.verify.stored_results import TaskRecord, load_record, record_name
from kdexport.verify.task import allowed_difference

#: Images that are shown.
SHOWN_IMAGES = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Evidence:
    """What was measured for a bundle beside its manifest: results and answers by image, and the sizes of its files.

    ``same`` maps each ONNX file to the first one of the same content, which is the one that was run. ``thumbnails`` are
    images of the validation split as data URIs, by position.
    """

    record: TaskRecord | None = None
    answers: Mapping[str, FileAnswers] = field(default_factory=dict)
    sizes: Mapping[str, int] = field(default_factory=dict)
    same: Mapping[str, str] = field(default_factory=dict)
    thumbnails: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class TargetFacts:
    """One row of the table of targets. ``by_reference``: its accuracy is that of its ONNX file in onnxruntime on a CPU,
    because the target did not run on the machine of the build.
    """

    name: str
    status: str
    device: str
    bytes: int | None
    latency: Mapping[str, Any] | None
    not_timed: str
    results: str
    by_reference: bool
    top1: Estimate | None
    flips: int | None
    images: int
    calibration_error: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class ShownImage:
    """An image whose answer changed, or could most easily: its position, classes by index, and the margin.

    ``changed`` maps each file that gives another class than the unfused student to that class.
    """

    position: int
    label: int
    predicted: int
    margin: float
    changed: Mapping[str, int]


def stored_evidence(folder: Path, manifest: Manifest) -> Evidence:
    """What a finished bundle stores; raises ``BundleError`` if that is not what its build wrote."""
    return Evidence(
        record=load_record(folder, manifest),
        answers=load_answers(folder, manifest) or {},
        sizes=file_sizes(folder),
        same=_same(manifest, manifest.files),
    )


def new_evidence(folder: Path, manifest: Manifest, record: TaskRecord | None) -> Evidence:
    """What a build measured before its files have digests."""
    digests = {name: sha256_file(folder / name) for name in onnx_files(manifest) if (folder / name).is_file()}
    return Evidence(
        record=record,
        answers={} if record is None else record.answers,
        sizes=file_sizes(folder),
        same=_same(manifest, digests),
    )


def file_sizes(folder: Path) -> dict[str, int]:
    """Bytes of every file, by relative path."""
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()}


def _same(manifest: Manifest, digests: Mapping[str, str]) -> dict[str, str]:
    first: dict[str, str] = {}
    return {name: first.setdefault(digests[name], name) for name in onnx_files(manifest) if name in digests}


def target_facts(data: Mapping[str, Any], evidence: Evidence) -> list[TargetFacts]:
    """One row for each target of a manifest, in its order."""
    return [_target_facts(name, entry, data, evidence) for name, entry in data["targets"].items()]


def _target_facts(name: str, entry: Mapping[str, Any], data: Mapping[str, Any], evidence: Evidence) -> TargetFacts:
    target = _known(name)
    results, by_reference = _results(name, target, evidence)
    times = data.get("target_times") or {"targets": {}, "not_timed": {}}
    compared = data.get("latency")
    if name == DEFAULT_TARGET and compared and not times["targets"]:
        # Bundles of earlier versions have the comparison with the unfused student alone.
        times = {
            "targets": {name: {"ms": compared["candidate_ms"], "sessions": compared["sessions"], "ratio": 1.0}},
            "not_timed": {},
        }
    executed = entry.get("executed")
    measured = (data.get("task") or {}).get("files", {}).get(results)
    images = (data.get("task") or {}).get("images", 0)
    artifact = "" if target is None else f"{TARGETS}/{name}/{target.artifact}"
    return TargetFacts(
        name=name,
        status=str(entry["status"]),
        device="" if executed is None else _device(executed),
        bytes=evidence.sizes.get(artifact),
        latency=times["targets"].get(name),
        not_timed=str(times["not_timed"].get(name, "")),
        results=results if measured else "",
        by_reference=by_reference and measured is not None,
        top1=_share(measured["top1"], images) if measured and images else None,
        flips=measured["flips"] if measured else None,
        images=images,
        calibration_error=calibration_of(results, evidence),
    )


def _device(executed: Mapping[str, Any]) -> str:
    # OpenVINO puts the commit after its version.
    return f"{executed['runtime']} {executed['version'].partition('-')[0]}, {executed['device']}"


def _known(name: str) -> Target | None:
    try:
        return parse_target(name)
    except (UnknownNameError, ConfigError):
        return None


def _results(name: str, target: Target | None, evidence: Evidence) -> tuple[str, bool]:
    """The file of the task that says how accurate a target is, and whether that is its ONNX file in its place."""
    onnx = f"{TARGETS}/{name}/{MODEL}"
    onnx = evidence.same.get(onnx, onnx)
    if target is None or target.runs_as_reference:
        return onnx, False
    own = record_name(target)
    recorded = evidence.record is not None and own in evidence.record.files
    return (own, False) if recorded else (onnx, True)


def _share(value: float, images: int) -> Estimate | None:
    """A share of images with its interval; None for a number that no count of them gives."""
    if not 0 <= value <= 1:
        return None
    return estimate_proportion(round(value * images), images, CONFIDENCE)


def reference_top1(data: Mapping[str, Any]) -> Estimate | None:
    """The accuracy of the unfused student on the task."""
    task = data.get("task")
    return _share(task["reference_top1"], task["images"]) if task and task["images"] else None


def calibration_of(results: str, evidence: Evidence) -> float | None:
    """The expected calibration error of a file; None if its answers are not recorded or not finite."""
    answers = evidence.answers.get(results)
    if answers is None or evidence.record is None:
        return None
    confidence = answers.answered.confidence.astype(np.float64)
    right = answers.classes[:, 0] == evidence.record.reference.labels
    return calibration_error(confidence, right) if np.isfinite(confidence).all() else None


def main_file(evidence: Evidence) -> str:
    """The file whose scores are shown in full: the exported model where it ran; empty without answers."""
    if evidence.record is None or not evidence.answers:
        return ""
    return MODEL if MODEL in evidence.answers else next(iter(evidence.answers))


def scores_of(name: str, evidence: Evidence, classes: tuple[str, ...]) -> Scores | None:
    """The scores of a file; None if its answers are not recorded or not finite."""
    answers, record = evidence.answers.get(name), evidence.record
    if answers is None or record is None or not np.isfinite(answers.answered.confidence).all():
        return None
    return score_answers(answers.answered, record.reference.labels, classes)


def flip_margins(record: TaskRecord) -> dict[str, NDArray[np.float64]]:
    """The margins of the unfused student at the images where each file gives another class."""
    reference = record.reference
    return {
        name: reference.margins[metrics.predictions != reference.predictions].astype(np.float64)
        for name, metrics in record.files.items()
    }


def explained_margins(record: TaskRecord, data: Mapping[str, Any]) -> dict[str, float]:
    """The margin of each file up to which the error that the rungs allow can flip an answer."""
    policy = stored_policy(data)
    return {name: 2 * allowed_difference(metrics, record.reference, policy) for name, metrics in record.files.items()}


def shown_images(record: TaskRecord, count: int = SHOWN_IMAGES) -> list[ShownImage]:
    """The flips of the surest answers; without a flip, the answers of the smallest margin."""
    reference, margins = record.reference, record.reference.margins
    changes = {name: metrics.predictions != reference.predictions for name, metrics in record.files.items()}
    flipped = np.flatnonzero(np.any(list(changes.values()), axis=0)) if changes else np.empty(0, np.int64)
    if len(flipped):
        rows = flipped[np.argsort(-margins[flipped], kind="stable")][:count]
    else:
        rows = np.argsort(margins, kind="stable")[:count]
    return [
        ShownImage(
            position=int(reference.indices[row]),
            label=int(reference.labels[row]),
            predicted=int(reference.predictions[row]),
            margin=float(margins[row]),
            changed={name: int(record.files[name].predictions[row]) for name, at in changes.items() if at[row]},
        )
        for row in rows
    ]


def served_elsewhere(data: Mapping[str, Any]) -> dict[str, str]:
    """How to run each target of a manifest that ``kdexport serve`` does not run."""
    known = {name: _known(name) for name in data["targets"]}
    return {
        name: target.runtime.served_elsewhere()
        for name, target in known.items()
        if target is not None and not providers(target)
    }


def unfused_bytes(evidence: Evidence) -> int | None:
    """The size of the unfused student's weights."""
    return evidence.sizes.get(UNFUSED)
