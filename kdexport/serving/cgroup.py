"""What this process may use: processors and memory as its control group and affinity allow, not as the host has."""

import math
import os
from pathlib import Path

#: Above this a v1 limit means "none": the kernel writes a number near 2^63.
_UNLIMITED = 2**60


def processors(root: Path = Path("/")) -> int:
    """Usable processors: the affinity mask, cut to the group's quota, at least 1."""
    usable = len(os.sched_getaffinity(0))
    quotas = [quota for folder in _folders(root, "cpu") if (quota := _quota(folder)) is not None]
    return max(1, min([usable, *(math.ceil(quota) for quota in quotas)]))


def memory(root: Path = Path("/")) -> int | None:
    """Bytes that the control group allows, None where there is no limit."""
    limits = []
    for folder in _folders(root, "memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            words = _words(folder / name)
            if words and words[0].isdigit() and int(words[0]) < _UNLIMITED:
                limits.append(int(words[0]))
    return min(limits) if limits else None


def _folders(root: Path, controller: str) -> list[Path]:
    """The group's own folder and its parents, version 2 and 1: each of them may set a limit."""
    found: list[Path] = []
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        _, names, path = [*line.split(":", 2), "", ""][:3]
        if names and controller not in names.split(","):
            continue
        base = root / "sys/fs/cgroup" / (controller if names else "")
        # Inside a container the path is often that of the host: then only the mount's own root exists.
        places = [base / path.strip("/"), *(base / path.strip("/")).parents]
        found += [place for place in places if place.is_relative_to(base)]
    return found


def _quota(folder: Path) -> float | None:
    words = _words(folder / "cpu.max")
    if len(words) == 2 and words[0].isdigit():
        return int(words[0]) / int(words[1])
    quota, period = _words(folder / "cpu.cfs_quota_us"), _words(folder / "cpu.cfs_period_us")
    if quota and period and int(quota[0]) > 0:
        return int(quota[0]) / int(period[0])
    return None


def _words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []
