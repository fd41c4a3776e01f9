"""The layers of an engine as TensorRT and TensorRT-RTX list them, and the precision in which each one computes."""

import json
from pathlib import Path

import pytest

from kdexport.backends.trt_layers import Engine, EngineLayer, parse_inspector, parse_layer_table, require_precision
from kdexport.errors import AuditError

FP16, FP32 = "trt-rtx-fp16", "trt-rtx-fp32"


def engine_of(*layers: tuple[str, str, tuple[str, ...]]) -> Engine:
    rows = tuple(EngineLayer(name=name, kind=kind, datatypes=types) for name, kind, types in layers)
    return Engine(plan=Path("model.plan"), layers=rows, version="0")


def tensor(name: str, datatype: str, dims: str = "-1,16,8,8") -> str:
    return (
        f"{{ Name: {name}, Dimensions: [{dims}], Strides: [1024,64,8,1], StrideOrder: [3,2,1,0], Datatype: {datatype}, "
        "Format: (NHWC) Channel major format }"
    )


def row(name: str, kind: str, inputs: str = "", constants: str = "", outputs: str = "", sources: str = "") -> str:
    return (
        f"Name: {name}, LayerType: {kind}, Inputs: [ {inputs}], Constants: [ {constants}], Outputs: [ {outputs}], "
        f"TacticName: __myl_{name}_0x1f, StreamId: 0, Metadata: {sources}"
    )


def parsed(*rows: str) -> dict[str, tuple[str, tuple[str, ...]]]:
    text = "\n".join(["Layers:", *rows, "", "I/O Tensors:", " Name: input, IOMode: Input, DataType: Float"])
    layers = parse_layer_table(["Compiling", text, "Layers of something else"], {"input", "logits"})
    return {layer.name: (layer.kind, layer.datatypes) for layer in layers}


def test_types_of_inputs_weights_and_outputs_are_read() -> None:
    found = parsed(
        row("conv", "correlation", tensor("x", "Half"), tensor("w", "Half", "16,4,3,3"), tensor("y", "Half")),
        row("mixed", "kgen", f"{tensor('y', 'Half')}, {tensor('z', 'Float')}", "", tensor("u", "Half")),
        row("wide weight", "correlation", tensor("u", "Half"), tensor("w2", "Float", "1,16,1,1"), tensor("v", "Half")),
        row("eight", "correlation", tensor("v", "Int8"), "", tensor("t", "Half")),
    )
    assert found == {
        "conv": ("correlation", ("Half",)),
        "mixed": ("kgen", ("Float", "Half")),
        "wide weight": ("correlation", ("Float", "Half")),
        "eight": ("correlation", ("Half", "Int8")),
    }


def test_float32_scaling_constants_of_one_element_are_omitted() -> None:
    constants = ", ".join(
        [tensor("scale", "Float", "1"), tensor("shift", "Float", ""), tensor("w", "Half", "16,4,3,3")]
    )
    assert parsed(row("conv", "correlation", tensor("x", "Half"), constants, tensor("y", "Half"))) == {
        "conv": ("correlation", ("Half",))
    }


def test_the_interface_is_omitted_and_layers_with_similar_names_are_not() -> None:
    found = parsed(
        row("first", "kgen", tensor("input", "Float"), "", tensor("a", "Half")),
        row("near", "kgen", tensor("input_2", "Float"), "", tensor("b", "Half")),
        row("last", "gemm", tensor("b", "Half"), "", tensor("logits", "Float", "-1,10")),
    )
    assert [types for _, types in found.values()] == [("Half",), ("Float", "Half"), ("Half",)]


def test_a_layer_name_may_hold_spaces_and_commas() -> None:
    name = "node_conv2d + PWN(relu, add)"
    assert parsed(row(name, "correlation", tensor("(Unnamed Layer* 3) [Shuffle]_output", "Float"))) == {
        name: ("correlation", ("Float",))
    }


def test_the_copy_of_the_logits_belongs_to_the_interface() -> None:
    found = parsed(
        row("linear", "gemm", tensor("x", "Half"), "", tensor("padded", "Float"), "[ONNX Layer: node_linear]"),
        row(
            "cut", "kgen", tensor("padded", "Float"), "", tensor("logits", "Float"), "[ONNX Layer: graph_output_cast0]"
        ),
    )
    assert found == {"linear": ("gemm", ("Half",)), "cut": ("kgen", ())}


