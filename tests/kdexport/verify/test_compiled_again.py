import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kdexport import __version__
from kdexport.backends import ncnn
from kdexport.backends.base import CompileRequest, Finding, first_difference
from kdexport.backends.litert_files import import_schema, table_difference
from kdexport.core.digests import tool_versions
from kdexport.errors import BackendUnavailableError, EngineBuildError, KdexportError
from kdexport.targets import parse_target
from kdexport.verify.compiled_again import CHECK, check_compiled_again
from tests.kdexport.exported_students import images
from tests.kdexport.graph.int8_block import SIZE, block_graph
from tests.kdexport.optional_packages import require_litert, require_ncnn

require_litert()
require_ncnn()


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The residual network of the int8 tests for two backends."""
    found = {}
    for name in ("litert-fp32", "ncnn-fp32"):
        target, folder = parse_target(name), tmp_path_factory.mktemp(name)
        path = block_graph(folder / "model.onnx")
        target.runtime.compile(
            CompileRequest(onnx=path, folder=folder, precision="fp32", image_size=SIZE, batches=(1, 8, 64))
        )
        found[name] = folder
    return found


def checked(folder: Path, name: str, **versions: str) -> Finding:
    """The check of a target in ``folder``; ``versions`` are other ones than here, as if recorded at the build."""
    target = parse_target(name)
    manifest: Any = SimpleNamespace(
        data={
            "versions": tool_versions(*target.runtime.packages) | versions,
            "kdexport": versions.get("kdexport", __version__),
            "export": {"min_batch": 1, "opt_batch": 8, "max_batch": 64},
        },
        spec=SimpleNamespace(image_size=SIZE),
    )
    found = check_compiled_again(folder, target, manifest, ())
    assert found is not None
    assert found.check == CHECK
    return found


@pytest.mark.parametrize("name", ["litert-fp32", "ncnn-fp32"])
def test_the_files_of_a_build_are_those_of_another_one(name: str, targets: dict[str, Path]) -> None:
    found = checked(targets[name], name)
    assert found.holds, found.fact


def with_doubled_logits(folder: Path) -> None:
    """Double the logits: an operator that reads no weight."""
    import flatbuffers

    schema = import_schema()
    path = folder / "model.tflite"
    model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(path.read_bytes()))
    graph = model.subgraphs[0]
    (last,) = graph.outputs
    maker = next(operator for operator in graph.operators if last in operator.outputs)
    hidden = len(graph.tensors)
    tensor = schema.TensorT()
    tensor.name, tensor.type, tensor.buffer, tensor.shape = b"hidden", 0, 0, np.asarray(graph.tensors[last].shape)
    graph.tensors.append(tensor)
    maker.outputs = np.asarray([hidden], np.int32)
    added = schema.OperatorT()
    code = schema.OperatorCodeT()
    code.builtinCode = code.deprecatedBuiltinCode = schema.BuiltinOperator.ADD
    code.version = 1
    model.operatorCodes.append(code)
    added.opcodeIndex = len(model.operatorCodes) - 1
    added.inputs, added.outputs = np.asarray([hidden, hidden], np.int32), np.asarray([last], np.int32)
    added.builtinOptionsType, added.builtinOptions = schema.BuiltinOptions.AddOptions, schema.AddOptionsT()
    graph.operators.append(added)
    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), b"TFL3")
    path.write_bytes(bytes(builder.Output()))


def with_a_factor(folder: Path) -> None:
    """Multiply the logits of ncnn's file by one."""
    path = (folder / ncnn.MODEL).with_suffix(".param")
    lines = path.read_text().splitlines()
    layers, blobs = map(int, lines[1].split())
    lines[1] = f"{layers + 1} {blobs + 1}"
    lines[-1] = lines[-1].replace("out0", "hidden")
    lines.append("BinaryOp factor 1 1 hidden out0 0=2 1=1 2=1.0")
    path.write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("litert-fp32", with_doubled_logits, "model.tflite: operatorCodes has"),
        ("ncnn-fp32", with_a_factor, "model.ncnn.param: line 2 is"),
    ],
)
def test_an_operator_that_the_graph_lacks_is_found_where_every_layer_and_logit_is_right(
    name: str, change: Callable[[Path], None], said: str, targets: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "target"
    shutil.copytree(targets[name], folder)
    change(folder)
    target, x = parse_target(name), images(3, size=SIZE)
    if change is with_a_factor:
        before, after = (
            target.runtime.open(place / target.artifact, "fp32", threads=1).logits(x)
            for place in (targets[name], folder)
        )
        assert np.array_equal(before, after)
    assert [found for found in target.runtime.audit(folder, "fp32", ()) if not found.holds] == []
    found = checked(folder, name)
    assert (found.ran, found.holds) == (True, False)
    assert said in found.fact


def test_other_versions_of_the_tools_are_named_and_nothing_is_decided(targets: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "target"
    shutil.copytree(targets["ncnn-fp32"], folder)
    with_a_factor(folder)
    for versions, named in (
        ({"pnnx": "20200101"}, "pnnx 20200101 at the build"),
        ({"kdexport": "0.0.1"}, "kdexport 0.0.1"),
    ):
        found = checked(folder, "ncnn-fp32", **versions)
        assert not found.ran
        assert named in found.fact
        assert "line 2" in found.fact
    # Where the files are equal all the same, the versions do not matter.
    assert checked(targets["litert-fp32"], "litert-fp32", kdexport="0.0.1").holds


def test_a_missing_file_is_named(targets: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "target"
    shutil.copytree(targets["ncnn-fp32"], folder)
    (folder / ncnn.MODEL).unlink()
    assert checked(folder, "ncnn-fp32").fact == f"{ncnn.MODEL} is missing"


def test_without_the_tools_it_does_not_run(targets: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    found = checked(targets["ncnn-fp32"], "ncnn-fp32")
    assert not found.ran
    assert "is not installed" in found.fact


@pytest.mark.parametrize("error", [EngineBuildError, BackendUnavailableError])
def test_tools_that_do_not_work_decide_nothing(
    error: type[KdexportError], targets: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error("pnnx is not whole.", remedy="Install it again.")

    monkeypatch.setattr(ncnn.Ncnn, "compile", fail)
    found = checked(targets["ncnn-fp32"], "ncnn-fp32")
    assert not found.ran
    assert found.fact == "model.onnx could not be compiled here: pnnx is not whole"


def test_where_two_files_differ() -> None:
    assert first_difference(b"a\nb\n", b"a\nc\n") == "line 2 is 'b', expected 'c'"
    assert first_difference(b"a\n", b"a\nc\n") == "line 2 is '', expected 'c'"
    assert first_difference(b"a\r\n", b"a\n") == "the ends of lines differ"
    assert first_difference(b"\xff\x00\x01", b"\xff\x00") == "differs from byte 2 on; 3 bytes, expected 2"
    assert first_difference(b"\xff\x01\x01", b"\xff\x00\x01").startswith("differs from byte 1 on")


def test_tables_are_equal_however_they_lie_in_the_file(targets: dict[str, Path]) -> None:
    import flatbuffers

    data = (targets["litert-fp32"] / "model.tflite").read_bytes()
    schema = import_schema()
    model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(data))
    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), b"TFL3")
    again = bytes(builder.Output())
    assert again != data
    assert table_difference(again, data) == ""
    model.subgraphs[0].operators[0].builtinOptions.strideH = 2
    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), b"TFL3")
    said = table_difference(bytes(builder.Output()), data)
    assert said == "subgraphs[0].operators[0].builtinOptions.strideH is 2, expected 1"
