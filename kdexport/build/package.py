"""Assembles a bundle folder, verifies it, and writes its manifest last."""

import json
import platform
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from kdexport.build.artifacts import EngineFile, FusedFiles, OnnxModel, QuantizeAwareFiles
from kdexport.build.stages import BUNDLE_TOOLS, UNFUSED_MODEL, is_int8
from kdexport.bundle.layout import CALIBRATED, SBOM, SYNTHETIC_IMAGES, TRAINED_FOR, VALIDATION_IMAGES
from kdexport.bundle.manifest import (
    FUSED,
    MANIFEST,
    MODEL,
    NOT_EXECUTED,
    RANGES,
    SCHEMA_VERSION,
    TARGETS,
    UNFUSED,
    VERIFIED,
    Manifest,
    hash_files,
    read_golden,
)
from kdexport.bundle.sbom import write_sbom
from kdexport.checkpoint import PROGRAM, StudentSpec, TrainedStudent
from kdexport.config import BuildConfig
from kdexport.core.digests import sha256_file, tool_versions
from kdexport.data.datasets import ImageSet, class_difference, spread
from kdexport.data.synthetic_images import synthetic_images
from kdexport.data.uploads import ImageLimits, accepted_images
from kdexport.errors import CheckpointError, DataError, ExportError, VerificationError
from kdexport.graph.audit import operator_counts
from kdexport.graph.plan import LayerPlan
from kdexport.origins.references import parse_reference
from kdexport.report.contents import new_evidence, shown_images
from kdexport.report.model_card import CardFacts, write_model_card
from kdexport.report.page import write_reports
from kdexport.report.thumbnails import thumbnails
from kdexport.targets import DEFAULT_TARGET, Target, providers
from kdexport.verify.answers import save_answers
from kdexport.verify.golden import GoldenSet, own_run, write_golden_set
from kdexport.verify.golden_limits import allowed_error, read_reference
from kdexport.verify.latency import Comparison, LatencyResult, compare_latency
from kdexport.verify.policy import parse_policy
from kdexport.verify.stored_results import TaskRecord
from kdexport.verify.target_checks import open_file
from kdexport.verify.target_times import TimingRequest, time_targets
from kdexport.verify.task_record import TaskImages, save_record
from kdexport.verify.verdict import Verdict, VerifiedBundle, seal, verify_folder

