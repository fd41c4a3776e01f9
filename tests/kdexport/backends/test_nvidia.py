"""What is known of the GPUs: from files of the driver, else from NVML, else nothing."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kdexport.backends import backend, nvidia
from kdexport.errors import BackendUnavailableError


def nvml(*gpus: tuple[object, tuple[int, int]], fails: bool = False) -> Any:
    """NVML's module with these names and compute capabilities."""
    state = SimpleNamespace(open=0)

    def init() -> None:
        if fails:
            raise RuntimeError("no driver")
        state.open += 1

    def shutdown() -> None:
        state.open -= 1

    return SimpleNamespace(
        state=state, nvmlInit=init, nvmlShutdown=shutdown, nvmlSystemGetDriverVersion=lambda: "580.65",
        nvmlDeviceGetCount=lambda: len(gpus), nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetName=lambda index: gpus[index][0],
        nvmlDeviceGetCudaComputeCapability=lambda index: gpus[index][1],
    )  # fmt: skip


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(nvidia, "_DRIVER", tmp_path / "nvidia")
    return tmp_path / "nvidia"


def test_files_of_the_driver_come_first(driver: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", nvml(("L4", (8, 9))))
    for index in ("1", "0"):
        (driver / "gpus" / index).mkdir(parents=True)
        (driver / "gpus" / index / "information").write_text(f"Model: \t GPU {index}\nIRQ: 3\n")
    (driver / "version").write_text("NVRM version: 580.65\nGCC: 13\n")
    assert nvidia.gpu_fingerprint() == ["NVRM version: 580.65", "Model: \t GPU 0", "Model: \t GPU 1"]


@pytest.mark.parametrize("name", ["NVIDIA L4", b"NVIDIA L4"])
def test_without_files_nvml_is_asked_and_closed(driver: Path, name: object, monkeypatch: pytest.MonkeyPatch) -> None:
    module = nvml((name, (8, 9)), ("H100", (9, 0)))
    monkeypatch.setitem(sys.modules, "pynvml", module)
    assert nvidia.gpu_fingerprint() == ["NVML driver 580.65", "Model: NVIDIA L4", "Model: H100"]
    assert nvidia.compute_capabilities() == [(8, 9), (9, 0)]
    assert module.state.open == 0


@pytest.mark.parametrize("module", [None, nvml(fails=True), nvml()])
def test_a_machine_without_a_gpu_has_none(driver: Path, module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", module)
    assert nvidia.gpu_fingerprint() == []
    assert nvidia.compute_capabilities() == []


@pytest.mark.parametrize(
    ("capabilities", "runs"),
    [
        ([(8, 9)], True), ([(7, 5)], True), ([(12, 0)], True), ([(12, 1)], True), ([(9, 0), (8, 6)], True), ([], True),
        ([(9, 0)], False), ([(10, 0)], False), ([(10, 3), (9, 0)], False), ([(7, 0)], False), ([(8, 7)], False),
    ],
)  # fmt: skip
def test_an_engine_of_tensorrt_rtx_is_not_run_on_a_gpu_that_it_has_no_kernels_for(
    capabilities: list[tuple[int, int]], runs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorrt_rtx")
    monkeypatch.setattr(nvidia, "gpu_fingerprint", lambda: ["NVRM 580", "Model: X"])
    monkeypatch.setattr(nvidia, "compute_capabilities", lambda: capabilities)
    missing = backend("trt-rtx").not_executable("fp16")
    assert (missing is None) == runs
    if missing is not None:
        assert missing.reason.endswith(", ".join(f"{major}.{minor}" for major, minor in capabilities))


@pytest.mark.parametrize(
    ("built_for", "here", "opens"),
    [
        (["SM89"], [(8, 9)], True), (["SM89", "SM120"], [(12, 0)], True), ([], [(8, 6)], True), (["SM89"], [], True),
        (["CURRENT"], [(8, 6)], True), (["SM89"], [(8, 6)], False), (["SM120"], [(12, 1)], False),
    ],
)  # fmt: skip
def test_an_engine_of_other_gpus_is_not_opened(
    built_for: list[str], here: list[tuple[int, int]], opens: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nvidia, "compute_capabilities", lambda: here)
    (tmp_path / "layers.json").write_text(json.dumps({"compute_capabilities": built_for}))
    if opens:
        backend("trt-rtx").open(tmp_path / "model.plan", "fp16")
        return
    with pytest.raises(BackendUnavailableError, match="was built for GPUs of compute capability") as refused:
        backend("trt-rtx").open(tmp_path / "model.plan", "fp16")
    assert "compute_capabilities" in refused.value.remedy
