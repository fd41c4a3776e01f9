"""The processors that this process may run on, whether or not the system can restrict a process to some of them."""

import os
from collections.abc import Sequence


def usable_cpus() -> tuple[int, ...]:
    """The processors on which this process may run; all, if the system has no affinity masks, as on macOS."""
    if not can_pin():
        return tuple(range(os.cpu_count() or 1))
    return tuple(sorted(os.sched_getaffinity(0)))


def can_pin() -> bool:
    """Whether the system can restrict a process to some processors."""
    return hasattr(os, "sched_getaffinity")


def pin_process(cpus: Sequence[int]) -> None:
    """Restrict this process to ``cpus``; an empty sequence changes nothing."""
    if cpus:
        os.sched_setaffinity(0, cpus)
