"""The golden images of a bundle, their reference logits, and the largest errors that a server accepts on them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kdexport.backends.base import Logits
from kdexport.bundle.manifest import GOLDEN_LOGITS, UNIT_ERROR, write_golden
from kdexport.checkpoint import TrainedStudent, load_student, save_tensors
from kdexport.data.datasets import ImageSet
from kdexport.verify.parity import float32_unit
from kdexport.verify.policy import Policy
from kdexport.verify.reference import run_exact, run_torch


def write_golden_set(
    folder: Path,
    trained: TrainedStudent,
    images: ImageSet,
    chosen: Sequence[int],
    low: Mapping[str, Logits],
    *,
    policy: Policy,
) -> list[str]:
    """Write the ``chosen`` images and their float64 logits (N,K); return the names of the images.

    The same file holds the largest error of a logit that a server accepts under ``policy``, so that the server needs
    no torch: for float32 the limit of rung B; for each target of ``low`` (a function that runs its file) the limit of
    rung C times the error of the file on this machine.
    """
    names = write_golden(folder, (images.original(index) for index in chosen))
    preprocessing = trained.spec.preprocessing
    given = preprocessing.normalise(images.read(chosen, preprocessing))
    exact, added = run_exact(load_student(trained), given)
    unit = float32_unit(exact, added, run_torch(load_student(trained), given))
    allowed = {UNIT_ERROR: unit, "allowed_error": policy.B.max_error * unit}
    allowed |= {
        f"allowed_error.{target}": low_precision_error(exact, logits(given), policy.C.max_error)
        for target, logits in low.items()
    }
    tensors = {"logits": torch.from_numpy(exact), "labels": torch.from_numpy(images.labels[list(chosen)])}
    tensors |= {name: torch.tensor(value, dtype=torch.float64) for name, value in allowed.items()}
    save_tensors(folder / GOLDEN_LOGITS, tensors)
    return names


def low_precision_error(exact: NDArray[np.float64], logits: NDArray[np.floating[Any]], factor: float) -> float:
    """Largest absolute error of a logit that a low-precision file may have on another machine.

    It is ``factor`` times the largest error of ``logits``, those of the file when the bundle was built; rung C judges
    whether that error is what the precision costs.
    """
    return float(factor * np.abs(logits.astype(np.float64) - exact).max())
