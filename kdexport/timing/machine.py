"""The machine that measures: its description, and whether it has enough processors."""

import platform
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from kdexport.backends.nvidia import gpu_fingerprint
from kdexport.core.digests import tool_versions
from kdexport.core.processors import usable_cpus
from kdexport.errors import RunnerError


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """The properties of a machine on which latencies depend."""

    cpu: str
    cores: int
    system: str
    onnxruntime: str
    gpu: str = ""


def utc_now() -> str:
    """The time of a measurement, in UTC to the second: 2026-11-29T20:15:00Z."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def this_machine() -> Machine:
    """The description of the machine that runs this process."""
    versions = tool_versions("onnxruntime-gpu", "onnxruntime")
    return Machine(
        cpu=_cpu_model(),
        cores=len(usable_cpus()),
        system=f"{platform.system()} {platform.machine()}",
        onnxruntime=next((version for version in versions.values() if version != "absent"), "absent"),
        gpu="; ".join(gpu_fingerprint()),
    )


def require_cores(threads: int) -> None:
    """Raise ``RunnerError`` if the threads of a session would share processors."""
    cores = len(usable_cpus())
    if threads > cores:
        raise RunnerError(
            f"Timing with {threads} threads needs {threads} processors; this process may use {cores}.",
            remedy=f"Pass --threads {cores} or fewer, or use a larger machine.",
        )


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "Model", "CPU part"))]
    return named[0] if named else platform.processor() or "unknown"
