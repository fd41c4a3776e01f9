"""The machine that measures: what it is, whether it can hold the measurement, and what it was calibrated to see."""

import platform
from dataclasses import dataclass
from pathlib import Path

from kdexport.backends.nvidia import gpu_fingerprint
from kdexport.core.digests import tool_versions
from kdexport.errors import RunnerError
from kdexport.timing.session import usable_cpus


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """What latencies depend on besides the model."""

    cpu: str
    cores: int
    system: str
    onnxruntime: str
    gpu: str = ""


def this_machine() -> Machine:
    """The machine that runs this."""
    versions = tool_versions("onnxruntime-gpu", "onnxruntime")
    return Machine(
        cpu=_cpu_model(),
        cores=len(usable_cpus()),
        system=f"{platform.system()} {platform.machine()}",
        onnxruntime=next((version for version in versions.values() if version != "absent"), "absent"),
        gpu="; ".join(gpu_fingerprint()),
    )


def require_cores(threads: int) -> None:
    """Raise ``RunnerError`` where sessions of ``threads`` threads would share processors."""
    cores = len(usable_cpus())
    if threads > cores:
        raise RunnerError(
            f"{threads} threads were asked for, and this process may use {cores} processors.",
            remedy=f"Pass --threads {cores} or fewer, or use a larger machine.",
        )


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "Model", "CPU part"))]
    return named[0] if named else platform.processor() or "unknown"
