"""The batch size of a loaded model: measured on this machine, and used only if batches give the right logits."""

import logging
from dataclasses import replace
from pathlib import Path

from kdexport.backends.ort import CPU
from kdexport.bundle.manifest import read_manifest
from kdexport.errors import BackendUnavailableError, VerificationError
from kdexport.serving.batching import Pace, measure_pace
from kdexport.serving.limits import Limits
from kdexport.serving.loading import LoadedModel, load
from kdexport.serving.self_check import check_batches
from kdexport.targets import require_servable
from kdexport.verify.golden_limits import allowed_error, own_logits

_log = logging.getLogger("kdexport.serving")


def measured_pace(model: LoadedModel, folder: Path, limits: Limits) -> Pace:
    """How fast ``model``, which was loaded from ``folder``, runs here. Requests run alone if a batch changes logits
    by more than the target's limit on golden images; the log has the reason.
    """
    pace = measure_pace(model.ort, model.provider, model.signature)
    if pace.together == 1:
        return pace
    own = own_logits(folder, model.manifest, model.target)
    try:
        check_batches(
            folder, model.manifest, model.ort, model.table, limits, model.golden.allowed, own, pace.together
        )  # fmt: skip
    except VerificationError as error:
        _log.warning("%s: requests are not merged, because batches compute differently. %s", model.name, error.message)
        return replace(pace, together=1, inline_images=min(pace.inline_images, 1))
    return pace


def cpu_batch(folder: Path, target: str) -> int:
    """The batch with which onnxruntime runs a target of a bundle fastest on this CPU; 1 if it does not run there.

    Raises ``KdexportError`` if the target is not what was verified.
    """
    try:
        require_servable(target, CPU)
    except BackendUnavailableError:
        return 1
    limits = Limits()
    allowed = allowed_error(folder, read_manifest(folder), target)
    model = load(
        folder, name=folder.name, version=1, provider=CPU, limits=limits, allowed_error=allowed, target=target
    )  # fmt: skip
    return measured_pace(model, folder, limits).together
