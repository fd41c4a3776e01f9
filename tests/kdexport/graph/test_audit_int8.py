"""The audit of quantized files: each fault that is put into one is found and named."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper

from kdexport.backends.base import Finding
from kdexport.graph.audit import audit_graph
from kdexport.graph.quantize import FORMS, Form, quantize
from kdexport.graph.tensor_ranges import Range, calibrate
from tests.kdexport.graph.int8_block import CALIBRATION, block_graph, block_weights

Change = Callable[[NDArray[Any]], NDArray[Any]]
Edit = Callable[[onnx.GraphProto], None]


@pytest.fixture(scope="module")
def ranges(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Range]:
    folder = tmp_path_factory.mktemp("ranges")
    return calibrate(block_graph(folder / "a.onnx"), [CALIBRATION], folder / "r.json", method="minmax", percentile=99.9)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("audited")
    source = block_graph(folder / "a.onnx")
    calibrate(source, [CALIBRATION], folder / "r.json", method="minmax", percentile=99.9)
    for form in FORMS:
        for bits in (7, 8):
            quantize(source, folder / "r.json", folder / f"{form}.{bits}.onnx", form=form, weight_bits=bits)
    return {path.stem: path for path in folder.glob("int8*.onnx")}


def audit(path: Path, form: str, ranges: dict[str, Range]) -> dict[str, Finding]:
    return {f.check: f for f in audit_graph(path, block_weights(), form=form, opset=20, ranges=ranges)}


def faults(path: Path, form: str, ranges: dict[str, Range]) -> dict[str, str]:
    return {name: finding.fact for name, finding in audit(path, form, ranges).items() if not finding.holds}


def changed(source: Path, path: Path, edit: Edit) -> Path:
    model = onnx.load(str(source))
    edit(model.graph)
    onnx.save(model, str(path))
    return path


def stored(name: str, change: Change) -> Edit:
    def edit(graph: onnx.GraphProto) -> None:
        item = next(item for item in graph.initializer if item.name == name)
        item.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(item).copy()), name))

    return edit


def without_input(name: str, place: int) -> Edit:
    def edit(graph: onnx.GraphProto) -> None:
        node = next(node for node in graph.node if node.name == name)
        del node.input[place:]

    return edit


def in_float32(name: str, place: int, tensor: str) -> Edit:
    """The layer ``name`` reads a float32 tensor instead of a quantized one."""

    def edit(graph: onnx.GraphProto) -> None:
        if tensor not in {item.name for item in graph.initializer} and tensor.endswith("weight"):
            graph.initializer.append(numpy_helper.from_array(block_weights()[tensor], tensor))
        next(node for node in graph.node if node.name == name).input[place] = tensor

    return edit


def shifted(row: int, column: int, by: int) -> Change:
    def change(levels: NDArray[Any]) -> NDArray[Any]:
        levels.reshape(len(levels), -1)[row, column] += by
        return levels

    return change


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bits", [7, 8])
def test_a_correct_file_holds_in_every_finding(
    files: dict[str, Path], ranges: dict[str, Range], form: Form, bits: int
) -> None:
    found = audit(files[f"{form}.{bits}"], form, ranges)
    assert {name for name, finding in found.items() if not finding.holds} == set()
    assert found["weights"].fact == "6 tensors within half a step of their levels"
    assert found[f"precision {form}"].fact == "3 layers read int8 inputs and int8 weights"
    count = {"int8-u8": 6, "int8-s8": 3}[form]
    assert int(found["scales"].fact.split()[0]) >= count


@pytest.mark.parametrize(
    ("edit", "check", "words"),
    [
        (stored("inner.weight_scale", lambda s: s * np.float32(1.02)), "weights", "layer inner.weight"),
        (stored("inner.weight_quantized", shifted(4, 2, 1)), "weights", "layer inner.weight (1 of 36 values"),
        (stored("linear.weight_quantized", lambda q: q[[1, 0, 2, 3, 4]]), "weights", "layer linear.weight"),
        (stored("x_scale", lambda s: s * np.float32(1.001)), "scales", "x_scale is "),
        (stored("input_scale", lambda s: s / 2), "scales", "input_scale is "),
        (in_float32("inner", 1, "inner.weight"), "precision {form}", "inner reads its weight inner.weight in float32"),
        (in_float32("stem", 0, "input"), "precision {form}", "stem reads its input input in float32"),
        (without_input("linear", 2), "weights", "layer linear.bias (absent)"),
    ],
)
@pytest.mark.parametrize("form", FORMS)
def test_a_seeded_fault_is_found_and_named(
    files: dict[str, Path], ranges: dict[str, Range], tmp_path: Path, form: Form, edit: Edit, check: str, words: str
) -> None:
    found = faults(changed(files[f"{form}.8"], tmp_path / "bad.onnx", edit), form, ranges)
    check = check.format(form=form)
    assert check in found
    assert words in found[check]


def test_swapped_biases_are_found_in_each_form(
    files: dict[str, Path], ranges: dict[str, Range], tmp_path: Path
) -> None:
    for form, name in (("int8-u8", "linear.bias_quantized"), ("int8-s8", "linear.bias")):
        bad = changed(files[f"{form}.8"], tmp_path / "bad.onnx", stored(name, lambda b: b[[1, 0, 2, 3, 4]]))
        assert "layer linear.bias" in faults(bad, form, ranges)["weights"]


def test_a_shifted_zero_is_found(files: dict[str, Path], ranges: dict[str, Range], tmp_path: Path) -> None:
    edit = stored("input_zero_point", lambda zero: np.asarray(zero + 3, zero.dtype))
    found = faults(changed(files["int8-u8.8"], tmp_path / "bad.onnx", edit), "int8-u8", ranges)
    assert "input_scale has zero at " in found["scales"]


def test_a_file_in_the_other_form_is_found(files: dict[str, Path], ranges: dict[str, Range]) -> None:
    assert "has levels in uint8" in faults(files["int8-u8.8"], "int8-s8", ranges)["scales"]
    assert "has levels in int8" in faults(files["int8-s8.8"], "int8-u8", ranges)["scales"]


def test_a_file_without_its_ranges_and_a_float32_file_never_pass(files: dict[str, Path], tmp_path: Path) -> None:
    assert "belongs to no calibrated tensor" in faults(files["int8-u8.8"], "int8-u8", {})["scales"]
    plain = faults(block_graph(tmp_path / "plain.onnx"), "int8-u8", {})
    assert set(plain) == {"precision int8-u8", "scales"}


def test_scales_that_are_not_numbers_never_pass(
    files: dict[str, Path], ranges: dict[str, Range], tmp_path: Path
) -> None:
    for name, check in (("x_scale", "scales"), ("inner.weight_scale", "weights")):
        edit = stored(name, lambda scale: np.full_like(scale, np.nan))
        assert check in faults(changed(files["int8-u8.8"], tmp_path / "bad.onnx", edit), "int8-u8", ranges)
