"""The clock ``gpu`` without a GPU: a recorded surface of torch, onnxruntime, TensorRT and NVML on a made-up timeline.

Work that is queued on the stream starts when the work before it ends, or when it is queued if the stream is idle: that
is what decides whether the time of launching is measured too.
"""

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kdexport.backends.ort import CUDA, OrtModel
from kdexport.errors import BackendUnavailableError, ConfigError, EngineBuildError
from kdexport.timing import clocks
from kdexport.timing import gpu as cuda_module
from kdexport.timing import measure as measure_module
from kdexport.timing.gpu import NvmlGuard, open_nvml
from kdexport.timing.measure import Reading, must_drop
from kdexport.timing.session import Arm, Request, measure_session

LAUNCH_S, WAKE_S, HZ = 30e-6, 40e-6, 2e9


class Device:
    """A host clock, a stream that works behind it, and what was called."""

    def __init__(self) -> None:
        self.now, self.busy_until, self.calls = 0.0, 0.0, list[str]()
        self.current: Any = None
        self.captured: float | None = None
        self.capturing = False

    def queue(self, seconds: float, name: str) -> float:
        """Queue work; returns when it ends."""
        self.calls.append(name)
        self.now += LAUNCH_S
        if self.capturing:
            self.captured = seconds
            return self.now
        self.busy_until = max(self.busy_until, self.now) + seconds
        return self.busy_until

    def wait(self) -> None:
        self.now = max(self.now, self.busy_until)


class Tensor:
    def __init__(self, values: Any, address: int) -> None:
        self.values, self.address = np.asarray(values), address
        self.shape = self.values.shape

    def cuda(self) -> "Tensor":
        return self

    def cpu(self) -> "Tensor":
        return self

    def numpy(self) -> Any:
        return self.values

    def data_ptr(self) -> int:
        return self.address

    def __len__(self) -> int:
        return len(self.values)


class FakeTorch:
    """The part of torch that the clock uses."""

    float32 = "float32"

    def __init__(self, device: Device, *, available: bool = True) -> None:
        self.device = device
        self.cuda = SimpleNamespace(
            is_available=lambda: available, Stream=self._stream, stream=self._using, Event=self._event,
            _sleep=lambda cycles: device.queue(cycles / HZ, "sleep"), CUDAGraph=self._graph, graph=self._capture,
            get_device_properties=lambda index: SimpleNamespace(name="GPU", uuid="1-2", major=9, minor=0),
        )  # fmt: skip

    def from_numpy(self, values: Any) -> Tensor:
        return Tensor(values, 0x1000)

    def empty(self, shape: tuple[int, ...], dtype: str, device: str) -> Tensor:
        assert (dtype, device) == ("float32", "cuda")
        return Tensor(np.ones(shape), 0x2000)

    def isfinite(self, tensor: Tensor) -> Any:
        return np.isfinite(tensor.values)

    def _stream(self) -> Any:
        return SimpleNamespace(cuda_stream=0x77, synchronize=self.device.wait)

    @contextmanager
    def _using(self, stream: Any) -> Iterator[None]:
        before, self.device.current = self.device.current, stream
        yield
        self.device.current = before

    def _event(self, *, enable_timing: bool) -> Any:
        assert enable_timing
        event = SimpleNamespace(at=math.nan)

        def record(stream: Any) -> None:
            assert stream is self.device.current
            # An event costs nothing and stands in the queue like everything else.
            event.at = max(self.device.busy_until, self.device.now)

        event.record = record
        event.elapsed_time = lambda other: 1e3 * (other.at - event.at)
        return event

    def _graph(self) -> Any:
        def replay() -> None:
            assert self.device.current is not None
            assert self.device.captured is not None
            self.device.queue(self.device.captured, "replay")

        return SimpleNamespace(replay=replay)

    @contextmanager
    def _capture(self, graph: Any, *, stream: Any) -> Iterator[None]:
        assert stream is self.device.current
        self.device.capturing = True
        yield
        self.device.capturing = False


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    device = Device()
    monkeypatch.setitem(sys.modules, "torch", FakeTorch(device))
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setattr(measure_module, "time", SimpleNamespace(perf_counter=lambda: device.now))
    return device


