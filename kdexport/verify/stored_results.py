"""The per-image results of all files of a bundle, as the build stored them; read without torch."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from kdexport.bundle.manifest import TARGETS, TASK, Manifest
from kdexport.core.digests import sha256_file
from kdexport.errors import BundleError
from kdexport.targets import Target
from kdexport.verify.answers import FileAnswers
from kdexport.verify.policy import PRECISIONS
from kdexport.verify.task import TaskMetrics, TaskReference


@dataclass(frozen=True, slots=True, eq=False)
class TaskRecord:
    """Per-image results of all files of a bundle, enough to decide rung D again without a model."""

    reference: TaskReference
    files: dict[str, TaskMetrics]
    #: By file and ``answers.REFERENCE``, where the files ran in this process; ``load_answers`` reads stored ones.
    answers: dict[str, FileAnswers] = field(default_factory=dict)


def described_results(record: TaskRecord) -> dict[str, Any]:
    """The summary of per-image results for the manifest."""
    reference = record.reference
    return {
        "images": len(reference.labels),
        "reference_top1": float(np.mean(reference.predictions == reference.labels)),
        "own_error": reference.own_error,
        "files": {
            name: {
                "precision": metrics.precision,
                "unit_error": metrics.unit_error,
                "top1": float(np.mean(metrics.predictions == reference.labels)),
                "flips": int(np.sum(metrics.predictions != reference.predictions)),
                "mean_divergence": float(np.mean(metrics.divergences)),
            }
            for name, metrics in record.files.items()
        },
    }


def load_record(folder: Path, manifest: Manifest) -> TaskRecord | None:
    """The stored results of a bundle, None if it has none; ``BundleError`` if they are not those of its build."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    described = manifest.data.get("task")
    if described is None:
        return None
    path = folder / TASK
    if not path.is_file() or sha256_file(path) != manifest.files.get(TASK):
        raise BundleError(f"{TASK} is missing or differs from the manifest.", remedy="Build the bundle again.")
    try:
        stored = load_file(path)
        reference = TaskReference(
            indices=stored["indices"],
            labels=stored["labels"],
            predictions=stored["predictions"],
            margins=stored["margins"],
            own_error=float(described["own_error"]),
        )
        files = {
            str(name): TaskMetrics(
                precision=str(entry["precision"]),
                predictions=stored[f"{name}:predictions"],
                divergences=stored[f"{name}:divergences"],
                errors=stored[f"{name}:errors"],
                unit_error=float(entry["unit_error"]),
            )
            for name, entry in described["files"].items()
        }
        unknown = {metrics.precision for metrics in files.values()} - set(PRECISIONS)
        if unknown:
            raise ValueError(f"precision {min(unknown)!r}")
    except (KeyError, TypeError, ValueError, AttributeError, SafetensorError) as error:
        raise BundleError(
            f"{TASK} does not match the manifest: {type(error).__name__}: {error}.",
            remedy="Build the bundle again.",
        ) from error
    return TaskRecord(reference, files)


def record_name(target: Target) -> str:
    """The name of the results that ``target`` gave in its own runtime, in the record."""
    where = f"{TARGETS}/{target}/{target.artifact}"
    return where if target.compiles else f"{where} on {target.runtime.title}"
