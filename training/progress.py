"""What a run says while it runs: live bars on a terminal, one plain line an epoch in a pipe."""

import sys
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn


class EpochProgress:
    """Steps of all epochs as one bar; ``epoch_done`` leaves one line per epoch in a pipe."""

    def __init__(self, title: str, *, steps_per_epoch: int, epochs: int, done_epochs: int, quiet: bool = False) -> None:
        self._title, self._steps, self._epochs = title, steps_per_epoch, epochs
        self._console = Console(stderr=True, highlight=False, quiet=quiet)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:3.0f}% {task.fields[status]}"),
            TimeRemainingColumn(compact=True),
        )
        self._live = Progress(*columns, console=self._console, transient=True, disable=not self._console.is_terminal)
        self._bar = self._live.add_task(title, total=steps_per_epoch * epochs, status="")
        self._live.advance(self._bar, steps_per_epoch * done_epochs)
        if done_epochs:
            self._line(f"{title}: continuing after epoch {done_epochs} of {epochs}")

    def __enter__(self) -> "EpochProgress":
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def step(self) -> None:
        """One optimisation step is done."""
        self._live.advance(self._bar)

    def epoch_done(self, epoch: int, metrics: dict[str, float]) -> None:
        """Epoch ``epoch`` (from 1) ended with ``metrics``."""
        losses = " ".join(
            f"{key.removeprefix('loss/')} {v:.3f}" for key, v in metrics.items() if key.startswith("loss/")
        )
        status = (
            f"epoch {epoch}/{self._epochs} top-1 {metrics['top1']:.2%} {losses} {metrics['images_per_s']:.0f} img/s"
        )
        self._live.update(self._bar, status=status)
        if not self._console.is_terminal or epoch == self._epochs:
            self._line(f"{self._title}: {status}")

    def _line(self, text: str) -> None:
        self._console.print(text, soft_wrap=True)
        sys.stderr.flush()
