"""Engines that are kept on disk: what changes one, and files that no good start left. No engine is built here."""

import ctypes
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kdexport.backends import engine_cache, nvidia
from kdexport.backends.engine_cache import engine_facts, kept_engine, tensorrt_version
from kdexport.backends.ort import TENSORRT, import_onnxruntime, tensorrt_profile
from kdexport.errors import StorageError

SHAPES = tensorrt_profile((3, 8, 8), (1, 4))
FACTS = {"file_sha256": "0" * 64, "precision": "fp32"}


def refusal(options: dict[str, str]) -> str:
    """What the installed onnxruntime says to options of its TensorRT provider, before it needs TensorRT."""
    from onnx import TensorProto, helper

    ort = import_onnxruntime()
    if TENSORRT not in ort.get_available_providers():
        pytest.skip("this onnxruntime has no TensorRT provider")
    shape: list[str | int | None] = ["batch", 3, 8, 8]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("input", "logits")]
    graph = helper.make_graph([helper.make_node("Relu", ["input"], ["logits"])], "g", ends[:1], ends[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    ort.set_default_logger_severity(4)
    # The class behind onnxruntime.InferenceSession, which would answer an error with another provider.
    from onnxruntime.capi import _pybind_state as binding

    session = binding.InferenceSession(binding.SessionOptions(), model.SerializeToString(), False, False)
    try:
        session.initialize_session([TENSORRT], [options], set())
    except RuntimeError as error:
        return str(error)
    finally:
        ort.set_default_logger_severity(3)
    return ""


def test_the_installed_onnxruntime_takes_every_option_by_name_and_value(tmp_path: Path) -> None:
    with kept_engine(tmp_path, FACTS) as options:
        assert len(options) == 4
        assert refusal({**SHAPES, **options}) == ""
    # It reads them: what it does not know, or spells otherwise, is an error.
    assert "'trt_engine_cache_enable' should be 'True' or 'False'" in refusal({"trt_engine_cache_enable": "1"})
    assert "Invalid TensorRT EP option: trt_engine_cache" in refusal({"trt_engine_cache": "True"})
    assert "'trt_engine_cache_path' should be a path" in refusal({"trt_engine_cache_path": ""})
    assert "'trt_timing_cache_path' should be a path" in refusal({"trt_timing_cache_path": ""})


class Provider:
    """As onnxruntime's provider: opens the engine in its folder whatever it is, and else builds and writes one."""

    def __init__(self) -> None:
        self.built = 0

    def open(self, options: dict[str, str]) -> str:
        path = Path(options["trt_engine_cache_path"]) / "TensorrtExecutionProvider_TRTKernel_graph_0_0_sm90.engine"
        if not path.is_file():
            self.built += 1
            path.write_text(f"engine {self.built}")
            path.with_suffix(".profile").write_text("shapes")
        return path.read_text()

    def start(self, root: Path, facts: dict[str, Any] = FACTS) -> str:
        with kept_engine(root, facts) as options:
            return self.open(options)


def only(root: Path) -> Path:
    (folder,) = root.iterdir()
    return folder


def test_an_engine_is_built_once_and_another_for_other_facts(tmp_path: Path) -> None:
    provider = Provider()
    assert [provider.start(tmp_path) for _ in range(3)] == ["engine 1"] * 3
    assert provider.start(tmp_path, {**FACTS, "precision": "fp16"}) == "engine 2"
    assert provider.start(tmp_path) == "engine 1"
    made = [json.loads((folder / "made.json").read_text()) for folder in tmp_path.iterdir()]
    assert sorted(found["for"]["precision"] for found in made) == ["fp16", "fp32"]
    assert [len(found["files"]) for found in made] == [2, 2]


def truncate(folder: Path) -> None:
    next(folder.glob("*.engine")).write_text("engi")


def forget(folder: Path) -> None:
    """As if the process was killed before its end."""
    (folder / "made.json").unlink()


def add(folder: Path) -> None:
    (folder / "other.engine").write_text("from elsewhere")


def damage(folder: Path) -> None:
    (folder / "made.json").write_text('{"files": 3}')


@pytest.mark.parametrize("change", [truncate, forget, add, damage])
def test_files_that_no_good_start_left_are_not_opened(change: Callable[[Path], None], tmp_path: Path) -> None:
    provider = Provider()
    provider.start(tmp_path)
    change(only(tmp_path))
    assert provider.start(tmp_path) == "engine 2"
    assert provider.start(tmp_path) == "engine 2"
    assert not list(only(tmp_path).glob("other*"))


def test_an_engine_with_wrong_answers_is_built_again_at_the_next_start(tmp_path: Path) -> None:
    provider = Provider()
    provider.start(tmp_path)

    def wrong_start() -> None:
        with kept_engine(tmp_path, FACTS) as options:
            assert provider.open(options) == "engine 1"
            raise ValueError("wrong")

    with pytest.raises(ValueError, match="wrong"):
        wrong_start()
    assert list(only(tmp_path).iterdir()) == []
    assert provider.start(tmp_path) == "engine 2"


def test_a_place_that_cannot_hold_engines_is_named_before_one_is_built(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"^Engines cannot be kept in .*file: Not a directory"):
        Provider().start(tmp_path / "file")


def test_whatever_changes_an_engine_is_a_part_of_its_facts(monkeypatch: pytest.MonkeyPatch) -> None:
    state: dict[str, Any] = {"tensorrt": "10.13.3", "gpu": ["Model: A"], "capability": [(9, 0)], "onnxruntime": "1.31"}
    monkeypatch.setattr(engine_cache, "tensorrt_version", lambda: state["tensorrt"])
    monkeypatch.setattr(engine_cache, "import_onnxruntime", lambda: SimpleNamespace(__version__=state["onnxruntime"]))
    monkeypatch.setattr(nvidia, "gpu_fingerprint", lambda: state["gpu"])
    monkeypatch.setattr(nvidia, "compute_capabilities", lambda: state["capability"])
    found = [engine_facts(b"graph", "fp32", SHAPES)]
    found.append(engine_facts(b"graph, other weights", "fp32", SHAPES))
    found.append(engine_facts(b"graph", "fp16", SHAPES))
    found.append(engine_facts(b"graph", "fp32", tensorrt_profile((3, 8, 8), (1, 8))))
    for name, value in (
        ("tensorrt", "10.14.1"), ("gpu", ["Model: B"]), ("capability", [(10, 0)]), ("onnxruntime", "1.32"),
    ):  # fmt: skip
        before, state[name] = state[name], value
        found.append(engine_facts(b"graph", "fp32", SHAPES))
        state[name] = before
    assert len({json.dumps(facts, sort_keys=True) for facts in found}) == 8
    assert engine_facts(b"graph", "fp32", SHAPES) == found[0]


def test_the_version_is_asked_of_the_library_that_the_provider_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def opened(name: str) -> Any:
        asked.append(name)
        return SimpleNamespace(getInferLibVersion=lambda: 101303)

    monkeypatch.setattr(engine_cache, "provider_tensorrt_major", lambda: 10)
    monkeypatch.setattr(engine_cache, "preload_libraries", lambda *_: None)
    monkeypatch.setattr(ctypes, "CDLL", opened)
    assert tensorrt_version() == "10.13.3"
    assert asked == ["libnvinfer.so.10"]

    def missing(name: str) -> Any:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert tensorrt_version() == ""
