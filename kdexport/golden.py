"""The golden images of a bundle, and what a server holds its own logits of them to."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from kdexport.bundle import GOLDEN_LOGITS, write_golden
from kdexport.checkpoint import TrainedStudent, load_student, save_tensors
from kdexport.data import ImageSet
from kdexport.verify.golden import allowed_error, low_precision_error
from kdexport.verify.reference import run_exact, run_torch

Logits = Callable[[NDArray[np.float32]], NDArray[np.float32]]


def write_golden_set(
    folder: Path,
    trained: TrainedStudent,
    images: ImageSet,
    chosen: Sequence[int],
    low: Mapping[str, Logits],
    *,
    factor: float,
) -> list[str]:
    """Write the ``chosen`` images and their float64 logits (N,K); returns the names of the images.

    With them goes the largest error that float32 logits may have, and for each target of ``low``, whose files are given
    as what runs them, ``factor`` times the error that it has here.
    """
    names = write_golden(folder, (images.original(index) for index in chosen))
    preprocessing = trained.spec.preprocessing
    given = preprocessing.normalise(images.read(chosen, preprocessing))
    exact, added = run_exact(load_student(trained), given)
    allowed = {"allowed_error": allowed_error(exact, added, run_torch(load_student(trained), given))}
    allowed |= {
        f"allowed_error.{target}": low_precision_error(exact, logits(given), factor) for target, logits in low.items()
    }
    tensors = {"logits": torch.from_numpy(exact), "labels": torch.from_numpy(images.labels[list(chosen)])}
    tensors |= {name: torch.tensor(value, dtype=torch.float64) for name, value in allowed.items()}
    save_tensors(folder / GOLDEN_LOGITS, tensors)
    return names
