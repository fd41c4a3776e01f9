"""What each file of a bundle answered to each image of rung D: its likeliest classes, stored by the build.

The predictions beside it (``TASK``) decide rung D. Accuracy by class, calibration and the probability of an answer come
from here. All logits would be larger than the network where there are many classes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdexport.bundle.layout import ANSWERS
from kdexport.bundle.manifest import Manifest
from kdexport.core.digests import sha256_file
from kdexport.errors import BundleError
from kdexport.stats.scores import TOP_K, Answered, true_ranks

VERSION = 1
#: The name of the unfused student among the files.
REFERENCE = "unfused"

_TYPES = {"classes": np.int32, "logits": np.float32, "log_sum_exp": np.float32, "ranks": np.int32}


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class FileAnswers:
    """One file on N images: the k likeliest ``classes`` (N,k), their ``logits`` (N,k), the logarithm of the sum of the
    exponentials of all logits (N,), and the rank of the true class (N,), from 0, ties counted against it.
    """

    classes: NDArray[np.int32]
    logits: NDArray[np.float32]
    log_sum_exp: NDArray[np.float32]
    ranks: NDArray[np.int32]

    @property
    def probabilities(self) -> NDArray[np.float64]:
        """(N,k) probabilities of ``classes``."""
        return np.asarray(np.exp(self.logits.astype(np.float64) - self.log_sum_exp.astype(np.float64)[:, None]))

    @property
    def answered(self) -> Answered:
        """What scores take."""
        return Answered(predicted=self.classes[:, 0], confidence=self.probabilities[:, 0], rank=self.ranks)


def file_answers(logits: NDArray[np.floating[Any]], labels: NDArray[np.integer[Any]]) -> FileAnswers:
    """Reduce logits (N,K) of images with ``labels`` (N,) to the answers that a bundle stores; the first is argmax."""
    exact = logits.astype(np.float64)
    remaining, rows = exact.copy(), np.arange(len(exact))
    chosen = []
    for _ in range(min(TOP_K, exact.shape[1])):
        chosen.append(remaining.argmax(axis=1))
        remaining[rows, chosen[-1]] = -np.inf
    classes = np.stack(chosen, axis=1)
    largest = exact.max(axis=1, keepdims=True)
    with np.errstate(invalid="ignore", over="ignore"):
        log_sum_exp = (largest + np.log(np.exp(exact - largest).sum(axis=1, keepdims=True)))[:, 0]
    return FileAnswers(
        classes=classes.astype(np.int32),
        logits=np.take_along_axis(exact, classes, axis=1).astype(np.float32),
        log_sum_exp=log_sum_exp.astype(np.float32),
        ranks=true_ranks(exact, labels).astype(np.int32),
    )


def save_answers(folder: Path, answers: Mapping[str, FileAnswers]) -> dict[str, Any]:
    """Write the answers of ``REFERENCE`` and of files into a bundle folder; return their summary for the manifest."""
    from safetensors.numpy import save

    tensors = {
        f"{name}:{field}": np.ascontiguousarray(getattr(found, field)) for name, found in answers.items()
        for field in _TYPES
    }  # fmt: skip
    (folder / ANSWERS).parent.mkdir(parents=True, exist_ok=True)
    (folder / ANSWERS).write_bytes(save(tensors))
    images, top = answers[REFERENCE].classes.shape
    return {"version": VERSION, "images": images, "top": top, "files": sorted(set(answers) - {REFERENCE})}


def load_answers(folder: Path, manifest: Manifest) -> dict[str, FileAnswers] | None:
    """The stored answers of ``REFERENCE`` and each file, None if the bundle has none.

    Raises ``BundleError`` if they are not those of its build, or in a form that this version does not read.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    described = manifest.data.get("answers")
    if described is None:
        return None
    if described["version"] != VERSION:
        raise BundleError(
            f"{ANSWERS} has the version {described['version']}; this version of kdexport reads {VERSION}.",
            remedy="Use the version of kdexport that built the bundle.",
        )
    path = folder / ANSWERS
    if not path.is_file() or sha256_file(path) != manifest.files.get(ANSWERS):
        raise BundleError(f"{ANSWERS} is missing or differs from the manifest.", remedy="Build the bundle again.")
    try:
        stored = load_file(path)
        return {
            name: _checked(name, {field: stored[f"{name}:{field}"] for field in _TYPES}, described, manifest)
            for name in (REFERENCE, *described["files"])
        }
    except (KeyError, ValueError, SafetensorError) as error:
        raise BundleError(
            f"{ANSWERS} does not match the manifest: {type(error).__name__}: {error}.",
            remedy="Build the bundle again.",
        ) from error


def _checked(
    name: str, arrays: dict[str, NDArray[Any]], described: Mapping[str, Any], manifest: Manifest
) -> FileAnswers:
    images, top, count = described["images"], described["top"], manifest.spec.num_classes
    shapes = {"classes": (images, top), "logits": (images, top), "log_sum_exp": (images,), "ranks": (images,)}
    for field, array in arrays.items():
        if array.shape != shapes[field] or array.dtype != _TYPES[field]:
            expected = f"{shapes[field]} {np.dtype(_TYPES[field])}"
            raise ValueError(f"{name}:{field} is {array.shape} {array.dtype}, expected {expected}")
    for field in ("classes", "ranks"):
        if ((arrays[field] < 0) | (arrays[field] >= count)).any():
            raise ValueError(f"{name}:{field} has a value outside of 0 to {count - 1}")
    if not images or not top:
        raise ValueError("there is no image")
    return FileAnswers(**arrays)
