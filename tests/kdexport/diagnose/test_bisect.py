"""Seeded faults are named by their node, and the files that reproduce them run without kdexport."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from kdexport.data.preprocessing import Preprocessing
from kdexport.diagnose.bisect import Blame, Trusted, file_fault
from kdexport.diagnose.failed_build import blame_bundle
from kdexport.errors import OutputError
from kdexport.graph.precision import cast_to_bf16, cast_to_fp16
from kdexport.graph.quantize import quantize
from kdexport.graph.tensor_ranges import calibrate
from kdexport.graph.trace import LIMITS
from kdexport.verify.reference import make_probes
from tests.conftest import Built, Command
from tests.kdexport.exported_students import small_graph, small_weights

Edit = Callable[[onnx.ModelProto], None]
SIZE = 16
PROBES = make_probes(
    np.random.default_rng(6).integers(0, 256, (5, SIZE, SIZE, 3), dtype=np.uint8),
    Preprocessing(image_size=SIZE, resize=SIZE, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25)),
)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One small network in every precision."""
    folder = tmp_path_factory.mktemp("small")
    exact = small_graph(folder / "fp32.onnx", small_weights())
    cast_to_fp16(exact, folder / "fp16.onnx")
    cast_to_bf16(exact, folder / "bf16.onnx")
    calibrate(exact, [PROBES.images], folder / "ranges.json", method="minmax", percentile=99.9)
    quantize(exact, folder / "ranges.json", folder / "int8.onnx", form="int8-u8")
    return {kind: folder / f"{kind}.onnx" for kind in LIMITS}


def blame(files: dict[str, Path], precision: str, edit: Edit, folder: Path) -> Blame | None:
    model = onnx.load(files[precision])
    edit(model)
    path = folder / "suspect.onnx"
    onnx.save(model, path)
    return file_fault(path, "suspect.onnx", precision, Trusted(onnx.load(files["fp32"]), PROBES), folder / "out")


def change(model: onnx.ModelProto, name: str, edit: Callable[[Any], Any]) -> None:
    item = next(entry for entry in model.graph.initializer if entry.name == name)
    values = numpy_helper.to_array(item)
    item.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(edit(values).astype(values.dtype)), name))


def node_of(model: onnx.ModelProto, operator: str) -> onnx.NodeProto:
    found: onnx.NodeProto = next(node for node in model.graph.node if node.op_type == operator)
    return found


def scaled(model: onnx.ModelProto) -> None:
    change(model, "conv.weight", lambda values: values * 1.02)


def one_weight(model: onnx.ModelProto) -> None:
    def edit(values: Any) -> Any:
        values = values.copy()
        values[4, 1, 2, 0] *= 1.05
        return values

    change(model, "conv.weight", edit)


def no_bias(model: onnx.ModelProto) -> None:
    del node_of(model, "Conv").input[2]


def swapped(model: onnx.ModelProto) -> None:
    for name in ("linear.weight", "linear.bias"):
        change(model, name, lambda values: values[[0, 4, 2, 3, 1, 5, 6]])


def other_padding(model: onnx.ModelProto) -> None:
    attribute = next(a for a in node_of(model, "Conv").attribute if a.name == "pads")
    attribute.ints[:] = [0, 0, 2, 2]


def no_relu(model: onnx.ModelProto) -> None:
    relu = node_of(model, "Relu")
    node_of(model, "GlobalAveragePool").input[0] = relu.input[0]
    model.graph.node.remove(relu)


def other_operator(model: onnx.ModelProto) -> None:
    node_of(model, "Relu").op_type = "Abs"


FAULTS: list[tuple[Edit, str, str]] = [
    (scaled, "conv", "conv.weight is 1.02 times the expected values"),
    (one_weight, "conv", "1 of 243 values of conv.weight differ, the largest difference is at [4, 1, 2, 0]: "),
    (no_bias, "conv", "has no bias; expected conv.bias, 9 values"),
    (swapped, "linear", "the rows of linear.weight are in another order: row 1 contains row 4, row 4 contains row 1"),
    (other_padding, "conv", "pads is [0, 0, 2, 2], expected [1, 1, 1, 1]"),
    (no_relu, "pool", "has an error of"),
    (other_operator, "relu", "is a Abs, expected Relu"),
]


@pytest.mark.parametrize(("edit", "node", "words"), FAULTS)
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_seeded_fault_is_named_by_its_node(
    precision: str, edit: Edit, node: str, words: str, files: dict[str, Path], tmp_path: Path
) -> None:
    found = blame(files, precision, edit, tmp_path)
    assert found is not None
    assert found.node == node
    assert words in found.words
    assert found.file == "suspect.onnx"


@pytest.mark.parametrize("precision", sorted(LIMITS))
def test_a_correct_file_is_not_blamed(precision: str, files: dict[str, Path], tmp_path: Path) -> None:
    assert blame(files, precision, lambda _: None, tmp_path) is None
    assert not (tmp_path / "out").exists()


