import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import helper

from kdexport.backends import backend, litert
from kdexport.backends.base import IN_ORDER, Backend
from kdexport.backends.litert_content import layers_of
from kdexport.backends.litert_files import import_schema, read_model
from kdexport.backends.litert_graph import lite_model
from kdexport.backends.ort import load_model
from kdexport.bundle.manifest import MANIFEST, NOT_EXECUTED, VERIFIED
from kdexport.errors import AuditError, BackendUnavailableError, EngineBuildError
from tests.conftest import Built, Command, build_targets
from tests.kdexport.backends.compiled_targets import compiled, compiled_blocks
from tests.kdexport.exported_students import exported, images, small_graph, small_logits, small_weights
from tests.kdexport.graph.int8_block import SIZE, block_graph, block_tensors
from tests.kdexport.optional_packages import require_litert

require_litert()

TARGETS = ("litert-fp32", "litert-fp16", "litert-int8")
Edit = Callable[[Any], None]


@pytest.fixture(scope="module")
def runtime() -> Backend:
    return backend("litert")


@pytest.fixture(scope="module")
def blocks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The residual network of the int8 tests in each precision."""
    return compiled_blocks("litert", tmp_path_factory.mktemp("litert"))


@pytest.mark.parametrize(("batch", "size"), [(1, 16), (5, 15)])
def test_logits_are_those_of_an_independent_computation(
    batch: int, size: int, tmp_path: Path, runtime: Backend
) -> None:
    source = small_graph(tmp_path / "a.onnx", small_weights(), size=size)
    path = compiled("litert", source, "fp32", tmp_path / "t", size=size)
    runner, x = runtime.open(path, "fp32", threads=1), images(batch, size=size)
    np.testing.assert_allclose(runner.logits(x), small_logits(x), rtol=0, atol=2e-6)
    first = runner.logits(x[:1])
    runner.logits(x[::-1])
    assert np.array_equal(first, runner.logits(x[:1]))
    assert runner.execution.to_json() == {
        "runtime": "LiteRT", "version": runner.execution.version, "device": "XNNPACK", "types": ["float32"],
    }  # fmt: skip
    assert [finding.holds for finding in runner.findings()] == [True]
    assert "outside of it: none" in runner.findings()[0].fact


def test_int8_is_the_noise_of_its_levels(blocks: dict[str, Path], runtime: Backend) -> None:
    runner, x = runtime.open(blocks["int8"], "int8", threads=1), images(20, 5, size=SIZE)
    exact = block_tensors(x, None)["logits"].numpy()
    simulated = block_tensors(x, "int8-u8")["logits"].numpy()
    noise = np.sqrt(np.mean((simulated - exact) ** 2))
    assert noise / 3 < np.sqrt(np.mean((runner.logits(x) - exact) ** 2)) < 1.5 * noise
    # Integers: nearly every value is that of the exact computation with these levels.
    assert np.sqrt(np.mean((runner.logits(x) - simulated) ** 2)) < noise / 3
    assert runner.execution.types == ("int8",)


def test_float16_is_stored_and_not_said_to_run(blocks: dict[str, Path], runtime: Backend) -> None:
    missing = runtime.not_executable("fp16")
    assert missing is not None
    assert "multiplies in float32" in missing.reason
    assert runtime.unavailable("fp16") is None
    with pytest.raises(BackendUnavailableError, match="widens float16 weights"):
        runtime.open(blocks["fp16"], "fp16")
    assert runtime.stand_in("fp16") == "fp32"
    assert runtime.stand_in("fp32") is None
    x = images(6, 5, size=SIZE)
    found = runtime.open_stand_in(blocks["fp16"], "fp16").logits(x)
    exact = block_tensors(x, None)["logits"].numpy()
    plain = runtime.open(blocks["fp32"], "fp32").logits(x)
    # Weights of float16 are there: farther away than float32, and not farther than 11 bits are.
    assert np.abs(plain - exact).max() < np.abs(found - exact).max() < 2e-3 * np.abs(exact).max()
    assert {layer.weight.kind for layer in layers_of(read_model(blocks["fp16"].read_bytes()))} == {"FLOAT16"}


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_a_file_as_it_was_built_holds_its_graph(precision: str, blocks: dict[str, Path], runtime: Backend) -> None:
    findings = {finding.check: finding for finding in runtime.audit(blocks[precision].parent, precision, ())}
    assert [finding for finding in findings.values() if not finding.holds] == []
    assert findings["weights"].fact == "3 layers as in model.onnx, bit for bit"
    assert findings["one image, channels last"].fact == (
        "takes (1, 12, 12, 3) and gives (1, 5), float32; 0 operators that move axes"
    )
    if precision == "int8":
        assert findings["layers multiply levels"].fact == (
            "1 tensors are widened to float32; operators that read float32: none"
        )
    described = runtime.describe(blocks[precision].parent)
    assert described["kernels"] == 3
    assert described["layers"]["CONV_2D"] == 2


def test_float32_sums_start_with_the_bias(tmp_path: Path, runtime: Backend) -> None:
    """What the simulation of rung B supposes: each product is half of the last bit of the bias and is lost."""
    weights: dict[str, NDArray[np.float32]] = {
        "conv.weight": np.ones((2, 3, 1, 1), np.float32), "conv.bias": np.array([2**24, 0], np.float32),
        "linear.weight": np.eye(2, dtype=np.float32), "linear.bias": np.zeros(2, np.float32),
    }  # fmt: skip
    model = onnx.load(str(small_graph(tmp_path / "a.onnx", weights, size=16)))
    del model.graph.node[0].attribute[:]
    onnx.save(model, str(tmp_path / "a.onnx"))
    path = compiled("litert", tmp_path / "a.onnx", "fp32", tmp_path / "t", size=16)
    x = np.ones((1, 3, 16, 16), np.float32)
    assert runtime.open(path, "fp32", threads=1).logits(x).tolist() == [[2.0**24, 3.0]]
    assert runtime.computes_in("fp32", {}) == IN_ORDER
    assert runtime.computes_in("int8", {}) == "int8-u8"


# Faults


def rewritten(path: Path, edit: Edit) -> None:
    """Change the tables of a file and write it again, by the schema's own code."""
    import flatbuffers

    schema = import_schema()
    model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(path.read_bytes()))
    edit(model)
    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), b"TFL3")
    path.write_bytes(bytes(builder.Output()))