@pytest.mark.parametrize(
    "sources",
    ["", "[ONNX Layer: node_linear]", "[ONNX Layer: graph_output_cast0]\x1f[ONNX Layer: node_linear]"],
)
def test_a_float32_kernel_that_computes_is_not_taken_for_a_copy(sources: str) -> None:
    found = parsed(row("linear", "gemm", tensor("wide", "Float"), "", tensor("logits", "Float"), sources))
    assert found == {"linear": ("gemm", ("Float",))}


@pytest.mark.parametrize("messages", [[], [""], ["Layers:"], ["no table", "Engine Metadata:"]])
def test_a_log_without_a_layer_table_has_no_layers_and_fails_the_precision_check(messages: list[str]) -> None:
    assert parse_layer_table(messages, {"input"}) == []
    with pytest.raises(AuditError, match="the build lists no kernel"):
        require_precision(engine_of(), FP16)


@pytest.mark.parametrize("types", [("Float",), ("Float", "Half"), ("BFloat16",), ("Half", "Int8")])
def test_one_kernel_of_another_type_is_found_among_many(types: tuple[str, ...]) -> None:
    engine = engine_of(
        ("shape", "shape_call", ()), ("a", "kgen", ("Half",)), ("odd", "correlation", types), ("b", "kgen", ("Half",))
    )
    with pytest.raises(AuditError) as caught:
        require_precision(engine, FP16)
    assert caught.value.message == (
        f"1 of 3 kernels of trt-rtx-fp16 do not run in Half: odd reads or writes {', '.join(types)}."
    )


def test_an_engine_of_bookkeeping_layers_alone_is_refused() -> None:
    with pytest.raises(AuditError, match="the build lists no kernel"):
        require_precision(engine_of(("a", "shape_call", ()), ("b", "signal", ("Int64",)), ("c", "wait", ())), FP32)


def test_a_float16_engine_is_refused_as_float32() -> None:
    with pytest.raises(AuditError, match="1 of 1 kernels of trt-rtx-fp32 do not run in Float: a reads or writes Half"):
        require_precision(engine_of(("a", "kgen", ("Half",))), FP32)


def inspected(kind: str, *tensors: dict[str, str]) -> EngineLayer:
    row = {"Name": "a", "LayerType": kind, "Inputs": list(tensors), "Outputs": []}
    (layer,) = parse_inspector(json.dumps({"Layers": [row], "Bindings": ["input"]}), {"input", "logits"})
    return layer


@pytest.mark.parametrize(
    ("tensor", "name"),
    [
        ({"Format/Datatype": "Channel major FP16 format where channel % 8 == 0"}, "Half"),
        ({"Format/Datatype": "Row major linear FP32"}, "Float"),
        ({"Format/Datatype": "Thirty-two wide channel vectorized row major Int8 format"}, "Int8"),
        ({"Format": "Row major linear", "DataType": "BF16"}, "BFloat16"),
        ({"Format": "Row major linear", "DataType": "Half"}, "Half"),
        ({"Format/Datatype": "N/A due to dynamic shapes"}, "unreadable"),
        ({}, "unreadable"),
    ],
)
def test_types_are_read_as_either_version_writes_them(tensor: dict[str, str], name: str) -> None:
    assert inspected("CaskConvolution", {"Name": "x", **tensor}).datatypes == (name,)
    assert inspected("CaskConvolution", {"Name": "input", **tensor}, {"Name": "y", **tensor}).datatypes == (name,)


def test_an_engine_that_lists_only_layer_names_fails_the_precision_check() -> None:
    (layer,) = parse_inspector('{"Layers": ["conv + relu"]}', set())
    with pytest.raises(AuditError, match="conv \\+ relu reads or writes unreadable"):
        require_precision(Engine(plan=Path("a"), layers=(layer,), version="11"), "trt-fp16")


LINEAR, CHANNELS_8 = "Row major linear FP32", "Channel major FP16 format where channel % 8 == 0"


def layer(name: str, kind: str, read: str, written: str, **more: object) -> dict[str, object]:
    """A row as TensorRT 10 writes it; ``read`` and ``written`` are "tensor: format", separated by semicolons."""

    def tensors(text: str) -> list[dict[str, object]]:
        pairs = [part.split(": ", 1) for part in text.split("; ") if part]
        return [
            {"Name": name, "Location": "Device", "Dimensions": [1, 8], "Format/Datatype": form} for name, form in pairs
        ]

    return {"Name": name, "LayerType": kind, "Inputs": tensors(read), "Outputs": tensors(written), **more}


