"""How the commands speak: results on stdout, progress and errors on stderr, no traceback without ``--debug``."""

import errno
import json
import sys
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

from kdexport.errors import KdexportError, StorageError

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS}


def guarded(app: Callable[[], Any]) -> NoReturn:
    """Run a command line and turn each error into its sentence, remedy and exit code."""
    try:
        app()
    except KdexportError as error:
        fail(error)
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        fail(storage_error(error))
    except KeyboardInterrupt:
        sys.stderr.write("Interrupted. The same command continues from the last finished step.\n")
        sys.exit(130)
    sys.exit(0)


def storage_error(error: OSError) -> StorageError:
    """A full or read-only disk as our own error."""
    place = f" {error.filename}" if error.filename else ""
    return StorageError(
        f"Writing{place} failed: {error.strerror}.",
        remedy="Free some space or pass a folder that can be written; nothing half-written is left behind.",
    )


def fail(error: KdexportError) -> NoReturn:
    """Print an error and exit with its code; ``--json`` adds one object on stdout, ``--debug`` the traceback."""
    if "--debug" in sys.argv:
        traceback.print_exception(error, file=sys.stderr)
    if "--json" in sys.argv:
        described = {"code": error.code, "message": error.message, "remedy": error.remedy}
        sys.stdout.write(json.dumps({"ok": False, "exit_code": error.exit_code, "error": described}) + "\n")
    sys.stderr.write(f"error {error.code}: {error.message}\n{error.remedy}\n")
    sys.exit(error.exit_code)
