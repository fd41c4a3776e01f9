"""The fewest layers to keep: greedy by measured sensitivity, deterministic, with a bounded number of trials."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar


class Judged(Protocol):
    """A trial that knows whether it is within the budget."""

    @property
    def within(self) -> bool:
        """Whether it may be taken."""


T = TypeVar("T", bound=Judged)


@dataclass(frozen=True, slots=True)
class Found(Generic[T]):
    """The kept layers in order of sensitivity, their trial (the last one if none fits), and all trials made."""

    kept: tuple[str, ...]
    trial: T
    trials: tuple[tuple[tuple[str, ...], T], ...]


def keep_fewest(ranked: Sequence[str], evaluate: Callable[[tuple[str, ...]], T], *, max_trials: int) -> Found[T]:
    """Keep the most sensitive layers of ``ranked`` (worst first) until a trial is within the budget.

    Doubles the number of kept layers until it fits, halves back to the smallest that does, then gives back one layer
    after the other, the least sensitive first, where it still fits without it.
    """
    trials: list[tuple[tuple[str, ...], T]] = []

    def attempt(kept: tuple[str, ...]) -> T | None:
        known = next((trial for names, trial in trials if names == kept), None)
        if known is None and len(trials) < max_trials:
            known = evaluate(kept)
            trials.append((kept, known))
        return known

    best = _smallest_prefix(ranked, attempt)
    if best is None:
        kept, trial = trials[-1]
        return Found(kept, trial, tuple(trials))
    for layer in reversed(best[0]):
        without = tuple(name for name in best[0] if name != layer)
        trial_without = attempt(without)
        if trial_without is None:
            break
        if trial_without.within:
            best = (without, trial_without)
    return Found(*best, tuple(trials))


def _smallest_prefix(
    ranked: Sequence[str], attempt: Callable[[tuple[str, ...]], T | None]
) -> tuple[tuple[str, ...], T] | None:
    low, high, best = -1, 0, None
    while best is None:
        trial = attempt(tuple(ranked[:high]))
        if trial is None:
            return None
        if trial.within:
            best = (tuple(ranked[:high]), trial)
        elif high == len(ranked):
            return None
        else:
            low, high = high, min(len(ranked), max(1, 2 * high))
    while high - low > 1:
        middle = (low + high) // 2
        trial = attempt(tuple(ranked[:middle]))
        if trial is None:
            break
        if trial.within:
            high, best = middle, (tuple(ranked[:middle]), trial)
        else:
            low = middle
    return best
