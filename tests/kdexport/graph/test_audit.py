import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from kdexport.backends.base import Finding
from kdexport.graph.audit import audit_graph, operator_counts
from tests.kdexport.exported_students import OPSET, VARIANTS, exported, exported_fp16

CONV = "blocks.3.1.conv.3"
CLASSIFIER = "classifier.0.weight"

Mutation = Callable[[ModelProto], None]


def audit(path: Path, precision: str = "fp32") -> list[Finding]:
    return audit_graph(path, exported("R1").weights, form=precision, opset=OPSET)


def audit_mutated(folder: Path, mutate: Mutation, precision: str = "fp32") -> dict[str, str]:
    """The checks that fail on a changed copy of the clean file, and their facts."""
    model = onnx.load(str(exported("R1").path if precision == "fp32" else exported_fp16("R1")))
    mutate(model)
    onnx.save(model, str(folder / "changed.onnx"))
    return {finding.check: finding.fact for finding in audit(folder / "changed.onnx", precision) if not finding.holds}


def initializer(model: ModelProto, name: str) -> TensorProto:
    found: TensorProto = next(item for item in model.graph.initializer if item.name == name)
    return found


def rewrite(model: ModelProto, name: str, change: Callable[[NDArray[np.generic]], None]) -> None:
    item = initializer(model, name)
    values = numpy_helper.to_array(item).copy()
    change(values)
    item.CopyFrom(numpy_helper.from_array(values, name))


def reader(model: ModelProto, name: str) -> NodeProto:
    """The node that reads the tensor ``name``."""
    found: NodeProto = next(node for node in model.graph.node if name in node.input)
    return found


def retype(model: ModelProto, name: str) -> None:
    item = initializer(model, name)
    item.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(item).astype(np.float32), name))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_clean_file_holds_in_every_finding(variant: str, precision: str) -> None:
    path = exported(variant).path if precision == "fp32" else exported_fp16(variant)
    findings = audit_graph(path, exported(variant).weights, form=precision, opset=OPSET)
    assert [finding.check for finding in findings if not finding.holds] == []
    assert {finding.check for finding in findings} == {
        "valid ONNX",
        "opset",
        "no batch norm",
        "no branch",
        "dynamic float32 input and logits",
        "weights",
        f"precision {precision}",
        "no trace of the building machine",
    }
    assert f"{len(exported(variant).weights)} tensors compared" in str(findings)


def test_operators_are_counted_by_type() -> None:
    nodes = [helper.make_node(kind, ["x"], ["y"]) for kind in ("Relu", "Conv", "Relu", "Add")]
    model = helper.make_model(helper.make_graph(nodes, "g", [], []))
    assert operator_counts(model) == {"Add": 1, "Conv": 1, "Relu": 2}


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("name", ["conv1.0.weight", f"{CONV}.bias", CLASSIFIER])
def test_one_scalar_changed_by_a_hundredth_is_found(tmp_path: Path, name: str, precision: str) -> None:
    def scale(values: NDArray[np.generic]) -> None:
        index = np.unravel_index(np.argmax(np.abs(values)), values.shape)
        values[index] *= 1.01

    failed = audit_mutated(tmp_path, lambda model: rewrite(model, name, scale), precision)
    assert failed.keys() == {"weights"}
    assert failed["weights"].startswith(f"layer {name} (1 of ")


def test_the_last_bit_of_one_weight_is_found_with_its_place(tmp_path: Path) -> None:
    def nudge(values: NDArray[np.generic]) -> None:
        values[4, 0, 2, 1] = np.nextafter(values[4, 0, 2, 1], np.float32(9))

    failed = audit_mutated(tmp_path, lambda model: rewrite(model, f"{CONV}.weight", nudge))
    assert failed.keys() == {"weights"}
    assert f"layer {CONV}.weight" in failed["weights"]
    assert "at [4, 0, 2, 1]" in failed["weights"]


def test_a_weight_that_is_not_a_number_is_found(tmp_path: Path) -> None:
    def spoil(values: NDArray[np.generic]) -> None:
        values[0] = np.nan

    failed = audit_mutated(tmp_path, lambda model: rewrite(model, f"{CONV}.bias", spoil))
    assert f"layer {CONV}.bias" in failed["weights"]


def test_a_dropped_bias_is_found(tmp_path: Path) -> None:
    def drop(model: ModelProto) -> None:
        del reader(model, f"{CONV}.bias").input[2]
        model.graph.initializer.remove(initializer(model, f"{CONV}.bias"))

    failed = audit_mutated(tmp_path, drop)
    assert failed == {"weights": f"layer {CONV}.bias (absent)"}


