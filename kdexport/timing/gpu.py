"""The clock ``gpu``: CUDA events around replays of a captured graph, and the state of the GPU after each block.

All buffers stay on the device. NVML reports clock, throttling, temperature and processes, so that pairs measured under
different conditions can be dropped. This clock has not run on a GPU yet: its calls are tested against a recorded API of
torch, onnxruntime, TensorRT and NVML.
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

#: Clock cycles for which the GPU is kept busy before each timed replay, about 0.1 ms at 2 GHz. The start event then
#: waits on the device until the replay is queued behind it; otherwise the launch time would be measured too.
_BUSY_CYCLES = 200_000

#: onnxruntime captures the graph during its first runs, and TensorRT needs one run before the capture.
_RUNS_BEFORE_REPLAY = 3

#: Reasons for a reduced clock that count as throttling, by their NVML names; idling and settings do not.
THROTTLE_REASONS = (
    "SwPowerCap",
    "HwSlowdown",
    "SwThermalSlowdown",
    "HwThermalSlowdown",
    "HwPowerBrakeSlowdown",
)


@dataclass(frozen=True, slots=True, eq=False)
class Replay:
    """One arm: ``launch`` queues a replay on ``stream``; calling the object also waits for its end."""

    launch: Callable[[], object]
    stream: Any
    output: Any

    def __call__(self) -> None:
        self.launch()
        self.stream.synchronize()

    def logits(self) -> NDArray[np.float32]:
        """Logits (n,K) of the last replay."""
        self.stream.synchronize()
        return np.asarray(self.output.cpu().numpy())


def open_on_gpu(path: Path, target: str, images: NDArray[np.float32]) -> Replay:
    """Capture ``target`` for one batch (n,3,S,S) float32 on the current device.

    Raises ``BackendUnavailableError`` if a node would not run on the GPU, and ``EngineBuildError`` for an engine that
    cannot be loaded or run here.
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
            f"{path} computes logits that are not finite on the GPU.",
            remedy="Run `kdexport verify BUNDLE` for details.",
        )
    return replay


def event_block(run: Run, runs: int) -> NDArray[np.float64]:
    """(runs,) seconds of replays, by the clock of the device."""
    if not isinstance(run, Replay):
        raise TypeError(f"CUDA events can time a Replay only; got {type(run).__name__}.")
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
    """Name, UUID in the spelling of NVML, and compute capability of the device."""
    properties = importlib.import_module("torch").cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "uuid": f"GPU-{properties.uuid}",
        "capability": f"{properties.major}.{properties.minor}",
    }


class NvmlGuard:
    """Reads the state of one device and records the range of its readings."""

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml, self._handle = nvml, handle
        self._bits = {name: int(getattr(nvml, f"nvmlClocksThrottleReason{name}")) for name in THROTTLE_REASONS}
        self._readings: list[Reading] = []
        self._reasons: set[str] = set()

    def __call__(self) -> Reading:
        """The current state."""
        nvml, handle = self._nvml, self._handle
        mask = int(nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle))
        active = {name for name, bit in self._bits.items() if mask & bit}
        self._reasons |= active
        reading = Reading(
            sm_mhz=float(nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)),
            throttled=bool(active),
            celsius=float(nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)),
            # A count, because inside a container NVML reports process ids of the host.
            processes=len(nvml.nvmlDeviceGetComputeRunningProcesses(handle)),
        )
        self._readings.append(reading)
        return reading

    def facts(self) -> dict[str, Any]:
        """Ranges over all blocks: SM clock in MHz, temperature in Celsius, number of processes including this one."""
        found: dict[str, Any] = {"throttled": sorted(self._reasons), "blocks": len(self._readings)}
        for name in ("sm_mhz", "celsius", "processes"):
            values = [getattr(reading, name) for reading in self._readings]
            found[name] = [min(values), max(values)] if values else None
        return found


def open_nvml(uuid: str) -> NvmlGuard | None:
    """A guard for the device ``uuid``; None if NVML or its Python module is missing or cannot read the device."""
    try:
        nvml: Any = importlib.import_module("pynvml")
    except ImportError:
        return None
    with contextlib.suppress(nvml.NVMLError):
        nvml.nvmlInit()
        guard = NvmlGuard(nvml, nvml.nvmlDeviceGetHandleByUUID(uuid))
        # A virtual device may be found by its UUID and still refuse every reading, so one is made before timing starts.
        guard()
        return guard
    return None
