"""Engines that the TensorRT provider of onnxruntime keeps on disk: a folder for everything that an engine depends on.

The provider names an engine by the structure of its graph and the GPU, without the weights, and opens whatever has
that name. Here the folder's name is the digest of what changes an engine, and only files are left in it that are as a
start left them at whose end the server's images gave the right answers.
"""

import contextlib
import ctypes
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kdexport.backends import nvidia
from kdexport.backends.cuda_libraries import preload_libraries
from kdexport.backends.epcontext import provider_tensorrt_major
from kdexport.backends.ort import TENSORRT, import_onnxruntime
from kdexport.core.digests import digest, sha256_bytes, sha256_file
from kdexport.core.files import exclusive, write_text
from kdexport.errors import StorageError

#: In the folder of an engine: what it was made for, and the digests of its files; written last.
_MADE = "made.json"


def tensorrt_version() -> str:
    """The version of the TensorRT library that the provider loads, such as 10.13.3; empty if there is none."""
    major = provider_tensorrt_major()
    preload_libraries(TENSORRT, import_onnxruntime())
    try:
        number = int(ctypes.CDLL(f"libnvinfer.so.{major}").getInferLibVersion())
    except (OSError, AttributeError):
        return ""
    # Since TensorRT 10: major, minor and patch of two digits each.
    return f"{number // 10000}.{number // 100 % 100}.{number % 100}"


def engine_facts(graph: bytes, precision: str, profile: Mapping[str, str]) -> dict[str, Any]:
    """What changes the engine of a file: its bytes, precision, shapes, the libraries, the GPU and its driver."""
    return {
        "file_sha256": sha256_bytes(graph),
        "precision": precision,
        "tf32": False,
        "shapes": dict(profile),
        "onnxruntime": str(import_onnxruntime().__version__),
        "tensorrt": tensorrt_version(),
        "gpu": nvidia.gpu_fingerprint(),
        "compute_capabilities": [list(found) for found in nvidia.compute_capabilities()],
    }


@contextlib.contextmanager
def kept_engine(root: Path, facts: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    """Options of the provider that keep the engine for ``facts`` below ``root``; for the time of one start.

    Files that are not as an earlier block left them are removed first, and all of them if the block raises: the next
    start then builds the engine again. Other processes wait at the same folder. Raises ``StorageError``.
    """
    folder = root / digest(dict(facts))[:32]
    with _storing(root):
        folder.mkdir(parents=True, exist_ok=True)
        # A folder that cannot be written is found before an engine is built.
        (folder / _MADE).touch()
    with exclusive(folder):
        with _storing(root):
            if _recorded(folder) != _files(folder):
                _clear(folder)
        try:
            yield {
                # The provider takes True and False only, and refuses 1 and 0.
                "trt_engine_cache_enable": "True",
                "trt_engine_cache_path": str(folder),
                "trt_timing_cache_enable": "True",
                "trt_timing_cache_path": str(folder),
            }
        except BaseException:
            _clear(folder)
            raise
        with _storing(root):
            write_text(folder / _MADE, json.dumps({"for": dict(facts), "files": _files(folder)}, indent=1) + "\n")


@contextlib.contextmanager
def _storing(root: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"Engines cannot be kept in {root}: {error.strerror or error}.",
            remedy="Pass another --engine-cache, or omit it to build the engine at each start.",
        ) from error


def _recorded(folder: Path) -> dict[str, str]:
    """The digests of the files that were left in ``folder``; empty if the last start did not end there."""
    try:
        return {str(name): str(value) for name, value in json.loads((folder / _MADE).read_text())["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _files(folder: Path) -> dict[str, str]:
    return {path.name: sha256_file(path) for path in sorted(folder.iterdir()) if path.name != _MADE}


def _clear(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
