"""Libraries of CUDA and TensorRT that pip installed are found, and a missing one is named."""

import ctypes
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kdexport.backends import cuda_libraries
from kdexport.backends.cuda_libraries import missing_library, preload_libraries, runtime_path
from kdexport.diagnose import environment

CUDA, TENSORRT = "CUDAExecutionProvider", "TensorrtExecutionProvider"


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of packages in which no library of NVIDIA is installed yet."""
    monkeypatch.setattr(sys, "path", [str(tmp_path), *(p for p in sys.path if "site-packages" not in p)])
    for name in [name for name in sys.modules if name.partition(".")[0] in ("nvidia", "tensorrt_libs")]:
        monkeypatch.delitem(sys.modules, name)
    cuda_libraries._load_tensorrt.cache_clear()
    return tmp_path


def test_folders_with_the_cuda_runtime_are_added_behind_those_of_the_user(packages: Path) -> None:
    assert runtime_path("/mine") == {}
    for name in ("cu13/lib/libcudart.so.13", "cuda_runtime/lib/libcudart.so.12", "cudnn/lib/libcudnn.so.9"):
        (packages / "nvidia" / name).parent.mkdir(parents=True)
        (packages / "nvidia" / name).touch()
    ours = [str(packages / "nvidia" / name / "lib") for name in ("cu13", "cuda_runtime")]
    assert runtime_path("/mine:/too") == {"LD_LIBRARY_PATH": os.pathsep.join(["/mine:/too", *ours])}
    assert runtime_path("") == {"LD_LIBRARY_PATH": os.pathsep.join(ours)}


def fake_onnxruntime(folder: Path, *files: str) -> Any:
    (folder / "capi").mkdir()
    for name in files:
        (folder / "capi" / name).touch()
    calls: list[dict[str, Any]] = []

    def preload_dlls(**options: Any) -> None:
        calls.append(options)
        sys.stdout.write("not found: libcufft\n")

    return SimpleNamespace(__file__=str(folder / "__init__.py"), preload_dlls=preload_dlls, calls=calls)


def test_the_first_library_that_a_provider_lacks_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    ort = fake_onnxruntime(tmp_path, "libonnxruntime_providers_cuda.so")
    opened: list[str] = []

    def load(path: str, mode: int = 0) -> object:
        opened.append(Path(path).name)
        if path.endswith("cuda.so"):
            raise OSError("libcurand.so.10: cannot open shared object file: No such file or directory")
        return object()

    monkeypatch.setattr(ctypes, "CDLL", load)
    assert missing_library(CUDA, ort) == "libcurand.so.10"
    assert opened == ["libonnxruntime_providers_shared.so", "libonnxruntime_providers_cuda.so"]
    assert ort.calls == [{"msvc": False}]
    assert missing_library(TENSORRT, ort) == ""
    assert missing_library("CPUExecutionProvider", ort) == ""
    # What the library prints is not a result of the command.
    assert capfd.readouterr().out == ""


def test_libraries_of_tensorrt_are_loaded_for_its_provider_only(
    packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (packages / "tensorrt_libs").mkdir()
    for name in ("libnvinfer.so.10", "libnvonnxparser.so.10", "readme.txt"):
        (packages / "tensorrt_libs" / name).touch()
    ort = fake_onnxruntime(tmp_path)
    loaded: list[str] = []
    monkeypatch.setattr(ctypes, "CDLL", lambda path, mode=0: loaded.append(Path(path).name))
    preload_libraries("CPUExecutionProvider", ort)
    preload_libraries(CUDA, ort)
    assert loaded == []
    preload_libraries(TENSORRT, ort)
    assert loaded[0] == "libnvinfer.so.10"
    assert "libnvonnxparser.so.10" in loaded
    assert "readme.txt" not in loaded


def test_doctor_names_the_library_on_a_machine_with_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "gpu_fingerprint", list)
    assert environment._providers() == []
    monkeypatch.setattr(environment, "gpu_fingerprint", lambda: ["NVRM 580", "Model: X"])
    monkeypatch.setattr(
        "kdexport.backends.ort.import_onnxruntime",
        lambda: SimpleNamespace(get_available_providers=lambda: [TENSORRT, CUDA, "CPUExecutionProvider"]),
    )
    monkeypatch.setattr(
        cuda_libraries, "missing_library", lambda name, _: "libnvinfer.so.10" if name == TENSORRT else ""
    )
    facts = {fact.what: fact for fact in environment._providers()}
    assert {name: fact.ok for name, fact in facts.items()} == {CUDA: True, TENSORRT: False}
    assert facts[TENSORRT].fact.startswith("libnvinfer.so.10 is missing. Run pip install 'kdexport[gpu]'")
