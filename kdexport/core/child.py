"""Child processes that end with their parent."""

import ctypes
import os
import signal
import sys

#: Set for our own child processes: they describe an error on stdout, and the parent says it.
CHILD = "KDEXPORT_PARENT_PID"

#: Set by torch's launcher for the processes that it starts, each in a session of its own.
_LAUNCHED = "TORCHELASTIC_RUN_ID"


def die_with_parent() -> None:
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
