"""How far float32 logits may lie from the reference on the golden images: rung B's limit as one absolute number."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdexport.policy import Fp32Policy


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
