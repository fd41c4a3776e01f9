"""Checks that the statements of a manifest agree with the files of its bundle, without running a model.

A file that is changed together with its sha256 in the manifest agrees with its digest. These checks compare the content
of the files with the other fields that are derived from them.
"""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from kdexport.backends.base import ONNX_FILE, Finding, unchecked
from kdexport.bundle.layout import ANSWERS, GOLDEN_INDICES, SBOM
from kdexport.bundle.manifest import (
    GOLDEN_LOGITS,
    MANIFEST,
    MODEL,
    TARGETS,
    TASK,
    UNFUSED,
    Manifest,
    has_synthetic_images,
    onnx_files,
)
from kdexport.bundle.sbom import normalised, read_versions, serial_number
from kdexport.checkpoint import load_tensors
from kdexport.core.digests import sha256_file
from kdexport.data.datasets import spread
from kdexport.graph.audit import operator_counts
from kdexport.targets import Target, parse_target
from kdexport.verify.answers import REFERENCE, load_answers
from kdexport.verify.check import Check, attempt, check_at_most, from_finding
from kdexport.verify.parity import unit_error
from kdexport.verify.stored_results import TaskRecord, described_results, load_record, record_name
from kdexport.verify.student_checks import BundleContext

#: Means of float32 values differ between processors in the last digits.
_SAME_MEAN = 1e-4

#: What the results have for each image, and whether it is a floating point number.
_RESULTS = MappingProxyType(
    {"indices": False, "labels": False, "predictions": False, "margins": True, "divergences": True, "errors": True}
)

#: The largest error over a few golden images is smaller than the one over all images of the build.
_SAME_ERROR = 10.0


def check_consistency(folder: Path, manifest: Manifest) -> list[Check]:
    """One check for each statement: origin, software, operators, compiled files, results and answers of the task,
    labels of the golden images.
    """
    statements: dict[str, Callable[[Path, Manifest], Finding]] = {
        SBOM: _software,
        UNFUSED: _origin,
        MODEL: _operators,
        TASK: _task,
        ANSWERS: _answers,
        GOLDEN_LOGITS: _golden,
    }
    compiled = [target for target in map(parse_target, manifest.targets) if target.compiles]
    statements |= {f"{TARGETS}/{target}/{target.artifact}": partial(_compiled, target) for target in compiled}
    results = {name: attempt("files", name, partial(say, folder, manifest)) for name, say in statements.items()}
    return [
        result if isinstance(result, Check) else from_finding(name, result, rung="files")
        for name, result in results.items()
    ]


def _origin(folder: Path, manifest: Manifest) -> Finding:
    """The unfused student is the checkpoint that the bundle was built from."""
    recorded = manifest.data["provenance"].get("checkpoint_sha256")
    found = sha256_file(folder / UNFUSED)
    if recorded is None:
        return unchecked("origin", "the bundle is of an earlier version that did not record the checkpoint")
    fact = f"sha256 {found[:12]}, and provenance.checkpoint_sha256 in {MANIFEST} is {recorded[:12]}"
    return Finding("origin", recorded == found, fact)


def _software(folder: Path, manifest: Manifest) -> Finding:
    """The list of software belongs to this build and has the versions of the manifest."""
    if SBOM not in manifest.files and not (folder / SBOM).exists():
        return unchecked("software", "the bundle is of an earlier version that wrote no list of software")
    serial, found = read_versions(folder / SBOM)
    recorded = {**manifest.data["versions"], "kdexport": manifest.data.get("kdexport")}
    wrong = [
        f"{name} {found.get(normalised(name), 'absent')}, {version} in {MANIFEST}"
        for name, version in sorted(recorded.items())
        if found.get(normalised(name)) != version
    ]
    expected = serial_number(manifest.build_key).urn
    if serial != expected:
        wrong.append(f"the serial number is {serial}, that of the build is {expected}")
    return Finding("software", not wrong, "; ".join(wrong) or f"{len(found)} packages, versions as in {MANIFEST}")


def _compiled(target: Target, folder: Path, manifest: Manifest) -> Finding:
    """The compiled file and the ONNX file of a target are those that the build recorded together."""
    recorded = manifest.targets[str(target)].get("compiled")
    if recorded is None:
        return unchecked("compiled from its ONNX file", "not bound: the bundle is of an earlier version")
    place = folder / TARGETS / str(target)
    files = {"artifact_sha256": place / target.artifact, "onnx_sha256": place / ONNX_FILE}
    wrong = [
        f"{path.name} has sha256 {found[:12]}, and {key} of {target} in {MANIFEST} is {recorded[key][:12]}"
        for key, path in files.items()
        if (found := sha256_file(path)) != recorded[key]
    ]
    fact = f"{target.artifact} and {ONNX_FILE} as recorded together by the build"
    return Finding("compiled from its ONNX file", not wrong, "; ".join(wrong) or fact)


