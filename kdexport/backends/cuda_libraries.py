"""The libraries of CUDA, cuDNN and TensorRT that pip installs outside of the places where a program looks for them."""

import contextlib
import ctypes
import functools
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

#: Where packages of pip keep libraries, below a package's folder.
_NVIDIA, _TENSORRT = "nvidia", "tensorrt_libs"
#: The providers of onnxruntime that load libraries of NVIDIA, with the files that hold them.
PROVIDER_FILES = {
    "CUDAExecutionProvider": "libonnxruntime_providers_cuda.so",
    "TensorrtExecutionProvider": "libonnxruntime_providers_tensorrt.so",
}


def preload_libraries(provider: str, onnxruntime: Any) -> None:
    """Load what a session on ``provider`` needs from the packages of pip; libraries of the system come after them."""
    if provider not in PROVIDER_FILES:
        return
    # It prints the libraries that it does not find; ``missing_library`` names them where they matter.
    with contextlib.redirect_stdout(sys.stderr):
        onnxruntime.preload_dlls(msvc=False)
    if provider == "TensorrtExecutionProvider":
        _load_tensorrt()


@functools.cache
def _load_tensorrt() -> None:
    for folder in _folders(_TENSORRT):
        for path in sorted(folder.glob("libnvinfer.so*")) + sorted(folder.glob("libnv*.so*")):
            with contextlib.suppress(OSError):
                ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)


def missing_library(provider: str, onnxruntime: Any) -> str:
    """The first library that ``provider`` of onnxruntime lacks on this machine; empty if it lacks none."""
    folder = Path(onnxruntime.__file__).parent / "capi"
    file = folder / PROVIDER_FILES.get(provider, "")
    if not file.is_file():
        return ""
    preload_libraries(provider, onnxruntime)
    try:
        ctypes.CDLL(str(folder / "libonnxruntime_providers_shared.so"), mode=ctypes.RTLD_GLOBAL)
        ctypes.CDLL(str(file))
    except OSError as error:
        return str(error).partition(":")[0]
    return ""


def runtime_path(before: str | None = None) -> dict[str, str]:
    """``LD_LIBRARY_PATH`` with the folders in which pip installed the CUDA runtime; empty if there are none.

    ``before`` is its value so far, by default that of this process.
    """
    given = os.environ.get("LD_LIBRARY_PATH", "") if before is None else before
    found = [str(path) for path in _folders(_NVIDIA, "*/lib") if any(path.glob("libcudart.so*"))]
    return {"LD_LIBRARY_PATH": os.pathsep.join([*filter(None, [given]), *found])} if found else {}


def _folders(package: str, below: str = "") -> list[Path]:
    """The folders of an installed package, or those below them that fit a pattern."""
    try:
        found = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        return []
    places = [Path(place) for place in (found.submodule_search_locations or ())] if found is not None else []
    return [path for place in places for path in (sorted(place.glob(below)) if below else [place])]