def kernels(*rows: dict[str, object]) -> Engine:
    found = parse_inspector(json.dumps({"Layers": rows, "Bindings": ["input", "logits"]}), {"input", "logits"})
    return Engine(plan=Path("model.plan"), layers=tuple(found), version="10")


HALF_WEIGHTS = {"Weights": {"Type": "Half", "Count": 9408}, "Bias": {"Type": "Half", "Count": 64}}
#: The border of a real engine: the image is copied to another layout and then cast, the logits are copied and cut.
BORDER = (
    layer("[trainStation1]", "TrainStation", "", ""),
    layer("Reformatting CopyNode for Input Tensor 0 to cast", "Reformat", f"input: {LINEAR}", f"laid out: {LINEAR}"),
    layer("cast", "Reformat", f"laid out: {LINEAR}", f"half: {CHANNELS_8}", Origin="CAST"),
    layer("conv", "CaskConvolution", f"half: {CHANNELS_8}", f"y: {CHANNELS_8}", **HALF_WEIGHTS),
    layer("Reformatting CopyNode", "NoOp", f"y: {CHANNELS_8}", f"z: {CHANNELS_8}"),
    layer("fc", "CaskGemmConvolution", f"z: {CHANNELS_8}", f"padded: {LINEAR}", **HALF_WEIGHTS),
    layer("back", "Reformat", f"padded: {LINEAR}", f"long: {LINEAR}"),
    layer("cut", "kgen", f"long: {LINEAR}", f"logits: {LINEAR}", Metadata="[ONNX Layer: graph_output_cast0]"),
)


def test_float32_copies_at_the_border_of_an_engine_are_not_its_precision() -> None:
    engine = kernels(*BORDER)
    require_precision(engine, "trt-fp16")
    types = {row.name: row.datatypes for row in engine.layers}
    assert types["cast"] == types["conv"] == types["fc"] == ("Half",)
    assert types["back"] == types["cut"] == types["[trainStation1]"] == ()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (layer("conv", "CaskConvolution", f"laid out: {LINEAR}", f"y: {LINEAR}"), "conv reads or writes Float"),
        (
            layer("conv", "CaskConvolution", f"half: {CHANNELS_8}", f"y: {CHANNELS_8}", Weights={"Type": "Float"}),
            "conv reads or writes Float, Half",
        ),
        (layer("relu", "PointWiseV2", f"y: {CHANNELS_8}", f"u: {LINEAR}"), "relu reads or writes Float, Half"),
        (layer("fc", "gemm", f"wide: {LINEAR}", f"padded: {LINEAR}"), "fc reads or writes Float"),
        # A copy of what a kernel computed in float32 is no copy of the input.
        (layer("more", "Reformat", f"w: {LINEAR}; laid out: {LINEAR}", f"u: {LINEAR}"), "more reads or writes Float"),
        (layer("odd", "SomethingNew", "", ""), "odd reads or writes unreadable"),
    ],
)
def test_a_float32_kernel_within_the_border_is_named(wrong: dict[str, object], said: str) -> None:
    rows = [wrong if row["Name"] == wrong["Name"] else row for row in BORDER]
    rows += [] if wrong in rows else [wrong]
    with pytest.raises(AuditError, match=rf"^1 of [67] kernels of trt-fp16 do not run in Half: {said}\."):
        require_precision(kernels(*rows), "trt-fp16")


@pytest.mark.parametrize("kind", ["CaskConvolution", "correlation", "gemm", "CaskGemmConvolution"])
def test_int8_requires_that_every_multiplying_kernel_reads_int8(kind: str) -> None:
    def engine(*types: str) -> Engine:
        rows = ((kind, types), ("kgen", ("Float",)), ("Reformat", ("Float", "Int8")))
        layers = tuple(EngineLayer(name=f"{k} {i}", kind=k, datatypes=t) for i, (k, t) in enumerate(rows))
        return Engine(plan=Path("a"), layers=layers, version="10")

    require_precision(engine("Float", "Int8"), "trt-int8")
    with pytest.raises(
        AuditError, match=rf"1 of 3 kernels of trt-int8 do not run in Int8: {kind} 0 reads or writes Float"
    ):
        require_precision(engine("Float"), "trt-int8")
    with pytest.raises(AuditError, match="Half"):
        require_precision(engine("Half", "Int8"), "trt-int8")
