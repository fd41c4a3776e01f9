import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import helper

from kdexport.backends import backend, coreml
from kdexport.backends.base import Backend
from kdexport.backends.coreml_build import build
from kdexport.backends.weighted_nodes import weighted_nodes
from kdexport.bundle.manifest import MANIFEST, NOT_EXECUTED
from kdexport.core.console import quiet
from kdexport.errors import BackendUnavailableError, EngineBuildError
from kdexport.graph.precision import cast_to_fp16
from kdexport.verify.compiled_again import CHECK
from tests.conftest import Built, Command, run_command
from tests.kdexport.graph.int8_block import SIZE, block_graph
from tests.kdexport.optional_packages import require_coremltools

require_coremltools()
# coremltools warns about versions of packages that it was not tested with.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def runtime() -> Backend:
    return backend("coreml")


@pytest.fixture(scope="module")
def blocks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The residual network of the int8 tests as packages, built in this process: each import of coremltools is slow."""
    root = tmp_path_factory.mktemp("coreml")
    source = block_graph(root / "block.onnx")
    for precision in ("fp32", "fp16"):
        folder = root / precision
        folder.mkdir()
        (cast_to_fp16 if precision == "fp16" else shutil.copyfile)(source, folder / "model.onnx")
        with quiet():
            build(folder / "model.onnx", folder / coreml.PACKAGE, SIZE, half=precision == "fp16")
    return {precision: root / precision for precision in ("fp32", "fp16")}


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_package_as_it_was_built_holds_its_graph(precision: str, blocks: dict[str, Path], runtime: Backend) -> None:
    findings = {finding.check: finding for finding in runtime.audit(blocks[precision], precision, ())}
    assert [finding for finding in findings.values() if not finding.holds] == []
    assert findings["weights"].fact == "3 as in model.onnx"
    assert findings["one image"].fact == "takes (1, 3, 12, 12) and gives logits"
    assert runtime.describe(blocks[precision])["kernels"] == 3
    # A package of another precision is not what was asked.
    other = {"fp32": "fp16", "fp16": "fp32"}[precision]
    failed = {finding.check: finding for finding in runtime.audit(blocks[precision], other, ()) if not finding.holds}
    assert f"conv of stem (stem.weight): is stored in float{precision[2:]}" in failed[f"every weight in {other}"].fact


def test_a_package_is_built_and_not_executed_without_a_mac(
    blocks: dict[str, Path], runtime: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    assert runtime.unavailable("fp16") is None
    missing = runtime.not_executable("fp16")
    assert missing is not None
    assert "kdexport verify there" in missing.remedy
    with pytest.raises(BackendUnavailableError, match="Core ML runs on macOS only"):
        runtime.open(blocks["fp16"] / coreml.PROGRAM, "fp16")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert runtime.not_executable("fp16") is None


def test_the_same_graph_gives_the_same_package(blocks: dict[str, Path], tmp_path: Path) -> None:
    with quiet():
        build(blocks["fp32"] / "model.onnx", tmp_path / coreml.PACKAGE, SIZE, half=False)
    for path in (blocks["fp32"] / coreml.PACKAGE).rglob("*"):
        if path.is_file():
            again = tmp_path / path.relative_to(blocks["fp32"])
            assert again.read_bytes() == path.read_bytes(), path.name


# Faults


def stored(
    place: int, what: str, change: Callable[[NDArray[np.float32]], NDArray[np.float32]]
) -> Callable[[Path], None]:
    """Change the values of a layer in the program or the file of weights, wherever they are."""

    def edit(folder: Path) -> None:
        node = weighted_nodes(onnx.load(str(folder / "model.onnx")))[place]
        values = node.weight if what == "weight" else node.bias
        assert values is not None
        old, new = values.tobytes(), np.ascontiguousarray(change(values), np.float32).tobytes()
        done = 0
        for path in (folder / coreml.PROGRAM, (folder / coreml.PROGRAM).parent / "weights" / "weight.bin"):
            data = path.read_bytes() if path.is_file() else b""
            done += data.count(old)
            if old in data:
                path.write_bytes(data.replace(old, new))
        assert done == 1

    return edit


def program(change: Callable[[Any], None]) -> Callable[[Path], None]:
    """Change the operators of the program."""

    def edit(folder: Path) -> None:
        from coremltools.proto import Model_pb2

        spec = Model_pb2.Model.FromString((folder / coreml.PROGRAM).read_bytes())
        function = spec.mlProgram.functions["main"]
        change(function.block_specializations[function.opset])
        (folder / coreml.PROGRAM).write_bytes(spec.SerializeToString())

    return edit


def strided(block: Any) -> None:
    name = _of(block, "conv")[0].inputs["strides"].arguments[0].name
    (const,) = [operation for operation in block.operations if operation.outputs[0].name == name]
    const.attributes["val"].immediateValue.tensor.ints.values[:] = [2, 2]


def without_activation(block: Any) -> None:
    """What read the first activation reads the convolution."""
    relu = _of(block, "relu")[0]
    for operation in block.operations:
        for given in operation.inputs.values():
            for argument in given.arguments:
                if argument.name == relu.outputs[0].name:
                    argument.name = relu.inputs["x"].arguments[0].name


def _of(block: Any, kind: str) -> list[Any]:
    return [operation for operation in block.operations if operation.type == kind]


@pytest.mark.parametrize(
    ("edit", "check", "words"),
    [
        (stored(0, "weight", lambda w: w * 2), "weights", "conv of stem (stem.weight): 162 of 162 values differ"),
        (stored(2, "weight", lambda w: w[[1, 0, 2, 3, 4]]), "weights", "linear of linear (linear.weight): 12 of 30"),
        (stored(1, "bias", np.zeros_like), "biases", "conv of inner (inner.weight): 6 of 6 values differ"),
        (program(strided), "each layer is one of the graph", "conv of stem (stem.weight): has the geometry"),
        (program(without_activation), "each layer is one of the graph", "no activation, expected Relu"),
    ],
)
def test_a_changed_package_is_found_and_its_layer_is_named(
    edit: Callable[[Path], None], check: str, words: str, blocks: dict[str, Path], runtime: Backend, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(blocks["fp32"], tmp_path / "t"))
    edit(folder)
    failed = {finding.check: finding for finding in runtime.audit(folder, "fp32", ()) if not finding.holds}
    assert check in failed
    assert words in failed[check].fact


def test_a_damaged_package_is_refused(blocks: dict[str, Path], runtime: Backend, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(blocks["fp32"], tmp_path / "t"))
    (folder / coreml.PROGRAM).write_bytes((folder / coreml.PROGRAM).read_bytes()[:100])
    (found,) = runtime.audit(folder, "fp32", ())
    assert (found.check, found.holds) == ("readable", False)


def test_an_operator_that_is_not_known_is_named(tmp_path: Path) -> None:
    model = onnx.load(str(block_graph(tmp_path / "model.onnx")))
    model.graph.node[0].output[0] = "before"
    model.graph.node.insert(1, helper.make_node("Erf", ["before"], ["stem"], "odd"))
    onnx.save(model, str(tmp_path / "model.onnx"))
    with pytest.raises(EngineBuildError, match=r"the operator Erf \(odd, which reads before\)"), quiet():
        build(tmp_path / "model.onnx", tmp_path / coreml.PACKAGE, SIZE, half=False)


# The whole way


def test_a_bundle_holds_the_whole_package_and_is_verified_without_a_mac(
    built: Built, here: Command, tmp_path: Path
) -> None:
    out, slim = tmp_path / "bundle", tmp_path / "slim"
    done = run_command(
        "build", "--config", built.config, "--checkpoint", built.checkpoint, "--workspace", built.workspace,
        "--out", out, "--target", "coreml-fp16", "--json",
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    data = json.loads((out / MANIFEST).read_text())
    assert data["targets"]["coreml-fp16"]["status"] == NOT_EXECUTED
    held = {name.partition(f"{coreml.PACKAGE}/")[2] for name in data["files"] if coreml.PACKAGE in name}
    assert held == {
        "Manifest.json", "Data/com.apple.CoreML/model.mlmodel", "Data/com.apple.CoreML/weights/weight.bin"
    }  # fmt: skip
    # Three processes wrote the same bytes.
    done = here("verify", out, "--json")
    assert done.exit_code == 0, done.stderr
    for checks in (data["parity"], json.loads(done.stdout)["result"]["checks"]):
        (again,) = (check for check in checks if check["name"] == CHECK)
        assert again["holds"], again["detail"]
    done = here("slim", out, "--out", slim)
    assert done.exit_code == 0, done.stderr
    assert (slim / "targets" / "coreml-fp16" / coreml.PROGRAM).is_file()
