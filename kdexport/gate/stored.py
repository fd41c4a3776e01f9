"""What both bundles remember of the same validation images: accuracy gates then need no model."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdexport.bundle import MODEL, PLAN, TARGETS
from kdexport.gate.artifacts import Artifact, Bundle
from kdexport.targets import parse_target
from kdexport.verify.validation import TaskRecord, load_record


@dataclass(frozen=True, slots=True, eq=False)
class StoredOutputs:
    """Labels (N,) of images, and what reference and candidate said about each when their bundles were built."""

    reference: NDArray[np.integer[Any]]
    candidate: NDArray[np.integer[Any]]
    labels: NDArray[np.integer[Any]]


def stored_outputs(arms: Sequence[tuple[Artifact, Bundle]], data_sha256: str | None) -> StoredOutputs | None:
    """Outputs of both arms on the same images, None where a bundle lacks them or remembers other images.

    ``data_sha256`` is the fingerprint of the images that were asked for: they must be those, and all of them.
    """
    described = [bundle.manifest.data.get("task") or {} for _, bundle in arms]
    fingerprints = {entry.get("data_sha256") for entry in described}
    if len(fingerprints) != 1 or None in fingerprints:
        return None
    if data_sha256 is not None and (
        fingerprints != {data_sha256} or any(entry["images"] != entry.get("data_images") for entry in described)
    ):
        return None
    records = [load_record(bundle.folder, bundle.manifest) for _, bundle in arms]
    first, second = (None if record is None else record.reference for record in records)
    if first is None or second is None or not np.array_equal(first.indices, second.indices):
        return None
    found = [_predictions(arm, bundle, record) for (arm, bundle), record in zip(arms, records, strict=True) if record]
    if any(predictions is None for predictions in found):
        return None
    reference, candidate = found
    assert reference is not None
    assert candidate is not None
    return StoredOutputs(reference, candidate, first.labels)


def _predictions(arm: Artifact, bundle: Bundle, record: TaskRecord) -> NDArray[np.integer[Any]] | None:
    if arm.variant == "unfused":
        return record.reference.predictions
    target = parse_target(arm.target)
    if target.backend == "openvino":
        name = f"{TARGETS}/{target}/{MODEL} on OpenVINO"
    elif target.needs_engine:
        name = f"{TARGETS}/{target}/{PLAN}"
    else:
        # Of files with one content, only the first was run.
        same = (name for name in record.files if bundle.manifest.files.get(name) == arm.sha256)
        name = next(same, "")
    metrics = record.files.get(name)
    return None if metrics is None else metrics.predictions
