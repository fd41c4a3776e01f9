"""An audit hook that sees files written outside of a folder and programs that are started."""

import os
import sys
from pathlib import Path
from typing import Any

_CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod")
_STARTS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "socket.connect")


class Watch:
    """Collects what is written outside of ``inside``, and what is started, while ``active``."""

    def __init__(self, inside: Path) -> None:
        self.inside = inside
        self.active = False
        self.found: list[str] = []
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.active:
            return
        if event in _STARTS:
            self.found.append(f"{event} {str(arguments)[:200]}")
        elif event == "open":
            path, mode, flags = arguments
            writes = (isinstance(mode, str) and set(mode) & set("wax+")) or (
                isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            )
            if writes:
                self._note(event, path)
        elif event in _CHANGES:
            self._note(event, arguments[0])

    def _note(self, event: str, path: Any) -> None:
        if isinstance(path, int):
            return
        # Not resolved: a link to the outside is made by nothing here.
        place = os.path.abspath(os.fsdecode(path))  # noqa: PTH100
        if not place.startswith((f"{self.inside}{os.sep}", "/dev/", "/proc/self/")):
            self.found.append(f"{event} {place}")
