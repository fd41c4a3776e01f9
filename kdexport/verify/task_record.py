"""Runs the files of a bundle and its unfused student on the validation set, and stores the per-image results."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from kdexport.backends.base import Logits, run_in_batches
from kdexport.bundle.manifest import TARGETS, TASK, load_unfused, onnx_files
from kdexport.checkpoint import save_tensors
from kdexport.core.digests import sha256_file
from kdexport.data.datasets import ImageSet
from kdexport.errors import BackendUnavailableError, KdexportError
from kdexport.targets import parse_target
from kdexport.verify.answers import REFERENCE, file_answers
from kdexport.verify.check import Check, check_at_most
from kdexport.verify.parity import unit_error
from kdexport.verify.policy import Policy
from kdexport.verify.reference import run_torch
from kdexport.verify.stored_results import TaskRecord, described_results, record_name
from kdexport.verify.student_checks import BundleContext
from kdexport.verify.target_checks import open_file
from kdexport.verify.task import rung_d, task_metrics, task_reference

#: Pixels of one pass over all files: large enough that an engine is loaded only a few times.
_CHUNK_PIXELS = 2048 * 64 * 64
_BATCH = 64


@dataclass(frozen=True, slots=True, eq=False)
class TaskImages:
    """The images of rung D: a split, and the positions in it that are used."""

    images: ImageSet
    indices: Sequence[int]


@dataclass(frozen=True, slots=True)
class _Runner:
    precision: str
    unit_error: float
    logits: Logits


def measure_task(
    context: BundleContext, task: TaskImages, progress: Callable[[str], None]
) -> tuple[TaskRecord, list[Check]]:
    """Run every file of the bundle that this machine can run on ``task``; the checks name files that failed to run."""
    images, indices = task.images, task.indices
    runners, faults = _runners(context)
    unfused = load_unfused(context.folder, context.manifest.spec)
    reference: list[NDArray[np.float32]] = []
    found: dict[str, list[NDArray[np.float32]]] = {name: [] for name in runners}
    preprocessing = context.manifest.spec.preprocessing
    done = 0
    for chosen in _chunks(indices, preprocessing.image_size):
        batch = preprocessing.normalise(images.read(chosen, preprocessing))
        reference.append(run_torch(unfused, batch).astype(np.float32))
        for name, runner in runners.items():
            found[name].append(runner.logits(batch))
        done += len(chosen)
        progress(f"task, {done:,} of {len(indices):,} images")
    exact = np.concatenate(reference)
    own = unit_error("fp32", context.reference)
    places = np.asarray(indices, np.int64)
    labels = images.labels[places]
    logits = {name: np.concatenate(parts) for name, parts in found.items()}
    record = TaskRecord(
        task_reference(exact, labels, places, own),
        {
            name: task_metrics(logits[name], exact, precision=runner.precision, unit_error=runner.unit_error)
            for name, runner in runners.items()
        },
        {name: file_answers(given, labels) for name, given in {REFERENCE: exact, **logits}.items()},
    )
    return record, faults


def task_checks(record: TaskRecord, policy: Policy) -> list[Check]:
    """Rung D of every file."""
    return [
        check for name, metrics in record.files.items() for check in rung_d(name, metrics, record.reference, policy)
    ]


def save_record(folder: Path, record: TaskRecord) -> dict[str, object]:
    """Write the per-image results into a bundle folder; return their summary for the manifest."""
    reference = record.reference
    tensors = {
        "indices": reference.indices,
        "labels": reference.labels,
        "predictions": reference.predictions,
        "margins": reference.margins,
    }
    for name, metrics in record.files.items():
        tensors[f"{name}:predictions"] = metrics.predictions
        tensors[f"{name}:divergences"] = metrics.divergences
        tensors[f"{name}:errors"] = metrics.errors
    (folder / TASK).parent.mkdir(parents=True, exist_ok=True)
    save_tensors(folder / TASK, {name: torch.from_numpy(values) for name, values in tensors.items()})
    return described_results(record)


def _chunks(indices: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    step = max(_BATCH, _CHUNK_PIXELS // (size * size))
    for start in range(0, len(indices), step):
        yield indices[start : start + step]


def _runners(context: BundleContext) -> tuple[dict[str, _Runner], list[Check]]:
    """The reference run of each distinct ONNX file, and each target that another runtime runs on this machine.

    Files of equal content run once: a float32 target of onnxruntime is the exported model itself.
    """
    found: dict[str, _Runner] = {}
    faults: list[Check] = []
    seen: set[str] = set()
    batch = (min(_BATCH, context.batches[-1]),)
    for name, form in onnx_files(context.manifest).items():
        path = context.folder / name
        try:
            content = sha256_file(path)
            if content not in seen:
                found[name] = _runner(context, form, _batched(open_file(path, form).logits, batch))
            seen.add(content)
        except (KdexportError, OSError) as error:
            faults.append(_did_not_run(name, str(error).partition("\n")[0]))
    for target in map(parse_target, context.manifest.targets):
        if target.runs_as_reference or target.not_executable() is not None:
            continue
        path, kept = context.folder / TARGETS / str(target) / target.artifact, context.plan(str(target)).nodes
        try:
            opened = target.runtime.open(path, target.precision, kept=kept)
        except BackendUnavailableError:
            # The checks of the target report that it was not executed, and why.
            continue
        except KdexportError as error:
            faults.append(_did_not_run(str(target), error.message))
            continue
        found[record_name(target)] = _runner(context, context.computes_in(target), partial(opened.run, batches=batch))
    return found, faults


def _did_not_run(name: str, fact: str) -> Check:
    return check_at_most("D", name, "runs", 1, 0, unit="faults", detail=fact)


def _runner(context: BundleContext, form: str, logits: Logits) -> _Runner:
    return _Runner(form.partition("-")[0], unit_error(form, context.reference), logits)


def _batched(logits: Logits, batch: tuple[int, ...]) -> Logits:
    return lambda images: run_in_batches(logits, images, batch)