@pytest.fixture
def onnx(device: Device, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """onnxruntime, whose files take as many microseconds as they are called; it waits for each replay unless told not
    to, and wakes up some time after the end.
    """
    seen: dict[str, Any] = {"nodes": {CUDA: 5}, "bound": []}

    def load(path: Path, *, provider: str, provider_options: dict[str, str]) -> OrtModel:
        seen.update(provider=provider, options=provider_options)

        def run_with_iobinding(binding: Any, options: Any = None) -> None:
            assert len(binding.bound) == 2
            device.queue(float(path.stem) / 1e6, f"run {path.stem}")
            key = "disable_synchronize_execution_providers"
            if options is None or options.get_run_config_entry(key) != "1":
                device.wait()
                device.now += WAKE_S

        binding = SimpleNamespace(bound=[])
        binding.bind_input = lambda *given: binding.bound.append(given)
        binding.bind_output = lambda *given: binding.bound.append(given)
        seen["bound"].append(binding.bound)
        session = SimpleNamespace(
            get_inputs=lambda: [SimpleNamespace(name="input")], io_binding=lambda: binding,
            get_outputs=lambda: [SimpleNamespace(name="logits", shape=["batch", 7])],
            run_with_iobinding=run_with_iobinding,
        )  # fmt: skip
        return OrtModel(session, seen["nodes"])

    monkeypatch.setattr("kdexport.backends.ort.load_model", load)
    return seen


def request(reference: str, candidate: str, target: str = "onnx-fp32", **changes: Any) -> Request:
    return Request(
        reference=Arm(path=reference, target=target), candidate=Arm(path=candidate, target=target, **changes),
        clock="gpu", image_size=16, batch=4, threads=1, cpus=(), pairs=20, seed=5, tails=True,
    )  # fmt: skip


def test_onnxruntime_captures_a_graph_on_our_stream_and_buffers(device: Device, onnx: dict[str, Any]) -> None:
    session = measure_session(request("100.onnx", "150.onnx"))
    # Launching takes a third of that again, and is no part of it.
    assert (session.reference_ms, session.candidate_ms) == pytest.approx((0.1, 0.15))
    assert math.exp(session.log_ratio) == pytest.approx(1.5)
    assert session.tails_ms == pytest.approx([0.15] * (20 * session.runs))
    assert onnx["provider"] == CUDA
    assert onnx["options"] == {"enable_cuda_graph": "1", "user_compute_stream": str(0x77)}
    for bound in onnx["bound"]:
        assert bound == [
            ("input", "cuda", 0, np.float32, (4, 3, 16, 16), 0x1000), ("logits", "cuda", 0, np.float32, (4, 7), 0x2000),
        ]  # fmt: skip
    assert session.gpu == {"name": "GPU", "uuid": "GPU-1-2", "capability": "9.0", "nvml": None}
    # The graph is captured before anything is timed.
    assert device.calls[:3] in (["run 100"] * 3, ["run 150"] * 3)
    assert "sleep" not in device.calls[:6]


def test_without_work_in_front_launching_would_be_timed(
    device: Device, onnx: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fake is worth something: it shows the fault that the work in front prevents."""
    monkeypatch.setattr(cuda_module, "_BUSY_CYCLES", 0)
    assert measure_session(request("10.onnx", "10.onnx")).candidate_ms == pytest.approx(0.01 + 1e3 * LAUNCH_S)


def test_nodes_that_would_run_elsewhere_end_the_session(device: Device, onnx: dict[str, Any]) -> None:
    onnx["nodes"] = {CUDA: 3, "CPUExecutionProvider": 2}
    with pytest.raises(BackendUnavailableError, match="2 nodes on CPUExecutionProvider"):
        measure_session(request("100.onnx", "100.onnx"))
    onnx["nodes"] = {CUDA: 5}
    with pytest.raises(ConfigError, match="slowdown"):
        measure_session(request("100.onnx", "100.onnx", slowdown=0.1))


class FakeTensorrt:
    """A module ``tensorrt`` with one engine per file: its text is how many microseconds it takes."""

    __version__ = "10.13"
    TensorIOMode = SimpleNamespace(INPUT="in", OUTPUT="out")

    def __init__(self, device: Device) -> None:
        self.device, self.addresses, self.max_batch = device, dict[str, int](), 4
        self.Logger = type("Logger", (), {"ERROR": 2, "__init__": lambda self, level: None})
        self.Runtime = lambda logger: SimpleNamespace(deserialize_cuda_engine=self._open)

    def _open(self, data: bytes) -> Any:
        if data == b"other GPU":
            return None
        shapes: dict[str, tuple[int, ...]] = {}

        def set_input_shape(name: str, shape: tuple[int, ...]) -> bool:
            shapes[name] = shape
            return shape[0] <= self.max_batch

        def execute(stream: int) -> bool:
            assert stream == 0x77
            assert set(self.addresses) == {"pixels", "answer"}
            self.device.queue(float(data) / 1e6, "enqueue")
            return True

        context = SimpleNamespace(
            set_input_shape=set_input_shape, get_tensor_shape=lambda name: (shapes["pixels"][0], 7),
            set_tensor_address=self.addresses.__setitem__, execute_async_v3=execute,
        )  # fmt: skip
        # The output comes first: order says nothing about direction.
        return SimpleNamespace(
            num_io_tensors=2, get_tensor_name=lambda index: ["answer", "pixels"][index],
            get_tensor_mode=lambda name: "in" if name == "pixels" else "out", create_execution_context=lambda: context,
        )  # fmt: skip


def test_an_engine_is_captured_once_and_replayed(
    device: Device, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tensorrt = FakeTensorrt(device)
    monkeypatch.setitem(sys.modules, "tensorrt", tensorrt)
    plan = tmp_path / "model.plan"
    plan.write_bytes(b"80")
    session = measure_session(request(str(plan), str(plan), "trt-fp16"))
    assert session.candidate_ms == pytest.approx(0.08)
    assert tensorrt.addresses == {"pixels": 0x1000, "answer": 0x2000}
    # Each arm enqueues once before its capture and once in it, never again.
    assert device.calls.count("enqueue") == 4
    assert device.calls[:5] == ["enqueue", "enqueue", "replay", "replay", "replay"]


@pytest.mark.parametrize(("data", "max_batch", "words"), [(b"other GPU", 4, "cannot open"), (b"80", 2, "a batch of 4")])
def test_an_engine_that_does_not_run_here_is_an_error(
    data: bytes, max_batch: int, words: str, device: Device, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tensorrt = FakeTensorrt(device)
    tensorrt.max_batch = max_batch
    monkeypatch.setitem(sys.modules, "tensorrt", tensorrt)
    (tmp_path / "model.plan").write_bytes(data)
    with pytest.raises(EngineBuildError, match=words):
        measure_session(request(str(tmp_path / "model.plan"), str(tmp_path / "model.plan"), "trt-fp16"))


#: From NVML's header.
BITS = {
    "SwPowerCap": 0x4, "HwSlowdown": 0x8, "SwThermalSlowdown": 0x20, "HwThermalSlowdown": 0x40,
    "HwPowerBrakeSlowdown": 0x80,
}  # fmt: skip


class FakeNvml:
    """The functions of NVML's Python module that are used, under their names in it."""

    class NVMLError(Exception):
        pass

    NVML_CLOCK_SM, NVML_TEMPERATURE_GPU = 1, 0

    def __init__(self, *, mask: int = 0, sm_mhz: int = 1980, processes: int = 1) -> None:
        self.mask, self.sm_mhz, self.processes, self.started = mask, sm_mhz, processes, False
        for name, bit in BITS.items():
            setattr(self, f"nvmlClocksThrottleReason{name}", bit)

    def nvmlInit(self) -> None:  # noqa: N802
        self.started = True

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802
        if uuid != "GPU-1-2" or not self.started:
            raise self.NVMLError
        return "handle"

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: str) -> int:  # noqa: N802
        return self.mask

    def nvmlDeviceGetClockInfo(self, handle: str, kind: int) -> int:  # noqa: N802
        assert (handle, kind) == ("handle", 1)
        return self.sm_mhz

    def nvmlDeviceGetTemperature(self, handle: str, sensor: int) -> int:  # noqa: N802
        return 61

    def nvmlDeviceGetComputeRunningProcesses(self, handle: str) -> list[object]:  # noqa: N802
        return [object()] * self.processes


@pytest.mark.parametrize(
    ("mask", "throttled"),
    # Idle, application clocks and a wish of the user are settings; the rest is power and heat.
    [(0, False), (0x1 | 0x2 | 0x10, False), (0x4, True), (0x8, True), (0x20, True), (0x40, True), (0x81, True)],
)
def test_power_and_heat_are_throttling(mask: int, throttled: bool) -> None:
    assert NvmlGuard(FakeNvml(mask=mask), "handle")() == Reading(1980, throttled, 61, 1)


def test_the_real_module_has_what_is_used() -> None:
    nvml = pytest.importorskip("pynvml")
    used = [name for name in (*vars(FakeNvml), *vars(FakeNvml())) if name.lower().startswith("nvml")]
    assert len(used) == 14
    for name in used:
        assert hasattr(nvml, name)
    for name, bit in BITS.items():
        assert getattr(nvml, f"nvmlClocksThrottleReason{name}") == bit
    assert open_nvml("GPU-none") is None


def test_a_process_that_comes_between_two_blocks_drops_the_pair() -> None:
    assert must_drop(Reading(1980, False, 60, 1), Reading(1980, False, 60, 2))
    assert not must_drop(Reading(1980, False, 60, 2), Reading(1980, False, 65, 2))


def test_without_nvml_or_the_device_in_it_there_is_no_guard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert open_nvml("GPU-1-2") is None
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml())
    assert open_nvml("GPU-3") is None
    assert open_nvml("GPU-1-2") is not None


