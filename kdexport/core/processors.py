"""The processors that this process may run on, whether or not the system can restrict a process to some of them."""

import functools
import hashlib
import os
import platform
from collections.abc import Sequence
from pathlib import Path


def usable_cpus() -> tuple[int, ...]:
    """The processors on which this process may run; all, if the system has no affinity masks, as on macOS."""
    if not can_pin():
        return tuple(range(os.cpu_count() or 1))
    return tuple(sorted(os.sched_getaffinity(0)))


@functools.cache
def processor_model(path: Path = Path("/proc/cpuinfo")) -> str:
    """The model of the processor and a digest of its instruction sets: libraries choose their kernels by both."""
    try:
        lines = [line.partition(":") for line in path.read_text().splitlines()]
    except OSError:
        return f"{platform.machine()} {platform.processor()}".strip()
    # The first processor; all of a machine are taken to be equal.
    fields = {key.strip(): value.strip() for key, _, value in reversed(lines)}
    features = fields.get("flags", fields.get("Features", ""))
    digest = hashlib.sha256(" ".join(sorted(features.split())).encode()).hexdigest()[:12]
    return f"{platform.machine()} {fields.get('model name', fields.get('CPU part', 'unknown'))}, features {digest}"


def can_pin() -> bool:
    """Whether the system can restrict a process to some processors."""
    return hasattr(os, "sched_getaffinity")


def pin_process(cpus: Sequence[int]) -> None:
    """Restrict this process to ``cpus``; an empty sequence changes nothing."""
    if cpus:
        os.sched_setaffinity(0, cpus)
