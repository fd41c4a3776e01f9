"""What a backend offers to the rest of the code."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Finding:
    """One checked statement about a file: whether it holds, and the measured fact."""

    check: str
    holds: bool
    fact: str


Logits = Callable[[NDArray[np.float32]], NDArray[np.float32]]


def run_in_batches(logits: Logits, images: NDArray[np.float32], batches: tuple[int, ...]) -> NDArray[np.float32]:
    """Logits of all images, taken in batches of the given sizes in turn, so that every size is on the ladder."""
    parts, start, turn = [], 0, 0
    while start < len(images):
        size = batches[turn % len(batches)]
        parts.append(logits(images[start : start + size]))
        start, turn = start + size, turn + 1
    return np.concatenate(parts)
