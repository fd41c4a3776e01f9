"""The CPU share of other processes during a run: beside a busy compiler no server can be measured."""

import os
import resource
import time
from pathlib import Path

from serving_bench.process import Server

_TICK = os.sysconf("SC_CLK_TCK")


class ForeignLoad:
    """CPU time of all processes except this benchmark and its children, since the object was made."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._start = (time.monotonic(), _busy(), self._own())

    def _own(self) -> float:
        children, me = resource.getrusage(resource.RUSAGE_CHILDREN), resource.getrusage(resource.RUSAGE_SELF)
        used = children.ru_utime + children.ru_stime + me.ru_utime + me.ru_stime
        return used + self._server.cpu_seconds()

    def share(self) -> float:
        """CPU seconds per second: 0 on an idle machine, 1 if other processes kept one core busy."""
        started, busy, own = self._start
        return max(0.0, (_busy() - busy - (self._own() - own)) / (time.monotonic() - started))


def _busy() -> float:
    """CPU seconds of all cores since boot, without idle time and time waiting for disks."""
    fields = [int(value) for value in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    return (sum(fields) - fields[3] - fields[4]) / _TICK
