"""The builder against the recorded surface of the real bindings of TensorRT 10 and 11, which need a GPU to run.

``surfaces/`` holds the public names and members of tensorrt-cu13-bindings as the wheels have them. A fake with
these names alone replaces the library: a name that the real library lacks is an error here too.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kdexport.backends.trt_build import EngineRequest, build

SURFACES = sorted((Path(__file__).parent / "surfaces").glob("tensorrt-*.json"))
#: What methods return, by class and method.
MAKES = {
    ("Builder", "create_network"): "INetworkDefinition",
    ("Builder", "create_builder_config"): "IBuilderConfig",
    ("Builder", "create_optimization_profile"): "IOptimizationProfile",
    ("INetworkDefinition", "get_input"): "ITensor",
    ("INetworkDefinition", "get_output"): "ITensor",
    ("IBuilderConfig", "create_timing_cache"): "ITimingCache",
    ("IBuilderConfig", "get_timing_cache"): "ITimingCache",
    ("Runtime", "deserialize_cuda_engine"): "ICudaEngine",
    ("ICudaEngine", "create_engine_inspector"): "EngineInspector",
    ("ICudaEngine", "create_execution_context"): "IExecutionContext",
}
METADATA = "[ONNX Layer: node_conv]\x1e[ONNX Layer: node_relu]"
INSPECTED = json.dumps({"Layers": [{"Name": "conv", "LayerType": "CaskConvolution", "Metadata": METADATA, "Inputs": [
    {"Name": "x", "Format/Datatype": "Channel major FP16 format"}], "Outputs": []}]})  # fmt: skip
VALUES = {
    ("Builder", "build_serialized_network"): b"plan",
    ("OnnxParser", "parse_from_file"): True,
    ("INetworkDefinition", "num_inputs"): 1,
    ("INetworkDefinition", "num_outputs"): 1,
    ("ITensor", "name"): "input",
    ("ITimingCache", "serialize"): b"times",
    ("ICudaEngine", "num_io_tensors"): 1,
    ("ICudaEngine", "get_tensor_name"): "input",
    ("ICudaEngine", "get_tensor_mode"): "TensorIOMode.INPUT",
    ("EngineInspector", "get_engine_information"): INSPECTED,
}
#: Members that are values, not methods.
PROPERTIES = {"num_inputs", "num_outputs", "name", "num_io_tensors", "num_errors"}


class RecordedLibrary:
    """A module with the names of a recorded one; ``calls`` lists the calls of its methods."""

    def __init__(self, surface: dict[str, Any]) -> None:
        self.surface = surface
        self.calls: list[tuple[str, str, tuple[Any, ...]]] = []

    def __getattr__(self, name: str) -> Any:
        if name == "__version__":
            return self.surface["version"]
        if name not in self.surface["names"]:
            raise AttributeError(f"TensorRT {self.surface['version']} has no {name}")
        if name == "ILogger":
            return type("ILogger", (), {"__init__": lambda self: None})
        return RecordedObject(self, name)


class RecordedObject:
    """A class of the library, or an object of it."""

    def __init__(self, library: RecordedLibrary, kind: str) -> None:
        self.__dict__.update(_library=library, _kind=kind, _kept={})

    def _require(self, name: str) -> None:
        members = self._library.surface["members"].get(self._kind)
        if members is not None and name not in members:
            raise AttributeError(f"{self._kind} of TensorRT {self._library.surface['version']} has no {name}")

    def __getattr__(self, name: str) -> Any:
        self._require(name)
        if name in self._kept:
            return self._kept[name]
        if name in PROPERTIES:
            return VALUES[(self._kind, name)]
        if self._kind in ("NetworkDefinitionCreationFlag",):
            return 1
        if self._kind[0] != "I" and name.isupper():
            return f"{self._kind}.{name}"

        def method(*arguments: Any) -> Any:
            self._library.calls.append((self._kind, name, arguments))
            if (self._kind, name) in MAKES:
                return RecordedObject(self._library, MAKES[(self._kind, name)])
            return VALUES.get((self._kind, name))

        return method

    def __setattr__(self, name: str, value: Any) -> None:
        self._require(name)
        self._kept[name] = value
        self._library.calls.append((self._kind, f"{name} =", (value,)))

    def __call__(self, *arguments: Any) -> "RecordedObject":
        return RecordedObject(self._library, self._kind)


@pytest.fixture(params=SURFACES, ids=lambda path: path.stem)
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> RecordedLibrary:
    found = RecordedLibrary(json.loads(request.param.read_text()))
    monkeypatch.setitem(sys.modules, "tensorrt", found)
    return found


def request_for(tmp_path: Path, **changes: Any) -> EngineRequest:
    base = EngineRequest(
        backend="trt",
        onnx=str(tmp_path / "a.onnx"),
        plan=str(tmp_path / "a.plan"),
        shape=(3, 32, 32),
        batches=(1, 8, 64),
        compute_capabilities=("SM89",),
        workspace_mb=256,
        timing_cache=str(tmp_path / "timing" / "shared.cache"),
    )
    return replace(base, **changes)


def calls_of(library: RecordedLibrary, kind: str, name: str) -> list[tuple[Any, ...]]:
    return [arguments for found, method, arguments in library.calls if (found, method) == (kind, name)]


def test_the_recorded_versions_differ_in_names_that_the_code_does_not_use() -> None:
    old, new = (json.loads(path.read_text()) for path in SURFACES)
    assert (old["version"].split(".")[0], new["version"].split(".")[0]) == ("10", "11")
    assert "FP16" in old["members"]["BuilderFlag"]
    assert "FP16" not in new["members"]["BuilderFlag"]
    assert "int8_calibrator" in old["members"]["IBuilderConfig"]
    assert "int8_calibrator" not in new["members"]["IBuilderConfig"]


def test_an_engine_is_built_with_what_both_versions_have(library: RecordedLibrary, tmp_path: Path) -> None:
    answer = build(request_for(tmp_path))
    assert answer["version"] == library.surface["version"]
    assert answer["layers"] == [
        {"name": "conv", "kind": "CaskConvolution", "datatypes": ("Half",), "nodes": ("node_conv", "node_relu")}
    ]
    assert (tmp_path / "a.plan").read_bytes() == b"plan"
    assert calls_of(library, "Builder", "create_network") == [(2,)]
    assert calls_of(library, "IBuilderConfig", "clear_flag") == [("BuilderFlag.TF32",)]
    assert calls_of(library, "IBuilderConfig", "set_flag") == []
    assert calls_of(library, "IBuilderConfig", "profiling_verbosity =") == [("ProfilingVerbosity.DETAILED",)]
    assert calls_of(library, "IBuilderConfig", "set_memory_pool_limit") == [("MemoryPoolType.WORKSPACE", 256 * 2**20)]
    shapes = calls_of(library, "IOptimizationProfile", "set_shape")
    assert shapes == [("input", (1, 3, 32, 32), (8, 3, 32, 32), (64, 3, 32, 32))]
    # The shape at which layers are listed; the compute capabilities of TensorRT-RTX are not set for TensorRT.
    assert calls_of(library, "IExecutionContext", "set_input_shape") == [("input", (8, 3, 32, 32))]


def test_tf32_is_on_only_if_requested(library: RecordedLibrary, tmp_path: Path) -> None:
    build(request_for(tmp_path, tf32=True, workspace_mb=0))
    assert calls_of(library, "IBuilderConfig", "set_flag") == [("BuilderFlag.TF32",)]
    assert calls_of(library, "IBuilderConfig", "clear_flag") == []
    assert calls_of(library, "IBuilderConfig", "set_memory_pool_limit") == []


def test_the_timing_cache_is_shared_and_keeps_the_times_of_other_builds(
    library: RecordedLibrary, tmp_path: Path
) -> None:
    build(request_for(tmp_path))
    cache = tmp_path / "timing" / "shared.cache"
    assert cache.read_bytes() == b"times"
    assert calls_of(library, "IBuilderConfig", "create_timing_cache") == [(b"",)]
    cache.write_bytes(b"of another build")
    build(request_for(tmp_path))
    # Read before the build, and read again when it is saved, because another build may have ended in between.
    assert calls_of(library, "IBuilderConfig", "create_timing_cache")[1:] == [(b"of another build",)] * 2
    assert len(calls_of(library, "ITimingCache", "combine")) == 1
    assert [path.suffix for path in sorted(cache.parent.iterdir())] == [".cache", ".lock"]


def test_the_fake_refuses_names_that_its_version_lacks(library: RecordedLibrary) -> None:
    config = RecordedObject(library, "IBuilderConfig")
    if library.surface["version"].startswith("11"):
        with pytest.raises(AttributeError, match="has no int8_calibrator"):
            _ = config.int8_calibrator
    with pytest.raises(AttributeError, match="has no num_compute_capabilities"):
        config.num_compute_capabilities = 1