def test_swapped_classes_are_found(tmp_path: Path) -> None:
    def swap(values: NDArray[np.generic]) -> None:
        values[[2, 7]] = values[[7, 2]]

    failed = audit_mutated(tmp_path, lambda model: rewrite(model, CLASSIFIER, swap))
    assert failed.keys() == {"weights"}
    assert f"layer {CLASSIFIER}" in failed["weights"]


def test_a_weight_of_another_shape_is_found(tmp_path: Path) -> None:
    def cut(model: ModelProto) -> None:
        del model.graph.value_info[:]
        item = initializer(model, "conv2.0.bias")
        item.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(item).reshape(1, -1, 1, 1), "conv2.0.bias"))
        node = reader(model, "conv2.0.bias")
        del node.input[2]
        node.output[0], old = "without bias", node.output[0]
        add = helper.make_node("Add", ["without bias", "conv2.0.bias"], [old], "late bias")
        model.graph.node.insert(list(model.graph.node).index(node) + 1, add)

    failed = audit_mutated(tmp_path, cut)
    assert failed == {"weights": "layer conv2.0.bias (float32[1, 1280, 1, 1] instead of float32[1280])"}


def test_an_inserted_batch_norm_is_found(tmp_path: Path) -> None:
    def insert(model: ModelProto) -> None:
        node = reader(model, f"{CONV}.weight")
        node.output[0], old = "before norm", node.output[0]
        channels = initializer(model, f"{CONV}.bias").dims[0]
        names = ["bn scale", "bn shift", "bn mean", "bn variance"]
        model.graph.initializer.extend(numpy_helper.from_array(np.ones(channels, np.float32), name) for name in names)
        norm = helper.make_node("BatchNormalization", ["before norm", *names], [old], "norm")
        model.graph.node.insert(list(model.graph.node).index(node) + 1, norm)

    assert audit_mutated(tmp_path, insert) == {"no batch norm": "1 normalisation nodes"}


def test_an_extra_parallel_branch_is_found(tmp_path: Path) -> None:
    def branch(model: ModelProto) -> None:
        node = reader(model, f"{CONV}.weight")
        twin = copy.deepcopy(node)
        twin.name, twin.output[0] = "twin", "of the twin"
        node.output[0], old = "of the first", node.output[0]
        place = list(model.graph.node).index(node) + 1
        model.graph.node.insert(place, helper.make_node("Max", ["of the first", "of the twin"], [old], "both"))
        model.graph.node.insert(place, twin)

    fact = "55 convolutions and linear layers, the plain student has 54"
    assert audit_mutated(tmp_path, branch) == {"no branch": fact}


@pytest.mark.parametrize(("end", "name"), [("output", "scores"), ("input", "pixels")])
def test_a_renamed_input_or_output_is_found(tmp_path: Path, end: str, name: str) -> None:
    def rename(model: ModelProto) -> None:
        value = getattr(model.graph, end)[0]
        for node in model.graph.node:
            for names in (node.input, node.output):
                for index, used in enumerate(names):
                    names[index] = name if used == value.name else used
        value.name = name

    failed = audit_mutated(tmp_path, rename)
    assert failed.keys() == {"dynamic float32 input and logits"}
    assert name in failed["dynamic float32 input and logits"]


def test_a_fixed_batch_is_found(tmp_path: Path) -> None:
    def fix(model: ModelProto) -> None:
        del model.graph.value_info[:]
        for value in (model.graph.input[0], model.graph.output[0]):
            value.type.tensor_type.shape.dim[0].dim_value = 4

    failed = audit_mutated(tmp_path, fix)
    assert failed.keys() == {"dynamic float32 input and logits"}
    assert "input [4, 3, 32, 32]" in failed["dynamic float32 input and logits"]


def test_a_second_output_is_found(tmp_path: Path) -> None:
    def expose(model: ModelProto) -> None:
        model.graph.output.append(copy.deepcopy(model.graph.output[0]))
        model.graph.output[1].name = "copy"
        model.graph.node.append(helper.make_node("Identity", ["logits"], ["copy"], "copy"))

    assert audit_mutated(tmp_path, expose).keys() == {"dynamic float32 input and logits"}


