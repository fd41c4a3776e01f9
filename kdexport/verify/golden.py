"""How far float32 logits may lie from the reference on the golden images: rung B's limit as one absolute number.

The golden images of a bundle, and what a server holds its own logits of them to.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kdexport.bundle.manifest import GOLDEN_LOGITS, write_golden
from kdexport.checkpoint import TrainedStudent, load_student, save_tensors
from kdexport.data.datasets import ImageSet
from kdexport.verify.policy import Fp32Policy
from kdexport.verify.reference import run_exact, run_torch


def allowed_error(exact: NDArray[np.float64], added: NDArray[np.float64], unfused: NDArray[np.floating[Any]]) -> float:
    """Largest absolute error of a logit that rung B allows; ``unfused`` are the float32 logits of the unfused student.

    ``exact`` and ``added`` are those of ``run_exact``.

    Written into the bundle, so that a server can hold its own answers to it without torch.
    """
    own = np.abs(unfused.astype(np.float64) - exact).max()
    rounding = float(np.finfo(np.float32).eps) * added.max()
    return float(Fp32Policy().max_error * max(own, rounding))


def low_precision_error(exact: NDArray[np.float64], logits: NDArray[np.floating[Any]], factor: float) -> float:
    """Largest absolute error of a logit that a low-precision file may have elsewhere: ``factor`` times its own here.

    ``logits`` are what the file gave when the bundle was built; rung C says whether that is what its precision costs.
    """
    return float(factor * np.abs(logits.astype(np.float64) - exact).max())


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
