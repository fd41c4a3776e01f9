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

from kdexport.backends.ort import CUDA, load_model
from kdexport.backends.trt_build import MODULES
from kdexport.errors import BackendUnavailableError, EngineBuildError
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
        open_ = _open_engine if parse_target(target).needs_engine else _open_onnx
        launch, output = open_(torch, stream, path, target, given)
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


_Opened = tuple[Callable[[], object], Any]


def _open_onnx(torch: Any, stream: Any, path: Path, _target: str, given: Any) -> _Opened:
    options = {"enable_cuda_graph": "1", "user_compute_stream": str(stream.cuda_stream)}
    model = load_model(path, provider=CUDA, provider_options=options)
    elsewhere = {name: count for name, count in model.nodes_by_provider.items() if name != CUDA}
    if elsewhere:
        counted = ", ".join(f"{count} nodes on {name}" for name, count in elsewhere.items())
        raise BackendUnavailableError(
            f"{path} does not run on the GPU alone: {counted}.", remedy="Pass --clock host, or another --target."
        )
    (source,), (result,) = model.session.get_inputs(), model.session.get_outputs()
    output = torch.empty((len(given), int(result.shape[-1])), dtype=torch.float32, device="cuda")
    binding = model.session.io_binding()
    binding.bind_input(source.name, "cuda", 0, np.float32, tuple(given.shape), given.data_ptr())
    binding.bind_output(result.name, "cuda", 0, np.float32, tuple(output.shape), output.data_ptr())
    # ``given`` is read at each replay: the closure keeps it.
    return lambda _alive=given: model.session.run_with_iobinding(binding), output


def _open_engine(torch: Any, stream: Any, path: Path, target: str, given: Any) -> _Opened:
    trt: Any = importlib.import_module(MODULES[parse_target(target).backend])
    runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
    engine = runtime.deserialize_cuda_engine(path.read_bytes())
    context = None if engine is None else engine.create_execution_context()
    if context is None:
        raise EngineBuildError(
            f"TensorRT {trt.__version__} does not open {path}.",
            remedy="An engine runs only on the GPU generation and TensorRT version that it was built for.",
        )
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    (source,) = (name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT)
    (result,) = (name for name in names if name != source)
    accepted = context.set_input_shape(source, tuple(given.shape))
    output = torch.empty(tuple(context.get_tensor_shape(result)), dtype=torch.float32, device="cuda")
    context.set_tensor_address(source, given.data_ptr())
    context.set_tensor_address(result, output.data_ptr())
    # The first run of a shape sets resources up and cannot be captured.
    if not accepted or not context.execute_async_v3(stream.cuda_stream):
        raise EngineBuildError(
            f"{path} does not run a batch of {len(given)}.", remedy="Use a batch size that the engine was built for."
        )
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        context.execute_async_v3(stream.cuda_stream)

    def launch(_alive: tuple[Any, ...] = (runtime, engine, context, given)) -> None:
        # ``replay`` takes the current stream.
        with torch.cuda.stream(stream):
            graph.replay()

    return launch, output


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
