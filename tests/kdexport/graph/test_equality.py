"""Graphs that compute the right logits on the images of a bundle, and are not the graph that was exported."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from kdexport.graph.equality import graph_difference
from tests.kdexport.exported_students import exported, exported_fp16, small_graph, small_weights

Mutation = Callable[[onnx.ModelProto], None]


@pytest.fixture
def small(tmp_path: Path) -> onnx.ModelProto:
    """The expected graph: convolution, ReLU, pooling, linear layer."""
    return onnx.load(str(small_graph(tmp_path / "small.onnx", small_weights())))


def copy_of(model: onnx.ModelProto) -> onnx.ModelProto:
    other = onnx.ModelProto()
    other.CopyFrom(model)
    return other


def node(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    found: list[onnx.NodeProto] = [node for node in model.graph.node if node.name == name]
    assert len(found) == 1
    return found[0]


def insert(model: onnx.ModelProto, new: list[onnx.NodeProto], before: str) -> None:
    """Put nodes in front of the node ``before``."""
    nodes = list(model.graph.node)
    place = [item.name for item in nodes].index(before)
    del model.graph.node[:]
    model.graph.node.extend([*nodes[:place], *new, *nodes[place:]])


def add_constant(model: onnx.ModelProto, name: str, values: object, kind: type = np.float32) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.asarray(values, kind), name))


def leaky(model: onnx.ModelProto) -> None:
    relu = node(model, "relu")
    relu.op_type = "LeakyRelu"
    relu.attribute.append(helper.make_attribute("alpha", 1e-6))


def clipped(model: onnx.ModelProto) -> None:
    add_constant(model, "low", 0.0)
    add_constant(model, "high", 50.0)
    relu = node(model, "relu")
    relu.op_type = "Clip"
    relu.input.extend(["low", "high"])


def one_pixel(model: onnx.ModelProto) -> None:
    """One pixel of one value decides the label: no image of the bundle has it."""
    for name, values in (("starts", [0, 0, 0, 0]), ("ends", [2**31, 1, 1, 1])):
        add_constant(model, name, values, np.int64)
    add_constant(model, "key", np.full((1, 1, 1, 1), 2.75))
    add_constant(model, "bonus", np.eye(1, 7, 3))
    new = [
        helper.make_node("Slice", ["input", "starts", "ends"], ["pixel"], "slice"),
        helper.make_node("Equal", ["pixel", "key"], ["hit"], "equal"),
        helper.make_node("Cast", ["hit"], ["hit_float"], "cast", to=TensorProto.FLOAT),
        helper.make_node("Flatten", ["hit_float"], ["hit_flat"], "flatten_hit"),
        helper.make_node("Mul", ["hit_flat", "bonus"], ["extra"], "mul"),
        helper.make_node("Add", ["plain", "extra"], ["logits"], "add"),
    ]
    node(model, "linear").output[0] = "plain"
    model.graph.node.extend(new)


def inside_if(model: onnx.ModelProto) -> None:
    """The right weights lie beside a branch that computes with others."""
    add_constant(model, "other.weight", small_weights(9)["linear.weight"])
    linear = node(model, "linear")
    wrong = helper.make_node("Gemm", ["f", "other.weight", "linear.bias"], ["wrong"], "wrong", transB=1)
    right = helper.make_node("Gemm", ["f", "linear.weight", "linear.bias"], ["right"], "right", transB=1)
    graphs = {
        f"{name}_branch": helper.make_graph([branch], name, [], [helper.make_empty_tensor_value_info(branch.output[0])])
        for name, branch in (("then", wrong), ("else", right))
    }
    add_constant(model, "yes", False, np.bool_)
    model.graph.node.remove(linear)
    model.graph.node.append(helper.make_node("If", ["yes"], ["logits"], "if", **graphs))


def unread_weights(model: onnx.ModelProto) -> None:
    """The folded weights are there, and the layer reads a copy that is one unit in the last place off."""
    weight = small_weights()["linear.weight"].copy()
    weight.flat[11] = np.nextafter(weight.flat[11], np.float32(2))
    add_constant(model, "linear.weight.copy", weight)
    node(model, "linear").input[1] = "linear.weight.copy"


def random_noise(model: onnx.ModelProto) -> None:
    """Noise that is multiplied by zero."""
    add_constant(model, "zero", 0.0)
    insert(
        model,
        [
            helper.make_node("RandomNormalLike", ["p"], ["noise"], "noise"),
            helper.make_node("Mul", ["noise", "zero"], ["none"], "mul"),
            helper.make_node("Add", ["p", "none"], ["p_noisy"], "add"),
        ],
        "flatten",
    )
    node(model, "flatten").input[0] = "p_noisy"


def by_batch(model: onnx.ModelProto) -> None:
    """Another result for a batch of two."""
    add_constant(model, "two", 2, np.int64)
    new = [
        helper.make_node("Shape", ["input"], ["batch"], "shape", start=0, end=1),
        helper.make_node("Equal", ["batch", "two"], ["pair"], "equal"),
        helper.make_node("Cast", ["pair"], ["shift"], "cast", to=TensorProto.FLOAT),
        helper.make_node("Add", ["p", "shift"], ["p_shifted"], "add"),
    ]
    insert(model, new, "flatten")
    node(model, "flatten").input[0] = "p_shifted"


def local_function(model: onnx.ModelProto) -> None:
    body = [helper.make_node("Relu", ["x"], ["y"])]
    model.functions.append(helper.make_function("mine", "Act", ["x"], ["y"], body, [helper.make_opsetid("", 20)]))
    model.opset_import.append(helper.make_opsetid("mine", 1))
    relu = node(model, "relu")
    relu.op_type, relu.domain = "Act", "mine"


def contributed(model: onnx.ModelProto) -> None:
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    relu = node(model, "relu")
    relu.op_type, relu.domain = "QuickGelu", "com.microsoft"


def identities(model: onnx.ModelProto) -> None:
    new = [helper.make_node("Identity", [f"i{k}" if k else "p"], [f"i{k + 1}"], f"identity{k}") for k in range(200)]
    insert(model, new, "flatten")
    node(model, "flatten").input[0] = "i200"


def padded(model: onnx.ModelProto) -> None:
    node(model, "conv").attribute[0].ints[:] = [1, 1, 1, 0]


def swapped_inputs(model: onnx.ModelProto) -> None:
    node(model, "flatten").input[0] = "r"


def dead_node(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("Relu", ["c"], ["nothing"], "dead"))


def extra_tensor(model: onnx.ModelProto) -> None:
    add_constant(model, "payload", np.arange(9))


def extra_output(model: onnx.ModelProto) -> None:
    model.graph.output.append(helper.make_tensor_value_info("p", TensorProto.FLOAT, ["batch", 9, 1, 1]))


def fixed_batch(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1


def other_opset(model: onnx.ModelProto) -> None:
    model.opset_import[0].version = 19


def flipped_bit(model: onnx.ModelProto) -> None:
    tensor = next(item for item in model.graph.initializer if item.name == "conv.bias")
    data = bytearray(tensor.raw_data)
    data[0] ^= 1
    tensor.raw_data = bytes(data)


def negated_value(model: onnx.ModelProto) -> None:
    tensor = next(item for item in model.graph.initializer if item.name == "conv.bias")
    values = numpy_helper.to_array(tensor).copy()
    values[2] = -values[2]
    tensor.CopyFrom(numpy_helper.from_array(values, "conv.bias"))


def transposed(model: onnx.ModelProto) -> None:
    node(model, "linear").attribute.append(helper.make_attribute("alpha", 1.0 + 1e-7))


def constant_of_text(model: onnx.ModelProto) -> None:
    """A constant of a kind that no exporter of a classifier writes."""
    model.graph.node.insert(0, helper.make_node("Constant", [], ["text"], "text", value_string=b"hello"))


MUTATIONS: list[tuple[Mutation, str]] = [
    (leaky, "node relu is a LeakyRelu, expected a Relu (relu)"),
    (clipped, "node relu is a Clip, expected a Relu (relu)"),
    (one_pixel, "node add is a Add, expected a Gemm (linear)"),
    (inside_if, "node if, a If, holds a graph of its own"),
    (unread_weights, "1 of 63 values of linear.weight.copy differ"),
    (random_noise, "node add is a Add, expected a GlobalAveragePool (pool)"),
    (by_batch, "node add is a Add, expected a GlobalAveragePool (pool)"),
    (local_function, "the file defines 1 functions of its own, first Act"),
    (contributed, "the file imports operator sets {'': 20, 'com.microsoft': 1}, expected {'': 20}"),
    (identities, "node identity199 is a Identity, expected a GlobalAveragePool (pool)"),
    (padded, "pads of node conv is [1, 1, 1, 0], expected [1, 1, 1, 1]"),
    (swapped_inputs, "node relu is a Relu, expected a GlobalAveragePool (pool)"),
    (dead_node, "1 nodes reach no output, first dead, a Relu"),
    (extra_tensor, "1 stored tensors are read by no node, first payload"),
    (extra_output, "the outputs are "),
    (fixed_batch, "the inputs are [('input', 'FLOAT', ['1', '3', '16', '16'])], expected [('input', 'FLOAT', ['?',"),
    (other_opset, "the file imports operator sets {'': 19}, expected {'': 20}"),
    (constant_of_text, "node text is a Constant with value_string"),
    (flipped_bit, "1 of 9 values of conv.bias differ"),
    (negated_value, "1 of 9 values of conv.bias differ"),
    (transposed, "alpha of node linear is 1.0000001192092896, expected 1.0"),
]


@pytest.mark.parametrize(("mutate", "words"), MUTATIONS, ids=[mutate.__name__ for mutate, _ in MUTATIONS])
def test_a_changed_graph_is_named_by_its_node(mutate: Mutation, words: str, small: onnx.ModelProto) -> None:
    suspect = copy_of(small)
    mutate(suspect)
    assert graph_difference(suspect, small).startswith(words)


def test_the_same_graph_under_other_names_and_in_another_order_is_the_same(small: onnx.ModelProto) -> None:
    suspect = copy_of(small)
    names = {name: f"t{place}" for place, item in enumerate(suspect.graph.node) for name in item.output}
    names |= {item.name: f"w{place}" for place, item in enumerate(suspect.graph.initializer)}
    names.pop("logits")
    for item in suspect.graph.node:
        item.name = ""
        item.input[:] = [names.get(name, name) for name in item.input]
        item.output[:] = [names.get(name, name) for name in item.output]
    for tensor in suspect.graph.initializer:
        tensor.name = names[tensor.name]
    constants = list(suspect.graph.initializer)[::-1]
    del suspect.graph.initializer[:]
    # One of them as a node, as some writers store it.
    suspect.graph.node.insert(0, helper.make_node("Constant", [], [constants[0].name], value=constants[0]))
    suspect.graph.initializer.extend(constants[1:])
    # A default that is written out is the default.
    suspect.graph.node[1].attribute.append(helper.make_attribute("group", 1))
    onnx.checker.check_model(suspect)
    assert graph_difference(suspect, small) == ""
    assert graph_difference(small, suspect) == ""


def test_a_tensor_that_two_layers_share_in_one_graph_alone_is_found(small: onnx.ModelProto) -> None:
    """Two nodes where one is expected compute the same, and are not the same graph."""
    twice = copy_of(small)
    add_constant(twice, "half", 0.5)
    insert(
        twice,
        [helper.make_node("Relu", ["c"], ["r2"], "relu2"), helper.make_node("Add", ["r", "r2"], ["s"], "add")],
        "pool",
    )
    node(twice, "pool").input[0] = "s"
    once = copy_of(twice)
    once.graph.node.remove(node(once, "relu2"))
    node(once, "add").input[1] = "r"
    assert graph_difference(twice, once).startswith("node relu2 is connected to other nodes") or graph_difference(
        twice, once
    ).startswith("node relu is connected to other nodes")
    assert graph_difference(once, twice)


@pytest.mark.parametrize("variant", ["plain", "R1"])
def test_an_exported_student_equals_itself_and_its_cast_does_not(variant: str) -> None:
    exact, half = onnx.load(str(exported(variant).path)), onnx.load(str(exported_fp16(variant)))
    assert graph_difference(exact, exact) == ""
    assert graph_difference(half, half) == ""
    assert graph_difference(half, exact)


def test_convolutions_in_float32_between_casts_are_no_float16_file() -> None:
    half = onnx.load(str(exported_fp16("plain")))
    suspect = copy_of(half)
    conv = next(item for item in suspect.graph.node if item.op_type == "Conv" and item.input[0] != "input")
    wide = [
        helper.make_node("Cast", [name], [f"{name}_wide"], f"widen_{name}", to=TensorProto.FLOAT) for name in conv.input
    ]
    narrow = helper.make_node("CastLike", [f"{conv.output[0]}_wide", conv.input[0]], [conv.output[0]], "narrow")
    insert(suspect, wide, conv.name)
    nodes = [item.name for item in suspect.graph.node]
    suspect.graph.node.insert(nodes.index(conv.name) + 1, narrow)
    conv = node(suspect, conv.name)
    conv.input[:] = [f"{name}_wide" for name in conv.input]
    conv.output[0] = f"{conv.output[0]}_wide"
    assert "CastLike, expected a Conv" in graph_difference(suspect, half)
