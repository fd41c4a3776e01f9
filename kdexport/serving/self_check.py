"""Compare the golden images of a bundle, decoded like uploads, with the reference logits stored in it."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kdexport.backends.ort import OrtModel, execution_of
from kdexport.backends.pixel_input import Given, arrange
from kdexport.bundle.manifest import GOLDEN_LOGITS, Manifest
from kdexport.data.preprocessing import read_image
from kdexport.data.uploads import FORMATS
from kdexport.errors import BundleError, RequestError, VerificationError
from kdexport.serving.images import PixelBudget, decode_upload, normalise
from kdexport.serving.limits import Limits
from kdexport.verify.golden_limits import Distance, OwnLogits, compare_own, read_reference


@dataclass(frozen=True, kw_only=True, slots=True)
class Golden:
    """The result of the comparison: number of images, largest error of a logit, and the limit on it."""

    images: int
    error: float
    allowed: float
    #: The comparison with the target's own logits of the build; None if the bundle has none.
    own: Distance | None = None


def compare_golden(
    folder: Path,
    manifest: Manifest,
    model: OrtModel,
    table: NDArray[np.float32],
    limits: Limits,
    allowed_error: float,
    own: OwnLogits | None = None,
) -> Golden:
    """Decode and run every golden image as an upload would be; raises ``VerificationError`` if a result differs.

    ``own`` are the target's own logits of the build, None if the bundle has none.
    """
    inputs, expected = _golden_inputs(folder, manifest, model, table, limits), _expected(folder, manifest)
    found = [model.logits(given)[0] for given in inputs]
    errors = [
        _require_near(folder, manifest, name, logits, exact, allowed_error)
        for name, logits, exact in zip(manifest.golden, found, expected, strict=True)
    ]
    worst = max(errors, default=0.0)
    distance = None if own is None else _require_own(folder, own, np.stack(found), model, single=True)
    return Golden(images=len(expected), error=worst, allowed=allowed_error, own=distance)


def check_batches(
    folder: Path,
    manifest: Manifest,
    model: OrtModel,
    table: NDArray[np.float32],
    limits: Limits,
    allowed_error: float,
    own: OwnLogits | None,
    largest: int,
) -> None:
    """Run the golden images in batches of 2 to ``largest``, and compare each row that differs from its single run.

    Such a row is held to the limits of ``compare_golden``; raises ``VerificationError``.
    """
    inputs, expected = _golden_inputs(folder, manifest, model, table, limits), _expected(folder, manifest)
    images, single = np.concatenate(inputs), np.concatenate([model.logits(given) for given in inputs])
    for size in range(2, largest + 1):
        order = np.arange(size) % len(images)
        found = model.logits(images[order])
        changed = [row for row in range(size) if not np.array_equal(found[row], single[order[row]])]
        for row in changed:
            at = order[row]
            _require_near(folder, manifest, manifest.golden[at], found[row], expected[at], allowed_error)
        if changed and own is not None:
            rows = single.copy()
            rows[order] = found
            _require_own(folder, own, rows, model, single=False)


def _expected(folder: Path, manifest: Manifest) -> NDArray[np.float64]:
    """The reference logits (N,K) of the golden images; raises ``BundleError`` for another shape."""
    expected = read_reference(folder)["logits"]
    shape = (len(manifest.golden), len(manifest.spec.classes))
    if expected.shape != shape:
        raise BundleError(
            f"{GOLDEN_LOGITS} has shape {expected.shape}; the manifest requires {shape}.",
            remedy="Build the bundle again.",
        )
    return expected


def _golden_inputs(
    folder: Path, manifest: Manifest, model: OrtModel, table: NDArray[np.float32], limits: Limits
) -> list[Given]:
    """Each golden image as a batch of one, made as an upload is."""

    def given(pixels: NDArray[np.uint8]) -> Given:
        return normalise(pixels, table) if model.takes is None else arrange(pixels[np.newaxis], model.takes.kind)

    return [given(_golden_pixels(folder / name, manifest, limits)) for name in manifest.golden]


def _require_near(
    folder: Path,
    manifest: Manifest,
    name: str,
    logits: NDArray[np.float32],
    exact: NDArray[np.float64],
    allowed_error: float,
) -> float:
    """The largest error of logits (K,) of a golden image; raises ``VerificationError`` above the limit."""
    error = float(np.abs(logits.astype(np.float64) - exact).max())
    if not error <= allowed_error:
        raise VerificationError(
            f"The logits of {name} differ from those of the reference by {error:.3g} (up to {allowed_error:.3g} "
            "allowed).",
            remedy=f"Run `kdexport verify {folder}` to find out whether the file, onnxruntime or the provider is "
            "the cause.",
        )
    # The order of two classes is only fixed if their logits differ by more than twice the allowed error.
    if exact[int(logits.argmax())] < exact.max() - 2 * allowed_error:
        raise VerificationError(
            f"{name} is classified as {manifest.spec.classes[int(logits.argmax())]!r}; the reference gives "
            f"{manifest.spec.classes[int(exact.argmax())]!r}.",
            remedy=f"Run `kdexport verify {folder}` for details.",
        )
    return error


def _require_own(
    folder: Path, own: OwnLogits, found: NDArray[np.float32], model: OrtModel, *, single: bool
) -> Distance:
    """The distance of logits (N,K) from the target's own of the build; raises ``VerificationError`` if too large."""
    distance = compare_own(own, found, execution_of(model, ""), single=single)
    if not distance.holds:
        raise VerificationError(
            f"The golden logits of {own.target} are not its own: {distance}.",
            remedy=f"Run `kdexport verify {folder}` to find out whether the file, onnxruntime or the provider is the "
            "cause.",
        )
    return distance


def _golden_pixels(path: Path, manifest: Manifest, limits: Limits) -> NDArray[np.uint8]:
    preprocessing = manifest.spec.preprocessing
    image = read_image(path)
    trained = preprocessing.pixels(image)
    if image.format not in (*FORMATS, "MPO"):
        # Of a data set in a format that the server does not take.
        return trained
    try:
        served = decode_upload(path.read_bytes(), preprocessing, limits, PixelBudget(limits.pixels))
    except RequestError as error:
        raise VerificationError(
            f"The server would refuse {path.name}, a golden image of the bundle: {error.message}",
            remedy="Adjust --max-pixels or --min-side to the images of this model.",
        ) from error
    if not np.array_equal(trained, served):
        raise VerificationError(
            f"{path.name} has other pixels as an upload than as a training image; they must be equal.",
            remedy="Install the version of Pillow that built the bundle, or build the bundle again with this one.",
        )
    return served
