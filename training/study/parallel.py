"""Cells of a table that train at once in one process, on one GPU that a single small network does not fill."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from accelerate import Accelerator

from kdexport.errors import BackendUnavailableError, ConfigError
from training.recipe import Recipe
from training.runs.turns import Ended, GiveWay, Memory, Shared, Watcher, take_turns
from training.study.cells import Cell, read, run_cell


class Distil(Protocol):
    """Runs a recipe in a folder, with the folder of a shared teacher, in turns with others."""

    def __call__(
        self, recipe: Recipe, directory: Path, teacher_directory: Path, shared: Shared | None, /
    ) -> object: ...


def require_parallel(at_once: int, cells: Sequence[Cell], accelerator: Accelerator) -> None:
    """Raise unless ``at_once`` cells can train in this process."""
    if at_once == 1:
        return
    if accelerator.num_processes > 1:
        raise ConfigError(
            f"--parallel {at_once} runs cells in one process, but {accelerator.num_processes} processes were started.",
            remedy="Omit --parallel, or start one process.",
        )
    if accelerator.device.type != "cuda":
        raise BackendUnavailableError(
            f"--parallel {at_once} needs a CUDA device, and there is none: on a CPU one cell uses every processor, so "
            "several at once would not end earlier.",
            remedy="Omit --parallel, or run on a machine with a GPU.",
        )
    tracked = next((cell for cell in cells if cell.recipe.train.trackers), None)
    if tracked is not None:
        raise ConfigError(
            f"--parallel {at_once} cannot send {_name(tracked)} to train.trackers = "
            f"{', '.join(tracked.recipe.train.trackers)}: a tracker has one run for each process.",
            remedy="Omit --parallel, or pass --set train.trackers=[].",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Together:
    """How cells run at once: at most ``at_once``, on ``device`` with ``memory``.

    ``written`` is called after each of them, ``say`` gets lines, and cells of which ``process_settings`` differ do not
    run at once, because torch and accelerate have one value of each for a process.
    """

    at_once: int
    device: torch.device
    distil: Distil
    process_settings: Callable[[Recipe], Hashable]
    written: Callable[[], None]
    say: Callable[[str], None]
    memory: Memory | None = None

    def run(self, cells: Sequence[Cell], runs: Path) -> None:
        """Run or continue ``cells``; those that are finished are not repeated.

        The first error of a cell is raised when the cells that run beside it have ended; no other begins meanwhile. A
        cell that does not find enough memory beside others continues alone.
        """
        open_ = []
        for cell in cells:
            if read(cell).state in ("done", "failed"):
                run_cell(cell, runs, partial(self._distil, None))
            else:
                open_.append(cell)
        groups: dict[Hashable, list[Cell]] = {}
        for cell in open_:
            groups.setdefault(self.process_settings(cell.recipe), []).append(cell)
        for group in groups.values():
            crowded = self._in_turns(group, runs, self.at_once)
            self._in_turns(crowded, runs, 1)

    def _in_turns(self, cells: Sequence[Cell], runs: Path, at_once: int) -> list[Cell]:
        """Run ``cells``; returns those that did not find enough memory."""
        watched = _Lines(cells, self, at_once)
        jobs = [partial(self._job, cell, runs) for cell in cells]
        take_turns(jobs, at_once, self.device, watched, self.memory)
        if watched.error is not None:
            raise watched.error
        return watched.crowded

    def _job(self, cell: Cell, runs: Path, give_way: GiveWay) -> None:
        run_cell(cell, runs, partial(self._distil, Shared(name=_name(cell), give_way=give_way)))

    def _distil(self, shared: Shared | None, recipe: Recipe, directory: Path, teacher_directory: Path) -> object:
        return self.distil(recipe, directory, teacher_directory, shared)


class _Lines(Watcher):
    """Says which cells begin and end, and keeps their errors."""

    def __init__(self, cells: Sequence[Cell], together: Together, at_once: int) -> None:
        self._cells, self._together, self._at_once = cells, together, at_once
        self.error: BaseException | None = None
        self.crowded: list[Cell] = []

    def begins(self, place: int) -> None:
        self._together.say(f"{_name(self._cells[place])} begins, cell {place + 1} of {len(self._cells)}")

    def waits(self, running: int, need: int, free: int) -> None:
        self._together.say(
            f"{running} of {self._at_once} cells run at once: another may take {_gib(need)} of the memory of the GPU, "
            f"and {_gib(free)} are free"
        )

    def ended(self, run: Ended) -> bool:
        name = _name(self._cells[run.place])
        took = f", it took {_gib(run.memory)} of the memory of the GPU" if run.memory else ""
        if run.error is None:
            self._together.say(f"{name} ended{took}")
        elif self._at_once > 1 and _lacks_memory(run.error):
            self._together.say(f"{name} found too little memory beside the others{took}; it continues after them")
            self.crowded.append(self._cells[run.place])
        else:
            self._together.say(f"{name} ended with an error{took}; the cells that run go on, no other begins")
            self.error = self.error or run.error
        self._together.written()
        return self.error is None


def _lacks_memory(error: BaseException | None) -> bool:
    """Whether ``error``, or what it was raised from, is that the device has too little memory."""
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError):
            return True
        error = error.__cause__
    return False


def _name(cell: Cell) -> str:
    return f"{cell.name} seed {cell.seed}"


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