def test_a_session_counts_its_throttled_pairs_and_records_the_reasons(
    device: Device, onnx: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(mask=0x4, processes=3))
    session = measure_session(request("100.onnx", "100.onnx"))
    assert (session.dropped, session.pairs_ms) == (20, ())
    assert session.gpu is not None
    assert session.gpu["nvml"] == {
        "throttled": ["SwPowerCap"], "blocks": 51, "sm_mhz": [1980, 1980], "celsius": [61, 61], "processes": [3, 3],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("onnx-fp32", None),
        ("onnx-int8", "no int8 convolution"),
        ("openvino-int8", "OpenVINO targets run on the CPU"),
        ("trt-fp16", "TensorRT is not installed"),
        ("trt-rtx-fp16", "compiles while it runs"),
    ],
)
def test_a_target_that_a_gpu_cannot_run_in_its_precision_is_refused(
    target: str, words: str | None, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    if words is None:
        clocks.require_timeable(target, "gpu")
        return
    with pytest.raises(BackendUnavailableError, match=words) as caught:
        clocks.require_timeable(target, "gpu")
    assert caught.value.exit_code == 4


def test_without_a_device_the_clock_is_refused(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", FakeTorch(device, available=False))
    with pytest.raises(BackendUnavailableError, match="no CUDA device") as caught:
        clocks.require_timeable("onnx-fp32", "gpu")
    assert caught.value.exit_code == 4
