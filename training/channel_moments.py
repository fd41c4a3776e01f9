"""Means and variances of the channels of features that arrive in parts, on one or on several processes."""

import torch
from torch import Tensor

from training.devices import gathered

#: Images that are converted to double precision together.
_PART = 16


class ChannelMoments:
    """The count, the mean and the squared deviations of each channel, in float64.

    Parts are merged as in Chan et al. (1983): the rounding error is that of one pass over all values, about 1e-16 of
    the second moment, and memory does not grow with the number of parts. No feature is kept.
    """

    def __init__(self) -> None:
        #: (3,C): the count, the mean, and the sum of squared deviations from it.
        self._state: Tensor | None = None

    def add(self, features: Tensor) -> None:
        """Take features (N,C,H,W) into the moments."""
        for start in range(0, len(features), _PART):
            values = features[start : start + _PART].double()
            variance, mean = torch.var_mean(values, dim=(0, 2, 3), correction=0)
            count = torch.full_like(mean, values.numel() / values.shape[1])
            new = torch.stack([count, mean, variance * count])
            self._state = new if self._state is None else _merged(self._state, new)

    def over_all_processes(self) -> tuple[Tensor, Tensor]:
        """Mean and variance (C,), the latter with n - 1 degrees of freedom, of the features of all processes.

        Every process gets the same ones. Raises ``ValueError`` without features.
        """
        if self._state is None:
            raise ValueError("there are no features")
        whole, *others = gathered(self._state[None])
        for other in others:
            whole = _merged(whole, other)
        count, mean, squares = whole
        return mean, squares / (count - 1)


def _merged(one: Tensor, two: Tensor) -> Tensor:
    (n, mean, squares), (m, other, more) = one, two
    total, difference = n + m, other - mean
    return torch.stack([total, mean + difference * m / total, squares + more + difference.square() * n * m / total])
