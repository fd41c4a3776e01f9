import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from kdexport.backends.ort import load_model, optimised_operators
from kdexport.graph.quantize import FORMS, Form, quantize
from kdexport.graph.tensor_ranges import calibrate, read_ranges
from tests.kdexport.exported_students import images
from tests.kdexport.graph.int8_block import CALIBRATION, SIZE, block_graph, block_tensors, block_weights, rounded_weight


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("quantized")
    found = {"fp32": block_graph(folder / "fp32.onnx"), "ranges": folder / "ranges.json"}
    calibrate(found["fp32"], [CALIBRATION[:16], CALIBRATION[16:]], found["ranges"], method="minmax", percentile=99.9)
    for form in FORMS:
        found[form] = folder / f"{form}.onnx"
        quantize(found["fp32"], found["ranges"], found[form], form=form)
    return found


def constants(path: Path) -> dict[str, NDArray[Any]]:
    return {item.name: numpy_helper.to_array(item) for item in onnx.load(str(path)).graph.initializer}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("optimise", [False, True])
def test_logits_are_those_of_an_independent_simulation(files: dict[str, Path], form: Form, optimise: bool) -> None:
    x = images(40, 77, size=SIZE)
    got = load_model(files[form], optimise=optimise).logits(x).astype(np.float64)
    exact, simulated = block_tensors(x, None)["logits"].numpy(), block_tensors(x, form)["logits"].numpy()
    noise = np.sqrt(np.mean((simulated - exact) ** 2))
    assert 1e-4 < noise / np.abs(exact).max() < 5e-2
    # Rounding at a tie may fall either way and move one level; a wrong scale would cost several times the noise.
    assert np.sqrt(np.mean((got - simulated) ** 2)) < 0.5 * noise
    assert np.sqrt(np.mean((got - exact) ** 2)) < 1.5 * noise


@pytest.mark.parametrize("form", FORMS)
def test_weights_are_the_nearest_level_of_their_channel(files: dict[str, Path], form: Form) -> None:
    stored = constants(files[form])
    for name, values in block_weights().items():
        if name.endswith("weight"):
            levels, scale = stored[f"{name}_quantized"], stored[f"{name}_scale"]
            assert levels.dtype == np.int8
            flat = np.abs(values.reshape(len(values), -1)).max(1)
            np.testing.assert_allclose(scale, flat / 127, rtol=1e-6)
            back = levels.astype(np.float64) * scale.reshape(-1, *[1] * (values.ndim - 1))
            np.testing.assert_allclose(back, rounded_weight(values).numpy(), rtol=0, atol=1e-6)
            assert not stored[f"{name}_zero_point"].any()


def test_biases_are_int32_for_the_cpu_and_untouched_for_tensorrt(files: dict[str, Path]) -> None:
    cpu, tensorrt = constants(files["int8-u8"]), constants(files["int8-s8"])
    for name in ("stem", "inner", "linear"):
        bias = block_weights()[f"{name}.bias"]
        np.testing.assert_array_equal(tensorrt[f"{name}.bias"], bias, strict=True)
        assert cpu[f"{name}.bias_quantized"].dtype == np.int32
        back = cpu[f"{name}.bias_quantized"].astype(np.float64) * cpu[f"{name}.bias_quantized_scale"]
        np.testing.assert_allclose(back, bias, rtol=0, atol=1e-3)


def test_activation_scales_come_from_the_ranges(files: dict[str, Path]) -> None:
    ranges = read_ranges(files["ranges"])
    cpu, tensorrt = constants(files["int8-u8"]), constants(files["int8-s8"])
    found = ranges["input"]
    assert found.low == pytest.approx(CALIBRATION.min())
    assert cpu["input_scale"] == pytest.approx((found.high - found.low) / 255)
    assert cpu["input_zero_point"].dtype == np.uint8
    assert cpu["input_zero_point"] == round(-found.low / float(cpu["input_scale"]))
    assert tensorrt["input_scale"] == pytest.approx(max(-found.low, found.high) / 127)
    assert tensorrt["input_zero_point"].dtype == np.int8
    assert tensorrt["input_zero_point"] == 0


def test_the_cpu_form_leaves_no_relu_and_the_tensorrt_form_keeps_it_beside_its_convolution(
    files: dict[str, Path],
) -> None:
    cpu, tensorrt = (onnx.load(str(files[form])).graph for form in ("int8-u8", "int8-s8"))
    assert "Relu" not in {node.op_type for node in cpu.node}
    made_by = {name: node.op_type for node in tensorrt.node for name in node.output}
    relus = [node for node in tensorrt.node if node.op_type == "Relu"]
    assert [made_by[node.input[0]] for node in relus] == ["Conv", "Add"]
    add = next(node for node in tensorrt.node if node.op_type == "Add")
    # The convolution absorbs the sum, whose other side arrives in int8.
    assert sorted(made_by[name] for name in add.input) == ["Conv", "DequantizeLinear"]
    kinds = Counter(node.op_type for node in tensorrt.node)
    assert kinds["QuantizeLinear"] == 3
    assert {TensorProto.INT8, TensorProto.FLOAT} == {item.data_type for item in tensorrt.initializer}


