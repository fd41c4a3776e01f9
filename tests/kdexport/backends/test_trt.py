import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from kdexport.backends import trt
from kdexport.backends.trt import build_engine
from kdexport.backends.trt_build import EngineRequest
from kdexport.backends.trt_layers import Engine, EngineLayer, require_precision
from kdexport.errors import AuditError, BackendUnavailableError, EngineBuildError
from kdexport.graph.precision import cast_to_bf16, cast_to_fp16
from kdexport.graph.quantize import quantize
from kdexport.graph.tensor_ranges import calibrate
from kdexport.targets import parse_target, require_available
from tests.kdexport.exported_students import SIZE, exported, exported_fp16, exported_unfused, small_graph, small_weights
from tests.kdexport.graph.int8_block import CALIBRATION, block_graph, block_weights
from tests.kdexport.graph.int8_block import SIZE as BLOCK

FP16, FP32 = "trt-rtx-fp16", "trt-rtx-fp32"


Build = Callable[..., Engine]


@pytest.fixture
def build(tmp_path: Path) -> Build:
    """Builds an engine with TensorRT-RTX, which needs no GPU for it."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")

    def run(model: Path, *, capabilities: tuple[str, ...] = ("SM89",), size: int = SIZE) -> Engine:
        plan = tmp_path / f"{len(list(tmp_path.iterdir()))}.plan"
        return build_engine(
            EngineRequest(
                backend="trt-rtx",
                onnx=str(model),
                plan=str(plan),
                shape=(3, size, size),
                batches=(1, 4, 16),
                compute_capabilities=capabilities,
            )
        )

    return run


def request(model: Path, **changes: Any) -> EngineRequest:
    base = EngineRequest(
        backend="trt-rtx",
        onnx=str(model),
        plan=str(model.with_suffix(".plan")),
        shape=(3, 16, 16),
        batches=(1, 2, 4),
        compute_capabilities=(),
    )
    return replace(base, **changes)


def kernels(engine: Engine) -> list[EngineLayer]:
    return [layer for layer in engine.layers if layer.datatypes]


def test_every_kernel_of_a_student_has_the_requested_type(build: Build) -> None:
    for model, target, name in ((exported_fp16("R1"), FP16, "Half"), (exported("R1").path, FP32, "Float")):
        engine = build(model)
        require_precision(engine, target)
        assert {kind for layer in engine.layers for kind in layer.datatypes} == {name}
        # 53 convolutions, and the linear layer at least.
        assert len(kernels(engine)) >= 54
        assert engine.plan.stat().st_size > 10_000
        assert re.fullmatch(r"\d+(\.\d+)+", engine.version)


def test_a_float32_graph_requested_as_float16_is_refused_and_a_kernel_is_named(build: Build) -> None:
    engine = build(exported("R1").path)
    with pytest.raises(AuditError) as caught:
        require_precision(engine, FP16)
    found = re.search(r"^(\d+) of (\d+) kernels of trt-rtx-fp16 do not run in Half: (\S+) reads", caught.value.message)
    assert found is not None
    assert int(found[1]) >= 54
    assert found[3] in {layer.name for layer in engine.layers}


@pytest.mark.parametrize("classes", [1, 2, 7])
def test_any_number_of_classes_builds_in_float16(build: Build, tmp_path: Path, classes: int) -> None:
    # An odd number is padded by the builder, and the padding is cut off after the cast.
    source = small_graph(tmp_path / "small.onnx", small_weights(classes=classes))
    cast_to_fp16(source, tmp_path / "half.onnx")
    engine = build(tmp_path / "half.onnx", size=16)
    require_precision(engine, FP16)
    assert kernels(engine)


def test_a_float32_layer_between_float16_ones_is_found(build: Build, tmp_path: Path) -> None:
    source = small_graph(tmp_path / "small.onnx", small_weights())
    model = cast_to_fp16(source, tmp_path / "half.onnx")
    graph = model.graph
    del graph.value_info[:]
    node = next(node for node in graph.node if node.op_type == "Gemm")
    for item in graph.initializer:
        if item.name in node.input:
            item.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(item).astype(np.float32), item.name))
    before, node.input[0] = node.input[0], "wide"
    after, node.output[0] = node.output[0], "wide result"
    place = list(graph.node).index(node)
    graph.node.insert(place + 1, helper.make_node("Cast", ["wide result"], [after], "narrow", to=TensorProto.FLOAT16))
    graph.node.insert(place, helper.make_node("Cast", [before], ["wide"], "widen", to=TensorProto.FLOAT))
    onnx.save(model, str(tmp_path / "mixed.onnx"))
    with pytest.raises(AuditError, match=r"do not run in Half: .* reads or writes Float"):
        require_precision(build(tmp_path / "mixed.onnx", size=16), FP16)


def test_two_builds_give_the_same_bytes(build: Build) -> None:
    first, second = build(exported_fp16("R1")), build(exported_fp16("R1"))
    assert first.plan != second.plan
    assert first.plan.read_bytes() == second.plan.read_bytes()
    assert first.layers == second.layers


def test_the_branches_cost_kernels_that_folding_saves(build: Build) -> None:
    unfused, fused = build(exported_unfused("R1")), build(exported("R1").path)
    assert len(kernels(unfused)) >= len(kernels(fused)) + 3


def test_an_engine_is_built_for_the_requested_gpu_generations(build: Build) -> None:
    def generations(*capabilities: str) -> set[bytes]:
        plan = build(exported_fp16("R1"), capabilities=capabilities).plan
        return {name.lower() for name in re.findall(rb"sm_?\d{2,3}", plan.read_bytes())}

    assert generations("SM89") == {b"sm89"}
    assert generations("SM86", "SM89") == {b"sm86", b"sm89"}


def test_float8_builds_for_the_generation_that_has_it_and_for_no_older_one(build: Build, tmp_path: Path) -> None:
    nodes = []
    for name in ("input", "w"):
        nodes.append(helper.make_node("QuantizeLinear", [name, "s", "z"], [f"{name} q"]))
        nodes.append(helper.make_node("DequantizeLinear", [f"{name} q", "s", "z"], [f"{name} d"]))
    nodes.append(helper.make_node("Conv", ["input d", "w d"], ["logits"], "conv", pads=[1, 1, 1, 1]))
    weight = np.random.default_rng(0).normal(size=(16, 3, 3, 3)).astype(np.float32)
    constants = [
        numpy_helper.from_array(weight, "w"),
        numpy_helper.from_array(np.asarray(0.05, np.float32), "s"),
        helper.make_tensor("z", TensorProto.FLOAT8E4M3FN, [], [0]),
    ]
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", channels, 16, 16])
        for name, channels in (("input", 3), ("logits", 16))
    ]
    graph = helper.make_graph(nodes, "float8", [ends[0]], [ends[1]], constants)
    path = tmp_path / "float8.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), str(path))
    assert kernels(build(path, size=16))
    with pytest.raises(EngineBuildError, match=r"sm86.*fp8"):
        build(path, size=16, capabilities=("SM86",))


@pytest.mark.parametrize("name", ["SM3", "sm89", "", "__class__"])
def test_an_unknown_generation_is_an_error_with_its_name_and_no_traceback(build: Build, name: str) -> None:
    with pytest.raises(EngineBuildError) as caught:
        build(exported_fp16("R1"), capabilities=(name,))
    assert "R1-fp16.onnx" in caught.value.message
    assert "Traceback" not in str(caught.value)
    assert caught.value.exit_code == 1


def test_a_file_that_cannot_be_parsed_is_refused_with_the_message_of_the_builder(build: Build, tmp_path: Path) -> None:
    garbage = tmp_path / "garbage.onnx"
    garbage.write_bytes(b"garbage" * 40)
    with pytest.raises(EngineBuildError, match=r"tensorrt_rtx did not build garbage\.onnx: .*[Ff]ailed to parse"):
        build(garbage)
    with pytest.raises(EngineBuildError, match=r"did not build absent\.onnx: .*cannot be found"):
        build(tmp_path / "absent.onnx")


def test_a_file_that_parses_as_an_empty_graph_is_refused(build: Build, tmp_path: Path) -> None:
    # A message of unknown fields is a valid protobuf, and no model.
    empty = tmp_path / "empty.onnx"
    empty.write_bytes(b"\x00garbage" * 40)
    with pytest.raises(
        EngineBuildError, match=r"did not build empty\.onnx: the graph has 0 inputs and 0 outputs, expected one of each"
    ):
        build(empty)


def test_an_operator_that_the_builder_lacks_is_refused_with_the_node(build: Build, tmp_path: Path) -> None:
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 3, 16, 16]) for name in ("input", "logits")
    ]
    node = helper.make_node("Frobnicate", ["input"], ["logits"], "odd one", domain="nowhere")
    graph = helper.make_graph([node], "odd", [ends[0]], [ends[1]])
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("nowhere", 1)]
    path = tmp_path / "odd.onnx"
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), str(path))
    with pytest.raises(EngineBuildError, match=r"odd one: .*Plugin not found"):
        build(path, size=16)
    assert not list(tmp_path.glob("*.plan"))


def test_a_builder_that_crashes_is_an_error_with_its_exit_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    killer = tmp_path / "python"
    killer.write_text("#!/bin/sh\necho half an answer {\necho last words >&2\nkill -SEGV $$\n")
    killer.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(killer))
    with pytest.raises(EngineBuildError, match=r"the builder ended with exit code -11: last words"):
        build_engine(request(tmp_path / "a.onnx"))


def test_a_builder_that_hangs_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sleeper = tmp_path / "python"
    sleeper.write_text("#!/bin/sh\nexec sleep 30\n")
    sleeper.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(sleeper))
    monkeypatch.setattr(trt, "_TIMEOUT_S", 0.3)
    with pytest.raises(EngineBuildError, match=r"did not build a\.onnx within 0\.3 s"):
        build_engine(request(tmp_path / "a.onnx"))


def test_a_missing_backend_is_an_error_without_a_traceback(tmp_path: Path) -> None:
    if importlib.util.find_spec("tensorrt") is not None:
        pytest.skip("TensorRT is installed")
    with pytest.raises(EngineBuildError, match=r"tensorrt did not build a\.onnx: ModuleNotFoundError"):
        build_engine(request(tmp_path / "a.onnx", backend="trt"))


def test_a_target_without_tensorrt_is_an_error_with_the_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BackendUnavailableError) as caught:
        require_available((parse_target("onnx-fp32"), parse_target("trt-fp16")))
    assert caught.value.message == "Target trt-fp16 cannot be built: TensorRT is not installed."
    assert "tensorrt-cu13" in caught.value.remedy
    assert "trt-rtx" in caught.value.remedy
    assert caught.value.exit_code == 4
    with pytest.raises(BackendUnavailableError, match=r"TensorRT-RTX is not installed") as caught:
        require_available((parse_target("trt-rtx-fp16"),))
    assert caught.value.remedy == "Run pip install 'kdexport[trt-rtx]'."


def test_importing_the_backend_imports_no_tensorrt() -> None:
    script = "import sys, kdexport.backends.trt; print(sorted(m for m in sys.modules if m.startswith('tensorrt')))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=300)
    assert done.stdout.strip() == "[]"


def test_bfloat16_and_int8_build_and_every_kernel_has_the_requested_type(build: Build, tmp_path: Path) -> None:
    source = block_graph(tmp_path / "a.onnx")
    cast_to_bf16(source, tmp_path / "bf16.onnx")
    engine = build(tmp_path / "bf16.onnx", size=BLOCK)
    require_precision(engine, "trt-rtx-bf16")
    assert {kind for layer in engine.layers for kind in layer.datatypes} == {"BFloat16"}
    calibrate(source, [CALIBRATION], tmp_path / "r.json", method="minmax", percentile=99.9)
    quantize(source, tmp_path / "r.json", tmp_path / "int8.onnx", form="int8-s8")
    engine = build(tmp_path / "int8.onnx", size=BLOCK)
    require_precision(engine, "trt-rtx-int8")
    assert sum("Int8" in layer.datatypes and layer.kind in ("correlation", "gemm") for layer in engine.layers) == 3
    for asked in ("fp32", "bf16", "fp16"):
        with pytest.raises(AuditError, match="do not run in"):
            require_precision(engine, f"trt-rtx-{asked}")


def test_a_float32_convolution_left_in_an_int8_graph_is_found_in_the_engine(build: Build, tmp_path: Path) -> None:
    source = block_graph(tmp_path / "a.onnx")
    calibrate(source, [CALIBRATION], tmp_path / "r.json", method="minmax", percentile=99.9)
    model = quantize(source, tmp_path / "r.json", tmp_path / "int8.onnx", form="int8-s8")
    model.graph.initializer.append(numpy_helper.from_array(block_weights()["inner.weight"], "left over"))
    inner = next(node for node in model.graph.node if node.name == "inner")
    inner.input[0], inner.input[1] = "x", "left over"
    onnx.save(model, str(tmp_path / "mixed.onnx"))
    with pytest.raises(AuditError, match=r"1 of \d+ kernels of trt-rtx-int8 do not run in Int8: .*inner"):
        require_precision(build(tmp_path / "mixed.onnx", size=BLOCK), "trt-rtx-int8")


def test_only_the_layers_that_a_plan_keeps_may_run_in_float32(build: Build, tmp_path: Path) -> None:
    source, target = block_graph(tmp_path / "a.onnx"), "trt-rtx-int8"
    calibrate(source, [CALIBRATION], tmp_path / "r.json", method="minmax", percentile=99.9)
    quantize(source, tmp_path / "r.json", tmp_path / "kept.onnx", form="int8-s8", keep=["inner"])
    engine = build(tmp_path / "kept.onnx", size=BLOCK)
    require_precision(engine, target, ["inner"])
    for kept in ([], ["stem"]):
        with pytest.raises(AuditError, match=r"1 of \d+ kernels of trt-rtx-int8 do not run in Int8: .*inner"):
            require_precision(engine, target, kept)
    with pytest.raises(
        AuditError, match="The plan keeps stem in float32, but trt-rtx-int8 has no float32 kernel that computes it"
    ):
        require_precision(engine, target, ["inner", "stem"])


def test_the_form_for_cpus_is_refused_with_the_message_of_the_builder(build: Build, tmp_path: Path) -> None:
    source = block_graph(tmp_path / "a.onnx")
    calibrate(source, [CALIBRATION], tmp_path / "r.json", method="minmax", percentile=99.9)
    quantize(source, tmp_path / "r.json", tmp_path / "u8.onnx", form="int8-u8")
    with pytest.raises(EngineBuildError, match=r"(?s)did not build u8\.onnx: .*(Int32|UInt8|INT32|UINT8)"):
        build(tmp_path / "u8.onnx", size=BLOCK)


def test_polygraphy_reads_each_form_that_tensorrt_takes_as_it_is(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    source = block_graph(tmp_path / "a.onnx")
    calibrate(source, [CALIBRATION], tmp_path / "r.json", method="minmax", percentile=99.9)
    quantize(source, tmp_path / "r.json", tmp_path / "int8.onnx", form="int8-s8")
    cast_to_bf16(source, tmp_path / "bf16.onnx")
    script = (
        "import sys; from polygraphy.backend.onnx import InferShapes, OnnxFromPath\n"
        "from polygraphy.backend.trt import NetworkFromOnnxPath\n"
        "for path in sys.argv[1:]:\n"
        "    assert InferShapes(OnnxFromPath(path))().graph.output[0].name == 'logits'\n"
        "    builder, network, *_ = NetworkFromOnnxPath(path, strongly_typed=True)()\n"
        "    print(network.num_layers > 8, network.get_output(0).name)\n"
    )
    files = [str(tmp_path / name) for name in ("int8.onnx", "bf16.onnx")]
    environment = {**os.environ, "POLYGRAPHY_USE_TENSORRT_RTX": "1"}
    done = subprocess.run([sys.executable, "-c", script, *files], capture_output=True, text=True, env=environment)
    # Polygraphy talks of what it loads and misses in lines of its own.
    assert [line for line in done.stdout.splitlines() if line.endswith(" logits")] == ["True logits"] * 2, done.stderr
