"""What an audit says."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

#: float32 weights of a folded student by name.
Weights = Mapping[str, NDArray[np.float32]]


@dataclass(frozen=True, slots=True)
class Finding:
    """One checked statement about a file: whether it holds, and the measured fact."""

    check: str
    holds: bool
    fact: str
