"""One line of JSON for each answered request, written by a thread of its own: no client waits for a slow disk."""

import contextlib
import json
import logging
import queue
import sys
import threading
from collections.abc import Callable, Mapping
from logging.handlers import WatchedFileHandler

from kdexport.errors import ConfigError

#: The value of ``--access-log`` that means standard output.
STDOUT = "-"
#: Lines that may wait for the disk; further ones are dropped and counted.
_WAITING = 10_000
#: How long the end of the server waits for a disk or pipe that takes no lines.
_CLOSING_SECONDS = 2.0


class AccessLog:
    """An open access log."""

    def __init__(self, destination: str, dropped: Callable[[], object] = lambda: None) -> None:
        """``destination`` is a file, to which lines are appended, or ``STDOUT``; ``dropped`` is called for each line
        that did not fit. A file that is renamed is created again, as log rotation needs it.

        Raises ``ConfigError`` if the file cannot be written.
        """
        self._target, self._dropped = _handler(destination), dropped
        self._waiting: queue.Queue[str | None] = queue.Queue(_WAITING)
        self._thread = threading.Thread(target=self._write_waiting, name="access-log", daemon=True)
        self._thread.start()

    def write(self, entry: Mapping[str, object]) -> None:
        """Write one line, soon; never blocks."""
        try:
            self._waiting.put_nowait(json.dumps(entry, separators=(",", ":")))
        except queue.Full:
            self._dropped()

    def close(self) -> None:
        """Write the lines that wait, as long as their destination takes them, and close it."""
        with contextlib.suppress(queue.Full):
            self._waiting.put(None, timeout=_CLOSING_SECONDS)
        self._thread.join(_CLOSING_SECONDS)
        if not self._thread.is_alive():
            self._target.close()

    def _write_waiting(self) -> None:
        while (line := self._waiting.get()) is not None:
            self._target.handle(logging.LogRecord("kdexport.access", logging.INFO, "", 0, line, None, None))


def _handler(destination: str) -> logging.Handler:
    if destination == STDOUT:
        return logging.StreamHandler(sys.stdout)
    try:
        return WatchedFileHandler(destination, encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"The access log {destination} cannot be written: {error.strerror}.",
            remedy=f"Pass a file in a folder that exists and is writable, or {STDOUT} for standard output.",
        ) from error


def require_separate(destination: str | None, *, as_json: bool) -> None:
    """Raise ``ConfigError`` if the access log would be mixed with the JSON object of ``--json``."""
    if destination == STDOUT and as_json:
        raise ConfigError(
            f"--json prints one object on standard output, and --access-log {STDOUT} prints there too.",
            remedy="Pass a file, for example --access-log access.jsonl.",
        )
