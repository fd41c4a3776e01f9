"""NVIDIA's driver and GPUs: from files of the driver, or from NVML where there are none (WSL 2, some sandboxes)."""

import contextlib
import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

_DRIVER = Path("/proc/driver/nvidia")


def gpu_fingerprint() -> list[str]:
    """Driver version and models of the GPUs; empty without a GPU.

    Without files of the driver, NVML is asked: that needs the package nvidia-ml-py, of the extra gpu.
    """
    if (_DRIVER / "version").is_file():
        lines = [(_DRIVER / "version").read_text().splitlines()[0]]
        for info in sorted(_DRIVER.glob("gpus/*/information")):
            lines += [line for line in info.read_text().splitlines() if line.startswith("Model:")]
        return lines
    with _nvml() as nvml:
        if nvml is None:
            return []
        models = [f"Model: {_text(name)}" for name in _of_each(nvml, nvml.nvmlDeviceGetName)]
        return [f"NVML driver {_text(nvml.nvmlSystemGetDriverVersion())}", *models] if models else []


def compute_capabilities() -> list[tuple[int, int]]:
    """The compute capability (major, minor) of each GPU; empty if NVML does not tell it."""
    with _nvml() as nvml:
        if nvml is None:
            return []
        found = _of_each(nvml, nvml.nvmlDeviceGetCudaComputeCapability)
        return [(int(major), int(minor)) for major, minor in found]


@contextlib.contextmanager
def _nvml() -> Iterator[Any]:
    """NVML's module, initialised; None if it is not installed or finds no driver."""
    try:
        nvml: Any = importlib.import_module("pynvml")
        nvml.nvmlInit()
    # pynvml raises a class of its own without a driver, and OSError for a damaged library.
    except Exception:  # noqa: BLE001
        yield None
        return
    try:
        yield nvml
    finally:
        nvml.nvmlShutdown()


def _of_each(nvml: Any, ask: Callable[[Any], Any]) -> list[Any]:
    return [ask(nvml.nvmlDeviceGetHandleByIndex(index)) for index in range(nvml.nvmlDeviceGetCount())]


def _text(value: Any) -> str:
    """Older versions of the package return bytes."""
    return value.decode() if isinstance(value, bytes) else str(value)