def place_of(model: Any, name: str) -> Any:
    (found,) = (tensor for tensor in model.subgraphs[0].tensors if tensor.name == name.encode())
    return found


def values(name: str, dtype: type, change: Callable[[Any], Any]) -> Edit:
    def edit(model: Any) -> None:
        buffer = model.buffers[place_of(model, name).buffer]
        buffer.data = np.frombuffer(change(buffer.data.view(dtype).copy()).astype(dtype).tobytes(), np.uint8)

    return edit


def scales(name: str, factor: float) -> Edit:
    def edit(model: Any) -> None:
        quantization = place_of(model, name).quantization
        quantization.scale = (quantization.scale * np.float32(factor)).astype(np.float32)

    return edit


def option(number: int, name: str, value: int) -> Edit:
    def edit(model: Any) -> None:
        operators = [o for o in model.subgraphs[0].operators if hasattr(o.builtinOptions, "fusedActivationFunction")]
        setattr(operators[number].builtinOptions, name, value)

    return edit


def swapped(levels: Any) -> Any:
    return levels.reshape(5, -1)[[1, 0, 2, 3, 4]].reshape(-1)


def in_float32(model: Any) -> None:
    tensor = place_of(model, "inner.weight")
    buffer, scale = model.buffers[tensor.buffer], tensor.quantization.scale
    wide = buffer.data.view(np.int8).reshape(6, -1) * scale[:, None]
    buffer.data, tensor.type = np.frombuffer(wide.astype(np.float32).tobytes(), np.uint8), 0
    tensor.quantization = None


def rewired(model: Any) -> None:
    """The mean reads the stem instead of the sum."""
    operators = model.subgraphs[0].operators
    mean = next(o for o in operators if type(o.builtinOptions).__name__ == "ReducerOptionsT")
    mean.inputs = np.array([operators[0].outputs[0], mean.inputs[1]], np.int32)


def without_bias(model: Any) -> None:
    conv = model.subgraphs[0].operators[0]
    conv.inputs = np.array([*conv.inputs[:2], -1], np.int32)


def with_other_options(model: Any) -> None:
    operators = model.subgraphs[0].operators
    operators[0].builtinOptions, operators[0].builtinOptionsType = None, 0


def with_a_place_too_far(model: Any) -> None:
    conv = model.subgraphs[0].operators[0]
    conv.inputs = np.array([conv.inputs[0], 4000, conv.inputs[2]], np.int32)