def _operators(folder: Path, manifest: Manifest) -> Finding:
    found = operator_counts(onnx.load(str(folder / MODEL), load_external_data=False))
    recorded = manifest.data["operators"]["fused"]
    names = sorted(name for name in {*found, *recorded} if found.get(name, 0) != recorded.get(name, 0))
    wrong = [f"{found.get(name, 0)} {name}, {recorded.get(name, 0)} in {MANIFEST}" for name in names]
    return Finding("operators", not wrong, "; ".join(wrong) or f"{sum(found.values())} nodes, as in {MANIFEST}")


def _task(folder: Path, manifest: Manifest) -> Finding:
    """The figures of the task are those of the stored results, and every graph has results."""
    record = load_record(folder, manifest)
    if record is None:
        exists = (folder / TASK).exists()
        return Finding("task", not exists, f"the file exists, and {MANIFEST} has no task" if exists else "no task")
    wrong = [*_wrong_results(folder, manifest, record), *_wrong_precisions(manifest, record)]
    # Figures of incomplete results cannot be computed.
    wrong = wrong or _wrong_figures(manifest.data["task"], record)
    count = len(record.reference.labels)
    return Finding("task", not wrong, "; ".join(wrong[:3]) or f"{count:,} images, figures as in {MANIFEST}")


def _wrong_results(folder: Path, manifest: Manifest, record: TaskRecord) -> list[str]:
    """Stored results that are incomplete or impossible."""
    reference, classes = record.reference, manifest.spec.num_classes
    images = len(reference.labels)
    arrays = {"labels": reference.labels, "predictions": reference.predictions}
    arrays |= {f"{name}:predictions": metrics.predictions for name, metrics in record.files.items()}
    wrong = [f"{name} has a class that does not exist" for name, values in arrays.items() if _outside(values, classes)]
    sizes = {"indices": reference.indices, "margins": reference.margins} | arrays
    for name, metrics in record.files.items():
        sizes |= {f"{name}:divergences": metrics.divergences, f"{name}:errors": metrics.errors}
    wrong += [f"{name} has shape {a.shape}, expected ({images},)" for name, a in sizes.items() if a.shape != (images,)]
    if len(np.unique(reference.indices)) != images:
        wrong.append("an image is in the results twice")
    tensors = load_tensors(folder / TASK)
    wrong += [
        f"{name} has the type {tensor.dtype}" if name.rpartition(":")[2] in _RESULTS else f"{name} is unknown"
        for name, tensor in tensors.items()
        if tensor.is_floating_point() != _RESULTS.get(name.rpartition(":")[2])
    ]
    stored = {name.rpartition(":")[0] for name in tensors if ":" in name}
    wrong += [f"{MANIFEST} has no figures of {name}" for name in sorted(stored - set(record.files))]
    measured = {manifest.files.get(name) for name in record.files}
    # Files with the same content are run once.
    missing = [name for name in onnx_files(manifest) if manifest.files.get(name) not in measured]
    return [*wrong, *(f"there are no results of {name}" for name in missing)]


def _answers(folder: Path, manifest: Manifest) -> Finding:
    """The likeliest class of each image is the prediction of the stored results, which decide rung D."""
    record, answers = load_record(folder, manifest), load_answers(folder, manifest)
    if answers is None:
        exists = (folder / ANSWERS).exists()
        return Finding(
            "answers", not exists, f"the file exists, and {MANIFEST} has none" if exists else "none recorded"
        )
    if record is None:
        return Finding("answers", False, f"{MANIFEST} has answers and no task")
    expected = {REFERENCE: record.reference.predictions}
    expected |= {name: metrics.predictions for name, metrics in record.files.items()}
    wrong = [f"there are no answers of {name}" for name in sorted(expected.keys() - answers.keys())]
    for name in sorted(answers.keys() & expected.keys()):
        found, labels = answers[name], record.reference.labels
        if not np.array_equal(found.classes[:, 0], expected[name]):
            wrong.append(f"the likeliest classes of {name} are not its predictions")
        elif not np.array_equal(found.ranks == 0, _alone_and_right(found.classes[:, 0] == labels, found.logits)):
            wrong.append(f"the ranks of {name} are not those of its predictions")
    count = len(record.reference.labels)
    return Finding("answers", not wrong, "; ".join(wrong[:3]) or f"{count:,} images, predictions as in {TASK}")


