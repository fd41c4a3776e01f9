"""The accuracy gates: how many predictions of the candidate differ from the reference's, and how much top-1 is lost.

Both arms are compared on the same labelled images, with exact bounds. If both bundles store predictions for exactly
these images, those are compared and no model runs.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdexport.backends.base import Device, Runner
from kdexport.bundle.manifest import GOLDEN_LOGITS, has_synthetic_images
from kdexport.data.datasets import (
    ImageSet,
    class_difference,
    dataset_spec,
    described,
    has_stored_splits,
    open_dataset,
    open_unsplit,
)
from kdexport.data.preprocessing import Preprocessing
from kdexport.errors import BundleError, KdexportError, MismatchError, VerificationError, first_line
from kdexport.gate.arms import Artifact, Bundle
from kdexport.stats.logits import COLLAPSED, typical_noise
from kdexport.stats.paired import drop_trials_needed, estimate_drop
from kdexport.stats.proportions import ACCURACY_CONFIDENCE, Estimate, estimate_proportion, trials_needed
from kdexport.stats.sequential import Verdict
from kdexport.targets import DEFAULT_TARGET, parse_target
from kdexport.verify.golden_limits import compare_own, own_logits, read_reference, stored_limit
from kdexport.verify.stored_results import TaskRecord, load_record, record_name

_CHUNK = 256
_Logits = Callable[[NDArray[np.float32]], NDArray[np.float32]]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LabelledImages:
    """Images with their labels, read a chunk at a time; each bundle applies its own preprocessing."""

    images: ImageSet
    source: str

    def chunks(self, preprocessing: Preprocessing) -> Iterator[NDArray[np.float32]]:
        """(n,3,S,S) float32, in order."""
        for start in range(0, len(self.images), _CHUNK):
            indices = range(start, min(start + _CHUNK, len(self.images)))
            yield preprocessing.normalise(self.images.read(indices, preprocessing))


@dataclass(frozen=True, kw_only=True, slots=True)
class AccuracyResult:
    """One accuracy gate: the estimated fraction of images against its limit, and the reason for the verdict."""

    name: str
    estimate: Estimate
    limit: float
    verdict: Verdict
    images: int
    source: str
    reason: str


@dataclass(frozen=True, slots=True, eq=False)
class StoredOutputs:
    """Labels (N,) of images, and the predictions (N,) of reference and candidate from when their bundles were built."""

    reference: NDArray[np.integer[Any]]
    candidate: NDArray[np.integer[Any]]
    labels: NDArray[np.integer[Any]]


def accuracy_gates(
    arms: Sequence[tuple[Artifact, Bundle]],
    limits: tuple[float | None, float | None],
    data: str | None,
    threads: int,
    *,
    on_gpu: bool = False,
    report: Callable[[str], None] = lambda _: None,
) -> list[AccuracyResult]:
    """Compare reference and candidate on the same images; without a limit nothing runs and the result is empty.

    Predictions that both bundles store for the same images are used if ``data`` is None or has the fingerprint of
    those images. Stored predictions of ONNX files were computed on a CPU and are not used if ``on_gpu``.
    ``report`` gets one line on the images of ``data``.
    """
    if limits == (None, None):
        return []
    images = None if data is None else labelled_images(arms[-1][1], data)
    if images is not None:
        report(described({"test": images.images}))
    if not on_gpu or all(_ran_on_gpu(arm) for arm, _ in arms):
        stored = stored_outputs(arms, None if images is None else images.images.fingerprint())
        if stored is not None:
            return judge_accuracy(stored.reference, stored.candidate, stored.labels, limits, "stored outputs")
    images = images or labelled_images(arms[-1][1], None)
    reference, candidate = (predictions(arm, bundle, images, threads, on_gpu=on_gpu) for arm, bundle in arms)
    return judge_accuracy(reference, candidate, images.images.labels, limits, images.source)


def require_golden_logits(model: Artifact, bundle: Bundle, threads: int, *, on_gpu: bool = False) -> None:
    """Run the golden images on an arm as it is timed; raises ``VerificationError`` if its logits are another network's.

    What a bundle stores about itself proves nothing about the file that is timed. A target whose error limit is stored
    in the bundle is held to it; any other to a typical noise below ``COLLAPSED`` of the signal. A target with golden
    logits of its own is held to these too.
    """
    exact = read_reference(bundle.folder)["logits"]
    golden = _golden_images(bundle, np.zeros(len(bundle.manifest.golden), np.int64))
    runner = _open(model, threads, on_gpu)
    with _named(model, bundle):
        chunks = golden.chunks(bundle.manifest.spec.preprocessing)
        logits = np.concatenate([runner.run(chunk, (1,)) for chunk in chunks])
    if logits.shape != exact.shape:
        raise VerificationError(
            f"{model.label} gives logits of shape {logits.shape} for the golden images; the bundle requires "
            f"{exact.shape}.",
            remedy=f"Nothing was timed. Run kdexport verify {bundle.folder} for details.",
        )
    target = DEFAULT_TARGET if model.variant == "unfused" else model.target
    limit = stored_limit(bundle.folder, bundle.manifest, target)
    error = float(np.abs(logits.astype(np.float64) - exact).max())
    noise = typical_noise(exact, logits.astype(np.float64))
    if not noise < COLLAPSED or (limit is not None and not error <= limit):
        allowed = f"an error of {limit:.3g}" if limit is not None else f"{COLLAPSED:.0%}"
        raise VerificationError(
            f"{model.label} is not the network of its bundle: its logits of the golden images are off by {error:.3g}, "
            f"those of half of the images by {noise:.2%} of their spread (up to {allowed} allowed).",
            remedy=f"Nothing was timed. Run kdexport verify {bundle.folder} for details.",
        )
    own = None if model.variant == "unfused" else own_logits(bundle.folder, bundle.manifest, model.target)
    distance = None if own is None else compare_own(own, logits, runner.execution, single=threads == 1)
    if distance is not None and not distance.holds:
        raise VerificationError(
            f"{model.label} is not the network of its bundle: of its logits of the golden images {distance}.",
            remedy=f"Nothing was timed. Run kdexport verify {bundle.folder} for details.",
        )


def judge_accuracy(
    reference: NDArray[np.integer[Any]],
    candidate: NDArray[np.integer[Any]],
    labels: NDArray[np.integer[Any]],
    limits: tuple[float | None, float | None],
    source: str,
) -> list[AccuracyResult]:
    """Judge (N,) predictions; ``limits`` are the allowed fraction of flips and top-1 drop, None if not checked."""
    max_flips, max_drop = limits
    results = []
    if max_flips is not None:
        flips = int((reference != candidate).sum())
        estimate = estimate_proportion(flips, len(labels), ACCURACY_CONFIDENCE)
        needed = trials_needed(max_flips, ACCURACY_CONFIDENCE) if max_flips else 0
        results.append(_result("flips", estimate, max_flips, len(labels), source, needed))
    if max_drop is not None:
        right, still = reference == labels, candidate == labels
        lost, gained = int((right & ~still).sum()), int((~right & still).sum())
        estimate = estimate_drop(lost, gained, len(labels))
        needed = drop_trials_needed(max_drop) if max_drop else 0
        results.append(_result("top-1 drop", estimate, max_drop, len(labels), source, needed))
    return results


def _result(name: str, estimate: Estimate, limit: float, images: int, source: str, needed: int) -> AccuracyResult:
    verdict = estimate.verdict(limit)
    reason = f"{estimate.value:.2%} of {images} images, bounds {estimate.low:.2%} to {estimate.high:.2%}"
    reason += f" (up to {limit:.2%} allowed)"
    if verdict == "INCONCLUSIVE" and images < needed:
        reason += f"; a proof needs at least {needed} images, none of them changed"
    return AccuracyResult(
        name=name, estimate=estimate, limit=limit, verdict=verdict, images=images, source=source, reason=reason
    )


def _golden_images(bundle: Bundle, labels: NDArray[np.int64]) -> LabelledImages:
    files = tuple(bundle.folder / name for name in bundle.manifest.golden)
    golden = ImageSet(classes=bundle.manifest.spec.classes, labels=labels, pixels=None, files=files)
    return LabelledImages(images=golden, source="golden images")


def _without_labels(bundle: Bundle) -> BundleError:
    if has_synthetic_images(bundle.manifest.data):
        return BundleError(
            f"The golden images of {bundle.folder} are synthetic and have no labels, so that accuracy cannot be judged "
            "on them.",
            remedy="Pass --data DIR with labelled images.",
        )
    return BundleError(
        f"{bundle.folder} stores no labels for its golden images.",
        remedy="Build the bundle again, or pass --data DIR with labelled images.",
    )


def labelled_images(bundle: Bundle, data: str | None, *, whole: bool = False) -> LabelledImages:
    """The bundle's golden images, or the test split at ``data``: an image folder, a CIFAR-100 folder, or ``digits``.

    ``whole``: all images of a folder of classes without splits, of which a test split is drawn otherwise.
    """
    if data is None:
        from safetensors.numpy import load_file

        try:
            labels = load_file(bundle.folder / GOLDEN_LOGITS)["labels"].astype(np.int64)
        except KeyError:
            raise _without_labels(bundle) from None
        return _golden_images(bundle, labels)
    root = Path(data)
    is_cifar = any((folder / "meta").is_file() for folder in (root, root / "cifar-100-python"))
    name = "digits" if data == "digits" else "cifar100" if is_cifar else "folder:"
    if whole and name == "folder:" and root.is_dir() and not has_stored_splits(root):
        images = open_unsplit(root)
    else:
        images = open_dataset(dataset_spec(name, "" if data == "digits" else data), "test")
    trained = bundle.manifest.spec.classes
    if images.classes != trained:
        raise MismatchError(
            f"The classes of {data} ({len(images.classes)}) and of {bundle.folder} ({len(trained)}) differ in number, "
            f"name or order: {class_difference(images.classes, trained, data, str(bundle.folder))}.",
            remedy="Pass --data with a validation set of the classes that the bundle was trained for.",
        )
    return LabelledImages(images=images, source=data)


def predictions(
    model: Artifact, bundle: Bundle, images: LabelledImages, threads: int, *, on_gpu: bool = False
) -> NDArray[np.int64]:
    """(N,) predicted labels of an arm, computed where it is timed; ``VerificationError`` if a logit is not finite."""
    run = _opened(model, (int(bundle.manifest.data["export"]["max_batch"]),), threads, on_gpu)
    found: list[NDArray[np.int64]] = []
    for inputs in images.chunks(bundle.manifest.spec.preprocessing):
        with _named(model, bundle):
            logits = run(inputs)
        if not np.isfinite(logits).all():
            first = sum(map(len, found)) + int(np.flatnonzero(~np.isfinite(logits).all(axis=1))[0])
            raise VerificationError(
                f"{model.label} computes logits that are not finite for image {first} of {images.source}.",
                remedy=f"Run `kdexport verify {bundle.folder}` for details.",
            )
        found.append(logits.argmax(axis=1).astype(np.int64))
    return np.concatenate(found)


@contextlib.contextmanager
def _named(model: Artifact, bundle: Bundle) -> Iterator[None]:
    """Raise the error of a runtime, which may be of any type, as ``VerificationError`` with the name of the arm."""
    try:
        yield
    except (KdexportError, OSError, MemoryError):
        raise
    except Exception as error:
        raise VerificationError(
            f"{model.label} cannot be run: {first_line(error)}",
            remedy=f"Nothing was timed. Run kdexport verify {bundle.folder} for details.",
        ) from error


def _opened(model: Artifact, batches: tuple[int, ...], threads: int, on_gpu: bool) -> _Logits:
    return partial(_open(model, threads, on_gpu).run, batches=batches)


def _open(model: Artifact, threads: int, on_gpu: bool) -> Runner:
    target = parse_target(model.target)
    device: Device = "gpu" if on_gpu else "cpu"
    return target.runtime.open(model.model, target.precision, device=device, threads=threads)


def stored_outputs(arms: Sequence[tuple[Artifact, Bundle]], data_sha256: str | None) -> StoredOutputs | None:
    """Stored predictions of both arms on the same images; None if a bundle lacks them or stores different images.

    If ``data_sha256``, the fingerprint of the requested images, is given, the predictions must cover exactly those.
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
    # Of several files with the same content, only the first was run.
    same = (name for name in record.files if bundle.manifest.files.get(name) == arm.sha256)
    name = next(same, "") if target.runs_as_reference else record_name(target)
    metrics = record.files.get(name)
    return None if metrics is None else metrics.predictions


def _ran_on_gpu(arm: Artifact) -> bool:
    """Whether the predictions that the bundle stores for the arm were computed on a GPU."""
    target = parse_target(arm.target)
    return arm.variant == "fused" and target.runtime.device(target.precision) == "gpu"