Progress = Callable[[str], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Parts:
    """Everything that goes into one bundle."""

    config: BuildConfig
    trained: TrainedStudent
    fused: FusedFiles
    model: OnnxModel
    casts: dict[Target, OnnxModel]
    engines: dict[Target, EngineFile]
    validation: ImageSet
    build_key: str
    #: How int8 was calibrated, for the manifest.
    calibration: dict[str, Any] = field(default_factory=dict)
    #: What the precision search found, for the manifest, by form.
    searched: dict[str, dict[str, Any]] = field(default_factory=dict)
    #: The student after quantize-aware training, by form.
    quantize_aware: dict[str, QuantizeAwareFiles] = field(default_factory=dict)


def require_matching(spec: StudentSpec, student: str, validation: ImageSet) -> None:
    """Raise if the checkpoint is of another student or has other classes than the configuration and data set.

    ``CheckpointError`` for these, ``DataError`` if there is no validation image.
    """
    reference = parse_reference(student)
    student = student if reference is None else reference.label
    if spec.student != student:
        raise CheckpointError(
            f"The checkpoint is a {spec.student}, but the build is for a {student}.",
            remedy=f"Pass --student {spec.student}, or the checkpoint of a {student}.",
        )
    if spec.classes != validation.classes:
        difference = class_difference(spec.classes, validation.classes, "the checkpoint", "the data set")
        raise CheckpointError(
            f"The checkpoint was trained for {spec.num_classes} classes, the data set has {len(validation.classes)}: "
            f"{difference}.",
            remedy="Set the data set that the checkpoint was trained on: [overrides.data] name and root in the export "
            "configuration, or --data.",
        )
    if len(validation) < 1:
        raise DataError("The data set has no validation images.", remedy="Add images to its test split.")


def package(folder: Path, parts: Parts, progress: Progress) -> VerifiedBundle:
    """Fill ``folder`` and verify it; raises ``VerificationError`` if it fails, with the report in ``folder``."""
    _copy_files(folder, parts)
    golden = _write_golden(folder, parts)
    data = _describe(parts, golden.names) | golden.described
    for name, place in golden.places.items():
        data["targets"][name]["golden"] = place
    manifest = Manifest.from_json({**data, "files": {}})
    count = min(parts.config.verify.images, len(parts.validation))
    chosen = spread(len(parts.validation), count)
    pixels = parts.validation.read(chosen, parts.trained.spec.preprocessing)
    task = TaskImages(parts.validation, _task_indices(parts))
    verdict = verify_folder(folder, manifest, pixels, task=task, progress=progress)
    data["task"] = None if verdict.record is None else _save_task(folder, verdict.record, parts.validation)
    if verdict.record is not None:
        data["answers"] = save_answers(folder, verdict.record.answers)
    latency = None
    if not verdict.failures:
        require_unfused(parts.model.path.with_name(UNFUSED_MODEL), folder, manifest)
        latency = _compare_latency(parts, progress)
        data["target_times"] = _time_targets(folder, parts, latency, verdict, progress)
    for name, execution in verdict.executed.items():
        data["targets"][name] |= {"status": VERIFIED, "executed": execution.to_json()}
    data["parity"] = [check.to_json() for check in verdict.checks]
    data["parity_images"] = count
    data["latency"] = None if latency is None else latency.to_json()
    progress("report")
    evidence = new_evidence(folder, manifest, verdict.record)
    if verdict.record is not None and golden.described["golden_images"]["kind"] == VALIDATION_IMAGES:
        data["report_images"] = [shown.position for shown in shown_images(verdict.record)]
        pixels = parts.validation.read(data["report_images"], parts.trained.spec.preprocessing)
        evidence = replace(evidence, thumbnails=thumbnails(data["report_images"], pixels))
    write_reports(folder, data, evidence)
    write_model_card(folder, data, evidence, _card_facts(parts.config))
    write_sbom(folder / SBOM, student=parts.trained.spec.student, build_key=parts.build_key)
    data["files"] = hash_files(folder)
    (folder / MANIFEST).write_text(json.dumps(data, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    bundle = seal(folder, Manifest.from_json(data), verdict)
    _require_not_slower(latency)
    return bundle


def _save_task(folder: Path, record: TaskRecord, images: ImageSet) -> dict[str, object]:
    """Write the record; its summary also identifies the split, so that bundles can be compared image by image."""
    return save_record(folder, record) | {"data_sha256": images.fingerprint(), "data_images": len(images)}


def _card_facts(config: BuildConfig) -> CardFacts:
    card = config.card
    return CardFacts(license=card.license, datasets=tuple(card.datasets), tags=tuple(card.tags))


def _task_indices(parts: Parts) -> list[int]:
    return spread(len(parts.validation), parts.config.verify.task_images)


def _copy_files(folder: Path, parts: Parts) -> None:
    shutil.copyfile(parts.trained.weights, folder / UNFUSED)
    if parts.trained.spec.program_sha256:
        shutil.copyfile(parts.trained.program, folder / PROGRAM)
    shutil.copyfile(parts.fused.weights, folder / FUSED)
    shutil.copyfile(parts.model.path, folder / MODEL)
    for form, trained in parts.quantize_aware.items():
        shutil.copyfile(trained.weights, folder / TRAINED_FOR[form])
    for target, model in parts.casts.items():
        place = folder / TARGETS / str(target)
        place.mkdir(parents=True)
        shutil.copyfile(model.path, place / MODEL)
        if is_int8(model.form):
            shutil.copyfile(model.path.with_name(RANGES), place / RANGES)
        if target in parts.engines:
            # A package of Core ML is a folder.
            shutil.copytree(parts.engines[target].folder, place, copy_function=shutil.copyfile, dirs_exist_ok=True)
            spec = parts.trained.spec
            target.runtime.finish(place, image_size=spec.image_size, num_classes=spec.num_classes)


def _write_golden(folder: Path, parts: Parts) -> GoldenSet:
    chosen = _golden_images(parts)
    low = {
        str(target): open_file(model.path, model.form).logits
        for target, model in parts.casts.items()
        if str(target) != DEFAULT_TARGET and providers(target)
    }
    policy = parse_policy(parts.config.policy, "[policy]")
    runs = (
        own_run(folder / TARGETS / str(target) / target.artifact, target, _kept(target, parts))
        for target in parts.casts
    )
    own = [run for run in runs if run is not None]
    is_synthetic = chosen.described["golden_images"]["kind"] == SYNTHETIC_IMAGES
    found = write_golden_set(
        folder, parts.trained, chosen.images, chosen.positions, low, own, policy=policy, is_synthetic=is_synthetic
    )
    return replace(found, described=chosen.described)


@dataclass(frozen=True, slots=True)
class _GoldenImages:
    """The images that become golden images, their positions among them, and the fields of the manifest on them."""

    images: ImageSet
    positions: list[int]
    described: dict[str, Any]


def _golden_images(parts: Parts) -> _GoldenImages:
    images, count = parts.validation, parts.config.verify.golden
    if not count:
        pixels = synthetic_images(parts.trained.spec.preprocessing)
        unlabelled = np.full(len(pixels), -1, np.int64)
        computed = ImageSet(classes=images.classes, labels=unlabelled, pixels=pixels, files=())
        return _GoldenImages(
            computed, list(range(len(pixels))), {"golden_images": {"kind": SYNTHETIC_IMAGES, "positions": []}}
        )
    accepted = accepted_images(
        spread(len(images), count), len(images), lambda index: images.original(index)[0], ImageLimits()
    )
    described: dict[str, Any] = {"golden_images": {"kind": VALIDATION_IMAGES, "positions": accepted.positions}}
    if accepted.passed_over:
        described["golden_passed_over" if accepted.accepted else "golden_refused"] = accepted.passed_over
    return _GoldenImages(images, accepted.positions, described)


def _kept(target: Target, parts: Parts) -> tuple[str, ...]:
    return LayerPlan.from_json(parts.searched[target.form]).nodes if target.form in parts.searched else ()


def _describe(parts: Parts, golden: list[str]) -> dict[str, Any]:
    import onnx

    from kdexport import __version__

    spec = parts.trained.spec
    described = spec.to_json()
    provenance = described.pop("provenance")
    certificate = json.loads(parts.fused.certificate.read_text())
    unfused = onnx.load(str(parts.model.path.with_name(UNFUSED_MODEL)))
    return {
        "schema_version": SCHEMA_VERSION,
        "kdexport": __version__,
        "build_key": parts.build_key,
        "student": described,
        "provenance": {**provenance, "checkpoint_sha256": parts.trained.weights_sha256},
        "opset": parts.config.export.opset,
        "export": parts.config.export.model_dump(mode="json"),
        "targets": {str(target): _target_entry(target, parts) for target in parts.casts},
        "golden": golden,
        "certificate": certificate,
        "policy": parse_policy(parts.config.policy, "[policy]").model_dump(mode="json"),
        "parity": [],
        "task": None,
        "parity_images": 0,
        "latency": None,
        "operators": {"unfused": operator_counts(unfused), "fused": operator_counts(onnx.load(str(parts.model.path)))},
        "versions": {
            "python": platform.python_version(),
            **{name: version for name, version in tool_versions(*BUNDLE_TOOLS).items() if version != "absent"},
        },
    }


def _target_entry(target: Target, parts: Parts) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "precision": target.precision,
        "backend": target.backend,
        "engine": target.compiles,
        # Until the verification has run the target in its own runtime.
        "status": NOT_EXECUTED,
        "form": target.form,
        "input": parts.config.export.input,
        "output": parts.config.export.output,
    }
    if target.runtime.one_at_a_time:
        entry["images_per_run"] = 1
    if is_int8(target.form):
        # The setting is for CPUs; the other form always has 8 bits.
        bits = {} if target.form == "int8-u8" else {"weight_bits": 8}
        chosen = parts.casts[target].path.with_name(CALIBRATED)
        compared = {"chosen": json.loads(chosen.read_text())} if chosen.is_file() else {}
        entry["calibration"] = {**parts.calibration, **bits, **compared}
    if target.form in parts.quantize_aware:
        described = parts.quantize_aware[target.form].described
        entry["quantize_aware"] = {"weights": TRAINED_FOR[target.form], **described}
    if target.form in parts.searched:
        entry["plan"] = parts.searched[target.form]
    if target in parts.engines:
        entry["compiled"] = {
            "artifact_sha256": sha256_file(parts.engines[target].folder / target.artifact),
            "onnx_sha256": sha256_file(parts.casts[target].path),
        }
        entry.update(target.runtime.describe(parts.engines[target].folder))
    return entry


def require_unfused(path: Path, folder: Path, manifest: Manifest) -> None:
    """Raise ``ExportError`` unless ``path`` computes the unfused student of the bundle ``folder``.

    The fused student is compared with it in latency and operators. Its logits of the golden images must be within the
    limit of a float32 file.
    """
    images = manifest.spec.preprocessing.normalise(read_golden(folder, manifest))
    exact, limit = read_reference(folder)["logits"], allowed_error(folder, manifest)
    logits = open_file(path, "fp32").logits(images)
    error = float(np.abs(logits - exact).max()) if logits.shape == exact.shape else float("nan")
    if not error <= limit:
        raise ExportError(
            f"{path} is not the unfused student: its logits of the golden images are off by {error:.3g} (up to "
            f"{limit:.3g} allowed). The comparison of latency would have no meaning.",
            remedy="Run the same command with --fresh, which exports it again. If it fails again, open an issue in "
            "kdexport's repository with this message, the student's name and the output of kdexport doctor.",
        )


def _compare_latency(parts: Parts, progress: Progress) -> LatencyResult:
    settings = parts.config.latency
    comparison = Comparison(
        reference=str(parts.model.path.with_name(UNFUSED_MODEL)),
        candidate=str(parts.model.path),
        image_size=parts.trained.spec.image_size,
        batch=settings.batch,
        threads=settings.threads,
        pairs=settings.pairs,
    )
    return compare_latency(
        comparison,
        max_slowdown=settings.max_slowdown,
        max_sessions=settings.sessions,
        progress=lambda count: progress(f"latency, session {count}"),
    )


def _time_targets(
    folder: Path, parts: Parts, compared: LatencyResult, verdict: Verdict, progress: Progress
) -> dict[str, Any]:
    request = TimingRequest(
        folder=folder,
        targets=tuple(map(str, parts.casts)),
        executed=verdict.executed.keys(),
        compared=compared,
        image_size=parts.trained.spec.image_size,
        pairs=parts.config.latency.pairs,
        budget=parts.config.latency.sessions,
    )
    return time_targets(request, progress)


def _require_not_slower(latency: LatencyResult | None) -> None:
    if latency is not None and latency.verdict == "slower":
        raise VerificationError(
            f"The fused student is slower than the unfused one: {latency.ratio:.3f}x, interval {latency.low:.3f} to "
            f"{latency.high:.3f} (up to {1 + latency.max_slowdown:.3f} allowed) over {latency.sessions} sessions.",
            remedy="Run the same command again on a quiet machine. If the result is the same, raise max_slowdown under "
            "[latency] of the export configuration.",
        )
