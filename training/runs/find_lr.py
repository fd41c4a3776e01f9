"""The range test of the learning rate (Smith, 2017): the loss over rates that grow from step to step."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from kdexport.errors import TrainingError

LOWEST, HIGHEST, STEPS = 1e-5, 1.0, 60
#: Weight of the old value in the running mean of the losses, and the growth over its minimum that ends the test.
_SMOOTHING, _DIVERGED = 0.7, 3.0
#: The loss reaches its minimum some steps after the rate became too large.
_MARGIN = 10.0


@dataclass(frozen=True, kw_only=True, slots=True)
class FoundRate:
    """The learning rate that the test suggests, and the rates and smoothed losses of its steps."""

    rate: float
    rates: tuple[float, ...]
    losses: tuple[float, ...]


def find_rate(step: Callable[[float], float], steps: int = STEPS) -> FoundRate:
    """Call ``step(rate)``, which trains one step and returns its loss, with rates from 1e-5 to 1, until it diverges.

    The rate is a tenth of that with the lowest smoothed loss. Raises ``TrainingError`` if the loss never falls.
    """
    rates: list[float] = []
    losses: list[float] = []
    mean = 0.0
    for index in range(steps):
        rate = LOWEST * (HIGHEST / LOWEST) ** (index / (steps - 1))
        loss = step(rate)
        mean = _SMOOTHING * mean + (1 - _SMOOTHING) * loss
        smoothed = mean / (1 - _SMOOTHING ** (index + 1))
        if not math.isfinite(smoothed) or (losses and smoothed > _DIVERGED * max(min(losses), 1e-12)):
            break
        rates.append(rate)
        losses.append(smoothed)
    if len(losses) < 2 or min(losses) >= losses[0]:
        raise TrainingError(
            f"train.find_lr found no learning rate from {LOWEST:g} to {HIGHEST:g} with which the loss falls.",
            remedy="Set train.learning_rate, and remove train.find_lr.",
        )
    best = rates[losses.index(min(losses))]
    return FoundRate(rate=best / _MARGIN, rates=tuple(rates), losses=tuple(losses))
