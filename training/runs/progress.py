"""The progress of a run: a live line on a terminal, one plain line for each epoch in a pipe."""

import sys
import time
from types import TracebackType

from rich.progress import BarColumn, Progress, TextColumn

from kdexport.core.console import new_console


class EpochProgress:
    """A bar over the steps of all epochs with the latest numbers.

    In a pipe, and with ``lines`` for one of several runs, ``epoch_done`` prints a line instead.
    """

    def __init__(
        self,
        title: str,
        *,
        steps_per_epoch: int,
        epochs: int,
        done_epochs: int,
        batch_size: int,
        quiet: bool = False,
        lines: bool = False,
    ) -> None:
        self._title, self._steps, self._epochs, self._batch_size = title, steps_per_epoch, epochs, batch_size
        self._console = new_console(stderr=True, quiet=quiet)
        self._shown = self._console.is_terminal and not lines
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=16),
            TextColumn("{task.percentage:3.0f}% {task.fields[status]}", markup=False),
        )
        self._live = Progress(*columns, console=self._console, transient=True, disable=not self._shown)
        self._bar = self._live.add_task(title, total=steps_per_epoch * epochs, status="")
        self._live.advance(self._bar, steps_per_epoch * done_epochs)
        self._epoch, self._first, self._top1 = done_epochs + 1, done_epochs, ""
        self._started = self._epoch_started = time.monotonic()
        if done_epochs:
            self.say(f"{title}: continuing after epoch {done_epochs} of {epochs}")

    def __enter__(self) -> "EpochProgress":
        if self._shown:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Some versions of rich end a bar that is not shown with an empty line.
        if self._shown:
            self._live.stop()

    def say(self, text: str) -> None:
        """Print ``text`` as a separate line."""
        self._console.print(text, soft_wrap=True)
        sys.stderr.flush()

    def epoch_begins(self, epoch: int) -> None:
        """Epoch ``epoch`` (from 1) starts."""
        self._epoch, self._epoch_started = epoch, time.monotonic()

    def steps(self, count: int) -> None:
        """``count`` more optimisation steps were sent to the device."""
        self._live.advance(self._bar, count)

    def window(self, losses: dict[str, float], steps: int) -> None:
        """The device has finished ``steps`` of this epoch; ``losses`` are the means of the latest window."""
        if not self._live.disable:
            speed = steps * self._batch_size / max(time.monotonic() - self._epoch_started, 1e-9)
            self._live.update(self._bar, status=self._status(losses, speed, self._epoch - 1 + steps / self._steps))

    def epoch_done(self, epoch: int, metrics: dict[str, float]) -> None:
        """Epoch ``epoch`` (from 1) ended with ``metrics``."""
        self._top1 = f" top-1 {metrics['top1']:.2%}"
        losses = {key.removeprefix("loss/"): v for key, v in metrics.items() if key.startswith("loss/")}
        status = self._status(losses, metrics["images_per_s"], epoch)
        self._live.update(self._bar, status=status)
        if not self._shown or epoch == self._epochs:
            self.say(f"{self._title}: {status}")

    def _status(self, losses: dict[str, float], images_per_s: float, done: float) -> str:
        named = " ".join(f"{name} {value:.3f}" for name, value in losses.items())
        return f"epoch {self._epoch}/{self._epochs}{self._top1} {named} {images_per_s:.0f} img/s{self._left(done)}"

    def _left(self, done: float) -> str:
        """The time that the rest of the run takes at the speed since this start, evaluation included."""
        finished = done - self._first
        if done >= self._epochs or finished <= 0:
            return ""
        seconds = round((time.monotonic() - self._started) / finished * (self._epochs - done))
        return f" {seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02} left"
