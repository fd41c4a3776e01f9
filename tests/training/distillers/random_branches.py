"""Random features of branches and of their teacher."""

import numpy as np
import torch
from torch import Tensor

SHAPE = (5, 3, 2, 4)


def drawn(count: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Branches that share most of their error, with different scales and distant channel means; and their target."""
    rng = np.random.default_rng(seed)
    target = rng.normal(0.3, 1.5, SHAPE)
    shared, away = rng.normal(size=SHAPE), 10 * rng.normal(size=(1, 3, 1, 1))
    errors = [(0.4 + 0.3 * j) * (shared + 0.5 * rng.normal(size=SHAPE)) + away for j in range(count)]
    return torch.from_numpy(target - np.stack(errors)), torch.from_numpy(target)
