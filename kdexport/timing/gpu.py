"""The clock ``gpu``: CUDA events around a captured graph that is replayed on buffers which stay on the device.

It has not run on a GPU yet; its calls are tested against a recorded surface of torch, onnxruntime and TensorRT.

What a GPU does beside the measurement, as NVML tells it after each block: clock, throttling, heat, processes.
"""

import contextlib
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdexport.errors import EngineBuildError
from kdexport.targets import parse_target
from kdexport.timing.measure import Reading, Run

#: Before each timed replay the GPU is kept busy this long, so that the start event waits on the device until the replay
#: is queued behind it; otherwise the time of launching would be measured too. About 0.1 ms at 2 GHz.
_BUSY_CYCLES = 200_000

#: onnxruntime captures after its first runs, TensorRT wants one before the capture.
_RUNS_BEFORE_REPLAY = 3


@dataclass(frozen=True, slots=True, eq=False)
class Replay:
    """One arm: ``launch`` queues a replay on ``stream``; called, it also waits for it."""

    launch: Callable[[], object]
    stream: Any
    output: Any

    def __call__(self) -> None:
        self.launch()
        self.stream.synchronize()

    def logits(self) -> NDArray[np.float32]:
        """What the last replay left in the output buffer, (n,K)."""
        self.stream.synchronize()
        return np.asarray(self.output.cpu().numpy())


def open_on_gpu(path: Path, target: str, images: NDArray[np.float32]) -> Replay:
    """Capture ``target`` for one batch (n,3,S,S) float32 on the current device.

    Raises ``BackendUnavailableError`` where a node would run elsewhere, and ``EngineBuildError`` for an engine that
    does not open here.
    """
    torch: Any = importlib.import_module("torch")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        given = torch.from_numpy(images).cuda()
        wanted = parse_target(target)
        launch, output = wanted.runtime.capture(path, wanted.precision, given, stream)
        replay = Replay(launch, stream, output)
        for _ in range(_RUNS_BEFORE_REPLAY):
            replay()
    if not bool(torch.isfinite(output).all()):
        raise EngineBuildError(
            f"{path} gives logits that are not finite on the GPU.", remedy="`kdexport verify` on its bundle says more."
        )
    return replay


def event_block(run: Run, runs: int) -> NDArray[np.float64]:
    """Seconds on the device of each of ``runs`` replays."""
    if not isinstance(run, Replay):
        raise TypeError("only replays have events")
    cuda: Any = importlib.import_module("torch").cuda
    events = [(cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)) for _ in range(runs)]
    with cuda.stream(run.stream):
        for start, end in events:
            cuda._sleep(_BUSY_CYCLES)
            start.record(run.stream)
            run.launch()
            end.record(run.stream)
    run.stream.synchronize()
    return np.asarray([start.elapsed_time(end) for start, end in events], np.float64) / 1e3


def device_facts() -> dict[str, Any]:
    """The device that runs: name, UUID as NVML spells it, compute capability."""
    properties = importlib.import_module("torch").cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "uuid": f"GPU-{properties.uuid}",
        "capability": f"{properties.major}.{properties.minor}",
    }


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
