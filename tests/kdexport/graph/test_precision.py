import struct
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

from kdexport.backends.ort import load_model
from kdexport.errors import AuditError
from kdexport.graph.precision import cast_to_bf16, cast_to_fp16
from tests.kdexport.exported_students import exported, exported_fp16, images, small_graph, small_weights

SMALLEST_NORMAL, SMALLEST = 2.0**-14, 2.0**-24


def halves(values: NDArray[np.float32]) -> NDArray[np.float16]:
    """The nearest float16 by the standard library, ties to even."""
    packed = b"".join(struct.pack("<e", float(value)) for value in values.ravel())
    return np.frombuffer(packed, "<f2").reshape(values.shape)


def initializers(path: Path) -> dict[str, NDArray[np.generic]]:
    return {item.name: numpy_helper.to_array(item) for item in onnx.load(str(path)).graph.initializer}


@pytest.mark.parametrize("variant", ["plain", "R1", "R2"])
def test_every_weight_of_a_student_is_the_nearest_float16(variant: str) -> None:
    stored = initializers(exported_fp16(variant))
    for name, tensor in exported(variant).fused.state_dict().items():
        assert stored[name].dtype == np.float16
        np.testing.assert_array_equal(stored[name], tensor.half().numpy(), err_msg=name, strict=True)


def test_tiny_weights_are_rounded_and_not_raised_to_the_smallest_normal_value(tmp_path: Path) -> None:
    weights = small_weights()
    tiny = np.asarray(
        [1e-7, -1e-7, SMALLEST, -SMALLEST, SMALLEST / 2, SMALLEST * 0.51, 3.3e-6, -5.9e-5, SMALLEST_NORMAL], np.float32
    )
    weights["conv.weight"][:, 0, 1, 1] = tiny
    weights["conv.bias"][:] = -tiny
    cast_to_fp16(small_graph(tmp_path / "a.onnx", weights), tmp_path / "b.onnx")
    stored = initializers(tmp_path / "b.onnx")
    for name, values in weights.items():
        np.testing.assert_array_equal(stored[name], halves(values), strict=True)
    kept = stored["conv.weight"][:, 0, 1, 1].astype(np.float64)
    assert kept[2] == SMALLEST
    assert kept[4] == 0
    assert 0 < abs(kept[0]) < SMALLEST_NORMAL


def test_ties_and_the_largest_values_round_as_the_standard_says(tmp_path: Path) -> None:
    weights = small_weights()
    weights["linear.bias"][:] = [2049.0, 2051.0, -2049.0, 65504.0, -65504.0, 65487.9, 1 / 3]
    cast_to_fp16(small_graph(tmp_path / "a.onnx", weights), tmp_path / "b.onnx")
    stored = initializers(tmp_path / "b.onnx")["linear.bias"]
    np.testing.assert_array_equal(stored, halves(weights["linear.bias"]), strict=True)
    assert stored[:4].tolist() == [2048.0, 2052.0, -2048.0, 65504.0]


def test_input_and_logits_stay_float32_behind_exactly_two_casts() -> None:
    model = onnx.load(str(exported_fp16("R1")))
    ends = [*model.graph.input, *model.graph.output]
    assert [(end.name, end.type.tensor_type.elem_type) for end in ends] == [
        ("input", TensorProto.FLOAT),
        ("logits", TensorProto.FLOAT),
    ]
    casts = [node for node in model.graph.node if node.op_type == "Cast"]
    assert [list(node.input) for node in casts if "input" in node.input] == [["input"]]
    assert [list(node.output) for node in casts if "logits" in node.output] == [["logits"]]
    assert [node.attribute[0].i for node in casts] == [TensorProto.FLOAT16, TensorProto.FLOAT]


def test_nothing_but_the_casts_is_added() -> None:
    counts = [
        Counter(node.op_type for node in onnx.load(str(path)).graph.node)
        for path in (exported("plain").path, exported_fp16("plain"))
    ]
    assert counts[1] == counts[0] + Counter({"Cast": 2})


@pytest.mark.parametrize("value", [65536.0, -7e4, 3e38, np.inf])
@pytest.mark.parametrize("name", ["conv.weight", "linear.bias"])
def test_a_weight_beyond_float16_is_refused_by_name(tmp_path: Path, name: str, value: float) -> None:
    weights = small_weights()
    weights[name].ravel()[-1] = value
    source = small_graph(tmp_path / "a.onnx", weights)
    with pytest.raises(AuditError) as caught:
        cast_to_fp16(source, tmp_path / "b.onnx")
    assert caught.value.message == f"Weight {name} reaches {abs(value):.3g}; the largest float16 is 65504."
    assert "Use an fp32 target" in caught.value.remedy
    assert not (tmp_path / "b.onnx").exists()


def test_the_source_file_is_untouched(tmp_path: Path) -> None:
    source = small_graph(tmp_path / "a.onnx", small_weights())
    before = source.read_bytes()
    cast_to_fp16(source, tmp_path / "b.onnx")
    assert source.read_bytes() == before
    assert initializers(source)["conv.weight"].dtype == np.float32


def test_the_cast_file_is_valid_and_sorted_and_the_same_each_time(tmp_path: Path) -> None:
    onnx.checker.check_model(str(exported_fp16("R2")), full_check=True)
    model = onnx.load(str(exported_fp16("R2")))
    known = {"", *(item.name for item in model.graph.initializer), *(item.name for item in model.graph.input)}
    for node in model.graph.node:
        assert set(node.input) <= known, node.name
        known |= set(node.output)
    cast_to_fp16(exported("R2").path, tmp_path / "again.onnx")
    assert (tmp_path / "again.onnx").read_bytes() == exported_fp16("R2").read_bytes()


