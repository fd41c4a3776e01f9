"""How much of the machine others used meanwhile: a run beside a compiler says nothing about a server."""

import os
import resource
import time
from pathlib import Path

from serving_bench.process import Server

_TICK = os.sysconf("SC_CLK_TCK")


class Neighbours:
    """CPU seconds a second that neither this benchmark nor its children used, since it was made."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._start = (time.monotonic(), _busy(), self._own())

    def _own(self) -> float:
        children, me = resource.getrusage(resource.RUSAGE_CHILDREN), resource.getrusage(resource.RUSAGE_SELF)
        used = children.ru_utime + children.ru_stime + me.ru_utime + me.ru_stime
        return used + self._server.cpu_seconds()

    def share(self) -> float:
        """0 on a machine of one's own, 1 for one core that others kept busy."""
        started, busy, own = self._start
        return max(0.0, (_busy() - busy - (self._own() - own)) / (time.monotonic() - started))


def _busy() -> float:
    """CPU seconds of all cores since boot, idle and waiting for disks left out."""
    fields = [int(value) for value in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    return (sum(fields) - fields[3] - fields[4]) / _TICK
