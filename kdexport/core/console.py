"""Output of the commands: results on stdout, progress and errors on stderr, tracebacks only with ``--debug``."""

import contextlib
import io
import json
import logging
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from kdexport.core.child import describes_errors, end_with_launcher
from kdexport.core.extras import missing_package
from kdexport.core.stopping import Stopped, stoppable
from kdexport.errors import KdexportError, StoppedError, StorageError, UnexpectedError

#: Exit code after Ctrl-C.
_INTERRUPTED = 128 + signal.SIGINT


def guarded(app: Callable[[], Any]) -> NoReturn:
    """Run a command line and turn each error into its message, remedy and exit code."""
    try:
        with stoppable():
            end_with_launcher()
            app()
    except KdexportError as error:
        fail(error)
    except OSError as error:
        fail(storage_error(error))
    except Exception as error:  # noqa: BLE001, or the user would see a traceback
        fail(missing_package(error) or UnexpectedError(error))
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


def _interrupted() -> NoReturn:
    fail(StoppedError(signal.Signals.SIGINT.name, _INTERRUPTED))


def storage_error(error: OSError) -> StorageError:
    """A full disk, a missing permission or an invalid path as kdexport's own error."""
    place = f"{error.filename}: " if error.filename else ""
    remedy = "Free some space, or pass a folder that can be read and written."
    if error.filename and Path(str(error.filename)).is_relative_to(tempfile.gettempdir()):
        remedy = "Free some space there, or set TMPDIR to a folder that can be written."
    wrapped = StorageError(f"{place}{error.strerror or error}.", remedy=f"{remedy} No partly written file was left.")
    wrapped.__cause__ = error
    return wrapped


def fail(error: KdexportError) -> NoReturn:
    """Print an error and exit with its code; ``--json`` adds a JSON object on stdout, ``--debug`` the traceback."""
    if "--debug" in sys.argv:
        traceback.print_exception(error, file=sys.stderr)
    as_child = describes_errors()
    if "--json" in sys.argv or as_child:
        described = {"code": error.code, "message": error.message, "remedy": error.remedy}
        sys.stdout.write(json.dumps({"ok": False, "exit_code": error.exit_code, "error": described}) + "\n")
    if as_child:
        sys.exit(error.exit_code)
    sys.stderr.write(f"error {error.code}: {error.message}\n{error.remedy}\n")
    sys.exit(error.exit_code)


def print_json(value: dict[str, Any]) -> None:
    """Write a JSON object as one line on stdout."""
    sys.stdout.write(json.dumps(value) + "\n")


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
