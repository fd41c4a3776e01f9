"""Results of a few images that a bundle could have recorded, with flips that are known."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from kdexport.report.contents import Evidence, shown_images
from kdexport.report.thumbnails import thumbnails
from kdexport.verify.answers import REFERENCE, file_answers
from kdexport.verify.stored_results import TaskRecord, described_results
from kdexport.verify.task import task_metrics, task_reference
from tests.kdexport.report.manifests import manifest

MODEL, FP16 = "model.onnx", "targets/trt-rtx-fp16/model.onnx"
#: Images of which the float16 file gives another class, and the margin that the unfused student has there.
FLIPS = {2: 0.5, 5: 1.1, 11: 0.2}


@dataclass(frozen=True)
class Recorded:
    """A manifest and what was measured for it."""

    data: dict[str, Any]
    evidence: Evidence


def record_of(classes: list[str], images: int = 12) -> Recorded:
    """12 images at every seventh position: 9 right in the unfused student, of which the flips cost two."""
    rng = np.random.default_rng(2)
    labels = rng.integers(0, len(classes), images)
    exact = rng.normal(0, 0.3, (images, len(classes))).astype(np.float32)
    said = labels.copy()
    said[[1, 4, 5]] = (labels[[1, 4, 5]] + 1) % len(classes)
    exact[np.arange(images), said] = 5 + np.arange(images)
    half = exact.copy()
    for row, margin in FLIPS.items():
        other = (said[row] + 1) % len(classes)
        exact[row, other] = exact[row, said[row]] - margin
        half[row] = exact[row]
        half[row, other] = exact[row, said[row]] + 0.25
    reference = task_reference(exact, labels, 7 * np.arange(images), 1e-6)
    logits = {MODEL: exact, FP16: half}
    precisions = {MODEL: "fp32", FP16: "fp16"}
    record = TaskRecord(
        reference,
        {n: task_metrics(v, exact, precision=precisions[n], unit_error=1e-3) for n, v in logits.items()},
        {n: file_answers(v, labels) for n, v in {REFERENCE: exact, **logits}.items()},
    )
    data = manifest()
    data["student"] = {**data["student"], "classes": classes}
    data["task"] = described_results(record)
    data["target_times"] = {
        "measured": "2026-11-29T20:15:00Z",
        "batch": 1,
        "threads": 1,
        "machine": {"cpu": "A CPU", "cores": 2, "system": "Linux x86_64", "onnxruntime": "1.31.1", "gpu": ""},
        "targets": {"onnx-fp32": {"clock": "host", "ms": 1.83, "sessions": 6, "ratio": 1.0}},
        "not_timed": {"trt-rtx-fp16": "it did not run on this machine"},
    }
    shown = [each.position for each in shown_images(record)]
    pixels = rng.integers(0, 256, (len(shown), 32, 32, 3), np.uint8)
    evidence = Evidence(
        record=record,
        answers=record.answers,
        sizes={
            "unfused.safetensors": 4_570_000,
            "targets/onnx-fp32/model.onnx": 2_800_000,
            "targets/trt-rtx-fp16/model.plan": 1_500,
        },
        same={MODEL: MODEL, "targets/onnx-fp32/model.onnx": MODEL, FP16: FP16},
        thumbnails=thumbnails(shown, pixels),
    )
    return Recorded(data, evidence)
