"""Output of the commands: results on stdout, progress and errors on stderr, tracebacks only with ``--debug``.

With ``--json`` a command prints one JSON object on stdout, its answer: the result or the error, in the envelope that
``answer.schema.json`` describes (docs/json.md).
"""

import contextlib
import errno
import io
import json
import logging
import math
import os
import re
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from kdexport import __version__
from kdexport.core.child import describes_errors, end_with_launcher
from kdexport.core.extras import missing_package
from kdexport.core.stopping import Stopped, stoppable
from kdexport.errors import KdexportError, StoppedError, StorageError, UnexpectedError

if TYPE_CHECKING:
    from rich.console import Console

#: The schema of the object that ``--json`` prints. It is raised if a key changes its meaning or is removed.
ANSWER_SCHEMA = "kdexport.answer/1"


@dataclass(slots=True)
class _Answer:
    """The one object of this process: of which command, once its name was read, and whether it is written."""

    command: str | None = None
    written: bool = False


_answer = _Answer()

#: Exit code after Ctrl-C.
_INTERRUPTED = 128 + signal.SIGINT
#: What goes wrong where something is written, and never where it is read.
_OF_THE_TARGET = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def guarded(app: Callable[[], Any]) -> NoReturn:
    """Run a command line and turn each error into its message, remedy and exit code."""
    _answer.command, _answer.written = None, False
    try:
        with stoppable():
            end_with_launcher()
            app()
    except KdexportError as error:
        fail(error)
    except OSError as error:
        fail(storage_error(error))
    except Exception as error:  # noqa: BLE001, or the user would see a traceback
        stop = _stop_behind(error)
        fail(stop or missing_package(error) or UnexpectedError(error))
    except Stopped as stop:
        fail(StoppedError(signal.Signals(stop.number).name, stop.exit_code))
    except KeyboardInterrupt:
        _interrupted()
    except SystemExit as end:
        # The command line library turns Ctrl-C into this exit code, without a word.
        if end.code == _INTERRUPTED:
            _interrupted()
        raise
    sys.exit(0)


def _stop_behind(error: BaseException) -> StoppedError | None:
    """The stop by a signal that a library caught and reported as an error of its own; None if there is none."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        if isinstance(current, Stopped):
            return StoppedError(signal.Signals(current.number).name, current.exit_code)
        if isinstance(current, KeyboardInterrupt):
            return StoppedError(signal.Signals.SIGINT.name, _INTERRUPTED)
        seen.add(id(current))
        current = current.__cause__ or current.__context__
    return None


def name_command(name: str | None) -> None:
    """Say which command answers: its name is read before its options are."""
    _answer.command = name


def _interrupted() -> NoReturn:
    fail(StoppedError(signal.Signals.SIGINT.name, _INTERRUPTED))


def storage_error(error: OSError) -> StorageError:
    """A full disk, a missing permission or an invalid path as kdexport's own error."""
    path, reason = _place_and_reason(error)
    remedy = "Free some space, or pass a folder that can be read and written."
    if path and Path(path).is_relative_to(tempfile.gettempdir()):
        remedy = "Free some space there, or set TMPDIR to a folder that can be written."
    text = f"{path}: {reason}" if path else reason
    wrapped = StorageError(f"{text}.", remedy=f"{remedy} No partly written file was left.")
    wrapped.__cause__ = error
    return wrapped


def _place_and_reason(error: OSError) -> tuple[str, str]:
    """The path that the user has to do something about, or an empty string, and what happened to it."""
    if isinstance(error, shutil.Error) and error.args and isinstance(error.args[0], list):
        # A copied folder collects the errors of its files: source, target and a text.
        _, target, text = error.args[0][0]
        return str(target), re.sub(r"^\[Errno -?\d+\] ([^:]+).*$", r"\1", str(text), flags=re.DOTALL)
    # A copy names the source first, also where its target is what has no room.
    copied = error.errno in _OF_THE_TARGET and error.filename2
    named = error.filename2 if copied else error.filename
    return os.fsdecode(named) if isinstance(named, str | bytes) else str(named or ""), error.strerror or str(error)


def fail(error: KdexportError) -> NoReturn:
    """Print an error and exit with its code; ``--json`` adds the answer on stdout, ``--debug`` the traceback."""
    if "--debug" in sys.argv:
        traceback.print_exception(error, file=sys.stderr)
    as_child = describes_errors()
    if (_wants_json() or as_child) and not _answer.written:
        described = {"code": error.code, "message": error.message, "remedy": error.remedy}
        _print_answer(error.exit_code, "error", described)
    if as_child:
        sys.exit(error.exit_code)
    title = f"error {error.code}:"
    if sys.stderr.isatty():
        new_console(stderr=True).print(title, style="bold red", end=" ")
    else:
        sys.stderr.write(f"{title} ")
    sys.stderr.write(f"{error.message}\n{error.remedy}\n")
    sys.exit(error.exit_code)


def _wants_json() -> bool:
    """Whether ``--json`` was given, also where the command line could not be read; after ``--`` it is a file."""
    arguments = sys.argv[1:]
    return "--json" in (arguments[: arguments.index("--")] if "--" in arguments else arguments)


def print_answer(result: dict[str, Any], *, exit_code: int = 0) -> None:
    """Write the answer of a command that came to its end: its result, and whether it passed."""
    _print_answer(exit_code, "result", result)


def _print_answer(exit_code: int, kind: str, value: dict[str, Any]) -> None:
    _answer.written = True
    envelope = {
        "schema": ANSWER_SCHEMA,
        "kdexport": __version__,
        "command": _answer.command,
        "ok": exit_code == 0,
        "exit_code": exit_code,
        kind: value,
    }
    print_json(envelope)
    # A server goes on running.
    sys.stdout.flush()


def print_json(value: dict[str, Any]) -> None:
    """Write a JSON object as one line on stdout; numbers that are not finite become null, JSON cannot hold them."""
    sys.stdout.write(json.dumps(_finite(value), allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def verdict_style(exit_code: int) -> str:
    """The colour of a verdict on a terminal: 0 green, 3 (undecided) yellow, anything else red."""
    return {0: "green", 3: "yellow"}.get(exit_code, "bold red")


def new_console(*, stderr: bool = False, quiet: bool = False) -> "Console":
    """A console that prints text as it is; in a pipe cells do not wrap.

    Without markup and emoji: ``kdexport[plots]`` would lose its extra, and ``net:train:`` become a picture.
    """
    from rich.console import Console

    # A program that reads a pipe expects one row on one line.
    width = None if stderr or sys.stdout.isatty() else 160
    return Console(stderr=stderr, quiet=quiet, highlight=False, markup=False, emoji=False, width=width)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence warnings, logs and output of a library, such as the exporter, that reports failures as exceptions."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