def renamed(model: Any) -> None:
    place_of(model, "inner.weight").name = b"other.weight"


@pytest.mark.parametrize(
    ("precision", "edit", "check", "words"),
    [
        ("fp32", values("inner.weight", np.float32, lambda w: w * 1.01), "weights", "inner.weight (inner): 36 of 36"),
        ("fp32", values("linear.weight", np.float32, swapped), "weights", "(linear): 12 of 30 values"),
        ("fp32", values("stem.bias", np.float32, np.zeros_like), "biases", "CONV_2D of stem.weight (stem): 6 of 6"),
        ("fp16", values("stem.weight", np.float16, lambda w: w + np.float16(2**-9)), "weights", "(stem)"),
        ("int8", values("stem.weight", np.int8, lambda w: -w), "weights", "(stem)"),
        ("int8", values("linear.weight", np.int8, swapped), "weights", "first in output 0"),
        ("int8", values("linear.bias", np.int32, np.zeros_like), "biases", "FULLY_CONNECTED of linear.weight (linear)"),
        ("int8", scales("inner.weight", 1.1), "scales", "(inner): weight scales: 6 differ"),
        ("int8", scales("inner.bias", 1.1), "scales", "(inner): the scales of its bias"),
        ("int8", scales("input_QuantizeLinear_Output", 1.1), "scales", "(stem): reads the levels"),
        ("int8", in_float32, "every weight in int8", "(inner): is stored in float32, expected int8"),
        ("fp32", option(0, "strideH", 2), "each layer is one of the graph", "(stem): has the geometry"),
        ("fp32", option(0, "padding", 1), "each layer is one of the graph", "(stem): has the geometry"),
        ("fp32", option(0, "fusedActivationFunction", 0), "each layer is one of the graph", "expected Relu"),
        ("fp32", without_bias, "biases", "CONV_2D of stem.weight (stem): the bias is missing"),
        ("fp32", with_other_options, "readable", "do not fit together"),
        ("fp32", with_a_place_too_far, "readable", "reads a tensor that is not in the file"),
        ("fp32", rewired, "each layer is one of the graph", "(linear): reads the result of stem, expected inner, stem"),
        ("fp32", renamed, "each layer is one of the graph", "CONV_2D of other.weight; the graph has 3 with weights"),
    ],
)  # fmt: skip
def test_a_changed_file_is_found_and_its_layer_is_named(
    precision: str, edit: Edit, check: str, words: str, blocks: dict[str, Path], runtime: Backend, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(blocks[precision].parent, tmp_path / "t"))
    rewritten(folder / litert.MODEL, edit)
    failed = {finding.check: finding for finding in runtime.audit(folder, precision, ()) if not finding.holds}
    assert check in failed
    assert words in failed[check].fact


def test_a_file_that_is_only_written_again_holds(blocks: dict[str, Path], runtime: Backend, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(blocks["int8"].parent, tmp_path / "t"))
    rewritten(folder / litert.MODEL, lambda _: None)
    assert all(finding.holds for finding in runtime.audit(folder, "int8", ()))


@pytest.mark.parametrize(
    "change", [lambda data: data[:-200], lambda data: data[:40], lambda _: b"", lambda _: b"x" * 99]
)
def test_a_damaged_file_is_refused_before_the_interpreter_reads_it(
    change: Callable[[bytes], bytes], blocks: dict[str, Path], runtime: Backend, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(blocks["fp32"].parent, tmp_path / "t"))
    path = folder / litert.MODEL
    path.write_bytes(change(path.read_bytes()))
    failed = [finding for finding in runtime.audit(folder, "fp32", ()) if not finding.holds]
    assert failed
    if failed[0].check == "readable":
        with pytest.raises(AuditError, match="cannot be read"):
            runtime.open(path, "fp32")


