"""What a process of the server sets up for itself: its log and its event loop; and the memory that it takes."""

import asyncio
import contextlib
import importlib.util
import logging
import signal
import sys
from collections.abc import Callable
from pathlib import Path


def set_up(name: str = "") -> None:
    """Log warnings to stderr, each line after the time and ``name``, and ignore SIGHUP until the server handles it."""
    # SIGHUP asks for a reload; before that it must not end the process.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format=f"%(asctime)s {name}%(message)s")
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop's event loop if it is installed, else None for that of asyncio."""
    if importlib.util.find_spec("uvloop") is None:
        return None
    import uvloop

    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory


def resident_bytes() -> int:
    """The largest resident size of this process so far, in bytes."""
    # On Linux the system's own count includes that of the process which started this one, until it ran this program.
    with contextlib.suppress(OSError, IndexError):
        return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
    import resource

    # macOS counts bytes, others KiB.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
