"""Progress of a build: a live line on a terminal, one plain line per finished stage in a pipe; both on stderr."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from kdexport.core.console import new_console

#: The width of "compile executorch-fp32", the longest name of a stage.
_NAME = 23


class Reporter:
    """Shows which stage runs and how long it took; nothing if ``quiet``."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._console = new_console(stderr=True, quiet=quiet)

    @contextmanager
    def stage(self, name: str, *, live: bool = True) -> Iterator[Callable[[str], None]]:
        """Time one stage; the yielded function shows its current step. ``live=False`` leaves the screen to a child."""
        started = time.monotonic()
        text = TextColumn("{task.description:<10} {task.fields[detail]}", markup=False)
        columns = (SpinnerColumn(), text, TimeElapsedColumn())
        hidden = not (live and self._console.is_terminal)
        bar = Progress(*columns, console=self._console, transient=True, disable=hidden)
        task = bar.add_task(name, total=None, detail="")
        # Some versions of rich end a bar that is not shown with an empty line.
        with nullcontext() if hidden else bar:
            yield lambda detail: bar.update(task, detail=detail)
        self._console.print(f"{name:<{_NAME}} {time.monotonic() - started:6.1f} s", soft_wrap=True)

    def say(self, text: str) -> None:
        """Print one line, in a pipe and on a terminal."""
        self._console.print(text, soft_wrap=True)
