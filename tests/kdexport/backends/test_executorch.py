import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from kdexport.backends import backend, executorch_content
from kdexport.backends.base import Backend, CompileRequest
from kdexport.backends.executorch import PROGRAM
from kdexport.backends.executorch_content import ProgramContent
from kdexport.backends.weighted_nodes import weighted_nodes
from kdexport.errors import AuditError, EngineBuildError
from tests.kdexport.backends.compiled_targets import compiled_blocks
from tests.kdexport.exported_students import images
from tests.kdexport.graph.int8_block import SIZE, block_graph, block_tensors
from tests.kdexport.optional_packages import require_executorch

require_executorch()


@pytest.fixture(scope="module")
def runtime() -> Backend:
    return backend("executorch")


@pytest.fixture(scope="module")
def blocks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The residual network of the int8 tests as programs: their build imports compilers, so that it is done once."""
    made = compiled_blocks("executorch", tmp_path_factory.mktemp("executorch"))
    return {precision: path.parent for precision, path in made.items()}


def test_logits_are_those_of_an_independent_computation(blocks: dict[str, Path], runtime: Backend) -> None:
    runner, x = runtime.open(blocks["fp32"] / PROGRAM, "fp32"), images(5, 3, size=SIZE)
    exact = block_tensors(x, None)["logits"].numpy()
    np.testing.assert_allclose(runner.logits(x), exact, rtol=0, atol=2e-6 * np.abs(exact).max())
    # A result is not overwritten by the next run.
    first = runner.logits(x[:1])
    runner.logits(x[1:])
    assert np.array_equal(first, runner.logits(x[:1]))
    assert runner.execution.runtime == "ExecuTorch"
    assert runner.execution.device == "XnnpackBackend"


def test_int8_is_the_noise_of_its_levels(blocks: dict[str, Path], runtime: Backend) -> None:
    x = images(20, 5, size=SIZE)
    exact = block_tensors(x, None)["logits"].numpy()
    simulated = block_tensors(x, "int8-u8")["logits"].numpy()
    noise = np.sqrt(np.mean((simulated - exact) ** 2))
    found = runtime.open(blocks["int8"] / PROGRAM, "int8").logits(x)
    assert noise / 3 < np.sqrt(np.mean((found - exact) ** 2)) < 1.5 * noise


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_program_as_it_was_built_holds_its_graph(precision: str, blocks: dict[str, Path], runtime: Backend) -> None:
    findings = {finding.check: finding for finding in runtime.audit(blocks[precision], precision, ())}
    assert all(finding.holds for finding in findings.values())
    assert findings["layers with weights in XNNPACK"].fact == "1 calls of XNNPACK; 0 operators outside of it: none"
    assert findings["weights"].fact.startswith("3 as in")
    assert findings["biases"].fact.startswith("3 as in")
    assert runtime.describe(blocks[precision])["layers"] == {"calls of XNNPACK": 1}


@pytest.mark.parametrize(
    ("precision", "place", "what", "check"),
    [
        ("fp32", 2, "classes", "weights"), ("fp32", 1, "scale", "weights"), ("fp32", 0, "bias", "biases"),
        ("int8", 2, "classes", "weights"), ("int8", 0, "bias", "biases"),
    ],
)  # fmt: skip
def test_a_changed_program_is_found_and_its_layer_is_named(
    precision: str, place: int, what: str, check: str, blocks: dict[str, Path], runtime: Backend, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(blocks[precision], tmp_path / "t"))
    node = weighted_nodes(onnx.load(str(folder / "model.onnx")))[place]
    data = (folder / PROGRAM).read_bytes()
    forms = executorch_content._bias_forms(node) if what == "bias" else executorch_content._weight_forms(node)
    (form,) = (form for form in forms if form.tobytes() in data)
    changed = {"classes": form[[1, 0, *range(2, len(form))]], "scale": form * 2, "bias": form * 0}[what]
    (folder / PROGRAM).write_bytes(data.replace(form.tobytes(), changed.astype(form.dtype).tobytes()))
    failed = {finding.check: finding for finding in runtime.audit(folder, precision, ()) if not finding.holds}
    assert list(failed) == [check]
    assert f"are not in the program: {node}" in failed[check].fact


def test_a_layer_in_float32_where_int8_was_asked_is_named(
    blocks: dict[str, Path], runtime: Backend, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(blocks["int8"], tmp_path / "t"))
    node = weighted_nodes(onnx.load(str(folder / "model.onnx")))[1]
    with (folder / PROGRAM).open("ab") as stream:
        stream.write(executorch_content._orders(node.weight)[0].tobytes())
    (failed,) = (f for f in runtime.audit(folder, "int8", ()) if f.check == "every weight in int8")
    assert failed.fact == f"{node} is in the program in float32"
    wrong = [f.fact for f in runtime.audit(blocks["fp32"], "int8", ()) if not f.holds]
    assert "is float32 in the graph" in wrong[0]


def test_a_node_outside_of_the_delegate_is_named(
    blocks: dict[str, Path], runtime: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = ProgramContent(
        delegates=("XnnpackBackend",), calls=2, outside=("permute_copy.out", "convolution.out"), shapes=()
    )
    monkeypatch.setattr(executorch_content, "read_program", lambda _: content)
    (found,) = (f for f in runtime.audit(blocks["fp32"], "fp32", ()) if "XNNPACK" in f.check)
    assert not found.holds
    assert found.fact.endswith("2 operators outside of it: convolution.out, permute_copy.out")


def test_a_damaged_program_is_refused(blocks: dict[str, Path], runtime: Backend, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(blocks["fp32"], tmp_path / "t"))
    (folder / PROGRAM).write_bytes((folder / PROGRAM).read_bytes()[:40])
    (found,) = runtime.audit(folder, "fp32", ())
    assert (found.check, found.holds) == ("readable", False)
    with pytest.raises(AuditError, match="cannot be read"):
        runtime.open(folder / PROGRAM, "fp32")


def test_an_operator_that_is_not_known_is_told_by_the_parent(runtime: Backend, tmp_path: Path) -> None:
    model = onnx.load(str(block_graph(tmp_path / "model.onnx")))
    model.graph.node[0].output[0] = "before"
    model.graph.node.insert(1, helper.make_node("Erf", ["before"], ["stem"], "odd"))
    onnx.save(model, str(tmp_path / "model.onnx"))
    request = CompileRequest(
        onnx=tmp_path / "model.onnx", folder=tmp_path, precision="fp32", image_size=SIZE, batches=(1, 1, 1)
    )
    with pytest.raises(EngineBuildError, match=r"the operator Erf \(odd, which reads before\)"):
        runtime.compile(request)
    assert not (tmp_path / PROGRAM).exists()