def _alone_and_right(right: NDArray[np.bool_], logits: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Images whose true class is the likeliest, and no other class is as likely."""
    return right & ((logits[:, 0] > logits[:, 1]) if logits.shape[1] > 1 else True)


def check_recorded_errors(context: BundleContext) -> list[Check]:
    """The errors of each precision that the manifest records are about those measured on the golden images.

    Rung D derives from them which flips are explained and which divergence is allowed, so that a larger one would be a
    looser limit. The build measures them on other images.
    """
    task = context.manifest.data.get("task")
    if task is None:
        return []
    forms = _forms(context.manifest)
    recorded = {MANIFEST: ("fp32", task["own_error"])}
    recorded |= {name: (forms[name], entry["unit_error"]) for name, entry in task["files"].items() if name in forms}
    return [_recorded_error(context, name, form, error) for name, (form, error) in recorded.items()]


def _recorded_error(context: BundleContext, name: str, form: str, error: float) -> Check:
    measured = unit_error(form, context.reference)
    return check_at_most(
        "files", name, "recorded error of its precision", error / measured if measured else math.inf if error else 0.0,
        _SAME_ERROR, unit="x measured", detail=f"{error:.3g} in {MANIFEST}, {measured:.3g} on the golden images",
    )  # fmt: skip


def _forms(manifest: Manifest) -> dict[str, str]:
    """The form that each file or target of the task computes in."""
    export, targets = manifest.data["export"], map(parse_target, manifest.targets)
    forms = {record_name(t): t.runtime.computes_in(t.precision, export) for t in targets if not t.runs_as_reference}
    return forms | onnx_files(manifest)


def _wrong_precisions(manifest: Manifest, record: TaskRecord) -> list[str]:
    """Results that the manifest attributes to another precision, whose limits may be looser, than their file has."""
    forms = _forms(manifest)
    return [
        f"{name} has the precision {metrics.precision} in {MANIFEST}, expected {forms[name].partition('-')[0]}"
        for name, metrics in record.files.items()
        if name in forms and metrics.precision != forms[name].partition("-")[0]
    ]


def _outside(values: NDArray[np.integer[Any]], classes: int) -> bool:
    return bool(((values < 0) | (values >= classes)).any())


def _wrong_figures(described: dict[str, Any], record: TaskRecord) -> list[str]:
    """Figures of the manifest that differ from those of the stored results."""
    expected = described_results(record)
    pairs = [("", key, described.get(key), expected[key]) for key in ("images", "reference_top1")]
    for name, entry in expected["files"].items():
        pairs += [(f" of {name}", key, described["files"][name][key], value) for key, value in entry.items()]
    return [
        f"{key}{where} is {found}, and {recorded} in {MANIFEST}"
        for where, key, recorded, found in pairs
        if not _same(recorded, found)
    ]


def _same(recorded: object, found: object) -> bool:
    if isinstance(recorded, float) and isinstance(found, float):
        both_nan = math.isnan(recorded) and math.isnan(found)
        return both_nan or math.isclose(recorded, found, rel_tol=_SAME_MEAN, abs_tol=1e-30)
    return recorded == found


def _golden(folder: Path, manifest: Manifest) -> Finding:
    """The labels of the golden images exist, and labels and predictions are those of the same images in the task."""
    tensors = load_tensors(folder / GOLDEN_LOGITS)
    logits = tensors["logits"].numpy()
    count, classes = len(manifest.golden), manifest.spec.num_classes
    if logits.shape != (count, classes):
        return Finding("labels", False, f"the logits have shape {logits.shape}, expected ({count}, {classes})")
    described = manifest.data.get("golden_images")
    if has_synthetic_images(manifest.data):
        extra = sorted({"labels", GOLDEN_INDICES} & tensors.keys())
        return Finding("labels", not extra, f"synthetic images have {' and '.join(extra) or 'no labels'}")
    if "labels" not in tensors:
        return unchecked("labels", "the bundle is of an earlier version that did not store labels")
    labels = tensors["labels"].numpy()
    if labels.shape != (count,) or _outside(labels, classes):
        return Finding("labels", False, f"expected {count} labels from 0 to {classes - 1}, found {labels.tolist()}")
    record, total = load_record(folder, manifest), (manifest.data.get("task") or {}).get("data_images", 0)
    if record is None or not total:
        return Finding("labels", True, f"{count} labels")
    rows = {int(index): row for row, index in enumerate(record.reference.indices)}
    # Bundles of earlier versions took evenly spread images.
    indices = tensors[GOLDEN_INDICES].tolist() if GOLDEN_INDICES in tensors else spread(total, count)
    if len(indices) != count or len(set(indices)) != count:
        return Finding("labels", False, f"expected {count} different positions of images, found {indices}")
    if described and described["positions"] != indices:
        recorded = described["positions"]
        return Finding("labels", False, f"positions of images are {indices}, and {recorded} in {MANIFEST}")
    shared = [(place, rows[index]) for place, index in enumerate(indices) if index in rows]
    wrong = [place for place, row in shared if not _agrees(record, row, labels[place], logits[place])]
    fact = f"{len(shared) - len(wrong)} of {len(shared)} images that are also in {TASK} have its label and prediction"
    return Finding("labels", not wrong, f"{fact}; {manifest.golden[wrong[0]]} differs" if wrong else fact)


def _agrees(record: TaskRecord, row: int, label: int, logits: NDArray[np.float64]) -> bool:
    """Whether a golden image has the label and prediction of row ``row``.

    The prediction there is that of the float32 student, so that another one is possible for nearly equal logits.
    """
    reference = record.reference
    prediction = int(reference.predictions[row])
    tied = bool(logits.max() - logits[prediction] <= 2 * reference.own_error)
    return int(label) == int(reference.labels[row]) and (int(logits.argmax()) == prediction or tied)
