"""The losses of an epoch: summed on the device, and checked without a step that waits for it."""

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kdexport.errors import TrainingError

#: Steps whose losses are read together, or a few more if several end at once. No step waits for them: on CUDA they are
#: checked when their copy has arrived.
WINDOW = 8
#: The limit of a loss, as a multiple of its mean over an earlier epoch. No run is known to recover from more.
MAX_GROWTH = 1000.0
REMEDY = "Lower train.learning_rate, raise train.warmup_epochs, or lower distiller.weight."

#: Receives the means of the losses of a window by name, and the number of finished steps.
Report = Callable[[dict[str, float], int], None]


@dataclass(frozen=True, slots=True)
class _Window:
    """The sum of the losses of some steps, on its way to the host."""

    values: Tensor
    steps: int
    end: int
    arrived: torch.cuda.Event | None


def sum_type(device: torch.device) -> torch.dtype:
    """The precision of sums over an epoch: float64, which the GPUs of a Mac lack."""
    return torch.float32 if device.type == "mps" else torch.float64


class LossSums:
    """The losses of an epoch, added up on the device: over all steps, and over those of the open window.

    The sums are in double precision where the device has it, so that they do not depend on how many steps are added at
    once. They stay where they are, so that steps that are captured as a CUDA graph add to them. ``latest`` (k,n) has
    the n losses of each of the k steps that were added last.
    """

    def __init__(self) -> None:
        self.names: tuple[str, ...] = ()
        self.total, self.window, self.latest = torch.zeros(()), torch.zeros(()), torch.zeros(())
        self._noted: list[Tensor] = []

    def note(self, losses: dict[str, Tensor]) -> Tensor:
        """Keep the losses of a step for ``add``; returns them (n,), with their gradient."""
        stacked = torch.stack([value.float() for value in losses.values()])
        self._noted.append(stacked.detach())
        if not self.names:
            self.names = tuple(losses)
            self.total = torch.zeros(len(losses), dtype=sum_type(stacked.device), device=stacked.device)
            self.window = torch.zeros_like(self.total)
        return stacked

    def add(self) -> None:
        """Add the losses of the steps that were noted."""
        self.latest = torch.stack(self._noted)
        self._noted.clear()
        added = self.latest.sum(0, dtype=self.total.dtype)
        self.total += added
        self.window += added

    def clear(self) -> None:
        """Begin an epoch."""
        self.total.zero_()
        self.window.zero_()


class LossWatch:
    """Checks the losses of the steps of one epoch (counted from 0); ``report`` receives the means of each window.

    ``reference`` is the largest mean of the total loss over an earlier epoch; None in the first epoch, which takes the
    mean of its first window. ``sums`` are cleared.
    """

    def __init__(self, epoch: int, reference: float | None, report: Report, sums: LossSums | None = None) -> None:
        self._epoch, self._reference, self._report = epoch, reference, report
        self._sums = sums or LossSums()
        self._sums.clear()
        self._steps, self._open = 0, 0
        self._sent: deque[_Window] = deque()

    def add(self, losses: dict[str, Tensor]) -> Tensor:
        """Add the losses of a step; returns their sum, with its gradient. Raises as ``steps_done``."""
        total = self._sums.note(losses).sum()
        self._sums.add()
        self.steps_done(1)
        return total

    def steps_done(self, count: int) -> None:
        """``count`` more steps have added their losses to the sums.

        Raises ``TrainingError`` if a window that has arrived meanwhile has a loss that is not finite or too large.
        """
        self._steps += count
        self._open += count
        if self._open >= WINDOW:
            self._send()

    def means(self) -> tuple[tuple[str, ...], Tensor]:
        """Names and means (k,) of the losses of all steps so far; waits for the device and checks every window."""
        if self._open:
            self._send()
        self._check_arrived(wait=True)
        return self._sums.names, self._sums.total / self._steps

    def _send(self) -> None:
        window = self._sums.window
        if window.device.type == "cuda":
            host = torch.empty(window.shape, dtype=window.dtype, pin_memory=True).copy_(window, non_blocking=True)
            arrived: torch.cuda.Event | None = torch.cuda.Event()  # type: ignore[no-untyped-call]
            assert arrived is not None
            arrived.record()
        else:
            host, arrived = window.clone(), None
        window.zero_()
        self._sent.append(_Window(host, self._open, self._steps, arrived))
        self._open = 0
        self._check_arrived(wait=False)

    def _check_arrived(self, *, wait: bool) -> None:
        while self._sent:
            arrived = self._sent[0].arrived
            if arrived is not None:
                if wait:
                    arrived.synchronize()
                elif not arrived.query():  # type: ignore[no-untyped-call]
                    return
            self._check(self._sent.popleft())

    def _check(self, window: _Window) -> None:
        means = dict(zip(self._sums.names, (window.values / window.steps).tolist(), strict=True))
        where = f"in epoch {self._epoch + 1}, steps {window.end - window.steps + 1} to {window.end}"
        for name, value in means.items():
            if not math.isfinite(value):
                raise TrainingError(f"loss/{name} is not finite {where}: the run diverged.", remedy=REMEDY)
        total = sum(map(abs, means.values()))
        if self._reference is None:
            self._reference = total
        limit = MAX_GROWTH * max(self._reference, 1.0)
        if total > limit:
            raise TrainingError(
                f"The loss exploded {where}: its mean is {total:.3g}, but at most {limit:.3g} is allowed after an "
                f"earlier mean of {self._reference:.3g}.",
                remedy=REMEDY,
            )
        self._report(means, window.end)
