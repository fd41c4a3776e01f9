"""Signals that stop a command: Ctrl-C, and SIGTERM of a job scheduler, unwind it, so that temporary folders vanish."""

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

#: SIGHUP comes when a terminal closes; Windows has none.
SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))

#: A second signal within this time is a repetition: a terminal sends one to the whole group, and a parent another one.
_REPEATED_S = 1.0


class Stopped(BaseException):
    """A signal stopped this process; not an ``Exception``, so that nothing that handles errors catches it."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number

    @property
    def exit_code(self) -> int:
        """128 and the number of the signal, as a shell reports a process that the signal ended."""
        return 128 + self.number


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Raise ``Stopped`` in the block when a signal of ``SIGNALS`` comes; ignored signals stay ignored.

    Only the main thread can handle signals; in another one the block runs as it is.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    last = -_REPEATED_S

    def stop(number: int, _frame: FrameType | None) -> None:
        nonlocal last
        before, last = last, time.monotonic()
        if last - before >= _REPEATED_S:
            raise Stopped(number)

    former = {number: signal.getsignal(number) for number in SIGNALS}
    # nohup and background jobs ignore signals on purpose; None is a handler that Python did not set.
    handled = {number: handler for number, handler in former.items() if handler not in (signal.SIG_IGN, None)}
    for number in handled:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in handled.items():
            signal.signal(number, handler)
