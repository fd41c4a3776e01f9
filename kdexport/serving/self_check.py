"""The golden images of a bundle, run from their bytes as an upload is, against the logits that came with them."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kdexport.backends.ort import OrtModel
from kdexport.bundle.manifest import GOLDEN_LOGITS, UNIT_ERROR, Manifest
from kdexport.data.preprocessing import read_image
from kdexport.errors import BundleError, RequestError, VerificationError
from kdexport.serving.images import FORMATS, PixelBudget, decode_upload, normalise
from kdexport.serving.limits import Limits

_UPLOADED = tuple(f".{name.lower()}" for name in (*FORMATS, "JPG"))


@dataclass(frozen=True, kw_only=True, slots=True)
class Golden:
    """What the golden images said: largest error of a logit against what rung B allows, and how many images."""

    images: int
    error: float
    allowed: float


def read_reference(folder: Path) -> dict[str, NDArray[np.float64]]:
    """The tensors of golden/logits.safetensors; raises ``BundleError``."""
    from safetensors.numpy import load_file

    try:
        tensors = load_file(folder / GOLDEN_LOGITS)
        limits = {k: v for k, v in tensors.items() if k == UNIT_ERROR or k.startswith("allowed_error")}
        return {"logits": tensors["logits"], **limits}
    except Exception as error:
        raise BundleError(
            f"{folder / GOLDEN_LOGITS} cannot be read: {error}.", remedy="Build the bundle again."
        ) from error


def compare_golden(
    folder: Path,
    manifest: Manifest,
    model: OrtModel,
    table: NDArray[np.float32],
    limits: Limits,
    allowed_error: float,
) -> Golden:
    """Run every golden image from its bytes, as an upload and as training reads it; raises ``VerificationError``."""
    expected = read_reference(folder)["logits"]
    if expected.shape != (len(manifest.golden), len(manifest.spec.classes)):
        raise BundleError(f"{GOLDEN_LOGITS} has shape {expected.shape}.", remedy="Build the bundle again.")
    worst, where = 0.0, ""
    for name, exact in zip(manifest.golden, expected, strict=True):
        pixels = _golden_pixels(folder / name, manifest, limits)
        logits = model.logits(normalise(pixels, table))[0].astype(np.float64)
        error = float(np.abs(logits - exact).max())
        if not error <= allowed_error:
            raise VerificationError(
                f"{name} gives other logits here than when the bundle was verified: off by {error:.3g} (up to "
                f"{allowed_error:.3g} allowed).",
                remedy="Preprocessing, onnxruntime or the provider computes otherwise; `kdexport verify` says more.",
            )
        # Two classes that lie within twice the allowed error of each other may change places.
        if exact[int(logits.argmax())] < exact.max() - 2 * allowed_error:
            raise VerificationError(f"{name} gets another label.", remedy="`kdexport verify` says more.")
        worst, where = max((worst, where), (error, name))
    return Golden(images=len(expected), error=worst, allowed=allowed_error)


def _golden_pixels(path: Path, manifest: Manifest, limits: Limits) -> NDArray[np.uint8]:
    preprocessing = manifest.spec.preprocessing
    trained = preprocessing.pixels(read_image(path))
    if path.suffix.lower() not in _UPLOADED:
        return trained
    try:
        served = decode_upload(path.read_bytes(), preprocessing, limits, PixelBudget(limits.pixels))
    except RequestError as error:
        raise VerificationError(
            f"The server would refuse {path.name}, an image of the model's own data: {error.message}",
            remedy="Widen the limits on images to what this model is meant for.",
        ) from error
    if not np.array_equal(trained, served):
        raise VerificationError(f"{path.name} is decoded otherwise here than in training.", remedy="Report this image.")
    return served
