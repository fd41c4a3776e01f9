"""What a GPU does beside the measurement, as NVML tells it after each block: clock, throttling, heat, processes."""

import contextlib
import importlib
from typing import Any

from kdexport.gate.measure import Reading

#: Reasons for which the driver holds the clock back, as NVML names them; idling and settings are none of them.
REASONS = (
    "SwPowerCap",
    "HwSlowdown",
    "SwThermalSlowdown",
    "HwThermalSlowdown",
    "HwPowerBrakeSlowdown",
)


class NvmlGuard:
    """Reads the state of one device, and remembers the range of what it read."""

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml, self._handle = nvml, handle
        self._bits = {name: int(getattr(nvml, f"nvmlClocksThrottleReason{name}")) for name in REASONS}
        self._readings: list[Reading] = []
        self._reasons: set[str] = set()

    def __call__(self) -> Reading:
        """The state now."""
        nvml, handle = self._nvml, self._handle
        mask = int(nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle))
        held = {name for name, bit in self._bits.items() if mask & bit}
        self._reasons |= held
        reading = Reading(
            sm_mhz=float(nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)),
            throttled=bool(held),
            celsius=float(nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)),
            # A count, because inside of a container NVML knows processes by the numbers that they have outside.
            processes=len(nvml.nvmlDeviceGetComputeRunningProcesses(handle)),
        )
        self._readings.append(reading)
        return reading

    def facts(self) -> dict[str, Any]:
        """Ranges over all blocks: SM clock in MHz, heat in degrees Celsius, processes with this one."""
        found: dict[str, Any] = {"throttled": sorted(self._reasons), "blocks": len(self._readings)}
        for name in ("sm_mhz", "celsius", "processes"):
            values = [getattr(reading, name) for reading in self._readings]
            found[name] = [min(values), max(values)] if values else None
        return found


def open_nvml(uuid: str) -> NvmlGuard | None:
    """A guard of the device ``uuid``; None where NVML or its Python module is absent or does not know the device."""
    try:
        nvml: Any = importlib.import_module("pynvml")
    except ImportError:
        return None
    with contextlib.suppress(nvml.NVMLError):
        nvml.nvmlInit()
        guard = NvmlGuard(nvml, nvml.nvmlDeviceGetHandleByUUID(uuid))
        # A virtual device may know its name and refuse the rest: better no guard than one that fails in the middle.
        guard()
        return guard
    return None
