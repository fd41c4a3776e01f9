"""Whether a file that gives probabilities gives those of its own logits."""

import numpy as np
from numpy.typing import NDArray

from kdexport.backends.base import LOGITS, Runner
from kdexport.backends.file_interface import PROBABILITIES
from kdexport.stats.logits import probabilities_of
from kdexport.verify.check import Check, check_at_most

#: Largest difference of a probability, by the precision in which a runtime may compute the softmax.
_ALLOWED = {"fp32": 1e-6, "int8": 1e-6, "fp16": 2e-3, "bf16": 1e-2}
#: The softmax is the same for every image; these are run as one batch.
_IMAGES = 8


def check_probabilities(where: str, runner: Runner, images: NDArray[np.float32], precision: str) -> Check:
    """The largest difference of a probability from the softmax, in float64, of the logits of the same run.

    ``images`` (N,3,S,S) are normalised. Rungs B and C compare the logits.
    """
    given, logits = runner.outputs(images[:_IMAGES], [PROBABILITIES, LOGITS])
    difference = np.abs(given.astype(np.float64) - probabilities_of(logits.astype(np.float64)))
    largest = float(difference.max()) if np.isfinite(difference).all() else float("inf")
    return check_at_most("audit", where, "probabilities", largest, _ALLOWED[precision], unit="from the softmax")
