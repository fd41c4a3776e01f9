"""How the commands speak: results on stdout, progress and errors on stderr, no traceback without ``--debug``."""

import ctypes
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

from kdexport.errors import KdexportError, StorageError, UnexpectedError


def guarded(app: Callable[[], Any]) -> NoReturn:
    """Run a command line and turn each error into its sentence, remedy and exit code."""
    # Children run our own modules, whatever lies in the user's folder under the same names.
    os.environ["PYTHONSAFEPATH"] = "1"
    try:
        _die_with_parent()
        app()
    except KdexportError as error:
        fail(error)
    except OSError as error:
        fail(storage_error(error))
    except Exception as error:  # noqa: BLE001, the last place before a traceback
        fail(UnexpectedError(error))
    except KeyboardInterrupt:
        sys.stderr.write("Interrupted. The same command continues from the last finished step.\n")
        sys.exit(130)
    sys.exit(0)


def storage_error(error: OSError) -> StorageError:
    """A full disk, a missing permission or a path that cannot be as our own error."""
    place = f"{error.filename}: " if error.filename else ""
    wrapped = StorageError(
        f"{place}{error.strerror or error}.",
        remedy="Free some space, or pass a folder that can be read and written; nothing half-written is left behind.",
    )
    wrapped.__cause__ = error
    return wrapped


#: Set for our own child processes: they describe an error on stdout, and the parent says it.
CHILD = "KDEXPORT_PARENT_PID"


def fail(error: KdexportError) -> NoReturn:
    """Print an error and exit with its code; ``--json`` adds one object on stdout, ``--debug`` the traceback."""
    if "--debug" in sys.argv:
        traceback.print_exception(error, file=sys.stderr)
    as_child = CHILD in os.environ
    if "--json" in sys.argv or as_child:
        described = {"code": error.code, "message": error.message, "remedy": error.remedy}
        sys.stdout.write(json.dumps({"ok": False, "exit_code": error.exit_code, "error": described}) + "\n")
    if as_child:
        sys.exit(error.exit_code)
    sys.stderr.write(f"error {error.code}: {error.message}\n{error.remedy}\n")
    sys.exit(error.exit_code)


#: Set by torch's launcher for the processes that it starts, each in a session of its own.
_LAUNCHED = "TORCHELASTIC_RUN_ID"


def _die_with_parent() -> None:
    """As a child process, end when the parent ends, even by SIGKILL: nothing goes on that nobody waits for."""
    parent = os.environ.get(CHILD)
    if parent is not None or _LAUNCHED in os.environ:
        end_with_parent()
    if parent is not None and sys.platform == "linux" and os.getppid() != int(parent):
        sys.exit(130)


def end_with_parent() -> None:
    """Have the system kill this process when its parent ends; holds for the program that it may become (``exec``)."""
    set_parent_death_signal = 1
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