def test_both_sides_of_an_addition_of_two_convolutions_are_handled_once(tmp_path: Path, files: dict[str, Path]) -> None:
    model = onnx.load(str(files["fp32"]))
    # A second convolution makes the residual side, as where a stage changes its width.
    model.graph.initializer.append(numpy_helper.from_array(block_weights()["inner.weight"] * 0.5, "short.weight"))
    model.graph.node.insert(3, helper.make_node("Conv", ["x", "short.weight"], ["short"], "short"))
    next(node for node in model.graph.node if node.op_type == "Add").input[1] = "short"
    onnx.save(model, str(tmp_path / "two.onnx"))
    calibrate(tmp_path / "two.onnx", [CALIBRATION], tmp_path / "r.json", method="minmax", percentile=99.9)
    graph = quantize(tmp_path / "two.onnx", tmp_path / "r.json", tmp_path / "q.onnx", form="int8-s8").graph
    made_by = {name: node.op_type for node in graph.node for name in node.output}
    add = next(node for node in graph.node if node.op_type == "Add")
    assert [made_by[name] for name in add.input] == ["Conv", "DequantizeLinear"]
    exact, got = (load_model(tmp_path / name, optimise=False).logits(CALIBRATION) for name in ("two.onnx", "q.onnx"))
    assert 1e-4 < np.abs(got - exact).max() / np.abs(exact).max() < 0.1


@pytest.mark.parametrize("form", FORMS)
def test_the_file_is_valid_and_sorted_and_keeps_the_metadata_of_the_student(
    files: dict[str, Path], tmp_path: Path, form: Form
) -> None:
    model = onnx.load(str(files[form]))
    onnx.checker.check_model(model, full_check=True)
    assert [(p.key, p.value) for p in model.metadata_props] == [("kdexport.classes", '["a"]')]
    assert (model.producer_name, [entry.version for entry in model.opset_import]) == ("pytorch", [20])
    assert [node.name for node in model.graph.node if node.op_type == "Conv"] == ["stem", "inner"]
    quantize(files["fp32"], files["ranges"], tmp_path / "again.onnx", form=form)
    assert (tmp_path / "again.onnx").read_bytes() == files[form].read_bytes()


def test_integer_products_do_not_saturate(tmp_path: Path) -> None:
    # The largest levels everywhere: sums of two products exceed the 16 bits of fast kernels on old processors.
    weight = np.full((4, 16, 1, 1), 1.0, np.float32)
    nodes = [helper.make_node("Conv", ["input", "w"], ["logits"], "conv")]
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", channels, 4, 4])
        for name, channels in (("input", 16), ("logits", 4))
    ]
    graph = helper.make_graph(nodes, "hot", ends[:1], ends[1:], [numpy_helper.from_array(weight, "w")])
    source = tmp_path / "hot.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), str(source))
    x = np.full((1, 16, 4, 4), 3.0, np.float32)
    calibrate(source, [x, 0 * x], tmp_path / "r.json", method="minmax", percentile=99.9)
    quantize(source, tmp_path / "r.json", tmp_path / "q.onnx", form="int8-u8")
    np.testing.assert_allclose(load_model(tmp_path / "q.onnx").logits(x), 48.0, rtol=1e-3)


LAYERS = ("stem", "inner", "linear")


@pytest.mark.parametrize("keep", [c for n in (1, 2, 3) for c in itertools.combinations(LAYERS, n)])
def test_kept_layers_run_in_float32_and_no_others(
    files: dict[str, Path], tmp_path: Path, keep: tuple[str, ...]
) -> None:
    path = tmp_path / "kept.onnx"
    quantize(files["fp32"], files["ranges"], path, form="int8-u8", keep=keep)
    counts = optimised_operators(path)
    floats = sum(counts.get(kind, 0) for kind in ("Conv", "FusedConv", "Gemm", "FusedGemm"))
    assert floats == len(keep)
    assert counts.get("QLinearConv", 0) + counts.get("QGemm", 0) == 3 - len(keep)
    x = images(40, 77, size=SIZE)
    exact = load_model(files["fp32"]).logits(x)
    kept, plain = (np.sqrt(np.mean((load_model(p).logits(x) - exact) ** 2)) for p in (path, files["int8-u8"]))
    assert kept < 1e-6 * np.abs(exact).max() if len(keep) == 3 else 0 < kept < 1.2 * plain


def test_tensors_between_kept_layers_are_not_quantized(files: dict[str, Path], tmp_path: Path) -> None:
    graph = quantize(files["fp32"], files["ranges"], tmp_path / "k.onnx", form="int8-u8", keep=["stem", "inner"]).graph
    made_by = {name: node.op_type for node in graph.node for name in node.output}
    found = {node.op_type: [made_by.get(name, "stored") for name in node.input] for node in graph.node}
    assert found["Add"] == ["Conv", "Relu"]
    assert found["GlobalAveragePool"] == ["Relu"]
    assert found["Gemm"] == ["DequantizeLinear"] * 3


@pytest.mark.parametrize("keep", LAYERS)
def test_the_form_for_tensorrt_does_not_quantize_the_inputs_of_a_kept_layer(
    files: dict[str, Path], tmp_path: Path, keep: str
) -> None:
    graph = quantize(files["fp32"], files["ranges"], tmp_path / "k.onnx", form="int8-s8", keep=[keep]).graph
    made_by = {name: node.op_type for node in graph.node for name in node.output}
    for node in graph.node:
        if node.op_type in ("Conv", "Gemm"):
            levels = [made_by.get(name) == "DequantizeLinear" for name in node.input[:2]]
            assert levels == [node.name != keep] * 2, node.name
