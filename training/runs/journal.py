"""The files that a run writes after each epoch: metrics and diversity as JSON lines, TensorBoard scalars, plots."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from kdexport.core.files import write_file, write_text
from kdexport.errors import BackendUnavailableError
from training.runs.plots import Line, plot_diversity, plot_learning_curves
from training.runs.trackers import Trackers

#: Seconds between two updates of the plots; the last epoch always updates them.
_REDRAW_S = 60.0


class Journal:
    """The files of one run; ``say`` is called once if plots cannot be drawn here."""

    def __init__(
        self,
        directory: Path,
        title: str,
        *,
        done: int,
        draws: bool,
        teacher_top1: float | None,
        say: Callable[[str], None],
        trackers: Trackers | None = None,
        described: Mapping[str, Any] | None = None,
    ) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # One file for all epochs: TensorBoard reads files of the same second in the order of their names.
        _wait_for_a_second_of_its_own(directory / "tensorboard")
        self._scalars = SummaryWriter(str(directory / "tensorboard"), purge_step=done + 1)
        self._directory, self._title, self._teacher_top1, self._say = directory, title, teacher_top1, say
        self._draws, self._drawn_at = draws, time.monotonic()
        if described and not done:
            rows = "".join(f"| {key} | {value} |\n" for key, value in described.items())
            self._scalars.add_text("recipe", f"| key | value |\n|---|---|\n{rows}", 0)
        self._trackers = trackers or Trackers((), title, {})

    def __enter__(self) -> "Journal":
        self._trackers.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._scalars.close()
        self._trackers.__exit__(kind, error, trace)

    def write(
        self,
        history: Sequence[Line],
        diversity: Sequence[Line],
        *,
        last: bool,
        report: dict[str, Any] | None = None,
    ) -> None:
        """Write all epochs so far, the newest one to TensorBoard and the trackers, and the plots if they are due.

        ``report`` is the evaluation of the newest epoch by class.
        """
        epoch = len(history)
        numbered = [{"epoch": index + 1, **metrics} for index, metrics in enumerate(history)]
        write_text(self._directory / "metrics.jsonl", _jsonl(numbered))
        if report is not None:
            write_text(self._directory / "evaluation.json", json.dumps({"epoch": epoch, **report}, indent=1) + "\n")
        newest = dict(history[-1])
        if diversity:
            write_text(self._directory / "diversity.jsonl", _jsonl(diversity))
            newest.update({f"diversity/{name}": value for name, value in diversity[-1].items() if name != "epoch"})
        for name, value in newest.items():
            self._scalars.add_scalar(name, value, epoch)
        if self._teacher_top1 is not None:
            # A line to compare with.
            self._scalars.add_scalar("teacher_top1", self._teacher_top1, epoch)
        self._scalars.flush()
        self._trackers.log(newest, epoch)
        if self._draws and (last or time.monotonic() - self._drawn_at > _REDRAW_S):
            self._draw(numbered, diversity)

    def _draw(self, history: Sequence[Line], diversity: Sequence[Line]) -> None:
        try:
            write_file(
                self._directory / "curves.png",
                lambda path: plot_learning_curves(history, path, title=self._title, teacher_top1=self._teacher_top1),
            )
            if diversity:
                write_file(
                    self._directory / "diversity.png", lambda path: plot_diversity(diversity, path, title=self._title)
                )
        except BackendUnavailableError as error:
            self._draws = False
            self._say(f"{self._title}: no plots. {error.message} {error.remedy}")
        self._drawn_at = time.monotonic()


def _jsonl(lines: Sequence[Line]) -> str:
    return "".join(json.dumps(line) + "\n" for line in lines)


def _wait_for_a_second_of_its_own(folder: Path) -> None:
    """Return in a later second than that of any event file in ``folder``.

    A run that continues within a second of its end would else be read before the run that it continues.
    """
    seconds = [path.name.split(".")[3] for path in folder.glob("events.out.tfevents.*.*")]
    now = time.time()
    if str(int(now)) in (second.lstrip("0") for second in seconds):
        time.sleep(int(now) + 1 - now)
