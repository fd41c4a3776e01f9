import copy
import logging
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto
from torch import nn

from kdexport.backends.ort import load_model
from kdexport.errors import ExportError
from kdexport.graph.export import export_onnx, read_metadata
from tests.kdexport.exported_students import CLASSES, METADATA, OPSET, SIZE, VARIANTS, exported, images, unfused, write

ROOT = Path(__file__).parents[3]


def graph(variant: str) -> onnx.ModelProto:
    return onnx.load(str(exported(variant).path))


def histogram(model: onnx.ModelProto) -> Counter[str]:
    return Counter(f"{node.domain}:{node.op_type}" for node in model.graph.node)


def small_module() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)).eval()


def described(values: Any) -> list[tuple[str, int, list[str | int]]]:
    """Name, element type and shape of inputs or outputs; a free dimension by its name."""
    return [
        (
            item.name,
            item.type.tensor_type.elem_type,
            [dim.dim_param or dim.dim_value for dim in item.type.tensor_type.shape.dim],
        )
        for item in values
    ]


@pytest.mark.parametrize("variant", VARIANTS)
def test_input_and_logits_are_float32_with_a_free_batch(variant: str) -> None:
    model = graph(variant)
    assert described(model.graph.input) == [("input", TensorProto.FLOAT, ["batch", 3, SIZE, SIZE])]
    assert described(model.graph.output) == [("logits", TensorProto.FLOAT, ["batch", CLASSES])]


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_file_is_valid_and_has_the_requested_opset(variant: str) -> None:
    path = exported(variant).path
    onnx.checker.check_model(str(path), full_check=True)
    assert [(entry.domain, entry.version) for entry in graph(variant).opset_import] == [("", OPSET)]


def test_another_opset_is_written_on_request(tmp_path: Path) -> None:
    model = export_onnx(small_module(), tmp_path / "m.onnx", image_size=16, opset=18, metadata={})
    assert [entry.version for entry in model.opset_import] == [18]


def test_an_opset_that_the_exporter_does_not_write_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"The exporter wrote opset 18; opset 17 was requested\.") as caught:
        export_onnx(small_module(), tmp_path / "m.onnx", image_size=16, opset=17, metadata={})
    assert "opset = 18 or later" in caught.value.remedy


def test_metadata_comes_back_as_it_was_given() -> None:
    model = graph("plain")
    assert read_metadata(model) == METADATA
    assert all(entry.key.startswith("kdexport.") for entry in model.metadata_props)


def test_metadata_of_other_tools_is_not_read() -> None:
    model = onnx.ModelProto()
    model.metadata_props.add(key="author", value="not json {")
    model.metadata_props.add(key="kdexport.seed", value="[3, null]")
    assert read_metadata(model) == {"seed": [3, None]}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_file_holds_no_path_of_this_machine(variant: str) -> None:
    content = exported(variant).path.read_bytes()
    places = [Path.home(), ROOT, Path(sys.prefix), Path(sys.base_prefix), Path.cwd(), Path(torch.__file__).parents[1]]
    for place in {str(place) for place in places} - {"/"}:
        assert place.encode() not in content
    assert not re.search(rb"(/[\w.-]+){2,}\.py|Traceback|File \"", content)


def test_all_weights_lie_in_the_one_file(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "m.onnx"
    path.parent.mkdir()
    export_onnx(small_module(), path, image_size=16, opset=OPSET, metadata={})
    assert [item.name for item in path.parent.iterdir()] == ["m.onnx"]
    for item in (*onnx.load(str(path), load_external_data=False).graph.initializer, *graph("R1").graph.initializer):
        assert item.data_location == TensorProto.DEFAULT


@pytest.mark.parametrize("variant", ["R1", "R2"])
def test_a_folded_student_is_the_plain_graph_operator_by_operator(variant: str) -> None:
    plain, folded = histogram(graph("plain")), histogram(graph(variant))
    assert folded == plain
    assert plain[":Conv"] == 53
    assert plain[":Gemm"] == 1
    assert not any("Normalization" in name for name in plain)
    # Weights too: the plain student's shapes, and no tensor more.
    shapes = [Counter(tuple(item.dims) for item in graph(name).graph.initializer) for name in ("plain", variant)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_weight_is_stored_bit_by_bit(variant: str) -> None:
    stored = {item.name: onnx.numpy_helper.to_array(item) for item in graph(variant).graph.initializer}
    for name, values in exported(variant).weights.items():
        assert stored[name].dtype == np.float32
        assert stored[name].tobytes() == values.tobytes()


def test_two_exports_are_the_same_bytes_in_one_process_and_in_another(tmp_path: Path) -> None:
    write("R1", tmp_path / "again.onnx")
    script = (
        "import sys, pathlib; from tests.kdexport import exported_students; "
        "exported_students.write('R1', pathlib.Path(sys.argv[1]))"
    )
    command = [sys.executable, "-W", "ignore", "-c", script, str(tmp_path / "other.onnx")]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=300)
    first = exported("R1").path.read_bytes()
    assert (tmp_path / "again.onnx").read_bytes() == first
    assert (tmp_path / "other.onnx").read_bytes() == first


@pytest.mark.parametrize("batch", [1, 2, 7])
@pytest.mark.parametrize("variant", VARIANTS)
def test_onnxruntime_computes_what_torch_computes(variant: str, batch: int) -> None:
    x = images(batch, seed=batch)
    with torch.no_grad():
        exact = copy.deepcopy(unfused(variant)).double()(torch.from_numpy(x).double()).numpy()
        eager = exported(variant).fused(torch.from_numpy(x)).numpy()
    got = load_model(exported(variant).path).logits(x)
    assert got.shape == exact.shape == (batch, CLASSES)
    scale = np.abs(exact).max()
    assert np.abs(eager - exact).max() / scale < 1e-5
    assert np.abs(got - exact).max() / scale < 1e-5
    # No two images give the same logits, or a wrong batch dimension would not show.
    assert batch == 1 or np.abs(exact[0] - exact[1]).max() / scale > 1e-3


def test_the_exporter_is_quiet_and_leaves_logging_as_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = logging.root.manager.disable
    logging.disable(logging.DEBUG)
    try:
        export_onnx(small_module(), tmp_path / "m.onnx", image_size=16, opset=OPSET, metadata={})
        assert logging.root.manager.disable == logging.DEBUG
    finally:
        logging.disable(before)
    assert capsys.readouterr().out == ""