def test_weights_stored_in_bfloat16_are_compared_although_no_cpu_runs_it(
    files: dict[str, Path], tmp_path: Path
) -> None:
    def edit(model: onnx.ModelProto) -> None:
        item = next(entry for entry in model.graph.initializer if entry.name == "conv.weight")
        # The exponent's last bit: twice or half of the first weight.
        item.raw_data = bytes([item.raw_data[0] ^ 0x80]) + item.raw_data[1:]

    found = blame(files, "bf16", edit, tmp_path)
    assert found is not None
    assert (found.node, found.reproduction) == ("conv", "")
    assert "1 of 243 values of conv.weight differ" in found.words


def test_an_int8_convolution_with_a_wrong_scale_is_named(files: dict[str, Path], tmp_path: Path) -> None:
    found = blame(
        files, "int8", lambda model: change(model, "conv.weight_scale", lambda values: values * 1.7), tmp_path
    )
    assert found is not None
    assert (found.node, found.operator) == ("conv", "Conv")


def test_an_overflow_of_float16_is_named_with_the_value_that_did_not_fit(tmp_path: Path) -> None:
    weights = small_weights()
    weights["conv.weight"] *= 2e4
    weights["linear.weight"] /= 2e4
    exact = small_graph(tmp_path / "fp32.onnx", weights)
    cast_to_fp16(exact, tmp_path / "fp16.onnx")
    found = blame({"fp32": exact, "fp16": tmp_path / "fp16.onnx"}, "fp16", lambda _: None, tmp_path)
    assert found is not None
    assert found.node == "conv"
    assert ", but float16 ends at 65504: " in found.words
    assert json.loads(json.dumps(found.to_json(), allow_nan=False))["error"] is None
    assert reproduce(Path(found.reproduction)).returncode == 1


def reproduce(folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the script alone, isolated, so that neither this checkout nor PYTHONPATH is on its path."""
    guard = "import sys; sys.modules['kdexport'] = None; import runpy; runpy.run_path(sys.argv[1], run_name='__main__')"
    command = [sys.executable, "-I", "-c", guard, str(folder / "reproduce.py")]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd="/")


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_the_reproduction_runs_alone_and_ends_when_the_fault_does(
    precision: str, files: dict[str, Path], tmp_path: Path
) -> None:
    edit: Edit = scaled if precision != "int8" else lambda m: change(m, "conv.weight_scale", lambda v: v * 1.7)
    found = blame(files, precision, edit, tmp_path)
    assert found is not None
    folder = Path(shutil.move(found.reproduction, tmp_path / "moved"))
    assert sorted(path.name for path in folder.iterdir()) == ["expected.npz", "inputs.npz", "node.onnx", "reproduce.py"]
    small = onnx.load(folder / "node.onnx")
    onnx.checker.check_model(small, full_check=True)
    assert {node.op_type for node in small.graph.node} - {"Conv"} <= {
        "Cast", "QuantizeLinear", "DequantizeLinear", "Relu",
    }  # fmt: skip
    done = reproduce(folder)
    assert (done.returncode, done.stderr) == (1, "")
    assert "FAILS" in done.stdout
    if precision == "int8":
        change(small, "conv.weight_scale", lambda values: values / 1.7)
    else:
        change(small, "conv.weight", lambda values: values.astype(np.float64) / 1.02)
    onnx.save(small, folder / "node.onnx")
    assert reproduce(folder).returncode == 0


def test_the_command_names_stage_and_node_of_a_bundle(bundle_copy: Path, here: Command, tmp_path: Path) -> None:
    path = bundle_copy / "model.onnx"
    model = onnx.load(path)
    change(model, "blocks.2.1.conv.0.weight", lambda values: values * 1.01)
    onnx.save(model, path)
    out = tmp_path / "finding"
    done = here("explain-failure", bundle_copy, "--out", out, "--json")
    assert done.exit_code == 1, done.stderr
    found = done.data["blame"]
    assert (found["stage"], found["file"], found["operator"]) == ("export", "model.onnx", "Conv")
    assert found["words"] == "blocks.2.1.conv.0.weight is 1.01 times the expected values"
    assert found["reproduction"] == str(out / "reproduction")
    assert json.loads((out / "blame.json").read_text()) == found
    assert reproduce(out / "reproduction").returncode == 1


def test_an_intact_bundle_has_no_fault(built: Built, tmp_path: Path) -> None:
    assert blame_bundle(built.bundle, tmp_path / "none", lambda _: None) is None
    assert not (tmp_path / "none").exists()


def test_the_fold_is_blamed_by_the_policy_of_the_bundle(bundle_copy: Path, tmp_path: Path) -> None:
    path = bundle_copy / "manifest.json"
    data = json.loads(path.read_text())
    data["policy"]["B"]["max_error"] = 1e-3
    path.write_text(json.dumps(data))
    found = blame_bundle(bundle_copy, tmp_path / "finding", lambda _: None)
    assert found is not None
    assert (found.stage, found.allowed) == ("fold", 1e-3)


def test_a_foreign_folder_is_not_replaced(built: Built, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("unsaved")
    with pytest.raises(OutputError, match="not written by"):
        blame_bundle(built.bundle, tmp_path, lambda _: None)
    assert (tmp_path / "thesis.tex").read_text() == "unsaved"