def test_metadata_survives_the_cast() -> None:
    entries = [
        {entry.key: entry.value for entry in onnx.load(str(path)).metadata_props}
        for path in (exported("R1").path, exported_fp16("R1"))
    ]
    assert entries[0] == entries[1] != {}


def test_the_cast_graph_computes_near_the_exact_one(tmp_path: Path) -> None:
    source = small_graph(tmp_path / "a.onnx", small_weights())
    cast_to_fp16(source, tmp_path / "b.onnx")
    x = images(5, size=16)
    exact, half = (load_model(path).logits(x).astype(np.float64) for path in (source, tmp_path / "b.onnx"))
    error = np.abs(half - exact).max() / np.abs(exact).max()
    # Arithmetic in float16 cannot be as good as float32, and must not be much worse than its 2**-11.
    assert 1e-6 < error < 1e-2
    assert torch.finfo(torch.float16).eps == 2**-10


def bf16(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """The nearest bfloat16 by integer arithmetic on the bits, ties to even, widened again."""
    bits = values.astype(np.float32).view(np.uint32).astype(np.uint64)
    kept = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) << 16
    return kept.astype(np.uint32).view(np.float32)


def test_every_weight_of_a_student_is_the_nearest_bfloat16(tmp_path: Path) -> None:
    student = exported("R1")
    cast_to_bf16(student.path, tmp_path / "b.onnx")
    stored = initializers(tmp_path / "b.onnx")
    for name, values in student.weights.items():
        assert stored[name].dtype.name == "bfloat16"
        np.testing.assert_array_equal(stored[name].astype(np.float32), bf16(values), err_msg=name)


def test_the_bfloat16_graph_has_no_float32_but_its_ends_and_the_opset_that_allows_it(tmp_path: Path) -> None:
    source = exported("R1").path
    model = cast_to_bf16(source, tmp_path / "b.onnx")
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    kinds = {value.name: value.type.tensor_type.elem_type for value in inferred.graph.value_info}
    assert set(kinds.values()) <= {TensorProto.BFLOAT16, TensorProto.INT64}
    assert {item.data_type for item in model.graph.initializer} <= {TensorProto.BFLOAT16, TensorProto.INT64}
    ends = [*model.graph.input, *model.graph.output]
    assert [end.type.tensor_type.elem_type for end in ends] == [TensorProto.FLOAT] * 2
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 22)]
    counts = [Counter(node.op_type for node in onnx.load(str(p)).graph.node) for p in (source, tmp_path / "b.onnx")]
    assert counts[1] == counts[0] + Counter({"Cast": 2})
    names = [
        {n.name for n in onnx.load(str(p)).graph.node if n.op_type != "Cast"} for p in (source, tmp_path / "b.onnx")
    ]
    assert names[0] == names[1]
    assert [entry.key for entry in model.metadata_props] == [e.key for e in onnx.load(str(source)).metadata_props]


def test_bfloat16_ties_and_tiny_and_huge_values_round_as_the_standard_says(tmp_path: Path) -> None:
    weights = small_weights()
    weights["linear.bias"][:] = [1 + 2**-8, 1 + 3 * 2**-8, -(1 + 2**-8), 3.38e38, 1e-40, 1 / 3, -257.0]
    cast_to_bf16(small_graph(tmp_path / "a.onnx", weights), tmp_path / "b.onnx")
    stored = initializers(tmp_path / "b.onnx")["linear.bias"].astype(np.float32)
    np.testing.assert_array_equal(stored, bf16(weights["linear.bias"]))
    assert stored[:3].tolist() == [1.0, 1 + 2**-6, -1.0]


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan, 3.4e38])
def test_a_weight_beyond_bfloat16_is_refused_by_name(tmp_path: Path, value: float) -> None:
    weights = small_weights()
    weights["conv.weight"][2, 1, 0, 0] = value
    source = small_graph(tmp_path / "a.onnx", weights)
    with pytest.raises(AuditError, match=r"^Weight conv\.weight reaches .*; the largest bfloat16 is 3\.38953e\+38"):
        cast_to_bf16(source, tmp_path / "b.onnx")
    assert not (tmp_path / "b.onnx").exists()


def test_constants_and_casts_inside_a_graph_become_bfloat16_too(tmp_path: Path) -> None:
    source = small_graph(tmp_path / "a.onnx", small_weights())
    model = onnx.load(str(source))
    constant = onnx.helper.make_node(
        "Constant", [], ["half"], value=numpy_helper.from_array(np.asarray(0.3, np.float32), "half")
    )
    model.graph.node.insert(0, constant)
    model.graph.node.insert(2, onnx.helper.make_node("Mul", ["c", "half"], ["scaled"]))
    model.graph.node.insert(3, onnx.helper.make_node("Cast", ["scaled"], ["cast"], to=TensorProto.FLOAT))
    next(node for node in model.graph.node if node.op_type == "Relu").input[0] = "cast"
    onnx.save(model, str(source))
    cast = cast_to_bf16(source, tmp_path / "b.onnx")
    onnx.checker.check_model(cast, full_check=True)
    targets = [a.i for node in cast.graph.node if node.op_type == "Cast" for a in node.attribute]
    assert targets == [TensorProto.BFLOAT16, TensorProto.BFLOAT16, TensorProto.FLOAT]