def test_a_layer_left_in_float32_is_found_in_the_float16_graph(tmp_path: Path) -> None:
    def leave(model: ModelProto) -> None:
        del model.graph.value_info[:]
        node = reader(model, f"{CONV}.weight")
        retype(model, f"{CONV}.weight")
        retype(model, f"{CONV}.bias")
        node.input[0], before = "wide input", node.input[0]
        node.output[0], after = "wide output", node.output[0]
        place = list(model.graph.node).index(node)
        model.graph.node.insert(place + 1, helper.make_node("Cast", ["wide output"], [after], "narrow", to=10))
        model.graph.node.insert(place, helper.make_node("Cast", [before], ["wide input"], "widen", to=1))

    failed = audit_mutated(tmp_path, leave, "fp16")
    assert failed.keys() == {"weights", "precision fp16"}
    assert failed["precision fp16"] == f"4 casts, 2 weights in another precision: {CONV}.weight"
    assert f"{CONV}.weight (float32[" in failed["weights"]


def test_an_activation_moved_to_float32_is_found_in_the_float16_graph(tmp_path: Path) -> None:
    def widen(model: ModelProto) -> None:
        del model.graph.value_info[:]
        node = next(node for node in model.graph.node if node.op_type == "Relu")
        before, node.input[0] = node.input[0], "wide input"
        after, node.output[0] = node.output[0], "wide output"
        place = list(model.graph.node).index(node)
        model.graph.node.insert(place + 1, helper.make_node("Cast", ["wide output"], [after], "narrow", to=10))
        model.graph.node.insert(place, helper.make_node("Cast", [before], ["wide input"], "widen", to=1))

    assert audit_mutated(tmp_path, widen, "fp16") == {"precision fp16": "4 casts, 0 weights in another precision"}


@pytest.mark.parametrize(("precision", "other"), [("fp32", "fp16"), ("fp16", "fp32")])
def test_a_whole_graph_of_the_other_precision_is_found(precision: str, other: str) -> None:
    path = exported("R1").path if other == "fp32" else exported_fp16("R1")
    failed = {finding.check for finding in audit(path, precision) if not finding.holds}
    assert failed == {"weights", f"precision {precision}"}


def test_another_opset_is_found(tmp_path: Path) -> None:
    def age(model: ModelProto) -> None:
        model.opset_import[0].version = OPSET - 1

    assert audit_mutated(tmp_path, age) == {"opset": f"opset {OPSET - 1}, {OPSET} required"}


@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty", "absent", "folder"])
def test_a_damaged_file_is_found_and_no_other_check_is_reported(tmp_path: Path, damage: str) -> None:
    path, clean = tmp_path / "damaged.onnx", exported("R1").path.read_bytes()
    contents = {"truncated": clean[: len(clean) * 2 // 3], "garbage": bytes(range(256)) * 40, "empty": b""}
    if damage in contents:
        path.write_bytes(contents[damage])
    elif damage == "folder":
        path.mkdir()
    findings = audit(path)
    assert [(finding.check, finding.holds) for finding in findings] == [("valid ONNX", False)]
    assert findings[0].fact
    assert "\n" not in findings[0].fact


def test_a_cycle_in_the_graph_is_found(tmp_path: Path) -> None:
    def cycle(model: ModelProto) -> None:
        model.graph.node[0].input[0] = "logits"

    assert audit_mutated(tmp_path, cycle).keys() == {"valid ONNX"}


@pytest.mark.parametrize(
    "trace", ["/home/builder/net.py", "/root/x", "/Users/me/x", "/opt/lib/python3/site-packages/torch"]
)
def test_a_path_of_the_building_machine_is_found(tmp_path: Path, trace: str) -> None:
    def leak(model: ModelProto) -> None:
        model.graph.node[3].doc_string = f"File {trace}, line 3"

    failed = audit_mutated(tmp_path, leak)
    assert failed.keys() == {"no trace of the building machine"}
    mark = failed["no trace of the building machine"].removeprefix("the file contains ")
    assert mark in trace


@pytest.mark.parametrize("inside", [True, False])
def test_weights_in_another_file_are_found_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inside: bool
) -> None:
    path = tmp_path / "model" / "split.onnx"
    path.parent.mkdir()
    model = onnx.load(str(exported("R1").path))
    # Only real weights move out, so that shape inference still finds its constants.
    onnx.save(model, str(path), save_as_external_data=True, location="split.data", size_threshold=2000)
    # The checker resolves the other file from the working directory, and finds it there.
    monkeypatch.chdir(path.parent if inside else tmp_path)
    failed = {finding.check: finding.fact for finding in audit(path) if not finding.holds}
    assert failed.keys() == {"one file"}
    assert "are stored in another file, first" in failed["one file"]