def test_operators_outside_of_the_delegate_are_named(
    blocks: dict[str, Path], runtime: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    def without(**given: Any) -> Any:
        return Interpreter(**given, experimental_op_resolver_type=OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES)

    monkeypatch.setattr(litert, "import_interpreter", lambda: without)
    runner = runtime.open(blocks["fp32"], "fp32")
    assert runner.execution.device == "reference kernels"
    (found,) = runner.findings()
    assert not found.holds
    assert "0 calls of XNNPACK; outside of it: 1 ADD, 2 CONV_2D, 1 FULLY_CONNECTED" in found.fact


def operation(index: int, name: str, inputs: list[int], outputs: list[int]) -> dict[str, Any]:
    return {"index": index, "op_name": name, "inputs": inputs, "outputs": outputs}


def test_what_lies_between_two_calls_of_the_delegate_is_outside() -> None:
    plain = [
        operation(0, "CONV_2D", [0, 10], [1]), operation(1, "ERF", [1], [2]), operation(2, "CONV_2D", [2, 11], [3]),
        operation(3, "MEAN", [3], [4]),
    ]  # fmt: skip
    calls = [operation(4, "DELEGATE", [0, 10], [1]), operation(5, "DELEGATE", [2, 11], [4])]
    found = litert.delegation([*plain, *calls])
    assert (found.calls, found.inside, found.outside) == (2, 3, ("ERF",))
    assert litert.delegation([*plain, calls[1]]).outside == ("CONV_2D", "ERF")


def test_kept_layers_are_in_float32_and_no_others(tmp_path: Path, runtime: Backend) -> None:
    path = compiled("litert", block_graph(tmp_path / "a.onnx"), "int8", tmp_path / "t", kept=("inner",))
    findings = {finding.check: finding for finding in runtime.audit(path.parent, "int8", ("inner",))}
    assert [finding for finding in findings.values() if not finding.holds] == []
    wrong = {finding.check for finding in runtime.audit(path.parent, "int8", ()) if not finding.holds}
    assert wrong == {"every weight in int8", "layers multiply levels"}


def test_an_operator_that_is_not_known_is_named_with_its_place(tmp_path: Path) -> None:
    model = onnx.load(str(small_graph(tmp_path / "a.onnx", small_weights())))
    conv, relu = model.graph.node[0], model.graph.node[1]
    conv.output[0] = "before"
    model.graph.node.insert(1, helper.make_node("Erf", ["before"], [relu.input[0]], "odd"))
    with pytest.raises(EngineBuildError, match=r"the operator Erf \(odd, which reads before\)") as caught:
        lite_model(model)
    assert "onnx-fp32" in caught.value.remedy


@pytest.mark.parametrize("name", ["mobilenetv3", "shufflenetv1"])
def test_students_with_gates_and_with_shuffles_of_grouped_convolutions(
    name: str, tmp_path: Path, runtime: Backend
) -> None:
    source = exported("plain", name).path
    path = compiled("litert", source, "fp32", tmp_path / "t", size=32)
    assert [finding for finding in runtime.audit(path.parent, "fp32", ()) if not finding.holds] == []
    runner, x = runtime.open(path, "fp32", threads=1), images(3)
    theirs = load_model(source).logits(x)
    np.testing.assert_allclose(runner.logits(x), theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())
    assert "outside of it: none" in runner.findings()[0].fact


# The whole way


@pytest.fixture(scope="module")
def bundle(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The student of the shared bundle for LiteRT."""
    return build_targets(built, TARGETS, tmp_path_factory.mktemp("litert") / "bundle")


def test_a_bundle_says_what_ran_and_what_did_not(bundle: Path) -> None:
    data = json.loads((bundle / MANIFEST).read_text())
    assert {name: entry["status"] for name, entry in data["targets"].items()} == {
        "litert-fp32": VERIFIED, "litert-fp16": NOT_EXECUTED, "litert-int8": VERIFIED,
    }  # fmt: skip
    assert {entry["images_per_run"] for entry in data["targets"].values()} == {1}
    assert data["targets"]["litert-int8"]["executed"]["types"] == ["int8"]
    assert data["versions"]["ai-edge-litert"]
    checks = {(check["rung"], check["subject"], check["name"]): check for check in data["parity"]}
    assert checks["B", "targets/litert-fp32/model.tflite", "rms error"]["unit"] == "x sums in order"
    assert checks["C", "targets/litert-fp16/model.tflite in fp32", "rms error"]["holds"]
    assert checks["D", "targets/litert-int8/model.tflite", "flips"]["holds"]
    assert checks["audit", "targets/litert-int8/model.tflite", "layers with weights in XNNPACK"]["holds"]


def test_a_bundle_is_verified_by_itself(bundle: Path, here: Command) -> None:
    done = here("verify", bundle, "--require-executed", "litert-fp32,litert-int8")
    assert done.exit_code == 0, done.stderr
    assert "LiteRT 2." in done.stdout
    assert here("verify", bundle, "--require-executed", "litert-fp16").exit_code == 3
